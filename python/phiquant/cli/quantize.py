"""`phiquant quantize`: a checkpoint on disk to a quantized file on disk, tensor by tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import stream
from .arguments import (
    CheckpointArg,
    RecipeOption,
    SolverOption,
    TargetOption,
    check_solver,
    checkpoint_folder,
    output_folder,
    read_recipe,
    read_target,
)
from .session import DebugFlag, JsonFlag, files_table, session

OutOption = Annotated[Path, typer.Option("--out", "-o", help="Folder for the files, their receipt and the log.")]


def quantize(
    checkpoint: CheckpointArg,
    target: TargetOption,
    out: OutOption,
    solver: SolverOption = "rtn",
    recipe: RecipeOption = None,
    json_: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Quantize CHECKPOINT from disk to disk. The output appears when it is complete; a killed run continues."""
    with session(json_, debug) as ui:
        chosen, rules = read_target(target), read_recipe(recipe)
        check_solver(solver)
        with checkpoint_folder(checkpoint) as folder:
            ui.log_to(output_folder(out) / "phiquant.log")
            with ui.progress("quantizing") as step:
                receipt = stream.quantize_checkpoint(folder, chosen, out, solver=solver, recipe=rules, progress=step)
        ui.result({"ok": True, "out": str(out), "files": receipt["files"]}, files_table(receipt))
