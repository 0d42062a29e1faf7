"""QNN exports on Qualcomm's HTP emulator, with the fallback to the CPU disabled. The package is an opt-in extra."""

import copy
import json

import numpy as np
import phiquant as pq
import pytest
import torch
from phiquant.calibrate import token_windows
from phiquant.runtimes import qnn as runtime
from qnn_cases import CONTEXT, error, expected, export, quantized, windows

pytest.importorskip("onnxruntime_qnn", reason="onnxruntime-qnn is not installed: pip install 'phiquant[qnn]'")


def test_a_layer_on_the_emulator(tokenizer, tmp_path):
    model, rows = quantized(head=True), windows(1, CONTEXT, seed=1).tolist()
    export(model, tokenizer, tmp_path)
    found = runtime.logits(tmp_path, rows, exact=False, one_by_one=CONTEXT - 2)  # both stages, and both of the head
    assert 1e-4 < error(found, expected(model, rows)) <= 1e-2


@pytest.mark.parametrize(("target", "bar"), [("qnn:a16w8", 5e-3), ("qnn:a16w4", 1e-2)])  # 9e-3 measured for int4
@pytest.mark.parametrize("index", range(4))
@pytest.mark.slow
def test_each_layer_of_phi3_tiny_on_its_own_inputs(phi3_tiny, tokenizer, tmp_path, index, target, bar):
    """A model of that layer alone, whose embedding holds what enters it: "token" t is the t-th hidden state."""
    whole, _ = phi3_tiny
    rows = token_windows(pq.testing.heldout_text()[:8000], tokenizer)[:1, :256]
    rows = torch.cat([rows, token_windows(pq.testing.training_text(120_000), tokenizer)[:24, :256]])
    with torch.no_grad():
        states = whole(rows, output_hidden_states=True, use_cache=False).hidden_states[index].reshape(-1, 256)
    model = alone(whole, index, states)
    pq.quantize(model, target)
    ids = torch.arange(len(states)).view(-1, 256)
    pq.export(model, tokenizer, tmp_path, format="qnn", calibration=ids[1:])
    found = runtime.logits(tmp_path, ids[:1].tolist(), exact=False)
    assert error(found, expected(model, ids[:1].tolist())) <= bar


def alone(whole, index, states):
    """The layer between an embedding of `states` and a norm and a head that change nothing."""
    model = copy.deepcopy(whole)
    model.config.num_hidden_layers, model.config.vocab_size = 1, len(states)
    model.config.bos_token_id = model.config.eos_token_id = model.config.pad_token_id = 0
    model.config.layer_types = None
    model.model.layers = torch.nn.ModuleList([model.model.layers[index]])
    model.model.layers[0].self_attn.layer_idx = 0
    model.model.embed_tokens = torch.nn.Embedding.from_pretrained(states.clone())
    model.model.norm.weight.data.fill_(1.0)
    model.lm_head = torch.nn.Linear(states.shape[1], len(states), bias=False)
    model.lm_head.weight.data = torch.eye(len(states), states.shape[1])
    return model


@pytest.mark.slow
def test_phi3_tiny_on_the_emulator(phi3_tiny, tokenizer, tmp_path):
    model, _ = phi3_tiny
    pq.quantize(model, "qnn:a16w8")
    pq.export(model, tokenizer, tmp_path, format="qnn")
    rows = token_windows(pq.testing.heldout_text()[:20000], tokenizer)[:2, :200].tolist()
    found, wanted = runtime.logits(tmp_path, rows, exact=False), expected(model, rows)
    same = np.mean([(a.argmax(1) == b.argmax(1)).mean() for a, b in zip(found, wanted, strict=True)])
    assert same >= 0.98
    assert error(found, wanted) <= 1e-2


@pytest.mark.slow
def test_what_the_emulator_does_not_take_is_an_error_and_not_left_to_the_cpu(tokenizer, tmp_path):
    import onnx

    export(quantized(), tokenizer, tmp_path)
    model = onnx.load(tmp_path / "prefill.onnx", load_external_data=False)
    for value in model.graph.input:  # an open size: QNN takes static shapes alone
        if value.name == "inputs_embeds":
            value.type.tensor_type.shape.dim[1].dim_param = "tokens"
    onnx.save(model, tmp_path / "prefill.onnx")
    with pytest.raises(pq.PhiquantError, match="fallback to CPU EP has been explicitly disabled"):
        runtime.logits(tmp_path, windows(1, 8).tolist(), exact=False)


def test_stages_are_told_apart(tokenizer, tmp_path):
    export(quantized(head=True), tokenizer, tmp_path)
    pipeline = json.loads((tmp_path / "genai_config.json").read_text())["model"]["decoder"]["pipeline"]
    on_qnn = {n for entry in pipeline for n, stage in entry.items() if stage["session_options"]["provider_options"]}
    assert on_qnn == {"prefill", "decode", "head_prefill", "head_decode"}
