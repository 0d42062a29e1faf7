"""Naive numpy forms of the kernels' formulas, written from the definitions: float32, one block a row."""

from __future__ import annotations

import ml_dtypes
import numpy as np

STORAGE = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
f32 = np.float32


def stored(values: np.ndarray, storage: str) -> np.ndarray:
    """float32 values rounded to the storage type, finite, without float32 or bfloat16 subnormals."""
    dtype = STORAGE[storage]
    largest = f32(ml_dtypes.finfo(dtype).max)
    rounded = np.clip(values.astype(f32), -largest, largest).astype(dtype).astype(f32)
    if storage != "float16":
        rounded[np.abs(rounded) < np.finfo(f32).tiny] = 0
    return rounded + f32(0)  # -0 becomes 0


def parameters(rows: np.ndarray, qmin: int, qmax: int, rule: str, storage: str) -> tuple[np.ndarray, np.ndarray]:
    """(scale, offset), float32 [blocks, 1], of the min-max range of `rows` [blocks, block]."""
    lo, hi = rows.min(1, keepdims=True), rows.max(1, keepdims=True)
    zero = np.zeros_like(lo)
    if rule == "absmax":
        return stored(np.abs(rows).max(1, keepdims=True) / f32(qmax), storage), zero
    if rule == "signed_absmax":
        extreme = np.where(-lo >= hi, lo, hi)
        return stored(extreme / f32(qmin), storage), zero
    if rule == "zero_point":
        lo, hi = np.minimum(lo, 0), np.maximum(hi, 0)
        scale = stored((hi - lo) / f32(qmax - qmin), storage)
        return scale, np.clip(np.rint(f32(qmin) - lo * inverse(scale)), qmin, qmax)
    minimum = stored(lo, storage)
    return stored(np.maximum(hi - minimum, 0) / f32(qmax - qmin), storage), minimum


def inverse(scale: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", over="ignore"):
        return np.where(np.abs(scale) < np.finfo(f32).tiny, f32(0), f32(1) / scale)


def unclamped(rows: np.ndarray, scale: np.ndarray, offset: np.ndarray, minimum: bool) -> np.ndarray:
    inv = inverse(scale)
    return np.rint((rows - offset) * inv) if minimum else np.rint(rows * inv) + offset


def codes(rows: np.ndarray, scale: np.ndarray, offset: np.ndarray, minimum: bool, qmin: int, qmax: int) -> np.ndarray:
    return np.clip(unclamped(rows, scale, offset, minimum), qmin, qmax)


def values(q: np.ndarray, scale: np.ndarray, offset: np.ndarray, minimum: bool) -> np.ndarray:
    return scale * q + offset if minimum else scale * (q - offset)
