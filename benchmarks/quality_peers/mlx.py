"""MLX: affine integers by group, scales and biases in the weights' type (counted as 16 bits)."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from quality import linears

PACKAGE = "mlx"


@torch.no_grad()
def _quantize(model: Any, ids: torch.Tensor, tokenizer: Any, bits: int, group: int) -> tuple[Any, float]:
    import mlx.core as mx

    for linear in linears(model).values():
        stored = mx.quantize(mx.array(linear.weight.numpy()).astype(mx.float16), group_size=group, bits=bits)
        back = mx.dequantize(*stored, group_size=group, bits=bits).astype(mx.float32)
        linear.weight.copy_(torch.from_numpy(np.array(back)))
    return model, bits + 32 / group


METHODS = {
    f"affine w{bits}g{group}": partial(_quantize, bits=bits, group=group) for bits in (8, 4, 3, 2) for group in (32, 64)
}
