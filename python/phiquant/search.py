"""Bits where they count: the recipe of least predicted loss whose file fits into a number of bytes.

The loss of a recipe is predicted as the sum of what its slices lose alone (sensitivity.py); the choice is an exact
knapsack over the bytes that the format's writer gives each tensor (knapsack.py). Near two bits losses do not add up, so
some choices, each best under another idea of how they add, are quantized and measured as wholes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import knapsack
from .calibrate import Calibration, token_windows
from .errors import PhiquantError
from .evaluate import compare_logits, model_logits
from .extras import need
from .load import load
from .quantize import quantize
from .recipe import Recipe
from .search_space import Grids, Space, recipe_of
from .sensitivity import Losses, Method, Progress, measure
from .solvers import NEEDS_STATISTICS
from .spec import QuantSpec, Target

EXPONENTS = (1.0, 1.5, 2.0, 0.75)  # of the losses that are added: above 1, large ones count for more than their sum
_ROUNDS, _GAP = 8, 1e-3  # tries to come nearer to the bound, and when it is near enough


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
    candidates: grids of the format, None: search_space.CANDIDATES[format]. solver: chooses the codes, also afterwards.
    keep: names of slices, or shell patterns, that stay in float.
    calibration: as of quantize(); windows: how many of them are used. method, folder: as of sensitivity.measure().
    refine: quantize the model by the best choices and take the one that measures best; None: if method is "kl".
        It takes memory for the model twice, in float32.
    PhiquantError, naming the smallest possible size, if nothing fits.
    """
    ids = _windows(model, calibration, tokenizer)[:windows]
    space = Space(model, tokenizer, format, candidates, keep)
    solved = _Search(space, budget)
    if budget < solved.smallest:
        raise PhiquantError(
            f"no recipe of these candidates fits into {budget:,} bytes; the smallest possible file takes "
            f"{solved.smallest:,}. Give more, or candidates of fewer bits"
        )
    solved.losses = measure(model, space.grids, ids, solver, method, folder=folder, progress=progress)
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
        chosen={name: "float" if spec is None else space.words[spec] for name, spec in grids.items()},
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


def _apart(grids: Grids) -> bool:
    return len(set(grids.values())) > 1


def _smallest(group: Sequence[tuple[int, Grids]], apart: bool | None = None) -> int:
    """The option of fewest bytes; apart: among those that (do not) take a fused linear apart, if there are such."""
    fitting = [i for i, (_, grids) in enumerate(group) if apart is None or _apart(grids) == apart]
    return min(fitting or range(len(group)), key=lambda i: group[i][0])


class _Search:
    """The knapsack of one budget: what is beside the tensors in a file depends, a little, on what is chosen."""

    def __init__(self, space: Space, budget: int) -> None:
        self.space, self.budget = space, budget
        self.losses: Losses = {}
        self._exact: dict[tuple[int, ...], int] = {}
        self._groups = list(space.groups())
        self._add_splitting()
        least = self._choice([_smallest(group) for group in self._groups])
        self._uniform = {word: choice for spec, word in space.words.items() if (choice := self._same(spec))}
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
            self._exact[choice.options] = sum(self.space.files(self.grids(choice)).values())
        return self._exact[choice.options]

    def grids(self, choice: knapsack.Choice) -> Grids:
        made: Grids = {}
        for group, option in zip(self._groups, choice.options, strict=True):
            made |= group[option][1]
        return made

    def recipe(self, choice: knapsack.Choice) -> Recipe:
        return recipe_of(self.grids(choice), self.space.config)

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
