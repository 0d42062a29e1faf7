"""A short run of the fuzzers of tests/fuzz/readers; `make fuzz` runs them longer."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from random import Random
from typing import Any

import pytest

ROOM = Path(__file__).parents[1] / "fuzz" / "readers"


def _module(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOM / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


mutate, run, subjects, worker = (_module(name) for name in ("mutate", "run", "subjects", "worker"))


@pytest.mark.parametrize("name", subjects.subjects())
def test_a_damaged_file_is_read_or_refused(name: str) -> None:
    outcome = run.fuzz(name, seconds=3)
    assert not outcome.faults, "\n".join(outcome.faults.values())
    assert outcome.verdicts["refused"] >= 10


def test_the_same_seed_makes_the_same_damage() -> None:
    files = {"config.json": b'{"a": [1, {"b": "c"}], "d": 2}', "x.bin": bytes(range(200))}
    one, two = ([mutate.damage(files, Random(f"{i}"), Path("/o")) for i in range(50)] for _ in range(2))
    assert one == two
    assert len({tuple(sorted(damaged.items())) for damaged, _ in one}) > 30


FAULTS = {  # what the fuzzer must see -> a reader that does it
    "names no file": "raise PhiquantError('something is wrong')",
    "KeyError": "raise KeyError('x')",
    "MemoryError": "bytearray(2 << 30)",
    "opened outside its folder": "os.close(os.open(folder / '..' / 'outside' / 'a.json', 0))",
    "opened outside its folder: /etc": "open('/etc/hostname').close()",
    "no answer in": "time.sleep(60)",
    "ended with -6": "os.abort()",
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_the_fuzzer_sees_it(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("worker", "mutate"):
        (tmp_path / f"{name}.py").write_text((ROOM / f"{name}.py").read_text())
    (tmp_path / "subjects.py").write_text(
        "import os, time\nfrom collections import namedtuple\nfrom phiquant import PhiquantError\n"
        "Subject = namedtuple('Subject', 'seeds read')\ncalls = []\n"
        "def read(folder):\n    calls.append(1)\n    if len(calls) > 1:  # the first is the valid seed\n"
        f"        {FAULTS[fault]}\n"
        "def subjects():\n    return {'s': Subject(lambda: [{'a.json': b'{}'}], read)}\n"
    )
    monkeypatch.setattr(run, "_HERE", tmp_path)
    monkeypatch.setattr(run, "SILENCE", 1.0)
    outcome = run.fuzz("s", seconds=60, count=1)
    assert outcome.verdicts == {"fault": 1}
    assert fault in next(iter(outcome.faults.values()))
