"""Elements: what one code of a quantized tensor stands for.

Every element says how many bits its code has (`bits`), whether codes are kept as int8 or uint8
(`signed`), the smallest and largest code (`qmin`, `qmax`), and `levels`: the value of each code at
scale 1, from qmin to qmax (None where a codebook holds them). docs/elements.md shows them all. This
module imports nothing of phiquant and no torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

FloatFormat = Literal["e4m3fn", "e5m2", "e2m1", "e1m2", "e3m0"]


@dataclass(frozen=True)
class Int:
    """An integer code of 1 to 8 bits, two's complement if signed: -2^(b-1) .. 2^(b-1) - 1, or 0 .. 2^b - 1.

    16 bits are for the activations of a runtime; tensors of codes have up to 8.
    """

    bits: int
    signed: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8 and self.bits != 16:
            raise ValueError(f"an integer code has 1 to 8 bits, not {self.bits}; activations may have 16")

    @property
    def qmin(self) -> int:
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def qmax(self) -> int:
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1

    @property
    def levels(self) -> tuple[float, ...]:
        return tuple(float(q) for q in range(self.qmin, self.qmax + 1))

    def __str__(self) -> str:
        return f"{'int' if self.signed else 'uint'}{self.bits}"


@dataclass(frozen=True)
class FixedPoint:
    """Qm.n: a sign, m integer bits and n fraction bits; value = code / 2^n, from -2^m to 2^m - 2^-n.

    The step is fixed, so nothing is found in a tensor and no scale is stored. At most 8 bits in all.
    """

    int_bits: int
    frac_bits: int

    def __post_init__(self) -> None:
        if min(self.int_bits, self.frac_bits) < 0 or not 2 <= self.bits <= 8:
            raise ValueError(
                f"fixed point Q{self.int_bits}.{self.frac_bits} has {self.bits} bits with its sign; 2 to 8 are possible"
            )

    signed = True

    @property
    def bits(self) -> int:
        return 1 + self.int_bits + self.frac_bits

    @property
    def qmin(self) -> int:
        return -(1 << (self.bits - 1))

    @property
    def qmax(self) -> int:
        return (1 << (self.bits - 1)) - 1

    @property
    def step(self) -> float:
        """The value of code 1: 2^-n."""
        return 2.0**-self.frac_bits

    @property
    def levels(self) -> tuple[float, ...]:
        return tuple(q * self.step for q in range(self.qmin, self.qmax + 1))

    def __str__(self) -> str:
        return f"q{self.int_bits}.{self.frac_bits}"


# exponent bits, fraction bits, exponent bias, largest finite value. The bias is 2^(e-1) - 1.
_FORMATS: dict[str, tuple[int, int, int, float]] = {
    "e4m3fn": (4, 3, 7, 448.0),
    "e5m2": (5, 2, 15, 57344.0),
    "e2m1": (2, 1, 1, 6.0),
    "e1m2": (1, 2, 0, 3.5),
    "e3m0": (3, 0, 3, 16.0),
}


@dataclass(frozen=True)
class Float:
    """A float of 8 or 4 bits: sign, exponent, fraction; the code is its bit pattern, as uint8.

    "e4m3fn" (OCP: no infinity, NaN is s1111111), "e5m2" (IEEE: infinity and NaN), and the four-bit
    "e2m1", "e1m2", "e3m0", which have neither. Encoding saturates: what lies beyond the largest
    finite value, an infinity too, gets that value, and a NaN gets the lowest finite value, as for
    every element; codes of infinities and NaN are never chosen, but they are decoded.
    """

    format: FloatFormat

    def __post_init__(self) -> None:
        if self.format not in _FORMATS:
            raise ValueError(f"a float element is one of {', '.join(_FORMATS)}, not {self.format!r}")

    signed = False  # of the stored integer: bit patterns are uint8
    qmin = 0

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.fraction_bits

    @property
    def exponent_bits(self) -> int:
        return _FORMATS[self.format][0]

    @property
    def fraction_bits(self) -> int:
        return _FORMATS[self.format][1]

    @property
    def bias(self) -> int:
        return _FORMATS[self.format][2]

    @property
    def largest(self) -> float:
        """The largest finite value; the lowest is its negative."""
        return _FORMATS[self.format][3]

    @property
    def qmax(self) -> int:
        return (1 << self.bits) - 1

    @property
    def levels(self) -> tuple[float, ...]:
        return tuple(self.value(code) for code in range(1 << self.bits))

    def value(self, code: int) -> float:
        """The value of a bit pattern."""
        sign = -1.0 if code >> (self.bits - 1) else 1.0
        exponent = code >> self.fraction_bits & (1 << self.exponent_bits) - 1
        fraction = (code & (1 << self.fraction_bits) - 1) / (1 << self.fraction_bits)
        normal = exponent > 0
        magnitude = (normal + fraction) * 2.0 ** (max(exponent, 1) - self.bias)
        if magnitude > self.largest:
            return sign * math.inf if self.format == "e5m2" and fraction == 0 else math.nan
        return sign * magnitude

    def __str__(self) -> str:
        return f"fp{self.bits}_{self.format.removesuffix('fn')}"


# The 16 levels of QLoRA (Dettmers et al. 2023) as published in float32: quantiles of the normal
# distribution, scaled to [-1, 1], with an exact zero; seven below it and eight above.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True)
class NormalFloat:
    """NF4: 16 quantiles of the normal distribution between -1 and 1, zero among them; code = index, ascending."""

    bits: int = 4

    def __post_init__(self) -> None:
        if self.bits != 4:
            raise ValueError(f"a normal float has 4 bits, not {self.bits}")

    signed = False
    qmin = 0
    qmax = 15
    levels = _NF4

    def __str__(self) -> str:
        return f"nf{self.bits}"


# The 16 levels of GGUF's IQ4_NL and IQ4_XS (ggml): a cubic through the integers, steeper at the ends. None is 0.
_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True)
class IQ4NL:
    """The fixed, uneven 16 levels of llama.cpp's IQ4 types, -127 to 113; code = index, ascending.

    As the lowest level is the largest in magnitude, the rule "signed_absmax" holds the extreme value best.
    """

    bits = 4
    signed = False
    qmin = 0
    qmax = 15
    levels = tuple(map(float, _IQ4))

    def __str__(self) -> str:
        return "iq4nl"


@dataclass(frozen=True)
class Binary:
    """One bit (BWN): code 0 is -s, code 1 is +s, s = mean|w| of the block; zero counts as positive."""

    bits = 1
    signed = False
    qmin = 0
    qmax = 1
    levels = (-1.0, 1.0)

    def __str__(self) -> str:
        return "binary"


@dataclass(frozen=True)
class Ternary:
    """Codes -1, 0, 1 in two bits. Scale and threshold are the rule's: QuantSpec.anchor "twn" or "absmean"."""

    bits = 2
    signed = True
    qmin = -1
    qmax = 1
    levels = (-1.0, 0.0, 1.0)

    def __str__(self) -> str:
        return "ternary"


