"""The parameters of a grid as `refine` moves them: what a group of columns could have instead, and how it is stored.

Everything lies transposed, a row of W along a lane: parameters float32 [G, N], G groups of columns. Whatever is
proposed or fitted is rounded to its storage first, so that errors are those of what a file holds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..tensor import QuantizedTensor, element_arguments

Stored = dict[str, Tensor]  # parameters of one group by their names in QuantizedTensor, float32 [N]


class Proposal(NamedTuple):
    """Parameters for one group of columns, float32 [N], and as what they would be stored."""

    scale: Tensor
    offset: Tensor | None
    stored: Stored


class ScaledGrid:
    """Scales of each row, with zero points or minimums, in one level or two.

    stored: [G, N] what a file holds. scale, offset: [G, N] what the values of codes are computed from; offset is
    None, zero points or minimums. upper: the super-blocks' scales by the name of what they scale, [S, N] or [S, 1];
    super_blocks: S where each row has its own, else 0.
    """

    def __init__(self, quantized: QuantizedTensor) -> None:
        self.start, self.spec = quantized, quantized.spec
        parts = {name: p.float().T.contiguous() for name, p in quantized.parameters.items()}
        self.upper = {name.removeprefix("super_"): p for name, p in parts.items() if name.startswith("super_")}
        self.stored: Stored = {name: p for name, p in parts.items() if not name.startswith("super_")}
        self.groups, self.minimum = len(self.stored["scales"]), "minimums" in self.stored
        each_row = bool(self.upper) and self.upper["scales"].shape[1] == len(quantized.codes)
        self.super_blocks = len(self.upper["scales"]) if each_row else 0
        self.scale, self.offset = self._effective(range(self.groups), self.stored)

    def _step(self, name: str, groups: Any) -> Tensor | float:
        """What a code of `name` counts in these groups; 1 where values are stored as they are."""
        upper = self.upper.get(name)
        return 1.0 if upper is None else upper[torch.as_tensor(groups) * len(upper) // self.groups]

    def _effective(self, groups: Any, stored: Stored) -> tuple[Tensor, Tensor | None]:
        scale = stored["scales"] * self._step("scales", groups)
        if "minimums" in stored and self.upper:
            return scale, -(stored["minimums"] * self._step("minimums", groups))
        return scale, stored.get("minimums", stored.get("zero_points"))

    def _rounded(self, name: str, group: int, value: Tensor) -> Tensor:
        """What would be stored for the parameter `value`: itself in its type, or its code."""
        levels, step = self.spec.two_level, self._step(name, group)
        if levels is None or not isinstance(step, Tensor):
            return stored_as(value, self.spec.scale_dtype)
        code = torch.where(step == 0, 0, value / step)
        return stored_as(code.clamp(0, 448), levels.dtype) if levels.is_float else self._clamped(code.round())

    def _clamped(self, code: Tensor) -> Tensor:
        levels = self.spec.two_level
        return code if levels is None or levels.is_float else code.clamp(levels.qmin, levels.qmax)

    def proposals(self, group: int, scale: Tensor, minimum: Tensor | None, factors: Sequence[float]) -> list[Proposal]:
        """Near an ideal scale (and minimum) [N] for a group: scaled by `factors`, offsets moved by up to a step."""
        element, found = self.spec.element, []
        for factor in factors:
            scales = self._rounded("scales", group, scale * factor)
            if minimum is not None:
                actual, _ = self._effective(group, {"scales": scales})
                low = minimum + (scale - actual) * (element.qmax / 2)  # the middle of the range stays
                code = self._rounded("minimums", group, -low if self.upper else low)
                moves = (0, -1, 1) if self.upper and factor == 1 else (0,)
                choices = [
                    {"scales": scales, "minimums": self._clamped(code + move) if move else code} for move in moves
                ]
            elif "zero_points" in self.stored:
                zero = self.stored["zero_points"][group]
                moved = [(zero + move).clamp(element.qmin, element.qmax) for move in (0, -1, 1)]
                choices = [{"scales": scales, "zero_points": z} for z in moved]
            else:
                choices = [{"scales": scales}]
            found += [Proposal(*self._effective(group, choice), choice) for choice in choices]
        return found

    def take(self, group: int, better: Tensor, which: Tensor, proposals: Sequence[Proposal]) -> None:
        """Where `better` [N], the parameters of proposal `which` [N]."""
        for name, kept in self.stored.items():
            choice = torch.stack([p.stored[name] for p in proposals]).gather(0, which[None])[0]
            kept[group] = torch.where(better, choice, kept[group])
        self.scale[group], offset = self._effective(group, {name: kept[group] for name, kept in self.stored.items()})
        if self.offset is not None and offset is not None:
            self.offset[group] = offset

    def fit_upper(self, change: Stored, block: int) -> dict[str, Tensor]:
        """The scales of a super-block, moved by `change` and rounded to their type; none changes its sign."""
        found = {}
        for name, delta in change.items():
            old = self.upper[name][block]
            new = stored_as(old + delta, self.spec.scale_dtype)
            found[name] = torch.where(new * old > 0, new, old)
        return found

    def refresh(self) -> None:
        """The values of all parameters, after super-blocks got other scales."""
        self.scale, self.offset = self._effective(range(self.groups), self.stored)

    def unit(self, codes: Tensor) -> Tensor:
        """The values of codes at the scale 1, without offset."""
        return ops.dequantize(codes.contiguous(), torch.ones(1, 1), **element_arguments(self.spec.element))

    def finished(self, codes: Tensor) -> QuantizedTensor:
        """codes [N, K] on this grid."""
        parts = self.stored | {f"super_{name}": p for name, p in self.upper.items()}
        typed: dict[str, Any] = {
            name: p.T.contiguous().to(getattr(self.start, name).dtype) for name, p in parts.items()
        }
        return dataclasses.replace(self.start, codes=codes, **typed)


def stored_as(value: Tensor, dtype: str) -> Tensor:
    """float32 values as a tensor of `dtype` holds them."""
    return value.to(getattr(torch, dtype)).float()
