"""Hugging Face tensor names to GGUF names for the architecture `phi3`.

Phi-3 checkpoints keep q, k, v and gate, up fused, and so does GGUF: nothing is permuted or transposed. Where
q, k, v have grids of their own, llama.cpp takes them as three tensors. The gate rows stay in front of the up
rows, in one `ffn_up`: gate and up of their own it does not take.
"""

from __future__ import annotations

import re

from ...errors import PhiquantError

_WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_IN_LAYER = re.compile(r"model\.layers\.(\d+)\.([a-z_.]+)\.weight")


def gguf_name(name: str) -> str:
    """ "model.layers.3.mlp.down_proj.weight" -> "blk.3.ffn_down.weight". PhiquantError if GGUF has no place for it."""
    if name in _WHOLE:
        return _WHOLE[name]
    found = _IN_LAYER.fullmatch(name)
    if found is not None and found[2] in ("mlp.gate_proj", "mlp.up_proj"):
        raise PhiquantError(
            f"{name}: llama.cpp keeps gate and up of a Phi-3 in one tensor; give both one grid (mlp.gate_up_proj)"
        )
    if found is None or found[2] not in _LAYER:
        raise PhiquantError(
            f"tensor {name!r} has no place in a GGUF file of the architecture phi3 (Phi-3 has no biases and no "
            "adapters there); merge or remove it before exporting"
        )
    return f"blk.{found[1]}.{_LAYER[found[2]]}.weight"
