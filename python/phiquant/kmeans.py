"""k-means of the values of a weight: a codebook, and the code of each value.

`kmeans` minimises sum_i h_i (w_i - C[code_i])^2. See docs/kmeans.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops
from .errors import PhiquantError

METHODS = {"exact": ops.kmeans_exact, "lloyd": ops.kmeans_lloyd, "minibatch": ops.kmeans_minibatch}


def kmeans(
    w: Tensor,
    k: int,
    weights: Tensor | None = None,
    *,
    method: str = "exact",
    rows: int | None = None,
    keep_zero: bool = False,
    **options: object,
) -> tuple[Tensor, Tensor]:
    """Levels and codes of w: (codebook, codes), such that codebook[codes] is near w.

    w: float32, bfloat16 or float16 of any shape and strides. k: 2 to 256 levels.
    weights: importance of each value, not negative, any shape that expands to w's: [K] for a weight [N, K] whose
        input features have the second moments given (the diagonal of the Hessian).
    method: "exact", no k levels have a smaller error. "lloyd", a local optimum; options init
        ("kmeans++", "linear", "quantile", "random", or levels), seed, iterations (at most 100). "minibatch", for
        tensors too large to sort: the same options, batch (65 536 values) and batches (50).
    rows: None, one codebook for the whole tensor; r, one for each r rows: of w [N, K], r runs of K values.
    keep_zero: one of the k levels is 0 exactly, and k-means spends the others on the values that are not 0.

    Returns codebook float32 [k] ([N / rows, k] with rows), ascending, and codes uint8 in w's shape. A code is the
    number of midpoints of neighbouring levels that are <= the value: the nearest level, a tie goes up. If there are
    fewer than k distinct values, the largest level is repeated.

    PhiquantError for values that are not finite, with the index of the first; ValueError for an empty w, weights that
    are negative or not finite, rows that do not divide, an unknown method.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; known methods: {', '.join(METHODS)}")
    if w.numel() == 0:
        raise ValueError(f"w of shape {list(w.shape)} has no values to cluster")
    values = w.detach().contiguous()
    block = _block(w, rows)
    codebook = METHODS[method](values, expand_weights(weights, w), block, k, keep_zero=keep_zero, **options)
    _check_finite(codebook, w)
    codes = ops.codebook_assign(values, codebook)
    return codebook[0] if rows is None else codebook, codes


def vector_kmeans(
    w: Tensor, k: int, dim: int, weights: Tensor | None = None, *, seed: int = 0, iterations: int = 25
) -> tuple[Tensor, Tensor]:
    """Codebook of vectors: each `dim` (2 or 4) neighbouring values of w's last axis share a code.

    w: [..., K], dim divides K. k: 1 to 256, so k = 256 costs 8 / dim bits a value. weights: importance of each vector,
    of a shape that expands to [..., K / dim]. Lloyd's algorithm from k-means++: a local optimum that depends on `seed`.

    Returns codebook float32 [k, dim] and codes uint8 [..., K / dim]: codebook[codes].reshape(w.shape) is near w.
    Errors as for `kmeans`.
    """
    if dim not in (2, 4) or w.ndim == 0 or w.shape[-1] % dim:
        raise ValueError(f"dim is 2 or 4 and divides the last axis; got dim={dim} for w of shape {list(w.shape)}")
    points = w.detach().float().reshape(-1, dim).contiguous()
    shape = (*w.shape[:-1], w.shape[-1] // dim)
    each = expand_weights(weights, points.new_empty(()).expand(shape))
    codebook, codes = ops.kmeans_vectors(
        points, None if each is None else each.reshape(-1), k, seed=seed, iterations=iterations
    )
    _check_finite(codebook, w)
    return codebook, codes.reshape(shape)


def _check_finite(codebook: Tensor, w: Tensor) -> None:
    """The kernels give NaN levels to a block with a value that is not finite: name it."""
    if bool(codebook.isnan().any()):
        index = torch.nonzero(~torch.isfinite(w))
        first = tuple(index[0].tolist())
        raise PhiquantError(
            f"w holds {len(index)} value(s) that are not finite, the first is {w[first].item()} at index "
            f"{list(first)}; repair the checkpoint, or leave this tensor in float"
        )


def _block(w: Tensor, rows: int | None) -> int:
    if rows is None:
        return w.numel()
    if w.ndim < 2 or rows < 1 or len(w) % rows:
        raise ValueError(f"rows={rows} does not divide the rows of w, whose shape is {list(w.shape)}")
    return w.numel() // len(w) * rows


def expand_weights(weights: Tensor | None, w: Tensor) -> Tensor | None:
    """One weight for each value of w, as the ops take them. ValueError for one that is negative or not finite."""
    if weights is None:
        return None
    full = weights.detach().to(w.device, torch.float32).expand(w.shape)
    if not bool(torch.isfinite(weights).all()) or bool((weights < 0).any()):
        raise ValueError("weights must be finite and not negative: they say how much the error of a value counts")
    return full.contiguous()
