"""What a number format or a spec can hold, and the bits of one value, in words and figures.

print(pq.describe("e4m3fn"))          # range, smallest normal and subnormal, step, bits per weight
print(pq.describe("int4-g32-sym"))    # the grid of a spec
print(pq.bits(0.3, "e4m3fn"))         # sign | exponent | fraction, what each is worth, the rounding error
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from .number import FloatNumber, IntNumber, Number, ScaleNumber, number
from .spec import QuantSpec, Target
from .spec import spec as read_spec

_EXAMPLE = (4096, 4096)  # the weight for which a spec's bits are counted


@dataclass(frozen=True)
class Description:
    """What `describe` found: `facts`, in the order in which str() prints them. Figures are plain numbers."""

    name: str
    facts: dict[str, Any]

    def __getitem__(self, fact: str) -> Any:
        return self.facts[fact]

    def as_dict(self) -> dict[str, Any]:
        """The name and the facts, fit for JSON."""
        return {"name": self.name} | self.facts

    def __str__(self) -> str:
        width = max(map(len, self.facts))
        return "\n".join([self.name, *(f"  {fact:{width}}  {_text(value)}" for fact, value in self.facts.items())])


@dataclass(frozen=True)
class Bits:
    """What `bits` found. code: the stored bits as an integer; value: what they stand for; error: value - given.

    fields: name, bits and meaning of each bit field, from the highest bit. views: the bits by which
    other conventions write the same integer, "" where they cannot (integers and fixed point alone).
    """

    format: str
    given: float
    code: int
    width: int
    value: float
    fields: tuple[tuple[str, str, str], ...]
    views: dict[str, str]

    @property
    def error(self) -> float:
        return self.value - self.given

    def as_dict(self) -> dict[str, Any]:
        """All of it, fit for JSON: a value that is not finite is its name."""
        fields = [dict(zip(("name", "bits", "meaning"), field, strict=True)) for field in self.fields]
        figures = {name: _plain(getattr(self, name)) for name in ("given", "value", "error")}
        return {"format": self.format, "code": self.code, "fields": fields, "views": self.views} | figures

    def __str__(self) -> str:
        code = f"{self.code:0{self.width}b} = 0x{self.code:0{(self.width + 3) // 4}x}"
        lines = [f"{self.given!r} in {self.format}: {code}"]
        lines += [f"  {name:16} {bits:{self.width}}  {meaning}" for name, bits, meaning in self.fields]
        relative = f" ({100 * self.error / self.given:+.2g} %)" if self.error and math.isfinite(self.error) else ""
        lines.append(f"  {'value':16} {self.value!r}, error {self.error:g}{relative}")
        lines += [f"  {name:16} {bits or 'has no code for it'}" for name, bits in self.views.items()]
        return "\n".join(lines)


def describe(what: str | QuantSpec | Target) -> Description:
    """Facts about a number format ("e4m3fn", "float16", "int4", "q3.4", "e8m0"), or a spec or target.

    ValueError if the name is neither.
    """
    if isinstance(what, str):
        try:
            return _describe_number(number(what), what)
        except ValueError as not_a_number:
            try:
                return _describe_spec(read_spec(what))
            except ValueError as not_a_spec:
                raise ValueError(f"{not_a_number}; and as a spec: {not_a_spec}") from None
    return _describe_spec(read_spec(what))


def bits(value: float, format: str) -> Bits:
    """The bit fields of `value` in a number format (see `describe`): the nearest value that it has, ties to even."""
    kind = number(format)
    code = kind.encode(value)
    pattern = f"{code:0{kind.bits}b}"
    fields, at = [], 0
    for name, width in kind.layout:
        part = pattern[at : at + width]
        fields.append((name, part, _meaning(kind, name, code, part)))
        at += width
    views = kind.views(code) if isinstance(kind, IntNumber) else {}
    return Bits(format, value, code, kind.bits, kind.value(code), tuple(fields), views)


def _meaning(kind: Number, field: str, code: int, part: str) -> str:
    worth = int(part or "0", 2)
    if isinstance(kind, IntNumber):
        if field == "sign":
            return f"-2^{kind.bits - 1 - kind.fraction_bits}" if worth else "+"
        return f"{worth * kind.step:g}" if field == "fraction" else f"{worth}"
    if field == "sign":
        return "-" if worth else "+"
    if not math.isfinite(kind.value(code)):
        return f"all ones: {kind.value(code)}"
    if field == "exponent":
        shift = max(worth, 1) if isinstance(kind, FloatNumber) else worth
        return f"2^({shift} - {kind.bias}) = {math.ldexp(1.0, shift - kind.bias):g}"
    assert isinstance(kind, FloatNumber)
    normal = int(code & (1 << (kind.bits - 1)) - 1 >= 1 << kind.fraction_bits)
    return f"{normal} + {worth}/{1 << kind.fraction_bits} = {normal + worth * kind.epsilon:g}"


def _describe_number(kind: Number, name: str) -> Description:
    facts: dict[str, Any] = {
        "bits per weight": kind.bits,
        "fields": " | ".join(f"{field} {width}" for field, width in kind.layout if width),
        "values": kind.values,
        "lowest": kind.lowest,
        "largest": kind.largest,
    }
    if isinstance(kind, IntNumber):
        facts["step"] = kind.step
        if kind.signed:
            facts["negative numbers"] = "two's complement"
            facts["lowest in sign-magnitude"] = -kind.largest
    else:
        facts["smallest normal"] = kind.smallest_normal
        if kind.smallest_subnormal is not None:
            facts["smallest subnormal"] = kind.smallest_subnormal
            facts["largest subnormal"] = kind.largest_subnormal
        if kind.epsilon is not None:
            facts["step from 1 to 2"] = kind.epsilon
        facts["bias"] = kind.bias
        facts["not numbers"] = _specials(kind)
    if kind.bits <= 4:
        facts["all values"] = [kind.value(code) for code in range(1 << kind.bits)]
    return Description(name, facts)


def _specials(kind: FloatNumber | ScaleNumber) -> str:
    if isinstance(kind, ScaleNumber):
        return "NaN is 255; no zero, no infinity, no sign"
    words = {"ieee": "infinities and NaN, as IEEE 754", "nan": "NaN is all ones; no infinity", "none": "none"}
    beyond = "the largest value" if kind.saturates else "infinity"
    return f"{words[kind.specials]}; what is too large becomes {beyond}"


def _describe_spec(spec: QuantSpec) -> Description:
    element = spec.element
    facts: dict[str, Any] = {"element": str(element), "granularity": str(spec.granularity)}
    levels = element.levels
    if levels is not None:
        finite = [level for level in levels if math.isfinite(level)]
        facts |= {"lowest level": min(finite), "largest level": max(finite)}
        if element.bits <= 4:
            facts["levels"] = list(levels)
    facts["decode"] = {"none": "s * q", "zero_point": "s * (q - z)", "minimum": "s * q + m"}[spec.offset]
    facts["scale stored as"] = spec.scale_dtype
    facts["bits of a code"] = element.bits
    facts["bits per weight"] = spec.bits_per_weight(_EXAMPLE)
    facts["counted for"] = f"a weight {list(_EXAMPLE)}"
    return Description(str(spec), facts)


def _plain(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _text(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(f"{v:g}" for v in value)
    if not isinstance(value, float):
        return str(value)
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    return f"{value!r}{_as_powers(value)}"


def _as_powers(value: float) -> str:
    """The same value by powers of two, where that is short: " = 2^-9", " = (2 - 2^-23) * 2^127"."""
    sign, magnitude = "-" if value < 0 else "", abs(value)
    fraction, exponent = math.frexp(magnitude)  # magnitude = fraction * 2^exponent, 0.5 <= fraction < 1
    if fraction == 0.5:
        return f" = {sign}2^{exponent - 1}"
    missing, lacks = math.frexp(1.0 - fraction)
    if missing == 0.5 and lacks < -1:
        return f" = {sign}(2 - 2^{lacks}) * 2^{exponent - 1}"
    return ""
