"""A checkpoint on disk as a source of codes: tensors are quantized while the writer reads them."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from .checkpoint import Checkpoint, file_identity
from .errors import PhiquantError
from .formats.receipt import version
from .formats.source import Entry, row_slices
from .models import phi
from .recipe import Recipe, as_recipe
from .solvers import NEEDS_STATISTICS, SOLVERS, quantize_tensor
from .spec import FloatName, QuantSpec, Target, target
from .tensor import QuantizedTensor, join_rows


class CheckpointSource:
    """The tensors of a checkpoint folder, quantized piece by piece inside read().

    what: a target or its name, a spec or its text, or a Recipe. A float target ("gguf:F16") sets the
        dtype of all tensors; otherwise those that stay float keep the dtype of the checkpoint.
    solver: "rtn", "mse" or "mse_exact": solvers that need the weight alone.
    PhiquantError for a checkpoint, a recipe or a shape that does not fit.
    """

    takes_data = False

    def __init__(self, folder: Path | str, what: Recipe | QuantSpec | Target | str, solver: str = "rtn") -> None:
        if solver not in SOLVERS:
            raise PhiquantError(f"unknown solver {solver!r}; known solvers: {', '.join(SOLVERS)}")
        if solver in NEEDS_STATISTICS and not self.takes_data:
            raise PhiquantError(f"{solver} needs data; give calibration=, or use a CalibratedSource")
        self.checkpoint = Checkpoint(folder)
        self.config: dict[str, Any] = self.checkpoint.config
        self.tokenizer_dir: Path | None = self.checkpoint.folder
        self.solver = solver
        recipe, float_dtype = _read(what, self.config)
        self._places: dict[str, tuple[str, int]] = {}  # where the checkpoint has an entry: tensor, first row
        self.entries: Sequence[Entry] = list(self._entries(recipe, float_dtype))
        self.fingerprint = self._fingerprint()
        self._reader = ThreadPoolExecutor(1, "phiquant-read")
        self._ahead: tuple[str, slice, Future[Any]] | None = None

    def read(self, entry: Entry, rows: slice | None = None) -> QuantizedTensor | torch.Tensor:
        """See Source.read. Float tensors must be finite too: PhiquantError names tensor and index."""
        if rows is not None:
            return self._in_turn(entry, rows)
        pieces = [self._piece(entry, piece) for piece in row_slices(entry)]
        if len(pieces) == 1:
            return pieces[0]
        if entry.spec is None:
            return torch.cat(pieces)  # type: ignore[arg-type]
        return join_rows(pieces)  # type: ignore[arg-type]

    def first_layers(self, count: int) -> CheckpointSource:
        """The same checkpoint as a model of its first `count` decoder layers."""
        cut = copy.copy(self)
        cut.config = {**self.config, "num_hidden_layers": count}
        names = {name.removesuffix(".weight") for name, _ in phi.tensors(cut.config)}
        cut.entries = [entry for entry in self.entries if phi.fused_name(entry.module) in names]
        return cut

    def _in_turn(self, entry: Entry, rows: slice) -> QuantizedTensor | torch.Tensor:
        """These rows; the next as many are read and quantized while the caller packs and writes these."""
        ahead, self._ahead = self._ahead, None
        ready = ahead is not None and ahead[:2] == (entry.name, rows)
        piece = ahead[2].result() if ahead is not None and ready else self._piece(entry, rows)
        following = slice(rows.stop, min(2 * rows.stop - rows.start, entry.shape[0] if entry.shape else 1))
        if following.start < following.stop:
            self._ahead = (entry.name, following, self._reader.submit(self._piece, entry, following))
        return piece

    def _piece(self, entry: Entry, rows: slice) -> QuantizedTensor | torch.Tensor:
        stored, first = self._places[entry.name]
        values = self.checkpoint.read(stored, slice(rows.start + first, rows.stop + first) if entry.shape else rows)
        if entry.spec is None:
            return values
        return quantize_tensor(values, entry.spec, solver=self.solver, name=entry.name, first_row=rows.start)

    def _entries(self, recipe: Recipe, float_dtype: FloatName | None) -> Iterator[Entry]:
        """The tensors of the checkpoint; projections with specs of their own in place of their fused weight."""
        shapes, config = self.checkpoint.shapes, self.config
        matrices = [name.removesuffix(".weight") for name in shapes if phi.is_matrix(name.removesuffix(".weight"))]
        tied = phi.sizes(config).tied
        specs = recipe.resolve([*matrices, phi.HEAD] if tied else matrices)
        if tied and specs[phi.HEAD] != specs[phi.EMBEDDING]:
            raise PhiquantError(
                f"{phi.HEAD} and {phi.EMBEDDING} share one weight, so a recipe must give them the same spec: "
                f"{specs[phi.HEAD] or 'float'} and {specs[phi.EMBEDDING] or 'float'}"
            )
        origin = {"solver": self.solver}
        for name, rows, entry in entries(config, specs, float_dtype or self.checkpoint.dtype, origin):
            if entry.spec is not None:
                _check_shape(entry.name, entry.shape, entry.spec)
            self._places[entry.name] = (name, rows.start)
            yield entry

    def _fingerprint(self) -> str:
        inputs = {
            "files": [file_identity(path) for path in self.checkpoint.files],
            "config": self.config,
            "entries": [[e.name, e.shape, str(e.spec), e.dtype] for e in self.entries],
            "solver": self.solver,
            "versions": [version("phiquant"), torch.__version__],
        }
        return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def entries(
    config: Mapping[str, Any],
    specs: Mapping[str, QuantSpec | None],
    dtype: FloatName | Callable[[str], FloatName],
    origin: Mapping[str, Any] | None = None,
) -> Iterator[tuple[str, slice, Entry]]:
    """What a file of the model of that config.json holds: (tensor, its rows, their entry), in the order of the model.

    specs: of a resolved recipe: projections that are there by name stand in place of their fused weight.
    dtype: of float tensors, or by their names. origin: of those with a spec.
    """
    for name, shape in phi.tensors(config):
        module = name.removesuffix(".weight")
        whole = {module: slice(0, shape[0] if shape else 1)}
        split = phi.is_matrix(module) and module not in specs
        for part, rows in (phi.fused_rows(config, module) if split else whole).items():
            own = (rows.stop - rows.start, *shape[1:]) if split else shape
            spec, kept = specs.get(part), dtype if isinstance(dtype, str) else dtype(name)
            yield name, rows, Entry(f"{part}.weight" if split else name, own, spec, kept, origin if spec else None)


def _read(what: Recipe | QuantSpec | Target | str, config: dict[str, Any]) -> tuple[Recipe, FloatName | None]:
    """The recipe, and the dtype of all tensors if `what` is a float target."""
    if isinstance(what, str) and ":" in what:
        what = target(what)
    if isinstance(what, Target) and what.spec is None and what.mixture is None:
        return Recipe(), what.float_dtype
    return as_recipe(what, config), None


def _check_shape(name: str, shape: tuple[int, ...], spec: QuantSpec) -> None:
    try:
        spec.scale_shape(shape)
    except ValueError as error:
        raise PhiquantError(f"{name}: {error}") from error
