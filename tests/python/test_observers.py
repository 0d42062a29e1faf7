"""Observers against torch's own reductions; merging, state and awkward input."""

from __future__ import annotations

import pytest
import torch
from phiquant import EmaObserver, MinMaxObserver

SPECS = ["int8-tensor-sym", "uint8-channel-asym", "int4-g32-sym"]


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(8, 64, generator=generator) * (i + 1) for i in range(4)]


@pytest.mark.parametrize("text", SPECS)
def test_min_max_over_all_batches(text: str) -> None:
    observer = MinMaxObserver(text)
    for x in batches():
        assert observer(x) is x
    blocks = {"int8-tensor-sym": 1, "uint8-channel-asym": 8, "int4-g32-sym": 16}[text]
    everything = torch.stack(batches()).reshape(4, blocks, -1)
    assert torch.equal(observer.lo.flatten(), everything.amin((0, 2)))
    assert torch.equal(observer.hi.flatten(), everything.amax((0, 2)))


@pytest.mark.parametrize("text", SPECS)
def test_two_halves_merged_give_what_one_pass_gives(text: str) -> None:
    whole, first, second = (MinMaxObserver(text) for _ in range(3))
    for i, x in enumerate(batches()):
        whole(x)
        (first, second)[i % 2](x)
    first.merge(second)
    assert torch.equal(first.lo, whole.lo)
    assert torch.equal(first.hi, whole.hi)
    first.merge(MinMaxObserver(text))  # of one that saw nothing
    assert torch.equal(first.lo, whole.lo)


def test_ema_follows_the_formula() -> None:
    observer = EmaObserver("int8-tensor-sym", momentum=0.1)
    expected = None
    for x in batches():
        observer(x)
        expected = x.amax() if expected is None else expected + 0.1 * (x.amax() - expected)
    assert torch.allclose(observer.hi.flatten(), expected.reshape(1))


@pytest.mark.parametrize("make", [MinMaxObserver, EmaObserver])
def test_state_survives_and_continues(make: type) -> None:
    first, second, unbroken = make("int4-g32-sym"), make("int4-g32-sym"), make("int4-g32-sym")
    for x in batches()[:2]:
        first(x)
        unbroken(x)
    second.load_state_dict(first.state_dict())
    for x in batches()[2:]:
        second(x)
        unbroken(x)
    assert torch.equal(second.lo, unbroken.lo)
    assert torch.equal(second.hi, unbroken.hi)


@pytest.mark.parametrize("make", [MinMaxObserver, EmaObserver])
def test_empty_and_nan_batches_change_nothing(make: type) -> None:
    observer = make("int8-tensor-sym")
    assert not observer.seen
    observer(torch.empty(0, 64))
    assert not observer.seen
    observer(torch.tensor([[1.0, -2.0]]))
    observer(torch.full((1, 2), float("nan")))
    assert observer.lo.item() == -2.0
    assert observer.hi.item() == 1.0


def test_parameters_are_those_of_the_range() -> None:
    observer = MinMaxObserver("uint8-tensor-asym")
    with pytest.raises(RuntimeError, match="seen no values"):
        observer.parameters_of_range()
    observer(torch.tensor([[-1.0, 4.1]]))
    scale, zero_point, minimum = observer.parameters_of_range()
    assert scale.item() == pytest.approx(5.1 / 255)
    assert zero_point.item() == 50
    assert minimum is None


def test_a_tensor_of_another_shape_is_refused() -> None:
    observer = MinMaxObserver("int8-channel-sym")
    observer(torch.randn(4, 8))
    with pytest.raises(ValueError, match=r"ranges of shape \[4, 1\], this tensor needs \[5, 1\]"):
        observer(torch.randn(5, 8))


def test_momentum_is_checked() -> None:
    with pytest.raises(ValueError, match=r"momentum must be in \(0, 1\], got 0"):
        EmaObserver("int8-tensor-sym", momentum=0)
