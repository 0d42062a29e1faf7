"""The torch ops against numpy, their gradients, opcheck, torch.compile, layouts, dtypes and errors."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import phiquant.ops as ops
import pytest
import reference
import torch
from phiquant import _C
from phiquant.ops.composition import KERNELS
from torch import Tensor

GRIDS = [
    pytest.param(-8, 7, "absmax", id="int4-absmax"),
    pytest.param(-8, 7, "signed_absmax", id="int4-signed-absmax"),
    pytest.param(-2, 1, "absmax", id="int2-absmax"),
    pytest.param(-128, 127, "absmax", id="int8-absmax"),
    pytest.param(0, 15, "zero_point", id="uint4-zero-point"),
    pytest.param(-4, 3, "zero_point", id="int3-zero-point"),
    pytest.param(0, 255, "zero_point", id="uint8-zero-point"),
    pytest.param(0, 15, "minimum", id="uint4-minimum"),
]
STORAGE = ["float32", "float16", "bfloat16"]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize(("qmin", "qmax", "rule"), GRIDS)
def test_range_codes_and_values_equal_numpy(level: str, qmin: int, qmax: int, rule: str, storage: str) -> None:
    x = random(6, 96)
    rows = x.numpy().reshape(-1, 32)
    scale, offset = reference.parameters(rows, qmin, qmax, rule, storage)
    minimum = rule == "minimum"
    q = reference.codes(rows, scale, offset, minimum, qmin, qmax)
    y = reference.values(q, scale, offset, minimum).reshape(6, 96)

    grid = {"qmin": qmin, "qmax": qmax}
    s, z, m = ops.choose_range(x, (6, 3), rule=rule, scale_dtype=getattr(torch, storage), **grid)
    np.testing.assert_array_equal(s.float().numpy().reshape(-1, 1), scale)
    if rule in ("zero_point", "minimum"):
        np.testing.assert_array_equal((z if m is None else m).float().numpy().reshape(-1, 1), offset)
    found = ops.quantize(x, s, z, m, **grid)
    assert found.dtype == (torch.int8 if qmin < 0 else torch.uint8)
    np.testing.assert_array_equal(found.numpy().reshape(-1, 32), q)
    for result in (
        ops.dequantize(found, s, z, m),
        ops.fake_quantize(x, s, z, m, **grid),
        ops.fake_quantize_dynamic(x, (6, 3), rule=rule, scale_dtype=getattr(torch, storage), **grid),
    ):
        np.testing.assert_array_equal(result.numpy(), y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_are_computed_in_float32(level: str, dtype: torch.dtype) -> None:
    x = random(4, 64).to(dtype)
    s, _, _ = ops.choose_range(x, (4, 2), qmin=-8, qmax=7, rule="absmax")
    wide = ops.fake_quantize(x.float(), s, qmin=-8, qmax=7)
    found = ops.fake_quantize(x, s, qmin=-8, qmax=7)
    assert found.dtype == dtype
    assert torch.equal(found, wide.to(dtype))


def test_equal_to_torch_where_torch_is_right(level: str) -> None:
    x = random(16, 64) * 3
    scale = random(16).abs() + 0.05
    zero = torch.arange(-4, 12, dtype=torch.int32)
    expected = torch.fake_quantize_per_channel_affine(x, scale, zero, 0, -8, 15)
    assert torch.equal(ops.fake_quantize(x, scale.view(16, 1), zero.view(16, 1), qmin=-8, qmax=15), expected)
    expected = torch.fake_quantize_per_tensor_affine(x, 0.1, 3, -8, 7)
    assert torch.equal(ops.fake_quantize(x, torch.tensor(0.1), torch.tensor(3), qmin=-8, qmax=7), expected)


@pytest.mark.parametrize(
    ("shape", "scale_shape"),
    [
        pytest.param((6, 8), (1, 1), id="per-tensor"),
        pytest.param((6, 8), (6, 1), id="rows"),
        pytest.param((6, 8), (6, 2), id="groups"),
        pytest.param((6, 8), (1, 8), id="columns"),
        pytest.param((2, 3, 4, 5), (1, 3, 1, 1), id="middle-axis"),
        pytest.param((2, 3, 4, 5), (2, 1, 1, 1), id="first-axis"),
        pytest.param((2, 3, 8), (2, 3, 1), id="tokens"),
    ],
)
def test_shape_of_scale_says_which_values_share_it(shape: tuple, scale_shape: tuple) -> None:
    x = random(*shape)
    scale = random(*scale_shape, seed=1).abs() + 0.1
    grouped = scale_shape == (6, 2)
    spread = scale.repeat_interleave(4, 1) if grouped else scale.expand(shape)
    expected = (x * (1 / spread)).round().clamp(-8, 7) * spread
    assert torch.equal(ops.fake_quantize(x, scale, qmin=-8, qmax=7), expected)
    codes = ops.quantize(x, scale, qmin=-8, qmax=7)
    assert torch.equal(ops.dequantize(codes, scale), expected)
    out = torch.empty_like(x)
    assert ops.fake_quantize(x, scale, qmin=-8, qmax=7, out=out) is out
    assert torch.equal(out, expected)
    lo, hi = ops.min_max(x, scale_shape)
    assert lo.shape == hi.shape == scale_shape
    if not grouped:
        axes = [i for i, n in enumerate(scale_shape) if n == 1]
        assert torch.equal(lo, x.amin(axes, keepdim=True))
        assert torch.equal(hi, x.amax(axes, keepdim=True))


def test_non_contiguous_x_and_out() -> None:
    x = random(8, 6).t()
    scale = torch.full((6, 1), 0.3)
    expected = ops.fake_quantize(x.contiguous(), scale, qmin=-8, qmax=7)
    out = torch.empty(8, 6).t()
    assert torch.equal(ops.fake_quantize(x, scale, qmin=-8, qmax=7), expected)
    assert torch.equal(ops.fake_quantize(x, scale, qmin=-8, qmax=7, out=out), expected)
    assert torch.equal(out, expected)


def test_in_place() -> None:
    x = random(4, 32)
    expected = ops.fake_quantize_dynamic(x, (4, 1), qmin=-8, qmax=7, rule="absmax")
    ops.fake_quantize_dynamic(x, (4, 1), qmin=-8, qmax=7, rule="absmax", out=x)
    assert torch.equal(x, expected)


def test_empty() -> None:
    x = torch.empty(0, 32)
    assert ops.fake_quantize_dynamic(x, (0, 1), qmin=-8, qmax=7, rule="absmax").shape == (0, 32)
    assert ops.quantize(x, torch.empty(0, 1), qmin=-8, qmax=7).shape == (0, 32)


def test_long_blocks_are_cut_without_a_trace() -> None:
    x = random(2, 200_001)
    s, z, _ = ops.choose_range(x, (2, 1), qmin=0, qmax=15, rule="zero_point")
    lo, hi = ops.min_max(x, (2, 1))
    assert torch.equal(lo, x.amin(1, keepdim=True))
    assert torch.equal(hi, x.amax(1, keepdim=True))
    expected = ((x * (1 / s)).round().add(z).clamp(0, 15) - z) * s
    assert torch.equal(ops.fake_quantize(x, s, z, qmin=0, qmax=15), expected)
    assert torch.equal(ops.fake_quantize_dynamic(x, (2, 1), qmin=0, qmax=15, rule="zero_point"), expected)


def test_result_does_not_depend_on_the_number_of_threads() -> None:
    x = random(64, 4096)
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(ops.search_range(x, (64, 128), qmin=-8, qmax=7, rule="signed_absmax")[0])
        results.append(ops.fake_quantize_dynamic(x, (1, 1), qmin=-8, qmax=7, rule="absmax"))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[3])


# --- gradients ------------------------------------------------------------------------------------


class _Reference(torch.autograd.Function):
    """The straight-through estimator, as written in the book: round and clamp, then mask."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, qmin: int, qmax: int) -> Tensor:
        v = (x * (1 / scale)).round()
        ctx.save_for_backward((v >= qmin) & (v <= qmax))
        return v.clamp(qmin, qmax) * scale

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        (inside,) = ctx.saved_tensors
        return torch.where(inside, grad, 0.0), None, None, None


