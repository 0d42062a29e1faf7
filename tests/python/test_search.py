"""The range of least squared error, against dense scales in numpy's float64 and against theorems."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from phiquant import _C, ops, quantize_tensor, spec
from phiquant.observers import range_arguments
from torch import Tensor

INT4 = {"qmin": -8, "qmax": 7}


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def errors(x: Tensor, scale: Tensor, zero_point: Tensor | None = None, qmin: int = -8, qmax: int = 7) -> np.ndarray:
    """Squared error of each block [blocks] in float64, of the values that the codes decode to."""
    y = ops.fake_quantize(x, scale, zero_point, qmin=qmin, qmax=qmax)
    return (y.double() - x.double()).square().reshape(scale.numel(), -1).sum(1).numpy()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("size", [16, 32, 128, 300])
def test_exact_is_as_good_as_a_dense_search_of_scales(bits: int, size: int) -> None:
    """10 000 scales from half of to twice the min-max scale, each block, all in float64.

    1e-4: a scale replaces the grid search's only if it is better by more than fp32 sums can be wrong.
    """
    qmin, qmax = -(1 << bits - 1), (1 << bits - 1) - 1
    x = gaussian(6, size)
    scale, _, _ = ops.search_range(x, (6, 1), qmin=qmin, qmax=qmax, rule="absmax", exact=True)
    found = errors(x, scale, qmin=qmin, qmax=qmax)
    for row, error in zip(x.double().numpy(), found, strict=True):
        scales = np.abs(row).max() / max(qmax, 1) * np.linspace(0.3, 2.0, 10_000)[:, None]
        decoded = scales * np.clip(np.rint(row / scales), qmin, qmax)
        assert error <= np.square(decoded - row).sum(1).min() * (1 + 1e-4)


@pytest.mark.parametrize("level", _C.build_info()["cpu_levels"])
@pytest.mark.parametrize("text", ["int4-g32-sym", "gguf:Q4_0", "int3-g32-signmax-bf16", "uint4-g32-asym", "gguf:Q4_1"])
def test_exact_is_never_above_grid_is_never_above_min_max(text: str, level: str) -> None:
    """Block by block and without a tolerance."""
    before = _C.cpu_level()
    _C.set_cpu_level(level)
    try:
        w = gaussian(32, 256, seed=3) * 0.02
        plain, grid, exact = (
            (quantize_tensor(w, text, solver=s).dequantize().double() - w.double()).square().view(-1, 32).sum(1)
            for s in ("rtn", "mse", "mse_exact")
        )
    finally:
        _C.set_cpu_level(before)
    assert (grid <= plain).all()
    assert (exact <= grid).all()
    assert exact.sum() < 0.999 * grid.sum()


def test_signed_absmax_tries_both_signs() -> None:
    """One value of 8 steps on the side of the other sign: the scale that holds it exactly is negative."""
    x = torch.tensor([[8.0, -7.0, 3.0, 1.0] + [0.0] * 28])
    for exact in (False, True):
        scale, _, _ = ops.search_range(x, (1, 1), **INT4, rule="signed_absmax", scale_dtype=torch.float16, exact=exact)
        assert scale.item() == -1.0
        assert errors(x, scale)[0] == 0.0


def test_zero_points_of_four_bits_are_searched_too() -> None:
    """Values 1 to 15 and -0.25: the range widened to hold zero wastes a code that the search gives up."""
    x = gaussian(64, 32, seed=5) + 0.7
    grid_range = {"qmin": 0, "qmax": 15, "rule": "zero_point"}
    found = {}
    for name, exact in (("grid", False), ("exact", True)):
        scale, zero, _ = ops.search_range(x, (64, 1), **grid_range, exact=exact)
        found[name] = errors(x, scale, zero, 0, 15)
    assert (found["exact"] <= found["grid"]).all()
    for block in range(4):
        row = x[block].double().numpy()
        least = np.inf
        for z in range(16):
            scales = np.linspace(0.02, 1.0, 4000)[:, None]
            decoded = scales * (np.clip(np.rint(row / scales) + z, 0, 15) - z)
            least = min(least, np.square(decoded - row).sum(1).min())
        assert found["exact"][block] <= least * (1 + 1e-6)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    values=st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), min_size=24, max_size=24),
    rule=st.sampled_from(["absmax", "signed_absmax", "zero_point", "minimum"]),
    exact=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_any_values(values: list[float], rule: str, exact: bool, dtype: torch.dtype) -> None:
    """A scale is NaN exactly where a value is not finite; strides and levels change nothing."""
    x = torch.tensor(values).to(dtype).reshape(3, 8)
    limits = {"qmin": 0, "qmax": 15} if rule in ("zero_point", "minimum") else INT4
    scale, _, _ = ops.search_range(x, (3, 1), **limits, rule=rule, exact=exact)
    assert torch.equal(scale.isnan().flatten(), ~x.isfinite().all(1))
    strided = torch.empty(8, 3, dtype=dtype).t().copy_(x)
    assert torch.equal(ops.search_range(strided, (3, 1), **limits, rule=rule, exact=exact)[0].nan_to_num(-1),
                       scale.nan_to_num(-1))  # fmt: skip


def test_channel_axis_threads_and_empty() -> None:
    x = gaussian(300, 40)
    by_column, _, _ = ops.search_range(x, (1, 40), **INT4, rule="absmax", exact=True)
    by_row, _, _ = ops.search_range(x.t(), (40, 1), **INT4, rule="absmax", exact=True)
    assert torch.equal(by_column.flatten(), by_row.flatten())
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    assert torch.equal(ops.search_range(x, (1, 40), **INT4, rule="absmax", exact=True)[0], by_column)
    torch.set_num_threads(before)
    assert ops.search_range(x[:0], (0, 1), **INT4, rule="absmax")[0].shape == (0, 1)


def test_a_block_too_long_to_sweep_is_refined() -> None:
    """8 bits times 100 000 values are more than 2^22 breakpoints."""
    x = gaussian(1, 100_000)
    limits = {"qmin": -128, "qmax": 127, "rule": "absmax"}
    grid, _, _ = ops.search_range(x, (1, 1), **limits)
    exact, _, _ = ops.search_range(x, (1, 1), **limits, exact=True)
    assert errors(x, exact, qmin=-128, qmax=127) <= errors(x, grid, qmin=-128, qmax=127)


def weighed(x: Tensor, y: Tensor, weights: Tensor, size: int) -> Tensor:
    """Weighed squared error of each block, float64."""
    return ((y - x).double().square() * weights.double()).reshape(-1, size).sum(1)


@pytest.mark.parametrize(
    ("text", "slack"),
    [("int4-g32-sym", 0.06), ("int3-g16-signmax", 0.06), ("uint4-g32-min", 0.35), ("uint3-g64-asym", 0.25),
     ("fp4_e2m1-g32-sym", 0.3), ("nf4-g32-sym", 0.3), ("int4-channel-sym", 0.06)],
)  # fmt: skip
def test_weights_say_whose_error_counts(text: str, slack: float) -> None:
    """Below min-max and below the unweighed search; near the best of 4000 scales (of the same offset)."""
    x = gaussian(8, 320, seed=2)
    weights = gaussian(320, seed=3).square() + 0.01
    wanted = spec(text)
    arguments, shape = range_arguments(wanted), wanted.scale_shape(tuple(x.shape))
    size = x.numel() // (shape[0] * shape[1])
    known = {name: value for name, value in arguments.items() if name not in ("rule", "scale_dtype")}

    def error(scale: Tensor, zero_point: Tensor | None, minimum: Tensor | None) -> Tensor:
        return weighed(x, ops.fake_quantize(x, scale, zero_point, minimum, **known), weights, size)

    found = ops.search_range(x, shape, **arguments, weights=weights)
    ours, blind = error(*found), error(*ops.search_range(x, shape, **arguments))
    assert (ours <= error(*ops.choose_range(x, shape, **arguments)) * (1 + 1e-5)).all()
    assert ours.sum() < blind.sum()
    dense = torch.stack([error(found[0] * f, *found[1:]) for f in torch.linspace(0.6, 1.6, 4000)]).amin(0)
    assert ours.sum() <= dense.sum() * (1 + slack)


def test_weights_repeat_row_by_row_and_must_fit() -> None:
    x, weights = gaussian(6, 64, seed=4), torch.rand(64)
    arguments = {**INT4, "rule": "absmax"}
    whole, _, _ = ops.search_range(x, (6, 2), **arguments, weights=weights)
    parts = [ops.search_range(row[None], (1, 2), **arguments, weights=weights)[0] for row in x]
    assert torch.equal(whole, torch.cat(parts))
    one, _, _ = ops.search_range(x, (1, 1), **arguments, weights=torch.ones(64))
    assert one.shape == (1, 1)
    with pytest.raises(ValueError, match="one per column"):
        ops.search_range(x, (6, 2), **arguments, weights=weights[:32])
    with pytest.raises(ValueError, match="exact=False"):
        ops.search_range(x, (6, 2), **arguments, weights=weights, exact=True)


def test_only_the_weighed_columns_count() -> None:
    """With all weight on values that lie on a grid, that grid is found, whatever the others are."""
    x = gaussian(1, 64, seed=5) * 3
    on = torch.arange(64) % 4 == 0
    x[0, on] = 0.5 * torch.arange(-8, 8).float()
    scale, _, _ = ops.search_range(x, (1, 1), **INT4, rule="signed_absmax", weights=on.float())
    y = ops.fake_quantize(x, scale, **INT4)
    assert torch.allclose(y[0, on], x[0, on], atol=1e-5)
