"""Run an ONNX folder: logits by ONNX Runtime, tokens and text by ONNX Runtime GenAI.

Every call runs workers/run_onnx.py in a process of its own. T = tokens of a window, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import PhiquantError
from ..extras import need
from . import worker
from .worker import Generated

NAME = "onnxruntime"
_OPTIONS: dict[str, Any] = {"script": "run_onnx"}
# Bars of the relative error. Torch in float32 is itself 1.3e-6 away from float64 on a model with rows of 768 values.
# MatMulNBits' fast setting rounds activations to int8 per block, int8-dynamic those of a whole tensor to uint8: that
# is the arithmetic of such a file, so it has no exact setting.
_EXACT, _FAST, _DYNAMIC = 4e-6, 3e-2, 1e-1


def logits(
    folder: str | Path,
    windows: Sequence[Sequence[int]],
    *,
    exact: bool = True,
    threads: int | None = None,
    timeout: float = 900.0,
) -> list[np.ndarray]:
    """Logits of each window of token ids, each from an empty cache: float32 [T, V], mapped from disk.

    exact: activations stay in float32 (accuracy_level 1), whatever the file says; False: as the file says.
    PhiquantError if ONNX Runtime cannot load or run it, or needs longer than `timeout` seconds.
    """
    options = {"threads": threads, "timeout": timeout, **_OPTIONS}
    return worker.logits(NAME, _checked(folder, "onnxruntime"), windows, {"exact": exact}, **options)


def tokenize(folder: str | Path, texts: Sequence[str], *, timeout: float = 300.0) -> list[list[int]]:
    """Token ids of each text by GenAI's tokenizer. Special tokens in the text are recognised."""
    return worker.tokenize(NAME, _checked(folder, "onnxruntime_genai"), texts, {}, timeout=timeout, **_OPTIONS)


def generate(
    folder: str | Path,
    prompt: str | Sequence[int],
    *,
    max_new_tokens: int = 64,
    exact: bool = True,
    threads: int | None = None,
    timeout: float = 900.0,
) -> Generated:
    """Continue `prompt` (text or token ids) with the most likely tokens, by GenAI, until the model ends its turn."""
    options = {"threads": threads, "timeout": timeout, **_OPTIONS}
    path = _checked(folder, "onnxruntime_genai")
    return worker.generate(NAME, path, prompt, max_new_tokens, {"exact": exact}, **options)


def bar(stored: Mapping[str, Any], exact: bool) -> float:
    """The allowed relative error of the logits."""
    if any(tensor.stored_as == "MatMulInteger" for tensor in stored.values()):
        return _DYNAMIC
    return _EXACT if exact or all(tensor.spec is None for tensor in stored.values()) else _FAST


def _checked(folder: str | Path, package: str) -> Path:
    folder = Path(folder)
    if not (folder / "model.onnx").is_file():
        raise PhiquantError(f"{folder} has no model.onnx; give the folder of an ONNX export")
    for name in ("onnx", package):
        need(name, extra="onnx")
    return folder
