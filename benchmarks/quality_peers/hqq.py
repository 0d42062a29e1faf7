"""hqq: half-quadratic quantization with a float zero point; scales and zero points in float16."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from quality import linears

PACKAGE = "hqq"


@torch.no_grad()
def _quantize(model: Any, ids: torch.Tensor, tokenizer: Any, bits: int, group: int, axis: int) -> tuple[Any, float]:
    from hqq.core.quantize import Quantizer

    for linear in linears(model).values():
        codes, meta = Quantizer.quantize(
            linear.weight.data, nbits=bits, group_size=group, axis=axis, device="cpu", compute_dtype=torch.float32
        )
        meta["compute_dtype"] = torch.float32
        meta["scale"], meta["zero"] = (meta[key].half().float() for key in ("scale", "zero"))
        linear.weight.copy_(Quantizer.dequantize(codes, meta))
    return model, bits + 32 / group


METHODS = {
    f"w{bits}g{group} axis{axis}": partial(_quantize, bits=bits, group=group, axis=axis)
    for bits in (8, 4, 3, 2)
    for group, axis in ((64, 1), (64, 0), (32, 0))
}
