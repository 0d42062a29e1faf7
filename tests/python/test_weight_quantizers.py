"""Every way to train a grid: what trains is what converts; gradients against float64 autograd of the formula."""

from __future__ import annotations

import math

import phiquant as pq
import pytest
import torch
from phiquant import LearnedClipping, LearnedCodebook, LearnedFakeQuantize, TrainedScales
from phiquant.fake_quant import KnownGrid
from phiquant.weight_quantizers import CONTINUED, MAKERS, for_codes, for_weight, into_cells
from torch import Tensor, nn

INTEGERS = ["int3-g32-sym-f16", "uint4-g32-min-f16", "uint4-channel-asym", "gguf:Q4_0", "int4-tensor-sym"]
OTHERS = ["nf4-g32-sym", "fp8_e4m3-channel-sym", "fp4_e2m1-g32-sym-bf16", "iq4nl-g32-signmax-f16", "binary-channel-sym",
          "ternary-channel-sym", "codebook8-row", "codebook4-g32"]  # fmt: skip
TWO_LEVELS = ["q4_k", "q3_k", "nvfp4", "vsq4"]
CASES = [
    *[(range, text) for range in ("learned", "lsq", "lsq+") for text in INTEGERS],
    *[("clip", text) for text in [*INTEGERS, "nf4-g32-sym", "fp4_e2m1-g32-sym", "iq4nl-g32-signmax-f16"]],
    *[(range, text) for range in ("learned", "scales") for text in [*OTHERS, *TWO_LEVELS]],
    *[("scales", text) for text in INTEGERS],
    ("ternary", "codebook3-tensor"),
    ("observer", "int4-g32-sym"),
    ("tensor", "gguf:Q4_0"),
    ("mse", "q4_k"),
]


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stored(text: str, w: Tensor) -> pq.QuantizedTensor:
    return pq.quantize_tensor(w, text, "kmeans" if "codebook" in text else "mse")


@pytest.mark.parametrize(("range", "text"), CASES)
def test_what_trains_is_what_converts(range: str, text: str) -> None:
    """Trained towards another weight: the loss falls, parameters move, the codes decode to the last forward."""
    w, target = nn.Parameter(gaussian(8, 256) * 0.05), gaussian(8, 256) * 0.08 + 0.01 * gaussian(8, 256, seed=9)
    quantizer = for_weight("layer", w, pq.spec(text), range)
    learned = list(pq.learned_parameters(quantizer))
    weights = [w] if getattr(quantizer, "moves_weights", True) else []
    optimizer = torch.optim.Adam([{"params": weights, "lr": 3e-3}, *pq.learned_groups(quantizer, 0.02)])
    before = [p.detach().clone() for p in learned]
    losses = []
    for _ in torch.arange(12):
        loss = (quantizer(w) - target).square().sum()
        optimizer.zero_grad()
        loss.backward()
        assert bool(weights) == (w.grad is not None)
        optimizer.step()
        losses.append(loss.item())
    assert min(losses) < losses[0]  # binary and ternary jump about at these rates
    assert all(not torch.equal(a, b) for a, b in zip(before, learned, strict=True))
    assert bool(learned) == (range not in ("tensor", "observer", "mse"))
    quantized = quantizer.eval().quantize(w.detach())
    assert quantized.spec == pq.spec(text)
    assert torch.equal(quantized.dequantize(), quantizer(w))
    again = for_weight("layer", w, pq.spec(text), range)
    again.load_state_dict(quantizer.state_dict())
    assert torch.equal(again.eval()(w), quantizer(w))


@pytest.mark.parametrize("range", ["learned", "scales"])
@pytest.mark.parametrize("text", [*INTEGERS, *OTHERS, *TWO_LEVELS])
def test_going_on_from_codes_begins_with_these_codes(range: str, text: str) -> None:
    w = gaussian(8, 256) * 0.05
    given = stored(text, w)
    values = given.dequantize()
    quantizer = for_codes("layer", given, range)
    assert torch.equal(quantizer(values), values)
    assert torch.equal(quantizer.quantize(values).dequantize(), values)
    assert isinstance(for_codes("layer", given, "mse"), KnownGrid)


