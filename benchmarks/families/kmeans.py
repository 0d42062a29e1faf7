"""k-means and codebooks: speed and inertia against scikit-learn and kmeans1d, rates of gradient, assignment, lookup.

    python benchmarks/families/kmeans.py [--repeats 9] [--json]

Bars, 1 thread: exact k-means of 9.4 M bf16 weights, k = 16 and 256: >= 100x scikit-learn's Lloyd on the same data,
inertia never above it. fp32, 1 M: >= 10x kmeans1d. Centroid gradient, 25 M weights: >= 1 G weights/s, both forms. 2
threads against 1: >= 1.5x. scikit-learn runs once; with k = 256 on a tenth of the data and 10 iterations at most,
so the ratio of that row is a lower bound of what the whole would show.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import kmeans1d
import numpy as np
import phiquant as pq
import torch
from common import Row, interleave, main
from phiquant import ops
from sklearn.cluster import KMeans
from torch import Tensor

MILLION = 1_000_000


def weights(n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values spread as those of a trained layer are: Gaussian, sigma 0.02."""
    return (torch.randn(n, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)


def inertia(w: Tensor, codebook: Tensor, codes: Tensor) -> float:
    error = ops.codebook_lookup(codebook.reshape(1, -1), codes).double() - w.double()
    return float(error.square().sum())


def seconds(run: Callable[[], object]) -> tuple[float, object]:
    began = time.perf_counter()
    result = run()
    return time.perf_counter() - began, result


def against_sklearn(repeats: int, k: int, n: int, iterations: int) -> Row:
    """Levels and codes by both; their inertia is computed by ours for theirs too, from their levels."""
    w = weights(94 * MILLION // 10, torch.bfloat16)
    data = w[:n].float().numpy()[:, None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "did not converge": said in the name of the row
        theirs, model = seconds(KMeans(k, n_init=1, max_iter=iterations, random_state=0).fit(data).__class__ and (
            lambda: KMeans(k, n_init=1, max_iter=iterations, random_state=0).fit(data)
        ))
    ours = interleave({"ours": lambda: pq.kmeans(w, k)}, repeats)["ours"]
    centers = torch.from_numpy(np.sort(model.cluster_centers_[:, 0])).float()[None]
    sub = w[:n].contiguous()
    found = inertia(sub, *pq.kmeans(sub, k))
    best = inertia(sub, centers, ops.codebook_assign(sub, centers)) <= found * (1 - 1e-6)
    part = "" if n == w.numel() else f" of {n / MILLION:.1f} M, {model.n_iter_} iterations"
    return Row(f"exact, 9.4 M bf16, k={k}: sklearn{part}", [theirs], [float(np.median(ours))], 100.0, not best)
