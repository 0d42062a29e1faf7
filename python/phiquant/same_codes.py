"""same_codes(): proves that two files, in one format or two, hold the same codes on the same grids.

It works from the files, through the readers alone: no receipt is read, no value is decoded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .canonical import Canonical, Verdict, canonical, compare
from .formats.detect import Found, existing
from .formats.stored import StoredTensor
from .models import phi

IDENTICAL: Verdict = "identical"
_ORDER: tuple[Verdict, ...] = (IDENTICAL, "same codes, other parameters", "different")


@dataclass(frozen=True)
class TensorVerdict:
    """One tensor in two files. a, b: how each stores it; coded: whether one has codes; reason: what differs."""

    name: str
    verdict: Verdict
    a: str
    b: str
    coded: bool
    reason: str = ""


@dataclass(frozen=True)
class Comparison:
    """What same_codes() found. ok: every tensor is identical, floats too. formats: of the two files."""

    formats: tuple[str, str]
    ok: bool
    tensors: list[TensorVerdict]

    @property
    def codes_ok(self) -> bool:
        """Whether the tensors with codes are identical; a format may store norms or the embedding rounded."""
        return all(t.verdict == IDENTICAL for t in self.tensors if t.coded)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        bad = [t for t in self.tensors if t.verdict != IDENTICAL]
        lines = [
            f"{len(self.tensors) - len(bad)} of {len(self.tensors)} tensors are identical in "
            + " and ".join(self.formats)
        ]
        return "\n".join(lines + [f"{t.name}: {t.verdict} ({t.a}, {t.b}){t.reason and ': ' + t.reason}" for t in bad])


def same_codes(a: str | Path, b: str | Path) -> Comparison:
    """Compare the tensors of two exported models, each a file or folder of any format.

    Codes are compared in their canonical form (canonical.py): Q4_0, MLX's 4 bits, MatMulNBits and OpenVINO's i4 use
    other words for one grid. Tensors without codes must have the same values. The parts of fused weights (q, k, v;
    gate, up) are compared one by one, because a file may hold them apart.
    """
    founds = [existing(path) for path in (a, b)]
    slices = [dict(_slices(found)) for found in founds]
    tensors = [_verdict(name, *(side.get(name) for side in slices)) for name in dict.fromkeys([*slices[0], *slices[1]])]
    formats = (founds[0].format.name, founds[1].format.name)
    return Comparison(formats, all(t.verdict == IDENTICAL for t in tensors), tensors)


@dataclass(frozen=True)
class _Slice:
    """Some rows of a tensor of a file."""

    stored: StoredTensor
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.stop - self.start, *self.stored.shape[1:])

    def rows(self, start: int, stop: int) -> slice:
        return slice(self.start + start, self.start + stop)

    def canonical(self, start: int, stop: int) -> Canonical:
        return canonical(self.stored.quantized(rows=self.rows(start, stop)))

    def values(self, start: int, stop: int) -> np.ndarray:
        return self.stored.values(self.rows(start, stop))


def _slices(found: Found) -> Iterator[tuple[str, _Slice]]:
    """Every weight of the model, the fused ones as their parts."""
    stored, config = found.read(), found.config()
    for name, _ in phi.tensors(config):
        parts = {f"{part}.weight": rows for part, rows in phi.fused_rows(config, name.removesuffix(".weight")).items()}
        if name in stored and parts:
            yield from ((part, _Slice(stored[name], rows.start, rows.stop)) for part, rows in parts.items())
            continue
        for one in parts or (name,):
            if one in stored:
                yield one, _Slice(stored[one], 0, stored[one].shape[0])


def _verdict(name: str, a: _Slice | None, b: _Slice | None) -> TensorVerdict:
    if a is None or b is None:
        missing = "the first" if a is None else "the second"
        words = [side.stored.stored_as if side else "missing" for side in (a, b)]
        return TensorVerdict(name, "different", words[0], words[1], True, f"{missing} file does not have it")
    verdict, reason = _compare(a, b)
    coded = a.stored.spec is not None or b.stored.spec is not None
    return TensorVerdict(name, verdict, a.stored.stored_as, b.stored.stored_as, coded, reason)


def _compare(a: _Slice, b: _Slice) -> tuple[Verdict, str]:
    if a.shape != b.shape:
        return "different", f"shapes {list(a.shape)} and {list(b.shape)}"
    coded = [side.stored.spec is not None for side in (a, b)]
    if coded[0] != coded[1]:
        return "different", "one file has codes, the other floats"
    worst: Verdict = IDENTICAL
    for rows in a.stored.row_slices():
        start, stop = max(rows.start, a.start) - a.start, min(rows.stop, a.stop) - a.start
        if start >= stop:
            continue
        if coded[0]:
            found = compare(a.canonical(start, stop), b.canonical(start, stop))
        else:
            same = np.array_equal(a.values(start, stop), b.values(start, stop), equal_nan=True)
            found = IDENTICAL if same else "different"
        worst = max(worst, found, key=_ORDER.index)
    return worst, "" if coded[0] or worst == IDENTICAL else "other values"


__all__ = ["Comparison", "TensorVerdict", "same_codes"]
