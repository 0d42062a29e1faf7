"""How a weight stands in an OpenVINO IR: the constants that hold it, and which grids they hold.

A constant is row-major and dense; codes below a byte fill it from its lowest bit. N = rows, K = values of
a row, G = groups of a row. Constants of a weight [N, K]:

  <name>               codes [N, K], or [N, G, K / G] where there are groups; the values of a float weight
  <name>/zero_point    [N, G, 1] or [N, 1]; [1, 1, 1] or [1, 1] where codes are only shifted. Of the type of the codes,
                       but f8e4m3 beside u2: with u2 there, the CPU plugin's default setting finds no kernel
  <name>/scale         [N, G, 1], [N, 1] or [1, 1]; codes of scales in two levels: [N, S, G / S], S super-blocks
  <name>/super_scale   [N, S, 1], [N, 1, 1] or [1, 1, 1]
  <name>/codebook      [size], or [blocks, size] where codebooks are not shared by the whole tensor
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...spec import (
    IQ4NL,
    Binary,
    Codebook,
    FixedPoint,
    Float,
    Int,
    NormalFloat,
    PerChannel,
    PerGroup,
    PerRows,
    PerTensor,
    QuantSpec,
    Shape,
    Ternary,
)
from ..source import Entry

ALIGNMENT = 64  # of every constant in the .bin file: a cache line, so that mapped floats can be read in place

# Element types of OpenVINO: bits. There is no i2.
BITS = {
    "u2": 2, "u4": 4, "i4": 4, "nf4": 4, "f4e2m1": 4, "u8": 8, "i8": 8, "f8e4m3": 8, "f8e5m2": 8, "f8e8m0": 8,
    "f16": 16, "bf16": 16, "f32": 32,
}  # fmt: skip
TYPES = {
    "float32": "f32", "float16": "f16", "bfloat16": "bf16", "float8_e8m0fnu": "f8e8m0", "float8_e4m3fn": "f8e4m3",
    "int8": "i8", "uint8": "u8",
}  # fmt: skip
_MINIFLOATS = {"e2m1": "f4e2m1", "e4m3fn": "f8e4m3", "e5m2": "f8e5m2"}


@dataclass(frozen=True)
class Part:
    """One constant. type: an element type of OpenVINO."""

    name: str
    type: str
    shape: Shape

    @property
    def nbytes(self) -> int:
        return (math.prod(self.shape) * BITS[self.type] + 7) // 8


@dataclass(frozen=True)
class Container:
    """How codes become those of a constant: stored = step * code + shift.

    zero: the zero point that undoes the shift of a spec that has none. levels: the values of the stored codes if
    they are indices of a fixed table.
    """

    type: str
    shift: int = 0
    step: int = 1
    zero: int | None = None
    levels: tuple[float, ...] | None = None

    @property
    def zero_type(self) -> str:
        return "f8e4m3" if self.type == "u2" else self.type


def container(spec: QuantSpec) -> Container:
    """The smallest container that holds the codes of `spec`."""
    element = spec.element
    match element:
        case Int(bits, signed) if bits <= 2 and signed:
            return Container("u2", shift=2, zero=2 if spec.offset == "none" else None)
        case Int(bits, signed):
            return Container(("i" if signed else "u") + str(2 if bits <= 2 else 4 if bits <= 4 else 8))
        case FixedPoint():
            return Container("i4" if element.bits <= 4 else "i8")
        case Ternary():
            return Container("u2", shift=1, zero=1)
        case Binary():
            return Container("u2", step=2, zero=1)
        case NormalFloat():
            return Container("nf4")
        case Float(name) if name in _MINIFLOATS:
            return Container(_MINIFLOATS[name])
        case Float() | IQ4NL():
            return Container("u4", levels=element.levels)
        case Codebook():
            return Container("u4" if element.bits <= 4 else "u8")


def problem(spec: QuantSpec, shape: Shape) -> str:
    """Why no constants hold `spec` exactly for a weight of `shape`, or "". It ends with what would."""
    if len(shape) != 2:
        return f"OpenVINO holds codes of matrices; this has shape {list(shape)}"
    if spec.offset == "minimum":
        return "a minimum in float is no zero point of OpenVINO; choose asym, such as openvino:u4-g32"
    plain = isinstance(spec.granularity, PerGroup | PerTensor) or spec.granularity in (PerChannel(0), PerRows(1))
    if not plain and not isinstance(spec.element, Codebook):
        return f"OpenVINO has no scale per {spec.granularity}; choose groups or channel, such as openvino:i8-channel"
    kind = container(spec).type
    if shape[1] * BITS[kind] % 8:
        return (
            f"a row of {shape[1]} codes of {kind} does not end with a byte; choose 8 bits, such as openvino:i8-channel"
        )
    return ""


def parts(entry: Entry) -> list[Part]:
    """The constants of an entry, in the order of the file."""
    spec, shape, name = entry.spec, entry.shape, entry.name
    if spec is None:
        return [Part(name, TYPES["float32" if len(shape) == 1 else entry.dtype], shape)]
    held, blocks = container(spec), _block_shape(spec, shape)
    result = [Part(name, held.type, _code_shape(spec, shape))]
    if spec.offset == "zero_point" or held.zero is not None:
        zeros = blocks if held.zero is None else (1,) * len(blocks)
        result.append(Part(f"{name}/zero_point", held.zero_type, zeros))
    if isinstance(spec.element, Codebook):
        count = math.prod(spec.scale_shape(shape))
        size = (spec.element.size,) if count == 1 else (count, spec.element.size)
        return [*result, Part(f"{name}/codebook", TYPES[spec.scale_dtype], size)]
    if held.levels is not None:
        result.append(Part(f"{name}/codebook", "f32", (len(held.levels),)))
    if spec.two_level is None:
        return [*result, Part(f"{name}/scale", TYPES[spec.scale_dtype], blocks)]
    supers = spec.super_shape(shape)
    scales = (blocks[0], supers[1], blocks[1] // supers[1])
    result.append(Part(f"{name}/scale", TYPES[spec.two_level.dtype], scales))
    return [*result, Part(f"{name}/super_scale", TYPES[spec.scale_dtype], (*supers, 1))]


def nbytes(entry: Entry) -> int:
    """Bytes of an entry in the .bin file: its constants, all but the last padded."""
    *first, last = parts(entry)
    return sum(part.nbytes + -part.nbytes % ALIGNMENT for part in first) + last.nbytes


def _code_shape(spec: QuantSpec, shape: Shape) -> Shape:
    """Of codes: with an axis of groups, or a row for each block of a codebook that is not the tensor's."""
    if isinstance(spec.element, Codebook):
        blocks = math.prod(spec.scale_shape(shape))
        return shape if blocks == 1 else (blocks, math.prod(shape) // blocks)
    if isinstance(spec.granularity, PerGroup):
        return (shape[0], shape[1] // spec.granularity.size, spec.granularity.size)
    return shape


def _block_shape(spec: QuantSpec, shape: Shape) -> Shape:
    """Of scales and zero points: that of the codes, with 1 for the values of a block."""
    blocks = spec.scale_shape(shape)
    return (*blocks, 1) if isinstance(spec.granularity, PerGroup) else blocks
