"""Run a GGUF file in llama.cpp (through the package xllamacpp): logits, tokens, text.

Every call runs llamacpp_worker.py in a process of its own, because llama.cpp aborts on some broken
files; what it said is then in the PhiquantError. T = tokens of a window, V = vocabulary.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..errors import PhiquantError
from ..extras import need

Cache = Literal["float32", "float16"]
_WORKER = Path(__file__).with_name("llamacpp_worker.py")
_TAIL = 12  # lines of llama.cpp's log that an error quotes


@dataclass(frozen=True)
class Generated:
    """A greedy continuation: the new tokens and their text, and the tokens of the prompt."""

    tokens: list[int]
    text: str
    prompt_tokens: list[int]


def logits(
    path: str | Path,
    windows: Sequence[Sequence[int]],
    *,
    flash_attention: bool = False,
    cache: Cache = "float32",
    context: int | None = None,
    threads: int | None = None,
    timeout: float = 900.0,
) -> list[np.ndarray]:
    """Logits of each window of token ids, each from an empty cache: float32 [T, V], mapped from disk.

    The defaults compare the file with a model in torch: a float32 key-value cache and plain attention.
    `flash_attention=True, cache="float16"` is what llama.cpp's own programs use. `context` is the size of
    the cache, by default each window's length rounded up to 256; LongRoPE models switch factors by it.
    PhiquantError if llama.cpp cannot load or run the file, or needs longer than `timeout` seconds.
    """
    for index, window in enumerate(windows):
        if not len(window):
            raise ValueError(f"window {index} has no tokens")
        if context is not None and len(window) > context:
            raise ValueError(f"window {index} has {len(window)} tokens, more than the context of {context}")
    options = _options(flash_attention, cache, context, threads)
    request = {"action": "logits", "windows": [[int(t) for t in window] for window in windows], **options}
    with tempfile.TemporaryDirectory(prefix="phiquant-", ignore_cleanup_errors=True) as folder:
        _run(Path(path), request, Path(folder), timeout)
        # A mapped file outlives its name: nothing is left on the disk once the arrays are gone.
        return [np.load(Path(folder) / f"logits-{i}.npy", mmap_mode="c") for i in range(len(windows))]


def tokenize(
    path: str | Path, texts: Sequence[str], *, add_special: bool = False, timeout: float = 300.0
) -> list[list[int]]:
    """Token ids of each text by the file's own tokenizer. Special tokens in the text are recognised."""
    request = {"action": "tokenize", "texts": list(texts), "add_special": add_special}
    with tempfile.TemporaryDirectory(prefix="phiquant-") as folder:
        return list(_run(Path(path), request, Path(folder), timeout)["ids"])


def generate(
    path: str | Path,
    prompt: str | Sequence[int],
    *,
    max_new_tokens: int = 64,
    flash_attention: bool = False,
    cache: Cache = "float32",
    context: int | None = None,
    threads: int | None = None,
    timeout: float = 900.0,
) -> Generated:
    """Continue `prompt` (text or token ids) with the most likely tokens, until the model ends its turn."""
    given = prompt if isinstance(prompt, str) else [int(t) for t in prompt]
    request = {"action": "generate", "prompt": given, "max_new_tokens": max_new_tokens}
    request |= _options(flash_attention, cache, context, threads)
    with tempfile.TemporaryDirectory(prefix="phiquant-") as folder:
        result = _run(Path(path), request, Path(folder), timeout)
    return Generated(result["tokens"], result["text"], result["prompt_tokens"])


def version() -> str:
    """The installed version of xllamacpp."""
    import importlib.metadata

    _library()
    return importlib.metadata.version("xllamacpp")


def _options(flash_attention: bool, cache: Cache, context: int | None, threads: int | None) -> dict[str, Any]:
    if cache not in ("float32", "float16"):
        raise ValueError(f"cache is 'float32' or 'float16', not {cache!r}")
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "flash_attention": flash_attention,
        "cache": cache,
        "context": context,
        "threads": threads or available or 1,
    }


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


def _run(path: Path, request: dict[str, Any], folder: Path, timeout: float) -> dict[str, Any]:
    """Let a worker answer `request`; its files are in `folder`."""
    if not path.is_file():
        raise PhiquantError(f"{path}: no such file")
    file, log = folder / "request.json", folder / "log"
    file.write_text(json.dumps({"library": _library(), "model": str(path.resolve()), **request}), encoding="utf-8")
    # Without this, an aborting llama.cpp starts a debugger, where one is installed, to print its stack.
    environment = {**os.environ, "GGML_NO_BACKTRACE": "1"}
    with log.open("wb") as sink:
        try:
            status = subprocess.run(
                [sys.executable, str(_WORKER), str(file)],
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                env=environment,
                timeout=timeout,
            ).returncode
        except subprocess.TimeoutExpired:
            raise PhiquantError(
                f"llama.cpp did not finish with {path} in {timeout:g} s; allow more time with timeout=, or pass less "
                f"text{_quote(log)}"
            ) from None
    result = folder / "result.json"
    if status == 0 and result.is_file():
        return dict(json.loads(result.read_text(encoding="utf-8")))
    if status < 0:
        name = signal.Signals(-status).name if -status in list(signal.Signals) else f"signal {-status}"
        hint = "check the file with phiquant.verify, or export it again"
        raise PhiquantError(f"llama.cpp crashed ({name}) on {path}; {hint}{_quote(log)}")
    raise PhiquantError(f"llama.cpp failed on {path}{_quote(log)}")


def _quote(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return "\n  ".join([". Its last messages:", *(line[:300] for line in lines[-_TAIL:])]) if lines else ""
