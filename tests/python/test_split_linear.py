"""Projections with grids of their own: the same function when split, the same codes from memory and from disk."""

from __future__ import annotations

from typing import Any

import phiquant as pq
import pytest
import torch
from phiquant import testing
from phiquant.checkpoint_source import CheckpointSource
from phiquant.errors import PhiquantError
from phiquant.model_source import ModelSource
from phiquant.split_linear import SplitLinear, module_path, projection_name, split

RECIPE = pq.Recipe({"*.v_proj": "gguf:Q8_0", "*layers.1.mlp.up_proj": "float"}, default="gguf:Q4_0")


@pytest.fixture
def model() -> Any:
    return testing.random_phi3()


def test_names_go_both_ways() -> None:
    path = "model.layers.3.self_attn.qkv_proj.v_proj"
    assert projection_name(path) == "model.layers.3.self_attn.v_proj"
    assert module_path("model.layers.3.self_attn.v_proj") == path
    for other in ("model.layers.3.mlp.down_proj", "lm_head", "net.v_proj.v_proj"):
        assert projection_name(other) == other
    assert module_path("model.layers.0.mlp.up_proj") == "model.layers.0.mlp.gate_up_proj.up_proj"


def test_a_split_model_computes_the_same(model: Any) -> None:
    ids = torch.arange(24)[None]
    before = model(ids).logits
    with split(model, ["model.layers.0.self_attn.k_proj", "model.layers.1.mlp.gate_proj"]):
        pass
    assert isinstance(model.model.layers[0].self_attn.qkv_proj, SplitLinear)
    assert torch.allclose(model(ids).logits, before, atol=1e-5)


def test_only_projections_with_different_specs_are_split(model: Any) -> None:
    recipe = pq.Recipe({"*.v_proj": "gguf:Q4_0", "*": "gguf:Q4_0"})
    pq.quantize(model, recipe)
    assert not any(isinstance(module, SplitLinear) for module in model.modules())


def test_each_projection_gets_its_codes(model: Any) -> None:
    fused = model.model.layers[0].self_attn.qkv_proj.weight.detach().clone()
    pq.quantize(model, RECIPE)
    parts = model.model.layers[0].self_attn.qkv_proj
    rows = [len(child.weight) for child in parts.children()]
    assert [str(child.quantized.spec) for child in parts.children()] == [
        str(pq.spec(text)) for text in ("gguf:Q4_0", "gguf:Q4_0", "gguf:Q8_0")
    ]
    expected = pq.quantize_tensor(fused[-rows[2] :], "gguf:Q8_0")
    assert torch.equal(parts.v_proj.quantized.codes, expected.codes)
    up = model.model.layers[1].mlp.gate_up_proj.up_proj
    assert type(up) is torch.nn.Linear


def test_memory_and_disk_give_the_same_entries(model: Any, tmp_path: Any) -> None:
    model.save_pretrained(tmp_path)
    disk = CheckpointSource(tmp_path, RECIPE)
    pq.quantize(model, RECIPE)
    memory = ModelSource(model, None)
    assert [(e.name, e.shape, e.spec) for e in memory.entries] == [(e.name, e.shape, e.spec) for e in disk.entries]
    names = {entry.name for entry in disk.entries}
    assert "model.layers.0.self_attn.v_proj.weight" in names
    assert "model.layers.0.self_attn.qkv_proj.weight" not in names
    assert "model.layers.0.mlp.gate_up_proj.weight" in names
    for entry in disk.entries:
        one, other = disk.read(entry), memory.read(entry)
        assert torch.equal(one.codes if entry.spec else one, other.codes if entry.spec else other)


def test_gptq_and_training_follow_the_split(model: Any) -> None:
    recipe = pq.Recipe({"*.v_proj": "int8-g32-sym-f16"}, default="gguf:Q4_0")
    pq.quantize(model, recipe, solver="gptq", calibration=torch.randint(0, 4000, (2, 64)))
    assert len(model.model.layers[0].self_attn.qkv_proj.v_proj.quantized.codes) == 64
    student = testing.random_phi3()
    pq.prepare_qat(student, recipe)
    student(torch.arange(16)[None], labels=torch.arange(16)[None]).loss.backward()
    assert student.model.layers[0].self_attn.qkv_proj.v_proj.weight.grad.abs().sum() > 0
    pq.convert(student)
    assert student.model.layers[1].self_attn.qkv_proj.q_proj.quantized.spec == pq.spec("gguf:Q4_0")


def test_an_error_leaves_the_model_whole(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(PhiquantError, match="not finite"):
        pq.quantize(model, RECIPE)
    assert not any(isinstance(module, SplitLinear) for module in model.modules())


def test_a_pattern_that_names_no_projection_is_an_error(model: Any) -> None:
    with pytest.raises(PhiquantError, match="matches none"):
        pq.quantize(model, pq.Recipe({"*.w_proj": "gguf:Q8_0"}, default="gguf:Q4_0"))
