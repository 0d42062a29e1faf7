"""What the bytes of OpenVINO's element types stand for, by numpy: for the reader."""

from __future__ import annotations

import numpy as np

from ...spec import Float, NormalFloat

ELEMENTS: dict[str, Float | NormalFloat] = {
    "nf4": NormalFloat(),
    "f4e2m1": Float("e2m1"),
    "f8e4m3": Float("e4m3fn"),
    "f8e5m2": Float("e5m2"),
}
_TABLES = {kind: np.array(element.levels, np.float32) for kind, element in ELEMENTS.items()}
_STORED: dict[str, np.dtype] = {
    "f32": np.dtype("<f4"),
    "f16": np.dtype("<f2"),
    "bf16": np.dtype("<u2"),
    "i8": np.dtype("i1"),
}


def stored(data: bytes, kind: str, bits: int) -> np.ndarray:
    """The stored numbers: floats, bit patterns of those that numpy lacks, or codes; what fills the last byte too."""
    if bits >= 8:
        return np.frombuffer(data, _STORED.get(kind, np.dtype("u1")))
    places = np.arange(0, 8, bits, dtype=np.uint8)
    digits = np.frombuffer(data, np.uint8)[:, None] >> places & np.uint8((1 << bits) - 1)
    codes = digits.reshape(-1)
    return (codes ^ 8).astype(np.int8) - np.int8(8) if kind == "i4" else codes


def values(numbers: np.ndarray, kind: str) -> np.ndarray:
    """What stored numbers of that type stand for, float32."""
    if kind == "bf16":
        return (numbers.astype(np.uint32) << 16).view(np.float32)
    if kind == "f8e8m0":
        return np.ldexp(np.float32(1.0), numbers.astype(np.int32) - 127).astype(np.float32)
    return np.asarray(_TABLES[kind][numbers] if kind in _TABLES else numbers.astype(np.float32))


def packed(codes: np.ndarray, bits: int) -> bytes:
    """Codes of less than a byte side by side, from the lowest bit of each byte."""
    each = 8 // bits
    flat = codes.reshape(-1).astype(np.uint8) & np.uint8((1 << bits) - 1)
    flat = np.concatenate([flat, np.zeros(-len(flat) % each, np.uint8)]).reshape(-1, each)
    return np.bitwise_or.reduce(flat << np.arange(0, 8, bits, dtype=np.uint8), axis=1).astype(np.uint8).tobytes()