def test_gradient_is_the_masked_straight_through_estimator(level: str) -> None:
    x = random(5, 64).requires_grad_()
    y = random(5, 64).requires_grad_()
    with torch.no_grad():
        y.copy_(x)
    scale = torch.full((5, 1), 0.2)
    weights = random(5, 64, seed=3)
    (ops.fake_quantize(x, scale, qmin=-4, qmax=3) * weights).sum().backward()
    (_Reference.apply(y, scale, -4, 3) * weights).sum().backward()
    assert torch.equal(x.grad, y.grad)
    assert 0 < (x.grad == 0).sum() < x.numel()


def test_dynamic_gradient_masks_what_the_anchor_leaves_outside(level: str) -> None:
    # The anchor is the positive extreme, so codes end at -7 * |s| on the other side... and clip there.
    x = torch.tensor([[8.0, -8.0, -7.4, 1.0] + [0.0] * 28], requires_grad=True)
    with torch.no_grad():
        x[0, 1] = -7.9
    y = ops.fake_quantize_dynamic(x, (1, 1), qmin=-8, qmax=7, rule="signed_absmax")
    y.sum().backward()
    assert y[0, 0] == 8.0
    assert y[0, 1] == -7.0
    assert x.grad[0].tolist()[:4] == [1.0, 0.0, 1.0, 1.0]


