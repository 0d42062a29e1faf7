"""Half-quadratic quantization: offset or scale of each block by a norm that forgives outliers (csrc/core/hqq.h)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .affine import RULES, STORAGE, Levels, codec, parameters
from .blocks import block_length, channel_axis, flat, to_blocks

_hqq = torch.ops.phiquant.hqq.default


def hqq(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    minimum: Tensor | None = None,
    *,
    qmin: int,
    qmax: int,
    rule: str,
    scale_dtype: torch.dtype = torch.float32,
    format: str = "integer",
    levels: Levels | None = None,
    power: float = 0.7,
    beta: float = 10.0,
    kappa: float = 1.01,
    iterations: int = 20,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(scale, zero_point, minimum) of least sum |x - y|^power in each block, from those given on.

    As `choose_range` returns them, and never worse than the start. With a minimum the scale stays; with a zero point it
    is solved after the zero point; without an offset, alone. Tables have up to 16 levels. A block that holds a value
    that is not finite gets a NaN scale. Tensors of other devices are solved on the CPU.
    """
    axis = channel_axis(x.shape, scale.shape)
    given = zero_point if minimum is None else minimum
    found = flat(scale.cpu()).clone()
    offset = torch.zeros_like(found) if given is None else flat(given.cpu()).clone()
    _hqq(
        to_blocks(x.detach().cpu(), axis),
        block_length(x.shape, scale.shape),
        found,
        offset,
        qmin,
        qmax,
        RULES[rule],
        STORAGE[scale_dtype],
        power,
        beta,
        kappa,
        iterations,
        **codec(format, levels, torch.empty(0)),
    )
    return parameters(found.to(x.device), offset.to(x.device), rule, scale_dtype, scale.shape)


@torch.library.register_fake("phiquant::hqq")
def _(*_: Any, **__: Any) -> None:
    return None
