"""Projections that a file stores one by one, as the fused tensors of Phi-3 where their grids agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ...models import phi
from ...spec import PerChannel, PerGroup, QuantSpec
from ..stored import Parts, StoredTensor


@dataclass(frozen=True, eq=False)
class FusedTensor(StoredTensor):
    """Rows of several tensors, one after the other. Their grids are the same, and no scale crosses a border."""

    slices: Sequence[StoredTensor]

    @property
    def spec(self) -> QuantSpec | None:
        return self.slices[0].spec

    def parts(self, spec: QuantSpec, rows: slice | None = None) -> Parts:
        found = [one.parts(spec, inner) for one, inner in self._inside(rows)]
        return {name: np.concatenate([part[name] for part in found]) for name in found[0]}

    def raw(self, rows: slice | None = None) -> np.ndarray:
        return np.concatenate([one.raw(inner) for one, inner in self._inside(rows)])

    def values(self, rows: slice | None = None) -> np.ndarray:
        return np.concatenate([one.values(inner) for one, inner in self._inside(rows)])

    def reference(self, rows: slice | None = None) -> np.ndarray:
        return np.concatenate([one.reference(inner) for one, inner in self._inside(rows)])

    def _inside(self, rows: slice | None) -> list[tuple[StoredTensor, slice]]:
        start, stop, _ = (rows or slice(None)).indices(self.shape[0])
        found, first = [], 0
        for one in self.slices:
            inner = slice(max(start - first, 0), min(stop - first, one.shape[0]))
            if inner.start < inner.stop:
                found.append((one, inner))
            first += one.shape[0]
        return found


def fused(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """`stored` with q, k, v and gate, up joined where all are there and agree; otherwise they stay slices."""
    result = dict(stored)
    for module in dict.fromkeys(phi.fused_name(name.removesuffix(".weight")) for name in stored):
        slices = [stored.get(f"{part}.weight") for part in phi.slice_names(module)]
        present = [one for one in slices if one is not None]
        if present and len(present) == len(slices) and f"{module}.weight" not in stored and _agree(present):
            for one in present:
                del result[one.name]
            shape = (sum(one.shape[0] for one in present), *present[0].shape[1:])
            name = f"{module}.weight"
            result[name] = FusedTensor(name, present[0].stored_as, shape, present)
    return result


def _agree(slices: Sequence[StoredTensor]) -> bool:
    """Whether one grid says all of them, and no scale is shared by rows of two."""
    spec = slices[0].spec
    alone = spec is None or isinstance(spec.granularity, PerGroup) or spec.granularity == PerChannel(0)
    same = len({(one.spec, one.stored_as, one.shape[1:]) for one in slices}) == 1
    return same and alone and (spec is None or spec.two_level is None)
