"""The small classifier that examples are tried on."""

from __future__ import annotations

import sys

import pytest
import torch
from phiquant import digits


def test_the_split_is_fixed_and_has_every_digit() -> None:
    train, test = digits.data()
    assert train.x.shape == (1297, 1, 8, 8)
    assert test.x.shape == (500, 1, 8, 8)
    assert train.x.dtype == torch.float32
    assert (train.x.min(), train.x.max()) == (0, 1)
    for part in (train, test):
        assert torch.bincount(part.y).min() > 30
    assert test.y[:10].tolist() == digits.data()[1].y[:10].tolist()
    everything = torch.cat([train.x, test.x]).flatten(1)
    assert len(torch.unique(everything, dim=0)) == 1797, "no image is in both parts"


def test_training_reaches_98_percent() -> None:
    model = digits.train()
    assert not model.training
    assert digits.accuracy(model) >= 0.98
    assert digits.accuracy(model, digits.data()[0]) >= 0.99


def test_training_is_the_same_every_time_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    first = digits.train(epochs=1)
    assert torch.equal(torch.rand(1), expected)
    second = digits.train(epochs=1)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_training_continues_a_given_model_and_calls_after_step() -> None:
    model, calls = digits.lenet(), []

    def freeze(m: torch.nn.Module) -> None:
        calls.append(m)
        m[0].weight.data.zero_()

    assert digits.train(model, epochs=1, batch=100, after_step=freeze) is model
    assert len(calls) == 13
    assert model[0].weight.abs().max() == 0


def test_without_scikit_learn_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.delitem(sys.modules, "sklearn.datasets", raising=False)
    with pytest.raises(ImportError, match=r"phiquant\[notebooks\]"):
        digits.data()
