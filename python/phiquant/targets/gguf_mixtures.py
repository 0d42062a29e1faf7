"""llama.cpp's mixtures of types: which matrix of a Phi-3 model gets which, by layer and by the sizes of config.json.

The rules are those of llama.cpp's quantizer for the architecture phi3 (src/llama-quant.cpp). n = layers, i = layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..grid_text import read_grid
from ..quant_spec import QuantSpec

Layer = Callable[[int, int, int], str]  # (i, n, query heads of a key head) -> type


def _more(i: int, n: int) -> bool:
    """The layers that get more bits: the first and the last eighth, and each third between."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def _always(kind: str) -> Layer:
    return lambda i, n, gqa: kind


def _in_more(kind: str, other: str) -> Layer:
    return lambda i, n, gqa: kind if _more(i, n) else other


def _until(share: int, kind: str, other: str) -> Layer:
    """`kind` in the first n / share layers."""
    return lambda i, n, gqa: kind if i < n // share else other


def _first(count: int, kind: str, other: str) -> Layer:
    return lambda i, n, gqa: kind if i < count else other


_QKV, _OUT, _DOWN = "self_attn.qkv_proj", "self_attn.o_proj", "mlp.down_proj"
# name -> (general.file_type, type of what no rule names, rules by the name of the module in its layer)
MIXTURES: dict[str, tuple[int, str, dict[str, Layer]]] = {
    "Q2_K_M": (10, "q2_k", {
        _QKV: lambda i, n, gqa: "q4_k" if gqa >= 4 else "q3_k", _OUT: _always("q3_k"), _DOWN: _always("q3_k"),
    }),
    "Q3_K_S": (11, "q3_k", {}),
    "Q3_K_M": (12, "q3_k", {
        _QKV: _first(2, "q5_k", "q4_k"), _OUT: _always("q4_k"), _DOWN: _until(16, "q5_k", "q4_k"),
    }),
    "Q3_K_L": (13, "q3_k", {_QKV: _always("q5_k"), _OUT: _always("q5_k"), _DOWN: _always("q5_k")}),
    "Q4_K_S": (14, "q4_k", {_QKV: _first(4, "q5_k", "q4_k"), _DOWN: _until(8, "q5_k", "q4_k")}),
    "Q4_K_M": (15, "q4_k", {_QKV: _in_more("q6_k", "q4_k"), _DOWN: _in_more("q6_k", "q4_k")}),
    "Q5_K_S": (16, "q5_k", {}),
    "Q5_K_M": (17, "q5_k", {_QKV: _in_more("q6_k", "q5_k"), _DOWN: _in_more("q6_k", "q5_k")}),
}  # fmt: skip
_HEAD = "q6_k"  # the output matrix, and an embedding that is tied to it
# What holds rows that are no multiple of 256 values.
_SMALL = {
    "q2_k": "int4-g32-signmax-f16", "q3_k": "int4-g32-signmax-f16", "q4_k": "int5-g32-signmax-f16",
    "q5_k": "uint5-g32-min-f16", "q6_k": "int8-g32-sym-f16",
}  # fmt: skip


def modules(name: str, config: Mapping[str, Any]) -> dict[str, QuantSpec]:
    """The spec of each matrix of the model of that config.json, head and embedding too, by the module's name."""
    _, base, rules = MIXTURES[name]
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    gqa = heads // (config.get("num_key_value_heads") or heads)
    columns = {_DOWN: config["intermediate_size"]}
    tied = config.get("tie_word_embeddings", False)
    kinds = {"model.embed_tokens": _HEAD if tied else base, "lm_head": _HEAD}
    for index in range(layers):
        for part in (_QKV, _OUT, "mlp.gate_up_proj", _DOWN):
            rule = rules.get(part, _always(base))
            kinds[f"model.layers.{index}.{part}"] = rule(index, layers, gqa)
    width = config["hidden_size"]
    return {module: _grid(kind, columns.get(module.split(".", 3)[-1], width)) for module, kind in kinds.items()}


def _grid(kind: str, columns: int) -> QuantSpec:
    return read_grid(kind if columns % 256 == 0 else _SMALL[kind])


def file_type(config: Mapping[str, Any], specs: Mapping[str, QuantSpec | None]) -> int | None:
    """general.file_type of the mixture that gives the modules these specs; None if no mixture does."""
    for name, (number, _, _) in MIXTURES.items():
        wanted = modules(name, config)
        if config.get("tie_word_embeddings"):
            del wanted["lm_head"]
        if specs == wanted:
            return number
    return None
