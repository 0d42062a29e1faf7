"""The shared table's bits by measured loss: the distances are evaluate's, the smallest within tolerance is taken."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import phiquant as pq
import pytest
import torch
from phiquant import PhiquantError, stream, tied
from phiquant.calibration_layers import ModelLayers
from phiquant.evaluate import compare_logits, model_logits

NAMES = ("gguf:Q8_0", "gguf:Q5_0", "gguf:Q4_0")


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(0, 4096, (10, 64), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model(make_phi3: Callable[..., Any]) -> Any:
    return make_phi3(tie_word_embeddings=True)


def test_the_distances_are_those_of_evaluate(model: Any, ids: torch.Tensor, tmp_path: Path) -> None:
    found = tied.choose(ModelLayers(model), NAMES, ids[:3], folder=tmp_path)
    rows = ids[:3].tolist()
    assert [trial.target for trial in found.trials] == list(NAMES)
    for trial in found.trials:
        other = copy.deepcopy(model)
        spec = pq.TARGETS[trial.target].spec
        assert spec is not None
        other.lm_head.weight.data.copy_(pq.quantize_tensor(model.lm_head.weight, spec).dequantize())
        expected = compare_logits(rows, model_logits(other, rows), model_logits(model, rows))
        assert trial.kl == pytest.approx(expected.kl, rel=2e-3, abs=1e-8)
        assert trial.loss == pytest.approx(expected.nll_diff, abs=2e-6)
        assert trial.bytes == 4096 * 128 * (int(trial.target[6]) + 0.5) / 8


def test_the_smallest_within_the_tolerance_is_chosen(model: Any, ids: torch.Tensor) -> None:
    layers = ModelLayers(model)
    found = tied.choose(layers, NAMES, ids[:2], tolerance=1e9)
    assert found.chosen == "gguf:Q4_0"
    kl = {trial.target: trial.kl for trial in found.trials}
    assert kl["gguf:Q8_0"] < kl["gguf:Q5_0"] < kl["gguf:Q4_0"]
    found = tied.choose(layers, NAMES, ids[:2], tolerance=kl["gguf:Q5_0"])
    assert found.chosen == "gguf:Q5_0"
    recipe = found.recipe(pq.Recipe({"*embed_tokens": "gguf:Q8_0"}, "gguf:Q4_0"))
    assert str(recipe.spec_for("lm_head")) == str(recipe.spec_for("model.embed_tokens")) == "int5-g32-signmax-f16"
    found = tied.choose(layers, NAMES[1:], ids[:2], tolerance=0)
    assert found.chosen is None
    assert found.recipe(pq.Recipe({}, "gguf:Q4_0")).spec_for("lm_head") is None


def test_a_model_without_a_shared_table_is_refused(tiny_model: Any, ids: torch.Tensor) -> None:
    with pytest.raises(PhiquantError, match="share no table"):
        tied.choose(ModelLayers(tiny_model), NAMES, ids)


@pytest.mark.parametrize("solver", ["rtn", "gptq"])
def test_from_disk_to_disk(
    model: Any, tokenizer: Any, ids: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, solver: str
) -> None:
    checkpoint = tmp_path / "checkpoint"
    model.bfloat16().save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)
    monkeypatch.setitem(tied.CANDIDATES, "gguf", NAMES)
    options: dict[str, Any] = {"solver": solver, "calibration": ids, "embedding": "auto"}
    float_table = stream.quantize_checkpoint(checkpoint, "gguf:Q4_0", tmp_path / "a", **options, tolerance=0.0)
    assert float_table["embedding"]["chosen"] is None
    kl = [trial["kl"] for trial in float_table["embedding"]["trials"]]

    def stopped(*_: Any, **__: Any) -> None:
        raise InterruptedError

    with monkeypatch.context() as patch:  # after the choice: a second run takes it as it was
        patch.setattr(stream, "sign", stopped)
        with pytest.raises(InterruptedError):
            stream.quantize_checkpoint(checkpoint, "gguf:Q4_0", tmp_path / "b", **options, tolerance=kl[1])
    monkeypatch.setattr(tied, "choose", stopped)
    receipt = stream.quantize_checkpoint(checkpoint, "gguf:Q4_0", tmp_path / "b", **options, tolerance=kl[1])
    assert receipt["embedding"]["chosen"] == "gguf:Q5_0"
    stored = {t["name"]: t for t in receipt["tensors"]}["model.embed_tokens.weight"]
    assert stored["stored_as"] == "Q5_0"
    assert stored["origin"]["solver"] == solver
    assert not (tmp_path / "b" / "calibration").exists()
    assert pq.verify(tmp_path / "b").ok
