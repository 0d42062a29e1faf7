"""Disk to disk: quantize a checkpoint while it is read, and say beforehand what that takes."""

from __future__ import annotations

import dataclasses
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .calibrate import Calibration, token_windows
from .calibrated_source import CalibratedSource
from .checkpoint_source import CheckpointSource
from .errors import PhiquantError
from .export import claim_folder, sign
from .formats import receipt as receipts
from .formats.registry import find
from .formats.source import CHUNK_BYTES, Entry, Progress, row_slices
from .load import load_tokenizer
from .ranks import ALONE, Ranks
from .recipe import Recipe
from .solvers import NEEDS_STATISTICS
from .spec import FLOAT_BITS, Target
from .spec import target as find_target

# Memory beside the imports, in units of a piece's size in float32: the bytes read, temporaries of the solver,
# codes, packed bytes; then those of the independent reader. benchmarks/stream.py measured 5.3.
_PIECES = 6.0


@dataclass(frozen=True)
class Plan:
    """What quantizing a checkpoint takes.

    files: exact bytes of every file (the receipt, some kB, excepted). peak_memory: estimate in bytes, of the
    whole process. seconds: estimate for reading, quantizing and packing on this machine and this number
    of threads, from a timed sample; writing to the disk and reading back take one to two times as long again.
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


def quantize_checkpoint(
    folder: str | Path,
    target: str | Target,
    out: str | Path,
    *,
    solver: str = "rtn",
    recipe: Recipe | None = None,
    calibration: Calibration | None = None,
    offload: bool = False,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
    **options: Any,
) -> dict[str, Any]:
    """Quantize the checkpoint `folder` into the folder `out`, tensor by tensor; return the receipt.

    target: names the format and the grid; with a recipe, the recipe says the grids. Memory is that of
    some rows, not of the model. The same call after a kill continues where it stopped, to the same bytes.
    calibration: a text, texts or windows of ids, for any solver: the checkpoint is then read and solved decoder layer
    by decoder layer (docs/methods/calibration.md), and what is solved is kept in `out`/calibration until the file is
    written. A solver that needs data and is given none takes testing.training_text(). offload: the activations too.
    progress: called with (module, modules done, modules in all) while codes are chosen on data, then with (tensor,
    bytes written, bytes in all). options: of the format's writer.
    ranks: processes that all make this call and share the calibration (docs/training-engines.md); rank 0 writes.
    """
    target = find_target(target) if isinstance(target, str) else target
    out, run = Path(out), Path(out) / "calibration"
    if out.exists() and Path(folder).exists() and out.samefile(folder):
        raise PhiquantError(f"{out} is the checkpoint itself; choose another folder for the output")
    what, writer = target if recipe is None else recipe, find(target.format).writer()
    source: CheckpointSource
    if calibration is None and solver not in NEEDS_STATISTICS:
        if ranks.world > 1:
            raise PhiquantError(f"{solver} without calibration has nothing that {ranks.world} processes could share")
        source = CheckpointSource(folder, what, solver)
        claim_folder(out, target.format)
    else:
        ids = token_windows(calibration, load_tokenizer(folder))
        source = calibrated = CalibratedSource(folder, what, solver, ids, run, offload=offload)
        if ranks.first:
            claim_folder(out, target.format)
        for entry in source.entries:
            writer.check(entry)  # now, not after hours
        calibrated.solve(progress, ranks)
        if not ranks.first:
            ranks.wait()
            return receipts.read(out)
    writer.write(source, out, progress=progress, **(target.options | options))
    receipt = sign(out, source.config)
    if isinstance(source, CalibratedSource):
        shutil.rmtree(run)
    ranks.wait()
    return receipt


def plan(folder: str | Path, target: str | Target, *, recipe: Recipe | None = None, solver: str = "rtn") -> Plan:
    """Sizes, memory and time of quantize_checkpoint() with the same arguments. Writes nothing.

    PhiquantError for whatever that call would refuse, but for values that are not finite.
    """
    target = find_target(target) if isinstance(target, str) else target
    source = CheckpointSource(folder, target if recipe is None else recipe, solver)
    writer = find(target.format).writer()
    for entry in source.entries:
        writer.check(entry)
    files = writer.sizes(source, **target.options)
    parameters = sum(entry.numel for entry in source.entries)
    return Plan(
        target=target.name,
        files=files,
        bytes=sum(files.values()),
        source_bytes=sum(stored.nbytes for stored in source.checkpoint.tensors.values()),
        parameters=parameters,
        bits_per_weight=8 * sum(files.values()) / parameters,
        peak_memory=_peak_memory(source),
        seconds=_seconds(source, writer),
    )


def _peak_memory(source: CheckpointSource) -> int:
    """This process as it is, and the pieces."""
    return peak_memory_here() + int(_PIECES * max(_slice_bytes(entry) for entry in source.entries))


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


def _slice_bytes(entry: Entry) -> int:
    rows = next(row_slices(entry))
    return min(max(CHUNK_BYTES, 1), entry.numel * FLOAT_BITS["float32"] // 8) if rows.stop else 0


def _seconds(source: CheckpointSource, writer: Any) -> float:
    """One piece of the largest entry of each kind, timed, times how much of that kind there is."""
    kinds: dict[Any, list[Entry]] = {}
    for entry in source.entries:
        kinds.setdefault(entry.spec or entry.dtype, []).append(entry)
    total = 0.0
    for entries in kinds.values():
        largest = max(entries, key=lambda entry: entry.numel)
        rows = next(row_slices(largest))
        sample = dataclasses.replace(largest, shape=(rows.stop, *largest.shape[1:])) if largest.shape else largest
        total += _time(source, writer, sample) / max(1, sample.numel) * sum(entry.numel for entry in entries)
    return total


def _time(source: CheckpointSource, writer: Any, sample: Entry) -> float:
    """Seconds to read and encode the sample: the second of two runs, whose pages and code are warm."""
    for _ in range(2):
        began = time.perf_counter()
        for _ in writer.encode(source, sample):
            pass
    return time.perf_counter() - began
