"""What the linears of a float Phi-3 model get as input, decoder layer by decoder layer."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..calibration_inputs import Activations
from ..calibration_layers import ModelLayers
from ..models import phi
from ..statistics import Statistics


@torch.no_grad()
def input_statistics(model: nn.Module, ids: Tensor) -> Iterator[dict[str, Statistics]]:
    """Statistics of the inputs of each decoder layer's linears, by name; at last those of the head's.

    ids: windows [n, T]. Each layer computes once, in float32, on a copy: a layer that was yielded may be rewritten.
    Memory beside the model: one decoder layer, its statistics, and the activations between two layers.
    """
    layers = ModelLayers(model)
    table = model.get_submodule(phi.EMBEDDING).get_parameter("weight").detach()
    activations = Activations((*ids.shape, table.shape[1]), None, "inputs", layers.device)
    activations.replace(lambda batch: F.embedding(ids[batch].to(table.device), table).float())
    activations.arguments = layers.arguments(activations.read(slice(0, 1)))
    for index in range(layers.count):
        work = layers.decoder(index)
        seen = {}
        for part in phi.LAYER_LINEARS:
            linear = work.get_submodule(part)
            seen[f"model.layers.{index}.{part}"] = statistics = Statistics(
                linear.get_parameter("weight").shape[1], device=layers.device
            )
            linear.register_forward_pre_hook(lambda _, x, s=statistics: s.update(x[0]))
        activations.advance(work)
        yield seen
    norm, head = layers.norm(), Statistics(table.shape[1], device=layers.device)
    norm.register_forward_hook(lambda m, x, out: head.update(out))
    activations.arguments = {}
    activations.advance(norm)
    yield {phi.HEAD: head}
