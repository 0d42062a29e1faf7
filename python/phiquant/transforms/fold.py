"""Norm folding: the weight of each RMSNorm moves into the linear that reads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..quant_spec import QuantSpec
from .pairs import multiply_columns, pairs


@torch.no_grad()
def fold(model: nn.Module, ids: Tensor | None, specs: Mapping[str, QuantSpec | None]) -> dict[str, Any]:
    """norm(x) * g, then W, is norm(x), then W diag(g). A tied head keeps its norm: the embedding shares its weight."""
    for pair in pairs(model):
        norm = model.get_submodule(pair.producer)
        weight = norm.get_parameter("weight").data
        if weight.dim() == 1:
            columns = model.get_submodule(pair.consumer).get_parameter("weight").data
            multiply_columns(columns, weight.float())
            weight.fill_(1)
    return {}
