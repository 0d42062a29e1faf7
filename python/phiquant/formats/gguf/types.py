"""The storage types of GGUF, and which grids each of them holds exactly. Data, and one comparison.

A type holds a grid if its codes are among the type's, its parameters are stored as the type stores them, and
its blocks are whole blocks of the type, in which equal parameters repeat.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ...errors import PhiquantError
from ...spec import IQ4NL, NAMED, TARGETS, Float, Int, PerChannel, PerGroup, PerTensor, QuantSpec, Ternary
from ...spec import spec as read_spec


@dataclass(frozen=True)
class GGMLType:
    """A storage type: `block` consecutive values of a row are `block_bytes` bytes.

    file_type: general.file_type of a file that is mostly of this type. grid: what a block is, None for floats.
    """

    name: str
    id: int
    block: int
    block_bytes: int
    file_type: int
    grid: QuantSpec | None = None


F32 = GGMLType("F32", 0, 1, 4, 0)
F16 = GGMLType("F16", 1, 1, 2, 1)
BF16 = GGMLType("BF16", 30, 1, 2, 32)
FLOAT_TYPES: dict[str, GGMLType] = {"float32": F32, "float16": F16, "bfloat16": BF16}

# In the order in which a grid looks for its type. K-quants have the file types of their pure ("S") mixtures.
QUANTIZED = tuple(
    GGMLType(name, number, block, size, file_type, read_spec(grid))
    for name, number, block, size, file_type, grid in (
        ("TQ2_0", 35, 256, 66, 37, "ternary-g256-absmean-f16"),
        ("TQ1_0", 34, 256, 54, 36, "ternary-g256-absmean-f16"),
        ("Q4_0", 2, 32, 18, 2, "int4-g32-signmax-f16"),
        ("Q4_1", 3, 32, 20, 3, "uint4-g32-min-f16"),
        ("Q5_0", 6, 32, 22, 8, "int5-g32-signmax-f16"),
        ("Q5_1", 7, 32, 24, 9, "uint5-g32-min-f16"),
        ("Q8_0", 8, 32, 34, 7, "int8-g32-sym-f16"),
        ("Q2_K", 10, 256, 84, 10, "q2_k"),
        ("Q3_K", 11, 256, 110, 11, "q3_k"),
        ("Q4_K", 12, 256, 144, 14, "q4_k"),
        ("Q5_K", 13, 256, 176, 16, "q5_k"),
        ("Q6_K", 14, 256, 210, 18, "q6_k"),
        ("IQ4_NL", 20, 32, 18, 25, "iq4_nl"),
        ("IQ4_XS", 23, 256, 136, 30, "iq4_xs"),
        ("MXFP4", 39, 32, 17, 38, "mxfp4"),
        ("NVFP4", 40, 64, 36, 39, "fp4_e2m1-g16-sym-e4m3"),
    )
)
TYPES = {kind.name: kind for kind in (*FLOAT_TYPES.values(), *QUANTIZED)}


def type_for(name: str, spec: QuantSpec, shape: tuple[int, ...], ternary: str = "TQ2_0") -> GGMLType:
    """The first type that holds `spec` exactly for a weight of `shape`; of ternary types the one named.

    PhiquantError names the tensor, the spec, what does not fit, and the nearest spec that does.
    """
    if len(shape) != 2 or shape[1] % 32:
        raise PhiquantError(
            f"{name}: GGUF cannot hold {spec} for shape {list(shape)}: it stores matrices whose rows are made of "
            "blocks of 32 values. Leave this tensor in float (gguf:BF16)"
        )
    kinds = [kind for kind in QUANTIZED if kind.name == ternary or not isinstance(_grid(kind).element, Ternary)]
    for kind in kinds:
        if not misfit(spec, kind, shape):
            return kind
    near = _nearest(spec, shape)
    closest = type_for(name, near, shape)
    known = next((t.name for t in TARGETS.values() if t.spec == near and t.format == "gguf"), str(near))
    raise PhiquantError(
        f"{name}: GGUF cannot hold {spec} exactly: {_reason(spec, closest, shape)}. Nearest that can: {known!r}, "
        f"stored as {closest.name}. Quantize with it; export never rounds again"
    )


def _grid(kind: GGMLType) -> QuantSpec:
    assert kind.grid is not None  # of QUANTIZED
    return kind.grid


def misfit(spec: QuantSpec, kind: GGMLType, shape: tuple[int, ...]) -> str:
    """Why `kind` cannot hold `spec` for a weight of `shape`, or ""."""
    grid = _grid(kind)
    if not _among(spec, grid):
        return f"{kind.name} has codes of {grid.element}, not of {spec.element}"
    if spec.offset != grid.offset:
        return f"{kind.name} has {_OFFSETS[grid.offset]}, not {_OFFSETS[spec.offset]}"
    levels, own = spec.two_level, grid.two_level
    if has_tensor_scale(spec) and kind.name == "NVFP4":
        pass  # a tensor of its own holds the upper scale
    elif spec.scale_dtype != grid.scale_dtype:
        return f"the scales are {spec.scale_dtype}, and {kind.name} stores {grid.scale_dtype}"
    elif levels is None or own is None:
        if levels is not own:
            return f"{kind.name} stores {'two levels' if own else 'one level'} of scales"
    elif levels.is_float or levels.signed != own.signed or levels.bits > own.bits:
        return f"{kind.name} stores its inner scales as {own.sub}, not as {levels.sub}"
    elif isinstance(levels.super_block, int) and levels.super_block % kind.block:
        return f"{kind.name} has super-blocks of {kind.block} values, not of {levels.super_block}"
    if shape[1] % kind.block:
        return f"{kind.name} stores rows in blocks of {kind.block} values, which do not divide {shape[1]}"
    size = grid.block_size((1, kind.block))
    match spec.granularity:
        case PerTensor() | PerChannel(0):
            return ""
        case PerGroup(group) if group % size == 0:
            return ""
    return f"{kind.name} has one scale per {size} values of a row, which {spec.granularity} does not follow"


def has_tensor_scale(spec: QuantSpec) -> bool:
    """Whether scales in e4m3 have one of the whole tensor, float32, above them: NVFP4's second level."""
    levels = spec.two_level
    return levels is not None and levels.is_float and levels.super_block == "tensor" and spec.scale_dtype == "float32"


