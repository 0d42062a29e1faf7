"""Run a GGUF file in llama.cpp (through the package xllamacpp): logits, tokens, text.

Every call runs workers/run_llamacpp.py in a process of its own, because llama.cpp aborts on some broken
files; what it said is then in the PhiquantError. T = tokens of a window, V = vocabulary.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..extras import need
from . import worker
from .worker import Generated

NAME = "llama.cpp"
# Without this, an aborting llama.cpp starts a debugger, where one is installed, to print its stack.
_OPTIONS: dict[str, Any] = {"script": "run_llamacpp", "environment": {"GGML_NO_BACKTRACE": "1"}}
_SUPER, _QUANTIZED, _BF16, _FLOAT = 3e-2, 2e-2, 1e-2, 1e-3  # bars of the relative error


def logits(
    path: str | Path,
    windows: Sequence[Sequence[int]],
    *,
    exact: bool = True,
    context: int | None = None,
    threads: int | None = None,
    timeout: float = 900.0,
) -> list[np.ndarray]:
    """Logits of each window of token ids, each from an empty cache: float32 [T, V], mapped from disk.

    exact: a float32 key-value cache and plain attention, to compare the file with a model in torch; False: a float16
    cache and flash attention, as llama.cpp's own programs have. `context` is the size of the cache, by default each
    window's length rounded up to 256; LongRoPE models switch factors by it.
    PhiquantError if llama.cpp cannot load or run the file, or needs longer than `timeout` seconds.
    """
    for index, window in enumerate(windows):
        if context is not None and len(window) > context:
            raise ValueError(f"window {index} has {len(window)} tokens, more than the context of {context}")
    request = _request(exact, context)
    return worker.logits(NAME, Path(path), windows, request, threads=threads, timeout=timeout, **_OPTIONS)


def tokenize(
    path: str | Path, texts: Sequence[str], *, add_special: bool = False, timeout: float = 300.0
) -> list[list[int]]:
    """Token ids of each text by the file's own tokenizer. Special tokens in the text are recognised."""
    request = {"library": _library(), "add_special": add_special}
    return worker.tokenize(NAME, Path(path), texts, request, timeout=timeout, **_OPTIONS)


def generate(
    path: str | Path,
    prompt: str | Sequence[int],
    *,
    max_new_tokens: int = 64,
    exact: bool = True,
    context: int | None = None,
    threads: int | None = None,
    timeout: float = 900.0,
) -> Generated:
    """Continue `prompt` (text or token ids) with the most likely tokens, until the model ends its turn."""
    request = _request(exact, context)
    options = {"threads": threads, "timeout": timeout, **_OPTIONS}
    return worker.generate(NAME, Path(path), prompt, max_new_tokens, request, **options)


def bar(stored: Mapping[str, Any], exact: bool) -> float:
    """The relative error of the logits that is llama.cpp's own way of computing.

    It rounds activations to 8 bits before it multiplies with quantized weights: in blocks of 256 for the types of
    super-blocks, else of 32. To bfloat16 with BF16, to float16 with F16.
    """
    kinds = {tensor.stored_as for tensor in stored.values()}
    if any(kind.endswith("_K") or kind in ("IQ4_XS", "TQ1_0", "TQ2_0") for kind in kinds):
        return _SUPER
    if any(tensor.spec is not None for tensor in stored.values()):
        return _QUANTIZED
    return _BF16 if "BF16" in kinds else _FLOAT


def version() -> str:
    """The installed version of xllamacpp."""
    import importlib.metadata

    _library()
    return importlib.metadata.version("xllamacpp")


def _request(exact: bool, context: int | None) -> dict[str, Any]:
    cache = "float32" if exact else "float16"
    return {"library": _library(), "flash_attention": not exact, "cache": cache, "context": context}


def _library() -> str:
    """The shared library of xllamacpp, found without loading it into this process."""
    found = importlib.util.find_spec("xllamacpp")
    if found is None:
        need("xllamacpp", extra="gguf")
    places = (found.submodule_search_locations if found else None) or []
    libraries = [str(file) for place in places for file in Path(place).glob("xllamacpp*.so")]
    if not libraries:
        raise ImportError("the installed package xllamacpp has no library; reinstall it: pip install 'phiquant[gguf]'")
    return libraries[0]
