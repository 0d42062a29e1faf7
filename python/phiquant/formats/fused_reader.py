"""Projections that a file stores one by one, as the fused tensors of Phi-3 where their grids agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..models import phi
from ..spec import PerChannel, PerGroup, QuantSpec
from .stored import Parts, StoredTensor


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


def fused(config: Mapping[str, Any], stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """`stored` with q, k, v and gate, up joined where all are there and agree; otherwise they stay slices."""
    result = dict(stored)
    for name, shape in phi.tensors(config):
        slices = [stored.get(f"{part}.weight") for part in phi.slice_names(name.removesuffix(".weight"))]
        present = [one for one in slices if one is not None]
        if not present or len(present) < len(slices) or name in stored:
            continue
        specs = {one.spec for one in present}
        spec = present[0].spec
        by_rows = spec is None or isinstance(spec.granularity, PerGroup) or spec.granularity == PerChannel(0)
        kinds = {one.stored_as for one in present}
        if len(specs) == 1 and len(kinds) == 1 and by_rows and (spec is None or spec.two_level is None):
            for one in present:
                del result[one.name]
            result[name] = FusedTensor(name, present[0].stored_as, shape, present)
    return result
