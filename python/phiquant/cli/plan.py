"""`phiquant plan`: what `quantize` would do, before it does it."""

from __future__ import annotations

from .. import stream
from .arguments import (
    CheckpointArg,
    RecipeOption,
    SolverOption,
    TargetOption,
    check_solver,
    checkpoint_folder,
    read_recipe,
    read_target,
)
from .session import DebugFlag, JsonFlag, session, size, table


def plan(
    checkpoint: CheckpointArg,
    target: TargetOption,
    solver: SolverOption = "rtn",
    recipe: RecipeOption = None,
    json_: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Say beforehand how large the file becomes, how much memory it takes, and about how long. Writes nothing."""
    with session(json_, debug) as ui:
        chosen, rules = read_target(target), read_recipe(recipe)
        check_solver(solver)
        with checkpoint_folder(checkpoint) as folder:
            made = stream.plan(folder, chosen, recipe=rules, solver=solver)
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
