"""`phiquant export`: write a finished QAT run, or a float checkpoint, in a format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import runs
from ..export import export as write
from ..formats.registry import FORMATS, find
from ..load import EMBEDDED, load
from .arguments import OptionsOption, argument, existing, output_folder, read_options
from .session import DebugFlag, JsonFlag, files_table, session

SourceArg = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="The --out folder of `phiquant qat`, a float checkpoint, or 'phi3-tiny'.",
        show_default=False,
    ),
]
FormatOption = Annotated[
    str, typer.Option("--format", "-f", help=f"The format to write: {', '.join(FORMATS)}.", show_default=False)
]
OutOption = Annotated[Path, typer.Option("--out", "-o", help="Folder for the files and their receipt.")]


def export(
    source: SourceArg,
    format_: FormatOption,
    out: OutOption,
    option: OptionsOption = None,
    json_: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Write the codes of a QAT run (or a float checkpoint as it is) in a format. Nothing is quantized again."""
    with session(json_, debug) as ui:
        with argument("--format"):
            find(format_)
        options = read_options(option, format_)
        ui.log_to(output_folder(out) / "phiquant.log")
        run = Path(source) / "run"
        if (run / runs.FACTS).is_file():
            model, tokenizer = runs.restore(run)
        else:
            if source != EMBEDDED:
                existing(Path(source), "SOURCE")
            model, tokenizer = load(source)
        with ui.progress("writing") as step:
            receipt = write(model, tokenizer, out, format=format_, progress=step, **options)
        ui.result({"ok": True, "out": str(out), "files": receipt["files"]}, files_table(receipt))
