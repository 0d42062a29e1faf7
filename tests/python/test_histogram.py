"""Histograms, the searches in them and percentiles against numpy and torch; the merge theorem; opcheck."""

from __future__ import annotations

import numpy as np
import phiquant.ops as ops
import pytest
import ranges_reference as reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

NASTY = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    1e-45,
    -1e-45,
    1e-38,
    3.4e38,
    -3.4e38,
    float("nan"),
    float("inf"),
    float("-inf"),
    2.0**20,
]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


floats = st.one_of(st.sampled_from(NASTY), st.floats(width=32), st.floats(-4, 4, width=32))
arrays = st.lists(floats, max_size=60).map(lambda v: torch.tensor(v, dtype=torch.float32))


def dyadic(x: Tensor, bins: int = 8) -> tuple[Tensor, Tensor]:
    if not x.numel():
        return torch.zeros(1, 2 * bins, dtype=torch.int64), torch.tensor([-126])
    counts, exponent, _, _ = ops.dyadic_histogram(x, (1,), bins)
    return counts, exponent


def merge(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    exponent = torch.maximum(a[1], b[1])
    return ops.coarsen(a[0], exponent - a[1]) + ops.coarsen(b[0], exponent - b[1]), exponent


def same(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> bool:
    return all(map(torch.equal, a, b))


@settings(max_examples=200, deadline=None)
@given(arrays.filter(lambda x: x.numel() > 0), st.sampled_from([4, 8, 256]))
def test_dyadic_histogram_equals_numpy(x: Tensor, bins: int) -> None:
    counts, exponent, lo, hi = ops.dyadic_histogram(x, (1,), bins)
    expected, power = reference.dyadic(x.numpy(), bins)
    np.testing.assert_array_equal(counts[0].numpy(), expected)
    assert exponent.item() == power
    finite = x[x.isfinite()]
    assert lo.item() == (finite.min() if finite.numel() else float("inf"))
    assert hi.item() == (finite.max() if finite.numel() else float("-inf"))


@settings(max_examples=200, deadline=None)
@given(arrays, arrays, arrays)
def test_merging_is_one_pass_associative_and_commutative(x: Tensor, y: Tensor, z: Tensor) -> None:
    a, b, c = (
        dyadic(t) if t.numel() else (torch.zeros(1, 16, dtype=torch.int64), torch.tensor([-126])) for t in (x, y, z)
    )
    together = torch.cat([x, y, z])
    if together.numel():
        assert same(merge(merge(a, b), c), dyadic(together))
    assert same(merge(merge(a, b), c), merge(a, merge(b, c)))
    assert same(merge(a, b), merge(b, a))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_levels_blocks_dtypes_and_strides_agree(level: str, dtype: torch.dtype) -> None:
    x = (random(6, 40, 50) * torch.tensor([1e-3, 1, 2, 3, 50, 1e3])[:, None, None]).to(dtype)
    for values, shape in ((x, (6, 1, 1)), (x.transpose(0, 1), (1, 6, 1)), (x[:, ::2, 1:], (6, 1, 1)), (x, (1, 1, 1))):
        counts, exponent, _, _ = ops.dyadic_histogram(values, shape, 64)
        blocks = values.movedim(1, 0) if shape == (1, 6, 1) else values
        blocks = blocks.float().reshape(exponent.numel(), -1)
        for got, power, block in zip(counts.reshape(-1, 128), exponent.flatten(), blocks, strict=True):
            expected, e = reference.dyadic(block.numpy(), 64)
            np.testing.assert_array_equal(got.numpy(), expected)
            assert power.item() == e


def test_threads_change_nothing() -> None:
    x = random(900_001) ** 3
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append((*dyadic(x, 2048), ops.histogram(x, 2048, -4.0, 4.0)))
    torch.set_num_threads(1)
    assert all(all(map(torch.equal, results[0], other)) for other in results[1:])


@pytest.mark.parametrize("bins", [1, 128, 2048])
def test_linear_histogram_equals_histc(level: str, bins: int) -> None:
    x = random(30_011, seed=bins)
    for lo, hi in ((x.min().item(), x.max().item()), (-1.5, 0.7), (0.0, 9.0)):
        assert torch.equal(ops.histogram(x, bins, lo, hi).float(), torch.histc(x, bins, min=lo, max=hi))
    strewn = torch.cat([x, torch.tensor(NASTY)])
    inside = strewn[strewn.isfinite() & (strewn.abs() <= 2)]
    assert torch.equal(ops.histogram(strewn, bins, -2, 2).float(), torch.histc(inside, bins, min=-2, max=2))
    flat = torch.full((100,), 7.0)
    assert torch.equal(ops.histogram(flat, bins, 7.0, 7.0).float(), torch.histc(flat, bins, min=7, max=7))
    assert ops.histogram(torch.full((5,), 1e9), bins, 1e9, 1e9).sum() == 5
    assert ops.histogram(torch.empty(0), bins, 0.0, 1.0).sum() == 0


def course_counts(seed: int) -> tuple[Tensor, np.ndarray]:
    counts, edges = np.histogram(reference.course_samples(seed), bins=2048)
    return torch.from_numpy(counts), edges


@pytest.mark.parametrize("seed", range(3))
def test_notebook_kl_equals_numpy(seed: int) -> None:
    counts, _ = course_counts(seed)
    expected = reference.kl_notebook(counts.numpy(), 128)
    divergence = ops.kl_divergence(counts, 128, "notebook")
    np.testing.assert_allclose(divergence.numpy(), expected, rtol=1e-10)
    threshold = int(ops.kl_threshold(counts, 128, "notebook"))
    assert threshold == expected.argmin()


def test_the_course_example_lies_in_its_range() -> None:
    """Seeds differ (the course sets none): the threshold is bin 1664 to 1923 and 0.81 to 0.94 of the largest value."""
    for seed in range(12):
        counts, edges = course_counts(seed)
        threshold = int(ops.kl_threshold(counts, 128, "notebook"))
        assert 1664 <= threshold <= 1923
        assert 0.81 <= edges[threshold] / edges[-1] <= 0.94


@pytest.mark.parametrize("n", [400, 20_000, 300_000])
@pytest.mark.parametrize("levels", [8, 128])
def test_both_kl_forms_on_outliers_and_sparse_counts(n: int, levels: int) -> None:
    x = np.abs(np.random.default_rng(n).standard_t(3, n))
    counts = np.histogram(x, bins=512)[0]
    for form, oracle in (("notebook", reference.kl_notebook), ("tensorrt", reference.kl_tensorrt)):
        expected = oracle(counts, levels)
        got = ops.kl_divergence(torch.from_numpy(counts), levels, form).numpy()
        np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-13)
        assert got.argmin() == expected.argmin()


def test_kl_without_a_candidate_keeps_everything() -> None:
    for form in ("tensorrt", "notebook"):
        assert ops.kl_threshold(torch.zeros(300), 128, form) == 300
        assert ops.kl_threshold(torch.ones(100), 128, form) == 100


@settings(max_examples=100, deadline=None)
@given(arrays.filter(lambda x: x.numel() > 0), st.floats(0, 1), st.booleans())
def test_percentile_equals_numpy(x: Tensor, q: float, magnitude: bool) -> None:
    values = x[x.isfinite()].double().numpy()
    got = ops.percentile(x, (1,), q, magnitude).item()
    if values.size == 0:
        assert np.isnan(got)
        return
    values = np.sort(np.abs(values) if magnitude else values)
    place = q * (values.size - 1)
    k = int(place)
    expected = values[k] + (place - k) * (values[min(k + 1, values.size - 1)] - values[k])
    assert got == np.float32(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_percentile_per_block(dtype: torch.dtype) -> None:
    x = random(5, 9000).to(dtype)
    for values, shape, axis in ((x, (5, 1), 1), (x.T, (1, 5), 0)):
        got = ops.percentile(values, shape, 0.995, magnitude=True)
        expected = np.quantile(values.abs().double().numpy(), 0.995, axis=axis, keepdims=True)
        np.testing.assert_allclose(got.numpy(), expected, rtol=1e-7)
    assert torch.equal(ops.percentile(x, (5, 1), 1.0), x.float().amax(1, keepdim=True))


def test_opcheck() -> None:
    native = torch.ops.phiquant
    counts = torch.rand(2, 40, dtype=torch.float64)
    for op, arguments in (
        (native.histogram, (random(100), 16, -1.0, 1.0)),
        (native.dyadic_histogram, (random(4, 25), 25, 16)),
        (native.histogram_mse, (counts, torch.ones(2), 16)),
        (native.kl_divergence, (counts, 8, True)),
        (native.percentile, (random(4, 25), 25, 0.9, True)),
    ):
        torch.library.opcheck(op.default, arguments)


def test_wrong_arguments_are_refused() -> None:
    x = random(16)
    with pytest.raises(ValueError, match="power of two from 4"):
        ops.dyadic_histogram(x, (1,), 100)
    with pytest.raises(ValueError, match="bins must be 1 to 32768"):
        ops.histogram(x, 0, 0.0, 1.0)
    with pytest.raises(ValueError, match="finite and in order"):
        ops.histogram(x, 8, 1.0, 0.0)
    with pytest.raises(ValueError, match="finite and in order"):
        ops.histogram(x, 8, float("nan"), 0.0)
    with pytest.raises(ValueError, match="between 0 and 1"):
        ops.percentile(x, (1,), 99.9)
    with pytest.raises(ValueError, match="'tensorrt' or 'notebook'"):
        ops.kl_divergence(torch.ones(8), 2, "course")
    with pytest.raises(ValueError, match="float32, bfloat16 or float16"):
        ops.dyadic_histogram(torch.ones(4, dtype=torch.int32), (1,), 8)
