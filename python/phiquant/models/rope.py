"""Rotary embedding of a Phi-3 model, as its config.json tells it: one reading for every format."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import PhiquantError
from . import phi


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of a Phi-3 model. The factors are None unless it uses LongRoPE."""

    theta: float
    dimensions: int
    context: int
    original_context: int
    short: list[float] | None = None
    long: list[float] | None = None
    attention_factor: float = 1.0


def read_rope(config: Mapping[str, Any]) -> Rope:
    """Read `rope_scaling` with `rope_theta`, or `rope_parameters` (Transformers 5), which wins."""
    n = phi.sizes(config)
    scaling = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    theta = float(scaling.get("rope_theta") or config.get("rope_theta") or 10000.0)
    partial = scaling.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    dimensions = int(partial * n.head_dim)
    context = _integer(config, "max_position_embeddings")
    original = _integer({**config, **scaling}, "original_max_position_embeddings", context)
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return Rope(theta, dimensions, context, original)
    if kind not in ("longrope", "su"):
        raise PhiquantError(f"config.json: RoPE of type {kind!r} is none of Phi-3's; 'default' and 'longrope' can")
    factors = {name: _factors(scaling, f"{name}_factor", dimensions // 2) for name in ("short", "long")}
    factor = scaling.get("factor") or context / original
    computed = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    attention = scaling.get("attention_factor")
    attention = computed if attention is None else float(attention)
    return Rope(theta, dimensions, context, original, factors["short"], factors["long"], attention)


def _factors(scaling: Mapping[str, Any], key: str, count: int) -> list[float]:
    values = scaling.get(key)
    if not isinstance(values, Sequence) or len(values) != count or not all(isinstance(v, (int, float)) for v in values):
        raise PhiquantError(f"config.json: LongRoPE's {key} must be a list of {count} numbers (half the rotary part)")
    return [float(v) for v in values]


def _integer(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key) or default
    if not isinstance(value, int) or value < 2:
        raise PhiquantError(f"config.json: {key} must be an integer above 1, not {value!r}")
    return value
