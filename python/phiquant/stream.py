"""Disk to disk: quantize a checkpoint while it is read, and say beforehand what that takes."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import tied
from .auto import is_auto
from .calibrate import Calibration, token_windows
from .calibrated_source import CalibratedSource
from .checkpoint import Checkpoint
from .checkpoint_source import CheckpointSource
from .errors import PhiquantError
from .export import claim_folder, sign
from .formats import receipt as receipts
from .formats.registry import find
from .formats.source import Entry, Progress
from .load import load_tokenizer
from .plan import Plan, peak_memory_here, plan
from .ranks import ALONE, Ranks
from .recipe import Recipe, as_recipe
from .rewritten import rewrite
from .solvers import DATA_FREE, NEEDS_STATISTICS
from .spec import Target
from .spec import target as find_target
from .transforms import NEEDS_DATA, WITH_TRANSFORMS

__all__ = ["Plan", "peak_memory_here", "plan", "quantize_checkpoint"]


def quantize_checkpoint(
    folder: str | Path,
    target: str | Target,
    out: str | Path,
    *,
    solver: str = "rtn",
    recipe: Recipe | None = None,
    calibration: Calibration | None = None,
    offload: bool = False,
    embedding: str | None = None,
    tolerance: float = tied.TOLERANCE,
    transforms: Sequence[str] = (),
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
    embedding: the target of the table that embedding and head share, or "auto": the smallest of tied.CANDIDATES whose
    KL from the float model, alone in it, is at most `tolerance` nats a token on the last of the calibration windows;
    the receipt's "embedding" tells what each lost.
    transforms: rewrites that come first and leave the float function alone (see `transform`), ["smooth"]; made in a
        copy of the checkpoint in `out`/calibration, as large as it is, that is removed in the end.
    progress: called with (module, modules done, modules in all) while codes are chosen on data, then with (tensor,
    bytes written, bytes in all). options: of the format's writer.
    ranks: processes that all make this call and share the calibration (docs/training-engines.md); rank 0 writes.
    """
    target = find_target(target) if isinstance(target, str) else target
    out, run = Path(out), Path(out) / "calibration"
    if out.exists() and Path(folder).exists() and out.samefile(folder):
        raise PhiquantError(f"{out} is the checkpoint itself; choose another folder for the output")
    if is_auto(solver):
        raise PhiquantError(
            f"{solver} measures whole models, so it cannot stream; hold the model in memory: load, quantize, export "
            "(which `phiquant quantize` does by itself)"
        )
    before, solver = WITH_TRANSFORMS.get(solver, ((), solver))
    transforms = (*transforms, *before)
    what: Recipe | Target = target if recipe is None else recipe
    writer = find(target.format).writer()
    on_data = solver in NEEDS_STATISTICS or (calibration is not None and solver not in DATA_FREE)
    wanted = on_data or embedding == "auto" or any(name.partition(":")[0] in NEEDS_DATA for name in transforms)
    ids = token_windows(calibration, load_tokenizer(folder)) if wanted else None
    if ranks.world > 1 and (not on_data or embedding == "auto" or transforms):
        what_not = transforms[0] if transforms else "--embedding auto" if on_data else f"{solver} without calibration"
        raise PhiquantError(f"{what_not} has nothing that {ranks.world} processes could share; run it in one")
    if ranks.first:
        claim_folder(out, target.format)
    told: list[dict[str, Any]] = []
    if transforms:
        specs = {entry.module: entry.spec for entry in CheckpointSource(folder, what).entries}
        told = rewrite(folder, run / "rewritten", transforms, specs, ids)
        folder = run / "rewritten"
    choice = None
    if embedding is not None:
        rules = as_recipe(what, Checkpoint(folder).config)
        what, choice = tied.with_table(
            *(rules, embedding, tolerance, folder, target.format, solver, ids, run),
            check=lambda one: writer.sizes(CheckpointSource(folder, one), **target.options),
            progress=progress,
        )
    source: CheckpointSource
    if ids is None or not on_data:
        source = CheckpointSource(folder, what, solver)
    else:
        source = calibrated = CalibratedSource(folder, what, solver, ids, run, offload=offload)
        for entry in source.entries:
            writer.check(entry)  # now, not after hours
        calibrated.solve(progress, ranks)
        if not ranks.first:
            ranks.wait()
            return receipts.read(out)
    source.entries = [_rewritten(entry, told) for entry in source.entries]
    writer.write(source, out, progress=progress, **(target.options | options))
    receipt = sign(out, source.config)
    if choice is not None:
        receipt["embedding"] = choice.to_dict()
        receipts.write(out, receipt)
    shutil.rmtree(run, ignore_errors=True)  # not there without data and transforms
    ranks.wait()
    return receipt


def _rewritten(entry: Entry, told: list[dict[str, Any]]) -> Entry:
    if not told or entry.spec is None:
        return entry
    return dataclasses.replace(entry, origin={**(entry.origin or {}), "transforms": told})
