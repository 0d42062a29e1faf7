"""Run a QNN export: on Qualcomm's emulator of its HTP processor, or as a check on onnxruntime's CPU provider.

Every call runs workers/run_qnn.py in a process of its own. The emulator comes with the package onnxruntime-qnn
for Linux on x86-64; it computes as the processor does, slowly. T = tokens of a window, V = vocabulary.
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

NAME = "QNN"
_OPTIONS: dict[str, Any] = {
    "script": "run_qnn",
    "environment": {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
}
# Bars of the relative error of the logits, by the bits that activations are rounded to.
_BARS = {16: {True: 1e-2, False: 2e-2}, 8: {True: 1e-1, False: 1e-1}}
_FLOAT = 1e-5


def logits(
    folder: str | Path,
    windows: Sequence[Sequence[int]],
    *,
    exact: bool = True,
    one_by_one: int | None = None,
    threads: int | None = None,
    timeout: float = 900.0,
) -> list[np.ndarray]:
    """Logits of each window of token ids, at most as long as the export's context: float32 [T, V], mapped from disk.

    exact: the graphs on onnxruntime's CPU provider, which computes the Q/DQ pairs in float32; False: on the HTP
    emulator, without any fallback to the CPU. one_by_one: the index from which tokens go through the one-token stage.
    PhiquantError if a graph is refused or fails, or it takes longer than `timeout` seconds.
    """
    options = {"threads": threads, "timeout": timeout, **_OPTIONS}
    request = {"exact": exact, "one_by_one": one_by_one}
    return worker.logits(NAME, _checked(folder, exact), windows, request, **options)


def tokenize(folder: str | Path, texts: Sequence[str], *, timeout: float = 300.0) -> list[list[int]]:
    """Token ids of each text by the folder's tokenizer."""
    return worker.tokenize(NAME, _checked(folder, True), texts, {}, timeout=timeout, **_OPTIONS)


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
    return worker.generate(NAME, _checked(folder, exact), prompt, max_new_tokens, {"exact": exact}, **options)


def bar(stored: Mapping[str, Any], exact: bool) -> float:
    """The allowed relative error of the logits."""
    inside = [tensor for name, tensor in stored.items() if name.endswith("_proj.weight")]
    if all(tensor.spec is None for tensor in inside):
        return _FLOAT
    return _BARS[8 if any(tensor.piece.narrow for tensor in inside) else 16][exact]


def _checked(folder: str | Path, exact: bool) -> Path:
    folder = Path(folder)
    if not (folder / "genai_config.json").is_file():
        raise PhiquantError(f"{folder} has no genai_config.json; give the folder of a QNN export")
    need("onnxruntime", extra="qnn")
    if not exact:
        need("onnxruntime_qnn", extra="qnn")
    return folder