_OFFSETS = {"none": "no offset", "zero_point": "an integer zero point", "minimum": "a minimum"}


def _among(spec: QuantSpec, grid: QuantSpec) -> bool:
    """Whether every code of `spec` is one of `grid` and stands for the same."""
    if isinstance(grid.element, Int):
        same = isinstance(spec.element, Int | Ternary) and spec.element.signed == grid.element.signed
        return same and grid.element.qmin <= spec.element.qmin and spec.element.qmax <= grid.element.qmax
    return spec.element == grid.element


def _reason(spec: QuantSpec, closest: GGMLType, shape: tuple[int, ...]) -> str:
    if spec.offset == "zero_point":
        return "it has no integer zero points, and s * z rounded to float16 would be another grid"
    return misfit(spec, closest, shape)


def _nearest(spec: QuantSpec, shape: tuple[int, ...]) -> QuantSpec:
    """The spec closest to `spec` that GGUF holds: same bits and granularity where they can stay."""
    bits, element = spec.element.bits, spec.element
    if spec.two_level is not None and shape[1] % 256 == 0 and spec.scale_dtype == "float16":
        if element == IQ4NL():
            return read_spec("iq4_xs")
        with_minimum = {2: "q2_k", 5: "q5_k"}.get(bits, "q4_k" if bits < 5 else "q6_k")
        return read_spec(with_minimum if spec.offset == "minimum" else "q3_k" if bits <= 3 else "q6_k")
    if isinstance(element, Float) and bits == 4:
        return read_spec(NAMED["mxfp4"])
    coarse = isinstance(spec.granularity, PerGroup) and spec.granularity.size % 32 == 0
    kept = coarse or spec.granularity in (PerTensor(), PerChannel(0))
    near = QuantSpec(Int(8), spec.granularity if kept else PerGroup(32), scale_dtype="float16")
    if isinstance(element, Int | Ternary | IQ4NL) and spec.offset == "none":
        return dataclasses.replace(near, element=element, anchor=spec.anchor)
    if isinstance(element, Int) and bits <= 5:
        return dataclasses.replace(near, element=Int(bits, signed=False), offset="minimum")
    return near if bits > 4 else dataclasses.replace(near, element=Int(4))
