"""Metadata of a Phi-3 GGUF file, from the model's config.json: sizes, RoPE, LongRoPE, sliding window."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import PhiquantError
from ..models import phi
from .gguf_container import GGMLType, Metadata, TensorInfo

QUANTIZATION_VERSION = 2  # of ggml's block layouts


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
        raise PhiquantError(
            f"config.json: RoPE of type {kind!r} cannot be written for phi3; 'default' and 'longrope' can"
        )
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


def put_model(metadata: Metadata, config: Mapping[str, Any], rope: Rope) -> None:
    """The `phi3.*` keys. The loader of llama.cpp checks the type of each."""
    n = phi.sizes(config)
    metadata.u32("phi3.context_length", rope.context)
    metadata.u32("phi3.embedding_length", n.hidden)
    metadata.u32("phi3.feed_forward_length", n.intermediate)
    metadata.u32("phi3.block_count", n.layers)
    metadata.u32("phi3.attention.head_count", n.heads)
    metadata.u32("phi3.attention.head_count_kv", n.kv_heads)
    metadata.f32("phi3.attention.layer_norm_rms_epsilon", float(config.get("rms_norm_eps", 1e-5)))
    metadata.u32("phi3.attention.sliding_window", int(config.get("sliding_window") or 0))
    metadata.u32("phi3.rope.dimension_count", rope.dimensions)
    metadata.f32("phi3.rope.freq_base", rope.theta)
    metadata.u32("phi3.rope.scaling.original_context_length", rope.original_context)
    if rope.long is not None:
        metadata.f32("phi3.rope.scaling.attn_factor", rope.attention_factor)
    metadata.u32("phi3.vocab_size", n.vocab)


def put_general(metadata: Metadata, name: str, tensors: Sequence[TensorInfo]) -> None:
    """The `general.*` keys."""
    metadata.string("general.architecture", "phi3")
    metadata.string("general.type", "model")
    metadata.string("general.name", name)
    metadata.u32("general.file_type", most_used(tensors).file_type)
    metadata.u32("general.quantization_version", QUANTIZATION_VERSION)


def most_used(tensors: Sequence[TensorInfo]) -> GGMLType:
    """The type of most of the values in the matrices of the layers: what the file is called after."""
    values: Counter[GGMLType] = Counter()
    for t in tensors:
        if len(t.shape) == 2 and t.name.startswith("blk."):
            values[t.type] += math.prod(t.shape)
    return values.most_common(1)[0][0]


def warnings(config: Mapping[str, Any], rope: Rope) -> list[str]:
    """What a user of the file should know: where llama.cpp computes something else than Transformers."""
    found = []
    window = config.get("sliding_window") or 0
    if 0 < window < rope.context:
        found.append(
            f"llama.cpp ignores the sliding window of {window} tokens: on longer texts its results differ from "
            "Transformers'"
        )
    if rope.long is not None:
        found.append(
            f"LongRoPE: llama.cpp takes the long factors when its context size exceeds {rope.original_context}, "
            "Transformers when the text does; run shorter texts with a context of at most that size"
        )
    return found
