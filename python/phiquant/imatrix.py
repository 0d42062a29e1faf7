"""Importance matrices: collected from a model, or from the statistics of a calibration; read and written for llama.cpp.

pq.imatrix.write("phi.imatrix.gguf", pq.imatrix.collect(model, ids))
weights = pq.imatrix.read("phi.imatrix.gguf")["model.layers.0.mlp.down_proj"].weights
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .errors import PhiquantError
from .formats.gguf.imatrix import CHUNK, write
from .formats.gguf.imatrix_reader import Importance, read
from .models import phi
from .statistics import Statistics

__all__ = ["CHUNK", "Importance", "collect", "from_statistics", "read", "write"]


def from_statistics(statistics: Mapping[str, Statistics]) -> dict[str, Importance]:
    """The diagonals of second moments, by module: what llama.cpp keeps of them."""
    return {
        module: Importance(known.moments.diagonal().float().cpu().numpy(), known.tokens)
        for module, known in statistics.items()
    }


@torch.no_grad()
def collect(model: nn.Module, ids: Tensor, *, batch: int = 8) -> dict[str, Importance]:
    """Run the model on windows of token ids [n, T]; sums of x^2 over all tokens for each linear, by module.

    The embedding has no inputs. PhiquantError if the inputs of a linear are not finite, or the model has no linears.
    """
    sums: dict[str, Tensor] = {}
    tokens: dict[str, int] = {}

    def see(name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        x = inputs[0].detach().flatten(0, -2)
        square = x.double().square().sum(0).cpu()
        sums[name] = sums[name] + square if name in sums else square
        tokens[name] = tokens.get(name, 0) + len(x)

    linears = [(n, m) for n, m in model.named_modules() if phi.is_matrix(n) and n != phi.EMBEDDING]
    if not linears:
        raise PhiquantError(f"{type(model).__name__} has none of Phi-3's linear layers")
    hooks = [module.register_forward_pre_hook(partial(see, name)) for name, module in linears]
    try:
        for start in range(0, len(ids), batch):
            model(ids[start : start + batch])
    finally:
        for hook in hooks:
            hook.remove()
    for name, values in sums.items():
        if not bool(values.isfinite().all()):
            raise PhiquantError(f"the inputs of {name} are not finite; run the model in float32")
    return {name: Importance(values.numpy().astype(np.float32), tokens[name]) for name, values in sums.items()}
