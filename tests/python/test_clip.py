"""Clip: the best range of each block by the output, against a search in numpy; never worse than what it starts from."""

from __future__ import annotations

import numpy as np
import phiquant as pq
import pytest
import torch
from phiquant import PhiquantError
from phiquant.solvers.clip import clip
from phiquant.solvers.kmeans import kmeans
from phiquant.solvers.nearest import mse, rtn
from phiquant.statistics import Statistics

# spec: the columns of a block that is chosen for itself (0: all rows and columns)
SPECS = {
    "int4-g32-sym": 32,
    "uint3-g32-asym": 32,
    "uint4-g32-min-f16": 32,
    "nf4-g64-sym": 64,
    "fp4_e2m1-g32-sym": 32,
    "int4-channel-sym": 512,
    "ternary-g64-sym": 64,
    "int4-tensor-sym": 0,
    "gguf:Q4_0": 32,
    "gguf:Q4_K": 256,
    "gguf:Q2_K": 256,
    "gguf:Q6_K": 256,
}


def layer(rows: int = 6, columns: int = 512) -> tuple[torch.Tensor, Statistics]:
    """A weight with a few large values, and inputs that correlate within and between groups."""
    generator = torch.Generator().manual_seed(columns + rows)
    w = torch.randn(rows, columns, generator=generator) * 0.02
    w[:, ::37] *= 4
    common = torch.randn(900, 40, generator=generator) @ torch.randn(40, columns, generator=generator)
    statistics = Statistics(columns)
    statistics.update(
        common * torch.rand(columns, generator=generator) + torch.randn(900, columns, generator=generator)
    )
    return w, statistics


def spec_of(text: str) -> pq.QuantSpec:
    return pq.target(text).spec if ":" in text else pq.spec(text)


def block_errors(w: torch.Tensor, found: pq.QuantizedTensor, statistics: Statistics, unit: int) -> np.ndarray:
    """d H d^T of each block in float64, by columns of at most 256."""
    d, h = (found.dequantize() - w).double().numpy(), statistics.hessian.double().numpy()
    step = min(unit or w.shape[1], 256)
    parts = [np.einsum("ni,ij,nj->n", d[:, s], h[s, s], d[:, s]) for s in slices(w.shape[1], step)]
    errors = np.stack(parts, 1).reshape(len(w), -1, (unit or w.shape[1]) // step).sum(2)
    return errors if unit else errors.sum(0, keepdims=True)


def slices(columns: int, step: int) -> list[slice]:
    return [slice(start, start + step) for start in range(0, columns, step)]


@pytest.mark.parametrize("text", SPECS)
def test_no_block_is_worse_than_with_rtn_or_weighted_mse(text: str) -> None:
    spec, (w, statistics) = spec_of(text), layer()
    diagonal = statistics.hessian.diagonal() / statistics.tokens
    ours, *others = (
        block_errors(w, found, statistics, SPECS[text])
        for found in (clip(w, spec, statistics), rtn(w, spec), mse(w, spec, diagonal))
    )
    for other in others:
        assert (ours <= other * (1 + 1e-4)).all()
    if text != "ternary-g64-sym":  # whose scale the values' extremes do not decide
        assert ours.sum() < 0.98 * others[0].sum()


@pytest.mark.parametrize("text", ["int4-g32-sym", "gguf:Q4_K"])
def test_the_best_of_all_candidates_block_by_block(text: str) -> None:
    spec, (w, statistics) = spec_of(text), layer()
    unit, group = SPECS[text], 32
    candidates = [mse(w, spec, statistics.hessian.diagonal() / statistics.tokens)]
    groups = w.numpy().reshape(len(w), -1, group)
    low, high = groups.min(2, keepdims=True), groups.max(2, keepdims=True)
    if spec.symmetric:
        high = np.maximum(high, -low)
        low = -high
    for step in range(10):
        share = np.float32(1 - step / 20)
        cut = np.clip(groups, low * share, high * share).reshape(w.shape)
        candidates.append(rtn(torch.from_numpy(cut), spec))
    best = np.min([block_errors(w, found, statistics, unit) for found in candidates], axis=0)
    np.testing.assert_allclose(block_errors(w, clip(w, spec, statistics), statistics, unit), best, rtol=1e-4)


def test_codebooks_are_those_of_kmeans() -> None:
    w, statistics = layer()
    weights = statistics.hessian.diagonal() / statistics.tokens
    spec = pq.spec("codebook8-row")
    assert clip(w, spec, statistics).digests() == kmeans(w, spec, weights).digests()


def test_errors() -> None:
    w, statistics = layer()
    with pytest.raises(PhiquantError, match="clip needs statistics"):
        clip(w, pq.spec("int4-g32-sym"))
    with pytest.raises(PhiquantError, match=r"clip takes a matrix of 512 columns.*\[6, 256\]"):
        clip(w[:, :256], pq.spec("int4-g32-sym"), statistics)
    w[2, 7] = float("nan")
    with pytest.raises(PhiquantError, match=r"\[2, 7\]"):
        pq.quantize_tensor(w, "int4-g32-sym", "clip", statistics=statistics)
