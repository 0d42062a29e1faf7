"""`phiquant convert`: an exported model in another format, code for code."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..formats.registry import FORMATS
from ..repack import repack
from ..targets import TARGETS
from .arguments import OptionsOption, argument, existing, output_folder, read_options
from .session import DebugFlag, JsonFlag, files_table, session

ModelArg = Annotated[
    Path,
    typer.Argument(metavar="MODEL", help="An exported folder, or a file of any format.", show_default=False),
]
TargetOption = Annotated[
    str,
    typer.Option(
        "--target",
        "-t",
        help="A target (mlx:4bit-g32), or a format (mlx): each tensor then gets a target that is its grid.",
        show_default=False,
    ),
]
OutOption = Annotated[Path, typer.Option("--out", "-o", help="Folder for the files, their receipt and the log.")]
TokenizerOption = Annotated[
    Path | None, typer.Option(help="The folder of the model's tokenizer, where its files are not beside the model.")
]


def convert(
    model: ModelArg,
    target: TargetOption,
    out: OutOption,
    tokenizer: TokenizerOption = None,
    option: OptionsOption = None,
    json_: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Move the codes of MODEL to another target without touching a value, tensor by tensor.

    Refuses otherwise, and names the tensor and what would have to change. `phiquant verify MODEL OUT` proves it.
    """
    with session(json_, debug) as ui:
        existing(model, "MODEL")
        if target not in TARGETS and target not in FORMATS:
            with argument("--target"):
                raise ValueError(f"unknown target {target!r}; `phiquant targets` lists them")
        if tokenizer is not None:
            existing(tokenizer, "--tokenizer")
        options = read_options(option, target.partition(":")[0])
        ui.log_to(output_folder(out) / "phiquant.log")
        with ui.progress("converting") as step:
            receipt = repack(model, target, out, tokenizer=tokenizer, progress=step, **options)
        ui.result({"ok": True, "out": str(out), "files": receipt["files"]}, files_table(receipt))
