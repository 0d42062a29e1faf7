"""Which GGUF type holds a spec exactly, and the bytes of a tensor in that type. Nothing is rounded here.

Q4_0: s q, q in -8..7. Q4_1: s q + m, q in 0..15. Q8_0: s q, q in -128..127. All three hold s (and m)
as float16, one per 32 consecutive values; a coarser granularity is held by repeating s. Fewer bits
are held in the next larger type. N = rows, K = values of a row.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch

from .._extension import load
from ..errors import PhiquantError
from ..spec import TARGETS, Int, PerChannel, PerGroup, PerTensor, QuantSpec
from ..tensor import QuantizedTensor
from .gguf_container import BF16, F16, F32, Q4_0, Q4_1, Q8_0, GGMLType

_C = load()
BLOCK = 32
FLOAT_TYPES: dict[str, GGMLType] = {"float32": F32, "float16": F16, "bfloat16": BF16}


def type_for(name: str, spec: QuantSpec, shape: tuple[int, ...]) -> GGMLType:
    """The GGUF type that holds `spec` exactly for a weight of `shape`.

    PhiquantError names the tensor, the spec, what does not fit, and the nearest spec that does.
    """
    if len(shape) != 2 or shape[1] % BLOCK:
        raise PhiquantError(
            f"{name}: GGUF cannot hold {spec} for shape {list(shape)}: it stores matrices whose rows are made of "
            f"blocks of {BLOCK} values. Leave this tensor in float (gguf:BF16)"
        )
    kind = Q4_1 if spec.offset == "minimum" else Q4_0 if spec.element.bits <= 4 else Q8_0
    reason = _misfit(spec, kind)
    if reason:
        near = _nearest(spec)
        known = next((t.name for t in TARGETS.values() if t.spec == near and t.format == "gguf"), str(near))
        raise PhiquantError(
            f"{name}: GGUF cannot hold {spec} exactly: {reason}. Nearest that can: {known!r}, stored as "
            f"{type_for(name, near, shape).name}. Quantize with it; export never rounds again"
        )
    return kind


def _misfit(spec: QuantSpec, kind: GGMLType) -> str:
    """Why `kind` cannot hold `spec`, or ""."""
    if not isinstance(spec.element, Int):
        return f"its blocks hold integers, not {spec.element}"
    if spec.offset == "zero_point":
        return "it has no integer zero points, and s * z rounded to float16 would be another grid"
    if spec.offset == "minimum" and (spec.element.signed or spec.element.bits > 4):
        return f"its type with a minimum, Q4_1, has codes 0..15, not {spec.element.qmin}..{spec.element.qmax}"
    if spec.scale_dtype != "float16":
        return f"the scales are {spec.scale_dtype}, and {kind.name} stores float16"
    match spec.granularity:
        case PerTensor() | PerChannel(0):
            return ""
        case PerGroup(size) if size % BLOCK == 0:
            return ""
    return f"{kind.name} has one scale per {BLOCK} values of a row, which {spec.granularity} does not follow"


def _nearest(spec: QuantSpec) -> QuantSpec:
    """The spec closest to `spec` that GGUF holds: same bits and granularity where they can stay."""
    coarse = isinstance(spec.granularity, PerGroup) and spec.granularity.size % BLOCK == 0
    kept = coarse or spec.granularity in (PerTensor(), PerChannel(0))
    granularity = spec.granularity if kept else PerGroup(BLOCK)
    bits = spec.element.bits
    if not isinstance(spec.element, Int):
        return QuantSpec(Int(4 if bits <= 4 else 8), granularity, scale_dtype="float16")
    near = dataclasses.replace(spec, scale_dtype="float16", granularity=granularity)
    if spec.offset == "none":
        return near
    if bits <= 4:
        return dataclasses.replace(near, element=Int(bits, signed=False), offset="minimum")
    return dataclasses.replace(near, element=Int(bits), offset="none")


def pack(name: str, piece: QuantizedTensor, kind: GGMLType) -> np.ndarray:
    """The bytes of some rows [N, K] of tensor `name` in `kind`: uint8 [N * K/32 * kind.block_bytes]."""
    codes = piece.codes.contiguous().numpy().reshape(-1)
    assert piece.scales is not None  # type_for accepts integers only
    scales = _per_block(name, piece.scales, piece.shape)
    if kind is Q4_0:
        return _C.pack_q4_0(codes, scales)
    if kind is Q8_0:
        return _C.pack_q8_0(codes, scales)
    assert piece.minimums is not None  # QuantizedTensor checked it against the spec
    return _C.pack_q4_1(codes, scales, _per_block(name, piece.minimums, piece.shape))


def _per_block(name: str, values: torch.Tensor, shape: tuple[int, ...]) -> np.ndarray:
    """Float16 parameters [N or 1, groups] of `shape` [N, K] as bits, one per block: uint16 [N * K/32]."""
    if not bool(torch.isfinite(values.sum(dtype=torch.float32))):  # float16: the sum cannot overflow
        raise PhiquantError(f"{name}: a scale or minimum is not finite; quantize this tensor again")
    rows, columns = shape
    repeats = columns // BLOCK // values.shape[1]
    repeated = values if repeats == 1 else values.repeat_interleave(repeats, dim=1)
    repeated = repeated.expand(rows, -1)
    return repeated.contiguous().view(torch.int16).numpy().view(np.uint16).reshape(-1)


def pack_float(name: str, values: torch.Tensor, kind: GGMLType, first_row: int) -> tuple[np.ndarray, bool]:
    """The bytes of some rows of a float tensor in `kind`, uint8, and whether the cast was exact.

    PhiquantError for values that are not finite, or too large for float16; `first_row` is for its index.
    """
    dtype = next(getattr(torch, text) for text, known in FLOAT_TYPES.items() if known is kind)
    values = values.detach()
    stored = values.to(dtype).contiguous()
    # A sum is finite only if every value is: one read, and the search only when there is something to find.
    if not bool(torch.isfinite(stored.sum(dtype=torch.float32))):
        _refuse_not_finite(name, values, stored, kind, first_row)
    widened = torch.promote_types(values.dtype, dtype) == dtype
    exact = widened or torch.equal(stored.to(values.dtype), values)
    return stored.reshape(-1).view(torch.uint8).numpy(), exact


def _refuse_not_finite(name: str, values: torch.Tensor, stored: torch.Tensor, kind: GGMLType, first_row: int) -> None:
    for index in (~torch.isfinite(stored)).nonzero()[:1].tolist():
        value = values[tuple(index)].item()
        hint = f"too large for {kind.name}; export as gguf:BF16" if math.isfinite(value) else "repair the checkpoint"
        raise PhiquantError(f"{name}: the value at {[index[0] + first_row, *index[1:]]} is {value}: {hint}")
