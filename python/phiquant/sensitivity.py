"""What it costs to quantize one slice of a Phi-3 model, for each grid it might get: the input of a search for bits.

A slice is the projection q, k, v, o, gate, up or down of a layer, the embedding, or the head. Its loss on a grid is the
KL divergence of the model's tokens, float model to model in which that slice alone is quantized, in nats per token:
"kl": measured, on the calibration windows: one run of the layers behind the slice for each grid. Memory: the model in
    float32, and three states [n, T, D] of the windows.
"proxy": the second-order term of the same KL, 1/2 sum_r E[g_r^2] (D H D^T)_rr with the error D of the slice, the second
    moments H of its inputs and the gradients g of the model's own log-likelihood in its outputs: one run forward and
    one back, whatever the number of slices and grids. Memory: one decoder layer in float32, the inputs of all layers
    ([n, T, D] each; with a folder in a file there), the head in the checkpoint's dtype, the logits of a window.
n = windows, T = tokens in a window, D = hidden size, V = vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from .calibrate import nearest
from .errors import PhiquantError
from .formats.partial import write_atomically
from .formats.receipt import version
from .layerwise import Layerwise
from .sensitivity_kl import measure_kl
from .sensitivity_proxy import measure_proxy
from .slices import Slice, slices
from .solvers import NEEDS_STATISTICS, quantize_tensor
from .spec import QuantSpec
from .statistics import Statistics

__all__ = ["Losses", "Method", "Slice", "measure", "slices"]

Method = Literal["kl", "proxy"]
Losses = dict[str, dict[str, float]]  # name of a slice -> text of a spec -> nats per token
Progress = Callable[[str, int, int], None]  # (name of the slice, slices done, slices in all)

_MEASURES = {"kl": measure_kl, "proxy": measure_proxy}
_log = logging.getLogger("phiquant")


@torch.no_grad()
def measure(
    model: nn.Module | str | Path | Layerwise,
    grids: Mapping[Slice, Sequence[QuantSpec]],
    ids: Tensor,
    solver: str = "rtn",
    method: Method = "kl",
    *,
    folder: str | Path | None = None,
    progress: Progress | None = None,
) -> Losses:
    """The loss of each slice on each of its grids, by name and by text, from the windows of token ids `ids` [n, T].

    model: in memory, or the folder of a checkpoint. solver: chooses the codes; one that needs data has the inputs that
    the float model gives, and the embedding gets the nearest codes.
    folder: keeps a JSON file for each slice, so that a killed measurement goes on, and further grids are added to it.
    PhiquantError if that folder belongs to another model, text, solver or method. The model is unchanged.
    """
    if method not in ("kl", "proxy"):
        raise PhiquantError(f"sensitivity is measured by 'kl' or by 'proxy', not by {method!r}")
    walk = model if isinstance(model, Layerwise) else Layerwise(model)
    book = Book(None if folder is None else Path(folder), walk, grids, ids, solver, method, progress)
    if book.missing:
        _MEASURES[method](walk, book, ids)
    return book.losses


class Book:
    """What is measured so far, what is missing, and the files that keep it."""

    def __init__(
        self,
        folder: Path | None,
        walk: Layerwise,
        grids: Mapping[Slice, Sequence[QuantSpec]],
        ids: Tensor,
        solver: str,
        method: Method,
        progress: Progress | None,
    ) -> None:
        self.folder, self.solver, self.progress = folder, solver, progress
        self.grids, self._done = grids, 0
        self.losses: Losses = {one.name: {} for one in grids}
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        facts = [walk.identity, solver, method, version("phiquant"), torch.__version__, list(ids.shape)]
        digest = hashlib.sha256(json.dumps(facts).encode() + ids.numpy().tobytes())
        self._fingerprint = digest.hexdigest()
        for one in grids:
            self._read(one)

    @property
    def missing(self) -> dict[Slice, list[QuantSpec]]:
        """The grids that are not measured yet."""
        left = {one: [s for s in specs if str(s) not in self.losses[one.name]] for one, specs in self.grids.items()}
        return {one: specs for one, specs in left.items() if specs}

    @property
    def needs_statistics(self) -> bool:
        return self.solver in NEEDS_STATISTICS

    def errors(
        self, one: Slice, weight: Tensor, specs: Sequence[QuantSpec], statistics: Statistics | None
    ) -> Iterator[tuple[QuantSpec, Tensor]]:
        """For each grid the values that its codes stand for, float32 [N, K]."""
        for spec in specs:
            solver = nearest(spec) if self.needs_statistics and statistics is None else self.solver
            found = quantize_tensor(weight, spec, solver, f"{one.name}.weight", statistics=statistics)
            yield spec, found.dequantize()

    def add(self, one: Slice, found: Mapping[QuantSpec, float], began: float) -> None:
        """Note the losses of a slice, and keep them."""
        mine = self.losses[one.name]
        mine |= {str(spec): max(0.0, loss) for spec, loss in found.items()}
        told = ", ".join(f"{loss:.2e} {spec}" for spec, loss in found.items())
        _log.info("%s: %s; %.1f s", one.name, told, time.monotonic() - began)
        if self.folder is not None:
            content = {"fingerprint": self._fingerprint, "slice": one.name, "losses": mine}
            write_atomically(self._path(one), json.dumps(content, indent=1))

    def tell(self, one: Slice) -> None:
        if self.progress:
            self.progress(one.name, self._done, len(self.grids))
        self._done += 1

    def _path(self, one: Slice) -> Path:
        assert self.folder is not None
        return self.folder / f"{one.name}.json"

    def _read(self, one: Slice) -> None:
        path = self._path(one)
        if not path.exists():
            return
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            mine = {str(spec): float(loss) for spec, loss in content["losses"].items()}
            fingerprint = content["fingerprint"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PhiquantError(f"{path} is damaged ({error}); delete it, and it is measured again") from error
        if fingerprint != self._fingerprint:
            raise PhiquantError(
                f"{path} belongs to a measurement of another model, text, solver, method or version; "
                "delete the folder or give another"
            )
        self.losses[one.name] = mine