@dataclass(frozen=True)
class Codebook:
    """An index into `size` (2 to 256) levels that are stored with the tensor, ascending: QuantizedTensor.codebook."""

    size: int

    def __post_init__(self) -> None:
        if not 2 <= self.size <= 256:
            raise ValueError(f"a codebook has 2 to 256 levels, not {self.size}")

    signed = False
    qmin = 0
    levels = None

    @property
    def bits(self) -> int:
        return (self.size - 1).bit_length()

    @property
    def qmax(self) -> int:
        return self.size - 1

    def __str__(self) -> str:
        return f"codebook{self.size}"


Element = Int | FixedPoint | Float | NormalFloat | IQ4NL | Binary | Ternary | Codebook


def read_element(text: str) -> Element:
    """The element of that text form, such as "int4", "q3.4", "fp8_e4m3", "nf4", "codebook16".

    ValueError if there is none.
    """
    word = text.rstrip("0123456789.")
    number = text[len(word) :]
    if word in ("int", "uint") and number.isdigit():
        return Int(int(number), signed=word == "int")
    if word == "codebook" and number.isdigit():
        return Codebook(int(number))
    if word == "q" and number.count(".") == 1 and number.replace(".", "").isdigit():
        whole, _, fraction = number.partition(".")
        return FixedPoint(int(whole or 0), int(fraction or 0))
    others: tuple[Element, ...] = (*(Float(name) for name in _FORMATS), NormalFloat(), IQ4NL(), Binary(), Ternary())  # type: ignore[arg-type]
    for element in others:
        if text in (str(element), getattr(element, "format", "")):
            return element
    raise ValueError(
        f"unknown element {text!r}; elements are int1..int8, uint1..uint8, q<m>.<n>, "
        f"{', '.join(map(str, others))}, codebook2..codebook256"
    )
