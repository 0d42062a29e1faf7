"""Run a safetensors folder in plain transformers: logits, tokens, text.

Every call runs workers/run_transformers.py in a process of its own that has not imported phiquant, because
that is the claim: the folder needs none of it. T = tokens of a window, V = vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import PhiquantError
from ..extras import need
from . import worker
from .worker import Generated

NAME = "transformers"
_OPTIONS: dict[str, Any] = {
    "script": "run_transformers",
    "environment": {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
}
_FLOAT32, _HALF, _INT8_INPUTS, _FP8_INPUTS = 1e-6, 2e-2, 3e-2, 1e-1  # bars of the relative error


def logits(
    folder: str | Path,
    windows: Sequence[Sequence[int]],
    *,
    exact: bool = True,
    threads: int | None = None,
    timeout: float = 900.0,
) -> list[np.ndarray]:
    """Logits of each window of token ids: float32 [T, V], mapped from disk.

    exact: the decoded weights in float32; False: in the dtype that the folder's config.json names, with the inputs of
        linears rounded where it says so.
    PhiquantError if transformers cannot load or run it, or needs longer than `timeout` seconds.
    """
    options = {"threads": threads, "timeout": timeout, **_OPTIONS}
    return worker.logits(NAME, _checked(folder), windows, {"exact": exact}, **options)


def tokenize(folder: str | Path, texts: Sequence[str], *, timeout: float = 300.0) -> list[list[int]]:
    """Token ids of each text by the folder's tokenizer, as it is called by default."""
    return worker.tokenize(NAME, _checked(folder), texts, {}, timeout=timeout, **_OPTIONS)


def generate(
    folder: str | Path,
    prompt: str | Sequence[int],
    *,
    max_new_tokens: int = 64,
    exact: bool = True,
    threads: int | None = None,
    timeout: float = 900.0,
) -> Generated:
    """Continue `prompt` (text or token ids) with the most likely tokens, until the model ends its turn."""
    options = {"threads": threads, "timeout": timeout, **_OPTIONS}
    return worker.generate(NAME, _checked(folder), prompt, max_new_tokens, {"exact": exact}, **options)


def bar(stored: Mapping[str, Any], exact: bool) -> float:
    """The allowed relative error of the logits: transformers computes what torch does, as config.json tells it."""
    if exact:
        return _FLOAT32
    inputs = [(getattr(tensor, "scheme", None) or {}).get("input_activations") for tensor in stored.values()]
    kinds = {one["type"] for one in inputs if one}
    return _FP8_INPUTS if "float" in kinds else _INT8_INPUTS if kinds else _HALF


def _checked(folder: str | Path) -> Path:
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise PhiquantError(f"{folder} has no config.json; give the folder of a safetensors export")
    need("transformers", extra="hf")
    if "quantization_config" in json.loads((folder / "config.json").read_text(encoding="utf-8")):
        need("compressed_tensors", extra="hf")
    return folder
