"""A checkpoint on disk as a source of codes that were chosen on data: solved before the writer reads them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .calibrate import Progress, calibrate, told
from .calibration_layers import CheckpointLayers
from .checkpoint_source import CheckpointSource
from .formats.source import Entry
from .models import phi
from .ranks import ALONE, Ranks
from .recipe import Recipe
from .spec import QuantSpec, Target
from .split_linear import module_path
from .tensor import QuantizedTensor


class CalibratedSource(CheckpointSource):
    """The tensors of a checkpoint folder with the codes that calibrate() chooses for them, kept in a folder.

    what, solver: as for CheckpointSource; any solver. ids: windows of tokens [n, T].
    run: the folder of the run; it may be deleted once the codes are written. The same source, made again after a
    kill, goes on in it. Memory: see calibrate(); read() takes some rows.
    """

    takes_data = True

    def __init__(
        self,
        folder: Path | str,
        what: Recipe | QuantSpec | Target | str,
        solver: str,
        ids: Tensor,
        run: Path,
        *,
        offload: bool = False,
    ) -> None:
        super().__init__(folder, what, solver)
        self._ids, self._run, self._offload = ids, run, offload
        self._specs = {module_path(e.module): e.spec for e in self.entries if e.spec is not None}
        self.entries = [self._told(entry) for entry in self.entries]

    def solve(self, progress: Progress | None = None, ranks: Ranks = ALONE) -> None:
        """Choose the codes, or find them chosen: before the first read(), and on every rank."""
        layers = CheckpointLayers(self.checkpoint, [entry.module for entry in self.entries])
        self._solved = calibrate(
            *(layers, self._specs, self.solver, self._ids),
            folder=self._run,
            offload=self._offload,
            progress=progress,
            ranks=ranks,
        )
        self.fingerprint = self._solved.fingerprint

    def _piece(self, entry: Entry, rows: slice) -> QuantizedTensor | torch.Tensor:
        if entry.spec is None:
            return super()._piece(entry, rows)
        return self._solved.read(module_path(entry.module), rows)

    def _told(self, entry: Entry) -> Entry:
        if entry.spec is None:
            return entry
        origin: dict[str, Any] = told(entry.module, entry.spec, self.solver, self._ids, phi.sizes(self.config).tied)
        return dataclasses.replace(entry, origin=origin)
