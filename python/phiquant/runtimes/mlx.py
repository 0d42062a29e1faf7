"""Run an MLX folder in mlx-lm: logits, tokens, text.

Every call runs workers/run_mlx.py in a process of its own that has not imported phiquant. T = tokens of a
window, V = vocabulary.
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

NAME = "mlx-lm"
_OPTIONS: dict[str, Any] = {
    "script": "run_mlx",
    "environment": {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "MLX_DISABLE_COMPILE": "1"},
}
_FLOAT32, _HALF = 1e-5, 3e-2  # bars of the relative error


def logits(
    folder: str | Path,
    windows: Sequence[Sequence[int]],
    *,
    exact: bool = True,
    threads: int | None = None,
    timeout: float = 900.0,
) -> list[np.ndarray]:
    """Logits of each window of token ids: float32 [T, V], mapped from disk.

    exact: the parameters are widened to float32, so MLX computes in it; False: in their own dtype. On a CPU MLX is
        many times slower in float16 than in float32.
    PhiquantError if mlx-lm cannot load or run it, or needs longer than `timeout` seconds.
    """
    options = {"threads": threads, "timeout": timeout, **_OPTIONS}
    return worker.logits(NAME, _checked(folder), windows, {"exact": exact}, **options)


def tokenize(folder: str | Path, texts: Sequence[str], *, timeout: float = 300.0) -> list[list[int]]:
    """Token ids of each text by the folder's tokenizer, as mlx-lm loads it."""
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
    """The allowed relative error of the logits: in float32, or in the dtype of the parameters."""
    return _FLOAT32 if exact else _HALF


def _checked(folder: str | Path) -> Path:
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise PhiquantError(f"{folder} has no config.json; give the folder of an MLX export")
    need("mlx.core", extra="mlx")
    need("mlx_lm", extra="mlx")
    return folder
