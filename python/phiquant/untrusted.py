"""Reading files that anyone may have made: whatever is wrong with them becomes a PhiquantError that names the file."""

from __future__ import annotations

import functools
import json
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from .errors import PhiquantError

JSON_BYTES = 64 << 20  # tokenizer.json of a vocabulary of 200,000 takes 16 MB
# What code that takes a file at its word raises when the word is wrong.
_WRONG = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, OSError, EOFError)
Read = TypeVar("Read", bound=Callable[..., Any])


@contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """What goes wrong inside becomes a PhiquantError about `path`; one that already is, and names it, stays."""
    try:
        yield
    except PhiquantError as error:
        if str(path) in str(error):
            raise
        raise type(error)(f"{path}: {error}") from error
    except (*_WRONG, struct.error) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error) or type(error).__name__
        raise PhiquantError(f"{path} is damaged, or not what it seems: {what}; export it or fetch it again") from error


def reader(read: Read) -> Read:
    """Decorates a function that opens the path it is given first: see naming().

    Of a format's read(), the grids and shapes of all tensors are looked at too, so that a file which tells of
    impossible ones is refused when it is opened.
    """

    @functools.wraps(read)
    def guarded(path: str | Path, *args: Any, **options: Any) -> Any:
        with naming(path):
            found = read(path, *args, **options)
            for tensor in found.values() if isinstance(found, dict) else ():
                with suppress(PhiquantError):  # of a type that only its user needs to know
                    if hasattr(type(tensor), "spec") and tensor.spec is not None:
                        tensor.spec.scale_shape(tensor.shape)
            return found

    return guarded  # type: ignore[return-value]


def read_json(path: Path, most: int = JSON_BYTES) -> dict[str, Any]:
    """The object in a JSON file. PhiquantError if it is no plain file, too large, not UTF-8, or has a key twice."""
    if not path.is_file():  # a pipe or a device would never end
        raise PhiquantError(f"{path}: no such file")
    size = path.stat().st_size
    if size > most:
        raise PhiquantError(f"{path} has {size:,} bytes, above the {most:,} that such a file may have")
    try:
        data = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise PhiquantError(f"{path} is not valid JSON ({error}); download it, or export again") from error
    if not isinstance(data, dict):
        raise PhiquantError(
            f"{path} must hold a JSON object, not a {type(data).__name__}; download it, or export again"
        )
    return data


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """json's object_pairs_hook that refuses a key which occurs twice: readers differ in which of the two they take."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} occurs twice")
    return found
