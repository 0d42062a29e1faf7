"""Masks against sorting, masks under every optimizer, the cubic schedule, and what stays as it was."""

from __future__ import annotations

import copy
import io

import numpy as np
import phiquant as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from phiquant import PhiquantError
from phiquant.compression.prune import GradualPruning, PrunedConv2d, PrunedLinear, magnitude_mask, sparsity
from torch import Tensor, nn

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1),
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, 0.1, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1, foreach=True),
}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 5) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        model(random(8, 1, 4, 4, seed=step)).square().mean().backward()
        optimizer.step()


def sorted_mask(w: np.ndarray, pruned: int) -> np.ndarray:
    """By a stable sort of the magnitudes: the first `pruned` in that order go."""
    mask = np.ones(w.size, bool)
    mask[np.argsort(np.abs(w.ravel()), kind="stable")[:pruned]] = False
    return mask.reshape(w.shape)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 6), st.integers(1, 24), st.floats(0, 0.999), st.integers(0, 1000), st.booleans())
def test_mask_is_that_of_a_stable_sort(n: int, k: int, share: float, seed: int, ties: bool) -> None:
    w = random(n, k, seed=seed)
    w = w.round() if ties else w
    found = magnitude_mask(w, share)
    assert np.array_equal(found.numpy(), sorted_mask(w.numpy(), int(share * n * k + 0.5)))
    rows = magnitude_mask(w, share, "row")
    assert np.array_equal(rows.numpy(), np.stack([sorted_mask(row, int(share * k + 0.5)) for row in w.numpy()]))
    assert torch.equal(magnitude_mask(w.t().contiguous().t(), share), found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_two_of_four(dtype: torch.dtype) -> None:
    w = random(8, 32).to(dtype)
    mask = magnitude_mask(w, granularity="2:4")
    groups = mask.view(8, 8, 4)
    assert (groups.sum(-1) == 2).all()
    size = w.float().abs().view(8, 8, 4)
    smallest_kept = torch.where(groups, size, torch.inf).amin(-1)
    assert (smallest_kept >= torch.where(groups, -torch.inf, size).amax(-1)).all()
    assert magnitude_mask(random(4, 2, 3, 4), granularity="1:6").view(4, 4, 6).sum(-1).eq(1).all()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_masks_hold_under_every_optimizer(name: str) -> None:
    model = network()
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer)  # momentum from before the pruning would move what is pruned
    pq.prune(model, 0.75)
    masks = {n: b.clone() for n, b in model.named_buffers()}
    before = model[3].weight.detach().clone()
    for _ in range(3):
        train(model, optimizer, 1)
        for layer in (model[0], model[3]):
            assert (layer.weight[~layer.weight_mask] == 0).all()
    assert all(torch.equal(masks[n], b) for n, b in model.named_buffers())
    assert (model[3].weight != before)[model[3].weight_mask].all()  # the others train
    assert sparsity(model) == {"0": 0.75, "3": 0.75}


def test_gradients_of_pruned_weights_are_zero_even_if_infinite() -> None:
    layer = nn.Sequential(nn.Linear(4, 4, bias=False))
    pq.prune(layer, 0.5)
    layer(torch.full((1, 4), torch.inf)).nan_to_num(1.0).backward(torch.full((1, 4), torch.inf))
    assert (layer[0].weight.grad[~layer[0].weight_mask] == 0).all()


def test_names_and_objects_stay() -> None:
    model = network()
    names, weight = list(model.state_dict()), model[3].weight
    pq.prune(model, {"3": 0.5})
    assert model[3].weight is weight
    assert type(model[3]) is PrunedLinear
    assert isinstance(model[3], nn.Linear)
    assert type(model[0]) is nn.Conv2d
    assert [n for n in model.state_dict() if n != "3.weight_mask"] == names
    assert [n for n, _ in model.named_parameters()] == names
    x = random(2, 1, 4, 4)
    expected = model(x)
    pq.finalize_pruning(model)
    assert type(model[3]) is nn.Linear
    assert model[3].weight is weight
    assert list(model.state_dict()) == names
    assert torch.equal(model(x), expected)
    assert sparsity(model)["3"] == 0.5


