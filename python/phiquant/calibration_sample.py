"""How long calibration will take, and what it holds: one decoder layer, really solved, on some of the windows."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .calibrate import Run, embedded, head_statistics, parts_of
from .calibration_inputs import Activations
from .calibration_layers import CheckpointLayers
from .calibration_state import Solved
from .checkpoint_source import CheckpointSource
from .models import phi
from .solvers import FOLLOWS_FLOAT
from .split_linear import module_path
from .statistics import Statistics

_WINDOWS = 8  # one batch


@torch.no_grad()
def calibration_seconds(source: CheckpointSource, ids: Tensor, solver: str, folder: Path | None) -> tuple[float, int]:
    """Seconds to solve all on the windows `ids` [n, T], and bytes of activations that this sample did not hold.

    folder: where to keep activations; None: in memory. The peak memory of a layer is that of this process after it.
    """
    layers = CheckpointLayers(source.checkpoint, [entry.module for entry in source.entries])
    specs = {module_path(e.module): e.spec for e in source.entries if e.spec is not None}
    parts = parts_of(specs, 0)
    inside = [name for names in parts.values() for name in names]
    matrices = {name: (specs[name], layers.shape(name)) for name in inside}
    tables = {}
    for name in (phi.EMBEDDING, phi.HEAD):
        if name in specs:  # some rows, where these are solved by themselves
            rows, columns = layers.shape(name)
            piece = next(iter(Solved(None, "", {name: (specs[name], (rows, columns))}).pieces(name).values()))
            matrices[name] = (specs[name], (piece.stop, columns))
            tables[name] = rows / piece.stop
    some = ids[:_WINDOWS]
    scale = len(ids) / len(some)
    if folder is not None:
        folder.mkdir()
    run = Run(layers, solver, Solved(folder, "sample", matrices), None)
    solved = {}
    if phi.EMBEDDING in tables:
        solved[phi.EMBEDDING] = _seconds(lambda: run.solve(phi.EMBEDDING, None))
        del run.solved.specs[phi.EMBEDDING]  # other rows than these are looked up now
    width = layers.shape(phi.EMBEDDING)[1]
    beside = solver in FOLLOWS_FLOAT
    activations = _Timed((*some.shape, width), folder, "sample", layers.device, beside_float=beside)
    exact = layers.decoder(0) if beside else None
    for one in (activations, activations.exact):
        if one is not None:
            one.replace(embedded(run.table, layers.shape(phi.EMBEDDING)[0], some))
    activations.arguments = layers.arguments(activations.read(slice(0, 1)))
    activations.call(layers.decoder(0), activations.read(slice(0, 1)))  # warm
    activations.seen = len(ids) * ids.shape[1]
    work: list[nn.Module] = []
    whole = _seconds(lambda: work.append(run.decoder(0, parts, activations, exact)))
    forward = activations.seconds + _seconds(lambda: activations.advance(work[0], exact))
    layer = whole - activations.seconds + scale * forward
    if phi.HEAD in tables:
        work.clear()
        activations.seconds = 0.0
        statistics = head_statistics(layers, activations)
        solved[phi.HEAD] = _seconds(lambda: run.solve(phi.HEAD, statistics))
        solved[phi.HEAD] += scale * activations.seconds / tables[phi.HEAD]
    held = 0 if folder is not None else round((1 + beside) * (scale - 1) * activations.nbytes)
    return layers.count * layer + sum(tables[name] * seconds for name, seconds in solved.items()), held


class _Timed(Activations):
    """Activations of some windows whose statistics look like those of all: as many tokens, all directions."""

    seconds, seen = 0.0, 0

    def statistics(self, *arguments: Any, **named: Any) -> Statistics:
        found: list[Statistics] = []
        self.seconds += _seconds(lambda: found.append(super(_Timed, self).statistics(*arguments, **named)))
        moments = found[0].moments.diagonal()
        moments += moments.mean()  # of fewer tokens than inputs they would be singular
        found[0].tokens = self.seen
        return found[0]


def _seconds(call: object) -> float:
    began = time.perf_counter()
    call()  # type: ignore[operator]
    return time.perf_counter() - began
