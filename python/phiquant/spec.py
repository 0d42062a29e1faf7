"""What a grid is: element, granularity, and how scale and offset are stored.

A `QuantSpec` is a frozen value. It determines the grid completely: the same spec gives the same
codes in the solvers, in training and in every file. A `Target` is a named spec of a deployment
format. This module imports nothing of phiquant and no torch.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Literal

Shape = tuple[int, ...]
FloatName = Literal["float32", "float16", "bfloat16"]
Offset = Literal["none", "zero_point", "minimum"]
Anchor = Literal["absmax", "signed_absmax"]

FLOAT_BITS: dict[str, int] = {"float32": 32, "float16": 16, "bfloat16": 16}


@dataclass(frozen=True)
class Int:
    """An integer code of 2 to 8 bits, two's complement if signed."""

    bits: int
    signed: bool = True

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"an integer code has 2 to 8 bits, not {self.bits}")

    @property
    def qmin(self) -> int:
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def qmax(self) -> int:
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1

    def __str__(self) -> str:
        return f"{'int' if self.signed else 'uint'}{self.bits}"


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor. Shape [N, K] -> scales [1, 1]."""

    def __str__(self) -> str:
        return "tensor"


@dataclass(frozen=True)
class PerChannel:
    """One scale per index of `axis`. Shape [N, K], axis 0 -> scales [N, 1]."""

    axis: int = 0

    def __str__(self) -> str:
        return "channel" if self.axis == 0 else f"channel{self.axis}"


@dataclass(frozen=True)
class PerGroup:
    """One scale per `size` consecutive values of the last axis. Shape [N, K] -> scales [N, K / size]."""

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"a group has at least one value, not {self.size}")

    def __str__(self) -> str:
        return f"g{self.size}"


@dataclass(frozen=True)
class PerToken:
    """One scale per vector along the last axis (activations). Shape [B, T, K] -> scales [B, T, 1]."""

    def __str__(self) -> str:
        return "token"


Granularity = PerTensor | PerChannel | PerGroup | PerToken


@dataclass(frozen=True)
class QuantSpec:
    """The grid of a tensor.

    offset: "none", r = s q; "zero_point", r = s (q - z) with integer z; "minimum", r = s q + m.
    anchor: how a range without offset becomes a scale. "absmax": s = max|x| / qmax.
        "signed_absmax": s = x* / qmin, x* the value of largest magnitude with its sign; s may be
        negative and the extreme value is held exactly (the rule of llama.cpp's Q4_0).
    scale_dtype: how s (and m) are stored. The stored, rounded value is the grid.
    """

    element: Int
    granularity: Granularity
    offset: Offset = "none"
    scale_dtype: FloatName = "float32"
    anchor: Anchor = "absmax"

    def __post_init__(self) -> None:
        if self.anchor == "signed_absmax" and (self.offset != "none" or not self.element.signed):
            raise ValueError("signed_absmax anchors a signed grid without offset")
        if self.offset == "minimum" and self.element.signed:
            raise ValueError(f"a minimum is the value of code 0, so codes are unsigned; use u{self.element}")
        if self.offset == "none" and not self.element.signed:
            raise ValueError(
                f"{self.element} without an offset holds no negative value; use 'asym', or a signed element"
            )
        if self.scale_dtype not in FLOAT_BITS:
            raise ValueError(f"scale_dtype is one of {', '.join(FLOAT_BITS)}, not {self.scale_dtype!r}")

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
            case PerGroup(size):
                if not shape or shape[-1] % size:
                    last = shape[-1] if shape else 0
                    fits = [g for g in (16, 32, 64, 128, 256) if last and last % g == 0]
                    raise ValueError(
                        f"group size {size} does not divide the last dimension {last} of shape "
                        f"{list(shape)}; these would: {', '.join(map(str, fits)) or 'none of 16..256'}"
                    )
                return (*shape[:-1], shape[-1] // size)

    def block_size(self, shape: Shape) -> int:
        """Number of values that share one scale (the channel axis counted as moved to the front)."""
        scales = math.prod(self.scale_shape(shape))
        return math.prod(shape) // scales if scales else 0

    def bits_per_weight(self, shape: Shape) -> float:
        """Stored bits per value: code, scale and offset."""
        per_block: float = FLOAT_BITS[self.scale_dtype]
        if self.offset == "zero_point":
            per_block += self.element.bits
        elif self.offset == "minimum":
            per_block *= 2
        return self.element.bits + per_block / self.block_size(shape)

    def __str__(self) -> str:
        kind = {"none": "sym", "zero_point": "asym", "minimum": "min"}[self.offset]
        if self.anchor == "signed_absmax":
            kind = "signmax"
        scale = {"float32": "", "float16": "-f16", "bfloat16": "-bf16"}[self.scale_dtype]
        return f"{self.element}-{self.granularity}-{kind}{scale}"


@dataclass(frozen=True)
class Target:
    """A named grid of a deployment format. `spec` is None where weights stay float."""

    name: str
    spec: QuantSpec | None
    float_dtype: FloatName = "bfloat16"

    @property
    def format(self) -> str:
        return self.name.partition(":")[0]


def _targets(*targets: Target) -> dict[str, Target]:
    return {t.name: t for t in targets}


TARGETS = _targets(
    Target("gguf:F16", None, "float16"),
    Target("gguf:BF16", None, "bfloat16"),
    Target("gguf:F32", None, "float32"),
    Target("gguf:Q8_0", QuantSpec(Int(8), PerGroup(32), scale_dtype="float16")),
    Target("gguf:Q4_0", QuantSpec(Int(4), PerGroup(32), scale_dtype="float16", anchor="signed_absmax")),
    Target("gguf:Q4_1", QuantSpec(Int(4, signed=False), PerGroup(32), "minimum", "float16")),
    Target("safetensors:int4-g32", QuantSpec(Int(4), PerGroup(32), scale_dtype="float16", anchor="signed_absmax")),
    Target("safetensors:int4-g64", QuantSpec(Int(4), PerGroup(64), scale_dtype="float16", anchor="signed_absmax")),
    Target("safetensors:int4-g128", QuantSpec(Int(4), PerGroup(128), scale_dtype="float16", anchor="signed_absmax")),
    Target("safetensors:int8-channel", QuantSpec(Int(8), PerChannel(0))),
    Target("safetensors:BF16", None, "bfloat16"),
    Target("safetensors:F16", None, "float16"),
    Target("safetensors:F32", None, "float32"),
)  # fmt: skip

_SPEC_TEXT = re.compile(
    r"(?P<sign>u?)int(?P<bits>\d+)-(?P<grain>tensor|channel\d*|token|g(?P<group>\d+))"
    r"-(?P<kind>sym|signmax|asym|min)(?:-(?P<scale>f32|f16|bf16))?"
)
_SCALE_DTYPE: dict[str | None, FloatName] = {None: "float32", "f32": "float32", "f16": "float16", "bf16": "bfloat16"}


def target(name: str) -> Target:
    """The target of that name, such as "gguf:Q4_0". ValueError lists the names."""
    if name not in TARGETS:
        raise ValueError(f"unknown target {name!r}; known targets: {', '.join(TARGETS)}")
    return TARGETS[name]


def spec(text: str | QuantSpec | Target) -> QuantSpec:
    """Read a spec: a target's name, or `[u]int<bits>-<granularity>-<kind>[-<scale>]`.

    granularity: tensor, channel, channel1, token, g32 ...; kind: sym, signmax (symmetric, anchored
    on the signed extreme), asym (integer zero point), min (float minimum); scale: f32 (default),
    f16, bf16. Examples: "int4-g32-sym", "uint4-g64-asym", "int8-channel-sym", "gguf:Q4_0".
    """
    if isinstance(text, QuantSpec):
        return text
    if isinstance(text, Target) or text in TARGETS:
        named = text if isinstance(text, Target) else TARGETS[text]
        if named.spec is None:
            raise ValueError(f"target {named.name} stores floats; it has no quantization grid")
        return named.spec
    if ":" in text:
        return spec(target(text))
    found = _SPEC_TEXT.fullmatch(text)
    if found is None:
        raise ValueError(
            f"cannot read spec {text!r}; expected a target's name ({', '.join(TARGETS)}) or "
            "[u]int<bits>-<tensor|channel|token|g<size>>-<sym|signmax|asym|min>[-<f32|f16|bf16>], "
            "such as 'int4-g32-sym'"
        )
    grain = found["grain"]
    granularity: Granularity
    if found["group"]:
        granularity = PerGroup(int(found["group"]))
    elif grain == "tensor":
        granularity = PerTensor()
    elif grain == "token":
        granularity = PerToken()
    else:
        granularity = PerChannel(int(grain.removeprefix("channel") or 0))
    kind = found["kind"]
    offset: Offset = "zero_point" if kind == "asym" else "minimum" if kind == "min" else "none"
    return QuantSpec(
        element=Int(int(found["bits"]), signed=not found["sign"]),
        granularity=granularity,
        offset=offset,
        scale_dtype=_SCALE_DTYPE[found["scale"]],
        anchor="signed_absmax" if kind == "signmax" else "absmax",
    )


def with_bits(base: QuantSpec, bits: int) -> QuantSpec:
    """The same grid rule with codes of another width: 3 bits inside Q4_0's container, for instance."""
    return dataclasses.replace(base, element=dataclasses.replace(base.element, bits=bits))
