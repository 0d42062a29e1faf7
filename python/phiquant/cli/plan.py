"""`phiquant plan`: what `quantize` would do, before it does it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import stream
from .arguments import (
    CalibrationOption,
    CheckpointArg,
    RecipeOption,
    SolverOption,
    TargetOption,
    check_solver,
    checkpoint_folder,
    read_recipe,
    read_target,
    read_text,
)
from .session import DebugFlag, JsonFlag, session, size, table

PlaceOption = Annotated[Path | None, typer.Option("--out", "-o", help="Where the output will be: it decides the disk.")]


def plan(
    checkpoint: CheckpointArg,
    target: TargetOption,
    solver: SolverOption = "rtn",
    calibration: CalibrationOption = None,
    recipe: RecipeOption = None,
    out: PlaceOption = None,
    json_: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Say beforehand how large the file becomes, how much memory it takes, and about how long.

    A sample, some decoder layers, is written and read back in a temporary folder, beside the output if --out is given.
    """
    with session(json_, debug) as ui:
        chosen, rules = read_target(target), read_recipe(recipe)
        check_solver(solver)
        text = read_text(calibration, "--calibration")
        place = None if out is None else next(path for path in (out, *out.absolute().parents) if path.is_dir())
        with checkpoint_folder(checkpoint) as folder:
            made = stream.plan(
                *(folder, chosen), recipe=rules, solver=solver, calibration=text, offload=True, place=place
            )
        files = table("file", "size>")
        for name, count in made.files.items():
            files.add_row(name, size(count))
        facts = table("what", "value>")
        facts.add_row("parameters", f"{made.parameters:,}")
        facts.add_row("size now", size(made.source_bytes))
        facts.add_row("size then", size(made.bytes))
        facts.add_row("bits per weight, of all", f"{made.bits_per_weight:.3f}")
        facts.add_row("peak memory, about", size(made.peak_memory))
        facts.add_row("time, about", f"{made.seconds:.0f} s" if made.seconds >= 10 else f"{made.seconds:.1f} s")
        ui.result(made.to_dict(), files, facts)
