"""Learned scales: the formulas in float64 as an oracle, torch's own defect, what trains is what converts."""

from __future__ import annotations

import math

import phiquant as pq
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from phiquant import _C, LearnedFakeQuantize, TrainedTernary, ops
from phiquant.ops import learned as learned_ops
from torch import Tensor, nn

INT4 = {"qmin": -8, "qmax": 7}


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def formula(x: Tensor, scale: Tensor, zero: Tensor | float, low: Tensor | float, qmin: int, qmax: int) -> Tensor:
    """The papers' formula in float64, its roundings passed straight through; autograd does the rest.

    x [blocks, block], scale, zero, low [blocks, 1]. Inside the range the estimator passes q too, so v is not
    detached there; where q is clamped nothing of x passes.
    """
    v = (x - low) / scale
    rounded = v + (v.round() - v).detach()
    inside = (v.round() + zero >= qmin) & (v.round() + zero <= qmax)
    clamped = torch.where(v.round() + zero < qmin, qmin - zero, qmax - zero)
    return scale * torch.where(inside, rounded, clamped) + low


def away_from_ties(x: Tensor, scale: Tensor, low: Tensor | float = 0.0) -> Tensor:
    """x without values that float32 and float64 may round to different codes."""
    v = (x.double() - low) / scale.double()
    near = ((v - v.floor()) - 0.5).abs() < 1e-4
    return torch.where(near, x + 0.01 * scale, x)


@pytest.mark.parametrize("level", _C.build_info()["cpu_levels"])
@pytest.mark.parametrize("kind", ["none", "zero_point", "minimum"])
@pytest.mark.parametrize("shape", [(6, 320), (3, 70_001), (300, 32)], ids=str)
def test_gradients_equal_float64_autograd_of_the_formula(shape: tuple[int, int], kind: str, level: str) -> None:
    blocks = shape[0]
    scale = 0.2 + 0.2 * torch.rand(blocks, 1, generator=torch.Generator().manual_seed(1))
    zero = torch.randint(-5, 5, (blocks, 1), generator=torch.Generator().manual_seed(2)).float()
    low = -0.5 + 0.1 * gaussian(blocks, 1, seed=3)
    x = away_from_ties(gaussian(*shape), scale, low if kind == "minimum" else 0.0)
    g = gaussian(*shape, seed=4)
    offset = {"none": None, "zero_point": zero, "minimum": low}[kind]
    wide = [t.double().requires_grad_() for t in (x, scale, zero, low)]
    formula(wide[0], wide[1], wide[2] if kind == "zero_point" else 0.0, wide[3] if kind == "minimum" else 0.0, -8, 7
            ).backward(g.double())  # fmt: skip
    before = _C.cpu_level()
    _C.set_cpu_level(level)
    try:
        mine = [None if t is None else t.clone().requires_grad_() for t in (x, scale, offset)]
        named = {"zero_point": mine[2]} if kind == "zero_point" else {"minimum": mine[2]}
        y = ops.learned_fake_quantize(mine[0], mine[1], **named, **INT4)
        assert torch.equal(y, ops.fake_quantize(x, scale, **dict.fromkeys(named, offset), **INT4))
        y.backward(g)
    finally:
        _C.set_cpu_level(before)
    expected = [wide[0].grad, wide[1].grad]
    if offset is not None:
        expected.append(wide[2].grad if kind == "zero_point" else wide[3].grad)
    for found, wanted in zip(mine, expected, strict=False):
        error = (found.grad.double() - wanted).norm() / wanted.norm()
        assert error < 1e-5


