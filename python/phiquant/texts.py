"""Texts to try things on: the source of the running interpreter's own standard library.

Nothing is downloaded or stored; the texts differ a little between Python versions.
"""

from __future__ import annotations

import json
import random
import sysconfig
from importlib.resources import files
from pathlib import Path

from .errors import PhiquantError

END_OF_TEXT = "<|endoftext|>"


def _heldout_paths() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    names = json.loads(files("phiquant").joinpath("data/heldout.json").read_text(encoding="utf-8"))
    return [root / (name.replace(".", "/") + ".py") for name in names]


def _read(paths: list[Path], characters: int | None) -> list[str]:
    """The files' texts until `characters` are reached. Files that are not UTF-8 (some tests) are passed over."""
    texts: list[str] = []
    total = 0
    for path in paths:
        if characters is not None and total >= characters:
            break
        try:
            texts.append(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, FileNotFoundError):
            continue
        total += len(texts[-1])
    if not texts:
        raise PhiquantError(
            f"no source file of the standard library was found under {sysconfig.get_paths()['stdlib']}; "
            "this Python has no .py files there, so give a text of your own"
        )
    return texts


def heldout_text() -> str:
    """The held-out modules of the standard library, which phi3-tiny never saw, joined by <|endoftext|>."""
    return END_OF_TEXT.join(_read(_heldout_paths(), None))


def training_text(characters: int | None = None, seed: int = 0) -> str:
    """Standard library files that are not held out, in a shuffled order fixed by `seed`, joined by <|endoftext|>.

    characters: stop after the file that reaches this length. Generated tables (300 kB and more) are left out.
    """
    root, heldout = Path(sysconfig.get_paths()["stdlib"]), set(_heldout_paths())
    paths = [
        path
        for path in sorted(root.rglob("*.py"))
        if "site-packages" not in path.parts and path not in heldout and path.stat().st_size < 300_000
    ]
    random.Random(seed).shuffle(paths)
    return END_OF_TEXT.join(_read(paths, characters))
