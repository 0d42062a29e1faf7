"""What every reader gives: the tensors of a file, decoded on demand by code that no writer shares.

A format's reader says what its bytes mean (`parts`, `raw`, `values`, `reference`); the rest is the same for all.
N = rows, K = values of a row.
"""

from __future__ import annotations

import hashlib
import math
import mmap
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..errors import PhiquantError
from ..spec import QuantSpec
from ..tensor import PARAMETERS, QuantizedTensor

_CHUNK = 1 << 22  # values decoded at once
Parts = dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class StoredTensor(ABC):
    """A tensor of a file.

    name: the Hugging Face name. stored_as: what the format calls its storage: "Q4_0", "MatMulNBits 4" ...
    shape: of the weight.
    """

    name: str
    stored_as: str
    shape: tuple[int, ...]

    @property
    @abstractmethod
    def spec(self) -> QuantSpec | None:
        """The grid as the file alone tells it; None for floats."""

    @abstractmethod
    def parts(self, spec: QuantSpec, rows: slice | None = None) -> Parts:
        """Codes and parameters of some rows, by the names "codes" and those of tensor.PARAMETERS.

        In the words of `spec`: codes int8 or uint8 [N, K] in its range, parameters in its shapes; what the file
        repeats is there once. Of dtypes that numpy lacks, the bits: uint16 for bfloat16, uint8 for float8.
        PhiquantError if the file holds no such grid, repeated parameters differ, or a code is out of range.
        """

    @abstractmethod
    def raw(self, rows: slice | None = None) -> np.ndarray:
        """The values of a float tensor in its stored dtype (bfloat16: the bits, uint16): what a digest is made of."""

    @abstractmethod
    def values(self, rows: slice | None = None) -> np.ndarray:
        """The real values, float32, by the formula of the format."""

    @abstractmethod
    def reference(self, rows: slice | None = None) -> np.ndarray:
        """The real values as the format's own library decodes them, float32."""

    @property
    def nbytes(self) -> int:
        """Bytes that the file spends on it, those of its parameters included."""
        if self.spec is None:
            return math.prod(self.shape) * self.raw(slice(0, 1)).dtype.itemsize
        return math.ceil(self.spec.bits_per_weight(self.shape) * math.prod(self.shape) / 8)

    def digests(self, spec: QuantSpec | None) -> dict[str, str]:
        """What the receipt lists: SHA-256 of codes and parameters in the words of `spec`, or of the float bytes."""
        if (spec is not None) != (self.spec is not None):
            found = "float values" if self.spec is None else "codes"
            raise PhiquantError(
                f"{self.name}: the file has {found} ({self.stored_as}), the receipt says {spec or 'float'}"
            )
        if spec is None:
            values = hashlib.sha256()
            for rows in self.row_slices():
                values.update(_bytes(self.raw(rows)))
            return {"values": values.hexdigest()}
        codes, kept = hashlib.sha256(), []
        for part in self._pieces(spec):
            codes.update(_bytes(part.pop("codes")))
            kept.append(part)
        parameters = hashlib.sha256()
        for name in PARAMETERS:
            for value in self._joined([part[name] for part in kept if name in part], name, spec):
                parameters.update(_bytes(value))
        return {"codes": codes.hexdigest(), "parameters": parameters.hexdigest()}

    def quantized(self, spec: QuantSpec | None = None, rows: slice | None = None) -> QuantizedTensor:
        """The codes and parameters (of some rows), on the file's own grid or, where it holds that, on `spec`."""
        spec = spec or self.spec
        if spec is None:
            raise PhiquantError(f"{self.name}: the file has float values ({self.stored_as}), no codes")
        pieces = list(self._pieces(spec)) if rows is None else [self._checked(self.parts(spec, rows), spec)]
        joined = {name: self._joined([p[name] for p in pieces], name, spec) for name in pieces[0]}
        arrays = {name: np.concatenate(values) for name, values in joined.items()}
        tensors = {name: _tensor(array, _dtype(name, spec)) for name, array in arrays.items()}
        codes = tensors.pop("codes")
        return QuantizedTensor(codes, spec=spec, **{name: tensors.get(name) for name in PARAMETERS})

    def row_slices(self) -> Iterator[slice]:
        """Slices of the first axis, so that a large tensor is never decoded at once."""
        rows = self.shape[0] if self.shape else 1
        step = max(1, _CHUNK // max(1, int(np.prod(self.shape[1:]))))
        for start in range(0, rows, step):
            yield slice(start, min(start + step, rows))
            self.release()

    def release(self) -> None:  # noqa: B027 (most readers have nothing to do)
        """Give back the memory of what was read; nothing unless the reader maps its file."""

    def _pieces(self, spec: QuantSpec) -> Iterator[Parts]:
        for rows in self.row_slices():
            yield self._checked(self.parts(spec, rows), spec)

    def _checked(self, part: Parts, spec: QuantSpec) -> Parts:
        codes, element = part["codes"], spec.element
        if codes.size and not element.qmin <= int(codes.min()) <= int(codes.max()) <= element.qmax:
            raise PhiquantError(
                f"{self.name}: codes {codes.min()}..{codes.max()} in the file do not fit {spec}, whose codes are "
                f"{element.qmin}..{element.qmax}"
            )
        return part

    def _joined(self, pieces: list[np.ndarray], name: str, spec: QuantSpec) -> list[np.ndarray]:
        """The parameters of consecutive rows; those of the whole tensor must be the same in each piece."""
        if name == "codes" or len(pieces) < 2:
            return pieces
        shape = spec.super_shape(self.shape) if name.startswith("super") else spec.scale_shape(self.shape)
        if shape[0] == self.shape[0]:
            return pieces
        if any(piece.tobytes() != pieces[0].tobytes() for piece in pieces):
            raise PhiquantError(f"{self.name}: {name} of the whole tensor differ between its rows; the file is damaged")
        return pieces[:1]


def give_back(data: np.ndarray) -> None:
    """Give back the pages of a mapped file that were read through `data`: they count as this process' memory."""
    mapped: Any = data
    while isinstance(mapped, np.ndarray) and not isinstance(mapped.base, mmap.mmap):
        mapped = mapped.base
    if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
        mapped.base.madvise(mmap.MADV_DONTNEED)


def once(name: str, values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """[N, B] parameters of a file's blocks as `shape`, [N or 1, B / n]: repeated ones must have the same bits."""
    bits = np.ascontiguousarray(values).view(f"u{values.dtype.itemsize}")
    grouped = bits.reshape(bits.shape[0], shape[1], -1)
    first = grouped[: shape[0], :, :1]
    if not (grouped == first).all():
        row, group, _ = (int(i) for i in np.argwhere(grouped != first)[0])
        raise PhiquantError(f"{name}: row {row}, group {group}: scales of one block differ; the file is damaged")
    return np.ascontiguousarray(first[..., 0]).view(values.dtype)


def _bytes(values: np.ndarray) -> memoryview:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8).data


def _dtype(name: str, spec: QuantSpec) -> torch.dtype:
    if name == "codes":
        return torch.int8 if spec.element.signed else torch.uint8
    if name == "zero_points":
        return torch.int32
    two_level = spec.two_level is not None and not name.startswith("super") and name != "codebook"
    return getattr(torch, spec.two_level.dtype if two_level and spec.two_level else spec.scale_dtype)


def _tensor(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array).copy()).view(dtype)
