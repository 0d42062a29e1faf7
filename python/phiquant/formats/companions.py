"""The small files beside the weights of a folder: tokenizer and generation settings, copied as they are."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from ..errors import PhiquantError

COMPANIONS = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json",
)  # fmt: skip


def companions(folder: Path | None) -> list[Path]:
    """The files of a tokenizer folder that are to be copied. PhiquantError without a tokenizer."""
    found = [] if folder is None else [folder / name for name in COMPANIONS if (folder / name).is_file()]
    if not {path.name for path in found} & {"tokenizer.json", "tokenizer.model"}:
        where = f"{folder} has no tokenizer.json or tokenizer.model" if folder else "no tokenizer was given"
        raise PhiquantError(f"{where}; a model without its tokenizer cannot be used: put the tokenizer's files there")
    return found


def copy(files: Iterable[Path], out: Path) -> list[str]:
    """Copy each file into `out`, whole or not at all; their names."""
    names = []
    for path in files:
        temporary = out / (path.name + ".tmp")
        shutil.copyfile(path, temporary)
        os.replace(temporary, out / path.name)
        names.append(path.name)
    return names
