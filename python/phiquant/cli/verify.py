"""`phiquant verify`: read an export again, independently of what wrote it, and compare every code."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ..export import LongResult, RuntimeResult
from ..export import verify as check
from ..same_codes import IDENTICAL, same_codes
from .arguments import TextOption, existing, read_text
from .session import DebugFlag, JsonFlag, Ui, session, table

FolderArg = Annotated[
    Path, typer.Argument(metavar="FOLDER", help="An exported folder, with its receipt.json.", show_default=False)
]
OtherArg = Annotated[
    Path | None,
    typer.Argument(
        metavar="[OTHER]",
        help="Compare two files or folders, of one format or two, instead: do they hold the same codes?",
        show_default=False,
    ),
]


def verify(
    folder: FolderArg,
    other: OtherArg = None,
    run: Annotated[bool, typer.Option("--run", help="Run the file in its runtime too.")] = False,
    long: Annotated[
        bool,
        typer.Option("--long", help="Run it also on both sides of the original context and the sliding window."),
    ] = False,
    text: TextOption = None,
    json_: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Re-read the files of FOLDER with another reader and compare every code and parameter with the receipt.

    With OTHER: compare the codes and parameters of both, from the files alone. Exit code 1 if anything differs.
    """
    with session(json_, debug) as ui:
        if other is not None:
            if run or long or text is not None:
                raise typer.BadParameter(
                    "--run, --long and --text are for one folder; verify each by itself", param_hint="OTHER"
                )
            _compare(ui, existing(folder, "FOLDER"), existing(other, "OTHER"))
            return
        report = check(existing(folder, "FOLDER"), run=run, long=long, text=read_text(text))
        rows = table("what", "differs")
        for problem in report.files:
            rows.add_row(*problem.split(": ", 1))
        for tensor in report.tensors:
            if not tensor.ok:
                rows.add_row(tensor.name, tensor.error)
        parts = [rows] if rows.row_count else []
        if report.runtime:
            parts.append(_runtime_table(report.runtime))
        if report.long:
            parts.append(_long_table(report.long))
        good = sum(t.ok for t in report.tensors)
        verdict = f"{folder}: {good} of {len(report.tensors)} tensors are exactly what the receipt says"
        ui.result(report.to_dict(), *parts, verdict)
        if not report.ok:
            raise typer.Exit(1)


def _compare(ui: Ui, folder: Path, other: Path) -> None:
    found = same_codes(folder, other)
    rows = table("tensor", "verdict", f"in {found.formats[0]}", f"in {found.formats[1]}", "why")
    for one in found.tensors:
        if one.verdict != IDENTICAL:
            rows.add_row(one.name, one.verdict, one.a, one.b, one.reason)
    good = sum(one.verdict == IDENTICAL for one in found.tensors)
    verdict = f"{folder} ({found.formats[0]}) and {other} ({found.formats[1]}): {good} of {len(found.tensors)} tensors"
    ui.result(found.to_dict(), *([rows] if rows.row_count else []), f"{verdict} are identical")
    if not found.ok:
        raise typer.Exit(1)


def _long_table(result: LongResult) -> Table:
    rows = table(f"in {result.name}, long", "factors", "relative error>", "doing the same>", "within the bar", "why")
    for one in result.lengths:
        same = "" if one.deviation_error is None else f"{one.deviation_error:.2e}"
        verdict = "yes" if one.ok else "NO"
        error = f"{one.relative_error:.2e}"
        rows.add_row(f"{one.tokens} tokens", one.factors or "", error, same, verdict, one.deviation or "")
    for difference in result.differences:
        rows.add_row("settings", "", "", "", "NO", difference)
    return rows


def _runtime_table(result: RuntimeResult) -> Table:
    rows = table(f"in {result.name}, against the file's own codes in torch", "value>")
    rows.add_row("relative error of the logits", f"{result.relative_error:.2e}")
    rows.add_row("mean KL", f"{result.kl:.2e}")
    rows.add_row("same top token", f"{100 * result.same_top:.2f} %")
    rows.add_row("perplexity", f"{result.perplexity:.4f}")
    rows.add_row("perplexity in torch", f"{result.reference_perplexity:.4f}")
    rows.add_row("within the bar", "yes" if result.ok else "NO")
    if result.deviation:
        rows.add_row("torch did the same", result.deviation)
    return rows
