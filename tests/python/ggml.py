"""ggml's own quantizers and dequantizers, from the library that xllamacpp ships: the oracle of the GGUF tests.

They run in a process of their own: an assertion of ggml ends the process it runs in.
"""

from __future__ import annotations

import ctypes
import pickle
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

# name -> (id, values of a block, bytes of a block), as ggml.h and ggml-common.h have them
TYPES = {
    "Q4_0": (2, 32, 18), "Q4_1": (3, 32, 20), "Q5_0": (6, 32, 22), "Q5_1": (7, 32, 24), "Q8_0": (8, 32, 34),
    "Q2_K": (10, 256, 84), "Q3_K": (11, 256, 110), "Q4_K": (12, 256, 144), "Q5_K": (13, 256, 176),
    "Q6_K": (14, 256, 210), "IQ4_NL": (20, 32, 18), "IQ4_XS": (23, 256, 136), "TQ1_0": (34, 256, 54),
    "TQ2_0": (35, 256, 66), "MXFP4": (39, 32, 17), "NVFP4": (40, 64, 36), "IQ2_XXS": (16, 256, 66),
    "IQ2_XS": (17, 256, 74), "IQ2_S": (22, 256, 82), "IQ3_XXS": (18, 256, 98), "IQ3_S": (21, 256, 110),
}  # fmt: skip


def decode(jobs: Sequence[tuple[str, np.ndarray]]) -> list[np.ndarray]:
    """Blocks of a type, uint8 [blocks, bytes], to float32 [blocks, values]."""
    return _run([("decode", kind, blocks) for kind, blocks in jobs])


def quantize(jobs: Sequence[tuple[str, np.ndarray] | tuple[str, np.ndarray, np.ndarray]]) -> list[np.ndarray]:
    """Values float32 [rows, columns] to the bytes [rows, bytes of a row] that llama.cpp's quantizer makes of them.

    With a third part, float32 [columns]: the importance matrix of the tensor.
    """
    return _run([("quantize", *job) for job in jobs])


def _run(jobs: list[Any]) -> list[np.ndarray]:
    done = subprocess.run([sys.executable, __file__], input=pickle.dumps(jobs), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    return pickle.loads(done.stdout)


def _decode(library: Any, kind: str, blocks: np.ndarray) -> np.ndarray:
    _, values, size = TYPES[kind]
    data = np.ascontiguousarray(blocks, np.uint8).reshape(-1, size)
    out = np.empty((len(data), values), np.float32)
    name = "dequantize_row_" + kind.lower().replace("_k", "_K")
    getattr(library, name)(
        ctypes.c_void_p(data.ctypes.data), ctypes.c_void_p(out.ctypes.data), ctypes.c_int64(out.size)
    )
    return out


def _quantize(library: Any, kind: str, values: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    number, block, size = TYPES[kind]
    x = np.ascontiguousarray(values, np.float32)
    out = np.zeros((len(x), x.shape[1] // block * size), np.uint8)
    call = library.ggml_quantize_chunk
    call.restype = ctypes.c_size_t
    pointers = [ctypes.c_void_p(a.ctypes.data) for a in (x, out)]
    sizes = [ctypes.c_int64(n) for n in (0, *x.shape)]
    weights = None if importance is None else np.ascontiguousarray(importance, np.float32)
    last = None if weights is None else ctypes.c_void_p(weights.ctypes.data)
    assert call(ctypes.c_int(number), *pointers, *sizes, last) == out.size
    return out


def _main() -> None:
    from phiquant.runtimes import llamacpp

    library = ctypes.CDLL(llamacpp._library())
    library.ggml_cpu_init() if hasattr(library, "ggml_cpu_init") else None
    work = {"decode": _decode, "quantize": _quantize}
    jobs = pickle.load(sys.stdin.buffer)
    sys.stdout.buffer.write(pickle.dumps([work[action](library, *arguments) for action, *arguments in jobs]))


if __name__ == "__main__":
    _main()
