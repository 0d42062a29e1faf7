"""`QuantizedTensor`: the codes, chosen once, and the parameters of their grid.

This is the only thing a format writer sees. It can be decoded and digested, never re-rounded.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

from . import ops
from .spec import QuantSpec


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """Integer codes on the grid of `spec`.

    codes: int8 (signed element) or uint8, the shape of the weight.
    scales: `spec.scale_dtype`, shape `spec.scale_shape(codes.shape)`: the values as stored.
    zero_points: int32, shape of `scales`, or None unless spec.offset is "zero_point".
    minimums: dtype and shape of `scales`, or None unless spec.offset is "minimum".
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zero_points: torch.Tensor | None
    minimums: torch.Tensor | None
    spec: QuantSpec

    def __post_init__(self) -> None:
        spec = self.spec
        expected = spec.scale_shape(tuple(self.codes.shape))
        code_dtype = torch.int8 if spec.element.signed else torch.uint8
        scale_dtype = getattr(torch, spec.scale_dtype)
        if self.codes.dtype != code_dtype:
            raise ValueError(f"codes of {spec} are {code_dtype}, got {self.codes.dtype}")
        if tuple(self.scales.shape) != expected or self.scales.dtype != scale_dtype:
            raise ValueError(
                f"scales of {spec} for shape {list(self.codes.shape)} are {scale_dtype} "
                f"{list(expected)}, got {self.scales.dtype} {list(self.scales.shape)}"
            )
        for name, value, wanted in (
            ("zero_points", self.zero_points, "zero_point"),
            ("minimums", self.minimums, "minimum"),
        ):
            if (value is not None) != (spec.offset == wanted):
                raise ValueError(f"{name} must be given exactly when the offset is {wanted!r}; it is {spec.offset!r}")
            if value is not None and tuple(value.shape) != expected:
                raise ValueError(f"{name} must have shape {list(expected)}, got {list(value.shape)}")

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.codes.shape)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The real values of the codes, computed in float32, in the shape of the weight."""
        return ops.dequantize(self.codes, self.scales, self.zero_points, self.minimums, dtype=dtype)

    def digests(self) -> dict[str, str]:
        """SHA-256 of the codes and of the parameters as stored: what a receipt lists.

        codes: one byte per value, row-major. parameters: bytes of the scales, then of the zero
        points (int32) or minimums, row-major, little endian.
        """
        parameters = hashlib.sha256(_raw(self.scales))
        for extra in (self.zero_points, self.minimums):
            if extra is not None:
                parameters.update(_raw(extra))
        return {"codes": hashlib.sha256(_raw(self.codes)).hexdigest(), "parameters": parameters.hexdigest()}


def _raw(t: torch.Tensor) -> memoryview:
    return t.detach().cpu().contiguous().view(torch.uint8).reshape(-1).numpy().data
