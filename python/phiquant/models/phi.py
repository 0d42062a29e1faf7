"""What is true of Phi-3 models, as data: names, fused rows, tied embeddings, what stays in float.

Covers `Phi3ForCausalLM`: Phi-3-mini, Phi-3-medium, Phi-3.5-mini, Phi-4-mini, Phi-4. Names are those
of the Hugging Face checkpoints. H = hidden, I = intermediate, L = layers, V = vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import PhiquantError, UnsupportedModelError

ARCHITECTURE = "Phi3ForCausalLM"
MODEL_TYPE = "phi3"
EMBEDDING = "model.embed_tokens"
HEAD = "lm_head"
FINAL_NORM = "model.norm"
LAYER_LINEARS = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")

# The fused linears, and the projections whose rows they hold one after the other. A projection with a grid of its own
# goes by its name beside the fused one's: "model.layers.0.self_attn.v_proj" is some rows of "...self_attn.qkv_proj".
SLICES = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}

# The fields of config.json that decide what a model computes.
COMPUTED = (
    "architectures", "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "hidden_act", "rms_norm_eps", "tie_word_embeddings",
    "max_position_embeddings", "original_max_position_embeddings", "sliding_window", "rope_theta",
    "partial_rotary_factor", "rope_scaling", "rope_parameters",
)  # fmt: skip

# Each norm feeds one linear: (norm, its consumer), both inside model.layers.<i>.
NORM_CONSUMERS = (("input_layernorm", "self_attn.qkv_proj"), ("post_attention_layernorm", "mlp.gate_up_proj"))

# Module name patterns that a recipe leaves in float unless it names them, and why.
FLOAT_BY_DEFAULT = {
    "*lm_head": "its error goes straight into the logits; quantize it by naming it in the recipe",
    "*embed_tokens": "a table look-up gains no speed from few bits, and may share its values with lm_head",
}

# model_type (and architecture) names of relatives: what they are and why they are refused.
_RELATIVES = {
    "phi": "Phi-1, Phi-1.5 and Phi-2 use LayerNorm, parallel blocks, biases and separate q, k, v",
    "mixformer-sequential": "the first Phi-1.5 checkpoints use LayerNorm, parallel blocks and biases",
    "phi-msft": "early Phi-2 checkpoints use LayerNorm, parallel blocks and biases",
    "phi3small": "Phi-3-small uses block-sparse attention and a gated GELU of its own",
    "phimoe": "Phi-3.5-MoE has 16 experts per layer",
    "phi3_v": "Phi-3-vision has an image tower beside a Phi-3 decoder",
    "phi4mm": "Phi-4-multimodal has image and speech towers and LoRA adapters beside a Phi-3 decoder",
    "phi4_multimodal": "Phi-4-multimodal has image and speech towers and LoRA adapters beside a Phi-3 decoder",
    "phi4flash": "Phi-4-mini-flash is a SambaY hybrid with state-space layers",
}
_RELATIVE_ARCHITECTURES = {
    "PhiForCausalLM": "phi",
    "MixFormerSequentialForCausalLM": "mixformer-sequential",
    "Phi3SmallForCausalLM": "phi3small",
    "PhimoeForCausalLM": "phimoe",
    "PhiMoEForCausalLM": "phimoe",
    "Phi3VForCausalLM": "phi3_v",
    "Phi4MMForCausalLM": "phi4mm",
    "Phi4MultimodalForCausalLM": "phi4_multimodal",
    "Phi4FlashForCausalLM": "phi4flash",
}
_MOST, _MOST_LAYERS = 1 << 24, 1 << 12  # of rows and columns, of layers: far above any model's
_LAYER = re.compile(r"model\.layers\.(?P<index>\d+)\.(?P<part>.+)")


@dataclass(frozen=True)
class Sizes:
    """The numbers of a config that shapes follow from."""

    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    tied: bool

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def kv_dim(self) -> int:
        return self.kv_heads * self.head_dim


def check_architecture(config: Mapping[str, Any]) -> None:
    """Raise UnsupportedModelError unless `config` (a config.json) is a float Phi3ForCausalLM."""
    architectures = config.get("architectures") or []
    model_type = config.get("model_type")
    names = [*architectures, model_type or ""] if isinstance(architectures, list) else [None]
    if not all(isinstance(name, str) for name in names):
        raise UnsupportedModelError(
            f"config.json: architectures {architectures!r} and model_type {model_type!r} are no names"
        )
    relative = next((_RELATIVE_ARCHITECTURES[a] for a in architectures if a in _RELATIVE_ARCHITECTURES), model_type)
    name = ", ".join(architectures) or model_type or "a model without a name"
    supported = f"phiquant supports {ARCHITECTURE} (Phi-3-mini, Phi-3-medium, Phi-3.5-mini, Phi-4-mini, Phi-4)"
    if relative in _RELATIVES:
        raise UnsupportedModelError(f"{name} is not supported: {_RELATIVES[relative]}. {supported}")
    if model_type != MODEL_TYPE or (architectures and ARCHITECTURE not in architectures):
        raise UnsupportedModelError(f"{name} (model_type {model_type!r}) is not supported. {supported}")
    if config.get("quantization_config"):
        told = config["quantization_config"]
        method = told.get("quant_method", "an unnamed method") if isinstance(told, Mapping) else told
        raise UnsupportedModelError(
            f"this {name} checkpoint is already quantized ({method}); start from the float checkpoint it was made of"
        )


def sizes(config: Mapping[str, Any]) -> Sizes:
    """Read the sizes of a config.json. PhiquantError if one is missing or they do not fit together."""
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    numbers: dict[str, Any] = {key: config.get(key) for key in keys}
    numbers["num_key_value_heads"] = config.get("num_key_value_heads") or config.get("num_attention_heads")
    for key, value in numbers.items():
        if type(value) is not int or not 0 < value <= (_MOST_LAYERS if key == "num_hidden_layers" else _MOST):
            raise PhiquantError(f"config.json: {key} must be a positive integer that a model can have, not {value!r}")
    vocab, hidden, intermediate, layers, heads, kv_heads = numbers.values()
    if hidden % heads or heads % kv_heads:
        raise PhiquantError(
            f"config.json: hidden_size {hidden} must be a multiple of num_attention_heads {heads}, "
            f"and that of num_key_value_heads {kv_heads}"
        )
    return Sizes(vocab, hidden, intermediate, layers, heads, kv_heads, bool(config.get("tie_word_embeddings", False)))


def tensors(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every parameter's name and shape, in the order of the model. Tied models have no lm_head.weight."""
    n = sizes(config)
    yield f"{EMBEDDING}.weight", (n.vocab, n.hidden)
    shapes = {
        "self_attn.o_proj": (n.hidden, n.hidden),
        "self_attn.qkv_proj": (n.hidden + 2 * n.kv_dim, n.hidden),
        "mlp.gate_up_proj": (2 * n.intermediate, n.hidden),
        "mlp.down_proj": (n.hidden, n.intermediate),
        "input_layernorm": (n.hidden,),
        "post_attention_layernorm": (n.hidden,),
    }
    for index in range(n.layers):
        for part, shape in shapes.items():
            yield f"model.layers.{index}.{part}.weight", shape
    yield f"{FINAL_NORM}.weight", (n.hidden,)
    if not n.tied:
        yield f"{HEAD}.weight", (n.vocab, n.hidden)


