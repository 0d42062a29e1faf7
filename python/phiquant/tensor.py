"""`QuantizedTensor`: the codes, chosen once, and the parameters of their grid.

This is the only thing a format writer sees. It can be decoded and digested, never re-rounded.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import ops, two_level
from .spec import IQ4NL, Binary, Codebook, Element, FixedPoint, Float, NormalFloat, QuantSpec

PARAMETERS = ("scales", "zero_points", "minimums", "codebook", "super_scales", "super_minimums")


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """Codes on the grid of `spec`.

    codes: int8 (signed element) or uint8, the shape of the weight.
    scales: `spec.scale_dtype`, shape `spec.scale_shape(codes.shape)`: the values as stored. None for
        fixed point and codebooks, which have no scale.
    zero_points: int32, shape of `scales`, or None unless spec.offset is "zero_point".
    minimums: dtype and shape of `scales`, or None unless spec.offset is "minimum".
    codebook: `spec.scale_dtype` [blocks, element.size], the levels of each block, ascending; None unless
        the element is a Codebook. Blocks are in the order of `spec.scale_shape`, row-major.
    super_scales, super_minimums: where `spec.two_level` is set, scales and minimums hold codes (dtype
        `spec.two_level.dtype`), and these, `spec.scale_dtype` of shape `spec.super_shape(codes.shape)`, their
        scales: s = super_scale * scale, m = -(super_minimum * minimum), in float32. None otherwise.
    """

    codes: torch.Tensor
    scales: torch.Tensor | None
    zero_points: torch.Tensor | None
    minimums: torch.Tensor | None
    spec: QuantSpec
    codebook: torch.Tensor | None = None
    super_scales: torch.Tensor | None = None
    super_minimums: torch.Tensor | None = None

    def __post_init__(self) -> None:
        spec = self.spec
        expected = spec.scale_shape(tuple(self.codes.shape))
        code_dtype = torch.int8 if spec.element.signed else torch.uint8
        if self.codes.dtype != code_dtype:
            raise ValueError(f"codes of {spec} are {code_dtype}, got {self.codes.dtype}")
        has_codebook, two = isinstance(spec.element, Codebook), spec.two_level is not None
        for name, value, wanted in (
            ("scales", self.scales, spec.has_scale),
            ("zero_points", self.zero_points, spec.offset == "zero_point"),
            ("minimums", self.minimums, spec.offset == "minimum"),
            ("codebook", self.codebook, has_codebook),
            ("super_scales", self.super_scales, two),
            ("super_minimums", self.super_minimums, two and spec.offset == "minimum"),
        ):
            if (value is not None) != wanted:
                raise ValueError(f"{name} must {'' if wanted else 'not '}be given for {spec}")
            shape = (math.prod(expected), spec.element.qmax + 1) if name == "codebook" else expected
            dtype = torch.int32 if name == "zero_points" else getattr(torch, spec.scale_dtype)
            if name.startswith("super"):
                shape = spec.super_shape(tuple(self.codes.shape)) if two else ()
            elif spec.two_level is not None:
                dtype = getattr(torch, spec.two_level.dtype)
            wrong_dtype = name not in ("zero_points", "minimums") and value is not None and value.dtype != dtype
            if value is not None and (tuple(value.shape) != shape or wrong_dtype):
                raise ValueError(
                    f"{name} of {spec} for shape {list(self.codes.shape)} are {dtype} {list(shape)}, "
                    f"got {value.dtype} {list(value.shape)}"
                )

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.codes.shape)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The real values of the codes, computed in float32, in the shape of the weight."""
        parts = (self.codes, *self.grid())
        return ops.dequantize(*parts, **element_arguments(self.spec.element, self.codebook), dtype=dtype)

    def grid(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """(scale, zero_point, minimum) per block as the ops take them: float32 where they are stored in two levels."""
        if self.super_scales is None or self.scales is None:
            return block_scales(self.spec, self.codes, self.scales), self.zero_points, self.minimums
        stored = two_level.Parameters(self.scales, self.super_scales, self.minimums, self.super_minimums)
        scale, minimum = stored.block_values()
        return scale, None, minimum

    @property
    def parameters(self) -> dict[str, torch.Tensor]:
        """What is stored beside the codes, by the names above, in the order in which digests take it."""
        named = {name: getattr(self, name) for name in PARAMETERS}
        return {name: value for name, value in named.items() if value is not None}

    def digests(self) -> dict[str, str]:
        """SHA-256 of the codes and of the parameters as stored: what a receipt lists.

        codes: one byte per value, row-major. parameters: bytes of the scales, then of the zero
        points (int32) or minimums, the codebook, super-block scales, super-block minimums, where there
        are such; row-major, little endian.
        """
        parameters = hashlib.sha256()
        for part in self.parameters.values():
            parameters.update(_raw(part))
        return {"codes": hashlib.sha256(_raw(self.codes)).hexdigest(), "parameters": parameters.hexdigest()}


def rows_of(length: int, count: int, rows: slice) -> slice:
    """Where a part of `length` first indices, of a tensor of `count` rows, has what belongs to `rows`.

    A part has one index for a row, or several (the codebooks of its groups), or one for all rows together.
    """
    start, stop, _ = rows.indices(count)
    if not count or length % count:
        return slice(0, length)
    return slice(start * length // count, stop * length // count)


def take_rows(q: QuantizedTensor, rows: slice) -> QuantizedTensor:
    """Some rows of a tensor whose rows do not share parameters, or all of them: views."""
    count = len(q.codes)
    parts: dict[str, Any] = {name: part[rows_of(len(part), count, rows)] for name, part in q.parameters.items()}
    return dataclasses.replace(q, codes=q.codes[rows], **parts)


def join_rows(pieces: Sequence[QuantizedTensor]) -> QuantizedTensor:
    """Pieces of rows, in order, as one tensor."""
    if len(pieces) == 1:
        return pieces[0]
    parts: dict[str, Any] = {
        name: torch.cat([getattr(piece, name) for piece in pieces]) for name in ("codes", *pieces[0].parameters)
    }
    return dataclasses.replace(pieces[0], **parts)


def sampled(t: torch.Tensor) -> bytes:
    """Some 64 values of a tensor, evenly spaced, as float32: what a digest knows a weight by without reading it all."""
    return t.detach().flatten()[:: max(1, t.numel() // 64)].float().cpu().numpy().tobytes()


def ids_digest(ids: torch.Tensor) -> str:
    """By which receipts and resumed runs know the windows of tokens [n, T] that a run was given."""
    return hashlib.sha256(ids.long().contiguous().numpy().tobytes()).hexdigest()


def _raw(t: torch.Tensor) -> memoryview:
    return t.detach().cpu().contiguous().view(torch.uint8).reshape(-1).numpy().data


def element_arguments(element: Element, codebook: torch.Tensor | None = None) -> dict[str, Any]:
    """The keyword arguments by which the ops know how codes that are not plain integers are read."""
    if isinstance(element, Float):
        return {"format": element.format}
    if isinstance(element, NormalFloat | IQ4NL | Binary | Codebook):
        return {"format": "table", "levels": element.levels if codebook is None else codebook}
    return {}


def block_scales(spec: QuantSpec, x: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    """The scales as the ops take them: the fixed step of fixed point, 1 for the blocks of a codebook."""
    if scales is not None:
        return scales
    step = spec.element.step if isinstance(spec.element, FixedPoint) else 1.0
    return torch.full(spec.scale_shape(tuple(x.shape)), step, dtype=torch.float32, device=x.device)
