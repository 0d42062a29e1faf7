"""AWQ: the search against its formula in float64, folds on every shape, what is exported."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import phiquant as pq
import pytest
import torch
from phiquant.modules import QuantizedLinear
from phiquant.statistics import Statistics
from phiquant.transforms.awq import awq, search
from phiquant.transforms.inputs import input_statistics
from phiquant.transforms.pairs import Pair, pairs

INT4 = pq.spec("int4-g32-sym")
PLAIN = Pair("norm", slice(0, 64), "linear")
GROUPED = Pair("qkv", slice(0, 32), "o_proj", (2, 2))  # two value heads of 16, each read by two query heads


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 4096, (6, 40), generator=torch.Generator().manual_seed(0))


def layer(outliers: float = 20.0) -> tuple[torch.Tensor, torch.Tensor, Statistics]:
    """(w [48, 64], x [400, 64] with some large channels, that channels of w undo, statistics)."""
    generator = torch.Generator().manual_seed(3)
    w, x = torch.randn(48, 64, generator=generator) * 0.05, torch.randn(400, 64, generator=generator)
    large = torch.tensor([5, 21, 22, 40])
    w[:, large] /= outliers
    x[:, large] *= outliers
    statistics = Statistics(64)
    statistics.update(x)
    return w, x, statistics


def oracle(w: np.ndarray, x: np.ndarray, heads: tuple[int, int]) -> tuple[np.ndarray, float]:
    """(s for every column, relative error): nearest int4 codes in groups of 32, errors from the inputs themselves."""
    count, readers = heads

    def per_channel(columns: np.ndarray) -> np.ndarray:
        mean = columns.reshape(count, readers, -1).mean(1, keepdims=True)
        return np.broadcast_to(mean, (count, readers, mean.shape[2])).ravel()

    size, weight = per_channel(np.abs(x).mean(0)), per_channel(np.abs(w).mean(0))
    tried = [size**a for a in np.arange(21) / 20] + [size**a / weight ** (1 - a) for a in np.arange(20) / 20]
    errors = []
    for s in tried:
        s /= np.sqrt(s.max() * s.min())
        groups = (w * s).reshape(len(w), -1, 32)
        step = np.abs(groups).max(2, keepdims=True) / 7
        rounded = (np.round(groups / step) * step).reshape(w.shape) / s
        errors.append((((rounded - w) @ x.T) ** 2).sum() / ((w @ x.T) ** 2).sum())
    return tried[int(np.argmin(errors))], float(min(errors))


@pytest.mark.parametrize("pair", [PLAIN, GROUPED], ids=["plain", "grouped"])
@pytest.mark.parametrize("outliers", [1.0, 20.0])
def test_the_search_is_the_papers(pair: Pair, outliers: float) -> None:
    w, x, statistics = layer(outliers)
    found = search(w, [(slice(None), INT4)], statistics, pair, solver="rtn")
    s, error = oracle(w.double().numpy(), x.double().numpy(), pair.heads)
    assert len(found.s) == pair.rows.stop
    np.testing.assert_allclose(pair.columns(found.s), s, rtol=2e-4)
    assert found.error == pytest.approx(error, rel=1e-3)
    assert found.error < (0.2 if outliers > 1 and pair is PLAIN else 1.0) * found.plain


@pytest.mark.parametrize("text", ["uint4-g32-asym", "nf4-g32-sym", "gguf:Q4_0", "int4-tensor-sym", "codebook16-row"])
def test_any_grid_and_never_worse_than_without(text: str) -> None:
    w, _, statistics = layer()
    spec = pq.target(text).spec if ":" in text else pq.spec(text)
    found = search(w, [(slice(None), spec)], statistics, PLAIN)
    assert found.error < 0.7 * found.plain


def test_rows_that_stay_in_float_do_not_count() -> None:
    w, _, statistics = layer()
    some = search(w, [(slice(0, 16), INT4)], statistics, PLAIN)
    wild = w.clone()
    wild[16:] *= torch.randn(32, 64)
    assert torch.equal(search(wild, [(slice(0, 16), INT4)], statistics, PLAIN).s, some.s)
    both = search(w, [(slice(0, 16), INT4), (slice(16, 48), pq.spec("int8-g32-sym"))], statistics, PLAIN)
    assert both.plain < some.plain


def test_dead_and_infinitely_quiet_channels() -> None:
    w, x, _ = layer()
    x[:, :3] = 0
    w[:, 3] = 0
    statistics = Statistics(64)
    statistics.update(x)
    found = search(w, [(slice(None), INT4)], statistics, PLAIN)
    assert bool(found.s.isfinite().all() & (found.s > 0).all())
    nothing = Statistics(64)
    nothing.update(torch.zeros(8, 64))
    assert torch.equal(search(w, [(slice(None), INT4)], nothing, PLAIN).s, torch.ones(64))


@torch.no_grad()
def test_inputs_are_those_of_the_float_model(make_phi3: Callable[..., Any], ids: torch.Tensor) -> None:
    model = make_phi3(num_hidden_layers=2, vocab_size=512, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    ids = ids % 512
    reference = copy.deepcopy(model)
    expected = {n: Statistics(m.in_features) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    for name, statistics in expected.items():
        reference.get_submodule(name).register_forward_pre_hook(lambda _, x, s=statistics: s.update(x[0]))
    reference(ids, use_cache=False)
    names = []
    for seen in input_statistics(model, ids):
        for name, statistics in seen.items():
            names.append(name)
            assert statistics.tokens == ids.numel()
            torch.testing.assert_close(statistics.hessian, expected[name].hessian, rtol=1e-3, atol=1e-2)
            if name != "lm_head":
                model.get_submodule(name).weight.mul_(3)  # what was yielded may be rewritten
    assert sorted(names) == sorted(expected)


@pytest.mark.parametrize("tied", [False, True])
def test_every_pair_with_codes_is_rescaled_and_no_other(
    make_phi3: Callable[..., Any], ids: torch.Tensor, tied: bool
) -> None:
    model = make_phi3(num_hidden_layers=1, tie_word_embeddings=tied)
    before = copy.deepcopy(model.state_dict())
    recipe = pq.Recipe(
        {"lm_head": INT4, "*embed_tokens": INT4} if tied else {"lm_head": INT4, "*o_proj": "float"}, INT4
    )
    specs = recipe.resolve([n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Embedding)])
    awq(model, ids, specs)
    changed = {
        n.removesuffix(".weight") for n, value in model.state_dict().items() if not torch.equal(value, before[n])
    }
    expected = {p for pair in pairs(model) for p in (pair.producer, pair.consumer) if specs[pair.consumer]}
    assert changed == expected


def test_the_solver_is_the_transform_then_clip(tiny_model: Any, ids: torch.Tensor) -> None:
    recipe = {"*v_proj": "int8-g32-sym", "*gate_proj": "float"}
    recipe = pq.Recipe(recipe, "int3-g32-sym")
    one = pq.quantize(copy.deepcopy(tiny_model), recipe, "awq", calibration=ids)
    two = pq.quantize(tiny_model, recipe, "clip", calibration=ids, transforms=["awq"])
    layers = {n: m for n, m in one.named_modules() if isinstance(m, QuantizedLinear)}
    assert any(n.endswith("v_proj") for n in layers)
    for name, found in layers.items():
        assert found.quantized.digests() == two.get_submodule(name).quantized.digests()
        assert found.weight_quantizer.origin["transforms"][0]["name"] == "awq"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_twin_is_made_whole(phi3_tiny: tuple[Any, Any], dtype: torch.dtype) -> None:
    """On the twin much of what rounding adds to the output goes away, and the function stays."""
    model, tokenizer = phi3_tiny
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    twin = pq.testing.outlier_twin(model).to(dtype)
    ids = pq.calibrate.token_windows(pq.testing.training_text(20_000), tokenizer)[:4]
    reference = copy.deepcopy(twin)
    pq.transform(twin, "awq", calibration=ids)
    told = pq.transforms.applied(twin)[0]
    assert told["tokens"] == 2048
    assert told["error_to_plain"] < 0.7
    with torch.no_grad():
        ours, theirs = twin(ids[:1]).logits, reference(ids[:1]).logits
    assert (ours - theirs).abs().max() < (1e-5 if dtype == torch.float32 else 5e-2) * theirs.abs().max()


@pytest.mark.parametrize("target", ["gguf:Q4_0", "safetensors:int4-g32"])
def test_files_hold_the_rescaled_norms(
    tiny_model: Any, tokenizer: Any, ids: torch.Tensor, tmp_path: Path, target: str
) -> None:
    before = tiny_model.model.layers[0].input_layernorm.weight.detach().clone()
    pq.quantize(tiny_model, target, "awq", calibration=ids)
    receipt = pq.export(tiny_model, tokenizer, tmp_path, format=target.partition(":")[0])
    assert pq.verify(tmp_path).ok
    told = [t["origin"]["transforms"][0] for t in receipt["tensors"] if "origin" in t]
    assert len(told) >= 8
    assert all(one["name"] == "awq" and one["tokens"] == ids.numel() for one in told)
    stored = pq.load(tmp_path)[0].model.layers[0].input_layernorm.weight
    assert torch.equal(stored, tiny_model.model.layers[0].input_layernorm.weight)
    assert not torch.equal(stored, before)
