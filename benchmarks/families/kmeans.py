"""k-means and codebooks: speed and error against scikit-learn and kmeans1d; rates of gradient, assignment and lookup.

    python benchmarks/families/kmeans.py [--repeats 9] [--json]

Bars, 1 thread: exact k-means of 9.4 M bf16 weights, k = 16 and 256: >= 100x scikit-learn's Lloyd on the same data,
error never above its. float32, 1 M: >= 10x kmeans1d. Centroid gradient of 25 M weights: >= 1 G weights/s, both
forms. 2 threads against 1: >= 1.5x. In the rows of k-means "equal" means that our error is not above theirs.

scikit-learn and kmeans1d run once: k = 256 takes scikit-learn two minutes. It gets its defaults, but one start; its
tolerance lets it stop after few iterations, far from the optimum.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import kmeans1d
import phiquant as pq
import torch
from common import Row, interleave, main
from phiquant import ops
from sklearn.cluster import KMeans
from torch import Tensor

MILLION = 1_000_000


def weights(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Spread as the values of a trained layer are: about Gaussian, sigma 0.02."""
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)


def error(w: Tensor, codebook: Tensor) -> float:
    """Sum of squared distances to the nearest level."""
    codebook = codebook.reshape(1, -1).float()
    nearest = ops.codebook_lookup(codebook, ops.codebook_assign(w, codebook))
    return float((nearest.double() - w.double()).square().sum())


def against_sklearn(repeats: int, k: int) -> Row:
    """Levels and codes of 9.4 M bf16 weights."""
    w = weights(94 * MILLION // 10, dtype=torch.bfloat16)
    data = w.float().numpy()[:, None]
    model = KMeans(k, n_init=1, random_state=0)
    began = time.perf_counter()
    model.fit(data)
    theirs = time.perf_counter() - began
    ours = interleave({"ours": lambda: pq.kmeans(w, k)}, repeats)["ours"]
    never_above = error(w, pq.kmeans(w, k)[0]) <= error(w, torch.from_numpy(model.cluster_centers_).sort(0).values)
    return Row(f"exact 9.4 M bf16 k={k}: sklearn, {model.n_iter_} its", [theirs] * len(ours), ours, 100.0, never_above)


def against_kmeans1d(repeats: int) -> Row:
    w = weights(MILLION)
    values = w.double().numpy()
    began = time.perf_counter()
    _, centers = kmeans1d.cluster(values, 16)
    theirs = time.perf_counter() - began
    ours = interleave({"ours": lambda: pq.kmeans(w, 16)}, repeats)["ours"]
    same = error(w, pq.kmeans(w, 16)[0]) <= error(w, torch.tensor(centers)) * (1 + 1e-6)
    return Row("exact 1 M float32 k=16: kmeans1d", [theirs] * len(ours), ours, 10.0, same)


def rates(repeats: int) -> list[Row]:
    """25 M weights, against torch's own way to do the same."""
    w = weights(3072, 8192)
    grad = weights(3072, 8192)
    rows = []
    for k in (16, 256):
        codebook = pq.kmeans(w[:64], k)[0][None]
        codes = ops.codebook_assign(w, codebook)
        index = codes.int()
        middles = (codebook[0, 1:] + codebook[0, :-1]) / 2

        def theirs_gradient(k: int = k, index: Tensor = index) -> Tensor:
            return torch.zeros(k).index_add_(0, index.flatten(), grad.flatten())

        runs = {
            "index_add_": theirs_gradient,
            "sum": lambda k=k, codes=codes: ops.codebook_gradient(grad, codes, 1, k),
            "mean": lambda k=k, codes=codes: ops.codebook_gradient(grad, codes, 1, k, mean=True),
            "bucketize": lambda middles=middles: torch.bucketize(w, middles, right=True, out_int32=True),
            "assign": lambda codebook=codebook: ops.codebook_assign(w, codebook),
            "index": lambda codebook=codebook, index=index: codebook[0].index_select(0, index.flatten()),
            "lookup": lambda codebook=codebook, codes=codes: ops.codebook_lookup(codebook, codes),
        }
        times = interleave(runs, repeats)
        limit = w.numel() / 1e9  # 1 G weights a second
        for name, theirs, bar in (
            ("sum", "index_add_", limit),
            ("mean", "index_add_", limit),
            ("assign", "bucketize", None),
            ("lookup", "index", None),
        ):
            what = f"gradient by {name}" if bar else name
            rows.append(Row(f"25 M k={k}: {what}, {theirs}", times[theirs], times[name], None, None, bar))
    return rows


def threads(repeats: int) -> list[Row]:
    w16, w32 = weights(94 * MILLION // 10, dtype=torch.bfloat16), weights(256, 8192)
    million, grad = weights(MILLION), weights(3072, 8192)
    codes = pq.kmeans(grad.bfloat16(), 16)[1]
    cases = {
        "exact 9.4 M bf16 k=16": (lambda: pq.kmeans(w16, 16), 1.5),
        "exact 9.4 M bf16 k=256": (lambda: pq.kmeans(w16, 256), 1.5),
        "exact 1 M float32 k=16": (lambda: pq.kmeans(million, 16), None),
        "exact 256 rows of 8192, k=16": (lambda: pq.kmeans(w32, 16, rows=1), 1.5),
        "gradient 25 M": (lambda: ops.codebook_gradient(grad, codes, 1, 16), 1.5),
    }
    rows = []
    for name, (run, bar) in cases.items():

        def timed(n: int, run=run) -> None:
            torch.set_num_threads(n)
            run()

        times = interleave({n: lambda n=n, timed=timed: timed(n) for n in (1, 2)}, repeats)
        rows.append(Row(f"{name}: 2 threads against 1", times[1], times[2], bar))
    torch.set_num_threads(1)
    return rows


def others(repeats: int) -> list[Row]:
    """What has no bar: the ways that do not give the optimum, and the optimum of a large float32 tensor."""
    w = weights(3072, 8192)
    times = interleave(
        {
            "exact": lambda: pq.kmeans(w, 16),
            "lloyd": lambda: pq.kmeans(w, 16, method="lloyd"),
            "minibatch": lambda: pq.kmeans(w, 16, method="minibatch"),
            "vectors": lambda: pq.vector_kmeans(w[:512], 256, 4, iterations=5),
        },
        min(repeats, 3),
    )
    names = {
        "lloyd": "25 M float32 k=16: Lloyd (theirs: our exact)",
        "minibatch": "25 M float32 k=16: mini-batches (theirs: our exact)",
        "vectors": "4.2 M as 1 M vectors, k=256, 5 its (theirs: 25 M exact)",
    }
    return [Row(label, times["exact"], times[name], None) for name, label in names.items()]


def rows(repeats: int) -> list[Row]:
    torch.set_num_threads(1)
    found = [against_sklearn(repeats, 16), against_sklearn(repeats, 256), against_kmeans1d(repeats)]
    return found + rates(repeats) + threads(repeats) + others(repeats)


if __name__ == "__main__":
    main(__doc__, rows)
