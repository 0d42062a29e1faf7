"""Runs an OpenVINO folder in a process of its own: `python run_openvino.py request.json` (see exchange.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from exchange import create_logits, serve

# The settings in which the CPU plugin computes in float32 what torch does: activations and keys and values are rounded
# to nothing narrower.
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}


def settings(request: dict[str, Any]) -> dict[str, Any]:
    """Of the CPU plugin."""
    return {"INFERENCE_NUM_THREADS": request["threads"], **(EXACT if request.get("exact") else {})}


def logits(request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """logits-<i>.npy in `folder` for each of request["windows"]."""
    model = ov.Core().compile_model(Path(request["model"], "openvino_model.xml"), "CPU", settings(request))
    for index, window in enumerate(request["windows"]):
        asked = model.create_infer_request()
        first = request["prefill"] or len(window)
        stops = [first, *range(first + 1, len(window) + 1)]
        out, start = None, 0
        for stop in stops:
            values = step(asked, window[start:stop], start)
            if out is None:
                out = create_logits(folder, index, (len(window), values.shape[1]))
            out[start:stop] = values
            start = stop
    return {"windows": len(request["windows"])}


def step(asked: Any, tokens: list[int], before: int) -> np.ndarray:
    """Logits [S, V] of the next tokens, `before` others being remembered."""
    stop = before + len(tokens)
    inputs = {
        "input_ids": np.array([tokens], np.int64),
        "attention_mask": np.ones((1, stop), np.int64),
        "position_ids": np.arange(before, stop, dtype=np.int64)[None],
        "beam_idx": np.zeros(1, np.int32),
    }
    return np.asarray(asked.infer(inputs)["logits"])[0]


def tokenize(request: dict[str, Any]) -> dict[str, Any]:
    """Ids of each text by itself: texts of a batch would be padded."""
    import openvino_tokenizers  # noqa: F401 (its operations)

    model = ov.Core().compile_model(Path(request["model"], "openvino_tokenizer.xml"), "CPU")
    return {"ids": [model([text])["input_ids"][0].tolist() for text in request["texts"]]}


def generate(request: dict[str, Any]) -> dict[str, Any]:
    """Greedy continuation of a text or of token ids."""
    import openvino_genai

    options = settings(request) | {"ATTENTION_BACKEND": request["attention"]}
    pipeline = openvino_genai.LLMPipeline(request["model"], "CPU", **options)
    tokenizer, prompt = pipeline.get_tokenizer(), request["prompt"]
    tokens = tokenizer.encode(prompt).input_ids.data[0].tolist() if isinstance(prompt, str) else prompt
    if not tokens:
        raise RuntimeError("the prompt is empty")
    config = pipeline.get_generation_config()
    config.do_sample, config.num_beams, config.max_new_tokens = False, 1, request["max_new_tokens"]
    new = list(pipeline.generate(ov.Tensor(np.array([tokens], np.int64)), config).tokens[0])
    return {"prompt_tokens": tokens, "tokens": new, "text": tokenizer.decode(new)}


def act(request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Logits, token ids or a continuation."""
    if request["action"] == "logits":
        return logits(request, folder)
    return generate(request) if request["action"] == "generate" else tokenize(request)


if __name__ == "__main__":
    serve(act)