def test_state_dict_copies_and_pickles_go_on_holding() -> None:
    model = pq.prune(network(), 0.5)
    again = pq.prune(network(), 0.25)
    again.load_state_dict(model.state_dict())
    assert sparsity(again) == sparsity(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (again, copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        train(other, torch.optim.AdamW(other.parameters(), 0.1))
        assert sparsity(other) == {"0": 0.5, "3": 0.5}
        assert torch.equal(other[3].weight_mask, model[3].weight_mask)


def test_conv_computes_what_a_conv_with_zeros_computes() -> None:
    model = network()
    x = random(2, 1, 4, 4)
    pq.prune(model, 0.5)
    assert type(model[0]) is PrunedConv2d
    plain = network()
    with torch.no_grad():
        plain[0].weight.copy_(model[0].weight)
        plain[3].weight.copy_(model[3].weight)
    assert torch.equal(model(x), plain(x))


def test_other_optimizers_and_layers_are_left_alone() -> None:
    pruned, other = pq.prune(network(), 0.5), network()
    with torch.no_grad():
        pruned[3].weight.fill_(1.0)  # not by an optimizer of this model
    train(other, torch.optim.SGD(other.parameters(), 0.1), 1)
    assert (pruned[3].weight == 1).all()
    assert sparsity(other) == {"0": 0.0, "3": 0.0}
    assert pruned[3].masked().eq(0).double().mean() == 0.5


def test_schedule_is_cubic_and_masks_only_grow() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    schedule = GradualPruning(model, 0.8, begin=2, end=12, every=2)
    seen, last = [], torch.ones(10, 64, dtype=torch.bool)
    for _ in range(15):
        train(model, optimizer, 1)
        schedule.step()
        seen.append(sparsity(model)["3"])
        mask = model[3].weight_mask if schedule.steps >= 2 else last
        assert not (mask & ~last).any()
        last = mask.clone()
    expected = [0.8 * (1 - (1 - min(max(2 * (t // 2) - 2, 0), 10) / 10) ** 3) for t in range(1, 16)]
    assert seen == pytest.approx(expected, abs=0.5 / 640)
    assert seen[-1] == 0.8


def test_schedule_resumes() -> None:
    schedule = GradualPruning(network(), {"3": 0.5}, end=10, every=5)
    for _ in range(7):
        schedule.step()
    again = GradualPruning(schedule.model, {"3": 0.5}, end=10, every=5)
    again.load_state_dict(schedule.state_dict())
    for _ in range(3):
        again.step()
    assert sparsity(again.model) == {"0": 0.0, "3": 0.5}


def test_errors_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"0 <= s < 1, not 1\.5"):
        magnitude_mask(random(4, 4), 1.5)
    with pytest.raises(ValueError, match="not 'column'"):
        magnitude_mask(random(4, 4), 0.5, "column")
    with pytest.raises(ValueError, match="needs rows that 4 divides"):
        magnitude_mask(random(4, 6), granularity="2:4")
    with pytest.raises(ValueError, match=r"2:4 means a sparsity of 0\.5, not 0\.75"):
        magnitude_mask(random(4, 8), 0.75, "2:4")
    with pytest.raises(PhiquantError, match="no Linear or Conv2d layer is left for 'fc'"):
        pq.prune(network(), {"fc": 0.5})
    model = network()
    model[3].weight.data[1, 2] = torch.nan
    with pytest.raises(PhiquantError, match="3: the weight holds values that are not finite"):
        pq.prune(model, 0.5)
    assert type(model[0]) is nn.Conv2d  # nothing was changed
    with pytest.raises(ValueError, match="0 <= begin < end"):
        GradualPruning(model, 0.5, begin=5, end=5)
    with pytest.raises(ValueError, match="prunes at once"):
        GradualPruning(model, 0.5, end=5, granularity="2:4")


def test_empty_weight() -> None:
    assert magnitude_mask(torch.empty(0, 4), 0.5).shape == (0, 4)
    assert magnitude_mask(torch.empty(0, 4), 0.5, "row").shape == (0, 4)
