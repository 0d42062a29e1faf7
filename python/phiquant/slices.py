"""The parts of a Phi-3 model that can have a grid of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .models import phi


@dataclass(frozen=True)
class Slice:
    """Rows of a weight that can have a grid of their own, from `start` on.

    name: as a recipe calls them; module: whose weight it is.
    """

    name: str
    module: str
    start: int
    shape: tuple[int, int]

    @property
    def rows(self) -> slice:
        return slice(self.start, self.start + self.shape[0])

    @property
    def layer(self) -> int | None:
        """The decoder layer, None of embedding and head."""
        parts = self.name.split(".")
        return int(parts[2]) if parts[:2] == ["model", "layers"] else None


def slices(config: Mapping[str, Any], split: Callable[[str], bool] = lambda module: True) -> list[Slice]:
    """The slices of the model of that config.json, in the order in which they compute.

    split: whether a fused linear, by name, may be taken apart; otherwise it is one slice. A tied head is not listed:
    the embedding stands for both.
    """
    found = []
    for name, shape in phi.tensors(config):
        module = name.removesuffix(".weight")
        if not phi.is_matrix(module):
            continue
        rows = phi.fused_rows(config, module) if split(module) else {}
        for part, at in (rows or {module: slice(0, shape[0])}).items():
            found.append(Slice(part, module, at.start, (at.stop - at.start, shape[1])))
    order = [phi.EMBEDDING, *phi.LAYER_LINEARS, phi.HEAD]

    def place(one: Slice) -> tuple[int, int]:
        part = next(i for i, name in enumerate(order) if one.module.endswith(name))
        return (-1 if part == 0 else len(found) if one.layer is None else one.layer, part)

    return sorted(found, key=place)
