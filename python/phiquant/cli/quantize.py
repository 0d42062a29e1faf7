"""`phiquant quantize`: a checkpoint on disk to a quantized file on disk, tensor by tensor or calibrated."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from .. import stream, tied
from ..auto import is_auto
from ..checkpoint import Checkpoint
from ..export import claim_folder
from ..export import export as write
from ..load import EMBEDDED, load
from ..models import phi
from ..quantize import quantize as quantize_model
from ..ranks import torchrun
from ..recipe import Recipe
from ..solvers import NEEDS_STATISTICS
from ..spec import Target
from ..transforms import NEEDS_DATA
from .arguments import (
    CalibrationOption,
    CheckpointArg,
    EmbeddingOption,
    OptionsOption,
    RecipeOption,
    SolverOption,
    TargetOption,
    ToleranceOption,
    TransformOption,
    check_solver,
    check_transforms,
    checkpoint_folder,
    output_folder,
    read_options,
    read_recipe,
    read_target,
    read_text,
)
from .session import DebugFlag, JsonFlag, Ui, files_table, session, size, table

OutOption = Annotated[Path, typer.Option("--out", "-o", help="Folder for the files, their receipt and the log.")]


def quantize(
    checkpoint: CheckpointArg,
    target: TargetOption,
    out: OutOption,
    solver: SolverOption = "rtn",
    calibration: CalibrationOption = None,
    transform: TransformOption = None,
    recipe: RecipeOption = None,
    embedding: EmbeddingOption = None,
    tolerance: ToleranceOption = tied.TOLERANCE,
    option: OptionsOption = None,
    json_: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Quantize CHECKPOINT from disk to disk. The output appears when it is complete; a killed run continues.

    With calibration it is read and solved decoder layer by decoder layer; the log tells each one's error. With
    auto the model is held in memory. Under torchrun all processes share the calibration; the first one writes.
    """
    with session(json_, debug) as ui, torchrun() as ranks:
        chosen, rules = read_target(target), read_recipe(recipe)
        check_solver(solver)
        transforms = check_transforms(transform)
        needy = [
            n
            for n in (solver, *(t.partition(":")[0] for t in transforms))
            if n in NEEDS_STATISTICS | NEEDS_DATA or is_auto(n)
        ]
        in_memory = is_auto(solver)
        needy += ["--embedding auto"] if embedding == "auto" else []
        if in_memory and embedding is not None:
            raise typer.BadParameter(
                "auto measures models in memory: name the table in a recipe", param_hint="--embedding"
            )
        options = chosen.options | read_options(option, chosen.format)
        text = read_text(calibration, "--calibration")
        if needy and text is None and checkpoint != EMBEDDED:
            raise typer.BadParameter(
                f"{needy[0]} needs a text to calibrate {checkpoint} on", param_hint="--calibration"
            )
        with checkpoint_folder(checkpoint) as folder:
            if ranks.first:
                ui.log_to(output_folder(out) / "phiquant.log")
            if in_memory and ranks.world > 1:
                raise typer.BadParameter("compares whole models, in one process", param_hint="--solver")
            if in_memory:
                receipt = _in_memory(ui, folder, chosen, out, solver, rules, text, options, transforms)
            else:
                with ui.progress("quantizing") if ranks.first else nullcontext() as step:
                    receipt = stream.quantize_checkpoint(
                        *(folder, chosen, out),
                        solver=solver,
                        recipe=rules,
                        calibration=text,
                        offload=True,
                        embedding=embedding,
                        tolerance=tolerance,
                        transforms=transforms,
                        progress=step,
                        ranks=ranks,
                        **options,
                    )
        if ranks.first:
            found = {"embedding": receipt["embedding"]} if "embedding" in receipt else {}
            tables = [_trials(receipt["embedding"])] if found else []
            ui.result({"ok": True, "out": str(out), "files": receipt["files"], **found}, *tables, files_table(receipt))


def _trials(choice: dict[str, Any]) -> Any:
    """What each grid of a shared table would cost."""
    chosen = choice["chosen"] or "float"
    made = table("table on", "size>", "KL>", "loss>", title=f"{chosen}: at most {choice['tolerance']:g} nats of KL")
    for trial in choice["trials"]:
        made.add_row(trial["target"], size(trial["bytes"]), f"{trial['kl']:.2e}", f"{trial['loss']:+.2e}")
    return made


def _in_memory(
    ui: Ui,
    folder: Path,
    target: Target,
    out: Path,
    solver: str,
    recipe: Recipe | None,
    text: str | None,
    options: dict[str, Any],
    transforms: tuple[str, ...],
) -> dict[str, Any]:
    """The model in its own dtype, a decoder layer in float32 at a time; what is finished is kept in OUT/calibration."""
    claim_folder(out, target.format)
    dtype = Checkpoint(folder).dtype(f"{phi.EMBEDDING}.weight")
    model, tokenizer = load(folder, getattr(torch, dtype))
    state = out / "calibration"
    with ui.progress("quantizing") as step:
        quantize_model(
            *(model, recipe or target, solver, step),
            calibration=text,
            tokenizer=tokenizer,
            folder=state,
            offload=True,
            transforms=transforms,
        )
    with ui.progress("writing") as step:
        receipt = write(model, tokenizer, out, format=target.format, progress=step, **options)
    shutil.rmtree(state, ignore_errors=True)  # not there where no data were needed
    return receipt
