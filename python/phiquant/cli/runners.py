"""Anything that gives logits, for `eval` and `demo`: a float checkpoint in torch, an exported file in its runtime."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import PhiquantError
from ..evaluate import model_logits
from ..formats.detect import Found, detect
from ..load import load
from ..load_exported import load_tokenizer
from ..quantized_cache import quantized_cache
from ..runtimes.check import runtime_of
from ..runtimes.tokenizer import RuntimeTokenizer

Rows = list[list[int]]


@dataclass(frozen=True)
class Runner:
    """runtime: what computes. tokenizer: text to ids. logits: one [T, V] array for each row of ids."""

    runtime: str
    tokenizer: Any
    logits: Callable[[Rows], Iterable[Any]]


def runner(source: str, exact: bool = True) -> Runner:
    """Whatever `source` names: "phi3-tiny", a checkpoint, a hub name, a file or folder of any format.

    exact: in the runtime's setting that computes what torch does; False: in its default one. Checkpoints run in
    torch, and so do quantized ones that others made and that no runtime here reads (GPTQ, AWQ).
    """
    path = Path(source)
    found = detect(path) if path.exists() else None
    if found is not None and _has_runtime(found):
        return in_runtime(found, exact)
    if path.is_file():
        raise PhiquantError(f"{path}: give a file of a format in `phiquant targets`, or the folder it lies in")
    return in_torch(source)


def in_runtime(found: Found, exact: bool = True) -> Runner:
    """An exported model in the runtime of its format, with the runtime's own tokenizer."""
    runtime = runtime_of(found.format)
    tokenizer = RuntimeTokenizer(runtime, found.path, lambda: load_tokenizer(found, found.config()))
    return Runner(runtime.NAME, tokenizer, lambda rows: runtime.logits(found.path, rows, exact=exact))


def in_torch(source: str, cache: str | None = None) -> Runner:
    """A checkpoint or an imported file in torch. cache: the grid of its keys and values, if they have one."""
    model, tokenizer = load(source)
    if cache is not None:
        quantized_cache(model, cache)  # refuses before the first window
    return Runner("torch", tokenizer, lambda rows: model_logits(model, rows, cache))


def _has_runtime(found: Found) -> bool:
    if found.format.name != "safetensors" or found.receipt is not None:
        return True
    return found.quant_method == "compressed-tensors"
