"""A quantized model kept in a folder and taken out again."""

from __future__ import annotations

import json

import phiquant as pq
import pytest
import torch
from phiquant import runs


@pytest.fixture
def kept(phi3_tiny, tmp_path):
    model, _ = phi3_tiny
    pq.quantize(model, pq.Recipe({"*.0.mlp.down_proj": "float"}, default="uint4-g32-min-f16"))
    with torch.no_grad():
        model.model.norm.weight += 0.5
    runs.save(model, "phi3-tiny", tmp_path / "run", note="kept")
    return model, tmp_path / "run"


def test_restored_model_has_the_same_codes_and_values(kept):
    model, folder = kept
    again, tokenizer = runs.restore(folder)
    assert runs.read_facts(folder)["note"] == "kept"
    assert len(tokenizer) == 4096
    state = again.state_dict()
    assert list(state) == list(model.state_dict())
    for name, value in model.state_dict().items():
        assert torch.equal(state[name], value), name
    module = again.model.layers[1].mlp.down_proj
    assert str(module.quantized.spec) == "uint4-g32-min-f16"
    assert module.is_intact()


def test_folder_without_a_run_says_what_to_do(tmp_path):
    with pytest.raises(pq.PhiquantError, match="phiquant qat"):
        runs.restore(tmp_path)


def test_damaged_state_is_refused(kept):
    _, folder = kept
    (folder / runs.STATE).write_bytes((folder / runs.STATE).read_bytes()[:1000])
    with pytest.raises(pq.PhiquantError, match="damaged"):
        runs.restore(folder)


def test_run_of_another_model_is_refused(kept):
    _, folder = kept
    facts = json.loads((folder / runs.FACTS).read_text())
    facts["specs"]["model.layers.9.mlp.down_proj"] = "int4-g32-sym"
    (folder / runs.FACTS).write_text(json.dumps(facts))
    with pytest.raises(pq.PhiquantError, match=r"layers\.9"):
        runs.restore(folder)
