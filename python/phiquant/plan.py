"""What quantizing a checkpoint will take: exact sizes, and time and memory from a sample that is really made.

The sample is the model cut after some decoder layers: quantized, written, read back and compared as the whole will
be. A calibrated run's is one decoder layer, solved on some windows.
"""

from __future__ import annotations

import re
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .calibrate import Calibration, token_windows
from .calibration_sample import calibration_seconds
from .checkpoint_source import CheckpointSource
from .export import sign, verify
from .formats import receipt as receipts
from .formats.registry import find
from .load import load_tokenizer
from .models import phi
from .recipe import Recipe
from .solvers import DATA_FREE, NEEDS_STATISTICS
from .spec import Target
from .spec import target as find_target

_SHARE = 8  # one layer in so many is in the sample
_KEPT = (
    1.15  # what the allocator keeps beside the pieces varies with the order of threads: by 0.99 to 1.42 of a sample's
)
_IN_LAYER = re.compile(r".*layers?[./](\d+)[./].*")


@dataclass(frozen=True)
class Plan:
    """What quantizing a checkpoint takes.

    files: exact bytes of every file (the receipt, some kB, excepted). peak_memory: estimate in bytes, of the
    whole process, from what the sample took. seconds: estimate of the whole run on this machine with this number of
    threads: reading, choosing codes, writing to the disk, reading back and comparing. If the disk is slow and other
    parts of the checkpoint are in the page cache than those of the sample, it is off by that.
    bits_per_weight: of the whole model as stored.
    """

    target: str
    files: dict[str, int]
    bytes: int
    source_bytes: int
    parameters: int
    bits_per_weight: float
    peak_memory: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def plan(
    folder: str | Path,
    target: str | Target,
    *,
    recipe: Recipe | None = None,
    solver: str = "rtn",
    calibration: Calibration | None = None,
    offload: bool = False,
    place: str | Path | None = None,
) -> Plan:
    """Sizes, memory and time of quantize_checkpoint() with the same arguments.

    It takes about an eighth of a data-free run, or two decoder layers of a calibrated one. place: an existing folder,
    best on the disk of the output, for the sample, which is deleted; None: the system's temporary one.
    PhiquantError for whatever that call would refuse, but for values that are not finite.
    """
    target = find_target(target) if isinstance(target, str) else target
    on_data = solver in NEEDS_STATISTICS or (calibration is not None and solver not in DATA_FREE)
    source = CheckpointSource(folder, target if recipe is None else recipe, "rtn" if on_data else solver)
    writer = find(target.format).writer()
    for entry in source.entries:
        writer.check(entry)
    files = writer.sizes(source, **target.options)
    parameters = sum(entry.numel for entry in source.entries)
    with tempfile.TemporaryDirectory(prefix="phiquant-plan-", dir=place) as sample:
        seconds = _writing(source, target, Path(sample) / "written")
        peak = round(_KEPT * peak_memory_here())
        if on_data:
            ids = token_windows(calibration, load_tokenizer(folder))
            run = Path(sample) / "run" if offload else None
            more, held = calibration_seconds(source, ids, solver, run)
            seconds, peak = seconds + more, max(peak, peak_memory_here() + held)
    return Plan(
        target=target.name,
        files=files,
        bytes=sum(files.values()),
        source_bytes=sum(stored.nbytes for stored in source.checkpoint.tensors.values()),
        parameters=parameters,
        bits_per_weight=8 * sum(files.values()) / parameters,
        peak_memory=peak,
        seconds=seconds,
    )


def _writing(source: CheckpointSource, target: Target, out: Path) -> float:
    """Seconds to quantize, write, read back and compare all, from doing so with some layers and what is around them."""
    layers = phi.sizes(source.config).layers
    some = min(layers, max(2, -(-layers // _SHARE)))
    sample = source.first_layers(some)
    spent, last = dict.fromkeys(range(-1, some), 0.0), time.perf_counter()
    began = last

    def step(name: str, done: int, total: int) -> None:
        nonlocal last
        now = time.perf_counter()
        spent[_layer(name)] += now - last
        last = now

    find(target.format).writer().write(sample, out, progress=step, **target.options)
    writing = time.perf_counter() - began
    reading = _timed(lambda: sign(out, sample.config))
    if some == layers:
        return writing + reading
    receipt = receipts.read(out)
    receipts.write(out, {**receipt, "tensors": [t for t in receipt["tensors"] if _layer(t["name"]) < 0]})
    around = _timed(lambda: verify(out, decode=False))
    later = [spent[index] for index in range(1, some)]  # the first may have waited for what came before
    return writing + reading + (layers - some) * (sum(later) / len(later) + max(0.0, reading - around) / some)


def _layer(name: str) -> int:
    """The decoder layer that a tensor belongs to; -1: none."""
    found = _IN_LAYER.fullmatch(name)
    return int(found[1]) if found else -1


def _timed(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def peak_memory_here() -> int:
    """Largest resident size of this process so far, in bytes; 0 where the system does not tell."""
    try:  # Linux: getrusage also counts the process that started this one
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
