"""The blocks of GGUF's types taken apart, in numpy: the reader's half, which shares no code with the packers.

Written from the layouts of ggml (ggml-common.h, ggml-quants.c). B = blocks, V = values of a block, S = its sub-blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ...spec import QuantSpec, spec

# Twice the values of e2m1: ggml halves the scale instead.
TWICE_E2M1 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)
IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)


@dataclass(frozen=True)
class Block:
    """What blocks hold, as stored: codes int8 or uint8 [B, V]; d and m float16 [B, 1].

    scales, minimums: codes of sub-blocks [B, S], int8 or uint8; of MXFP4 and NVFP4 the bits of e8m0, e4m3.
    """

    codes: np.ndarray
    d: np.ndarray | None = None
    m: np.ndarray | None = None
    scales: np.ndarray | None = None
    minimums: np.ndarray | None = None


@dataclass(frozen=True)
class Layout:
    """A type. spec: its own grid; levels: what its codes stand for at scale 1, where that is not the code itself."""

    values: int
    size: int
    grid: str
    read: Callable[[np.ndarray], Block]
    levels: np.ndarray | None = None

    @property
    def spec(self) -> QuantSpec:
        return spec(self.grid)


def _half(data: np.ndarray, at: int) -> np.ndarray:
    return np.ascontiguousarray(data[:, at : at + 2]).view("<f2")


def _halves(data: np.ndarray) -> np.ndarray:
    """Byte j: value j, and value j + half of them."""
    return np.concatenate([data & 15, data >> 4], axis=1)


def _nibbles(data: np.ndarray) -> np.ndarray:
    """Chunks of 32 bytes: 32 low halves, then 32 high ones."""
    chunks = data.reshape(len(data), -1, 32)
    return np.stack([chunks & 15, chunks >> 4], axis=2).reshape(len(data), -1)


def _crumbs(data: np.ndarray) -> np.ndarray:
    """64 bytes in two parts of 32, of which the bits 0 and 1 come first, then 2 and 3, ..."""
    parts = data.reshape(len(data), 2, 1, 32)
    shifts = np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1)
    return (parts >> shifts & 3).reshape(len(data), 256)


def _planes(data: np.ndarray) -> np.ndarray:
    """32 bytes: bit k of byte l belongs to value 32 k + l."""
    return (data[:, None, :] >> np.arange(8, dtype=np.uint8)[:, None] & 1).reshape(len(data), 256)


def _fifths(data: np.ndarray) -> np.ndarray:
    """Four bytes, a bit for each of 32 values."""
    return np.unpackbits(np.ascontiguousarray(data), axis=1, bitorder="little")


def _below(codes: np.ndarray, zero: int) -> np.ndarray:
    """Unsigned codes counted from `zero`."""
    return codes.astype(np.int8) - np.int8(zero)


def _q4_0(b: np.ndarray) -> Block:
    return Block(_below(_halves(b[:, 2:]), 8), _half(b, 0))


def _q4_1(b: np.ndarray) -> Block:
    return Block(_halves(b[:, 4:]), _half(b, 0), _half(b, 2))


def _q5_0(b: np.ndarray) -> Block:
    return Block(_below(_halves(b[:, 6:]) | _fifths(b[:, 2:6]) << 4, 16), _half(b, 0))


def _q5_1(b: np.ndarray) -> Block:
    return Block(_halves(b[:, 8:]) | _fifths(b[:, 4:8]) << 4, _half(b, 0), _half(b, 2))


def _q8_0(b: np.ndarray) -> Block:
    return Block(np.ascontiguousarray(b[:, 2:]).view(np.int8), _half(b, 0))


def _iq4_nl(b: np.ndarray) -> Block:
    return Block(_halves(b[:, 2:]), _half(b, 0))


def _mxfp4(b: np.ndarray) -> Block:
    return Block(_halves(b[:, 1:]), scales=b[:, :1])


def _nvfp4(b: np.ndarray) -> Block:
    codes = _halves(np.ascontiguousarray(b[:, 4:]).reshape(-1, 8)).reshape(len(b), 64)
    return Block(codes, scales=b[:, :4])


def _six_bits(b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Twelve bytes: eight scales and eight minimums."""
    low, high, rest = b[:, 0:4], b[:, 4:8], b[:, 8:12]
    scales = np.concatenate([low & 63, rest & 15 | low >> 6 << 4], axis=1)
    minimums = np.concatenate([high & 63, rest >> 4 | high >> 6 << 4], axis=1)
    return scales, minimums


def _q2_k(b: np.ndarray) -> Block:
    return Block(_crumbs(b[:, 16:80]), _half(b, 80), _half(b, 82), b[:, :16] & 15, b[:, :16] >> 4)


def _q3_k(b: np.ndarray) -> Block:
    codes = _below(_crumbs(b[:, 32:96]) | _planes(b[:, :32]) << 2, 4)
    low = np.concatenate([b[:, 96:104] & 15, b[:, 96:104] >> 4], axis=1)
    high = (b[:, None, 104:108] >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3).reshape(len(b), 16)
    return Block(codes, _half(b, 108), scales=_below(low | high << 4, 32))


def _q4_k(b: np.ndarray) -> Block:
    scales, minimums = _six_bits(b[:, 4:16])
    return Block(_nibbles(b[:, 16:]), _half(b, 0), _half(b, 2), scales, minimums)


def _q5_k(b: np.ndarray) -> Block:
    scales, minimums = _six_bits(b[:, 4:16])
    codes = _nibbles(b[:, 48:]) | _planes(b[:, 16:48]) << 4
    return Block(codes, _half(b, 0), _half(b, 2), scales, minimums)


