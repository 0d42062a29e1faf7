"""llama.cpp's quantizers with an importance matrix (the mean of x^2 of each column), called in its own library."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from phiquant import imatrix
from quality import linears

sys.path.insert(0, str(Path(__file__).parents[2] / "tests/python"))
import ggml

PACKAGE = "xllamacpp"
KINDS = (
    "Q4_0", "Q4_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S",
    "IQ4_NL", "IQ4_XS",
)  # fmt: skip

_known: dict[float, Any] = {}


def _importance(model: Any, ids: torch.Tensor) -> Any:
    """Collected once for each model: its norms tell them apart."""
    key = float(model.model.layers[0].input_layernorm.weight.double().sum())
    if key not in _known:
        _known[key] = imatrix.collect(model, ids)
    return _known[key]


@torch.no_grad()
def _quantize(model: Any, ids: torch.Tensor, tokenizer: Any, kind: str) -> tuple[Any, float]:
    layers, known = linears(model), _importance(model, ids)
    jobs = [(kind, linear.weight.numpy(), known[name].weights) for name, linear in layers.items()]
    decoded = ggml.decode([(kind, blocks) for blocks in ggml.quantize(jobs)])
    for linear, values in zip(layers.values(), decoded, strict=True):
        linear.weight.copy_(torch.from_numpy(values).view_as(linear.weight))
    _, block, size = ggml.TYPES[kind]
    return model, 8 * size / block


METHODS = {f"{kind}+imatrix": partial(_quantize, kind=kind) for kind in KINDS}
