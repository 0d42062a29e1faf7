"""Rotations: the float function, the hidden state in another basis, tied tables, files that hold the rotated model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import phiquant as pq
import pytest
import torch
from phiquant import PhiquantError
from phiquant.miniatures import miniature
from phiquant.testing import outlier_twin


def ids() -> torch.Tensor:
    return torch.randint(1, 1000, (2, 40), generator=torch.Generator().manual_seed(1))


def difference(model: Any, reference: Any) -> float:
    with torch.no_grad():
        ours, theirs = model(ids()).logits, reference(ids()).logits
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("transform", ["fold", "rotate", "smooth"])
@pytest.mark.parametrize("twin", [False, True])
def test_the_trained_model_keeps_its_function(transform: str, twin: bool, phi3_tiny: Any) -> None:
    model = phi3_tiny[0].double()
    reference = outlier_twin(model) if twin else model
    assert difference(pq.transform(copy.deepcopy(reference), transform, calibration=ids()), reference) < 1e-5


def test_the_hidden_state_is_rotated(tiny_model: Any) -> None:
    """By one orthogonal matrix that is the same in every layer; outliers are spread over all channels."""
    tiny_model.model.embed_tokens.weight.data[:, 7] *= 100
    rotated = pq.transform(copy.deepcopy(tiny_model), "rotate")
    outputs = {}
    for name, model in (("before", tiny_model), ("after", rotated)):
        with torch.no_grad():
            outputs[name] = model.model(ids(), output_hidden_states=True).hidden_states[:2]
    tables = [model.model.embed_tokens.weight.detach().double() for model in (tiny_model, rotated)]
    q = torch.linalg.lstsq(*tables).solution
    assert torch.allclose(q @ q.T, torch.eye(128, dtype=torch.float64), atol=1e-4)
    assert torch.allclose(outputs["before"][1].double() @ q, outputs["after"][1].double(), atol=1e-2)

    def peak(x: torch.Tensor) -> float:
        return float((x.abs().amax(-1) / x.square().mean(-1).sqrt()).mean())

    assert peak(outputs["before"][0]) > 10
    assert peak(outputs["after"][0]) < 5


def test_heads_alone_leave_the_stream(tiny_model: Any) -> None:
    before = copy.deepcopy(tiny_model)
    pq.transform(tiny_model, "rotate:parts=heads")
    changed = {n for n, p in tiny_model.named_parameters() if not torch.equal(p, before.get_parameter(n))}
    assert changed == {f"model.layers.{i}.self_attn.{part}_proj.weight" for i in (0, 1) for part in ("qkv", "o")}
    q_and_k = slice(0, 192)
    for one, two in zip(tiny_model.model.layers, before.model.layers, strict=True):
        assert torch.equal(one.self_attn.qkv_proj.weight[q_and_k], two.self_attn.qkv_proj.weight[q_and_k])
    assert difference(tiny_model, before) < 1e-5


def test_a_tied_table_is_refused_or_untied(tmp_path: Path) -> None:
    model, tokenizer = miniature("phi-4-mini")
    before = copy.deepcopy(model)
    with pytest.raises(PhiquantError, match="untie=true gives it a weight of its own"):
        pq.transform(model, "rotate")
    assert all(torch.equal(p, before.get_parameter(n)) for n, p in model.named_parameters())
    assert difference(pq.transform(copy.deepcopy(model), "rotate:parts=heads"), before) < 1e-5
    pq.quantize(model, "gguf:Q8_0", transforms=["rotate:untie=true"])
    receipt = pq.export(model, tokenizer, tmp_path, format="gguf")
    assert "lm_head.weight" in {t["name"] for t in receipt["tensors"]}
    assert pq.verify(tmp_path).ok
    loaded, _ = pq.load(tmp_path)
    assert difference(loaded, model) < 1e-5
    assert difference(loaded, before) < 0.1


@pytest.mark.parametrize("format", ["gguf", pytest.param("safetensors", marks=pytest.mark.slow)])
def test_runtimes_agree_on_the_rewritten_model(format: str, tiny_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    """llama.cpp with float weights, for it rounds the inputs of others; transformers with codes."""
    pytest.importorskip({"gguf": "xllamacpp", "safetensors": "compressed_tensors"}[format])
    pq.transform(tiny_model, ["rotate", "smooth:pairs=down"], calibration=ids())
    if format == "safetensors":
        pq.quantize(tiny_model, "safetensors:int8-channel")
    pq.export(tiny_model, tokenizer, tmp_path, format=format)
    text = pq.testing.heldout_text()[:3000]
    report = pq.verify(tmp_path, run=True, text=text, reference=tiny_model, windows=1)
    assert report.ok, str(report)
    assert report.runtime is not None


def test_equal_seeds_give_equal_weights(tiny_model: Any) -> None:
    one, two, other = (
        pq.transform(copy.deepcopy(tiny_model), text).model.embed_tokens.weight
        for text in ("rotate:seed=3", "rotate:seed=3", "rotate:seed=4")
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("format", ["gguf", "safetensors"])
def test_files_hold_the_rotated_model(format: str, tiny_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    target = {"gguf": "gguf:Q4_0", "safetensors": "safetensors:int4-g32"}[format]
    pq.quantize(tiny_model, target, transforms=["rotate"])
    receipt = pq.export(tiny_model, tokenizer, tmp_path, format=format)
    told = [t["origin"]["transforms"] for t in receipt["tensors"] if "origin" in t]
    assert told[0] == [{"name": "rotate", "seed": 0, "parts": "all"}]
    assert pq.verify(tmp_path).ok
    loaded, _ = pq.load(tmp_path)
    assert difference(loaded, tiny_model) < 1e-5


def test_refusals(tiny_model: Any, make_phi3: Any) -> None:
    with pytest.raises(PhiquantError, match="parts is 'all', 'residual' or 'heads'"):
        pq.transform(tiny_model, "rotate:parts=queries")
    odd = make_phi3(hidden_size=120, num_attention_heads=4, num_key_value_heads=2)  # heads of 30
    with pytest.raises(PhiquantError, match="no Hadamard matrix of size 30"):
        pq.transform(odd, "rotate")
    assert difference(pq.transform(copy.deepcopy(odd), "rotate:parts=residual"), odd) < 1e-5
