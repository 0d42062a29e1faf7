"""`phiquant describe`: what a number format or a spec holds, and the bits of one value."""

from __future__ import annotations

from typing import Annotated

import typer

from ..describe import bits
from ..describe import describe as describe_format
from .arguments import argument
from .session import DebugFlag, JsonFlag, session

NameArg = Annotated[
    str,
    typer.Argument(
        metavar="NAME",
        help="A number format (e4m3fn, float16, int4, q3.4, e8m0), a spec (int4-g32-sym) or a target (gguf:Q4_0).",
        show_default=False,
    ),
]
ValueArg = Annotated[
    float | None, typer.Argument(metavar="[VALUE]", help="Show the bits of this value.", show_default=False)
]


def describe(name: NameArg, value: ValueArg = None, json_: JsonFlag = False, debug: DebugFlag = False) -> None:
    """Show range, step and bits of a number format or a spec; with VALUE, its bit fields in the format.

    A negative VALUE goes after "--": phiquant describe int4 -- -3
    """
    with session(json_, debug) as ui:
        with argument("NAME"):
            found = describe_format(name) if value is None else bits(value, name)
        ui.result(found.as_dict(), str(found))
