"""One form for all words that stand for the same grid: what makes tensors of two formats comparable.

int4 codes -8..7, uint4 codes with the zero point 8, uint4 codes with the minimum -8 s: three words for one
lattice, s times an integer. Their canonical forms are equal, by integer arithmetic and exact casts alone:

1. codes: how many steps a value lies from zero, q - z. Where m is a whole number of steps, z = -m / s;
   otherwise the minimum stays, and codes count from it. Bits and range of the container do not matter.
2. scales and minimums: widened to float32, which holds every stored type; two levels are multiplied first.
3. one scale per `group` values of a row. Equal scales that one file repeats and the other does not become
   equal when both are brought to the smaller group.
4. a block of scale 0 holds one value whatever its codes say: they count as 0 when two tensors are compared.

Small floats, NF4 and other tables are not integers: their codes stay bit patterns, under the name of the element.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from .elements import Binary, Codebook, FixedPoint, Int, Ternary
from .granularity import PerGroup
from .tensor import QuantizedTensor

INTEGERS = "integers"
Verdict = Literal["identical", "same codes, other parameters", "different"]
_FURTHEST = 4096  # steps between zero and the codes that count as a zero point


@dataclass(frozen=True, eq=False)
class Canonical:
    """A matrix of codes in the form above. N = rows, K = values of a row, G = K / group.

    alphabet: "integers", or the name of the element whose bit patterns the codes are ("fp4_e2m1", "nf4").
    codes: int16 [N, K]. scales, minimums: float32 [N, G]; minimums are 0 where zero is on the lattice.
    zero_points: int16 [N, G], the code that stands for zero, counted from the lowest of the container (0 where
        a minimum stays). levels: float32 [N, G, L] of a codebook, else None.
    stored_minimums: minimums as the source gave them, or None if it gave none. Of these, zero_points and
        stored_minimums are no part of the identity: they let the source's own words be found again.
    """

    alphabet: str
    codes: Tensor
    scales: Tensor
    minimums: Tensor
    zero_points: Tensor
    stored_minimums: Tensor | None = None
    levels: Tensor | None = None

    @property
    def group(self) -> int:
        return self.codes.shape[1] // self.scales.shape[1]

    def regroup(self, group: int) -> Canonical:
        """The same with parameters repeated for every `group` values, which divides the present group."""
        times = self.group // group
        if times == 1:
            return self
        parts = ("scales", "minimums", "zero_points", "stored_minimums", "levels")
        given = {name: getattr(self, name) for name in parts if getattr(self, name) is not None}
        return replace(self, **{name: value.repeat_interleave(times, dim=1) for name, value in given.items()})


def canonical(q: QuantizedTensor) -> Canonical:
    """The canonical form of a matrix of codes. ValueError for tensors of other dimensions, or columns with scales."""
    if len(q.shape) != 2:
        raise ValueError(f"the canonical form is that of matrices, not of shape {list(q.shape)}")
    rows = q.shape[0]
    scale, zero_point, minimum = (_by_row(part, rows) for part in q.grid())
    assert scale is not None
    if scale.shape[1] > 1 and not isinstance(q.spec.granularity, PerGroup):
        raise ValueError(f"{q.spec} has a scale for each column; the canonical form has one for each group of a row")
    scales, nothing = scale.float(), torch.zeros_like(scale, dtype=torch.float32)
    element = q.spec.element
    if not isinstance(element, Int | FixedPoint | Ternary | Binary):
        levels = _levels(q, scales.shape[1]) if isinstance(element, Codebook) else None
        alphabet = "codebook" if levels is not None else str(element)
        return Canonical(alphabet, q.codes.short(), scales, nothing, nothing.short(), levels=levels)
    if isinstance(element, Binary):  # code 0 is -s, code 1 is s
        return Canonical(INTEGERS, q.codes.short() * 2 - 1, scales, nothing, nothing.short())
    counted = q.codes.short() - element.qmin
    if minimum is None:
        zero = torch.zeros_like(nothing) if zero_point is None else zero_point
        zero = (zero - element.qmin).short()
        return Canonical(INTEGERS, _from(counted, zero), scales, nothing, zero)
    given = minimum.float()
    zero, rest = _split(scales, given, default=1 << (element.bits - 1))
    return Canonical(INTEGERS, _from(counted, zero), scales, rest, zero, given)


def compare(a: Canonical, b: Canonical) -> Verdict:
    """Whether two tensors hold the same codes on the same grid. Their shapes must agree."""
    if a.alphabet != b.alphabet or a.codes.shape != b.codes.shape:
        return "different"
    group = math.gcd(a.group, b.group)
    a, b = a.regroup(group), b.regroup(group)
    parameters = all(_same_bits(x, y) for x, y in ((a.scales, b.scales), (a.minimums, b.minimums))) and (
        (a.levels is None) == (b.levels is None)
        and (a.levels is None or b.levels is None or _same_bits(a.levels, b.levels))
    )
    if torch.equal(_meant(a), _meant(b)):
        return "identical" if parameters else "same codes, other parameters"
    if torch.equal(_counted(a), _counted(b)):
        return "same codes, other parameters"  # counted from another zero
    return "different"


def _by_row(part: Tensor | None, rows: int) -> Tensor | None:
    """[rows or fewer, G] -> [rows, G]: parameters that several rows share are repeated."""
    if part is None or part.shape[0] == rows:
        return part
    return part.repeat_interleave(rows // part.shape[0], dim=0)


def _levels(q: QuantizedTensor, groups: int) -> Tensor:
    assert q.codebook is not None
    levels = q.codebook.float().reshape(-1, groups, q.codebook.shape[1])
    return levels.repeat_interleave(q.shape[0] // levels.shape[0], dim=0)


def _split(scales: Tensor, minimums: Tensor, default: int) -> tuple[Tensor, Tensor]:
    """(zero points int16, what remains of the minimums): a whole number of steps becomes a zero point.

    Exact: steps times scale has at most 24 + 12 bits, fewer than float64 holds. `default` is the zero point of
    blocks whose scale and minimum are 0.
    """
    steps = torch.where(scales == 0, 0.0, minimums.double() / scales.double()).nan_to_num().round()
    whole = (steps * scales.double() == minimums.double()) & (steps.abs() <= _FURTHEST)
    zero = torch.where(whole, -steps, 0.0).short()
    zero[(scales == 0) & (minimums == 0)] = default
    return zero, torch.where(whole, 0.0, minimums)


def _from(counted: Tensor, zero: Tensor) -> Tensor:
    """Codes counted from the lowest [N, K], zero points [N, G] -> codes counted from zero."""
    blocks = counted.reshape(*zero.shape, counted.shape[1] // zero.shape[1])
    return (blocks - zero[..., None]).reshape(counted.shape)


def _counted(c: Canonical) -> Tensor:
    return _from(c.codes, -c.zero_points)


def _meant(c: Canonical) -> Tensor:
    """The codes, 0 where the scale is."""
    if bool((c.scales != 0).all()):
        return c.codes
    return (c.codes.reshape(*c.scales.shape, -1) * (c.scales != 0)[..., None]).reshape(c.codes.shape)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal((a + 0.0).view(torch.int32), (b + 0.0).view(torch.int32))
