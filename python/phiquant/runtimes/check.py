"""Run an exported file in its own runtime and compare its logits with torch's, on the same codes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import evaluate, testing
from ..errors import PhiquantError
from ..extras import need
from ..models import phi

WINDOW = 256
_CHARACTERS = 12  # of source code per token, at most on average

# Bars of the relative error. llama.cpp rounds activations to 8 bits before it multiplies with quantized
# weights, to bfloat16 with BF16, to float16 with F16; transformers computes what torch does.
LLAMACPP_QUANTIZED, LLAMACPP_BF16, LLAMACPP_FLOAT, TRANSFORMERS = 2e-2, 1e-2, 1e-3, 1e-6
TRANSFORMERS_HALF = 2e-2  # a float folder whose config.json says bfloat16 or float16 computes in that


@dataclass(frozen=True)
class RuntimeResult:
    """A file in its own runtime against the model decoded from it, in torch, float32.

    ok: the relative error is within `bar`. relative_error: |difference of the logits| / |logits|,
    2-norms over all tokens. kl: mean KL(torch || runtime) in nats; same_top: share of positions with
    the same most likely token.
    """

    name: str
    ok: bool
    relative_error: float
    bar: float
    kl: float
    same_top: float
    perplexity: float
    reference_perplexity: float
    tokens: int


def run_safetensors(folder: Path, reader: Any, text: str | None, reference: Any, windows: int) -> RuntimeResult:
    """The folder in plain transformers. reference: a model, or None for the one decoded from the folder."""
    from . import transformers as runtime

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tokenizer = need("transformers", extra="hf").AutoTokenizer.from_pretrained(folder, local_files_only=True)
    rows = _rows(tokenizer, text, windows)
    reference = reference or decoded_model(config, reader.read(folder))
    bar = TRANSFORMERS if config.get("dtype") == "float32" else TRANSFORMERS_HALF
    return _result("transformers", rows, runtime.logits(folder, rows), reference, bar)


def run_gguf(path: Path, reader: Any, text: str | None, reference: Any, windows: int) -> RuntimeResult:
    """The file in llama.cpp, with its own tokenizer. reference: a model, or None for the one decoded from the file."""
    from . import llamacpp

    def tokenizer(text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": llamacpp.tokenize(path, [text])[0]}

    rows = _rows(tokenizer, text, windows)
    stored = reader.read(path)
    kinds = {tensor.stored_as for tensor in stored.values()}
    reference = reference or decoded_model(config_of_gguf(reader.read_metadata(path), stored), stored)
    bar = LLAMACPP_BF16 if "BF16" in kinds else LLAMACPP_FLOAT
    bar = LLAMACPP_QUANTIZED if kinds & {"Q4_0", "Q4_1", "Q8_0"} else bar
    return _result("llama.cpp", rows, llamacpp.logits(path, rows), reference, bar)


def decoded_model(config: Mapping[str, Any], stored: Mapping[str, Any]) -> Any:
    """A Phi3ForCausalLM in float32 with the values that the readers decode: the whole model in memory."""
    transformers = need("transformers", extra="hf")
    plain = {key: value for key, value in config.items() if key not in ("quantization_config", "dtype", "auto_map")}
    settings = transformers.Phi3Config.from_dict(plain)
    model = transformers.Phi3ForCausalLM(settings).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in stored:
                raise PhiquantError(f"the file has no tensor {name}; export again")
            parameter.copy_(torch.from_numpy(np.array(stored[name].values())))
    return model


def config_of_gguf(metadata: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json that a GGUF file's metadata stands for."""
    try:
        return _config_of_gguf({k.removeprefix("phi3."): v for k, v in metadata.items()}, stored)
    except KeyError as error:
        raise PhiquantError(f"the GGUF file lacks the key phi3.{error.args[0]}; export again") from error


def _config_of_gguf(keys: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, Any]:
    heads, hidden = int(keys["attention.head_count"]), int(keys["embedding_length"])
    original = int(keys.get("rope.scaling.original_context_length", keys["context_length"]))
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(keys.get("rope.freq_base", 10000.0))}
    rope["partial_rotary_factor"] = int(keys.get("rope.dimension_count", hidden // heads)) / (hidden // heads)
    if "rope_factors_long.weight" in stored:
        factors = {f"{k}_factor": stored[f"rope_factors_{k}.weight"].values().tolist() for k in ("long", "short")}
        rope |= {"rope_type": "longrope", "attention_factor": keys.get("rope.scaling.attn_factor"), **factors}
        rope["original_max_position_embeddings"] = original
    return {
        "architectures": [phi.ARCHITECTURE],
        "model_type": phi.MODEL_TYPE,
        "vocab_size": stored[f"{phi.EMBEDDING}.weight"].shape[0],
        "hidden_size": hidden,
        "intermediate_size": int(keys["feed_forward_length"]),
        "num_hidden_layers": int(keys["block_count"]),
        "num_attention_heads": heads,
        "num_key_value_heads": int(keys.get("attention.head_count_kv", heads)),
        "max_position_embeddings": int(keys["context_length"]),
        "original_max_position_embeddings": original,
        "rms_norm_eps": float(keys["attention.layer_norm_rms_epsilon"]),
        "sliding_window": keys.get("attention.sliding_window") or None,
        "rope_parameters": rope,
        "tie_word_embeddings": f"{phi.HEAD}.weight" not in stored,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


def _rows(tokenizer: Any, text: str | None, windows: int) -> list[list[int]]:
    text = testing.heldout_text() if text is None else text
    return evaluate.windows(tokenizer, text[: windows * WINDOW * _CHARACTERS], WINDOW, windows)


def _result(name: str, rows: list[list[int]], logits: list[np.ndarray], reference: Any, bar: float) -> RuntimeResult:
    expected = [values.float().cpu() for values in evaluate.model_logits(reference, rows)]
    got = [torch.tensor(values) for values in logits]
    difference = sum(float((a - b).square().sum()) for a, b in zip(got, expected, strict=True))
    error = (difference / sum(float(values.square().sum()) for values in expected)) ** 0.5
    compared = evaluate.compare_logits(rows, got, expected)
    return RuntimeResult(
        name=name,
        ok=error <= bar,
        relative_error=error,
        bar=bar,
        kl=compared.kl,
        same_top=compared.same_top,
        perplexity=compared.perplexity,
        reference_perplexity=compared.reference_perplexity,
        tokens=compared.tokens,
    )