@pytest.mark.parametrize("text", ["nf4-channel-sym", "fp4_e2m1-channel-sym", "fp8_e4m3-channel-sym"])
def test_gradients_of_floats_and_tables_equal_float64_autograd(text: str) -> None:
    """y = s c(x / s): the estimator passes x / s where x is in range, the end of the range is a constant."""
    x, g = gaussian(5, 64), gaussian(5, 64, seed=1)
    learned = LearnedFakeQuantize(text, x.shape)
    with torch.no_grad():
        learned.scale.copy_(0.4 + 0.05 * gaussian(5, 1).abs())
    learned.initialized.fill_(True)
    leaf = x.clone().requires_grad_()
    learned(leaf).backward(g)
    wide, scale = x.double().requires_grad_(), learned.scale.detach().double().requires_grad_()
    levels = learned(x).detach().double() / scale.detach()
    inside = (leaf.grad != 0).double()
    v = wide / scale
    y = scale * ((levels - (v * inside).detach()) + v * inside)
    y.backward(g.double())
    assert 0 < inside.mean() <= 1
    torch.testing.assert_close(leaf.grad.double(), wide.grad, rtol=1e-5, atol=1e-6)
    size = learned.gradient_scale(x)
    torch.testing.assert_close(learned.scale.grad.double() / size, scale.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("text", ["int4-g32-sym", "uint4-g32-min", "uint4-channel-asym", "q4_k", "nvfp4"])
def test_gradients_where_codes_stay_equal_autograd_of_the_decode(text: str) -> None:
    given = stored(text, gaussian(4, 256))
    trained, g = TrainedScales(given), gaussian(4, 256, seed=1)
    trained(torch.zeros(4, 256)).backward(g)
    codes, groups = given.codes, given.scales.numel()
    levels = codes.view(torch.float8_e4m3fn) if given.spec.element.bits == 8 else codes
    if text == "nvfp4":
        table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        levels = torch.where(codes < 8, table[codes.long() % 8], -table[codes.long() % 8])
    scale, minimum = (
        None if p is None else p.detach().double().requires_grad_() for p in (trained.scale, trained.offset)
    )
    if given.super_scales is not None:
        wide = (scale.reshape(-1, 1) * given.scales.double().reshape(scale.numel(), -1)).reshape(groups, 1)
        low = 0.0 if minimum is None else (
            minimum.reshape(-1, 1) * given.minimums.double().reshape(scale.numel(), -1)).reshape(groups, 1)  # fmt: skip
        y = wide * levels.double().reshape(groups, -1) - low
    else:
        zero = 0 if given.zero_points is None else given.zero_points.reshape(groups, 1)
        y = scale.reshape(groups, 1) * (levels.double().reshape(groups, -1) - zero)
        y = y if given.minimums is None else y + minimum.reshape(groups, 1)
    y.backward(g.double().reshape(groups, -1))
    size = trained.gradient_scale(g)
    torch.testing.assert_close(trained.scale.grad.double() / size, scale.grad, rtol=1e-5, atol=1e-4)
    if trained.offset is not None and trained.offset.requires_grad:
        torch.testing.assert_close(trained.offset.grad.double() / size, minimum.grad, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("fixed", [False, True])
def test_gradients_of_levels_are_sums_over_their_clusters(fixed: bool) -> None:
    w, g = gaussian(6, 40), gaussian(6, 40, seed=1)
    given = stored("codebook4-row", w)
    learned, leaf = LearnedCodebook(given, fixed), w.clone().requires_grad_()
    learned(leaf).backward(g)
    sums = torch.zeros(6, 4).scatter_add_(1, given.codes.long(), g)
    torch.testing.assert_close(learned.codebook.grad, sums)
    inside = (w >= given.codebook[:, :1]) & (w <= given.codebook[:, -1:])
    assert (leaf.grad is None) if fixed else torch.equal(leaf.grad[inside], g[inside])


def test_levels_that_crossed_are_sorted_and_their_codes_renamed() -> None:
    given = stored("codebook4-row", gaussian(6, 40))
    learned = LearnedCodebook(given, fixed=True)
    with torch.no_grad():
        learned.codebook.neg_()
    quantized = learned.quantize(gaussian(6, 40))
    assert torch.equal(quantized.dequantize(), -given.dequantize())
    assert (quantized.codebook.diff(dim=1) >= 0).all()


@pytest.mark.parametrize("text", ["int4-g32-sym", "gguf:Q4_0", "uint4-g32-min", "uint4-channel-asym"])
def test_clipping_reaches_its_share_of_the_extremes(text: str) -> None:
    """OmniQuant's range in float64, at shares of 0.7 and 0.6, and its gradient by autograd of the whole formula."""
    x, g = gaussian(4, 64).double(), gaussian(4, 64, seed=1)
    clip, spec = LearnedClipping(text, (4, 64)), pq.spec(text)
    shares = {"upper": 0.7, "lower": 0.6}
    with torch.no_grad():
        for name, share in shares.items():
            if getattr(clip, name) is not None:
                getattr(clip, name).fill_(math.log(share / (1 - share)))
    rows = x.reshape(clip.upper.numel(), -1)
    raw = {name: torch.full((len(rows), 1), math.log(s / (1 - s)), dtype=torch.double, requires_grad=True)
           for name, s in shares.items()}  # fmt: skip
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    largest = torch.where(high > -low, high, low)
    qmin, qmax = spec.element.qmin, spec.element.qmax
    if spec.offset == "none":
        scale = raw["upper"].sigmoid() * (largest / qmin if spec.anchor == "signed_absmax" else largest.abs() / qmax)
        bottom = 0.0
    else:
        bottom = raw["lower"].sigmoid() * low
        scale = (raw["upper"].sigmoid() * high - bottom) / (qmax - qmin)
    found, zero, minimum = clip.in_use(x.float())
    precision = 1e-3 if spec.scale_dtype == "float16" else 1e-5
    torch.testing.assert_close(found.double().reshape(-1, 1), scale, rtol=precision, atol=0)
    if minimum is not None:
        torch.testing.assert_close(minimum.double().reshape(-1, 1), bottom, rtol=1e-5, atol=1e-6)
    if zero is not None:
        torch.testing.assert_close(zero.double().reshape(-1, 1), (qmin - bottom / scale).round(), rtol=0, atol=0)
    if spec.offset == "zero_point":
        return  # its gradient passes through a rounded zero point
    v = (rows - bottom) / scale
    q = v.round().clamp(qmin, qmax).detach()
    inside = ((v.round() >= qmin) & (v.round() <= qmax)).detach()
    y = scale * torch.where(inside, v + (q - v).detach(), q) + bottom
    y.backward(g.double().reshape(len(rows), -1))
    clip(x.float()).backward(g)
    torch.testing.assert_close(clip.upper.grad.double().reshape(-1, 1), raw["upper"].grad, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("text", ["int3-g32-sym", "nf4-g32-sym", "q4_k", "codebook8-row"])
def test_weights_go_as_far_as_their_codes_allow(text: str) -> None:
    w = gaussian(8, 256)
    given = stored(text, w + 0.3 * gaussian(8, 256, seed=1))  # codes that are not the nearest
    quantizer = for_codes("layer", given, "learned")
    moved = given.dequantize()
    into_cells(moved, w, quantizer)
    assert torch.equal(quantizer.quantize(moved).codes, given.codes)
    assert (moved - w).abs().mean() < 0.6 * (given.dequantize() - w).abs().mean()
    near = quantizer.quantize(w).codes == given.codes
    assert torch.equal(moved[near], w[near])
    assert 0.3 < near.float().mean() < 1


@pytest.mark.parametrize(
    ("range", "text", "message"),
    [
        ("learned", "mxfp4", "layer.weight.*range='mse'"),
        ("clip", "q4_k", "layer.weight.*range='learned' or 'mse'"),
        ("clip", "ternary-channel-sym", "a mean of"),
        ("ternary", "int4-channel-sym", "use codebook3-tensor, not int4"),
        ("guess", "int4-g32-sym", "range is 'tensor', .* or 'scales', not 'guess'"),
        ("learned", "int4-g48-sym", "layer.weight.*does not divide"),
    ],
)
def test_what_cannot_be_trained_says_what_would_do(range: str, text: str, message: str) -> None:
    with pytest.raises(pq.PhiquantError, match=message):
        for_weight("layer", gaussian(8, 256), pq.spec(text), range)


def test_every_range_is_tried_here() -> None:
    assert {range for range, _ in CASES} == set(MAKERS)
    assert set(CONTINUED) <= set(MAKERS)


def test_a_model_of_another_dtype_keeps_the_grid_of_what_is_learned() -> None:
    for range, text in (("ternary", "codebook3-tensor"), ("clip", "int4-g32-sym"), ("learned", "q4_k")):
        w = gaussian(8, 256)
        quantizer = for_weight("layer", w, pq.spec(text), range)
        before = quantizer(w)
        quantizer.to(torch.bfloat16)
        assert torch.equal(quantizer(w), before)
