"""Miniatures: Phi models with every feature of the real ones and small sizes, random weights, a tokenizer."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from .errors import PhiquantError
from .extras import need
from .miniature_tokenizers import PHI_3, PHI_4, PHI_4_MINI, Family, tokenizer
from .models.configs import CONFIGS, GENERATION_EOS

SPREAD = 3.0  # standard deviation of the logits, about that of a trained model


@dataclass(frozen=True)
class Miniature:
    """How a real config is made small. `pieces` is the number of trained pieces of its vocabulary.

    Hidden and intermediate sizes are multiples of 256, the super-block of K-quants; no other size equals the
    vocabulary's, because ORT-GenAI's builder finds lm_head by it.
    """

    family: Family
    pieces: int
    config: dict[str, Any]


_TWO_LAYERS = {"num_hidden_layers": 2}
_LONG = {"max_position_embeddings": 4096, "original_max_position_embeddings": 512, "sliding_window": 32768}
MINIATURES = {
    # A window just under a fifth of the context; the real one is 2047 of 4096.
    "phi-3-mini": Miniature(
        PHI_3,
        2000,
        {
            **_TWO_LAYERS,
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 256,
            "original_max_position_embeddings": 256,
            "sliding_window": 47,
        },
    ),
    # The real head size 96 and its 48 LongRoPE factors.
    "phi-3.5-mini": Miniature(
        PHI_3,
        2000,
        {
            **_TWO_LAYERS,
            **_LONG,
            "hidden_size": 768,
            "intermediate_size": 1024,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
        },
    ),
    # The real head size 128, of which 96 are rotated, three query heads to one key head, one tied table.
    "phi-4-mini": Miniature(
        PHI_4_MINI,
        1535,
        {
            **_TWO_LAYERS,
            **_LONG,
            "hidden_size": 768,
            "intermediate_size": 1024,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
        },
    ),
    "phi-4": Miniature(
        PHI_4,
        1600,
        {
            **_TWO_LAYERS,
            "hidden_size": 512,
            "intermediate_size": 1280,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "original_max_position_embeddings": 1024,
        },
    ),
}


def miniature_config(name: str) -> dict[str, Any]:
    """The config.json of the miniature: the real one with small sizes and the ids of its small vocabulary."""
    small, real = _find(name), CONFIGS[name]
    shift = small.family.size - small.pieces
    ids = {key: _shifted(real[key], shift) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {**copy.deepcopy(real), **small.config, **ids, "vocab_size": real["vocab_size"] - shift, "dtype": "float32"}


def miniature(name: str, seed: int = 0) -> tuple[Any, Any]:
    """(Phi3ForCausalLM in float32, its tokenizer): the named Phi model with small sizes and random weights.

    name: "phi-3-mini" (SentencePiece vocabulary, sliding window), "phi-3.5-mini" (LongRoPE), "phi-4-mini" (tied
    embeddings, grouped queries, partial rotary, LongRoPE, o200k-style vocabulary) or "phi-4" (cl100k-style
    vocabulary, theta 250000). Equal seeds give equal weights. PhiquantError if there is no such miniature.
    """
    small = _find(name)
    context = small.config["max_position_embeddings"]
    return copy.deepcopy(_model(name, seed)), tokenizer(small.family, small.pieces, context)


@lru_cache(maxsize=4)
def _model(name: str, seed: int) -> Any:
    small, config = _find(name), miniature_config(name)
    transformers = need("transformers", extra="hf")
    model = random_model(transformers.Phi3Config(**config), seed, SPREAD * config["hidden_size"] ** -0.5)
    stops = _shifted(GENERATION_EOS.get(name), small.family.size - small.pieces) or config["eos_token_id"]
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=config["bos_token_id"], eos_token_id=stops, pad_token_id=config["pad_token_id"]
    )
    return model


def random_model(config: Any, seed: int, table_std: float) -> Any:
    """A Phi3ForCausalLM of that Phi3Config with random weights: norms around 1, tables of `table_std`."""
    transformers = need("transformers", extra="hf")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.Phi3ForCausalLM(config).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                nn.init.uniform_(parameter, 0.5, 1.5)
            elif "embed_tokens" in name or name == "lm_head.weight":
                nn.init.normal_(parameter, std=table_std)
            else:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return model


def _find(name: str) -> Miniature:
    if name not in MINIATURES:
        raise PhiquantError(f"there is no miniature {name!r}; there are {', '.join(MINIATURES)}")
    return MINIATURES[name]


def _shifted(value: Any, shift: int) -> Any:
    """A token id, or a list of them, in the small vocabulary: ids below the added tokens stay."""
    if isinstance(value, list):
        return [_shifted(item, shift) for item in value]
    return value - shift if value is not None and value > shift else value
