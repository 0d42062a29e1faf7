"""Data-driven solvers over a whole model: decoder layer by decoder layer, on the inputs of the quantized prefix.

One loop for a model in memory and for a checkpoint on disk (calibration_layers.py). Beside what gives the layers,
memory holds one decoder layer in float32, one matrix and its statistics, and the activations between two layers;
with offload, those of some windows. Solvers that follow the float model need layer and activations twice.
T = tokens in a window, D = hidden size.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .calibration_inputs import Activations
from .calibration_layers import Layers
from .calibration_state import Solved
from .errors import PhiquantError
from .evaluate import windows
from .formats.receipt import version
from .models import phi
from .ranks import ALONE, Ranks
from .solvers import FOLLOWS_FLOAT, quantize_tensor
from .spec import Codebook, QuantSpec
from .statistics import Statistics
from .tensor import QuantizedTensor, ids_digest
from .testing import training_text

Calibration = str | Sequence[str] | Sequence[Sequence[int]] | Tensor
Progress = Callable[[str, int, int], None]  # (name of the layer, layers done, layers in all)
Table = Callable[[slice], Tensor]  # rows of an embedding, [., D] float32

WINDOW, WINDOWS = 512, 64  # tokens in a window, windows taken from a text
_ROWS = 1024  # rows, evenly spaced, that the reported output error is measured on
_SHOWN = 2  # windows that the reported error of a decoder layer is measured on
_AS_INPUT = 0.3  # of a shared table: docs/methods/calibration.md measured 0 to 10
_TABLE_ROWS = 1 << 14  # of the embedding, read at a time

_log = logging.getLogger("phiquant")


def token_windows(calibration: Calibration | None, tokenizer: Any = None) -> Tensor:
    """Token ids [n, T], int64: given ones as they are, or the first windows of texts (joined by <|endoftext|>).

    calibration: a text, texts, lists of ids of one length, or None for testing.training_text(), source code that
        suits phi3-tiny. Texts need the tokenizer. PhiquantError for anything else.
    """
    if isinstance(calibration, Tensor) and calibration.dim() == 2 and not calibration.is_floating_point():
        return calibration.long().cpu()
    if calibration is None:
        calibration = training_text(WINDOW * WINDOWS * 8)
    texts = [calibration] if isinstance(calibration, str) else list(calibration)
    if texts and all(isinstance(text, str) for text in texts):
        if tokenizer is None:
            raise PhiquantError("calibration texts need the model's tokenizer: quantize(..., tokenizer=tokenizer)")
        return torch.tensor(windows(tokenizer, "<|endoftext|>".join(texts), WINDOW, WINDOWS))
    lengths = {len(row) for row in texts}
    if len(lengths) != 1 or not lengths.pop():
        raise PhiquantError("calibration data is text, a list of texts, or ids: windows of one length, [n, T]")
    return torch.tensor(texts)


@torch.no_grad()
def calibrate(
    layers: Layers,
    specs: Mapping[str, QuantSpec],
    solver: str,
    ids: Tensor,
    *,
    folder: Path | None = None,
    offload: bool = False,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> Solved:
    """Codes for the modules that `specs` names, of a Phi-3 model that stays as it is.

    Each decoder layer sees what the quantized layers before it make of the windows `ids` [n, T], and inside a layer
    each linear what the quantized linears before it make. The embedding gets the nearest codes: it has no inputs to
    weigh errors by. Where lm_head shares it, errors are weighed by what that reads in the float model.
    folder: where each matrix is kept once it is solved, so that a killed run goes on to the same bytes (on the same
        machine, with as many threads); the codes are read from there. offload: keep the activations there as well,
        not in memory; a killed run then goes on from the inputs of the last decoder layer it reached.
    ranks: processes that all make this call and share the forwards and the statistics; the codes are those of one
        process. A folder must be one that all of them see; rank 0 writes there, and solves.
    """
    if offload and folder is None:
        raise PhiquantError("offload keeps activations in the folder of the run; give folder=")
    parts = [parts_of(specs, index) for index in range(layers.count)]
    known = {phi.EMBEDDING, phi.HEAD}.union(*(names for one in parts for names in one.values()))
    if strangers := [name for name in specs if name not in known]:
        raise PhiquantError(f"{strangers[0]} is no layer of a {phi.ARCHITECTURE}; give it a data-free solver")
    solved = Solved(
        folder, _fingerprint(layers, specs, solver, ids), {n: (s, layers.shape(n)) for n, s in specs.items()}
    )
    run = Run(layers, solver, solved, progress, ranks)
    if phi.EMBEDDING in specs:
        weighed = layers.tied and solved.missing(phi.EMBEDDING)
        place = folder if offload else None
        run.solve(phi.EMBEDDING, table_statistics(layers, ids, place, progress, ranks) if weighed else None)
    stages = [[name for names in one.values() for name in names] for one in parts]
    stages.append([phi.HEAD] if phi.HEAD in specs else [])
    unsolved = [index for index, names in enumerate(stages) if any(map(solved.missing, names))]
    if not unsolved:
        return solved
    rows, width = layers.shape(phi.EMBEDDING)
    label = f"activations-{solved.fingerprint[:12]}"
    place, beside = folder if offload else None, solver in FOLLOWS_FLOAT
    activations = Activations((*ids.shape, width), place, label, layers.device, ranks, beside_float=beside)
    if activations.at > unsolved[0]:
        activations.forget()
    if activations.at < 0:
        activations.replace(embedded(run.table, rows, ids))
        if activations.exact is not None:
            activations.exact.replace(embedded(_float_table(layers), rows, ids))
    activations.arguments = layers.arguments(activations.read(slice(0, 1)))
    run.done += sum(map(len, stages[: activations.at]))
    for index in range(activations.at, min(unsolved[-1] + 1, layers.count)):
        exact = layers.decoder(index) if activations.exact is not None else None
        work = run.decoder(index, parts[index], activations, exact)
        if index < unsolved[-1]:
            activations.advance(work, exact)
    if solved.missing(phi.HEAD) if phi.HEAD in specs else ():
        run.solve(phi.HEAD, head_statistics(layers, activations))
    activations.forget()
    return solved


@torch.no_grad()
def table_statistics(
    layers: Layers, ids: Tensor, folder: Path | None, progress: Progress | None = None, ranks: Ranks = ALONE
) -> Statistics:
    """Of what the head reads in the float model, for the table that it shares with the embedding.

    The table comes before the layers, so there is no quantized prefix yet. Its errors also go into the first layer,
    where each direction counts alike: so the diagonal gets a share of its mean. folder: as for Activations.
    """
    rows, width = layers.shape(phi.EMBEDDING)
    label = f"float-{hashlib.sha256(layers.identity.encode() + ids.numpy().tobytes()).hexdigest()[:12]}"
    activations = Activations((*ids.shape, width), folder, label, layers.device, ranks)
    if activations.at < 0:
        activations.replace(embedded(_float_table(layers), rows, ids))
    flow(layers, activations, progress)
    statistics = head_statistics(layers, activations)
    activations.forget()
    diagonal = statistics.moments.diagonal()
    diagonal += _AS_INPUT * diagonal.mean()
    return statistics


def _float_table(layers: Layers) -> Callable[[slice], Tensor]:
    """Rows of the embedding as it is, float32."""
    return lambda rows: layers.weight(phi.EMBEDDING, rows).float().cpu()


def flow(layers: Layers, activations: Activations, progress: Progress | None) -> None:
    """Let them pass through the decoder layers as these are."""
    activations.arguments = layers.arguments(activations.read(slice(0, 1)))
    for index in range(activations.at, layers.count):
        if progress:
            progress(f"model.layers.{index} in float", index, layers.count)
        activations.advance(layers.decoder(index))


def head_statistics(layers: Layers, activations: Activations) -> Statistics:
    """Of the final norm's output, when all decoder layers are behind."""
    activations.arguments = {}
    seen = nn.Sequential(layers.norm(), nn.Identity())
    return activations.statistics(seen, seen[1], activations.shape[2], (seen, seen[1]))


