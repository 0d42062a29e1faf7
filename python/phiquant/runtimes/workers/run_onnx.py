"""Runs ONNX Runtime and ORT-GenAI in a process of its own: `python run_onnx.py request.json` (see exchange.py).

The exact setting is the same file with accuracy_level 1 in its nodes: the graph is patched in memory, its data
stays on the disk.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from exchange import create_logits, serve

MODEL = "model.onnx"
# Of MatMulNBits that ONNX Runtime makes of DequantizeLinear and MatMul: 1 leaves activations in float32.
FUSED_LEVEL = "session.qdq_matmulnbits_accuracy_level"
DATA_FOLDER = "session.model_external_initializers_file_folder_path"


def exact_model(folder: Path) -> bytes:
    """The graph of the folder with float activations."""
    model = onnx.load(str(folder / MODEL), load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "MatMulNBits" and attribute.name == "accuracy_level":
                attribute.i = 1
    return bytes(model.SerializeToString())


def logits(request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """logits-<i>.npy in `folder` for each of request["windows"]."""
    import onnxruntime

    options, model = onnxruntime.SessionOptions(), Path(request["model"])
    options.intra_op_num_threads = request["threads"]
    if request["exact"]:
        options.add_session_config_entry(FUSED_LEVEL, "1")
        options.add_session_config_entry(DATA_FOLDER, str(model))
    graph = exact_model(model) if request["exact"] else str(model / MODEL)
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    decoder = json.loads((model / "genai_config.json").read_text(encoding="utf-8"))["model"]["decoder"]
    empty = np.zeros((1, decoder["num_key_value_heads"], 0, decoder["head_size"]), np.float32)
    past = {i.name: empty for i in session.get_inputs() if len(i.shape) == 4}
    for index, window in enumerate(request["windows"]):
        ids = np.array([window], np.int64)
        values = session.run(["logits"], {"input_ids": ids, "attention_mask": np.ones_like(ids), **past})[0][0]
        create_logits(folder, index, values.shape)[:] = values
    return {"windows": len(request["windows"])}


def generate(genai: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Greedy continuation of a text or of token ids."""
    tokenizer, prompt = genai.Tokenizer(request["model"]), request["prompt"]
    tokens = tokenizer.encode(prompt).tolist() if isinstance(prompt, str) else prompt
    if not tokens:
        raise RuntimeError("the prompt is empty")
    config = genai.Config(request["model"])
    session: dict[str, Any] = {"intra_op_num_threads": request["threads"]}
    graph = b""  # GenAI reads it when it loads the model, so it must live until then
    if request["exact"]:
        graph = exact_model(Path(request["model"]))
        config.add_model_data(MODEL, graph)
        session[FUSED_LEVEL] = "1"
    config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
    model = genai.Model(config)
    del graph
    settings = genai.GeneratorParams(model)
    settings.set_search_options(max_length=len(tokens) + request["max_new_tokens"], do_sample=False)
    generator = genai.Generator(model, settings)
    generator.append_tokens(np.array(tokens, np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    new = generator.get_sequence(0)[len(tokens) :].tolist()
    return {"prompt_tokens": tokens, "tokens": new, "text": tokenizer.decode(np.array(new, np.int32))}


def act(request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Logits, token ids or a continuation."""
    if request["action"] == "logits":
        return logits(request, folder)
    import onnxruntime_genai

    onnxruntime_genai.disable_telemetry_events()
    if request["action"] == "generate":
        return generate(onnxruntime_genai, request)
    tokenizer = onnxruntime_genai.Tokenizer(request["model"])
    return {"ids": [tokenizer.encode(text).tolist() for text in request["texts"]]}


if __name__ == "__main__":
    serve(act)
