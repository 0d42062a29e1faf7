"""Run an OpenVINO folder on the CPU: logits by openvino, tokens by openvino_tokenizers, text by openvino_genai.

Every call runs workers/run_openvino.py in a process of its own. T = tokens of a window, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..errors import PhiquantError
from ..extras import need
from . import worker
from .worker import Generated

NAME = "OpenVINO"
_SCRIPT: dict[str, Any] = {"script": "run_openvino", "environment": {"HF_HUB_OFFLINE": "1"}}
_EXACT, _DEFAULT = 2e-6, 3e-2  # bars of the relative error: by default activations are rounded to int8 or bfloat16
_TERMS = 512  # of a sum for which _EXACT holds


def logits(
    folder: str | Path,
    windows: Sequence[Sequence[int]],
    *,
    exact: bool = True,
    prefill: int | None = None,
    threads: int | None = None,
    timeout: float = 900.0,
) -> list[np.ndarray]:
    """Logits of each window of token ids, each from an empty cache: float32 [T, V], mapped from disk.

    exact: float32 everywhere, without the rounding of activations (docs/runtimes/openvino.md names the three
    settings); False: what OpenVINO does by default on this machine. prefill: this many tokens at once and the others
    one by one, as when text is generated; None: all at once.
    PhiquantError if OpenVINO cannot load or run it, or needs longer than `timeout` seconds.
    """
    request = {"exact": exact, "prefill": prefill}
    return worker.logits(NAME, _checked(folder), windows, request, threads=threads, timeout=timeout, **_SCRIPT)


def tokenize(folder: str | Path, texts: Sequence[str], *, timeout: float = 300.0) -> list[list[int]]:
    """Token ids of each text by openvino_tokenizer.xml."""
    return worker.tokenize(NAME, _checked(folder), texts, {}, timeout=timeout, **_SCRIPT)


def generate(
    folder: str | Path,
    prompt: str | Sequence[int],
    *,
    max_new_tokens: int = 64,
    exact: bool = True,
    attention: Literal["PA", "SDPA"] = "PA",
    threads: int | None = None,
    timeout: float = 900.0,
) -> Generated:
    """Continue `prompt` (text or token ids) with the most likely tokens, until the model ends its turn.

    attention: LLMPipeline's ATTENTION_BACKEND, paged attention or the graph's own.
    """
    need("openvino_genai", extra="openvino")
    request = {"exact": exact, "attention": attention}
    options = {"threads": threads, "timeout": timeout, **_SCRIPT}
    return worker.generate(NAME, _checked(folder), prompt, max_new_tokens, request, **options)


def bar(stored: Mapping[str, Any], exact: bool) -> float:
    """The allowed relative error of the logits.

    Float32 sums lose with the root of their length, and the plugin adds in another order than torch. Measured: 0.8e-6
    for rows of 128 and 256, 2.3e-6 where the longest has 1024 (torch itself: 1.2e-6, against float64).
    """
    longest = max((tensor.shape[1] for tensor in stored.values() if len(tensor.shape) == 2), default=0)
    return _EXACT * max(1.0, (longest / _TERMS) ** 0.5) if exact else _DEFAULT


def _checked(folder: str | Path) -> Path:
    folder = Path(folder)
    if not (folder / "openvino_model.xml").is_file():
        raise PhiquantError(f"{folder} has no openvino_model.xml; give the folder of an OpenVINO export")
    need("openvino", extra="openvino")
    need("openvino_tokenizers", extra="openvino")
    return folder
