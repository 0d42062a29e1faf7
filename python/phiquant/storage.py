"""Scales that are themselves quantized: a small code per block, and a float per super-block.

The scale of block b is s_b = D * c_b, where c_b is the code of its block and D the scale of its
super-block. This module imports nothing of phiquant and no torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

SuperBlock = int | Literal["tensor", "channel"]


@dataclass(frozen=True)
class TwoLevel:
    """How the scales (and minimums) of a spec are stored in two levels; the upper one in `QuantSpec.scale_dtype`.

    sub: the code of a block's scale. "uint2".."uint8": 0 .. 2^n - 1, D = the largest scale / (2^n - 1).
        "int2".."int8": -2^(n-1) .. 2^(n-1) - 1, D = the scale of largest magnitude, with its sign, /
        -2^(n-1). "e4m3fn": a float8, D = the largest scale / 448.
    super_block: the values that share D: a multiple of the group size (256 in K-quants), "channel" (a
        row: the last axis), or "tensor". With a minimum m_b <= 0 there is a second pair, m_b = -(D_m * c_b).
    """

    sub: str
    super_block: SuperBlock

    def __post_init__(self) -> None:
        if self.sub != "e4m3fn" and not re.fullmatch(r"u?int[2-8]", self.sub):
            raise ValueError(f"a block's scale is stored as uint2..uint8, int2..int8 or e4m3fn, not {self.sub!r}")
        whole = isinstance(self.super_block, int) and self.super_block >= 1
        if not whole and self.super_block not in ("tensor", "channel"):
            raise ValueError(f"a super-block is a number of values, 'tensor' or 'channel', not {self.super_block!r}")

    @property
    def is_float(self) -> bool:
        return self.sub == "e4m3fn"

    @property
    def signed(self) -> bool:
        """Whether the codes are signed integers."""
        return self.sub.startswith("int")

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return 8 if self.is_float else int(self.sub.lstrip("uint"))

    @property
    def dtype(self) -> str:
        """The torch dtype in which a tensor holds the codes."""
        return "float8_e4m3fn" if self.is_float else "int8" if self.signed else "uint8"

    @property
    def qmin(self) -> int:
        """The smallest code; of floats 0, their bit patterns are unsigned."""
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def qmax(self) -> int:
        return (1 << (self.bits - self.signed)) - 1

    def __str__(self) -> str:
        return f"{self.sub.removesuffix('fn')}/{self.super_block}"


def read_two_level(text: str) -> TwoLevel:
    """The storage of that text form: "uint6/256", "e4m3/tensor", "uint4/channel". ValueError if there is none."""
    sub, _, block = text.partition("/")
    return TwoLevel("e4m3fn" if sub == "e4m3" else sub, int(block) if block.isdigit() else block)  # type: ignore[arg-type]
