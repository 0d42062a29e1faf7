"""Prune, tune, share, tune, Huffman: zeros stay zero, the file holds the model, convolutions share as linears do."""

from __future__ import annotations

import copy
from pathlib import Path

import phiquant as pq
import pytest
import torch
import torch.nn.functional as F
from phiquant import CodebookConv2d, CodebookLinear, PhiquantError, digits
from phiquant.compression.prune import sparsity
from torch import Tensor, nn


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tune(model: nn.Module, steps: int = 10) -> float:
    """A few steps on the digits with momentum and weight decay; the last loss."""
    images, labels = digits.data()[0]
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)
    for step in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images[32 * step :][:32]), labels[32 * step :][:32])
        loss.backward()
        optimizer.step()
    return loss.item()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: m.weight.detach() for n, m in model.named_modules() if hasattr(m, "weight")}


def test_zeros_stay_zero_through_the_whole_pipeline(tmp_path: Path) -> None:
    model = digits.lenet()
    zeros: dict[str, dict[str, Tensor]] = {}

    def watched(model: nn.Module) -> float:
        before = {name: w == 0 for name, w in weights(model).items()}
        loss = tune(model)
        after = weights(model)
        assert all((after[name][zero] == 0).all() for name, zero in before.items())
        zeros[type(model[0]).__name__] = before
        return loss

    report = pq.deep_compress(model, watched, tmp_path / "a.phiq", sparsity={"0": 0.25, "*": 0.75}, levels=8)
    assert list(zeros) == ["PrunedConv2d", "CodebookConv2d"]
    assert all(torch.equal(zero, zeros["CodebookConv2d"][name]) for name, zero in zeros["PrunedConv2d"].items())
    assert list(report.tuned) == ["pruned", "shared"]
    fresh = digits.lenet(seed=1)
    fresh.load_state_dict(pq.decompress(tmp_path / "a.phiq"))
    assert sparsity(fresh) == {"0": 0.25, "3": 0.75, "7": 0.75, "9": 0.75, "11": 0.75}
    images = digits.data()[1].x
    assert torch.equal(fresh(images), model(images))
    for name, weight in weights(fresh).items():
        assert len(weight.unique()) <= 8
        assert torch.equal(weight, weights(model)[name])


def test_the_file_of_a_shared_model_counts_codebooks_and_keeps_names(tmp_path: Path) -> None:
    model = pq.share_weights(digits.lenet(), 16)
    size = pq.compress(model, tmp_path / "a.phiq")
    assert size.total == (tmp_path / "a.phiq").stat().st_size
    rows = {row.name: row for row in size.tensors}
    assert set(rows) == set(digits.lenet().state_dict())
    assert all(row.parameters == 16 * 4 for name, row in rows.items() if name.endswith("weight"))
    assert size.ratio > 6
    found = pq.read_compressed(tmp_path / "a.phiq")
    assert str(found["3.weight"].spec) == "codebook16-tensor"


def test_levels_by_name_and_per_row(tmp_path: Path) -> None:
    model = digits.lenet()
    pq.share_weights(model, {"7": 16, "[39]": 4}, rows=1, keep_zero=False)
    assert [type(model[i]) for i in (0, 3, 7, 9, 11)] == [
        nn.Conv2d, CodebookConv2d, CodebookLinear, CodebookLinear, nn.Linear
    ]  # fmt: skip
    assert model[7].codebook.shape == (120, 16)
    assert model[3].codebook.shape == (32, 4)
    pq.compress(model, tmp_path / "a.phiq")
    fresh = digits.lenet(seed=1)
    fresh.load_state_dict(pq.decompress(tmp_path / "a.phiq"))
    images = digits.data()[1].x
    assert torch.equal(fresh(images), model(images))
    tune(model, 2)
    assert all(len(row.unique()) <= 4 for row in model[3].weight.detach())


@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"groups": 2, "dilation": 2, "bias": False}])
def test_a_shared_convolution_computes_and_learns_as_its_decoded_weight(options: dict) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, **options)
    shared = CodebookConv2d.from_conv(conv, 8)
    x = random(2, 4, 9, 9)
    weight = shared.weight.detach().clone().requires_grad_()
    arguments = {k: getattr(conv, k) for k in ("stride", "padding", "dilation", "groups")}
    expected = F.conv2d(x, weight, conv.bias, **arguments)
    found = shared(x)
    assert torch.equal(found, expected)
    found.square().sum().backward()
    expected.square().sum().backward()
    by_code = torch.zeros(8, dtype=torch.float64)
    by_code.index_add_(0, shared.codes.flatten().long(), weight.grad.double().flatten())
    torch.testing.assert_close(shared.codebook.grad[0].double(), by_code, rtol=1e-5, atol=1e-5)


def test_sharing_is_the_best_that_as_many_levels_can_do() -> None:
    model = digits.lenet()
    w = model[7].weight.detach().clone()
    pq.share_weights(model, {"7": 4}, keep_zero=False)
    codebook, codes = pq.kmeans(w, 4)
    assert torch.equal(model[7].weight, codebook[codes.long()])


def test_small_layers_get_no_more_levels_than_values() -> None:
    model = nn.Sequential(nn.Linear(2, 3))
    assert pq.share_weights(model, 16)[0].codebook.shape == (1, 6)


def test_copies_and_state_dicts() -> None:
    model = pq.share_weights(digits.lenet(), 8)
    other = pq.share_weights(digits.lenet(seed=1), 8)
    other.load_state_dict(model.state_dict())
    x = digits.data()[1].x[:5]
    assert torch.equal(copy.deepcopy(other)(x), model(x))


def test_errors_say_what_is_wrong() -> None:
    with pytest.raises(PhiquantError, match="is left for 'fc'; these are: 0, 3, 7, 9, 11"):
        pq.share_weights(digits.lenet(), {"fc": 4})
    with pytest.raises(PhiquantError, match="pads with zeros, not by 'reflect'"):
        pq.share_weights(nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect")))


@pytest.mark.slow
def test_the_accuracy_that_the_notebook_shows(tmp_path: Path) -> None:
    """Bars: k-means at 8 and 4 bits within 0.5 and 1.5 points of float, 2 bits after tuning within 3."""
    model = digits.train()
    reference = digits.accuracy(model)

    def clustered(bits: int) -> nn.Module:
        return pq.share_weights(copy.deepcopy(model), 2**bits, keep_zero=False)

    assert digits.accuracy(clustered(8)) >= reference - 0.005
    assert digits.accuracy(clustered(4)) >= reference - 0.015
    assert digits.accuracy(digits.train(clustered(2), epochs=10)) >= reference - 0.03

    def retrain(model: nn.Module) -> float:
        return digits.accuracy(digits.train(model, epochs=15))

    shares = {"0": 0.3, "3": 0.8, "11": 0.5, "*": 0.9}
    report = pq.deep_compress(model, retrain, tmp_path / "a.phiq", sparsity=shares, levels=8)
    assert report.tuned["shared"] >= reference - 0.02
    assert report.size.ratio > 17
