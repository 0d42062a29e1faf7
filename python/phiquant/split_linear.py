"""A fused linear as its projections, each a layer of its own: for grids that differ between q, k, v or gate, up."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .models import phi


class SplitLinear(nn.Module):
    """Several linears of one input: x [..., K] -> [..., N], their outputs side by side.

    The children are ordinary linears, named as models/phi.py names the projections; their weights share
    the memory of the fused one until they are quantized.
    """

    def __init__(self, fused: nn.Linear, rows: dict[str, slice]) -> None:
        super().__init__()
        for name, part in rows.items():
            child = nn.Linear(fused.in_features, part.stop - part.start, bias=False, device="meta")
            child.weight = nn.Parameter(fused.weight.detach()[part], requires_grad=fused.weight.requires_grad)
            self.add_module(name.rpartition(".")[2], child)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return torch.cat([child(input) for child in self.children()], dim=-1)


def projection_name(path: str) -> str:
    """A module's name in a recipe and in files: "...qkv_proj.v_proj" -> "...v_proj"; other paths as they are."""
    parent, _, last = path.rpartition(".")
    above, _, fused = parent.rpartition(".")
    return f"{above}.{last}" if last in phi.SLICES.get(fused, ()) else path


def module_path(name: str) -> str:
    """Where a split model has the projection of that name: "...v_proj" -> "...qkv_proj.v_proj"."""
    fused = phi.fused_name(name)
    return name if fused == name else f"{fused}.{name.rpartition('.')[2]}"


@contextmanager
def split(model: Any, names: Iterable[str]) -> Iterator[None]:
    """Split the fused linears that hold the projections `names`. On an error inside, the model is as it was."""
    fused = dict.fromkeys(phi.fused_name(name) for name in names if phi.fused_name(name) != name)
    config = model.config.to_dict() if fused else {}
    done: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        for name in fused:
            parent, last = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
            linear = getattr(parent, last)
            if type(linear) is nn.Linear:
                done.append((parent, last, linear))
                setattr(parent, last, SplitLinear(linear, phi.fused_rows(config, name)))
        yield
    except BaseException:
        for parent, last, linear in done:
            setattr(parent, last, linear)
        raise
