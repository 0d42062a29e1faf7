"""Ranges of activations: the program of models/decoder.py against transformers, and what observers make of it."""

import numpy as np
import phiquant as pq
import pytest
import torch
import torch.nn.functional as F
from phiquant import activations, testing
from phiquant.model_source import ModelSource
from phiquant.models import decoder, phi

LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75,
    "short_factor": [1.0 + 0.05 * i for i in range(12)], "long_factor": [1.5 + 0.4 * i for i in range(12)],
}  # fmt: skip
MODELS = {
    "plain": {},
    "window": {"sliding_window": 16},
    "longrope": {
        "rope_parameters": LONGROPE, "original_max_position_embeddings": 32, "max_position_embeddings": 128,
    },
    "tied": {"tie_word_embeddings": True, "num_key_value_heads": 4},
    "one head": {"num_key_value_heads": 1},
}  # fmt: skip


def ids(windows=2, tokens=48, seed=0):
    return torch.randint(0, 4000, (windows, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def run(model, row):
    """Logits by the program, in torch."""
    run = activations._Run(ModelSource(model, None), len(row), "minmax")
    hidden = F.embedding(row, run.weight(f"{phi.EMBEDDING}.weight"))
    for index in range(model.config.num_hidden_layers):
        hidden = decoder.layer(run, run.sizes, index, hidden)
    return run.linear(run.norm(hidden, phi.FINAL_NORM), phi.HEAD)


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
@torch.no_grad()
def test_the_program_computes_what_transformers_does(config):
    model = testing.random_phi3(**config)
    for tokens in (24, 48):  # on both sides of the window, and of the border between LongRoPE's factors
        row = ids(1, tokens)[0]
        expected = model(row[None], use_cache=False).logits[0]
        assert (run(model, row) - expected).norm() <= 2e-6 * expected.norm()


def test_a_quantized_model_is_run_on_its_codes():
    model = testing.random_phi3()
    pq.quantize(model, "qnn:a16w4")
    row = ids(1)[0]
    with torch.no_grad():
        expected = model(row[None], use_cache=False).logits[0]
    assert (run(model, row) - expected).norm() <= 2e-6 * expected.norm()


@torch.no_grad()
def test_min_max_ranges_are_the_extremes_of_what_the_modules_give():
    model, windows = testing.random_phi3(), ids()
    seen = {}
    for name, module in model.named_modules():
        if name.endswith(("o_proj", "down_proj", "layernorm", "model.norm", "lm_head")):
            module.register_forward_hook(lambda m, a, out, name=name: seen.setdefault(name, []).append(out))
    for row in windows:
        model(row[None], use_cache=False)
    ranges = activations.observe(ModelSource(model, None), windows)
    for name, values in seen.items():
        lo, hi = ranges.points[name]
        assert lo == pytest.approx(float(torch.cat(values).min()), rel=1e-4)
        assert hi == pytest.approx(float(torch.cat(values).max()), rel=1e-4)
    assert ranges.tokens == windows.numel()


def test_ranges_are_the_same_again():
    model, windows = testing.random_phi3(), ids()
    source = ModelSource(model, None)
    assert activations.observe(source, windows) == activations.observe(source, windows)


@pytest.mark.parametrize("kind", ["percentile", "mse", "kl"])
def test_other_observers_find_ranges_within_the_extremes(kind):
    source, windows = ModelSource(testing.random_phi3(), None), ids(1)
    widest = activations.observe(source, windows).points
    found = activations.observe(source, windows, kind).points
    assert set(found) == set(widest)
    narrower = [found[p][1] - found[p][0] <= widest[p][1] - widest[p][0] + 1e-6 for p in found]
    assert np.mean(narrower) > (0.3 if kind == "kl" else 0.99)  # kl cuts to [-T, T], which may be wider on one side


def test_infinite_activations_and_unknown_observers_are_refused():
    model = testing.random_phi3()
    source = ModelSource(model, None)
    with pytest.raises(pq.PhiquantError, match=r"unknown observer 'median'; known: minmax"):
        activations.observe(source, ids(), "median")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1e39)
    with pytest.raises(pq.PhiquantError, match=r"model\.layers\.1\.mlp\.down_proj: .* not finite"):
        activations.observe(ModelSource(model, None), ids())
