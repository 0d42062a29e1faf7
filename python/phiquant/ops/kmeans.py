"""k-means and codebooks: typed wrappers of the ops, their meta kernels and gradients.

A codebook is float32 [blocks, size], each row ascending; codes are uint8, and code i of block b stands for
codebook[b, i]. A block is a run of consecutive values. k-means runs on the CPU: tensors of other devices are copied
there, and the levels back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .affine import quantize

_ops = torch.ops.phiquant
STARTS = {"kmeans++": 0, "linear": 1, "quantile": 2, "random": 3}
_GIVEN = 4


def kmeans_exact(x: Tensor, weights: Tensor | None, block: int, k: int, *, keep_zero: bool = False) -> Tensor:
    """The optimal codebook [blocks, k] of each block of x; a block with a value that is not finite gets NaN.

    x: float32, bfloat16 or float16, contiguous. weights: float32 with as many values, not negative, or None.
    """
    return _ops.kmeans_exact.default(x.cpu(), _cpu(weights), block, k, keep_zero).to(x.device)


def kmeans_lloyd(
    x: Tensor,
    weights: Tensor | None,
    block: int,
    k: int,
    *,
    keep_zero: bool = False,
    init: str | Tensor = "kmeans++",
    seed: int = 0,
    iterations: int = 100,
) -> Tensor:
    """As `kmeans_exact`, by Lloyd's algorithm from `init`: a name of STARTS, or levels float32 [blocks, k] (k - 1 with
    keep_zero)."""
    given, start = _start(init)
    return _ops.kmeans_lloyd.default(x.cpu(), _cpu(weights), given, block, k, keep_zero, start, seed, iterations).to(
        x.device
    )


def kmeans_minibatch(
    x: Tensor,
    weights: Tensor | None,
    block: int,
    k: int,
    *,
    keep_zero: bool = False,
    init: str | Tensor = "kmeans++",
    seed: int = 0,
    iterations: int = 100,
    batch: int = 1 << 16,
    batches: int = 50,
) -> Tensor:
    """As `kmeans_lloyd` on a batch of values drawn at random, then a step for each further batch."""
    given, start = _start(init)
    return _ops.kmeans_minibatch.default(
        x.cpu(), _cpu(weights), given, block, k, keep_zero, start, seed, iterations, batch, batches
    ).to(x.device)


def kmeans_vectors(
    x: Tensor, weights: Tensor | None, k: int, *, seed: int = 0, iterations: int = 25
) -> tuple[Tensor, Tensor]:
    """(codebook float32 [k, dim], codes uint8 [n]) of vectors x, float32 [n, dim], dim 2 or 4: Lloyd's algorithm from
    k-means++. NaN levels if a value is not finite."""
    codebook, codes = _ops.kmeans_vectors.default(x.cpu(), _cpu(weights), k, seed, iterations)
    return codebook.to(x.device), codes.to(x.device)


def codebook_assign(x: Tensor, codebook: Tensor) -> Tensor:
    """uint8 codes of x: the number of midpoints of neighbouring levels that are <= x. So the nearest level, and of two
    equally near the upper one. codebook: float32 [blocks, size]; x holds as many blocks of equal length. This is
    `quantize` with a table, for blocks of any length."""
    rows = x.reshape(len(codebook), -1)
    ones = torch.ones(len(codebook), 1, device=x.device)
    return quantize(rows, ones, qmin=0, qmax=codebook.shape[1] - 1, format="table", levels=codebook).reshape(x.shape)


def codebook_lookup(codebook: Tensor, codes: Tensor, dtype: torch.dtype = torch.float32, mean: bool = False) -> Tensor:
    """codebook[block of i, codes[i]] in the shape of codes, cast to `dtype`. codebook: float32 [blocks, size].

    Differentiable in the codebook: the gradient of a level is the sum over its cluster, or with `mean` the mean.
    """
    return _ops.codebook_lookup.default(codebook.contiguous(), codes.contiguous(), dtype, mean)


def codebook_gradient(grad: Tensor, codes: Tensor, blocks: int, size: int, mean: bool = False) -> Tensor:
    """float32 [blocks, size]: sum (or mean) of `grad` over the values of each code. Summed in float64."""
    return _ops.codebook_gradient.default(grad.contiguous(), codes.contiguous(), blocks, size, mean)


def _start(init: str | Tensor) -> tuple[Tensor | None, int]:
    if isinstance(init, Tensor):
        return init.detach().float().cpu().contiguous(), _GIVEN
    if init not in STARTS:
        raise ValueError(f"unknown init {init!r}; known: {', '.join(STARTS)}, or a tensor of levels")
    return None, STARTS[init]


def _cpu(weights: Tensor | None) -> Tensor | None:
    return None if weights is None else weights.cpu()


# --- meta kernels: shapes and dtypes only ---------------------------------------------------------


@torch.library.register_fake("phiquant::kmeans_exact")
def _(x: Tensor, weights: Tensor | None, block: int, k: int, keep_zero: bool) -> Tensor:
    return _levels(x, block, k)


@torch.library.register_fake("phiquant::kmeans_lloyd")
@torch.library.register_fake("phiquant::kmeans_minibatch")
def _(x: Tensor, weights: Tensor | None, init: Tensor | None, block: int, k: int, *_: Any) -> Tensor:
    return _levels(x, block, k)


@torch.library.register_fake("phiquant::kmeans_vectors")
def _(x: Tensor, weights: Tensor | None, k: int, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(k, x.shape[1]), x.new_empty(len(x), dtype=torch.uint8)


def _levels(x: Tensor, block: int, k: int) -> Tensor:
    return x.new_empty(x.numel() // block if block else 0, k, dtype=torch.float32)


@torch.library.register_fake("phiquant::codebook_lookup")
def _(codebook: Tensor, codes: Tensor, dtype: torch.dtype, mean: bool) -> Tensor:
    return torch.empty_like(codes, dtype=dtype)


@torch.library.register_fake("phiquant::codebook_gradient")
def _(grad: Tensor, codes: Tensor, blocks: int, size: int, mean: bool) -> Tensor:
    return grad.new_empty(blocks, size, dtype=torch.float32)


# --- gradients ------------------------------------------------------------------------------------


def _keep(ctx: Any, inputs: tuple, output: Tensor) -> None:
    codebook, codes, _, ctx.mean = inputs
    ctx.save_for_backward(codes)
    ctx.shape = codebook.shape


def _backward(ctx: Any, grad: Tensor) -> tuple:
    (codes,) = ctx.saved_tensors
    return _ops.codebook_gradient.default(grad.contiguous(), codes, *ctx.shape, ctx.mean), None, None, None


torch.library.register_autograd("phiquant::codebook_lookup", _backward, setup_context=_keep)


# --- other devices --------------------------------------------------------------------------------


def _rows_of(codes: Tensor, blocks: int) -> Tensor:
    """Codes as indices into a flat table of all codebooks, [blocks, block]."""
    return codes.reshape(blocks, -1).long()


def codebook_lookup_anywhere(codebook: Tensor, codes: Tensor, dtype: torch.dtype, mean: bool) -> Tensor:
    """`codebook_lookup` written with torch's own."""
    return codebook.gather(1, _rows_of(codes, len(codebook))).to(dtype).reshape(codes.shape)


def codebook_gradient_anywhere(grad: Tensor, codes: Tensor, blocks: int, size: int, mean: bool) -> Tensor:
    """`codebook_gradient` written with torch's own; the order of the sums is the device's."""
    rows = _rows_of(codes, blocks)
    sums = torch.zeros(blocks, size, dtype=torch.float64, device=grad.device)
    values = grad.reshape(blocks, -1).double()
    counts = torch.zeros_like(sums)
    sums.scatter_add_(1, rows, values)
    if mean:
        counts.scatter_add_(1, rows, torch.ones_like(values))
        sums /= counts.clamp(min=1)
    return sums.float()


_library = torch.library.Library("phiquant", "IMPL")
_library.impl("codebook_lookup", codebook_lookup_anywhere, "CompositeExplicitAutograd")
_library.impl("codebook_gradient", codebook_gradient_anywhere, "CompositeExplicitAutograd")
