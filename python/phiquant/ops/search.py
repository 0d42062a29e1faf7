"""The range of least squared error of each block, over a grid of shrunken ranges or exactly (csrc/core/search.h)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .affine import RULES, STORAGE, Levels, codec, parameters
from .blocks import block_length, channel_axis, to_blocks

_search_range = torch.ops.phiquant.search_range.default


def search_range(
    x: Tensor,
    scale_shape: Sequence[int],
    *,
    qmin: int,
    qmax: int,
    rule: str,
    scale_dtype: torch.dtype = torch.float32,
    format: str = "integer",
    levels: Levels | None = None,
    exact: bool = False,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(scale, zero_point, minimum) of least squared error for each block of x, as `choose_range` returns them.

    exact False: the best of 20 ranges (36 for "signed_absmax"), never worse than min-max. True: the
    optimum over all scales, rounded to `scale_dtype`; never worse than the first. For rule "minimum", for
    zero points of more than 4 bits and for blocks of more than 2^22 breakpoints it is not the optimum but a
    refinement of the grid's range. Floats and tables of up to 16 levels have the rule "absmax" and no exact
    search. A block that holds a value that is not finite gets a NaN scale.

    weights: float32 [K], at least 0: how much an error in each column of x [..., K] counts. The result is the best
    of the ranges in the weighed error, with scale and minimum fitted to its codes; no exact search. Not for
    per-channel scales of another axis than the first.

    The search adds errors in a fixed order, once per weight: tensors of other devices are searched on the CPU.
    """
    if rule not in ("absmax", "signed_absmax", "zero_point", "minimum"):
        raise ValueError(f"there is no range to search for the rule {rule}: its scale is a mean of |x|")
    if exact and format != "integer":
        raise ValueError(f"the exact search is for integers, not for {format}; use exact=False")
    axis = channel_axis(x.shape, scale_shape)
    if weights is not None and (exact or axis or tuple(weights.shape) != tuple(x.shape[-1:])):
        raise ValueError(
            f"weights are one per column of x {list(x.shape)}, for blocks along its rows and exact=False; "
            f"got {list(weights.shape)}"
        )
    block = block_length(x.shape, scale_shape)
    scale, offset = _search_range(
        to_blocks(x.detach().cpu(), axis),
        block,
        qmin,
        qmax,
        RULES[rule],
        STORAGE[scale_dtype],
        exact,
        **codec(format, levels, torch.empty(0)),
        weights=None if weights is None else _per_block(weights, block),
    )
    return parameters(scale.to(x.device), offset.to(x.device), rule, scale_dtype, scale_shape)


def _per_block(weights: Tensor, block: int) -> Tensor:
    """The weights in whole blocks: repeated where a block is longer than a row."""
    weights = weights.detach().float().cpu().contiguous()
    return weights if block <= len(weights) else weights.repeat(block // max(1, len(weights)))


@torch.library.register_fake("phiquant::search_range")
def _(x: Tensor, block: int, *_: object) -> tuple[Tensor, Tensor]:
    blocks = x.numel() // block if block else 0
    return x.new_empty(blocks, dtype=torch.float32), x.new_empty(blocks, dtype=torch.float32)
