"""Runs plain transformers in a process of its own: `python run_transformers.py request.json` (see exchange.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from exchange import create_logits, serve


def load(request: dict[str, Any]) -> Any:
    """The model, as from_pretrained(folder) gives it in the dtype that config.json names; or the exact one."""
    torch.set_num_threads(request["threads"])
    dtype = torch.float32 if request["exact"] else "auto"
    model = transformers.AutoModelForCausalLM.from_pretrained(
        request["model"], dtype=dtype, local_files_only=True, use_safetensors=True, trust_remote_code=False
    ).eval()
    return weights_alone(model) if request["exact"] else model


def weights_alone(model: Any) -> Any:
    """The model of the decoded weights in float32: no input of a linear is rounded, small floats are widened too."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.quantization_config.dequantize:
        quantizer.compressor.decompress_model(model)
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is not None:
            module.quantization_scheme.input_activations = None
    return torch.nn.Module.float(model)  # the own float() of quantized models refuses


def load_tokenizer(request: dict[str, Any]) -> Any:
    """The tokenizer of the folder."""
    return transformers.AutoTokenizer.from_pretrained(request["model"], local_files_only=True)


@torch.no_grad()
def logits(model: Any, request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """logits-<i>.npy in `folder` for each of request["windows"]."""
    for index, window in enumerate(request["windows"]):
        values = model(torch.tensor([window]), use_cache=False).logits[0]
        create_logits(folder, index, tuple(values.shape))[:] = values.float().numpy()
    return {"windows": len(request["windows"]), "dtype": str(model.dtype)}


@torch.no_grad()
def generate(model: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Greedy continuation of a text or of token ids."""
    tokenizer = load_tokenizer(request)
    prompt = request["prompt"]
    tokens = list(tokenizer(prompt)["input_ids"]) if isinstance(prompt, str) else prompt
    if not tokens:
        raise RuntimeError("the prompt is empty")
    ids = torch.tensor([tokens])
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=request["max_new_tokens"], do_sample=False
    )
    new = made[0, len(tokens) :].tolist()
    return {"prompt_tokens": tokens, "tokens": new, "text": tokenizer.decode(new, skip_special_tokens=True)}


def act(request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Logits, token ids or a continuation."""
    transformers.utils.logging.disable_progress_bar()
    if request["action"] == "tokenize":
        return {"ids": [load_tokenizer(request)(text)["input_ids"] for text in request["texts"]]}
    model = load(request)
    return generate(model, request) if request["action"] == "generate" else logits(model, request, folder)


if __name__ == "__main__":
    serve(act)
