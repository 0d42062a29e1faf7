"""What ONNX Runtime GenAI has to know beside the graph: genai_config.json, and of which kind the tokenizer is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...models import phi
from ...models.rope import Rope

LENGTH = 4096  # at most, by default: GenAI reserves its cache for search.max_length tokens at once


def genai_config(config: Mapping[str, Any], rope: Rope, tokenizer_dir: Path | None, model_file: str) -> dict[str, Any]:
    """The settings, with the ends of a turn from generation_config.json where there is one."""
    n = phi.sizes(config)
    tokens = {key: config.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    generation = _json(tokenizer_dir / "generation_config.json") if tokenizer_dir else {}
    tokens |= {key: value for key, value in generation.items() if key in tokens and value is not None}
    end = tokens["eos_token_id"]
    first = end[0] if isinstance(end, list) and end else end
    tokens["pad_token_id"] = first if tokens["pad_token_id"] is None else tokens["pad_token_id"]
    tokens["bos_token_id"] = first if tokens["bos_token_id"] is None else tokens["bos_token_id"]
    return {
        "model": {
            "type": phi.MODEL_TYPE,
            "context_length": rope.context,
            "vocab_size": n.vocab,
            **{key: value for key, value in tokens.items() if value is not None},
            "decoder": {
                "filename": model_file,
                "head_size": n.head_dim,
                "hidden_size": n.hidden,
                "num_attention_heads": n.heads,
                "num_hidden_layers": n.layers,
                "num_key_value_heads": n.kv_heads,
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": False,
            "max_length": min(rope.context, LENGTH),
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": True,
            "repetition_penalty": 1.0,
            "temperature": 1.0,
            "top_k": 1,
            "top_p": 1.0,
        },
    }


def tokenizer_config(folder: Path) -> dict[str, Any] | None:
    """A tokenizer_config.json for GenAI, where it has to differ from the one in `folder`.

    GenAI finds out by the class's name how text is cut before merging. By every name but this one it cuts SentencePiece
    text (BPE with byte fallback, not cut at all) at spaces and combining marks, and so makes other ids.
    """
    tokenizer, settings = _json(folder / "tokenizer.json"), _json(folder / "tokenizer_config.json")
    model = tokenizer.get("model")
    if not isinstance(model, dict) or not model.get("byte_fallback") or tokenizer.get("pre_tokenizer"):
        return None
    return {**settings, "tokenizer_class": "GemmaTokenizer"}


def _json(path: Path) -> dict[str, Any]:
    """The object of a JSON file; {} if there is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}
