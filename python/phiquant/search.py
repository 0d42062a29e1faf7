"""Bits where they count: the recipe of least predicted loss whose file fits into a number of bytes.

The loss of a recipe is predicted as the sum of what its slices lose alone (sensitivity.py); the choice is an exact
knapsack over the bytes that the format's writer gives each tensor (knapsack.py). Near two bits losses do not add up, so
some choices, each best under another idea of how they add, are quantized and measured as wholes.
"""

from __future__ import annotations

import copy
import fnmatch
import itertools
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import knapsack, model_source
from .calibrate import Calibration, token_windows
from .checkpoint import Checkpoint
from .checkpoint_source import entries
from .errors import PhiquantError
from .evaluate import compare_logits, model_logits
from .extras import need
from .formats.registry import FORMATS, find
from .formats.source import Entry
from .load import load
from .models import phi
from .quantize import quantize
from .recipe import Recipe
from .sensitivity import Losses, Method, Progress, measure
from .slices import Slice, slices
from .solvers import NEEDS_STATISTICS
from .spec import FLOAT_BITS, FloatName, QuantSpec, Target
from .spec import spec as read_spec

STORED = "stored"  # no format: the bits that codes and parameters have, for models that stay in torch
CANDIDATES: dict[str, tuple[str, ...]] = {
    "gguf": ("gguf:Q2_K", "gguf:Q3_K", "gguf:Q4_K", "gguf:Q5_K", "gguf:Q6_K", "gguf:Q8_0"),
    "onnx": ("onnx:uint2-g32", "onnx:uint4-g32", "onnx:uint8-g32"),
    "openvino": ("openvino:u2-g32", "openvino:u4-g32", "openvino:u8-g32"),
    "mlx": tuple(f"mlx:{bits}bit-g64" for bits in (2, 3, 4, 5, 6, 8)),
    "safetensors": ("safetensors:int4-g32", "safetensors:int8-g32"),
    STORED: tuple(f"int{bits}-g32-sym-f16" for bits in (2, 3, 4, 5, 6, 8)),
}
EXPONENTS = (1.0, 1.5, 2.0, 0.75)  # of the losses that are added: above 1, large ones count for more than their sum
_ROUNDS, _GAP = 8, 1e-3  # tries to come nearer to the bound, and when it is near enough
_FILES = "no file but the codes"


@dataclass(frozen=True)
class Point:
    """A recipe as a point of the plot. bytes: of all files; loss: predicted, in nats per token."""

    name: str
    bytes: int
    loss: float