def _q6_k(b: np.ndarray) -> Block:
    low = b[:, :128].reshape(-1, 2, 1, 64) >> np.array([0, 4], np.uint8).reshape(1, 1, 2, 1) & 15
    codes = _below(low.reshape(len(b), 256) | _crumbs(b[:, 128:192]) << 4, 32)
    return Block(codes, _half(b, 208), scales=np.ascontiguousarray(b[:, 192:208]).view(np.int8))


def _iq4_xs(b: np.ndarray) -> Block:
    high = np.ascontiguousarray(b[:, 2:4]).view("<u2") >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    low = (b[:, 4:8, None] >> np.array([0, 4], np.uint8) & 15).reshape(len(b), 8)
    codes = _halves(np.ascontiguousarray(b[:, 8:]).reshape(-1, 16)).reshape(len(b), 256)
    return Block(codes, _half(b, 0), scales=_below(low | high.astype(np.uint8) << 4, 32))


def _tq1_0(b: np.ndarray) -> Block:
    digits = [_trits(b[:, :32], 5), _trits(b[:, 32:48], 5), _trits(b[:, 48:52], 4)]
    return Block(np.concatenate(digits, axis=1), _half(b, 52))


def _trits(data: np.ndarray, count: int) -> np.ndarray:
    """`count` digits of base 3 of each byte, a fraction of 256: the first digits of all bytes, then the second ones."""
    powers = np.array([1, 3, 9, 27, 81], np.uint8)[:count, None]
    carried = (data[:, None, :] * powers).astype(np.uint16) * 3 >> 8
    return _below(carried.reshape(len(data), -1).astype(np.uint8), 1)


def _tq2_0(b: np.ndarray) -> Block:
    return Block(_below(_crumbs(b[:, :64]), 1), _half(b, 64))


LAYOUTS = {
    "Q4_0": Layout(32, 18, "int4-g32-signmax-f16", _q4_0),
    "Q4_1": Layout(32, 20, "uint4-g32-min-f16", _q4_1),
    "Q5_0": Layout(32, 22, "int5-g32-signmax-f16", _q5_0),
    "Q5_1": Layout(32, 24, "uint5-g32-min-f16", _q5_1),
    "Q8_0": Layout(32, 34, "int8-g32-sym-f16", _q8_0),
    "Q2_K": Layout(256, 84, "uint2-g16-min-f16-uint4/256", _q2_k),
    "Q3_K": Layout(256, 110, "int3-g16-signmax-f16-int6/256", _q3_k),
    "Q4_K": Layout(256, 144, "uint4-g32-min-f16-uint6/256", _q4_k),
    "Q5_K": Layout(256, 176, "uint5-g32-min-f16-uint6/256", _q5_k),
    "Q6_K": Layout(256, 210, "int6-g16-signmax-f16-int8/256", _q6_k),
    "IQ4_NL": Layout(32, 18, "iq4nl-g32-signmax-f16", _iq4_nl, IQ4),
    "IQ4_XS": Layout(256, 136, "iq4nl-g32-signmax-f16-int6/256", _iq4_xs, IQ4),
    "TQ1_0": Layout(256, 54, "ternary-g256-absmean-f16", _tq1_0),
    "TQ2_0": Layout(256, 66, "ternary-g256-absmean-f16", _tq2_0),
    "MXFP4": Layout(32, 17, "fp4_e2m1-g32-sym-e8m0", _mxfp4, TWICE_E2M1),
    "NVFP4": Layout(64, 36, "fp4_e2m1-g16-sym-e4m3", _nvfp4, TWICE_E2M1),
}


def block_scales(kind: str, block: Block) -> tuple[np.ndarray, np.ndarray | None]:
    """(scale, minimum) of each sub-block, float32 [B, S]; of the types with TWICE_E2M1 half the scale."""
    if kind == "MXFP4":
        assert block.scales is not None
        return np.ldexp(np.float32(1), block.scales.astype(np.int32) - 128), None
    if kind == "NVFP4":
        assert block.scales is not None
        return _ue4m3(block.scales), None
    assert block.d is not None
    scale, minimum = block.d.astype(np.float32), None if block.m is None else block.m.astype(np.float32)
    if block.scales is not None:
        scale = scale * block.scales
    if block.minimums is not None and minimum is not None:
        minimum = -(minimum * block.minimums)
    return scale, minimum


def _ue4m3(bits: np.ndarray) -> np.ndarray:
    """Half of float8 e4m3 without a sign, as ggml reads it: 0x7f, a NaN elsewhere, is 0."""
    exponent, fraction = (bits >> 3 & 15).astype(np.int32), (bits & 7).astype(np.float32)
    value = np.ldexp(np.where(exponent > 0, 8 + fraction, fraction).astype(np.float32), np.maximum(exponent, 1) - 11)
    return np.where(bits == 0x7F, np.float32(0), value)


def decode(kind: str, data: np.ndarray) -> np.ndarray:
    """Bytes of blocks, uint8 [B, size], to their values, float32 [B, V], in the arithmetic of ggml."""
    layout = LAYOUTS[kind]
    block = layout.read(data)
    scale, minimum = block_scales(kind, block)
    levels = block.codes.astype(np.float32) if layout.levels is None else layout.levels[block.codes]
    values = levels.reshape(*scale.shape, -1) * scale[..., None]
    if minimum is not None:
        values += minimum[..., None]
    return values.reshape(len(data), layout.values)
