"""`phiquant search`: which slice gets how many bits, so that the file fits into a budget and loses least."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from ..formats.partial import write_atomically
from ..load import EMBEDDED
from ..search import Found
from ..search import search as find_recipe
from ..search_space import CANDIDATES
from ..spec import spec as read_spec
from .arguments import (
    CheckpointArg,
    SolverOption,
    argument,
    check_solver,
    checkpoint_folder,
    read_text,
)
from .session import DebugFlag, JsonFlag, session, size, table

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
_SHOWN = 6  # digits of a loss

FormatOption = Annotated[
    str, typer.Option("--format", "-f", help=f"Format of the file: {', '.join(CANDIDATES)}.", show_default=False)
]
BudgetOption = Annotated[str, typer.Option(help="Bytes of all files: 2.1GB, 1900MiB.", show_default=False)]
OutOption = Annotated[
    Path,
    typer.Option("--out", "-o", help="The recipe, for `phiquant quantize --recipe`. What is measured stays beside."),
]
CandidateOption = Annotated[
    list[str] | None,
    typer.Option(
        "--candidate",
        metavar="TARGET",
        help="A grid that a slice may get; repeat it for more. Default: those of the format for 2 to 8 bits.",
        show_default=False,
    ),
]
KeepOption = Annotated[
    list[str] | None,
    typer.Option("--keep", metavar="PATTERN", help="Slices that stay in float, as lm_head.", show_default=False),
]
CalibrationOption = Annotated[
    Path | None,
    typer.Option(help=f"A UTF-8 text to measure losses on. {EMBEDDED} alone has one of its own.", show_default=False),
]
PlotOption = Annotated[Path | None, typer.Option(help="Draw size against loss into this PNG.", show_default=False)]


def search(
    checkpoint: CheckpointArg,
    format_: FormatOption,
    budget: BudgetOption,
    out: OutOption = Path("recipe.json"),
    candidate: CandidateOption = None,
    keep: KeepOption = None,
    solver: SolverOption = "rtn",
    calibration: CalibrationOption = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows of 512 tokens to measure on.")] = 8,
    proxy: Annotated[
        bool,
        typer.Option("--proxy", help="Predict all losses from one run forward and back, a decoder layer in memory."),
    ] = False,
    refine: Annotated[
        bool, typer.Option(help="Quantize by the best recipes and take the one that measures best. Not with --proxy.")
    ] = True,
    plot: PlotOption = None,
    json_: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Find the grids of q, k, v, o, gate, up, down, head and embedding that lose least within a size.

    Without --proxy every slice is measured on every candidate, with the model in float32 in memory. What is measured
    is kept in the folder OUT.losses: a killed run continues, and another budget is solved in seconds.
    """
    with session(json_, debug) as ui:
        check_solver(solver)
        if format_ not in CANDIDATES:
            raise typer.BadParameter(f"{format_!r} is not one of {', '.join(CANDIDATES)}", param_hint="--format")
        limit = read_bytes(budget)
        for name in candidate or ():
            with argument("--candidate"):
                read_spec(name)
        text = read_text(calibration, "--calibration")
        if text is None and checkpoint != EMBEDDED:
            raise typer.BadParameter(f"give a text such as {checkpoint} is used on", param_hint="--calibration")
        folder = out.with_suffix(".losses")
        ui.log_to(folder / "phiquant.log")
        with checkpoint_folder(checkpoint) as source, ui.progress("measuring") as step:
            found = find_recipe(
                *(source, format_, limit),
                candidates=candidate,
                keep=keep or (),
                calibration=text,
                windows=windows,
                solver=solver,
                method="proxy" if proxy else "kl",
                refine=refine and not proxy,
                folder=folder,
                progress=step,
            )
        write_atomically(out, found.recipe.to_json() + "\n")
        if plot is not None:
            draw(found, plot)
        ui.result({"ok": True, "out": str(out), **found.to_dict()}, _grids(found), _facts(found))


def read_bytes(text: str) -> int:
    """ "2.1GB" -> 2100000000. Units are powers of 1000 (MB) or of 1024 (MiB)."""
    found = re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z]*)\s*", text)
    if found is None or found[2].upper() not in _UNITS or found[1].count(".") > 1 or not found[1].strip("."):
        raise typer.BadParameter(f"{text!r} is no size such as 2.1GB, 1900MiB or 750000000", param_hint="--budget")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def draw(found: Found, path: Path) -> None:
    """Size against loss as a PNG."""
    from .. import plots
    from ..extras import need

    need("matplotlib", extra="plots").use("Agg")
    chosen = {"chosen, predicted": (found.bytes, found.loss)}
    if found.measured is not None:
        chosen["chosen, measured as a whole"] = (found.bytes, found.measured)
    uniform = {point.name.rpartition(":")[2]: (point.bytes, point.loss) for point in found.uniform}
    axes = plots.size_against_loss([(p.bytes, p.loss) for p in found.frontier], uniform, chosen)
    path.parent.mkdir(parents=True, exist_ok=True)
    axes.figure.savefig(path, format="png", dpi=110)


def _grids(found: Found) -> Any:
    """A row for each layer, a column for each slice."""
    rows: dict[str, dict[str, str]] = {}
    for name, grid in found.chosen.items():
        parts = name.split(".")
        layer = parts[2] if parts[:2] == ["model", "layers"] else ""
        rows.setdefault(layer, {})[parts[-1]] = grid.rpartition(":")[2]
    inside = [key for layer, row in rows.items() if layer for key in row]
    made = table("layer>", *dict.fromkeys(inside))
    for layer, row in rows.items():
        if layer:
            made.add_row(layer, *(row.get(key, "") for key in dict.fromkeys(inside)))
    for name, grid in rows.get("", {}).items():
        made.add_row(name, grid)
    return made


def _facts(found: Found) -> Any:
    made = table("what", "size>", "nats per token>")
    for point in found.uniform:
        made.add_row(f"all {point.name}, predicted", size(point.bytes), f"{point.loss:.{_SHOWN}g}")
    made.add_row("this recipe, predicted", size(found.bytes), f"{found.loss:.{_SHOWN}g}")
    if found.measured is not None:
        made.add_row("this recipe, measured as a whole", size(found.bytes), f"{found.measured:.{_SHOWN}g}")
    made.add_row("budget", size(found.budget), "")
    return made
