"""GGUF tensor names of the architecture `phi3` to Hugging Face's: the reader's half of names.py."""

from __future__ import annotations

import re
from pathlib import Path

from ...errors import PhiquantError

_WHOLE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "rope_factors_long.weight": "rope_factors_long.weight",
    "rope_factors_short.weight": "rope_factors_short.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.weight")


def hf_name(name: str, path: Path | str = "the GGUF file") -> str:
    """ "blk.3.ffn_down.weight" -> "model.layers.3.mlp.down_proj.weight". PhiquantError for what no Phi-3 has."""
    if name in _WHOLE:
        return _WHOLE[name]
    found = _BLOCK.fullmatch(name)
    if found is None or found[2] not in _LAYER:
        raise PhiquantError(f"{path} has a tensor {name!r}, which no Phi-3 model has")
    return f"model.layers.{found[1]}.{_LAYER[found[2]]}.weight"
