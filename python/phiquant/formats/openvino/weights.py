"""The bytes of a weight in the .bin of an OpenVINO IR, as layout.py lays them out."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from ..._extension import load
from ...errors import PhiquantError
from ...spec import FixedPoint
from ...tensor import QuantizedTensor
from .. import receipt
from ..floats import cast
from ..source import Entry, Source, row_slices
from .layout import ALIGNMENT, BITS, TYPES, Container, Part, container, parts

_C = load()
_SOURCES = {"zero_point": "zero_points", "scale": "scales", "super_scale": "super_scales", "codebook": "codebook"}
_DTYPES = {kind: name for name, kind in TYPES.items()}


class Encoding:
    """The bytes of one entry, and its record once they have passed.

    Codes pass piece by piece; the parameters, which are small, follow when all are known.
    """

    def __init__(self, source: Source, entry: Entry) -> None:
        self._source, self._entry = source, entry
        self._digest = receipt.TensorDigest()
        self._parameters: dict[str, list[torch.Tensor]] = {}
        self._exact = True

    def record(self, file: str) -> dict[str, Any]:
        """What the receipt says."""
        entry, kind = self._entry, parts(self._entry)[0].type
        if entry.spec is not None:
            return receipt.tensor_record(entry, kind, file, self._digest.codes())
        values = self._digest.values()
        return receipt.tensor_record(entry, kind, file, values, dtype=_DTYPES[kind], exact=self._exact)

    def buffers(self) -> Iterator[bytes | memoryview]:
        """The bytes of all constants, with what aligns them."""
        layout = parts(self._entry)
        yield from self._floats(layout[0]) if self._entry.spec is None else self._codes(layout[0])
        for before, part in pairwise(layout):
            yield bytes(-before.nbytes % ALIGNMENT)
            yield self._parameter(part)

    def _codes(self, part: Part) -> Iterator[memoryview]:
        entry = self._entry
        assert entry.spec is not None
        held = container(entry.spec)
        for rows in row_slices(entry):
            piece = self._source.read(entry, rows)
            if not isinstance(piece, QuantizedTensor) or piece.spec != entry.spec:
                raise PhiquantError(f"{entry.name}: the source gave no codes on the grid {entry.spec}")
            for name, values in piece.parameters.items():
                if values.is_floating_point() and not bool(torch.isfinite(values.float()).all()):
                    raise PhiquantError(f"{entry.name}: one of its {name} is not finite; quantize this tensor again")
                self._parameters.setdefault(name, []).append(values)
            self._digest.add_codes(piece)
            yield _pack(piece.codes, part.type, held)

    def _parameter(self, part: Part) -> bytes | memoryview:
        spec = self._entry.spec
        assert spec is not None
        held, kind = container(spec), part.name.rpartition("/")[2]
        if kind == "codebook" and held.levels is not None:
            return np.asarray(held.levels, np.float32).tobytes()
        if kind == "scale" and isinstance(spec.element, FixedPoint):
            return np.full(part.shape, spec.element.step, np.float32).tobytes()
        if kind == "zero_point" and held.zero is not None:
            return receipt.raw(torch.tensor([held.zero]).to(torch.float8_e4m3fn))
        values = torch.cat(self._parameters[_SOURCES[kind]])
        if kind != "zero_point":
            return receipt.raw(values)
        low, high = spec.element.qmin, spec.element.qmax
        if values.numel() and not low <= int(values.min()) <= int(values.max()) <= high:
            raise PhiquantError(f"{self._entry.name}: a zero point is none of the codes {low}..{high} of {spec}")
        if part.type == "f8e4m3":
            return receipt.raw((values + held.shift).to(torch.float8_e4m3fn))
        return _pack(values.to(torch.int8 if low < 0 else torch.uint8), part.type, held)

    def _floats(self, part: Part) -> Iterator[memoryview]:
        entry = self._entry
        for rows in row_slices(entry):
            piece = self._source.read(entry, rows)
            assert isinstance(piece, torch.Tensor)
            hint = f"too large for {entry.dtype}; export as openvino:BF16"
            stored, exact = cast(entry.name, piece, getattr(torch, _DTYPES[part.type]), rows.start, hint)
            self._exact = self._exact and exact
            data = receipt.raw(stored)
            self._digest.add_values(data)
            yield data


def _pack(codes: torch.Tensor, kind: str, held: Container) -> memoryview:
    """Codes as the bytes of a constant of type `kind`; i4 is two's complement, the others count from 0."""
    if held.step != 1:
        codes = codes * held.step
    if BITS[kind] == 8:
        return receipt.raw(codes)
    add = 0 if kind == "i4" else held.shift
    rows = codes.contiguous().view(torch.uint8).reshape(1, -1)
    return memoryview(_C.pack_dense(rows.cpu().numpy(), BITS[kind], add)).cast("B")
