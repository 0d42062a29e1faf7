"""How a worker is asked and answers: request.json in, result.json (and logits-<i>.npy) beside it.

Imports nothing of phiquant, as all workers: what they compute is what anyone gets who has the file and the runtime.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Action = Callable[[dict[str, Any], Path], dict[str, Any]]


def create_logits(folder: Path, index: int, shape: tuple[int, int]) -> np.ndarray:
    """The array float32 [T, V], on disk, for the logits of a window."""
    path = folder / f"logits-{index}.npy"
    return np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)


def serve(act: Action) -> None:
    """Answer the request whose file is the first argument; an error goes to stderr, with exit status 1."""
    try:
        path = Path(sys.argv[1])
        result = act(json.loads(path.read_text(encoding="utf-8")), path.parent)
        if any(name.partition(".")[0] == "phiquant" for name in sys.modules):
            raise RuntimeError("phiquant was imported, so this run does not show that the file needs none of it")
        (path.parent / "result.json").write_text(json.dumps(result), encoding="utf-8")
    except Exception as error:
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)
