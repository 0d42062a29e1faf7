"""What all commands share: output for people or as JSON, progress, the log file, and exit codes.

0: done. 1: it failed. 2: wrong arguments. Only the result goes to stdout; the rest goes to stderr.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from ..errors import PhiquantError

JsonFlag = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object and nothing else.")]
DebugFlag = Annotated[bool, typer.Option("--debug", help="Show the traceback when something fails.")]

Step = Callable[[str, int, int], None]  # (what is being worked on, how much is done, of how much)

# What bad data, a full disk or a missing package raise. Anything else is a mistake of ours.
EXPECTED = (PhiquantError, ValueError, OSError, ImportError, RuntimeError, MemoryError)


class Ui:
    """Where a command's words go."""

    def __init__(self, *, json_output: bool, debug: bool) -> None:
        self.json_output = json_output
        self.debug = debug
        self.out = Console(highlight=False)
        if not self.out.is_terminal:
            self.out.width = 160  # in a file or a pipe nothing needs to wrap
        self.err = Console(stderr=True, highlight=False)
        self.log = logging.getLogger("phiquant")
        self._handler: logging.Handler | None = None

    def log_to(self, path: Path) -> None:
        """Append what happens from now on to `path`, beside the output."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._handler = logging.FileHandler(path, encoding="utf-8")
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self.log.setLevel(logging.INFO)
        self.log.addHandler(self._handler)
        self.log.info("phiquant %s", " ".join(sys.argv[1:]))

    def note(self, text: str) -> None:
        """A line about what is going on: to the log, and to stderr unless the output is JSON."""
        self.log.info("%s", text)
        if not self.json_output:
            self.err.print(text)

    def result(self, data: dict[str, Any], *parts: Any) -> None:
        """The command's result: `data` as JSON, or `parts` (tables, lines) for people."""
        if self.json_output:
            print(json.dumps(data, allow_nan=False))
            return
        for part in parts:
            # Never cut a name or a figure: a table that is wider than the terminal wraps there.
            self.out.print(part, soft_wrap=isinstance(part, str))

    @contextmanager
    def progress(self, title: str) -> Iterator[Step]:
        """A bar with the name of the layer at work; the name and the time also go to the log."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[layer]}"),
        )
        with Progress(*columns, console=self.err, disable=self.json_output or not self.err.is_terminal) as bar:
            task = bar.add_task(title, total=None, layer="")

            last = ""

            def step(name: str, done: int, total: int) -> None:
                nonlocal last
                if name != last:
                    self.log.info("%s %d/%d %s", title, done, total, name)
                    last = name
                bar.update(task, completed=done, total=total, layer=name)

            yield step

    def close(self) -> None:
        if self._handler is not None:
            self.log.removeHandler(self._handler)
            self._handler.close()
            self._handler = None


@contextmanager
def session(json_output: bool, debug: bool) -> Iterator[Ui]:
    """Run a command's work; turn its errors into one line and the exit code 1 (2: wrong arguments)."""
    ui = Ui(json_output=json_output, debug=debug)
    began = time.monotonic()
    try:
        yield ui
        ui.log.info("done in %.1f s", time.monotonic() - began)
    except typer.BadParameter as error:
        if not json_output:
            raise
        _fail(ui, error.format_message(), 2)
    except typer.Exit:
        raise
    except EXPECTED as error:
        ui.log.info("failed", exc_info=True)
        if debug:
            raise
        _fail(ui, _text(error), 1)
    except Exception as error:
        ui.log.info("failed", exc_info=True)
        if debug:
            raise
        _fail(ui, f"{type(error).__name__}: {error}. This is a mistake in phiquant: --debug shows where", 1)
    finally:
        ui.close()


def _text(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror}{where}"
    return str(error) or type(error).__name__


def _fail(ui: Ui, text: str, code: int) -> None:
    if ui.json_output:
        print(json.dumps({"ok": False, "error": text}))
    else:
        ui.err.print("[bold red]error:[/] ", end="")
        ui.err.print(text, markup=False, soft_wrap=True)
    raise typer.Exit(code)


def table(*columns: str, title: str | None = None) -> Table:
    """A Rich table; a column whose name ends in ">" is aligned to the right (figures)."""
    made = Table(title=title, title_justify="left", header_style="bold")
    for column in columns:
        right = column.endswith(">")
        made.add_column(column.removesuffix(">"), justify="right" if right else "left", overflow="fold")
    return made


def files_table(receipt: dict[str, Any]) -> Table:
    """The files of an export and their sizes."""
    made = table("file", "size>")
    for name, entry in receipt["files"].items():
        made.add_row(name, size(entry["bytes"]))
    return made


def size(count: float) -> str:
    """A number of bytes for people: "9.87 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"
