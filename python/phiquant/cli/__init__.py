"""The command line: `phiquant COMMAND`; app.py lists the commands."""

from __future__ import annotations

import importlib
import sys

from ..extras import need


def main() -> None:
    """Entry point. Without the optional packages of the command line it says what to install and exits with 1."""
    try:
        for package in ("typer", "rich"):
            need(package, extra="cli")
    except ImportError as error:
        print(f"phiquant: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    importlib.import_module(".app", __package__).app()
