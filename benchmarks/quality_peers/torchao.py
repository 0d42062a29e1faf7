"""torchao: integers of 1 to 8 bits by group; scales float32 in memory, counted as 16 bits, zero points as `bits`."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from quality import linears

PACKAGE = "torchao"


def _quantize(model: Any, ids: torch.Tensor, tokenizer: Any, bits: int, symmetric: bool) -> tuple[Any, float]:
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup
    from torchao.quantization.quant_primitives import MappingType

    mapping = MappingType.SYMMETRIC if symmetric else MappingType.ASYMMETRIC
    config = IntxWeightOnlyConfig(getattr(torch, f"int{bits}"), PerGroup(32), mapping)
    chosen = set(linears(model))
    quantize_(model, config, lambda module, name: name in chosen)
    return model, bits + (16 if symmetric else 16 + bits) / 32


METHODS = {
    f"intx w{bits}g32 {'sym' if symmetric else 'asym'}": partial(_quantize, bits=bits, symmetric=symmetric)
    for bits in (8, 4, 3, 2)
    for symmetric in (True, False)
}
