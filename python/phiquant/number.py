"""How numbers are stored: floats, integers and fixed point, bit by bit and exact.

`number("e4m3fn")` gives a description that turns a value into its code, the code into its value, and
names the bit fields. Everything is computed in Python's own integers and float64, which hold every
value of these formats exactly. This module imports nothing of phiquant and no torch.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

Specials = Literal["ieee", "nan", "none"]


@dataclass(frozen=True)
class FloatNumber:
    """Sign, exponent, fraction. A normal value is (1 + fraction) * 2^(exponent - bias); exponent 0 holds the
    subnormals fraction * 2^(1 - bias), zero among them.

    specials: "ieee", the largest exponent holds infinity and NaN; "nan", only the code of all ones is NaN
        (the OCP's "fn": finite, NaN); "none", every code is a value.
    saturates: what is too large gets the largest finite value, else infinity.
    """

    name: str
    exponent_bits: int
    fraction_bits: int
    bias: int
    specials: Specials
    saturates: bool = True
    signed = True

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.fraction_bits

    @property
    def largest_code(self) -> int:
        """The code of the largest finite value."""
        ones = (1 << (self.bits - 1)) - 1
        return {"ieee": ones - (1 << self.fraction_bits), "nan": ones - 1, "none": ones}[self.specials]

    @property
    def largest(self) -> float:
        return self.value(self.largest_code)

    @property
    def lowest(self) -> float:
        return -self.largest

    @property
    def smallest_normal(self) -> float:
        return 2.0 ** (1 - self.bias)

    @property
    def smallest_subnormal(self) -> float | None:
        """None where there is no fraction, so no subnormal but zero."""
        return self.smallest_normal * self.epsilon if self.fraction_bits else None

    @property
    def largest_subnormal(self) -> float | None:
        return self.smallest_normal * (1 - self.epsilon) if self.fraction_bits else None

    @property
    def epsilon(self) -> float:
        """Step between the values from 1 to 2; at 2^k it is epsilon * 2^k."""
        return 2.0**-self.fraction_bits

    @property
    def values(self) -> int:
        """How many different finite values there are; +0 and -0 count once."""
        return 2 * self.largest_code + 1

    @property
    def layout(self) -> tuple[tuple[str, int], ...]:
        """Names and widths of the bit fields, from the highest bit."""
        return ("sign", 1), ("exponent", self.exponent_bits), ("fraction", self.fraction_bits)

    def value(self, code: int) -> float:
        """The value of a bit pattern."""
        magnitude = code & (1 << (self.bits - 1)) - 1
        sign = -1.0 if code >> (self.bits - 1) else 1.0
        if magnitude > self.largest_code:
            return sign * math.inf if magnitude == self.largest_code + 1 and self.specials == "ieee" else math.nan
        exponent, fraction = magnitude >> self.fraction_bits, magnitude & (1 << self.fraction_bits) - 1
        return sign * math.ldexp((exponent > 0) + fraction * self.epsilon, max(exponent, 1) - self.bias)

    def encode(self, x: float) -> int:
        """The code of the value nearest to x, ties to the even code. NaN gets a NaN; where there is none, -largest."""
        sign = (math.copysign(1.0, x) < 0) << (self.bits - 1)
        if math.isnan(x):
            ones = (1 << (self.bits - 1)) - 1
            return sign | ones if self.specials != "none" else self.largest_code | 1 << (self.bits - 1)
        past = self.largest_code if self.saturates else self.largest_code + 1
        if math.isinf(x):
            return sign | past
        exponent = max(math.frexp(x)[1] - 1, 1 - self.bias) if x else 1 - self.bias
        steps = round(Fraction(abs(x)) / Fraction(2) ** (exponent - self.fraction_bits))  # to even
        return sign | min(steps + (exponent + self.bias - 1 << self.fraction_bits), past)


@dataclass(frozen=True)
class ScaleNumber:
    """e8m0: a power of two 2^(code - 127), code 255 is NaN. No sign, no zero: it stores the scales of MX formats.

    A value gets the largest power of two that is not above it, the rule of the MX specification for scales.
    """

    name = "e8m0"
    bits = 8
    bias = 127
    signed = False
    largest, lowest = 2.0**127, 2.0**-127
    smallest_normal = 2.0**-127
    smallest_subnormal = largest_subnormal = None
    epsilon = None
    values = 255
    layout = (("exponent", 8),)

    def value(self, code: int) -> float:
        return math.nan if code == 255 else 2.0 ** (code - 127)

    def encode(self, x: float) -> int:
        if math.isnan(x):
            return 255
        return 0 if x < self.lowest else 254 if x > self.largest else math.frexp(x)[1] - 1 + 127


@dataclass(frozen=True)
class IntNumber:
    """Integers of `bits` bits with a point before the last `fraction_bits` (0: plain integers), two's complement
    if signed. Value = code * 2^-fraction_bits; what does not fit gets the nearest end."""

    bits: int
    signed: bool = True
    fraction_bits: int = 0

    @property
    def name(self) -> str:
        if self.fraction_bits:
            return f"q{self.bits - 1 - self.fraction_bits}.{self.fraction_bits}"
        return f"{'int' if self.signed else 'uint'}{self.bits}"

    @property
    def step(self) -> float:
        return 2.0**-self.fraction_bits

    @property
    def lowest(self) -> float:
        return -(1 << (self.bits - 1)) * self.step if self.signed else 0

    @property
    def largest(self) -> float:
        return ((1 << (self.bits - self.signed)) - 1) * self.step

    @property
    def values(self) -> int:
        return 1 << self.bits

    @property
    def layout(self) -> tuple[tuple[str, int], ...]:
        fields = (("sign", int(self.signed)), ("integer", self.bits - self.signed - self.fraction_bits))
        return tuple((name, width) for name, width in (*fields, ("fraction", self.fraction_bits)) if width)

    def value(self, code: int) -> float:
        negative = self.signed and code >> (self.bits - 1)
        return (code - (1 << self.bits if negative else 0)) * self.step

    def encode(self, x: float) -> int:
        if math.isnan(x):
            x = self.lowest
        clamped = min(max(x, self.lowest), self.largest)
        return round(Fraction(clamped) * (1 << self.fraction_bits)) & (1 << self.bits) - 1

    def views(self, code: int) -> dict[str, str]:
        """The bits by which other conventions write this value; "" where they have no code for it.

        two's complement: -2^(n-1) .. 2^(n-1) - 1. sign-magnitude and ones' complement: -(2^(n-1) - 1) ..
        2^(n-1) - 1, with two zeros. offset binary: value + 2^(n-1). unsigned: 0 .. 2^n - 1.
        """
        whole = round(self.value(code) / self.step)
        half = 1 << (self.bits - 1)
        mask = 2 * half - 1
        fits = -half < whole < half
        views = {
            "two's complement": whole & mask if -half <= whole < half else None,
            "sign-magnitude": (whole < 0) * half | abs(whole) if fits else None,
            "ones' complement": (whole if whole >= 0 else mask + whole) if fits else None,
            "offset binary": whole + half if -half <= whole < half else None,
            "unsigned": whole if whole >= 0 else None,
        }
        return {name: "" if bits is None else f"{bits:0{self.bits}b}" for name, bits in views.items()}


Number = FloatNumber | ScaleNumber | IntNumber

_FLOATS = {
    n.name: n
    for n in (
        FloatNumber("float32", 8, 23, 127, "ieee", saturates=False),
        FloatNumber("float16", 5, 10, 15, "ieee", saturates=False),
        FloatNumber("bfloat16", 8, 7, 127, "ieee", saturates=False),
        FloatNumber("e4m3fn", 4, 3, 7, "nan"),
        FloatNumber("e5m2", 5, 2, 15, "ieee"),
        FloatNumber("e2m1", 2, 1, 1, "none"),
        FloatNumber("e1m2", 1, 2, 0, "none"),
        FloatNumber("e3m0", 3, 0, 3, "none"),
    )
}
_OTHER_NAMES = {
    "fp32": "float32", "f32": "float32", "fp16": "float16", "f16": "float16", "half": "float16", "bf16": "bfloat16",
    "fp8_e4m3": "e4m3fn", "e4m3": "e4m3fn", "float8_e4m3fn": "e4m3fn", "fp8_e5m2": "e5m2", "float8_e5m2": "e5m2",
    "fp4_e2m1": "e2m1", "fp4_e1m2": "e1m2", "fp4_e3m0": "e3m0", "float8_e8m0fnu": "e8m0",
}  # fmt: skip


def number(name: str) -> Number:
    """The format of that name: float32, float16, bfloat16, e4m3fn, e5m2, e2m1, e1m2, e3m0, e8m0, int4, uint8,
    int16 ... (1 to 32 bits), q3.4 (a sign, 3 integer bits, 4 fraction bits). ValueError if there is none."""
    name = _OTHER_NAMES.get(name, name)
    if name == "e8m0":
        return ScaleNumber()
    if name in _FLOATS:
        return _FLOATS[name]
    integer = re.fullmatch(r"(u?)int(\d{1,2})", name)
    if integer and 1 <= int(integer[2]) <= 32:
        return IntNumber(int(integer[2]), signed=not integer[1])
    fixed = re.fullmatch(r"q(\d{1,2})\.(\d{1,2})", name)
    if fixed and 2 <= 1 + int(fixed[1]) + int(fixed[2]) <= 32:
        return IntNumber(1 + int(fixed[1]) + int(fixed[2]), fraction_bits=int(fixed[2]))
    raise ValueError(
        f"unknown number format {name!r}; known: {', '.join(_FLOATS)}, e8m0, int1..int32, uint1..uint32, "
        "q<m>.<n> of at most 32 bits"
    )
