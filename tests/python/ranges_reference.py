"""Range estimation written out in numpy, a definition at a time: oracles for the kernels, peers in the benchmark."""

from __future__ import annotations

import numpy as np


def dyadic(x: np.ndarray, bins: int) -> tuple[np.ndarray, int]:
    """Counts [2 bins] and exponent of the dyadic histogram of x."""
    x = np.asarray(x, dtype=np.float64).ravel()
    sign = np.signbit(x)[np.isfinite(x)]
    x = np.abs(x[np.isfinite(x)])
    exponent = -126
    while x.size and x.max() >= bins * 2.0**exponent:
        exponent += 1
    step = np.floor(x / 2.0**exponent).astype(np.int64)
    return np.bincount(np.where(sign, bins - 1 - step, bins + step), minlength=2 * bins), exponent


def smoothed(p: np.ndarray, dtype: type, eps: float = 1e-4) -> np.ndarray | None:
    """Empty bins get eps, taken evenly from the others; None if one of those would not stay above zero."""
    empty = p == 0
    if empty.all():
        return None
    share = eps * empty.sum() / (~empty).sum()
    if share >= 1:
        return None
    p = (p.astype(dtype) + np.where(empty, eps, -share).astype(dtype)).astype(dtype)
    return None if (p <= 0).any() else p


def relative_entropy(p: np.ndarray, q: np.ndarray) -> float:
    p, q = p / p.sum(), q / q.sum()
    full = p > 0
    with np.errstate(divide="ignore"):
        return float((p[full] * np.log(p[full] / q[full])).sum())


def kl_notebook(counts: np.ndarray, levels: int, dtype: type = np.float64) -> np.ndarray:
    """What the course's notebook computes, in the order of its steps: a divergence for each number of bins kept.

    The first bin is left out. A level has floor(i / levels) bins, the last level takes in what is left over, and
    its share is given to all of its bins but the very last. Both sides are smoothed as counts.
    """
    counts = counts[1:]
    n = counts.size
    divergences = np.full(n + 2, np.inf)
    for i in range(levels, n):
        p = counts[:i].copy()
        p[-1] += counts[i:].sum()
        width = i // levels
        q = np.zeros(i)
        for level in range(levels):
            inside = slice(level * width, (level + 1) * width if level < levels - 1 else i)
            filled = slice(level * width, (level + 1) * width if level < levels - 1 else i - 1)
            number = np.count_nonzero(p[filled])
            if number:
                q[filled] = counts[:i][inside].sum() / number
        p, q = smoothed(p, dtype), smoothed(q, dtype)
        if p is not None and q is not None:
            divergences[i] = relative_entropy(p, q)
    return divergences


def kl_tensorrt(counts: np.ndarray, levels: int) -> np.ndarray:
    """The TensorRT form: levels of equal width, the tail in P alone."""
    used = np.flatnonzero(counts).max(initial=-1) + 1
    divergences = np.full(counts.size + 1, np.inf)
    for i in range(levels, used + 1):
        p = counts[:i].astype(np.float64)
        p[-1] += counts[i:].sum()
        edges = np.arange(levels + 1) * i // levels
        number = np.add.reduceat(p > 0, edges[:-1]).astype(np.float64)
        mean = np.add.reduceat(counts[:i], edges[:-1]) / np.maximum(number, 1)
        q = np.where(p > 0, np.repeat(mean, np.diff(edges)), 0)
        divergences[i] = relative_entropy(p, q) if q.any() else np.inf
    return divergences


def course_samples(seed: int) -> np.ndarray:
    """The course's data: 20 000 samples of N(U(0, 1), U(50, 100)), of which those above zero are kept."""
    rng = np.random.default_rng(seed)
    x = rng.normal(rng.uniform(0, 1), rng.uniform(50, 100), 20_000)
    return x[x > 0]
