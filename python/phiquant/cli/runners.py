"""Anything that gives logits, for `eval` and `demo`: a float checkpoint in torch, an exported file in its runtime."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import PhiquantError
from ..evaluate import model_logits
from ..extras import need
from ..load import load
from ..runtimes import llamacpp
from ..runtimes.transformers import logits as transformers_logits

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
        if path.suffix == ".gguf":
            return gguf(path)
        raise PhiquantError(f"{path}: give a .gguf file, or the folder of a checkpoint or of an export")
    if path.is_dir():
        files = sorted(path.glob("*.gguf"))
        if files:
            return gguf(files[0])
        if (path / "receipt.json").is_file():
            return exported_safetensors(path)
    return checkpoint(source)


def gguf(path: Path) -> Runner:
    """A GGUF file in llama.cpp."""
    return Runner("llama.cpp", _FileTokenizer(path), lambda rows: llamacpp.logits(path, rows))


def exported_safetensors(folder: Path) -> Runner:
    """An exported folder in plain transformers."""
    tokenizer = need("transformers", extra="hf").AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return Runner("transformers", tokenizer, lambda rows: transformers_logits(folder, rows))


def checkpoint(source: str) -> Runner:
    """A float checkpoint in torch."""
    model, tokenizer = load(source)
    return Runner("torch", tokenizer, lambda rows: model_logits(model, rows))


class _FileTokenizer:
    """The tokenizer inside a GGUF file, callable as transformers' are."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": llamacpp.tokenize(self.path, [text])[0]}
