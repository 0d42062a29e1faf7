"""One option from each group, the least loss within a capacity: the multiple-choice knapsack, solved exactly.

Groups are few (hundreds) and options too, but capacities are bytes of files, billions, so no table over the capacity is
made. States (bytes so far, loss so far) go from group to group; one is dropped if another is no larger and no worse, or
if not even the linear relaxation of what is left brings it below a solution that is already known. Nothing is rounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .errors import PhiquantError

Option = tuple[int, float]  # bytes, loss
_BEAM = 256  # states kept by the sweep that finds the first solution
_SLACK = 1e-12  # of a loss: what float64 sums may be off by, so that no optimum is dropped


@dataclass(frozen=True)
class Choice:
    """options: for each group the index of its option. bytes, loss: their sums."""

    options: tuple[int, ...]
    bytes: int
    loss: float


def solve(groups: Sequence[Sequence[Option]], capacity: int) -> Choice:
    """The choice of least loss among those of at most `capacity` bytes; of equal ones the smallest.

    Losses are finite and not negative. PhiquantError, with the least number of bytes, if nothing fits.
    """
    problem = _Problem(groups)
    if capacity < problem.smallest:
        raise PhiquantError(f"{capacity} bytes hold no choice of options; the smallest takes {problem.smallest}")
    first = problem.sweep(capacity, np.inf, _BEAM)
    best = problem.sweep(capacity, first.loss, None)
    return min(first, best, key=lambda choice: (choice.loss, choice.bytes))


def hull(groups: Sequence[Sequence[Option]]) -> list[Choice]:
    """The choices on the lower convex hull of (bytes, loss), the smallest first: each is the best of its size.

    From one to the next a single group changes, in the order of loss saved per byte.
    """
    problem = _Problem(groups)
    at = [int(path[0]) for path in problem.hulls]
    made = [problem.choice(at)]
    for group, to in problem.steps:
        at[group] = to
        made.append(problem.choice(at))
    return made


class _Problem:
    """The groups without dominated options, the largest group first, and the relaxation of every tail of them."""

    def __init__(self, groups: Sequence[Sequence[Option]]) -> None:
        if any(not len(group) for group in groups):
            raise PhiquantError("every group needs an option to choose")
        self._bytes = [np.array([size for size, _ in group], np.int64) for group in groups]
        self._loss = [np.array([loss for _, loss in group], np.float64) for group in groups]
        if any((~np.isfinite(loss) | (loss < 0)).any() for loss in self._loss):
            raise PhiquantError("losses are finite and not negative")
        self._kept = [_undominated(size, loss) for size, loss in zip(self._bytes, self._loss, strict=True)]
        self.hulls = [_hull(s, v, k) for s, v, k in zip(self._bytes, self._loss, self._kept, strict=True)]
        self.smallest = int(sum(size.min() for size in self._bytes))
        moves = []  # (loss saved per byte, group, option)
        for group, path in enumerate(self.hulls):
            size, loss = self._bytes[group][path], self._loss[group][path]
            saved = -np.diff(loss) / np.maximum(np.diff(size), 1)
            moves += [(-rate, group, i, int(to)) for i, (rate, to) in enumerate(zip(saved, path[1:], strict=True))]
        self.steps = [(group, to) for _, group, _, to in sorted(moves)]
        reach = [int(size.max() - size.min()) for size in self._bytes]
        self._order = sorted(range(len(groups)), key=lambda group: -reach[group])

    def choice(self, at: Sequence[int]) -> Choice:
        size = sum(int(self._bytes[group][option]) for group, option in enumerate(at))
        return Choice(tuple(at), size, float(sum(self._loss[group][option] for group, option in enumerate(at))))

    def sweep(self, capacity: int, known: float, beam: int | None) -> Choice:
        """Through all groups. known: the loss of a solution; beam: keep only so many states, the most promising."""
        size, loss = np.zeros(1, np.int64), np.zeros(1)
        back: list[tuple[np.ndarray, np.ndarray]] = []
        limit = known + _SLACK * (1 + abs(known)) if np.isfinite(known) else np.inf
        for turn, group in enumerate(self._order):
            kept = self._kept[group]
            size = (size[:, None] + self._bytes[group][kept]).ravel()
            loss = (loss[:, None] + self._loss[group][kept]).ravel()
            sizes, losses = self._tails[turn + 1]
            left = capacity - size
            bound = loss + np.interp(left, sizes, losses)
            alive = np.flatnonzero((left >= sizes[0]) & (bound <= limit))
            if beam is not None and len(alive) > beam:
                alive = alive[np.argsort(bound[alive], kind="stable")[:beam]]
            alive = alive[np.lexsort((loss[alive], size[alive]))]
            ahead = np.concatenate(([np.inf], np.minimum.accumulate(loss[alive])[:-1]))
            alive = alive[loss[alive] < ahead]
            back.append((alive // len(kept), kept[alive % len(kept)]))
            size, loss = size[alive], loss[alive]
        if not len(loss):  # within rounding of the known solution, which is as good
            return Choice((), 0, np.inf)
        state, at = int(np.argmin(loss)), [0] * len(self._order)
        for group, (parents, options) in zip(reversed(self._order), reversed(back), strict=True):
            at[group], state = int(options[state]), int(parents[state])
        return self.choice(at)

    @property
    def _tails(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """For the groups from each turn on: (bytes, loss) along their joint convex hull, the linear relaxation."""
        if not hasattr(self, "_made"):
            turn_of = {group: turn for turn, group in enumerate(self._order)}
            self._made = [self._tail([g for g, t in turn_of.items() if t >= turn]) for turn in range(len(turn_of) + 1)]
        return self._made

    def _tail(self, groups: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        among = set(groups)
        size, loss = [0], [0.0]
        at = {}
        for group in groups:
            at[group] = int(self.hulls[group][0])
            size[0] += int(self._bytes[group][at[group]])
            loss[0] += float(self._loss[group][at[group]])
        for group, to in self.steps:
            if group in among:
                size.append(size[-1] + int(self._bytes[group][to] - self._bytes[group][at[group]]))
                loss.append(loss[-1] + float(self._loss[group][to] - self._loss[group][at[group]]))
                at[group] = to
        return np.array(size, np.float64), np.array(loss)


def _undominated(size: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """Options to which no other is both no larger and no worse, by rising bytes."""
    order = np.lexsort((np.arange(len(size)), loss, size))
    ahead = np.concatenate(([np.inf], np.minimum.accumulate(loss[order])[:-1]))
    return order[loss[order] < ahead]


def _hull(size: np.ndarray, loss: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Those of the kept options that lie on their lower convex hull."""
    path: list[int] = []
    for option in kept:
        while len(path) > 1:
            a, b = path[-2], path[-1]
            if (loss[a] - loss[b]) * float(size[option] - size[b]) > (loss[b] - loss[option]) * float(
                size[b] - size[a]
            ):
                break
            path.pop()
        path.append(int(option))
    return np.array(path)
