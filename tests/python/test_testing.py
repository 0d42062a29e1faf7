import copy

import phiquant as pq
import pytest
import torch
from phiquant import testing
from phiquant.errors import PhiquantError


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def test_the_twin_computes_the_same_function(tiny_model):
    ids = torch.randint(0, 4096, (2, 48), generator=torch.Generator().manual_seed(0))
    twin = testing.outlier_twin(tiny_model)
    with torch.no_grad():
        assert relative(twin(ids).logits, tiny_model(ids).logits) < 1e-5


def test_the_twin_has_three_outliers_per_norm(tiny_model):
    twin = testing.outlier_twin(tiny_model)
    for layer, before in zip(twin.model.layers, tiny_model.model.layers, strict=True):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            ratio = layer.get_submodule(norm).weight / before.get_submodule(norm).weight
            assert torch.allclose(ratio[ratio > 2], torch.tensor(30.0))
            assert (ratio > 2).sum() == 3
            assert (ratio[ratio < 2] == 1).all()


def test_the_twin_is_harder_to_quantize(phi3_tiny, short_text):
    model, tokenizer = phi3_tiny
    twin = testing.outlier_twin(model)
    text = short_text * 2
    plain = pq.evaluate.compare(pq.quantize(copy.deepcopy(model), "int4-g32-sym"), model, tokenizer, text)
    harder = pq.evaluate.compare(pq.quantize(copy.deepcopy(twin), "int4-g32-sym"), twin, tokenizer, text)
    assert harder.kl > 1.5 * plain.kl


def test_the_twin_leaves_the_original_alone(tiny_model):
    before = {name: value.clone() for name, value in tiny_model.state_dict().items()}
    testing.outlier_twin(tiny_model)
    assert all(torch.equal(before[name], value) for name, value in tiny_model.state_dict().items())


def test_the_twin_of_something_else():
    with pytest.raises(PhiquantError, match=r"no model\.layers"):
        testing.outlier_twin(torch.nn.Linear(2, 2))


def test_random_phi3_is_reproducible():
    a, b = testing.random_phi3(seed=3), testing.random_phi3(seed=3)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.lm_head.weight, testing.random_phi3(seed=4).lm_head.weight)


def test_training_and_heldout_texts_are_disjoint():
    heldout = testing.heldout_text().split(testing.END_OF_TEXT)
    training = set(testing.training_text().split(testing.END_OF_TEXT))
    assert len(heldout) > 30
    assert not training & set(heldout)


def test_training_text_stops_at_its_length():
    text = testing.training_text(characters=50_000, seed=1)
    assert 50_000 <= len(text) < 400_000
    assert text == testing.training_text(characters=50_000, seed=1)
    assert text != testing.training_text(characters=50_000, seed=2)
