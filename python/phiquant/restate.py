"""Say the same codes in the words of another spec, without touching a value; or say what would have to change.

`repack()` moves a file to another format by this. Everything is checked on the data: a float32 scale fits float16
if its own value does, groups become rows if their scales are equal.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .canonical import INTEGERS, Canonical, canonical
from .elements import Binary, Codebook, FixedPoint, Int, Ternary
from .errors import PhiquantError
from .spec import QuantSpec
from .tensor import QuantizedTensor


def restate(q: QuantizedTensor, spec: QuantSpec, name: str = "weight") -> QuantizedTensor:
    """The matrix `q` in the words of `spec`: canonical(result) equals canonical(q).

    PhiquantError names the tensor and what differs: element, range of codes, scale dtype, granularity, zero point,
    minimum, codebook, two levels of scales. Words that were restated come back byte for byte when
    they are restated in the first spec again; but a minimum does not tell the zero point of a block of scale 0.
    """
    if q.spec == spec:
        return q
    try:
        return _restate(canonical(q), spec)
    except ValueError as error:
        raise PhiquantError(f"{name}: {q.spec} is not a grid of {spec}: {error}") from error


def _restate(c: Canonical, spec: QuantSpec) -> QuantizedTensor:
    shape = tuple(c.codes.shape)
    wanted = spec.scale_shape(shape)
    integers = isinstance(spec.element, Int | FixedPoint | Ternary | Binary)
    alphabet = INTEGERS if integers else "codebook" if isinstance(spec.element, Codebook) else str(spec.element)
    if c.alphabet != alphabet:
        raise ValueError(f"its codes stand for {c.alphabet}, not for {alphabet}")
    if isinstance(spec.element, Codebook):
        return _codebook(c, spec, wanted)
    if not integers:
        return _parameters(spec, c.codes.to(torch.uint8), c.scales, wanted)
    if spec.offset == "none" and bool((c.minimums != 0).any()):
        raise ValueError(f"minimums: {_first(c.minimums != 0)} has one that is no whole number of steps")
    if isinstance(spec.element, Binary):
        return _parameters(spec, _fitting((c.codes + 1) // 2, c.codes.abs() == 1, spec), c.scales, wanted)
    if spec.offset == "none":
        low, high = spec.element.qmin, spec.element.qmax
        return _parameters(spec, _fitting(c.codes, (c.codes >= low) & (c.codes <= high), spec), c.scales, wanted)
    return _with_offset(c, spec, wanted)


def _with_offset(c: Canonical, spec: QuantSpec, wanted: tuple[int, ...]) -> QuantizedTensor:
    """Unsigned or signed codes with a zero point, or unsigned ones with a minimum, per block."""
    element = spec.element
    blocks = c.codes.reshape(*c.scales.shape, -1)
    if spec.offset == "minimum" and c.stored_minimums is not None:
        zero, minimums = c.zero_points, c.stored_minimums
    else:
        zero = _zero_points(blocks, c.zero_points, spec)
        if spec.offset == "minimum":  # -z s tells no z where s is 0: the middle, as canonical() reads it
            zero = torch.where(c.scales == 0, (element.qmax + 1) // 2, zero)
        minimums = torch.where(c.minimums != 0, c.minimums, 0 - zero * c.scales)
        exact = (minimums.double() == -zero.double() * c.scales.double()) | (c.minimums != 0)
        if spec.offset == "minimum" and not bool(exact.all()):
            raise ValueError(f"minimums: zero point times scale of {_first(~exact)} is no float32")
    if spec.offset == "zero_point" and bool((c.minimums != 0).any()):
        raise ValueError(f"zero point: the minimum of {_first(c.minimums != 0)} is no whole number of steps")
    counted = (blocks + zero[..., None]).reshape(c.codes.shape)
    fits = (counted >= 0) & (counted <= element.qmax - element.qmin)
    codes = _fitting(counted + element.qmin, fits, spec)
    if spec.offset == "minimum":
        return _parameters(spec, codes, c.scales, wanted, minimums=minimums)
    points = _collapse((zero + element.qmin).int(), wanted, "zero points")
    return _parameters(spec, codes, c.scales, wanted, zero_points=points)


def _zero_points(blocks: Tensor, own: Tensor, spec: QuantSpec) -> Tensor:
    """Counted from the lowest code: the source's own where codes then fit, else the middle of the range."""
    most = spec.element.qmax - spec.element.qmin
    low, high = blocks.amin(-1), blocks.amax(-1)
    fits = (low + own >= 0) & (high + own <= most) & (own <= most) & (own >= 0)
    return torch.where(fits, own, (most + 1) // 2)


def _codebook(c: Canonical, spec: QuantSpec, wanted: tuple[int, ...]) -> QuantizedTensor:
    assert c.levels is not None
    if c.levels.shape[2] != spec.element.qmax + 1:
        raise ValueError(f"codebook: it has {c.levels.shape[2]} levels")
    levels = torch.stack([_collapse(level, wanted, "codebook") for level in c.levels.unbind(2)], dim=2)
    stored = _cast(levels.reshape(-1, c.levels.shape[2]), spec.scale_dtype, "codebook")
    return QuantizedTensor(c.codes.to(torch.uint8), None, None, None, spec, stored)


def _parameters(
    spec: QuantSpec,
    codes: Tensor,
    scales: Tensor,
    wanted: tuple[int, ...],
    zero_points: Tensor | None = None,
    minimums: Tensor | None = None,
) -> QuantizedTensor:
    scales = _collapse(scales, wanted, "scales")
    if isinstance(spec.element, FixedPoint):
        if not bool((scales == spec.element.step).all()):
            raise ValueError(f"scales: they are not the fixed step {spec.element.step}")
        return QuantizedTensor(codes, None, None, None, spec)
    if minimums is not None:
        minimums = _collapse(minimums, wanted, "minimums")
    if spec.two_level is None:
        low = None if minimums is None else _cast(minimums, spec.scale_dtype, "minimums")
        return QuantizedTensor(codes, _cast(scales, spec.scale_dtype, "scales"), zero_points, low, spec)
    if not spec.two_level.is_float:
        raise ValueError("scales: it stores them in two levels of integers, which would have to be found")
    stored = _cast(scales, "float8_e4m3fn", "scales")
    above = torch.ones(spec.super_shape(tuple(codes.shape)), dtype=getattr(torch, spec.scale_dtype))
    return QuantizedTensor(codes, stored, None, None, spec, super_scales=above)


def _fitting(codes: Tensor, fits: Tensor, spec: QuantSpec) -> Tensor:
    """The codes in the container's dtype; ValueError if one lies outside its range."""
    if not bool(fits.all()):
        row, column = torch.nonzero(~fits)[0].tolist()
        element = spec.element
        raise ValueError(
            f"range of codes: the one at [{row}, {column}] lies outside {element.qmin}..{element.qmax} of {element}"
        )
    return codes.to(torch.int8 if spec.element.signed else torch.uint8)


def _collapse(part: Tensor, wanted: tuple[int, ...], what: str) -> Tensor:
    """[N, G] -> [n, g] of the granularity wanted: repeated for smaller blocks, one for larger ones if all are equal."""
    rows, groups = wanted
    if groups > part.shape[1]:
        if groups % part.shape[1]:
            raise ValueError(f"granularity: {part.shape[1]} and {groups} groups in a row do not nest")
        part = part.repeat_interleave(groups // part.shape[1], dim=1)
    if part.shape[1] % groups:
        raise ValueError(f"granularity: {part.shape[1]} and {groups} groups in a row do not nest")
    blocks = part.reshape(rows, part.shape[0] // rows, groups, part.shape[1] // groups)
    first = blocks[:, :1, :, :1]
    if not torch.equal(blocks, first.expand_as(blocks)):
        raise ValueError(f"granularity: {what} differ inside what would share one")
    return first.reshape(rows, groups)


def _cast(values: Tensor, dtype: str, what: str) -> Tensor:
    stored = values.to(getattr(torch, dtype))
    same = stored.float() == values
    if not bool(same.all()):
        value = values[~same][0].item()
        raise ValueError(f"scale dtype: one of its {what}, {value:.9g}, is no {dtype}")
    return stored


def _first(mask: Tensor) -> str:
    row, group = torch.nonzero(mask)[0].tolist()
    return f"row {row}, group {group},"
