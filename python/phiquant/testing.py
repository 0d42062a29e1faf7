"""Models and texts to try things on: miniatures, random models, the outlier twin, the standard library's source."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from .errors import PhiquantError
from .extras import need
from .miniatures import miniature, random_model
from .models import phi
from .random_checkpoint import generate_checkpoint
from .texts import END_OF_TEXT, heldout_text, training_text

__all__ = [
    "END_OF_TEXT",
    "generate_checkpoint",
    "heldout_text",
    "miniature",
    "outlier_twin",
    "random_phi3",
    "training_text",
]


def random_phi3(seed: int = 0, **config: Any) -> Any:
    """A Phi3ForCausalLM with random weights, small enough for tests; `config` overrides Phi3Config's fields.

    The sizes divide by 128, the vocabulary is that of phi3-tiny, and the norms are not all ones.
    """
    transformers = need("transformers", extra="hf")
    sizes: dict[str, Any] = {
        "vocab_size": 4096,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "original_max_position_embeddings": 512,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "bos_token_id": 4091,
        "eos_token_id": 4091,
        "pad_token_id": 4091,
    }
    return random_model(transformers.Phi3Config(**{**sizes, **config}), seed, table_std=0.2)


@torch.no_grad()
def outlier_twin(model: nn.Module, channels: int = 3, factor: float = 30.0, seed: int = 0) -> nn.Module:
    """A copy of a Phi-3 model with the outlier channels that large models have, and the same function.

    In every decoder layer, `channels` channels of each norm are scaled up by `factor` and the
    columns of the linear that reads it are scaled down by as much. Logits stay equal to about 1e-5.
    """
    twin = copy.deepcopy(model)
    layers = getattr(getattr(twin, "model", None), "layers", None)
    if layers is None:
        raise PhiquantError(f"outlier_twin needs a {phi.ARCHITECTURE}; {type(model).__name__} has no model.layers")
    generator = torch.Generator().manual_seed(seed)
    for layer in layers:
        for norm_name, linear_name in phi.NORM_CONSUMERS:
            norm, linear = layer.get_submodule(norm_name), layer.get_submodule(linear_name)
            chosen = torch.randperm(norm.weight.numel(), generator=generator)[:channels].to(norm.weight.device)
            norm.weight[chosen] *= factor
            linear.weight[:, chosen] /= factor
    return twin
