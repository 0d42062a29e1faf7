"""Runs mlx-lm in a process of its own: `python run_mlx.py request.json` (see exchange.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from exchange import create_logits, serve
from mlx_lm import stream_generate
from mlx_lm.utils import load_model, load_tokenizer


def load(request: dict[str, Any]) -> Any:
    """The model, as mlx_lm.load gives it, or with every parameter that is not a code in float32."""
    model, _ = load_model(Path(request["model"]))
    if request["exact"]:
        model.set_dtype(mx.float32)
    return model


def logits(request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """logits-<i>.npy in `folder` for each of request["windows"]."""
    model = load(request)
    for index, window in enumerate(request["windows"]):
        values = np.array(model(mx.array([window]))[0].astype(mx.float32))
        create_logits(folder, index, values.shape)[:] = values
    return {"windows": len(request["windows"])}


def generate(request: dict[str, Any]) -> dict[str, Any]:
    """mlx_lm's own generation, which is greedy unless a sampler is given."""
    tokenizer = load_tokenizer(Path(request["model"]))
    prompt = request["prompt"]
    tokens = list(tokenizer.encode(prompt)) if isinstance(prompt, str) else prompt
    if not tokens:
        raise RuntimeError("the prompt is empty")
    steps = list(stream_generate(load(request), tokenizer, tokens, max_tokens=request["max_new_tokens"]))
    new = [int(step.token) for step in steps]
    # The text of the steps themselves would lack the space that it begins with.
    return {"prompt_tokens": tokens, "tokens": new, "text": tokenizer.decode(new, skip_special_tokens=True)}


def act(request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Logits, token ids or a continuation."""
    if request["action"] == "tokenize":
        tokenizer = load_tokenizer(Path(request["model"]))
        return {"ids": [list(tokenizer.encode(text)) for text in request["texts"]]}
    return generate(request) if request["action"] == "generate" else logits(request, folder)


if __name__ == "__main__":
    serve(act)