def test_torch_has_the_wrong_mask_for_negative_zero_points() -> None:
    """torch's learnable op per tensor, in its backward, takes z = -3 for -2: it adds 0.5 and truncates towards zero.

    Its own forward clips at -5 and 10 steps; its gradient passes at -5.5 to -6.5 and not at 9.5 to 10.5. On torch
    2.13.0 that is 22 of 241 points, 20 for z = -2.4; with positive zero points, and per channel, only ties differ.
    """
    x = torch.linspace(-12, 12, 241)[None]
    scale, zero = torch.ones(1), torch.tensor([-3.0])
    theirs, ours = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = torch._fake_quantize_learnable_per_tensor_affine(theirs, scale, zero, -8, 7, 1.0)
    mine = ops.learned_fake_quantize(ours, scale[:, None], zero[:, None], **INT4)
    assert torch.equal(y, mine)
    y.sum().backward()
    mine.sum().backward()
    right = (x.round() - 3 >= -8) & (x.round() - 3 <= 7)
    assert torch.equal(ours.grad != 0, right)
    wrong = (theirs.grad != 0) != right
    assert wrong.sum() >= 20
    assert wrong[(x > -6.45) & (x < -5.55)].all()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 5),
    cols=st.integers(1, 40),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    transposed=st.booleans(),
    special=st.sampled_from([float("nan"), float("inf"), 1e-40, 0.0]),
)
def test_any_shape_stride_and_dtype(rows: int, cols: int, dtype: torch.dtype, transposed: bool, special: float) -> None:
    """The values of strided 16-bit input are those of its contiguous float32 copy; dx is a selection, so exact."""
    base = gaussian(cols, rows).t() if transposed else gaussian(rows, cols)
    x = base.to(dtype)
    if x.numel():
        x[0, 0] = special
    g = gaussian(rows, cols, seed=1).to(dtype)
    scale = torch.full((rows, 1), 0.25)
    results = []
    for value, grad in ((x, g), (x.float().contiguous(), g.float())):
        leaf, s = value.detach().clone(memory_format=torch.preserve_format).requires_grad_(), scale.clone()
        s.requires_grad_()
        y = ops.learned_fake_quantize(leaf, s, **INT4)
        y.backward(grad)
        results.append((y.to(dtype), leaf.grad.to(dtype), s.grad))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_threads_and_devices_without_kernels() -> None:
    x, g = gaussian(2, 200_000), gaussian(2, 200_000, seed=1)
    scale = torch.full((2,), 0.3)
    before = torch.get_num_threads()
    runs = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        runs.append(torch.ops.phiquant.learned_fake_quantize_backward(g, x, scale, None, False, -8, 7))
    torch.set_num_threads(before)
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)
    dx, dscale, clipped = learned_ops._composed_backward(g, x, scale, None, False, -8, 7)
    assert torch.equal(dx, runs[0][0])
    torch.testing.assert_close(dscale, runs[0][1], rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(clipped, runs[0][2], rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("minimum", [False, True])
def test_opcheck(minimum: bool) -> None:
    x = gaussian(4, 16).requires_grad_()
    scale = torch.full((4,), 0.3, requires_grad=True)
    offset = torch.zeros(4, requires_grad=True)
    torch.library.opcheck(torch.ops.phiquant.learned_fake_quantize.default, (x, scale, offset, minimum, -8, 7, 0.5))
    torch.library.opcheck(
        torch.ops.phiquant.learned_fake_quantize_backward.default,
        (gaussian(4, 16), x.detach(), scale.detach(), offset.detach(), minimum, -8, 7),
    )


def test_where_all_is_clamped_the_function_is_smooth_and_gradients_are_numeric() -> None:
    """y = s qmax: the one smooth piece, so the finite difference exists; float32 allows 1e-3."""
    x = torch.tensor([[30.0, 40.0, -50.0]])
    scale = torch.tensor([[1.5]], requires_grad=True)
    ops.learned_fake_quantize(x, scale, **INT4).sum().backward()
    h = 0.25
    low, high = (ops.fake_quantize(x, scale.detach() + d, **INT4).sum() for d in (-h, h))
    assert math.isclose(scale.grad.item(), (high - low).item() / (2 * h), rel_tol=1e-3)


# --- the module ---------------------------------------------------------------------------------------

SPECS = ["int4-channel-sym", "int3-g32-sym-f16", "int4-tensor-sym", "uint4-g32-min-f16", "uint4-channel-asym",
         "gguf:Q4_0", "int4-g32-sym-bf16"]  # fmt: skip


@pytest.mark.parametrize("start", ["lsq", "lsq+", "mse"])
@pytest.mark.parametrize("text", SPECS)
def test_what_trains_is_what_quantizes(text: str, start: str) -> None:
    """After training, the codes on the stored grid decode to exactly the forward pass; the scale moved, positive."""
    w = nn.Parameter(gaussian(8, 64) * 0.05)
    learned = LearnedFakeQuantize(text, w.shape, start=start)
    target = gaussian(8, 64, seed=9) * 0.05
    learned.initialize(w)
    first = learned.scale.detach().clone()
    optimizer = torch.optim.Adam([w, *learned.parameters()], lr=1e-3)
    losses = []
    for _ in range(30):
        loss = (learned(w) - target).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert not torch.equal(learned.scale, first)
    quantized = learned.quantize(w)
    assert quantized.scales.dtype == getattr(torch, learned.spec.scale_dtype)
    assert torch.equal(quantized.dequantize(), learned(w))


def test_starts_are_the_papers() -> None:
    w = gaussian(4, 200) + 0.1
    lsq = LearnedFakeQuantize("int4-channel-sym", w.shape)
    lsq.initialize(w)
    torch.testing.assert_close(lsq.scale.flatten(), 2 * w.abs().mean(1) / math.sqrt(7))
    plus = LearnedFakeQuantize("int4-channel-sym", w.shape, start="lsq+")
    plus.initialize(w)
    mean, std = w.mean(1), w.std(1, correction=0)
    torch.testing.assert_close(plus.scale.flatten(), torch.maximum((mean - 3 * std).abs(), (mean + 3 * std).abs()) / 8)
    assert math.isclose(lsq.gradient_scale(w), 1 / math.sqrt(200 * 7))


@pytest.mark.parametrize("text", ["int4-tensor-sym", "int4-tensor-sym-f16"])
def test_a_scale_stays_positive(text: str) -> None:
    """Pushed below zero, it is used by its magnitude, never under the smallest stored number, and comes back."""
    learned = LearnedFakeQuantize(text)
    x = gaussian(4, 32)
    learned.initialize(x)
    for raw in (-0.3, 0.0, 1e-30, -1e-30):
        with torch.no_grad():
            learned.scale.fill_(raw)
        used, _, _ = learned.in_use()
        assert used.item() > 0
        learned.zero_grad()
        learned(x).square().sum().backward()
        assert torch.isfinite(learned.scale.grad).all()
    with torch.no_grad():
        learned.scale.fill_(-0.3)
    learned.zero_grad()
    learned(x).square().sum().backward()
    twin = LearnedFakeQuantize(text)
    twin.initialize(x)
    with torch.no_grad():
        twin.scale.fill_(0.3)
    twin(x).square().sum().backward()
    assert torch.equal(learned.scale.grad, -twin.scale.grad)


def test_activations_start_from_the_first_batch() -> None:
    """LSQ+ on what leaves a shifted ReLU: half precision in and out, one scale and one beta for the tensor."""
    learned = LearnedFakeQuantize("uint4-tensor-min")
    x = F.relu(gaussian(16, 3, 32)) - 0.2
    y = learned(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert learned.initialized
    assert learned.offset.item() == pytest.approx(-0.2, abs=0.05)
    y.float().sum().backward()
    assert learned.scale.grad is not None
    assert learned.offset.grad is not None


def test_state_and_dtype_survive() -> None:
    w = gaussian(8, 64)
    learned = LearnedFakeQuantize("gguf:Q4_0", w.shape, start="mse")
    learned.initialize(w)
    other = LearnedFakeQuantize("gguf:Q4_0", w.shape)
    other.load_state_dict(learned.state_dict())
    assert torch.equal(other(w), learned(w))
    assert learned.half().scale.dtype == torch.float32
    assert torch.equal(learned(w), other(w))
    assert len(list(pq.learned_parameters(nn.Sequential(learned, TrainedTernary())))) == 3


def test_refusals() -> None:
    for text, message in (
        ("int8-token-sym", "tokens come and go"),
        ("mxfp4", "too far apart.*range='mse'"),
        ("codebook16-row", "has levels to learn, no scale"),
        ("int1-tensor-asym", "one bit has no positive code"),
        ("int4-channel-sym", "give the shape"),
    ):
        with pytest.raises(ValueError, match=message):
            LearnedFakeQuantize(text)
    with pytest.raises(ValueError, match="start is"):
        LearnedFakeQuantize("int4-tensor-sym", start="zero")
    with pytest.raises(ValueError, match="not finite"):
        LearnedFakeQuantize("int4-tensor-sym")(torch.tensor([1.0, float("nan")]))
    with pytest.raises(ValueError, match="not both"):
        ops.learned_fake_quantize(gaussian(2, 2), torch.ones(2, 1), torch.zeros(2, 1), torch.zeros(2, 1), **INT4)


# --- TTQ ----------------------------------------------------------------------------------------------


def test_ternary_gradients_are_those_of_the_formula() -> None:
    x, g = gaussian(9, 40), gaussian(9, 40, seed=1)
    module = TrainedTernary(0.2)
    module.initialize(x)
    leaf = x.clone().requires_grad_()
    module(leaf).backward(g)
    positive, negative = (p.detach().double().requires_grad_() for p in (module.positive, module.negative))
    d = 0.2 * x.abs().max()
    y = torch.where(x > d, positive, torch.where(x < -d, -negative, torch.zeros(())))
    y.backward(g.double())
    torch.testing.assert_close(module.positive.grad.double(), positive.grad, rtol=1e-6, atol=0)
    torch.testing.assert_close(module.negative.grad.double(), negative.grad, rtol=1e-6, atol=0)
    slope = torch.where(x > d, module.positive.detach(), torch.where(x < -d, module.negative.detach(), torch.ones(())))
    assert torch.equal(leaf.grad, g * slope)


def test_ternary_trains_and_converts() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(16, 8, bias=False)
    inputs, teacher = gaussian(256, 16, seed=2), gaussian(8, 16, seed=3).sign() * 0.7
    pq.modules.to_qat(layer, TrainedTernary(0.05))
    layer.weight_quantizer.initialize(layer.weight)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    losses = []
    for _ in range(150):
        loss = (layer(inputs) - inputs @ teacher.t()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]
    assert layer.weight_quantizer.positive.item() == pytest.approx(0.7, abs=0.05)
    quantized = layer.weight_quantizer.quantize(layer.weight)
    assert torch.equal(quantized.dequantize(), layer.weight_quantizer(layer.weight))
    assert quantized.codebook.shape == (1, 3)
