"""optimum-quanto: integers by group with float16 scales and shifts, also with its HQQ optimizer."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from quality import linears

PACKAGE = "optimum-quanto"


@torch.no_grad()
def _quantize(model: Any, ids: torch.Tensor, tokenizer: Any, bits: int, group: int, hqq: bool) -> tuple[Any, float]:
    from optimum import quanto

    optimizer, kind = quanto.HqqOptimizer() if hqq else quanto.MaxOptimizer(), getattr(quanto, f"qint{bits}")
    for linear in linears(model).values():
        scale, shift = optimizer(linear.weight.data, kind, 0, group)
        made = quanto.quantize_weight(linear.weight.data, kind, 0, scale, shift, group)
        linear.weight.copy_(made.dequantize())
    return model, bits + 32 / group


METHODS = {
    f"qint{bits} g{group}{' hqq' if hqq else ''}": partial(_quantize, bits=bits, group=group, hqq=hqq)
    for bits in (4, 2)
    for group in (32, 128)
    for hqq in (False, True)
}
