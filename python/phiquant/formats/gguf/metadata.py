"""Metadata of a Phi-3 GGUF file, from the model's config.json: sizes, RoPE, LongRoPE, sliding window."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ...models import phi
from ...models.rope import Rope
from .container import Metadata, TensorInfo
from .types import GGMLType

QUANTIZATION_VERSION = 2  # of ggml's block layouts


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


def put_general(metadata: Metadata, name: str, file_type: int) -> None:
    """The `general.*` keys."""
    metadata.string("general.architecture", "phi3")
    metadata.string("general.type", "model")
    metadata.string("general.name", name)
    metadata.u32("general.file_type", file_type)
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
