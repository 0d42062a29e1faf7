"""SmoothQuant: the formula against numpy, the float function, what it gains on outliers, refusals, files."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import phiquant as pq
import pytest
import torch
from phiquant import PhiquantError
from phiquant.transforms.smooth import input_sizes


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 4096, (4, 32), generator=torch.Generator().manual_seed(0))


def distance(model: Any, reference: Any, ids: torch.Tensor) -> float:
    with torch.no_grad():
        return (model(ids).logits - reference(ids).logits).square().mean().item()


def numpy_weight(model: Any, name: str) -> np.ndarray:
    return model.get_submodule(name).weight.detach().double().numpy()


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_the_factors_are_those_of_the_formula(alpha: float, tiny_model: Any, ids: torch.Tensor) -> None:
    before = copy.deepcopy(tiny_model)
    layer = "model.layers.1"
    names = [f"{layer}.{part}" for part in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.down_proj")]
    seen: dict[str, np.ndarray] = {}
    hooks = [
        before.get_submodule(name).register_forward_pre_hook(
            lambda m, x, name=name: seen.update({name: x[0].detach().abs().double().numpy().max((0, 1))})
        )
        for name in names
    ]
    before(ids)
    for hook in hooks:
        hook.remove()
    pq.transform(tiny_model, f"smooth:alpha={alpha}", calibration=ids)
    qkv, o, down = names
    for name, heads in ((qkv, None), (o, (2, 2)), (down, None)):  # two value heads, two query heads on each
        made, read = seen[name], np.abs(numpy_weight(before, name)).max(0)
        if heads:
            made, read = (a.reshape(*heads, -1).max(1).reshape(-1) for a in (made, read))
        s = made**alpha / read ** (1 - alpha)
        wide = np.repeat(s.reshape(2, 1, -1), 2, 1).reshape(-1) if heads else s
        got = numpy_weight(tiny_model, name)
        if name == qkv:  # whose v rows feed o_proj: looked at below
            got, expected = got[:192], (numpy_weight(before, name) * wide)[:192]
            norm = f"{layer}.input_layernorm"
            assert np.allclose(numpy_weight(tiny_model, norm), numpy_weight(before, norm) / s, rtol=1e-5)
        else:
            expected = numpy_weight(before, name) * wide
        assert np.allclose(got, expected, rtol=1e-5)


def test_alpha_one_makes_channels_alike(tiny_model: Any, ids: torch.Tensor) -> None:
    name = "model.layers.0.mlp.down_proj"
    pq.transform(tiny_model, "smooth:alpha=1", calibration=ids)
    size = input_sizes(tiny_model, ids, [name])[name]
    assert torch.allclose(size, torch.ones_like(size), rtol=1e-4)


def test_only_the_pairs_that_were_named(tiny_model: Any, ids: torch.Tensor) -> None:
    before = copy.deepcopy(tiny_model.state_dict())
    pq.transform(tiny_model, "smooth:pairs=down", calibration=ids)
    changed = {name for name, value in tiny_model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"model.layers.{i}.mlp.{part}_proj.weight" for i in (0, 1) for part in ("gate_up", "down")}


def test_a_head_that_stays_float_is_left_alone(tiny_model: Any, ids: torch.Tensor) -> None:
    before = tiny_model.lm_head.weight.clone()
    pq.quantize(tiny_model, "int8-channel-sym", transforms=["smooth"], calibration=ids)
    assert torch.equal(tiny_model.lm_head.weight, before)


def test_outliers_cost_little_once_smoothed(phi3_tiny: Any) -> None:
    """The twin has the outlier channels of large models: rounded inputs lose most of what they would."""
    model, tokenizer = phi3_tiny
    twin = pq.testing.outlier_twin(model)
    text = pq.testing.heldout_text()
    rows = pq.evaluate.windows(tokenizer, text, window=128, limit=3)
    logits = list(pq.evaluate.model_logits(twin, rows))
    ids = torch.tensor(pq.evaluate.windows(tokenizer, pq.testing.training_text(20_000), window=128, limit=8))
    kl = {}
    for transform in ("plain", "rotate", "smooth"):
        names = [] if transform == "plain" else [transform]
        one = copy.deepcopy(twin)
        pq.quantize(one, "int8-channel-sym", transforms=names, calibration=ids, activations="int8-token-sym")
        kl[transform] = pq.evaluate.compare_logits(rows, pq.evaluate.model_logits(one, rows), logits).kl
    assert kl["smooth"] < 0.1 * kl["plain"]
    assert kl["rotate"] < 0.5 * kl["plain"]


@pytest.mark.parametrize("format", ["gguf", "safetensors"])
def test_files_hold_the_smoothed_model(
    format: str, tiny_model: Any, ids: torch.Tensor, tokenizer: Any, tmp_path: Path
) -> None:
    reference = copy.deepcopy(tiny_model)
    target = {"gguf": "gguf:Q8_0", "safetensors": "safetensors:int8-channel"}[format]
    pq.quantize(tiny_model, target, transforms=["fold", "smooth:alpha=0.6"], calibration=ids)
    receipt = pq.export(tiny_model, tokenizer, tmp_path, format=format)
    told = next(t["origin"]["transforms"] for t in receipt["tensors"] if "origin" in t)
    assert [one["name"] for one in told] == ["fold", "smooth"]
    assert told[1]["alpha"] == 0.6
    assert pq.verify(tmp_path).ok
    loaded, _ = pq.load(tmp_path)
    assert distance(loaded, tiny_model, ids) < 1e-9
    assert distance(loaded, reference, ids) < 1e-2


@pytest.mark.parametrize(
    ("text", "message"), [("smooth:alpha=2", "between 0 and 1"), ("smooth:pairs=norms", "none of the pairs qkv, o")]
)
def test_refusals(text: str, message: str, tiny_model: Any, ids: torch.Tensor) -> None:
    with pytest.raises(PhiquantError, match=message):
        pq.transform(tiny_model, text, calibration=ids)


def test_inputs_that_are_not_finite(tiny_model: Any, ids: torch.Tensor) -> None:
    tiny_model.model.layers[0].mlp.gate_up_proj.weight.data[0, 0] = float("inf")
    before = tiny_model.model.norm.weight.clone()
    with pytest.raises(PhiquantError, match="not finite"):
        pq.transform(tiny_model, "smooth", calibration=ids)
    assert torch.equal(before, tiny_model.model.norm.weight)
