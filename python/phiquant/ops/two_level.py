"""Fake quantization with scales in two levels, in one pass over memory (csrc/core/two_level.h)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .affine import FORMATS, RULES, STORAGE, Levels, codec

_refine = torch.ops.phiquant.refine_two_level.default
_out = torch.ops.phiquant.fake_quantize_two_level_out.default


def fake_quantize_two_level_out(
    x: Tensor,
    out: Tensor,
    *,
    block: int,
    qmin: int,
    qmax: int,
    rule: str,
    subs: int,
    sub_qmin: int,
    sub_qmax: int,
    sub_rule: str,
    scale_dtype: torch.dtype,
    format: str = "integer",
    sub_format: str = "integer",
    super_scale: Tensor | None = None,
) -> None:
    """Writes x on its two-level grid to `out`, both contiguous CPU tensors of one dtype; no gradient.

    Blocks are `block` consecutive values with codes qmin..qmax by `rule`, their scales codes sub_qmin..sub_qmax by
    `sub_rule`, of which `subs` share a scale of `scale_dtype`; or all share the float32 [1] `super_scale`.
    """
    own = (block, qmin, qmax, RULES[rule], FORMATS.index(format))
    of_scales = (subs, sub_qmin, sub_qmax, RULES[sub_rule], FORMATS.index(sub_format), STORAGE[scale_dtype])
    _out(x, *own, *of_scales, super_scale, out)


def refine_two_level(
    x: Tensor,
    weights: Tensor,
    scales: Tensor,
    super_scales: Tensor,
    minimums: Tensor | None = None,
    super_minimums: Tensor | None = None,
    *,
    qmin: int,
    qmax: int,
    rule: str,
    sub_qmin: int,
    sub_qmax: int,
    scale_dtype: torch.dtype,
    format: str = "integer",
    levels: Levels | None = None,
    rounds: int = 2,
) -> None:
    """Lowers the weighed squared error of x [N, K] on its two-level grid, in place (csrc/core/two_level_search.h).

    scales, minimums: the codes of the blocks' parameters as float32 [N, K / block]; super_scales, super_minimums:
    float32 [N, supers]; weights: float32 [K], how much an error in each column counts. CPU tensors, contiguous.
    """
    known = {"format": 0, "levels": None} | codec(format, levels, torch.empty(0))
    own = (x.numel() // max(1, scales.numel()), qmin, qmax, RULES[rule], known["format"], known["levels"])
    of_scales = (sub_qmin, sub_qmax, STORAGE[scale_dtype], rounds)
    _refine(x, weights, *own, *of_scales, scales, super_scales, minimums, super_minimums)


@torch.library.register_fake("phiquant::refine_two_level")
def _(*_: Any) -> None:
    return None


@torch.library.register_fake("phiquant::fake_quantize_two_level_out")
def _(*_: Any) -> None:
    return None
