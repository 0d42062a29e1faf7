"""Anything that gives logits, for `eval` and `demo`: a float checkpoint in torch, an exported file in its runtime."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import PhiquantError
from ..evaluate import model_logits
from ..export import locate
from ..formats import receipt
from ..formats.registry import FORMATS, Format, find
from ..load import load
from ..runtimes.check import runtime_of

Rows = list[list[int]]


@dataclass(frozen=True)
class Runner:
    """runtime: what computes. tokenizer: text to ids. logits: one [T, V] array for each row of ids."""

    runtime: str
    tokenizer: Any
    logits: Callable[[Rows], Iterable[Any]]


def runner(source: str) -> Runner:
    """Whatever `source` names: "phi3-tiny", a checkpoint, a hub name, a .gguf file, an exported folder."""
    path = Path(source)
    if path.is_file():
        for format in FORMATS.values():
            if format.single_file and any(path.match(pattern) for pattern in format.weights):
                return in_runtime(format, path)
        raise PhiquantError(f"{path}: give a .gguf file, or the folder of a checkpoint or of an export")
    if path.is_dir():
        if (path / receipt.NAME).is_file():
            return exported(path)
        if files := sorted(path.glob("*.gguf")):
            return in_runtime(find("gguf"), files[0])
    return checkpoint(source)


def exported(folder: Path) -> Runner:
    """An exported folder in the runtime of its format."""
    data = receipt.read(folder)
    return in_runtime(find(data["format"]), locate(folder, data))


def in_runtime(format: Format, path: Path) -> Runner:
    """A file or folder of `format` in its runtime, with the runtime's own tokenizer."""
    runtime = runtime_of(format)

    def tokenizer(text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": runtime.tokenize(path, [text])[0]}

    return Runner(runtime.NAME, tokenizer, lambda rows: runtime.logits(path, rows))


def checkpoint(source: str) -> Runner:
    """A float checkpoint in torch."""
    model, tokenizer = load(source)
    return Runner("torch", tokenizer, lambda rows: model_logits(model, rows))
