"""The commands, put together. Each command is one file beside this one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer

from .. import __version__
from .convert import convert
from .demo import demo
from .describe import describe
from .evaluate import evaluate
from .export import export
from .inspect import inspect
from .plan import plan
from .qat import qat
from .quantize import quantize
from .search import search
from .targets import targets
from .verify import verify

app = typer.Typer(
    name="phiquant",
    no_args_is_help=True,
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
COMMANDS: dict[str, Callable[..., Any]] = {
    "demo": demo,
    "targets": targets,
    "plan": plan,
    "search": search,
    "quantize": quantize,
    "qat": qat,
    "export": export,
    "convert": convert,
    "verify": verify,
    "eval": evaluate,
    "inspect": inspect,
    "describe": describe,
}


@app.callback()
def main(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    """Quantize Microsoft's Phi models. Codes are chosen once, then every format stores those codes."""
    if version:
        print(__version__)
        raise typer.Exit


for name, command in COMMANDS.items():
    app.command(name)(command)
