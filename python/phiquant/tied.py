"""The table that the embedding and the head share: how many bits it needs, by the loss that is measured.

Its errors act twice, on what goes in and on what comes out. So every candidate is put in both places of the float
model, and its distance from that model is measured on windows of text. The model is read decoder layer by decoder
layer; logits are made for some rows of the table at a time. V = vocabulary, T = tokens in a window.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .calibrate import Progress, Run, Table, embedded, flow, table_statistics
from .calibration_inputs import Activations
from .calibration_layers import CheckpointLayers, Layers
from .calibration_state import Solved
from .checkpoint import Checkpoint
from .errors import PhiquantError
from .formats.partial import write_atomically
from .models import phi
from .recipe import Recipe
from .solvers import NEEDS_STATISTICS
from .spec import QuantSpec
from .spec import target as find_target
from .statistics import Statistics
from .tensor import ids_digest

TOLERANCE = 0.002  # nats of KL a token
WINDOWS = 4  # that the distance is measured on

# Of each format, what a table may be stored as.
CANDIDATES = {
    "gguf": ("gguf:Q8_0", "gguf:Q6_K", "gguf:Q5_K", "gguf:Q4_K"),
    "mlx": ("mlx:8bit-g64", "mlx:6bit-g64", "mlx:5bit-g64", "mlx:4bit-g64"),
    "onnx": ("onnx:int8-g32", "onnx:int4-g32"),
    "openvino": ("openvino:i8-g32", "openvino:i8-channel", "openvino:i4-g32"),
    "safetensors": ("safetensors:int8-g32",),
    "qnn": ("qnn:a16w8",),
}

_log = logging.getLogger("phiquant")
_ROWS = 1 << 12  # of the tables at a time


@dataclass(frozen=True)
class Trial:
    """A table on one grid. bytes: as stored. kl: mean KL(float || it) in nats; loss: mean NLL above the float's."""

    target: str
    bytes: int
    kl: float
    loss: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Choice:
    """What choose() found: the trials, most bytes first, and the name of the smallest whose KL is at most `tolerance`.

    chosen: None if no candidate is near enough; the table then stays in float.
    """

    trials: tuple[Trial, ...]
    tolerance: float
    chosen: str | None

    def recipe(self, other: Recipe) -> Recipe:
        """`other`, but the table on the chosen grid."""
        spec = "float" if self.chosen is None else find_target(self.chosen).spec
        return Recipe(((phi.EMBEDDING, spec), (phi.HEAD, spec), *other.rules), other.default)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def choose(
    layers: Layers,
    targets: Sequence[str],
    ids: Tensor,
    *,
    tolerance: float = TOLERANCE,
    solver: str = "rtn",
    statistics: Statistics | None = None,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> Choice:
    """Try a shared table on each of these targets' grids, the rest of the model in float, on the windows `ids` [n, T].

    solver, statistics: how its codes are chosen; statistics of the head's inputs for solvers that need them.
    folder: where codes and activations are kept; None: in memory. PhiquantError if the model shares no table.
    """
    if not layers.tied:
        raise PhiquantError("this model's embedding and head share no table; give each its grid by a recipe")
    shape = layers.shape(phi.EMBEDDING)
    specs = {name: _spec(name) for name in targets}
    tables: list[Table] = [lambda rows: layers.weight(phi.EMBEDDING, rows).float()]
    for name, spec in specs.items():
        place = None if folder is None else folder / name.replace(":", "-")
        run = Run(layers, solver, Solved(place, "trial", {phi.EMBEDDING: (spec, shape)}), progress)
        run.solve(phi.EMBEDDING, statistics)
        tables.append(run.table)
    inputs = _head_inputs(layers, tables, ids, folder, progress)
    measured = _distances(tables, shape[0], ids, inputs)
    sizes = [round(spec.bits_per_weight(shape) * shape[0] * shape[1] / 8) for spec in specs.values()]
    trials = [Trial(name, size, *one) for name, size, one in zip(specs, sizes, measured, strict=True)]
    trials.sort(key=lambda trial: -trial.bytes)
    for trial in trials:
        _log.info("table on %s: %d bytes, KL %.2e, loss %+.2e", trial.target, trial.bytes, trial.kl, trial.loss)
    near = [trial for trial in trials if trial.kl <= tolerance]
    return Choice(tuple(trials), tolerance, near[-1].target if near else None)


def with_table(
    recipe: Recipe,
    embedding: str,
    tolerance: float,
    folder: Path | str,
    format: str,
    solver: str,
    ids: Tensor | None,
    run: Path,
    check: Callable[[Recipe], Any],
    progress: Progress | None = None,
) -> tuple[Recipe, Choice | None]:
    """`recipe` with the table of a checkpoint as `embedding` says: a target, or "auto", and then how that was chosen.

    ids: calibration windows; the last are what it is chosen on, the others weigh errors for solvers that want data.
    run: a folder to work in. What was chosen there is taken again. check: raises PhiquantError for a recipe that the
    format cannot hold.
    """
    if embedding != "auto":
        return Choice((), tolerance, embedding).recipe(recipe), None
    assert ids is not None
    layers = CheckpointLayers(Checkpoint(folder))
    place = run / "table"
    place.mkdir(parents=True, exist_ok=True)
    kept = run / "table.json"
    held = ids[-WINDOWS:]
    asked = [layers.identity, format, solver, tolerance, ids_digest(ids)]
    found = json.loads(kept.read_text()) if kept.exists() else {}
    if found.get("asked") != asked:
        others = ids[:-WINDOWS] if len(ids) > WINDOWS else ids
        shutil.rmtree(place)
        place.mkdir()
        weighed = layers.tied and solver in NEEDS_STATISTICS
        choice = choose(
            *(layers, _possible(CANDIDATES[format], recipe, check), held),
            tolerance=tolerance,
            solver=solver,
            statistics=table_statistics(layers, others, place, progress) if weighed else None,
            folder=place,
            progress=progress,
        )
        write_atomically(kept, json.dumps({"asked": asked, "choice": choice.to_dict()}))
        shutil.rmtree(place)
        return choice.recipe(recipe), choice
    told = found["choice"]
    choice = Choice(tuple(Trial(**one) for one in told["trials"]), told["tolerance"], told["chosen"])
    return choice.recipe(recipe), choice


def _possible(names: Sequence[str], recipe: Recipe, check: Callable[[Recipe], Any]) -> list[str]:
    """Those that the format holds; the reason why not if there are none."""
    possible, reason = [], None
    for name in names:
        try:
            check(Choice((), 0.0, name).recipe(recipe))
            possible.append(name)
        except PhiquantError as error:
            reason = error
    if reason is not None and not possible:
        raise reason
    return possible


def _spec(name: str) -> QuantSpec:
    spec = find_target(name).spec
    if spec is None:
        raise PhiquantError(f"{name} is no grid of one tensor, so no table can be tried on it")
    return spec


def _head_inputs(
    layers: Layers, tables: Sequence[Table], ids: Tensor, folder: Path | None, progress: Progress | None
) -> list[Tensor]:
    """What the head reads with each table, [n (T - 1), D] float32: all go through each decoder layer together."""
    rows, width = layers.shape(phi.EMBEDDING)
    count = len(ids)
    activations = Activations((len(tables) * count, ids.shape[1], width), folder, "trial", layers.device)
    activations.forget()
    inputs = [embedded(table, rows, ids) for table in tables]
    activations.replace(
        lambda batch: torch.cat(
            [inputs[i // count](slice(i % count, i % count + 1)) for i in range(len(tables) * count)[batch]]
        )
    )
    flow(layers, activations, progress)
    norm = layers.norm()
    found = [norm(activations.read(slice(at * count, (at + 1) * count)))[:, :-1] for at in range(len(tables))]
    activations.forget()
    return [x.reshape(-1, width) for x in found]


def _distances(tables: Sequence[Table], rows: int, ids: Tensor, inputs: Sequence[Tensor]) -> list[tuple[float, float]]:
    """(mean KL from the first table's distribution, mean NLL above its), of every other table.

    With logits a of the first and b of another, KL = sum e^a (a - b) / Z_a - log Z_a + log Z_b: sums over the
    vocabulary that some rows of the tables at a time add to, under a running maximum of a.
    """
    following = ids[:, 1:].reshape(-1)
    tokens, others = len(following), len(tables) - 1
    peak, total = torch.full((tokens,), -torch.inf), torch.zeros(tokens, dtype=torch.float64)
    cross = torch.zeros(others, tokens, dtype=torch.float64)
    log_z = torch.full((others, tokens), -torch.inf, dtype=torch.float64)
    hit = torch.zeros(len(tables), tokens, dtype=torch.float64)  # the logit of the token that follows
    for start in range(0, rows, _ROWS):
        part = slice(start, min(start + _ROWS, rows))
        inside = ((following >= start) & (following < part.stop)).nonzero()[:, 0]
        a = inputs[0] @ tables[0](part).T
        hit[0, inside] = a[inside, following[inside] - start].double()
        higher = torch.maximum(peak, a.amax(1))
        fade = (peak - higher).double().exp()
        peak, weight = higher, (a - higher[:, None]).exp()
        total = total * fade + weight.sum(1, dtype=torch.float64)
        for at in range(others):
            b = inputs[at + 1] @ tables[at + 1](part).T
            hit[at + 1, inside] = b[inside, following[inside] - start].double()
            log_z[at] = torch.logaddexp(log_z[at], b.logsumexp(1).double())
            cross[at] = cross[at] * fade + (weight * (a - b)).sum(1, dtype=torch.float64)
    log_first = peak.double() + total.log()
    kl = (cross / total - log_first + log_z).mean(1)
    loss = ((log_z - hit[1:]) - (log_first - hit[0])).mean(1)
    return list(zip(kl.tolist(), loss.tolist(), strict=True))
