"""Run a safetensors folder in plain transformers: logits, greedy text.

Every call runs transformers_worker.py in a process of its own that has not imported phiquant, because
that is the claim: the folder needs none of it. The process also gives its memory back when it ends.
T = tokens of a window, V = vocabulary.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import PhiquantError
from ..extras import need
from .llamacpp import Generated

_WORKER = Path(__file__).with_name("transformers_worker.py")
_TAIL = 12  # lines of the worker's log that an error quotes


def logits(
    folder: str | Path, windows: Sequence[Sequence[int]], *, threads: int | None = None, timeout: float = 900.0
) -> list[np.ndarray]:
    """Logits of each window of token ids: float32 [T, V], mapped from disk.

    The model computes in the dtype that the folder's config.json names; float32 for quantized exports.
    PhiquantError if transformers cannot load or run it, or needs longer than `timeout` seconds.
    """
    for index, window in enumerate(windows):
        if not len(window):
            raise ValueError(f"window {index} has no tokens")
    request = {"action": "logits", "windows": [[int(t) for t in window] for window in windows]}
    with tempfile.TemporaryDirectory(prefix="phiquant-", ignore_cleanup_errors=True) as place:
        _run(Path(folder), request, Path(place), threads, timeout)
        # A mapped file outlives its name: nothing is left on the disk once the arrays are gone. Mode "c": the
        # arrays may be written to, without which torch warns.
        return [np.load(Path(place) / f"logits-{i}.npy", mmap_mode="c") for i in range(len(windows))]


def generate(
    folder: str | Path,
    prompt: str | Sequence[int],
    *,
    max_new_tokens: int = 64,
    threads: int | None = None,
    timeout: float = 900.0,
) -> Generated:
    """Continue `prompt` (text or token ids) with the most likely tokens, until the model ends its turn."""
    given = prompt if isinstance(prompt, str) else [int(t) for t in prompt]
    request = {"action": "generate", "prompt": given, "max_new_tokens": max_new_tokens}
    with tempfile.TemporaryDirectory(prefix="phiquant-") as place:
        result = _run(Path(folder), request, Path(place), threads, timeout)
    return Generated(result["tokens"], result["text"], result["prompt_tokens"])


def _run(folder: Path, request: dict[str, Any], place: Path, threads: int | None, timeout: float) -> dict[str, Any]:
    """Let a worker answer `request`; its files are in `place`."""
    if not (folder / "config.json").is_file():
        raise PhiquantError(f"{folder} has no config.json; give the folder of a safetensors export")
    need("transformers", extra="hf")
    need("compressed_tensors", extra="hf")
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    file, log, result = place / "request.json", place / "log", place / "result.json"
    request = {**request, "model": str(folder.resolve()), "threads": threads or available or 1}
    file.write_text(json.dumps(request), encoding="utf-8")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
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
                f"transformers did not finish with {folder} in {timeout:g} s; allow more time with timeout=, or pass "
                "less text"
            ) from None
    if status == 0 and result.is_file():
        return dict(json.loads(result.read_text(encoding="utf-8")))
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    quoted = "".join(f"\n  {line[:300]}" for line in lines[-_TAIL:])
    raise PhiquantError(
        f"transformers failed on {folder} (exit status {status}); check it with phiquant.verify. It said:{quoted}"
    )
