"""What a grid is: element, granularity, and how scale and offset are stored.

A `QuantSpec` is a frozen value. It determines the grid completely: the same spec gives the same
codes in the solvers, in training and in every file. This module imports only its parts (elements,
granularities, storage of scales), and no torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from .elements import IQ4NL, Binary, Codebook, Element, FixedPoint, Int, Ternary
from .granularity import Granularity, PerChannel, PerGroup, PerRows, PerTensor, PerToken
from .storage import TwoLevel

Shape = tuple[int, ...]
FloatName = Literal["float32", "float16", "bfloat16"]
ScaleName = Literal[FloatName, "float8_e8m0fnu", "float8_e4m3fn"]
Offset = Literal["none", "zero_point", "minimum"]
Anchor = Literal["absmax", "signed_absmax", "absmean", "twn"]

FLOAT_BITS: dict[str, int] = {"float32": 32, "float16": 16, "bfloat16": 16}
SCALE_BITS: dict[str, int] = FLOAT_BITS | {"float8_e8m0fnu": 8, "float8_e4m3fn": 8}
SCALE_TEXT: dict[str, str] = {
    "float32": "f32", "float16": "f16", "bfloat16": "bf16", "float8_e8m0fnu": "e8m0", "float8_e4m3fn": "e4m3",
}  # fmt: skip


@dataclass(frozen=True)
class QuantSpec:
    """The grid of a tensor.

    offset: "none", r = s q; "zero_point", r = s (q - z) with integer z; "minimum", r = s q + m. Only
        integer elements have one.
    anchor: how the values of a block become a scale. "absmax": s = max|x| / the largest level.
        "signed_absmax" (integers, IQ4NL): s = x* / qmin, x* the value of largest magnitude with its sign; s
        may be negative and the extreme value is held exactly (the rule of llama.cpp's Q4_0).
        Binary always has "absmean": s = mean|x|. Ternary has "twn" unless told otherwise: the codes are
        not 0 where |x| > 0.7 mean|x|, s = the mean of those |x|; or "absmean" (BitNet b1.58):
        s = mean|x|, the nearest code.
    scale_dtype: how s (and m, and the levels of a codebook) are stored. The stored, rounded value is the grid.
        "float8_e4m3fn" and "float8_e8m0fnu" hold s alone; the latter is a power of two by the rule of the MX
        formats: s = 2^(floor(log2 max|x|) - e), 2^e the largest power of two in the element.
    two_level: s (and m) are codes of a few bits, scaled by a float of `scale_dtype` per super-block.

    FixedPoint and Codebook have no scale: their step is fixed, their levels are stored.
    """

    element: Element
    granularity: Granularity
    offset: Offset = "none"
    scale_dtype: ScaleName = "float32"
    anchor: Anchor = "absmax"
    two_level: TwoLevel | None = None

    def __post_init__(self) -> None:
        own: dict[type, Anchor] = {Binary: "absmean", Ternary: "twn"}
        if type(self.element) in own and self.anchor == "absmax":
            object.__setattr__(self, "anchor", own[type(self.element)])
        if problem := self._problem():
            raise ValueError(problem)

    def _problem(self) -> str:
        """Why these parts do not make a grid, or ""."""
        element = self.element
        if problem := self._storage_problem():
            return problem
        if not isinstance(element, Int) and self.offset != "none":
            return f"{element} has no offset; only integers take 'asym' or 'min'"
        if self.anchor == "absmean" and not isinstance(element, Binary | Ternary):
            return f"'absmean' is a rule of binary and ternary, not of {element}"
        if self.anchor == "twn" and not isinstance(element, Ternary):
            return f"'twn' is a rule of ternary, not of {element}"
        if isinstance(element, FixedPoint) and self.granularity != PerTensor():
            return f"the step of {element} is fixed, so its granularity is 'tensor', not '{self.granularity}'"
        if isinstance(element, Codebook) and not isinstance(self.granularity, PerTensor | PerRows | PerGroup):
            return f"a codebook is per tensor, row, rows<n> or group, not per {self.granularity}"
        if self.anchor == "signed_absmax" and (self.offset != "none" or not isinstance(element, Int | IQ4NL)):
            return f"signed_absmax anchors a signed grid of integers, or of {IQ4NL()}, without offset"
        if not isinstance(element, Int):
            return ""
        if self.anchor == "signed_absmax" and not element.signed:
            return "signed_absmax anchors a signed grid without offset"
        if self.offset == "minimum" and element.signed:
            return f"a minimum is the value of code 0, so codes are unsigned; use u{element}"
        if self.offset == "none" and not element.signed:
            return f"{element} without an offset holds no negative value; use 'asym', or a signed element"
        if self.offset == "none" and element.qmax == 0 and self.anchor == "absmax":
            return f"{element} has the codes -1 and 0, so 'sym' has no largest level; use 'binary', 'signmax' or 'asym'"
        return ""

    def _storage_problem(self) -> str:
        """Why scales cannot be stored like this, or ""."""
        if self.scale_dtype not in SCALE_BITS:
            return f"scale_dtype is one of {', '.join(SCALE_BITS)}, not {self.scale_dtype!r}"
        if self.scale_dtype not in FLOAT_BITS and (self.offset != "none" or not self.has_scale):
            return f"{self.scale_dtype} stores the scale of a grid without offset, nothing else"
        if self.scale_dtype == "float8_e8m0fnu" and self.anchor != "absmax":
            return f"a scale in float8_e8m0fnu is a power of two above 0, which {self.anchor!r} does not give"
        if self.two_level is None:
            return ""
        if self.scale_dtype not in FLOAT_BITS:
            return f"the upper of two levels is stored in {', '.join(FLOAT_BITS)}, not in {self.scale_dtype}"
        if self.offset == "zero_point" or not self.has_scale or not isinstance(self.granularity, PerGroup):
            return "two levels of scales are for groups, with a scale, and without an integer zero point"
        if self.anchor == "signed_absmax" and not self.two_level.signed:
            return f"'signmax' makes scales of both signs; {self.two_level.sub} holds none below 0, use int4..int8"
        block = self.two_level.super_block
        if isinstance(block, int) and block % self.granularity.size:
            return f"a super-block of {block} values is not a whole number of groups of {self.granularity.size}"
        return ""

    @property
    def has_scale(self) -> bool:
        """Whether scales are stored: not for fixed point, nor for codebooks."""
        return not isinstance(self.element, FixedPoint | Codebook)

    @property
    def symmetric(self) -> bool:
        return self.offset == "none"

    def scale_shape(self, shape: Shape) -> Shape:
        """Shape of `scales` for a tensor of `shape`. ValueError if the granularity does not fit."""
        shape = tuple(shape)
        match self.granularity:
            case PerTensor():
                return (1,) * max(1, len(shape))
            case PerChannel(axis):
                if not -len(shape) <= axis < len(shape):
                    raise ValueError(f"axis {axis} is out of range for shape {list(shape)}")
                axis %= len(shape)
                return tuple(n if i == axis else 1 for i, n in enumerate(shape))
            case PerToken():
                return (*shape[:-1], 1)
            case PerRows(rows):
                if not shape or shape[0] % rows:
                    raise ValueError(f"{rows} rows do not divide the first dimension of shape {list(shape)}")
                return (shape[0] // rows, *(1 for _ in shape[1:]))
            case PerGroup(size):
                if not shape or shape[-1] % size:
                    last = shape[-1] if shape else 0
                    fits = [g for g in (16, 32, 64, 128, 256) if last and last % g == 0]
                    raise ValueError(
                        f"group size {size} does not divide the last dimension {last} of shape "
                        f"{list(shape)}; these would: {', '.join(map(str, fits)) or 'none of 16..256'}"
                    )
                if self.two_level is not None:
                    self.super_shape(shape)
                return (*shape[:-1], shape[-1] // size)

    def super_shape(self, shape: Shape) -> Shape:
        """Shape of `super_scales` for a tensor of `shape`; [N, K] -> [N, K / super_block]. Of two-level specs alone."""
        if self.two_level is None:
            raise ValueError(f"the scales of {self} are stored in one level")
        shape = tuple(shape)
        match self.two_level.super_block:
            case "tensor":
                return (1,) * max(1, len(shape))
            case "channel":
                return (*shape[:-1], 1)
            case size:
                if not shape or shape[-1] % size:
                    last = shape[-1] if shape else 0
                    raise ValueError(
                        f"a super-block of {size} values does not divide the last dimension {last} of "
                        f"shape {list(shape)}; choose a spec with plain groups for this tensor"
                    )
                return (*shape[:-1], shape[-1] // size)

    def block_size(self, shape: Shape) -> int:
        """Number of values that share one scale (the channel axis counted as moved to the front)."""
        scales = math.prod(self.scale_shape(shape))
        return math.prod(shape) // scales if scales else 0

    def bits_per_weight(self, shape: Shape) -> float:
        """Stored bits per value: code, scale and offset, or the levels of its codebook."""
        per_block: float = SCALE_BITS[self.scale_dtype]
        if self.two_level is not None:
            blocks, supers = math.prod(self.scale_shape(shape)), math.prod(self.super_shape(shape))
            per_block = self.two_level.bits + per_block * supers / max(1, blocks)
        if isinstance(self.element, FixedPoint):
            per_block = 0
        elif isinstance(self.element, Codebook):
            per_block *= self.element.size
        elif self.offset == "zero_point":
            per_block += self.element.bits
        elif self.offset == "minimum":
            per_block *= 2
        return self.element.bits + per_block / self.block_size(shape)

    def __str__(self) -> str:
        kind = {"none": "-sym", "zero_point": "-asym", "minimum": "-min"}[self.offset]
        if self.anchor == "signed_absmax":
            kind = "-signmax"
        elif self.anchor == "absmean" and isinstance(self.element, Ternary):
            kind = "-absmean"
        elif not self.has_scale:
            kind = ""
        scale = "" if self.scale_dtype == "float32" else f"-{SCALE_TEXT[self.scale_dtype]}"
        levels = "" if self.two_level is None else f"-{self.two_level}"
        return f"{self.element}-{self.granularity}{kind}{scale}{levels}"
