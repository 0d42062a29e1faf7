"""Specs by name: `spec("int4-g32-sym")`, `spec("gguf:Q4_0")`. The one place to import words about grids from."""

from __future__ import annotations

import dataclasses

from .elements import IQ4NL, Binary, Codebook, Element, FixedPoint, Float, Int, NormalFloat, Ternary
from .granularity import Granularity, PerChannel, PerGroup, PerRows, PerTensor, PerToken
from .grid_text import NAMED, read_grid
from .quant_spec import FLOAT_BITS, Anchor, FloatName, Offset, QuantSpec, Shape
from .storage import TwoLevel
from .targets import TARGETS, Target, target

__all__ = [
    "FLOAT_BITS",
    "IQ4NL",
    "NAMED",
    "TARGETS",
    "Anchor",
    "Binary",
    "Codebook",
    "Element",
    "FixedPoint",
    "Float",
    "FloatName",
    "Granularity",
    "Int",
    "NormalFloat",
    "Offset",
    "PerChannel",
    "PerGroup",
    "PerRows",
    "PerTensor",
    "PerToken",
    "QuantSpec",
    "Shape",
    "Target",
    "Ternary",
    "TwoLevel",
    "spec",
    "target",
    "with_bits",
]


def spec(text: str | QuantSpec | Target) -> QuantSpec:
    """Read a spec: a target's name, such as "gguf:Q4_0", or a grid's text (grid_text.read_grid).

    ValueError for a text that is neither, or a target that stores floats.
    """
    if isinstance(text, QuantSpec):
        return text
    if isinstance(text, Target) or ":" in text:
        named = text if isinstance(text, Target) else target(text)
        if named.spec is None:
            why = "stores floats; it has no quantization grid" if named.mixture is None else "has a grid for each layer"
            raise ValueError(f"target {named.name} {why}")
        return named.spec
    return read_grid(text)


def with_bits(base: QuantSpec, bits: int) -> QuantSpec:
    """The same grid rule with integer codes of another width: 3 bits inside Q4_0's container, for instance."""
    if not isinstance(base.element, Int):
        raise ValueError(f"{base.element} has no other widths; only integers have")
    return dataclasses.replace(base, element=dataclasses.replace(base.element, bits=bits))
