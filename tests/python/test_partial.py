"""A partial file resumes to the same bytes, refuses a full disk, and is never half a result."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from phiquant import PhiquantError
from phiquant.formats import partial
from phiquant.formats.partial import PartialFile

NAMES, SIZES = ["a", "b", "c"], [3, 8, 5]
DATA = {name: bytes([65 + i]) * size for i, (name, size) in enumerate(zip(NAMES, SIZES, strict=True))}
COMPLETE = b"head" + bytes(4) + b"AAA" + bytes(5) + b"B" * 8 + b"CCCCC" + bytes(3)


def make(folder: Path, fingerprint: str = "one") -> PartialFile:
    return PartialFile(folder / "f.bin", b"head", NAMES, SIZES, fingerprint, align=8)


def fill(file: PartialFile, stop: str | None = None) -> None:
    for name in file.remaining():
        if name == stop:
            raise KeyboardInterrupt
        file.append(name, [DATA[name][:1], DATA[name][1:]], {"of": name})


def interrupt(folder: Path, stop: str) -> None:
    with pytest.raises(KeyboardInterrupt), make(folder) as file:
        fill(file, stop)


def test_header_and_tensors_are_aligned_and_appear_at_commit(tmp_path: Path) -> None:
    with make(tmp_path) as file:
        fill(file)
        assert not (tmp_path / "f.bin").exists()
        file.commit()
    assert (tmp_path / "f.bin").read_bytes() == COMPLETE
    assert file.size == len(COMPLETE)
    assert [p.name for p in tmp_path.iterdir()] == ["f.bin"]


@pytest.mark.parametrize("stop", NAMES)
def test_continues_after_the_last_complete_tensor(tmp_path: Path, stop: str) -> None:
    interrupt(tmp_path, stop)
    with make(tmp_path) as file:
        assert list(file.records) == NAMES[: NAMES.index(stop)]
        fill(file)
        file.commit()
    assert (tmp_path / "f.bin").read_bytes() == COMPLETE
    assert file.records == {name: {"of": name} for name in NAMES}


def test_starts_anew_for_other_inputs(tmp_path: Path) -> None:
    interrupt(tmp_path, "c")
    with make(tmp_path, fingerprint="two") as file:
        assert not file.records


@pytest.mark.parametrize(
    "journal",
    ["", "[]", '{"identity": 1}', '{"records": {"a": 1}}', "[" * 100_000],
    ids=["empty", "list", "no-records", "no-identity", "deep"],
)
def test_starts_anew_after_a_damaged_journal(tmp_path: Path, journal: str) -> None:
    interrupt(tmp_path, "c")
    (tmp_path / "f.bin.partial.json").write_text(journal)
    with make(tmp_path) as file:
        assert not file.records


def test_starts_anew_if_the_journal_promises_more_than_the_file_holds(tmp_path: Path) -> None:
    interrupt(tmp_path, "c")
    os.truncate(tmp_path / "f.bin.partial", 12)
    with make(tmp_path) as file:
        assert not file.records


def test_half_a_tensor_after_the_journal_is_dropped(tmp_path: Path) -> None:
    interrupt(tmp_path, "b")
    with open(tmp_path / "f.bin.partial", "ab") as raw:
        raw.write(b"half of a tensor that a kill cut off")
    with make(tmp_path) as file:
        fill(file)
        file.commit()
    assert (tmp_path / "f.bin").read_bytes() == COMPLETE


def test_commit_refuses_an_incomplete_file(tmp_path: Path) -> None:
    with make(tmp_path) as file:
        file.append("a", [DATA["a"]], {})
        with pytest.raises(PhiquantError, match="2 tensors were not written, first b"):
            file.commit()
    assert not (tmp_path / "f.bin").exists()


def test_a_tensor_of_the_wrong_size_or_out_of_turn_is_refused(tmp_path: Path) -> None:
    with make(tmp_path) as file, pytest.raises(PhiquantError, match="b is not the next tensor"):
        file.append("b", [DATA["b"]], {})
    with pytest.raises(PhiquantError, match="a has 2 bytes, its layout says 3"), make(tmp_path) as file:
        file.append("a", [b"AA"], {})


def test_a_kept_journal_tells_the_next_run_that_the_file_is_complete(tmp_path: Path) -> None:
    with make(tmp_path) as file:
        fill(file)
        file.commit(keep_journal=True)
    with make(tmp_path) as file:
        assert list(file.remaining()) == []
        assert list(file.records) == NAMES
        file.commit()
    assert [p.name for p in tmp_path.iterdir()] == ["f.bin"]


@pytest.mark.skipif(os.name != "posix", reason="Windows has no flock")
def test_two_writers_of_one_file_are_refused(tmp_path: Path) -> None:
    with make(tmp_path) as first:
        with pytest.raises(PhiquantError, match="another process is writing"), make(tmp_path):
            pass
        fill(first)
        first.commit()


def test_a_full_disk_is_refused_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partial.shutil, "disk_usage", lambda _: Usage())
    with (
        pytest.raises(PhiquantError, match=r"the disk is full: .*f\.bin takes 32 bytes, .* 5 are free"),
        make(tmp_path),
    ):
        pass


class Usage:
    free = 5


def test_a_disk_that_fills_up_keeps_the_complete_tensors(tmp_path: Path) -> None:
    def full() -> Iterator[bytes]:
        yield b"BB"
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def write() -> None:
        with make(tmp_path) as file:
            file.append("a", [DATA["a"]], {"of": "a"})
            file.append("b", full(), {})

    with pytest.raises(PhiquantError, match=r"the disk is full.* run the same command again"):
        write()
    assert (tmp_path / "f.bin.partial").stat().st_size == 16
    with make(tmp_path) as file:
        assert list(file.records) == ["a"]
        fill(file)
        file.commit()
    assert (tmp_path / "f.bin").read_bytes() == COMPLETE


CHILD = """
import os, resource, signal, sys
from pathlib import Path
from phiquant.formats import partial
how, folder = sys.argv[1], Path(sys.argv[2])
if how == "limit":
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
partial.SYNC_BYTES = 1 << 18
names = [str(i) for i in range(40)]
with partial.PartialFile(folder / "f.bin", b"head", names, [100_000] * 40, "one") as file:
    for name in file.remaining():
        if how == "kill" and name == "25":
            os.kill(os.getpid(), signal.SIGKILL)
        file.append(name, [bytes([int(name)]) * 100_000], {})
    file.commit()
"""


def child(how: str, folder: Path) -> subprocess.CompletedProcess[Any]:
    return subprocess.run([sys.executable, "-c", CHILD, how, str(folder)], capture_output=True, text=True, timeout=120)


@pytest.mark.skipif(os.name != "posix", reason="limits and signals of POSIX")
@pytest.mark.parametrize("how", ["kill", "limit"])
def test_a_process_that_ends_in_the_middle_leaves_what_the_next_one_continues(tmp_path: Path, how: str) -> None:
    ended = child(how, tmp_path)
    if how == "kill":
        assert ended.returncode == -signal.SIGKILL
    else:
        assert "the limit on the size of a file is reached" in ended.stderr
    assert not (tmp_path / "f.bin").exists()
    begun = (tmp_path / "f.bin.partial.json").read_text()
    assert '"5"' in begun  # a part of the work was kept
    assert child("", tmp_path).returncode == 0
    assert (tmp_path / "f.bin").read_bytes() == b"head" + b"".join(bytes([i]) * 100_000 for i in range(40))
