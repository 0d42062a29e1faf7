"""Integer products and requantization against numpy's 64-bit integers, fractions and torch's float64 convolution."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import phiquant.ops as ops
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from phiquant import _C
from torch import Tensor

LEVELS = _C.build_info()["cpu_levels"]


def at_every_level(run):
    """The results of run() at each level; AssertionError unless they are the same bits."""
    before, results = _C.cpu_level(), []
    try:
        for name in LEVELS:
            _C.set_cpu_level(name)
            results.append(run())
    finally:
        _C.set_cpu_level(before)
    assert all(torch.equal(result, results[0]) for result in results)
    return results[0]


# gemmlowp's definitions (fixedpoint/fixedpoint.h) in Python's integers, which do not overflow


def doubling_high(a: int, b: int) -> int:
    if a == b == -(2**31):
        return 2**31 - 1
    nudge = 2**30 if a * b >= 0 else 1 - 2**30
    total = a * b + nudge
    return abs(total) // 2**31 * (1 if total >= 0 else -1)  # C's division truncates


def rounding_shift(v: int, n: int) -> int:
    mask = 2**n - 1
    return (v >> n) + ((v & mask) > (mask >> 1) + (v < 0))


def multiply(v: int, multiplier: int, shift: int) -> int:
    if shift >= 0:
        return rounding_shift(doubling_high(v, multiplier), shift)
    return doubling_high(min(max(v << -shift, -(2**31)), 2**31 - 1), multiplier)


def requantized(sums: np.ndarray, multiplier: Tensor, shift: Tensor, zero: int, lo: int, hi: int) -> np.ndarray:
    ms = list(zip(multiplier.tolist(), shift.tolist(), strict=True))
    rows = [[min(max(multiply(int(v), *m) + zero, lo), hi) for v, m in zip(r, ms, strict=True)] for r in sums]
    return np.array(rows).reshape(sums.shape)


@settings(max_examples=200, deadline=None)
@given(st.floats(0, 2.0**31, allow_nan=False, allow_infinity=False, allow_subnormal=True))
def test_a_multiplier_is_the_nearest_of_31_bits(real: float) -> None:
    multiplier, shift = (int(t) for t in ops.quantize_multiplier(torch.tensor(real, dtype=torch.float64)))
    assert -30 <= shift <= 31
    if multiplier == 0:
        assert real < 2.0**-32
    elif real < 2.0**30:
        assert 2**30 <= multiplier < 2**31
        assert abs(Fraction(multiplier) / 2**31 / Fraction(2) ** shift - Fraction(real)) <= Fraction(2) ** (-32 - shift)


def test_a_multiplier_must_be_a_number_not_below_zero() -> None:
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="value 1 is"):
            ops.quantize_multiplier(torch.tensor([1.0, bad]))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=40),
    st.floats(2.0**-33, 2.0**20),
    st.integers(-128, 255),
    st.booleans(),
)
def test_requantization_is_gemmlowps(values: list[int], real: float, zero: int, signed: bool) -> None:
    lo, hi = (-128, 127) if signed else (0, 255)
    multiplier, shift = ops.quantize_multiplier(torch.tensor([real], dtype=torch.float64))
    sums = torch.tensor(values, dtype=torch.int32)[:, None]
    found = at_every_level(lambda: ops.requantize(sums, multiplier, shift, zero_point=zero, qmin=lo, qmax=hi))
    assert found.dtype == (torch.int8 if signed else torch.uint8)
    np.testing.assert_array_equal(found.numpy(), requantized(sums.numpy(), multiplier, shift, zero, lo, hi))
    exact = np.clip([round(Fraction(v) * Fraction(real)) + zero for v in values], lo, hi)
    assert np.abs(found.numpy()[:, 0].astype(int) - exact).max() <= 1


def random_codes(seed: int, *shape: int, signed: bool, extreme: bool = False) -> Tensor:
    rng = np.random.default_rng(seed)
    lo, hi = (-128, 127) if signed else (0, 255)
    values = rng.choice([lo, hi], shape) if extreme else rng.integers(lo, hi + 1, shape)
    return torch.from_numpy(values.astype(np.int8 if signed else np.uint8))


def exact_sums(x: Tensor, zx: int, w: Tensor, zw: Tensor | None, bias: Tensor | None) -> np.ndarray:
    a, b = x.numpy().astype(np.int64) - zx, w.numpy().astype(np.int64)
    if zw is not None:
        b = b - zw.numpy().astype(np.int64)[:, None]
    return a @ b.T + (0 if bias is None else bias.numpy().astype(np.int64))


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_sums_and_codes_are_exact(data: st.DataObject) -> None:
    m, n, k = (
        data.draw(st.integers(lo, hi), label=name) for name, lo, hi in (("M", 0, 20), ("N", 1, 140), ("K", 0, 70))
    )
    x_signed, w_signed, zero_points, with_bias, extreme, y_signed = (data.draw(st.booleans()) for _ in range(6))
    seed = data.draw(st.integers(0, 2**16))
    rng = np.random.default_rng(seed)
    x = random_codes(seed, m, k, signed=x_signed, extreme=extreme)
    w = random_codes(seed + 1, n, k, signed=w_signed, extreme=extreme)
    zx = int(rng.integers(-128, 128) if x_signed else rng.integers(0, 256))
    lo, hi = (-128, 128) if w_signed else (0, 256)
    zw = torch.from_numpy(rng.integers(lo, hi, n).astype(np.int32)) if zero_points else None
    bias = torch.from_numpy(rng.integers(-(10**6), 10**6, n).astype(np.int32)) if with_bias else None
    weight = ops.pack_weight(w, zw)
    expected = exact_sums(x, zx, w, zw, bias)
    sums = at_every_level(lambda: ops.linear_sums(x, zx, weight, bias))
    assert sums.dtype == torch.int32
    np.testing.assert_array_equal(sums.numpy(), expected)

    multiplier, shift = ops.quantize_multiplier(torch.from_numpy(10.0 ** rng.uniform(-6, 1, n)))
    grid = {
        "zero_point": int(rng.integers(-100, 100)),
        "qmin": -128 if y_signed else 0,
        "qmax": 127 if y_signed else 255,
    }
    codes = at_every_level(lambda: ops.linear_codes(x, zx, weight, bias, multiplier, shift, **grid))
    assert codes.dtype == (torch.int8 if y_signed else torch.uint8)
    assert torch.equal(codes, ops.requantize(sums, multiplier, shift, **grid))
    np.testing.assert_array_equal(codes.numpy(), requantized(expected, multiplier, shift, *grid.values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("zero_points", [True, False])
def test_floats_have_a_scale_for_each_row(level: str, dtype: torch.dtype, signed: bool, zero_points: bool) -> None:
    x, w = random_codes(0, 19, 37, signed=signed), random_codes(1, 70, 37, signed=True)
    rng = np.random.default_rng(2)
    xs, ws, bias = (rng.normal(size=size).astype(np.float32) for size in (19, 70, 70))
    zx = rng.integers(0, 100, 19).astype(np.int32) if zero_points else None
    found = ops.linear_floats(
        x,
        torch.from_numpy(xs),
        None if zx is None else torch.from_numpy(zx),
        ops.pack_weight(w),
        torch.from_numpy(ws),
        torch.from_numpy(bias),
        dtype=dtype,
    )
    a = x.numpy().astype(np.int64) - (0 if zx is None else zx[:, None])
    expected = (a @ w.numpy().astype(np.int64).T).astype(np.float32) * ws * xs[:, None] + bias
    assert found.dtype == dtype
    assert torch.equal(found, torch.from_numpy(expected).to(dtype))


def test_weights_with_zero_points_have_no_float_product() -> None:
    weight = ops.pack_weight(random_codes(0, 3, 4, signed=False))
    with pytest.raises(ValueError, match="quantize them symmetrically"):
        ops.linear_floats(random_codes(1, 2, 4, signed=True), torch.ones(2), None, weight, torch.ones(3))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_convolution_is_torchs_in_float64(data: st.DataObject) -> None:
    pair = st.tuples(st.integers(1, 3), st.integers(1, 3))
    kernel, stride, dilation = (data.draw(pair, label=name) for name in ("kernel", "stride", "dilation"))
    padding = data.draw(st.tuples(st.integers(0, 3), st.integers(0, 3)), label="padding")
    groups = data.draw(st.integers(1, 3), label="groups")
    c, n = groups * data.draw(st.integers(1, 5)), groups * data.draw(st.integers(1, 20))
    batch = data.draw(st.integers(0, 2))
    least = [max(1, d * (k - 1) + 1 - 2 * p) for d, k, p in zip(dilation, kernel, padding, strict=True)]
    height, width = (data.draw(st.integers(size, size + 6)) for size in least)
    x_signed, w_signed = data.draw(st.booleans()), data.draw(st.booleans())
    rng = np.random.default_rng(data.draw(st.integers(0, 2**16)))
    x = random_codes(1, batch, height, width, c, signed=x_signed)
    w = random_codes(2, n, *kernel, c // groups, signed=w_signed)
    zx = int(rng.integers(-128, 128) if x_signed else rng.integers(0, 256))
    zw = torch.from_numpy(rng.integers(-9, 9, n).astype(np.int32)) if data.draw(st.booleans()) else None
    bias = torch.from_numpy(rng.integers(-5000, 5000, n).astype(np.int32))
    multiplier, shift = ops.quantize_multiplier(torch.from_numpy(10.0 ** rng.uniform(-5, -2, n)))
    grid = {"zero_point": 11, "qmin": 0, "qmax": 255}
    window = {"kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    weight = ops.pack_weight(w.reshape(n, -1), zw, groups=groups)
    found = at_every_level(lambda: ops.conv2d_codes(x, zx, weight, bias, multiplier, shift, **window, **grid))

    real_w = w.double() - (0 if zw is None else zw.double()[:, None, None, None])
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    exact = F.conv2d((x.double() - zx).permute(0, 3, 1, 2), real_w.permute(0, 3, 1, 2), bias.double(), **options)
    sums = exact.permute(0, 2, 3, 1)
    assert found.shape == sums.shape
    expected = requantized(sums.reshape(-1, n).long().numpy(), multiplier, shift, *grid.values())
    np.testing.assert_array_equal(found.reshape(-1, n).numpy(), expected)


def test_any_strides_are_right() -> None:
    x, w = random_codes(0, 24, 40, signed=False), random_codes(1, 30, 24, signed=True)
    weight = ops.pack_weight(w.t().contiguous().t())
    expected = exact_sums(x.t().contiguous(), 3, w, None, None)
    np.testing.assert_array_equal(ops.linear_sums(x.t(), 3, weight).numpy(), expected)


def test_two_threads_give_the_same() -> None:
    x, w = random_codes(0, 400, 130, signed=True), random_codes(1, 200, 130, signed=False)
    weight = ops.pack_weight(w)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        found = ops.linear_sums(x, 5, weight)
    finally:
        torch.set_num_threads(before)
    np.testing.assert_array_equal(found.numpy(), exact_sums(x, 5, w, None, None))


OPCHECK = ("test_schema", "test_faketensor")


def test_opcheck() -> None:
    phiquant = torch.ops.phiquant
    multiplier, shift = ops.quantize_multiplier(torch.full((5,), 0.01))
    weight = ops.pack_weight(random_codes(0, 5, 18, signed=False))
    both = (weight.packed, weight.sums)
    x = random_codes(1, 3, 18, signed=True)
    bias, floats = torch.zeros(5, dtype=torch.int32), torch.ones(5)
    grid = (multiplier, shift, 3, 0, 255)
    image = random_codes(2, 1, 4, 5, 2, signed=False)
    window = ([3, 3], [1, 1], [1, 1], [1, 1], 1)
    for op, arguments in (
        (phiquant.quantize_multiplier, (torch.rand(2, 3, dtype=torch.float64),)),
        (phiquant.pack_weight, (random_codes(0, 5, 7, signed=True),)),
        (phiquant.requantize, (torch.zeros(4, 5, dtype=torch.int32), *grid)),
        (phiquant.linear_sums, (x, 0, *both, weight.zero_points, bias)),
        (phiquant.linear_codes, (x, 0, *both, weight.zero_points, None, *grid)),
        (phiquant.linear_floats, (x, torch.ones(3), None, *both, floats, floats, 1)),
        (phiquant.conv2d_codes, (image, 9, *both, weight.zero_points, bias, *window, *grid)),
    ):
        torch.library.opcheck(op.default, arguments, test_utils=OPCHECK)


def test_mistakes_are_named() -> None:
    x, weight = random_codes(0, 3, 8, signed=False), ops.pack_weight(random_codes(1, 5, 8, signed=True))
    multiplier, shift = ops.quantize_multiplier(torch.ones(5))
    grid = {"zero_point": 0, "qmin": 0, "qmax": 255}
    with pytest.raises(ValueError, match="x must be uint8 or int8"):
        ops.linear_sums(x.float(), 0, weight)
    with pytest.raises(ValueError, match="packed does not hold weights of 5 rows of 16 codes"):
        ops.linear_sums(random_codes(0, 3, 16, signed=False), 0, weight)
    with pytest.raises(ValueError, match="bias must be contiguous int32 with 5 values"):
        ops.linear_sums(x, 0, weight, torch.zeros(5))
    with pytest.raises(ValueError, match="what quantize_multiplier makes"):
        ops.linear_codes(x, 0, weight, None, multiplier, shift + 40, **grid)
    image = random_codes(2, 1, 1, 1, 8, signed=False)
    with pytest.raises(ValueError, match="larger than the padded image"):
        ops.conv2d_codes(image, 0, weight, None, multiplier, shift, kernel=(2, 1), **grid)
    with pytest.raises(ValueError, match="x_zero must be a code of x"):
        ops.conv2d_codes(image, -1, weight, None, multiplier, shift, kernel=(1, 1), **grid)