@dataclass(frozen=True)
class Found:
    """What search() found.

    bytes: exact, of all files but the receipt. loss: predicted; no recipe within the budget is predicted to lose less
    than `bound`. measured: KL of the model quantized with it, on the calibration windows; None if it was not.
    tried: (exponent, predicted, measured) of each choice that was measured. chosen: the grid of each slice, or "float".
    frontier: best recipes of their sizes, the smallest first. uniform: one grid for all slices that it fits.
    """

    recipe: Recipe
    format: str
    budget: int
    bytes: int
    loss: float
    bound: float
    measured: float | None
    chosen: dict[str, str]
    losses: Losses = field(repr=False)
    tried: list[tuple[float, float, float]] = field(default_factory=list)
    frontier: list[Point] = field(default_factory=list, repr=False)
    uniform: list[Point] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: all of it but the losses of single slices."""
        points = {name: [vars(p) for p in getattr(self, name)] for name in ("frontier", "uniform")}
        kept = ("format", "budget", "bytes", "loss", "bound", "measured", "chosen")
        tried = [dict(zip(("exponent", "loss", "measured"), one, strict=True)) for one in self.tried]
        return {name: getattr(self, name) for name in kept} | {"tried": tried} | points


def search(
    model: nn.Module | str | Path,
    format: str,
    budget: int,
    *,
    candidates: Sequence[str | QuantSpec | Target] | None = None,
    keep: Sequence[str] = (),
    calibration: Calibration | None = None,
    windows: int = 8,
    tokenizer: Any = None,
    solver: str = "rtn",
    method: Method = "kl",
    refine: bool | None = None,
    folder: str | Path | None = None,
    progress: Progress | None = None,
) -> Found:
    """The recipe that is predicted to lose least among those whose files take at most `budget` bytes.

    model: a Phi-3 model in memory, with its tokenizer, or the folder of a checkpoint.
    format: of the file, or "stored": codes and parameters alone, their bits counted. Where it can hold q, k, v or gate,
        up apart, each has a grid of its own; embedding and head may also stay in float.
    candidates: grids of the format, None: search.CANDIDATES[format]. solver: chooses the codes, also afterwards.
    keep: names of slices, or shell patterns, that stay in float.
    calibration: as of quantize(); windows: how many of them are used. method, folder: as of sensitivity.measure().
    refine: quantize the model by the best choices and take the one that measures best; None: if method is "kl".
        It takes memory for the model twice, in float32.
    PhiquantError, naming the smallest possible size, if nothing fits.
    """
    ids = _windows(model, calibration, tokenizer)[:windows]
    room = _Room(model, tokenizer, format, candidates, keep)
    solved = _Search(room, budget)
    if budget < solved.smallest:
        raise PhiquantError(
            f"no recipe of these candidates fits into {budget:,} bytes; the smallest possible file takes "
            f"{solved.smallest:,}. Give more, or candidates of fewer bits"
        )
    solved.losses = measure(model, room.grids, ids, solver, method, folder=folder, progress=progress)
    best, bound = solved.fitting(1.0)
    tried: list[tuple[float, float, float]] = []
    measured = None
    if method == "kl" if refine is None else refine:
        made = {exponent: best if exponent == 1 else solved.fitting(exponent)[0] for exponent in EXPONENTS}
        whole = load(model)[0] if isinstance(model, str | Path) else model
        known: dict[tuple[int, ...], float] = {}
        for exponent, choice in made.items():
            if progress:
                progress(f"the whole, exponent {exponent}", len(tried), len(made))
            if choice.options not in known:
                known[choice.options] = joint_kl(whole, solved.recipe(choice), ids, solver)
            tried.append((exponent, solved.loss(choice), known[choice.options]))
        best = min(made.values(), key=lambda choice: known[choice.options])
        measured = known[best.options]
    grids = solved.grids(best)
    return Found(
        recipe=solved.recipe(best),
        format=format,
        budget=budget,
        bytes=solved.exact(best),
        loss=solved.loss(best),
        bound=min(bound, solved.loss(best)),
        measured=measured,
        chosen={name: "float" if spec is None else room.words[spec] for name, spec in grids.items()},
        losses=solved.losses,
        tried=tried,
        frontier=solved.frontier(),
        uniform=solved.uniform(),
    )


def _windows(model: Any, calibration: Calibration | None, tokenizer: Any) -> torch.Tensor:
    """Ids of the calibration data; of texts by the tokenizer that lies beside the checkpoint, if none is given."""
    given = isinstance(calibration, torch.Tensor)
    if not given and tokenizer is None and isinstance(model, str | Path):
        tokenizer = need("transformers", extra="hf").AutoTokenizer.from_pretrained(model, local_files_only=True)
    return token_windows(calibration, tokenizer)


@torch.no_grad()
def joint_kl(model: nn.Module, recipe: Recipe, ids: torch.Tensor, solver: str = "rtn") -> float:
    """KL(model || model quantized by the recipe), nats per token of the windows `ids` [n, T]. The model stays."""
    data = ids if solver in NEEDS_STATISTICS else None
    quantized = quantize(copy.deepcopy(model), recipe, solver, calibration=data)
    rows = ids.tolist()
    return compare_logits(rows, model_logits(quantized, rows), model_logits(model, rows)).kl


Grids = dict[str, QuantSpec | None]  # by the name of a slice; None: float


class _Room:
    """What can be chosen in a format, and what it takes there."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        format: str,
        candidates: Sequence[str | QuantSpec | Target] | None,
        keep: Sequence[str],
    ) -> None:
        if format != STORED and not hasattr(find(format).writer(), "nbytes"):
            known = [name for name in FORMATS if name in CANDIDATES]
            raise PhiquantError(f"there is no search for {format}; for {', '.join(known)} and {STORED!r} there is")
        self.format, self.words = format, {}
        for word in candidates or CANDIDATES[format]:
            spec = read_spec(word)
            self.words[spec] = word.name if isinstance(word, Target) else str(word)
        self._model(model, tokenizer)
        self._sizes: dict[tuple[str, QuantSpec | None], int] = {}
        self._why: PhiquantError | None = None
        self.slices = slices(self.config, self._splits)
        self.grids: dict[Slice, list[QuantSpec]] = {}
        for one in self.slices:
            kept = any(fnmatch.fnmatchcase(one.name, pattern) for pattern in keep)
            fitting = [spec for spec in self.words if self.nbytes(one.name, one.shape, spec) is not None]
            self.grids[one] = [] if kept else fitting
            if not fitting and not kept and one.layer is not None:
                raise PhiquantError(f"no candidate fits {one.name} {list(one.shape)}: {self._why}")

    def nbytes(self, module: str, shape: tuple[int, ...], spec: QuantSpec | None) -> int | None:
        """What that weight takes on that grid; None if the format cannot hold it."""
        key = (module, spec)
        if key not in self._sizes:
            entry = Entry(f"{module}.weight", shape, spec, self._dtype(f"{phi.fused_name(module)}.weight"))
            try:
                if spec is not None:
                    spec.scale_shape(shape)
                self._sizes[key] = self._bytes(entry)
            except (PhiquantError, ValueError) as error:
                self._why = error if isinstance(error, PhiquantError) else PhiquantError(str(error))
                self._sizes[key] = -1
        return None if self._sizes[key] < 0 else self._sizes[key]

    def groups(self) -> Iterator[list[tuple[int, Grids]]]:
        """For each weight of the model what can be done with it: the bytes, and the grids of its slices."""
        for module, parts in itertools.groupby(self.slices, lambda one: one.module):
            inside = list(parts)
            if len(inside) > 1:
                yield list(self._combinations(module, inside))
                continue
            (one,) = inside
            free: list[QuantSpec | None] = [None] if one.layer is None or not self.grids[one] else []
            yield [
                (size, {one.name: spec})
                for spec in [*self.grids[one], *free]
                if (size := self.nbytes(one.name, one.shape, spec)) is not None
            ]

    def files(self, grids: Grids) -> dict[str, int]:
        """Exact bytes of every file of a model with these grids."""
        specs = recipe_of(grids, self.config).resolve(self._matrices())
        made = [entry for _, _, entry in entries(self.config, specs, self._dtype)]
        if self.format == STORED:
            return {_FILES: sum(self._bytes(entry) for entry in made)}
        return find(self.format).writer().sizes(_Blank(made, dict(self.config), self._tokenizer))

    def _combinations(self, module: str, inside: Sequence[Slice]) -> Iterator[tuple[int, Grids]]:
        shape = (sum(one.shape[0] for one in inside), inside[0].shape[1])
        offers: list[Sequence[QuantSpec | None]] = [self.grids[one] or [None] for one in inside]
        for specs in itertools.product(*offers):
            grids: Grids = {one.name: spec for one, spec in zip(inside, specs, strict=True)}
            if len(set(specs)) == 1:
                size = self.nbytes(module, shape, specs[0])  # one tensor
            else:
                size = sum(self.nbytes(one.name, one.shape, grids[one.name]) or 0 for one in inside)
            if size is not None:
                yield size, grids

    def _splits(self, module: str) -> bool:
        rows = phi.fused_rows(self.config, module)
        columns = dict(phi.tensors(self.config))[f"{module}.weight"][1]
        shapes = {name: (at.stop - at.start, columns) for name, at in rows.items()}
        return any(
            all(self.nbytes(name, shape, spec) is not None for name, shape in shapes.items()) for spec in self.words
        )

    def _bytes(self, entry: Entry) -> int:
        if self.format != STORED:
            return int(find(self.format).writer().nbytes(entry, self.config))
        bits = FLOAT_BITS[entry.dtype] if entry.spec is None else entry.spec.bits_per_weight(entry.shape)
        return math.ceil(entry.numel * bits / 8)

    def _matrices(self) -> list[str]:
        names = [name.removesuffix(".weight") for name, _ in phi.tensors(self.config)]
        tied = [phi.HEAD] if phi.sizes(self.config).tied else []
        return [name for name in names if phi.is_matrix(name)] + tied

    def _model(self, model: Any, tokenizer: Any) -> None:
        if isinstance(model, str | Path):
            checkpoint = Checkpoint(model)
            self.config: Mapping[str, Any] = checkpoint.config
            self._tokenizer: Path | None = checkpoint.folder
            self._dtype: Callable[[str], FloatName] = checkpoint.dtype
            return
        self.config = model_source.config_of(model)
        narrow = {name: model_source.narrowest(value.detach()) for name, value in model.named_parameters()}
        dtypes: dict[str, FloatName] = {name: narrow[name] for name, _ in phi.tensors(self.config)}
        self._dtype = dtypes.__getitem__
        self._kept = tempfile.TemporaryDirectory(prefix="phiquant-")
        self._tokenizer = model_source.save_companions(model, tokenizer, Path(self._kept.name))