def test_an_infinite_gradient_outside_the_range_becomes_zero() -> None:
    x = torch.tensor([10.0, 0.0], requires_grad=True)
    ops.fake_quantize(x, torch.tensor(1.0), qmin=-8, qmax=7).backward(torch.tensor([float("inf"), 2.0]))
    assert x.grad.tolist() == [0.0, 2.0]


def test_nothing_but_the_input_is_kept_for_backward() -> None:
    weight = torch.nn.Parameter(random(64, 64))
    saved: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        ops.fake_quantize_dynamic(weight, (64, 2), qmin=-8, qmax=7, rule="absmax")
    assert [t.data_ptr() for t in saved] == [weight.data_ptr()]


def test_second_backward_and_gradient_accumulation() -> None:
    x = random(2, 32).requires_grad_()
    for _ in range(2):
        ops.fake_quantize_dynamic(x, (2, 1), qmin=-8, qmax=7, rule="absmax").sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 2.0))


# --- torch's own checks ---------------------------------------------------------------------------


def _samples() -> list[tuple[str, tuple]]:
    x = random(4, 64).requires_grad_()
    plain = x.detach()
    scale = torch.full((8,), 0.1)
    offset = torch.full((8,), 1.0)
    dynamic = (32, -8, 7, 1, 2)
    return [
        ("quantize", (plain, scale, offset, False, -8, 7)),
        ("dequantize_out", (plain.to(torch.int8), scale, None, False, torch.empty(4, 64))),
        ("fake_quantize", (x, scale, None, False, -8, 7)),
        ("fake_quantize", (x, scale, offset, True, 0, 15)),
        ("fake_quantize_out", (plain, scale, None, False, -8, 7, torch.empty(4, 64))),
        ("fake_quantize_backward", (plain, plain, scale, None, False, -8, 7)),
        ("quantize_dynamic", (plain, *dynamic)),
        ("quantize_dynamic", (plain, 64, 0, 15, 3, 1)),
        ("fake_quantize_dynamic", (x, *dynamic)),
        ("fake_quantize_dynamic_out", (plain, *dynamic, torch.empty(4, 64))),
        ("fake_quantize_dynamic_backward", (plain, plain, *dynamic)),
        ("min_max", (plain, 32)),
        ("choose_range", (plain, *dynamic)),
        ("search_range", (plain, *dynamic, False)),
        ("search_range", (plain, *dynamic, True)),
        ("range_from_min_max", (-scale, scale, 0, 15, 2, 0)),
    ]


@pytest.mark.parametrize(("name", "arguments"), _samples(), ids=lambda v: v if isinstance(v, str) else "")
def test_opcheck(name: str, arguments: tuple) -> None:
    torch.library.opcheck(getattr(torch.ops.phiquant, name).default, arguments)


