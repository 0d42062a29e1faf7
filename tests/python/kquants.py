"""K-quant blocks of GGUF, put together from a QuantizedTensor by numpy, as the format's descriptions say."""

from __future__ import annotations

import numpy as np
from phiquant import QuantizedTensor


def blocks(qt: QuantizedTensor, name: str) -> np.ndarray:
    """The bytes of Q2_K .. Q6_K, uint8 [super-blocks, bytes of a block]."""
    codes = qt.codes.numpy().reshape(-1, 256)
    n = len(codes)
    scales = qt.scales.numpy().reshape(n, -1)
    d = qt.super_scales.numpy().reshape(n, 1).view(np.uint8)
    if name in ("q2_k", "q4_k", "q5_k"):
        mins = qt.minimums.numpy().reshape(n, -1)
        dmin = qt.super_minimums.numpy().reshape(n, 1).view(np.uint8)
    if name == "q2_k":
        return np.concatenate([scales | mins << 4, crumbs(codes), d, dmin], axis=1)
    if name == "q3_k":
        high, low = (codes + 4) >> 2, (codes + 4) & 3
        mask = np.zeros((n, 32), np.uint8)
        for k in range(8):
            mask |= (high[:, 32 * k : 32 * k + 32] << k).astype(np.uint8)
        s = (scales.astype(np.int16) + 32).astype(np.uint8)
        packed = np.concatenate([s[:, :8] & 15 | (s[:, 8:] & 15) << 4, np.zeros((n, 4), np.uint8)], axis=1)
        for j in range(16):
            packed[:, 8 + j % 4] |= s[:, j] >> 4 << 2 * (j // 4)
        return np.concatenate([mask, crumbs(low.astype(np.uint8)), packed, d], axis=1)
    if name == "q4_k":
        return np.concatenate([d, dmin, six_bits(scales, mins), nibbles(codes)], axis=1)
    if name == "q5_k":
        high = np.zeros((n, 32), np.uint8)
        for k in range(8):
            high |= codes[:, 32 * k : 32 * k + 32] >> 4 << k
        return np.concatenate([d, dmin, six_bits(scales, mins), high, nibbles(codes & 15)], axis=1)
    assert name == "q6_k"
    q = (codes + 32).astype(np.uint8)
    low = np.zeros((n, 128), np.uint8)
    for h in range(2):
        part = q[:, 128 * h : 128 * h + 128] & 15
        low[:, 64 * h : 64 * h + 64] = part[:, :64] | part[:, 64:] << 4
    return np.concatenate([low, crumbs(q >> 4), scales.view(np.uint8), d], axis=1)


def crumbs(codes: np.ndarray) -> np.ndarray:
    """Two bits each: byte 32h + l, bits 2p and 2p + 1, hold element 128h + 32p + l."""
    q = codes.reshape(-1, 2, 4, 32)
    return (q[:, :, 0] | q[:, :, 1] << 2 | q[:, :, 2] << 4 | q[:, :, 3] << 6).reshape(-1, 64)


def nibbles(codes: np.ndarray) -> np.ndarray:
    """Four bits each: byte 32c + l holds element 64c + l in its low half, 64c + 32 + l in its high half."""
    q = codes.reshape(-1, 4, 2, 32)
    return (q[:, :, 0] | q[:, :, 1] << 4).reshape(-1, 128)


def six_bits(s: np.ndarray, m: np.ndarray) -> np.ndarray:
    """Eight scales and eight minimums of six bits in twelve bytes."""
    out = np.zeros((len(s), 12), np.uint8)
    out[:, 0:4] = s[:, :4] | s[:, 4:] >> 4 << 6
    out[:, 4:8] = m[:, :4] | m[:, 4:] >> 4 << 6
    out[:, 8:12] = s[:, 4:] & 15 | (m[:, 4:] & 15) << 4
    return out
