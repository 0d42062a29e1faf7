"""Transforms leave the float function alone, on every shape of Phi, and receipts tell of them."""

from __future__ import annotations

import copy

import phiquant as pq
import pytest
import torch
from phiquant.miniatures import MINIATURES, miniature
from phiquant.transforms import TRANSFORMS, applied, read
from phiquant.transforms.pairs import pairs, rescale

MODELS = ("random", *MINIATURES)


def model_named(name: str):
    """In float64: what is left of a difference is the transform's own."""
    return (pq.testing.random_phi3() if name == "random" else miniature(name)[0]).double().eval()


def logits(model) -> torch.Tensor:
    ids = torch.randint(1, 1000, (2, 48), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def difference(model, reference) -> float:
    ours, theirs = logits(model), logits(reference)
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("name", MODELS)
def test_any_pair_may_be_rescaled(name):
    model = model_named(name)
    reference = copy.deepcopy(model)
    for number, pair in enumerate(pairs(model)):
        rows = pair.rows.stop - pair.rows.start
        rescale(model, pair, 2 ** torch.randn(rows, generator=torch.Generator().manual_seed(number)))
    assert difference(model, reference) < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_channels_gather_what_columns_spread(name):
    for pair in pairs(model_named(name)):
        channels = torch.arange(float(pair.rows.stop - pair.rows.start))
        assert (pair.channels(pair.columns(channels)) == channels).all()


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_factors_are_positive_and_finite(bad, tiny_model):
    pair = next(iter(pairs(tiny_model)))
    with pytest.raises(ValueError, match="positive and finite"):
        rescale(tiny_model, pair, torch.full((pair.rows.stop,), bad))


@pytest.mark.parametrize("transform", sorted(TRANSFORMS))
@pytest.mark.parametrize("name", MODELS)
def test_the_function_stays(name, transform):
    model = model_named(name)
    reference = copy.deepcopy(model)
    options = ":untie=true" if transform == "rotate" else ""  # or phi-4-mini, whose table is tied, would be refused
    pq.transform(model, transform + options, calibration=torch.arange(256).view(2, 128))
    assert difference(model, reference) < 1e-5
    assert applied(model)[0]["name"] == transform


def test_folded_norms_are_ones(tiny_model):
    pq.transform(tiny_model, "fold")
    norms = [m.weight for n, m in tiny_model.named_modules() if n.endswith("norm")]
    assert norms
    assert all((weight == 1).all() for weight in norms)


def test_receipts_tell_of_transforms(tiny_model, tokenizer, tmp_path):
    pq.quantize(tiny_model, "gguf:Q4_0", transforms=["fold"])
    receipt = pq.export(tiny_model, tokenizer, tmp_path, format="gguf")
    told = [t["origin"]["transforms"] for t in receipt["tensors"] if "origin" in t]
    assert told
    assert all(one == [{"name": "fold"}] for one in told)
    assert pq.verify(tmp_path).ok


@pytest.mark.parametrize(
    ("text", "message"), [("smoth", "unknown transform 'smoth'"), ("fold:alpha=1", "no option of the transform fold")]
)
def test_unknown_names_and_options(text, message, tiny_model):
    before = copy.deepcopy(tiny_model.state_dict())
    with pytest.raises(pq.PhiquantError, match=message):
        pq.transform(tiny_model, [*list(TRANSFORMS)[:1], text])
    assert all(torch.equal(before[name], value) for name, value in tiny_model.state_dict().items())
    with pytest.raises(pq.PhiquantError, match=message):
        read(text)


def test_only_phi_models():
    with pytest.raises(pq.PhiquantError, match="has no model"):
        pq.transform(torch.nn.Linear(4, 4), "fold")