def test_compile_whole_graph() -> None:
    def step(x: Tensor, scale: Tensor) -> Tensor:
        fixed = ops.fake_quantize(x, scale, qmin=-8, qmax=7)
        return (fixed + ops.fake_quantize_dynamic(x, (4, 2), qmin=-8, qmax=7, rule="signed_absmax")).square().sum()

    scale = torch.full((4, 1), 0.2)
    eager = random(4, 64).requires_grad_()
    compiled = eager.detach().clone().requires_grad_()
    expected = step(eager, scale)
    expected.backward()
    found = torch.compile(step, fullgraph=True, backend="aot_eager")(compiled, scale)
    found.backward()
    assert torch.equal(found, expected)
    assert torch.equal(compiled.grad, eager.grad)


# search_range runs in its CPU kernel for tensors of every device
COMPOSED = [sample for sample in _samples() if sample[0] != "search_range"]


@pytest.mark.parametrize(("name", "arguments"), COMPOSED, ids=lambda v: v if isinstance(v, str) else "")
def test_composition_for_other_devices_gives_the_same_bits(name: str, arguments: tuple) -> None:
    composed = next(k for k in KERNELS if k.__name__ == name)
    arguments = tuple(a.detach() if isinstance(a, Tensor) else a for a in arguments)
    if name.endswith("_out"):
        outs = [torch.full_like(arguments[-1], 7.0) for _ in range(2)]
        getattr(torch.ops.phiquant, name).default(*arguments[:-1], outs[0])
        composed(*arguments[:-1], outs[1])
        assert torch.equal(*outs)
        return
    kernel, other = getattr(torch.ops.phiquant, name).default(*arguments), composed(*arguments)
    for a, b in zip(*((r if isinstance(r, tuple) else (r,)) for r in (kernel, other)), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize(("qmin", "qmax", "rule"), GRIDS)
def test_composition_on_awkward_values(qmin: int, qmax: int, rule: str) -> None:
    inf = float("inf")
    special = torch.tensor([0.0, -0.0, inf, -inf, float("nan"), 1e30, -1e30, 1e-40, 0.5, 2.5, -2.5, 65520.0])
    x = random(6, 32)
    x[:, : len(special)] = special[torch.randperm(len(special), generator=torch.Generator().manual_seed(1))]
    x[4] = float("nan")
    x[5] = 0.0
    by_name = {k.__name__: k for k in KERNELS}
    for storage in range(3):
        arguments = (32, qmin, qmax, ops.RULES[rule], storage)
        found = torch.ops.phiquant.fake_quantize_dynamic.default(x, *arguments)
        expected = by_name["fake_quantize_dynamic"](x, *arguments)
        assert torch.equal(found.view(torch.int32), expected.view(torch.int32))


def test_no_kernel_is_missing_from_the_composition() -> None:
    text = (Path(__file__).parents[2] / "csrc/ops/schemas.cpp").read_text(encoding="utf-8")
    assert {k.__name__ for k in KERNELS} == set(re.findall(r'"(\w+)\(', text))


# --- errors ---------------------------------------------------------------------------------------


def test_errors_say_what_is_wrong() -> None:
    x = random(4, 30)
    with pytest.raises(ValueError, match=r"scale of shape \[4, 4\] does not divide x of shape \[4, 30\]"):
        ops.fake_quantize(x, torch.ones(4, 4), qmin=-8, qmax=7)
    with pytest.raises(ValueError, match="x must be float32, bfloat16 or float16"):
        ops.quantize(x.double(), torch.ones(4, 1), qmin=-8, qmax=7)
    with pytest.raises(ValueError, match="8 bits: got qmin -8, qmax 300"):
        ops.quantize(x, torch.ones(4, 1), qmin=-8, qmax=300)
    with pytest.raises(ValueError, match="not both"):
        ops.quantize(x, torch.ones(4, 1), torch.ones(4, 1), torch.ones(4, 1), qmin=0, qmax=7)
    with pytest.raises(ValueError, match="out= records no gradient"):
        ops.fake_quantize(x.requires_grad_(), torch.ones(4, 1), qmin=-8, qmax=7, out=torch.empty(4, 30))
    with pytest.raises(ValueError, match="out must be"):
        ops.fake_quantize(x.detach(), torch.ones(4, 1), qmin=-8, qmax=7, out=torch.empty(4, 31))
    with pytest.raises(ValueError, match="unknown CPU level 'sse9'"):
        _C.set_cpu_level("sse9")
