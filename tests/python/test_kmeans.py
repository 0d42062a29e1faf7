"""k-means against brute force, kmeans1d and scikit-learn; its worked examples, weights, rows, layouts and errors."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import phiquant as pq
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from phiquant import _C, PhiquantError
from torch import Tensor

# The 4 x 4 weight that the chapter clusters.
W = torch.tensor(
    [[2.09, -0.98, 1.48, 0.09], [0.05, -0.14, -1.08, 2.12], [-0.91, 1.92, 0, -1.03], [1.87, 0, 1.53, 1.49]]
)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inertia(w: Tensor, codebook: Tensor, codes: Tensor, weights: Tensor | None = None) -> float:
    error = (codebook.double()[codes.long()] - w.double()).square()
    return float((error if weights is None else error * weights.double()).sum())


def brute_force(values: np.ndarray, k: int, weights: np.ndarray | None = None) -> float:
    """Least error over every way to cut the sorted values into k runs."""
    h = np.ones(len(values)) if weights is None else weights
    order = np.argsort(values, kind="stable")
    v, h = values[order].astype(np.float64), h[order].astype(np.float64)
    best = np.inf
    for cuts in itertools.combinations(range(1, len(v)), min(k, len(v)) - 1):
        total = 0.0
        for run in zip((0, *cuts), (*cuts, len(v)), strict=True):
            x, w = v[slice(*run)], h[slice(*run)]
            if w.sum() > 0:
                total += (w * (x - (w * x).sum() / w.sum()) ** 2).sum()
        best = min(best, total)
    return best


# --- the optimum ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [1, 2, 5, 9, 12])
def test_exact_equals_brute_force(n: int, dtype: torch.dtype) -> None:
    for seed, k in itertools.product(range(4), range(2, 6)):
        w = gaussian(n, seed=seed).to(dtype)
        codebook, codes = pq.kmeans(w, k)
        assert codebook.shape == (k,)
        assert codes.dtype == torch.uint8
        assert inertia(w, codebook, codes) == pytest.approx(brute_force(w.float().numpy(), k), rel=1e-6, abs=1e-12)


@given(
    values=st.lists(st.integers(-6, 6), min_size=1, max_size=9),
    k=st.integers(2, 5),
    weights=st.lists(st.integers(0, 4), min_size=9, max_size=9),
)
@hypothesis_settings(max_examples=150, deadline=None, derandomize=True)
def test_weighted_exact_equals_brute_force_with_ties(values: list[int], k: int, weights: list[int]) -> None:
    w = torch.tensor(values, dtype=torch.float32)
    h = torch.tensor(weights[: len(values)], dtype=torch.float32)
    if not h.any():
        h = torch.ones_like(h)
    codebook, codes = pq.kmeans(w, k, h)
    kept = h > 0
    expected = brute_force(w[kept].numpy(), k, h[kept].numpy())
    assert inertia(w[kept], codebook, codes[kept], h[kept]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("n", "k", "kind"),
    [
        *(
            (*size, kind)
            for size in [(3000, 2), (3000, 7), (20_000, 16), (60_000, 5)]
            for kind in ["gaussian", "heavy", "uniform", "clumps"]
        ),
        (9000, 256, "gaussian"),
    ],
)
def test_exact_equals_kmeans1d(n: int, k: int, kind: str) -> None:
    kmeans1d = pytest.importorskip("kmeans1d")
    g = gaussian(n, seed=n + k)
    w = {"gaussian": g, "heavy": g**5, "uniform": g.sigmoid(), "clumps": g * 0.01 + (g * 7).round()}[kind]
    codebook, codes = pq.kmeans(w, k)
    assigned, centers = kmeans1d.cluster(w.double().numpy(), k)
    expected = float(((np.array(centers)[np.array(assigned)] - w.double().numpy()) ** 2).sum())
    assert inertia(w, codebook, codes) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [4, 16])
def test_scikit_learn_is_never_below_exact(dtype: torch.dtype, k: int) -> None:
    cluster = pytest.importorskip("sklearn.cluster")
    w = gaussian(40_000, seed=k).to(dtype) * 0.02
    codebook, codes = pq.kmeans(w, k)
    data = w.double().numpy()[:, None]
    found = min(
        cluster.KMeans(k, n_init=1, init=init, random_state=seed).fit(data).inertia_
        for init, seed in (("k-means++", 0), ("k-means++", 1), ("random", 2))
    )
    assert inertia(w, codebook, codes) <= found * (1 + 1e-7)


def test_a_weight_counts_as_so_many_points() -> None:
    w = gaussian(300, seed=1)
    h = torch.randint(0, 5, (300,), generator=torch.Generator().manual_seed(2)).float()
    weighted, _ = pq.kmeans(w, 6, h)
    repeated, _ = pq.kmeans(w.repeat_interleave(h.long()), 6)
    torch.testing.assert_close(weighted, repeated, rtol=1e-6, atol=1e-7)
    # the 16-bit path that counts, against the one that sorts
    w = gaussian(40_000, seed=3).bfloat16()
    h = gaussian(40_000, seed=4).abs()
    torch.testing.assert_close(pq.kmeans(w, 16, h)[0], pq.kmeans(w.float(), 16, h)[0], rtol=1e-6, atol=1e-7)


def test_weights_of_columns_expand() -> None:
    w, h = gaussian(8, 16), gaussian(16, seed=1).square()
    full = pq.kmeans(w, 5, h.expand(8, 16).contiguous())
    assert all(torch.equal(a, b) for a, b in zip(pq.kmeans(w, 5, h), full, strict=True))
    assert torch.equal(pq.kmeans(w, 5, torch.zeros(16))[0], pq.kmeans(w, 5)[0])


def test_far_values_do_not_drown_the_others() -> None:
    w = torch.cat([gaussian(5000), torch.tensor([1e15, -3e14])])
    codebook, _ = pq.kmeans(w, 10)
    assert codebook[0] == -3e14
    assert codebook[-1] == 1e15
    torch.testing.assert_close(codebook[1:-1], pq.kmeans(w[:-2], 8)[0], rtol=1e-5, atol=1e-5)
    w = gaussian(5000) * 1e-3 + 1000  # the mean squared is 10^12 times the variance
    codebook, _ = pq.kmeans(w, 4)
    torch.testing.assert_close(
        codebook.double() - 1000, pq.kmeans(w.double().sub(1000).float(), 4)[0].double(), atol=1e-4, rtol=0
    )


def test_fewer_distinct_values_than_levels() -> None:
    w = torch.tensor([3.0, 1.0, 3.0, -2.0])
    codebook, codes = pq.kmeans(w, 6)
    assert codebook.tolist() == [-2.0, 1.0, 3.0, 3.0, 3.0, 3.0]
    assert torch.equal(codebook[codes.long()], w)
    for method in ("lloyd", "minibatch"):
        codebook, codes = pq.kmeans(w, 6, method=method)
        assert torch.equal(codebook[codes.long()], w)
    assert pq.kmeans(torch.full((100,), -0.0), 2)[0].tolist() == [0.0, 0.0]


# --- Lloyd and mini-batches -----------------------------------------------------------------------


@pytest.mark.parametrize("init", ["kmeans++", "linear", "quantile", "random"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lloyd_is_a_fixed_point_and_never_below_exact(init: str, dtype: torch.dtype) -> None:
    w = gaussian(5000, seed=7).to(dtype)
    exact = inertia(w, *pq.kmeans(w, 8))
    codebook, codes = pq.kmeans(w, 8, method="lloyd", init=init, seed=3, iterations=1000)
    assert exact * (1 - 1e-7) <= inertia(w, codebook, codes) < 1.3 * exact
    assert (codebook.diff() > 0).all()
    for c in range(8):
        assert codebook[c].item() == pytest.approx(w[codes == c].double().mean().item(), rel=1e-5, abs=1e-6)
    again, _ = pq.kmeans(w, 8, method="lloyd", init=codebook, iterations=1)
    torch.testing.assert_close(again, codebook, rtol=1e-6, atol=1e-7)


def test_lloyd_equals_scikit_learn_step_for_step() -> None:
    cluster = pytest.importorskip("sklearn.cluster")
    w = gaussian(4000, seed=8)
    start = torch.linspace(-3, 3, 6)
    for iterations in (1, 2, 5):
        codebook, _ = pq.kmeans(w, 6, method="lloyd", init=start, iterations=iterations)
        model = cluster.KMeans(6, init=start.numpy()[:, None], n_init=1, max_iter=iterations, tol=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it did not converge: as asked
            centers = model.fit(w.double().numpy()[:, None]).cluster_centers_
        np.testing.assert_allclose(codebook.numpy(), centers[:, 0], rtol=1e-5)


def test_inertia_never_rises_with_iterations() -> None:
    w = gaussian(3000, seed=9)
    errors = [inertia(w, *pq.kmeans(w, 12, method="lloyd", init="linear", iterations=i)) for i in range(12)]
    assert all(b <= a * (1 + 1e-9) for a, b in itertools.pairwise(errors))
    assert errors[-1] < 0.9 * errors[0]


def test_starts() -> None:
    w = torch.arange(100.0)
    begin = {"method": "lloyd", "iterations": 0}
    assert pq.kmeans(w, 4, init="linear", **begin)[0].tolist() == [0, 33, 66, 99]
    assert pq.kmeans(w, 4, init="quantile", **begin)[0].tolist() == [12, 37, 62, 87]
    for init in ("random", "kmeans++"):
        a, b, c = (pq.kmeans(w, 4, init=init, seed=s, **begin)[0] for s in (0, 0, 1))
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
        assert len(set(a.tolist())) == 4
        assert set(a.tolist()) <= set(w.tolist())


def test_plus_plus_draws_by_squared_distance() -> None:
    # From either point of three at 0, 1, 3 the second is drawn with the odds of the squared distances.
    w = torch.tensor([0.0, 1.0, 3.0])
    pairs = [tuple(pq.kmeans(w, 2, method="lloyd", iterations=0, seed=s)[0].tolist()) for s in range(3000)]
    expected = {(0, 1): (1 / 10 + 1 / 5) / 3, (0, 3): (9 / 10 + 9 / 13) / 3, (1, 3): (4 / 5 + 4 / 13) / 3}
    for pair, probability in expected.items():
        assert pairs.count(pair) / 3000 == pytest.approx(probability, abs=0.03)


def test_minibatch_comes_near_the_optimum() -> None:
    w = gaussian(300_000, seed=10)
    exact = inertia(w, *pq.kmeans(w, 16))
    found = pq.kmeans(w, 16, method="minibatch", batch=4096, batches=30, seed=1)
    assert exact <= inertia(w, *found) < 1.1 * exact
    assert torch.equal(found[0], pq.kmeans(w, 16, method="minibatch", batch=4096, batches=30, seed=1)[0])


# --- zero, rows, layouts, dtypes ------------------------------------------------------------------


@pytest.mark.parametrize("method", ["exact", "lloyd", "minibatch"])
def test_zero_is_kept_and_the_others_serve_the_survivors(method: str) -> None:
    w = gaussian(64, 64, seed=11)
    w[w.abs() < 1] = 0
    codebook, codes = pq.kmeans(w, 8, method=method, keep_zero=True)
    assert codebook.shape == (8,)
    assert (codebook == 0).sum() == 1
    assert (codebook.diff() > 0).all()
    assert (codebook[codes.long()][w == 0] == 0).all()
    if method == "exact":
        others, _ = pq.kmeans(w[w != 0], 7)
        assert torch.equal(codebook[codebook != 0], others)


def test_rows_have_codebooks_of_their_own() -> None:
    w = gaussian(6, 40, seed=12) * torch.arange(1, 7)[:, None]
    codebook, codes = pq.kmeans(w, 4, rows=2)
    assert codebook.shape == (3, 4)
    for i in range(3):
        one, one_codes = pq.kmeans(w[2 * i : 2 * i + 2], 4)
        assert torch.equal(codebook[i], one)
        assert torch.equal(codes[2 * i : 2 * i + 2], one_codes)
    h = gaussian(40, seed=13).square()
    assert torch.equal(pq.kmeans(w, 4, h, rows=1)[0][5], pq.kmeans(w[5], 4, h)[0])
    assert torch.equal(pq.kmeans(w, 4, rows=1, method="lloyd")[0][5], pq.kmeans(w[5], 4, method="lloyd")[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_strides_do_not_matter(dtype: torch.dtype) -> None:
    w = gaussian(48, 32, seed=14).to(dtype)
    codebook, codes = pq.kmeans(w, 8)
    other, other_codes = pq.kmeans(w.t(), 8)
    assert torch.equal(codebook, other)
    assert torch.equal(codes.t(), other_codes)
    assert torch.equal(pq.kmeans(w[:, ::2], 8)[0], pq.kmeans(w[:, ::2].contiguous(), 8)[0])


def test_16_bit_values_cluster_as_their_float32_selves(level: str) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        w = gaussian(50_000, seed=15).to(dtype)  # enough to be counted, not sorted
        w[::7] = 0.0
        w[::14] = -0.0
        for options in ({}, {"keep_zero": True}, {"method": "lloyd"}):
            found, wide = pq.kmeans(w, 16, **options), pq.kmeans(w.float(), 16, **options)
            torch.testing.assert_close(found[0], wide[0], rtol=1e-6, atol=1e-8)


def test_a_value_midway_goes_up(level: str) -> None:
    codebook = torch.tensor([[-1.0, 0.0, 2.0]])
    x = torch.tensor([-2.0, -0.5, -0.50001, 0.99999, 1.0, 5.0, float("inf"), float("-inf")])
    assert pq.ops.codebook_assign(x, codebook).tolist() == [0, 1, 0, 1, 2, 2, 2, 0]


def test_result_does_not_depend_on_the_number_of_threads() -> None:
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        w = gaussian(64, 4096, seed=16)
        h = gaussian(64, 4096, seed=17).abs()
        found = [pq.kmeans(v, 16, u)[0] for v in (w, w.bfloat16()) for u in (None, h)]
        results.append([*found, pq.kmeans(w, 16, rows=1)[0]])
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# --- the solver -----------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["codebook16-tensor", "codebook4-row", "codebook8-rows2-f16", "codebook4-g16"])
def test_solver_gives_the_optimum_of_each_block(text: str) -> None:
    w = gaussian(8, 64, seed=18) * 0.02
    quantized = pq.quantize_tensor(w, text, "kmeans")
    spec = quantized.spec
    blocks = w.reshape(-1, spec.block_size(w.shape))
    assert quantized.codebook.shape == (len(blocks), spec.element.size)
    decoded = quantized.dequantize().reshape(blocks.shape)
    for i, block in enumerate(blocks):
        levels, codes = pq.kmeans(block, spec.element.size)
        levels = levels.to(quantized.codebook.dtype)
        assert torch.equal(quantized.codebook[i], levels)
        if spec.scale_dtype == "float32":
            assert torch.equal(decoded[i], levels[codes.long()])


def test_solver_takes_weights_and_names_what_is_wrong() -> None:
    w, h = gaussian(8, 64, seed=19), gaussian(64, seed=20).square() ** 3
    quantized = [pq.solvers.kmeans(w, pq.spec("codebook8-row"), x) for x in (None, h)]
    plain, weighted = (((q.dequantize() - w).square() * h).sum() for q in quantized)
    assert weighted < 0.9 * plain
    with pytest.raises(PhiquantError, match="codebook16-row"):
        pq.quantize_tensor(w, "int4-g32-sym", "kmeans")
    w[2, 3] = float("nan")
    with pytest.raises(PhiquantError, match=r"layer\.weight holds 1 .* index \[2, 3\]"):
        pq.quantize_tensor(w, "codebook8-row", "kmeans", name="layer.weight")


def test_weights_matter_where_some_inputs_are_large() -> None:
    # Three inputs 30 times larger, their weights as much smaller: the float function is that of ordinary inputs.
    w, x = gaussian(32, 128, seed=27), gaussian(512, 128, seed=28)
    w[:, :3] /= 30
    x[:, :3] *= 30
    spec = pq.spec("codebook8-row")
    plain, weighted = (
        (x @ (pq.solvers.kmeans(w, spec, h).dequantize() - w).t()).square().mean() for h in (None, x.square().mean(0))
    )
    assert weighted < 0.3 * plain


def test_never_worse_than_linear_levels_of_the_same_blocks() -> None:
    w = gaussian(32, 128, seed=21) * 0.02
    for bits, linear in ((4, "uint4-{}-asym"), (3, "uint3-{}-asym"), (2, "uint2-{}-asym")):
        for grain in ("tensor", "g32"):
            book = pq.quantize_tensor(w, f"codebook{1 << bits}-{grain}", "kmeans").dequantize()
            even = pq.quantize_tensor(w, linear.format(grain), "mse").dequantize()
            assert (book - w).square().sum() < (even - w).square().sum()


# --- worked examples ------------------------------------------------------------------------------


def test_the_four_by_four_example() -> None:
    codebook, codes = pq.kmeans(W, 4)
    assert [round(c, 2) + 0.0 for c in codebook.tolist()] == [-1.0, 0.0, 1.5, 2.0]
    assert ["".join(map(str, row)) for row in codes.tolist()] == ["3021", "1103", "0310", "3122"]
    assert round(inertia(W, codebook, codes), 4) == 0.0932
    assert W.numel() * 4 == 64  # bytes before: float32
    assert W.numel() * 2 // 8 + codebook.numel() * 4 == 20  # after: 2-bit codes and four float32 levels


def test_the_toy_of_the_notebook_has_four_values_after_two_bits() -> None:
    toy = gaussian(3, 5, seed=0)
    assert len(toy.unique()) == 15
    codebook, codes = pq.kmeans(toy, 4)
    assert len(codebook[codes.long()].unique()) == 4


# --- vectors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [2, 4])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_vectors_end_at_a_fixed_point_near_scikit_learn(level: str, dim: int, weighted: bool) -> None:
    cluster = pytest.importorskip("sklearn.cluster")
    w = gaussian(60, 40, seed=22)
    h = gaussian(60, 40 // dim, seed=23).square() if weighted else None
    codebook, codes = pq.vector_kmeans(w, 16, dim, h, iterations=300)
    points = w.reshape(-1, dim).double()
    distances = (points[:, None] - codebook.double()).square().sum(-1)
    nearest, chosen = distances.min(1).values, distances.gather(1, codes.view(-1, 1).long())[:, 0]
    torch.testing.assert_close(chosen, nearest, rtol=1e-6, atol=1e-9)
    each = torch.ones(len(points)) if h is None else h.flatten()
    for c in range(16):
        mine = codes.flatten() == c
        mean = (points[mine] * each[mine, None]).sum(0) / each[mine].sum()
        torch.testing.assert_close(codebook[c].double(), mean, rtol=1e-5, atol=1e-6)
    model = cluster.KMeans(16, n_init=1, random_state=0).fit(points.numpy(), sample_weight=each.numpy())
    assert (chosen * each).sum() < 1.1 * model.inertia_


def test_vectors_are_the_same_at_every_level_and_thread_count() -> None:
    w = gaussian(300, 404, seed=24)
    w[3, :8] = 0.0
    results = []
    levels, threads = (_C.cpu_level(), torch.get_num_threads())
    for name in _C.build_info()["cpu_levels"]:
        for n in (1, 2):
            _C.set_cpu_level(name)
            torch.set_num_threads(n)
            results.append(pq.vector_kmeans(w, 30, 4, iterations=4, seed=5))
    _C.set_cpu_level(levels)
    torch.set_num_threads(threads)
    for codebook, codes in results[1:]:
        assert torch.equal(codebook, results[0][0])
        assert torch.equal(codes, results[0][1])


def test_vectors_beat_numbers_at_equal_bits_and_refuse_what_does_not_fit() -> None:
    # Neighbours that agree: two bits for a pair are better spent together than one for each.
    w = gaussian(64, 32, seed=25).repeat_interleave(2, 1) + 0.1 * gaussian(64, 64, seed=26)
    codebook, codes = pq.vector_kmeans(w, 4, 2)
    pairs = (codebook[codes.long()].reshape(w.shape) - w).square().sum()
    assert pairs < 0.5 * inertia(w, *pq.kmeans(w, 2))
    assert pq.vector_kmeans(w[:1, :4], 6, 2)[0].shape == (6, 2)  # fewer vectors than levels
    with pytest.raises(ValueError, match="dim is 2 or 4"):
        pq.vector_kmeans(w, 4, 3)
    w[5, 6] = float("inf")
    with pytest.raises(PhiquantError, match=r"\[5, 6\]"):
        pq.vector_kmeans(w, 4, 2)


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("method", ["exact", "lloyd", "minibatch"])
def test_values_that_are_not_finite_are_named(value: float, method: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        w = gaussian(40, 1000).to(dtype)
        w[3, 7] = value
        with pytest.raises(PhiquantError, match=r"1 value\(s\) that are not finite.*index \[3, 7\]"):
            pq.kmeans(w, 4, method=method)
        with pytest.raises(PhiquantError, match=r"\[3, 7\]"):
            pq.kmeans(w, 4, rows=1, method=method)


@pytest.mark.parametrize(
    ("w", "k", "options", "message"),
    [
        (torch.empty(0, 4), 4, {}, "no values"),
        (torch.ones(4), 1, {}, "k must be 2 to 256"),
        (torch.ones(4), 257, {}, "k must be 2 to 256"),
        (torch.ones(4, 4), 2, {"rows": 3}, "does not divide"),
        (torch.ones(4), 2, {"rows": 1}, "does not divide"),
        (torch.ones(4), 2, {"method": "magic"}, "unknown method"),
        (torch.ones(4), 2, {"method": "lloyd", "init": "magic"}, "unknown init"),
        (torch.ones(4), 2, {"method": "lloyd", "init": torch.ones(3)}, "2 levels"),
        (torch.ones(4), 2, {"weights": -torch.ones(4)}, "not negative"),
        (torch.ones(4), 2, {"weights": torch.full((4,), float("nan"))}, "finite"),
        (torch.ones(4, dtype=torch.float64), 2, {}, "float32, bfloat16 or float16"),
    ],
)
def test_errors(w: Tensor, k: int, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pq.kmeans(w, k, **options)


# --- lookup and gradient --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("blocks", "size"), [(1, 16), (4, 256), (3, 5)])
def test_lookup_and_its_gradient_equal_autograd(level: str, dtype: torch.dtype, blocks: int, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    codes = torch.randint(0, size, (12, 100), dtype=torch.uint8, generator=generator)
    table = gaussian(blocks, size, seed=1)
    grad = gaussian(12, 100, seed=2).to(dtype)
    ours, theirs = table.clone().requires_grad_(), table.double().requires_grad_()
    found = pq.ops.codebook_lookup(ours, codes, dtype)
    expected = theirs.gather(1, codes.view(blocks, -1).long()).view(12, 100)
    assert found.dtype == dtype
    assert torch.equal(found, table.gather(1, codes.view(blocks, -1).long()).view(12, 100).to(dtype))
    found.backward(grad)
    expected.backward(grad.double())
    torch.testing.assert_close(ours.grad, theirs.grad.float(), rtol=1e-6, atol=1e-6)


def test_gradient_by_the_mean() -> None:
    codes = torch.tensor([[0, 1, 1, 3], [0, 0, 2, 3]], dtype=torch.uint8)
    grad = torch.tensor([[1.0, 2.0, 4.0, 5.0], [3.0, 5.0, 7.0, 9.0]])
    assert pq.ops.codebook_gradient(grad, codes, 1, 5).tolist() == [[9, 6, 7, 14, 0]]
    assert pq.ops.codebook_gradient(grad, codes, 1, 5, mean=True).tolist() == [[3, 3, 7, 7, 0]]
    assert pq.ops.codebook_gradient(grad, codes, 2, 4, mean=True).tolist() == [[1, 3, 0, 5], [4, 0, 7, 9]]


def test_gradient_over_threads_strides_and_pieces() -> None:
    codes = torch.randint(0, 16, (300, 1001), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    grad = gaussian(1001, 300).t()
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(pq.ops.codebook_gradient(grad, codes, 1, 16, mean=True))
    torch.set_num_threads(before)
    assert torch.equal(*found)
    for c in range(16):
        torch.testing.assert_close(found[0][0, c], grad[codes == c].double().mean().float(), rtol=1e-6, atol=1e-7)


def test_a_code_outside_the_codebook_does_no_harm() -> None:
    codes = torch.tensor([0, 200], dtype=torch.uint8)
    assert pq.ops.codebook_lookup(torch.ones(1, 4), codes).tolist() == [1.0, 1.0]
    assert pq.ops.codebook_gradient(torch.ones(2), codes, 1, 4).tolist() == [[1, 0, 0, 0]]


def _samples() -> list[tuple[str, tuple]]:
    x, h = gaussian(4, 32), gaussian(4, 32).abs()
    codes = torch.randint(0, 8, (4, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    table = gaussian(2, 8).requires_grad_()
    return [
        ("kmeans_exact", (x, h, 32, 4, False)),
        ("kmeans_lloyd", (x, None, gaussian(4, 4), 32, 4, False, 4, 0, 5)),
        ("kmeans_vectors", (x.view(-1, 4), h[0], 3, 0, 4)),
        ("kmeans_minibatch", (x, None, None, 128, 4, True, 0, 0, 5, 16, 3)),
        ("codebook_lookup", (table, codes, torch.bfloat16, True)),
        ("codebook_gradient", (x, codes, 2, 8, True)),
    ]


@pytest.mark.parametrize(("name", "arguments"), _samples(), ids=lambda v: v if isinstance(v, str) else "")
def test_opcheck(name: str, arguments: tuple) -> None:
    torch.library.opcheck(getattr(torch.ops.phiquant, name).default, arguments)


def test_other_devices_give_the_same() -> None:
    from phiquant.ops import kmeans as room

    codes = torch.randint(0, 8, (4, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    table, grad = gaussian(2, 8), gaussian(4, 32)
    for mean in (False, True):
        found = room.codebook_gradient_anywhere(grad, codes, 2, 8, mean)
        torch.testing.assert_close(found, room.codebook_gradient(grad, codes, 2, 8, mean), rtol=1e-6, atol=1e-7)
    anywhere = room.codebook_lookup_anywhere(table, codes, torch.float16, False)
    assert torch.equal(anywhere, room.codebook_lookup(table, codes, torch.float16))
