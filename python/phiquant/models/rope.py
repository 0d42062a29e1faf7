"""Rotary embedding of a Phi-3 model, as its config.json tells it: one reading for every format."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import PhiquantError
from . import phi

_LONGROPE = ("longrope", "su", "yarn")  # the second and third are what the first checkpoints called it
_ORIGINAL, _DEFAULT_ORIGINAL = "original_max_position_embeddings", 4096


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
    """Read `rope_scaling` with `rope_theta`, or `rope_parameters` (Transformers 5), as Transformers does.

    If both are there, `rope_scaling` counts; `original_max_position_embeddings` beside them counts more than within.
    PhiquantError if a value is missing, no number, or one that Transformers would not heed.
    """
    n = phi.sizes(config)
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    theta = _number(scaling.get("rope_theta") or config.get("rope_theta") or 10000.0, "rope_theta")
    partial = scaling.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    dimensions = int(_number(partial, "partial_rotary_factor") * n.head_dim)
    if not 0 < dimensions <= n.head_dim or dimensions % 2:
        raise PhiquantError(
            f"config.json: {partial} of a head of {n.head_dim} is no even number of dimensions to rotate"
        )
    context = _integer(config, "max_position_embeddings")
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return Rope(theta, dimensions, context, _integer(config, _ORIGINAL, context))
    if kind not in _LONGROPE:
        raise PhiquantError(f"config.json: RoPE of type {kind!r} is none of Phi-3's; 'default' and 'longrope' are")
    original = _integer(config, _ORIGINAL, scaling.get(_ORIGINAL) or _DEFAULT_ORIGINAL)
    short, long = (_factors(scaling, f"{name}_factor", dimensions // 2) for name in ("short", "long"))
    return Rope(theta, dimensions, context, original, short, long, _attention_factor(scaling, context, original))


def _attention_factor(scaling: Mapping[str, Any], context: int, original: int) -> float:
    """What cosines and sines are multiplied with at every length."""
    factor = _number(scaling.get("factor") or context / original, "factor")
    computed = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    given = scaling.get("attention_factor")
    used = computed if given is None else _number(given, "attention_factor")
    for key in ("short_mscale", "long_mscale"):
        if scaling.get(key) is not None and not math.isclose(_number(scaling[key], key), used, rel_tol=1e-6):
            raise PhiquantError(
                f"config.json: {key} {scaling[key]} belongs to Phi-3.5-MoE; Transformers ignores it in phi3 and "
                f"multiplies with {used:.6g}. Remove it, or give that number as attention_factor"
            )
    return used


def _factors(scaling: Mapping[str, Any], key: str, count: int) -> list[float]:
    values = scaling.get(key)
    if not isinstance(values, Sequence) or len(values) != count:
        raise PhiquantError(f"config.json: LongRoPE's {key} must be a list of {count} numbers (half the rotary part)")
    return [_number(value, key) for value in values]


def _number(value: Any, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise PhiquantError(f"config.json: {key} must be a number above 0, not {value!r}")
    return float(value)


def _integer(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key) or default
    if not isinstance(value, int) or value < 2:
        raise PhiquantError(f"config.json: {key} must be an integer above 1, not {value!r}")
    return value
