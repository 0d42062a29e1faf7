"""Lets a runtime answer in a process of its own: it may abort on a broken file, and gives its memory back at its end.

The scripts lie in workers/, import nothing of phiquant, and are run by their path.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import PhiquantError

_TAIL = 12  # lines of the worker's log that an error quotes


@dataclass(frozen=True)
class Generated:
    """A greedy continuation: the new tokens and their text, and the tokens of the prompt."""

    tokens: list[int]
    text: str
    prompt_tokens: list[int]


def logits(
    runtime: str, path: Path, windows: Sequence[Sequence[int]], request: Mapping[str, Any], **options: Any
) -> list[np.ndarray]:
    """Logits of each window of token ids, float32 [T, V], mapped from disk. `options` and errors: see ask()."""
    for index, window in enumerate(windows):
        if not len(window):
            raise ValueError(f"window {index} has no tokens")
    rows = [[int(t) for t in window] for window in windows]
    return list(ask(runtime, path, {"action": "logits", "windows": rows, **request}, **options)["logits"])


def generate(
    runtime: str,
    path: Path,
    prompt: str | Sequence[int],
    max_new_tokens: int,
    request: Mapping[str, Any],
    **options: Any,
) -> Generated:
    """The most likely continuation of `prompt`, text or token ids. `options` and errors: see ask()."""
    given = prompt if isinstance(prompt, str) else [int(t) for t in prompt]
    asked = {"action": "generate", "prompt": given, "max_new_tokens": max_new_tokens, **request}
    result = ask(runtime, path, asked, **options)
    return Generated(result["tokens"], result["text"], result["prompt_tokens"])


def tokenize(
    runtime: str, path: Path, texts: Sequence[str], request: Mapping[str, Any], **options: Any
) -> list[list[int]]:
    """Token ids of each text by the runtime's own tokenizer. `options` and errors: see ask()."""
    return list(ask(runtime, path, {"action": "tokenize", "texts": list(texts), **request}, **options)["ids"])


def ask(
    runtime: str,
    path: Path,
    request: Mapping[str, Any],
    *,
    script: str,
    timeout: float,
    threads: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """What workers/<script>.py answers to `request` about the model at `path`, with `threads` (None: all cores).

    PhiquantError, with the end of the worker's log, if it fails, crashes, or needs longer than `timeout` seconds.
    """
    if not path.exists():
        raise PhiquantError(f"{path}: no such file")
    worker = Path(__file__).parent / "workers" / f"{script}.py"
    with tempfile.TemporaryDirectory(prefix="phiquant-", ignore_cleanup_errors=True) as folder:
        file, log, result = (Path(folder) / name for name in ("request.json", "log", "result.json"))
        asked = {**request, "model": str(path.resolve()), "threads": threads or _cores()}
        file.write_text(json.dumps(asked), encoding="utf-8")
        with log.open("wb") as sink:
            try:
                status = subprocess.run(
                    [sys.executable, str(worker), str(file)],
                    stdin=subprocess.DEVNULL,
                    stdout=sink,
                    stderr=sink,
                    env={**os.environ, **(environment or {})},
                    timeout=timeout,
                ).returncode
            except subprocess.TimeoutExpired:
                raise PhiquantError(
                    f"{runtime} did not finish with {path} in {timeout:g} s; allow more time with timeout=, or pass "
                    f"less text{_quote(log)}"
                ) from None
        if status < 0:
            name = signal.Signals(-status).name if -status in list(signal.Signals) else f"signal {-status}"
            hint = "check the file with phiquant.verify, or export it again"
            raise PhiquantError(f"{runtime} crashed ({name}) on {path}; {hint}{_quote(log)}")
        if status or not result.is_file():
            raise PhiquantError(f"{runtime} failed on {path}; check it with phiquant.verify{_quote(log)}")
        answer = dict(json.loads(result.read_text(encoding="utf-8")))
        # A mapped file outlives its name: nothing is left on the disk once the arrays are gone. Mode "c": the
        # arrays may be written to, without which torch warns.
        names = (Path(folder) / f"logits-{index}.npy" for index in range(answer.get("windows", 0)))
        return answer | {"logits": [np.load(name, mmap_mode="c") for name in names]}


def _cores() -> int:
    return (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()) or 1


def _quote(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return "\n  ".join([". Its last messages:", *(line[:300] for line in lines[-_TAIL:])]) if lines else ""