def told(name: str, spec: QuantSpec, solver: str, ids: Tensor, tied: bool) -> dict[str, Any]:
    """What the receipt tells of the codes that calibrate() chose for a module: token ids [n, T]."""
    if name == phi.EMBEDDING and not tied:
        return {"solver": nearest(spec)}
    kind = "inputs of the head in the float model" if name == phi.EMBEDDING else "inputs of each layer"
    return {
        "solver": solver,
        "statistics": {"kind": kind, "windows": len(ids), "tokens": ids.numel(), "digest": ids_digest(ids)},
    }


def output_error(w: Tensor, quantized: QuantizedTensor, statistics: Statistics) -> float:
    """Relative squared error of the layer's output, |(W - Q) X|^2 / |W X|^2, on at most 1024 rows of W."""
    rows = torch.linspace(0, len(w) - 1, min(len(w), _ROWS)).long()
    whole = w[rows].float().cpu()
    wrong = whole - quantized.dequantize()[rows].cpu()
    hessian = statistics.hessian.to(whole)
    size = ((whole @ hessian) * whole).sum(dtype=torch.float64)
    return float(((wrong @ hessian) * wrong).sum(dtype=torch.float64) / size) if size else 0.0


class Run:
    """Solves the matrices of one decoder layer after the other, or takes what is solved."""

    def __init__(
        self,
        layers: Layers,
        solver: str,
        solved: Solved,
        progress: Progress | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.layers, self.solver, self.solved, self.progress, self.ranks = layers, solver, solved, progress, ranks
        self.done = 0

    def table(self, rows: slice) -> Tensor:
        """Rows of the embedding, float32: the values of its codes where it has some."""
        if phi.EMBEDDING in self.solved.specs:
            return self.solved.read(phi.EMBEDDING, rows).dequantize()
        return self.layers.weight(phi.EMBEDDING, rows).float().cpu()

    def decoder(
        self, index: int, parts: Mapping[str, Sequence[str]], activations: Activations, exact: nn.Module | None = None
    ) -> nn.Module:
        """The decoder layer with the values of its codes, those that are missing solved in the order of its program.

        exact: the layer as it is, for a solver that follows the float model.
        """
        prefix = f"model.layers.{index}."
        work = self.layers.decoder(index)
        weights = {
            name: work.get_submodule(name.removeprefix(prefix)).get_parameter("weight").data
            for names in parts.values()
            for name in names
        }
        shows = self.ranks.first and any(map(self.solved.missing, weights))
        shown = activations.read(slice(0, _SHOWN)) if shows else None
        if shown is not None:
            wanted = activations.call(work, shown)
            before = _distance(wanted, self._nearest(work, weights, activations, shown))
        for part, names in parts.items():
            statistics = None
            if any(map(self.solved.missing, names)):
                linear = work.get_submodule(part)
                beside = None if exact is None else (exact, exact.get_submodule(part))
                statistics = activations.statistics(work, linear, self.layers.shape(names[0])[1], beside)
            for name in names:
                self.solve(name, statistics)
                weights[name].copy_(self.solved.read(name).dequantize())
        if shown is not None:
            after = _distance(wanted, activations.call(work, shown))
            _log.info("%s: output error %.2e nearest, %.2e %s", prefix[:-1], before, after, self.solver)
        return work

    def _nearest(
        self, work: nn.Module, weights: Mapping[str, Tensor], activations: Activations, shown: Tensor
    ) -> Tensor:
        """What the layer makes of `shown` with the nearest codes; its weights are as before."""
        for name, weight in weights.items():
            spec = self.solved.specs[name]
            weight.copy_(quantize_tensor(weight, spec, nearest(spec), f"{name}.weight").dequantize())
        result = activations.call(work, shown)
        for name, weight in weights.items():
            weight.copy_(self.layers.weight(name))
        return result

    def solve(self, name: str, statistics: Statistics | None) -> None:
        """Keep the codes of a matrix: the nearest without statistics of its input."""
        if self.progress:
            self.progress(name, self.done, len(self.solved.specs))
        spec = self.solved.specs[name]
        solver = nearest(spec) if statistics is None else self.solver
        missing = self.solved.missing(name)
        self.ranks.wait()  # all have looked, before the first writes
        for key, rows in missing.items():
            if not self.ranks.first and self.solved.folder is not None:
                continue
            began = time.monotonic()
            weight = self.layers.weight(name, rows)
            piece = quantize_tensor(weight, spec, solver, f"{name}.weight", rows.start, statistics)
            if statistics is not None:
                rounded = quantize_tensor(weight, spec, nearest(spec), f"{name}.weight")
                before, after = (output_error(weight, codes, statistics) for codes in (rounded, piece))
                _log.info(
                    "%s: output error %.2e nearest, %.2e %s; %s, %d tokens, %.1f s",
                    *(key, before, after, solver, spec, statistics.tokens, time.monotonic() - began),
                )
            self.solved.write(key, piece)
            if self.solved.folder is None and not self.ranks.agree(str(piece.digests())):
                raise PhiquantError(
                    f"{key}: the ranks chose different codes, so they are not alike; give folder=, and rank 0 chooses"
                )
        self.ranks.wait()
        self.done += 1


def embedded(table: Table, size: int, ids: Tensor) -> Callable[[slice], Tensor]:
    """For some windows of `ids`, [B, T, D]: their tokens' rows of a table of `size` rows, read in pieces."""
    tokens, index = ids.unique(return_inverse=True)
    found = []
    for start in range(0, size, _TABLE_ROWS):
        inside = tokens[(tokens >= start) & (tokens < start + _TABLE_ROWS)] - start
        if len(inside):
            found.append(table(slice(start, min(start + _TABLE_ROWS, size)))[inside])
    rows = torch.cat(found)
    return lambda batch: rows[index[batch]]


def nearest(spec: QuantSpec) -> str:
    """The solver of the layers without inputs to weigh errors by."""
    return "kmeans" if isinstance(spec.element, Codebook) else "rtn"


def parts_of(specs: Mapping[str, QuantSpec], index: int) -> dict[str, list[str]]:
    """The modules of a decoder layer to be solved, by the linear whose input they share, as these compute."""
    found = {
        part: [name for name in specs if f"{name}.".startswith(f"model.layers.{index}.{part}.")]
        for part in phi.LAYER_LINEARS
    }
    return {part: names for part, names in found.items() if names}


def _fingerprint(layers: Layers, specs: Mapping[str, QuantSpec], solver: str, ids: Tensor) -> str:
    grids = {name: str(spec) for name, spec in specs.items()}
    facts = [solver, grids, layers.identity, version("phiquant"), torch.__version__]
    digest = hashlib.sha256(json.dumps(facts).encode())
    digest.update(ids.numpy().tobytes())
    return digest.hexdigest()


def _distance(wanted: Tensor, got: Tensor) -> float:
    """Relative squared error."""
    return float((got - wanted).square().sum(dtype=torch.float64) / wanted.square().sum(dtype=torch.float64))
