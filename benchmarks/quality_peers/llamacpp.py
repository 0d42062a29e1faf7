"""llama.cpp's quantizers with an importance matrix (the mean of x^2 of each column), called in its own library."""

from __future__ import annotations

import ctypes
from functools import partial
from typing import Any

import numpy as np
import torch
from phiquant import imatrix
from phiquant.runtimes import llamacpp
from quality import linears

PACKAGE = "xllamacpp"

# name -> (id in ggml.h, values of a block, bytes of a block)
TYPES = {
    "Q4_0": (2, 32, 18), "Q4_1": (3, 32, 20), "Q8_0": (8, 32, 34), "Q2_K": (10, 256, 84), "Q3_K": (11, 256, 110),
    "Q4_K": (12, 256, 144), "Q5_K": (13, 256, 176), "Q6_K": (14, 256, 210), "IQ2_XXS": (16, 256, 66),
    "IQ2_XS": (17, 256, 74), "IQ3_XXS": (18, 256, 98), "IQ4_NL": (20, 32, 18), "IQ3_S": (21, 256, 110),
    "IQ2_S": (22, 256, 82), "IQ4_XS": (23, 256, 136),
}  # fmt: skip


def _there_and_back(library: Any, kind: str, values: np.ndarray, importance: np.ndarray) -> np.ndarray:
    number, block, size = TYPES[kind]
    x, weights = np.ascontiguousarray(values, np.float32), np.ascontiguousarray(importance, np.float32)
    stored, out = np.zeros((len(x), x.shape[1] // block * size), np.uint8), np.empty_like(x)
    library.ggml_quantize_init(ctypes.c_int(number))
    pointers = [ctypes.c_void_p(a.ctypes.data) for a in (x, stored)]
    sizes = [ctypes.c_int64(n) for n in (0, *x.shape)]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk(ctypes.c_int(number), *pointers, *sizes, ctypes.c_void_p(weights.ctypes.data))
    decode = getattr(library, "dequantize_row_" + kind.lower().replace("_k", "_K"))
    decode(ctypes.c_void_p(stored.ctypes.data), ctypes.c_void_p(out.ctypes.data), ctypes.c_int64(out.size))
    return out


_known: dict[float, Any] = {}


def _importance(model: Any, ids: torch.Tensor) -> Any:
    """Collected once for each model: its norms tell them apart."""
    key = float(model.model.layers[0].input_layernorm.weight.double().sum())
    if key not in _known:
        _known[key] = imatrix.collect(model, ids)
    return _known[key]


@torch.no_grad()
def _quantize(model: Any, ids: torch.Tensor, tokenizer: Any, kind: str) -> tuple[Any, float]:
    library = ctypes.CDLL(llamacpp._library())
    known = _importance(model, ids)
    for name, linear in linears(model).items():
        importance = known[name].weights
        linear.weight.copy_(torch.from_numpy(_there_and_back(library, kind, linear.weight.numpy(), importance)))
    _, block, size = TYPES[kind]
    return model, 8 * size / block


METHODS = {f"{kind}+imatrix": partial(_quantize, kind=kind) for kind in TYPES}
