"""genai_config.json for the stages of a QNN export: ORT-GenAI's type "decoder-pipeline" with a sliding cache.

Its windowed cache keeps keys [G, 1, D, C - S] and values [G, 1, C - S, D] in uint8, the newest tokens last, and moves
them by as many tokens as a stage took: that is what the graphs are made for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...extras import need
from ...models import phi

FILE = "genai_config.json"
_CPU: dict[str, Any] = {"provider_options": []}
_QNN: dict[str, Any] = {
    "provider_options": [{"qnn": {"backend_type": "htp", "htp_graph_finalization_optimization_mode": "3"}}],
    "session.disable_cpu_ep_fallback": "1",
}


def config(model: Mapping[str, Any], files: Mapping[str, bytes], prefill: int, context: int) -> dict[str, Any]:
    """The settings. files: the graph of each stage, whose inputs and outputs are named."""
    from_string = need("onnx", extra="onnx").ModelProto.FromString
    graphs = {name: from_string(file).graph for name, file in files.items()}
    n = phi.sizes(model)
    eos = model.get("eos_token_id")
    bos = model.get("bos_token_id")
    pad = model.get("pad_token_id")
    head_rounded = any(node.op_type == "QuantizeLinear" for node in graphs["head_decode.onnx"].node)
    head = _QNN if head_rounded else _CPU
    stages = [
        _stage("embeddings", graphs, _CPU),
        _stage("prefill", graphs, _QNN, run_on_token_gen=False),
        _stage("decode", graphs, _QNN, run_on_prompt=False),
        _stage("head_prefill", graphs, head, run_on_token_gen=False, is_lm_head=True),
        _stage("head_decode", graphs, head, run_on_prompt=False, is_lm_head=True),
    ]
    first = eos[0] if isinstance(eos, list) else eos
    return {
        "model": {
            "type": "decoder-pipeline",
            "bos_token_id": bos,
            "eos_token_id": eos,
            "pad_token_id": first if pad is None else pad,
            "context_length": context,
            "vocab_size": n.vocab,
            "decoder": {
                "head_size": n.head_dim,
                "hidden_size": n.hidden,
                "num_attention_heads": n.heads,
                "num_key_value_heads": n.kv_heads,
                # GenAI counts caches by layers; low parts of keys and values are caches of layers beyond the last.
                "num_hidden_layers": sum(v.name.endswith(".key") for v in graphs["decode.onnx"].input),
                "sliding_window": {
                    "window_size": prefill,
                    "pad_value": 0,
                    "alignment": "left",
                    "slide_key_value_cache": True,
                    "slide_inputs": True,
                },
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "position_ids": "position_ids",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
                "pipeline": stages,
            },
        },
        "search": {"do_sample": False, "max_length": context, "num_beams": 1, "past_present_share_buffer": False},
    }


def _stage(name: str, graphs: Mapping[str, Any], session: Mapping[str, Any], **when: bool) -> dict[str, Any]:
    graph = graphs[f"{name}.onnx"]
    names = {"inputs": [v.name for v in graph.input], "outputs": [v.name for v in graph.output]}
    return {name: {"filename": f"{name}.onnx", **names, "session_options": dict(session), **when}}
