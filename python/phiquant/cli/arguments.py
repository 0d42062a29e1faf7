"""Arguments that several commands take. A value that cannot be right ends the command with exit code 2."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import as_file, files
from pathlib import Path
from typing import Annotated, Any

import typer

from ..auto import candidates, is_auto
from ..formats.registry import find
from ..load import EMBEDDED
from ..recipe import Recipe
from ..solvers import SOLVERS
from ..spec import Target
from ..spec import target as find_target
from ..transforms import TRANSFORMS, WITH_TRANSFORMS
from ..transforms import read as read_transform

CheckpointArg = Annotated[
    str,
    typer.Argument(
        metavar="CHECKPOINT",
        help=f"A folder with config.json and safetensors files, or {EMBEDDED!r}.",
        show_default=False,
    ),
]
TargetOption = Annotated[
    str,
    typer.Option(
        "--target",
        "-t",
        help="Grid and format, such as gguf:Q4_0 or mlx:4bit-g64; `phiquant targets` lists all.",
        show_default=False,
    ),
]
SolverOption = Annotated[
    str,
    typer.Option(
        help="rtn: ranges from the extremes. mse: the best of some in squared error. mse_exact: of all. gptq, "
        "gptq_mse, adaround: codes that keep the output on a text, on the grid of rtn, of mse, of mse. clip: ranges "
        "that do. awq: the transform, then clip. auto: what is best on part of the text; auto:gptq,awq+gptq: of these."
    ),
]
TransformOption = Annotated[
    list[str] | None,
    typer.Option(
        "--transform",
        metavar="NAME[:KEY=VALUE]",
        help=f"Rewrite the float model first, its function stays: {', '.join(TRANSFORMS)}. Repeat it for more.",
        show_default=False,
    ),
]
RecipeOption = Annotated[
    Path | None,
    typer.Option(help="A JSON recipe, {'rules': {pattern: spec}, 'default': spec}: which layer gets which grid."),
]
TextOption = Annotated[
    Path | None, typer.Option(help="A UTF-8 text to evaluate on. Default: held-out standard library modules.")
]
LimitOption = Annotated[
    int | None, typer.Option(min=1, help="Evaluate on this many windows only.", show_default="the whole text")
]
CalibrationOption = Annotated[
    Path | None,
    typer.Option(
        help=f"A UTF-8 text for solvers that need data, such as the model is used on. {EMBEDDED} alone has one of its "
        "own: the standard library."
    ),
]
EmbeddingOption = Annotated[
    str | None,
    typer.Option(
        metavar="TARGET|auto",
        help="Grid of the table that embedding and head share; auto: the smallest whose measured loss is tolerable.",
        show_default="float, or as the recipe says",
    ),
]
ToleranceOption = Annotated[
    float, typer.Option(min=0.0, help="Of --embedding auto: the most KL, in nats a token, that the table may cost.")
]
OptionsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        metavar="KEY=VALUE",
        help="An option of the format's writer; repeat it for more.",
        show_default=False,
    ),
]


@contextmanager
def argument(name: str) -> Iterator[None]:
    """A ValueError inside means that the argument of that name is wrong: exit code 2."""
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=name) from error


def read_target(name: str) -> Target:
    """The target of that name."""
    with argument("--target"):
        return find_target(name)


def check_solver(name: str) -> str:
    """The name again, if it is that of a solver."""
    known = (*SOLVERS, *WITH_TRANSFORMS, "auto")
    with argument("--solver"):
        if is_auto(name):
            candidates(name)
        elif name not in known:
            raise ValueError(f"{name!r} is not one of {', '.join(known)}")
    return name


def check_transforms(names: Sequence[str] | None) -> tuple[str, ...]:
    """The transforms again, if all are known with their options."""
    with argument("--transform"):
        for name in names or ():
            read_transform(name)
    return tuple(names or ())


def read_recipe(path: Path | None) -> Recipe | None:
    """The recipe in the file; None if no file was named."""
    if path is None:
        return None
    if not path.is_file():
        raise typer.BadParameter(f"no file {path}", param_hint="--recipe")
    with argument("--recipe"):
        return Recipe.from_json(path)


def read_options(given: Sequence[str] | None, format: str) -> dict[str, Any]:
    """The options of the writer of `format`: values are JSON (8, true, null) or else text."""
    options: dict[str, Any] = {}
    for text in given or ():
        key, equals, value = text.partition("=")
        if not equals:
            raise typer.BadParameter(f"{text!r} is not KEY=VALUE", param_hint="--option")
        try:
            options[key.replace("-", "_")] = json.loads(value)
        except ValueError:
            options[key.replace("-", "_")] = value
    if options:
        parameters = inspect.signature(find(format).writer().write).parameters.values()
        known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "progress"]
        if unknown := [key for key in options if key not in known]:
            offer = f"it has {', '.join(known)}" if known else "it has none"
            raise typer.BadParameter(
                f"the writer of {format} has no option {unknown[0]!r}; {offer}", param_hint="--option"
            )
    return options


def read_text(path: Path | None, name: str = "--text") -> str | None:
    """The text in the file; None if no file was named."""
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"cannot read {path}: {error}", param_hint=name) from error


@contextmanager
def checkpoint_folder(source: str) -> Iterator[Path]:
    """The folder of a checkpoint on this machine; the embedded model's, if that is what `source` names."""
    if source == EMBEDDED:
        with as_file(files("phiquant") / "data" / EMBEDDED) as folder:
            yield folder
        return
    folder = Path(source)
    if not folder.is_dir():
        raise typer.BadParameter(
            f"no folder {source!r}; give a checkpoint's folder or {EMBEDDED!r}", param_hint="CHECKPOINT"
        )
    yield folder


def existing(path: Path, name: str) -> Path:
    """The path again, if something is there."""
    if not path.exists():
        raise typer.BadParameter(f"no such file or folder: {path}", param_hint=name)
    return path


def output_folder(path: Path) -> Path:
    """The folder for the output; it may exist, but not as a file."""
    if path.exists() and not path.is_dir():
        raise typer.BadParameter(f"{path} is a file; give a folder", param_hint="--out")
    return path
