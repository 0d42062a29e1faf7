"""A Phi-3 model, in memory or on disk, one decoder layer at a time: what is asked of it beside calibration.

T = tokens in a window, D = hidden size, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .calibration_layers import CheckpointLayers, Layers, ModelLayers
from .checkpoint import Checkpoint
from .models import phi


class Layerwise:
    """Layers and their arguments, the last norm, rows of the embedding. Of a checkpoint nothing is kept."""

    def __init__(self, source: nn.Module | str | Path) -> None:
        self._layers: Layers
        if isinstance(source, nn.Module):
            self._layers = ModelLayers(source)
            self.config: Mapping[str, Any] = source.config.to_dict()  # type: ignore[union-attr, operator]
        else:
            checkpoint = Checkpoint(source)
            self._layers, self.config = CheckpointLayers(checkpoint), checkpoint.config
        self._on_disk = not isinstance(source, nn.Module)
        self.tied = phi.sizes(self.config).tied

    def __len__(self) -> int:
        return self._layers.count

    @property
    def identity(self) -> str:
        """What tells this model from others."""
        return self._layers.identity

    def weight(self, module: str, rows: slice = slice(None)) -> Tensor:
        """Rows of a module's weight, in its own dtype; the head of a tied model has that of the embedding."""
        return self._layers.weight(phi.EMBEDDING if self.tied and module == phi.HEAD else module, rows)

    def layer(self, index: int) -> nn.Module:
        """A copy of decoder layer `index`, in float32, without gradients of its own."""
        return self._layers.decoder(index).requires_grad_(False)

    def arguments(self, tokens: int) -> dict[str, Any]:
        """What the model calls its layers with, beside the hidden states [1, T, D], for windows of that many tokens."""
        return self._layers.arguments(torch.zeros(1, tokens, phi.sizes(self.config).hidden))

    def embed(self, ids: Tensor) -> Tensor:
        """float32 [..., T, D]; of a checkpoint only the rows that are asked for are read."""
        if not self._on_disk:
            return F.embedding(ids, self.weight(phi.EMBEDDING)).float()
        found, places = ids.unique(return_inverse=True)
        rows = [self.weight(phi.EMBEDDING, slice(i, i + 1)) for i in found.tolist()]
        return torch.cat(rows).float()[places]

    def normed(self, hidden: Tensor) -> Tensor:
        """What the head gets of the last layer's output."""
        return self._layers.norm().requires_grad_(False)(hidden)