def slice_names(module: str) -> tuple[str, ...]:
    """The names of the projections inside a fused linear: "....qkv_proj" -> "....q_proj", ...; () for others."""
    parent, _, last = module.rpartition(".")
    return tuple(f"{parent}.{part}" for part in SLICES.get(last, ()))


def fused_name(module: str) -> str:
    """The fused linear that holds a projection: "....v_proj" -> "....qkv_proj"; other names as they are."""
    parent, _, last = module.rpartition(".")
    return next((f"{parent}.{fused}" for fused, parts in SLICES.items() if last in parts), module)


def fused_rows(config: Mapping[str, Any], module: str) -> dict[str, slice]:
    """The rows of each projection, by name, inside a fused linear: q, k, v of qkv_proj; gate, up; {} for others."""
    n = sizes(config)
    lengths = {"qkv_proj": (n.hidden, n.kv_dim, n.kv_dim), "gate_up_proj": (n.intermediate, n.intermediate)}
    rows, start = {}, 0
    for name, length in zip(slice_names(module), lengths.get(module.rpartition(".")[2], ()), strict=True):
        rows[name] = slice(start, start + length)
        start += length
    return rows


def check_complete(config: Mapping[str, Any], have: Mapping[str, tuple[int, ...]]) -> None:
    """PhiquantError unless `have`, names and shapes of tensors, is all that the config asks for.

    A fused weight may be there as its slices.
    """
    for name, shape in tensors(config):
        module = name.removesuffix(".weight")
        expected = {name: shape}
        if name not in have and any(f"{part}.weight" in have for part in slice_names(module)):
            rows = fused_rows(config, module)
            expected = {f"{part}.weight": (at.stop - at.start, *shape[1:]) for part, at in rows.items()}
        for part, wanted in expected.items():
            if part not in have:
                raise PhiquantError(f"the model has no tensor {part}, which its config.json asks for")
            if tuple(have[part]) != wanted:
                raise PhiquantError(f"{part} has the shape {list(have[part])}; by its config.json it is {list(wanted)}")


def is_matrix(module: str) -> bool:
    """Whether the weight of that module may be quantized: the linears of the layers, the head, the embedding."""
    found = _LAYER.fullmatch(module)
    return module in (EMBEDDING, HEAD) or bool(found and found["part"] in LAYER_LINEARS)