@dataclass(frozen=True)
class _Blank:
    """A source of sizes, not of values."""

    entries: Sequence[Entry]
    config: dict[str, Any]
    tokenizer_dir: Path | None
    fingerprint: str = ""

    def read(self, entry: Entry, rows: slice | None = None) -> Any:
        raise NotImplementedError


def recipe_of(grids: Grids, config: Mapping[str, Any]) -> Recipe:
    """A rule for each slice by name; a tied head goes with the embedding."""
    rules: Grids = dict(grids)
    if phi.sizes(config).tied:
        rules[phi.HEAD] = rules[phi.EMBEDDING]
    return Recipe({name: "float" if spec is None else spec for name, spec in rules.items()})


def _apart(grids: Grids) -> bool:
    return len(set(grids.values())) > 1


def _smallest(group: Sequence[tuple[int, Grids]], apart: bool | None = None) -> int:
    """The option of fewest bytes; apart: among those that (do not) take a fused linear apart, if there are such."""
    fitting = [i for i, (_, grids) in enumerate(group) if apart is None or _apart(grids) == apart]
    return min(fitting or range(len(group)), key=lambda i: group[i][0])


class _Search:
    """The knapsack of one budget: what is beside the tensors in a file depends, a little, on what is chosen."""

    def __init__(self, room: _Room, budget: int) -> None:
        self.room, self.budget = room, budget
        self.losses: Losses = {}
        self._exact: dict[tuple[int, ...], int] = {}
        self._groups = list(room.groups())
        self._add_splitting()
        least = self._choice([_smallest(group) for group in self._groups])
        self._uniform = {word: choice for spec, word in room.words.items() if (choice := self._same(spec))}
        self._least = min(self._beside(choice) for choice in (least, *self._uniform.values()))
        self.smallest, self._floor = self.exact(least), least.bytes

    def fitting(self, exponent: float) -> tuple[knapsack.Choice, float]:
        """The best choice whose files fit, and what no choice that fits can be below, both of losses to a power."""
        options = self._options(exponent)
        high = self.budget - self._least
        relaxed = found = knapsack.solve(options, high)
        low = high
        while (over := self.exact(found) - self.budget) > 0:
            high, low = low, max(self._floor, min(low, found.bytes) - over)
            found = knapsack.solve(options, low)
        for _ in range(_ROUNDS):  # between what fits and what did not
            if found.loss <= relaxed.loss * (1 + _GAP) or high - low < 2:
                break
            between = knapsack.solve(options, (low + high) // 2)
            if self.exact(between) > self.budget:
                high = (low + high) // 2
            else:
                low, found = (low + high) // 2, min(found, between, key=lambda choice: choice.loss)
        return found, relaxed.loss

    def uniform(self) -> list[Point]:
        """One grid for every slice; where embedding or head cannot have it, float there."""
        return [Point(word, self.exact(choice), self.loss(choice)) for word, choice in self._uniform.items()]

    def frontier(self) -> list[Point]:
        """The lower convex hull, by the bytes of tensors and what the smallest file has beside them."""
        points = knapsack.hull(self._options(1.0))
        return [Point("", choice.bytes + self._least, self.loss(choice)) for choice in points]

    def exact(self, choice: knapsack.Choice) -> int:
        """Bytes of all files."""
        if choice.options not in self._exact:
            self._exact[choice.options] = sum(self.room.files(self.grids(choice)).values())
        return self._exact[choice.options]

    def grids(self, choice: knapsack.Choice) -> Grids:
        made: Grids = {}
        for group, option in zip(self._groups, choice.options, strict=True):
            made |= group[option][1]
        return made

    def recipe(self, choice: knapsack.Choice) -> Recipe:
        return recipe_of(self.grids(choice), self.room.config)

    def loss(self, choice: knapsack.Choice) -> float:
        return sum(self._one(name, spec) for name, spec in self.grids(choice).items())

    def _add_splitting(self) -> None:
        """Add to the bytes of projections apart what a file says more of them, measured once for each fused linear."""
        whole = [_smallest(group, apart=False) for group in self._groups]
        before = self._beside(self._choice(whole))
        known: dict[frozenset[str], int] = {}
        for index, group in enumerate(self._groups):
            apart = [option for option in range(len(group)) if _apart(group[option][1])]
            kind = frozenset(name.rpartition(".")[2] for name in group[0][1])
            if apart and kind not in known:
                one = [*whole[:index], _smallest(group, apart=True), *whole[index + 1 :]]
                known[kind] = self._beside(self._choice(one)) - before
            for option in apart:
                group[option] = (group[option][0] + known[kind], group[option][1])

    def _same(self, spec: QuantSpec) -> knapsack.Choice | None:
        same = [[i for i, (_, g) in enumerate(group) if set(g.values()) <= {spec, None}] for group in self._groups]
        return self._choice([found[0] for found in same]) if all(same) else None

    def _beside(self, choice: knapsack.Choice) -> int:
        return self.exact(choice) - choice.bytes

    def _choice(self, options: Sequence[int]) -> knapsack.Choice:
        size = sum(group[option][0] for group, option in zip(self._groups, options, strict=True))
        return knapsack.Choice(tuple(options), size, 0.0)

    def _options(self, exponent: float) -> list[list[knapsack.Option]]:
        return [
            [(size, sum(self._one(name, spec) ** exponent for name, spec in grids.items())) for size, grids in group]
            for group in self._groups
        ]

    def _one(self, name: str, spec: QuantSpec | None) -> float:
        return 0.0 if spec is None else self.losses[name][str(spec)]
