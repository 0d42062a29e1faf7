"""How a tensor's codes lie in an ONNX data file, and their bytes. Nothing is rounded here.

    blocks   (MatMulNBits) codes uint8 [N, K/b, b bits/8], scales float32 [N, K/b], zero points uint8 [N, .]: rows
             of ceil(K/b bits/8) bytes. Codes are unsigned; without zero points the kernel subtracts 2^(bits-1)
    columns  (DequantizeLinear) codes int/uint 2, 4 or 8 [K, N], scales float32 [K/b, N], zero points like the codes
    dynamic  (MatMulInteger) codes int8 [K, N], scales float32 [N]
    plain    the float tensor as it is

N = rows, K = values of a row, b = values of a block. Codes of 3, 5, 6 and 7 bits lie in the next wider type, and one
scale for a row or a tensor is repeated for every block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from ..._extension import load
from ...errors import PhiquantError
from ...spec import TARGETS, Int, PerChannel, PerGroup, PerTensor, QuantSpec, Ternary
from ...tensor import QuantizedTensor
from .. import receipt
from ..floats import cast
from ..source import Entry, Source, row_slices
from .file import DataFile, Placed

_C = load()
BLOCKS = (256, 128, 64, 32, 16)  # of the CPU kernels of MatMulNBits
Kind = Literal["blocks", "columns", "dynamic", "plain"]
Pieces = Iterator[tuple[slice, QuantizedTensor]]


@dataclass(frozen=True)
class Layout:
    """What the bytes of a tensor are. bits, block: of its container; add: from a code to the stored code."""

    kind: Kind
    dtype: str
    bits: int = 0
    block: int = 0
    add: int = 0
    zero_points: bool = False


@dataclass(frozen=True)
class Weight:
    """An entry with its place: `parts` by "codes", "scales", "zero_points", or "values"."""

    entry: Entry
    layout: Layout
    parts: dict[str, Placed]

    @property
    def stored_as(self) -> str:
        """What the receipt calls it: the operator that reads it, or the float type."""
        kind, bits = self.layout.kind, self.layout.bits
        names = {"blocks": f"MatMulNBits{bits}", "columns": self.layout.dtype, "dynamic": "MatMulInteger"}
        return names.get(kind, self.layout.dtype)


def layout(entry: Entry, form: str = "genai", table: bool = False, dynamic: bool = False) -> Layout:
    """How `entry` is stored. table: it is looked up by rows, so rows stay rows in every form.

    dynamic: grids of 8 bits per row multiply rounded activations.
    PhiquantError names the tensor, its spec, what does not fit and the nearest target that does.
    """
    spec = entry.spec
    if spec is None:
        return Layout("plain", "float32" if len(entry.shape) < 2 else entry.dtype)
    if reason := _misfit(entry, spec):
        raise PhiquantError(
            f"{entry.name}: ONNX cannot hold {spec} exactly: {reason}. Nearest that can: {_nearest(entry, spec)!r}. "
            "Quantize with it; export never rounds again"
        )
    bits, block = _bits(spec), _block(entry.shape, spec)
    signed, zero_points = spec.element.signed, spec.offset == "zero_point"
    whole_rows = spec.scale_shape(entry.shape)[-1] == 1
    if dynamic and not table and bits == 8 and whole_rows and not zero_points:
        return Layout("dynamic", "int8", bits, entry.shape[1])
    if form == "qdq" and not table:
        return Layout("columns", f"{'int' if signed else 'uint'}{bits}", bits, block, 0, zero_points)
    return Layout("blocks", "uint8", bits, block, 1 << (bits - 1) if signed else 0, zero_points)


def place(entry: Entry, how: Layout, file: DataFile) -> Weight:
    """Reserve the room of `entry` in the data file, under its Hugging Face name."""
    parts = {
        part: file.place(entry.name, entry.name if part == "values" else f"{entry.name}.{part}", dtype, shape)
        for part, dtype, shape in _parts(entry, how)
    }
    return Weight(entry, how, parts)


def _parts(entry: Entry, how: Layout) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(name, type, shape) of the tensors that hold `entry`."""
    if how.kind == "plain":
        yield "values", how.dtype, entry.shape
        return
    rows, columns = entry.shape
    blocks = columns // how.block
    if how.kind == "blocks":
        yield "codes", how.dtype, (rows, blocks, how.block * how.bits // 8)
        yield "scales", "float32", (rows, blocks)
        if how.zero_points:
            yield "zero_points", how.dtype, (rows, (blocks * how.bits + 7) // 8)
    else:
        yield "codes", how.dtype, (columns, rows)
        yield "scales", "float32", (rows,) if how.kind == "dynamic" else (blocks, rows)
        if how.zero_points:
            yield "zero_points", how.dtype, (blocks, rows)


class Writing:
    """The bytes of one tensor's parts, in order, and its line of the receipt once they have passed."""

    def __init__(self, source: Source, weight: Weight, file: str) -> None:
        self._source, self._weight, self._file = source, weight, file
        self._digest = receipt.TensorDigest()
        self._exact = True
        self._scales: list[torch.Tensor] = []
        self._zero_points: list[torch.Tensor] = []

    def contents(self) -> Iterator[Iterator[Any]]:
        """For each part the buffers of its bytes."""
        parts: dict[str, Callable[[], Iterator[Any]]] = {
            "values": self._values,
            "codes": self._rows if self._weight.layout.kind == "blocks" else self._columns,
            "scales": self._scale_bytes,
            "zero_points": self._zero_point_bytes,
        }
        for part in self._weight.parts:
            yield parts[part]()

    def record(self) -> dict[str, Any]:
        entry, weight = self._weight.entry, self._weight
        if entry.spec is not None:
            return receipt.tensor_record(entry, weight.stored_as, self._file, self._digest.codes())
        digests, dtype = self._digest.values(), weight.layout.dtype
        return receipt.tensor_record(entry, dtype, self._file, digests, dtype=dtype, exact=self._exact)

    def _values(self) -> Iterator[Any]:
        entry, dtype = self._weight.entry, getattr(torch, self._weight.layout.dtype)
        for rows in row_slices(entry):
            piece = self._source.read(entry, rows)
            assert isinstance(piece, torch.Tensor)
            hint = f"too large for {entry.dtype}; export as onnx:BF16"
            stored, exact = cast(entry.name, piece, dtype, rows.start, hint)
            self._exact = self._exact and exact
            data = receipt.raw(stored)
            self._digest.add_values(data)
            yield data

    def _pieces(self) -> Pieces:
        """The tensor's rows in pieces; their parameters are kept, as blocks, for the parts that follow."""
        entry, how = self._weight.entry, self._weight.layout
        blocks = entry.shape[1] // how.block
        for rows in row_slices(entry):
            piece = self._source.read(entry, rows)
            if not isinstance(piece, QuantizedTensor) or piece.spec != entry.spec:
                raise PhiquantError(f"{entry.name}: the source gave no codes on the grid {entry.spec}")
            assert piece.scales is not None  # layout() accepts grids with scales only
            if not bool(torch.isfinite(piece.scales.sum(dtype=torch.float32))):
                raise PhiquantError(f"{entry.name}: a scale is not finite; quantize this tensor again")
            self._digest.add_codes(piece)
            self._scales.append(_per_block(piece.scales.float(), len(piece.codes), blocks))
            if piece.zero_points is not None:
                self._zero_points.append(_per_block(piece.zero_points, len(piece.codes), blocks))
            yield rows, piece

    def _rows(self) -> Iterator[Any]:
        how = self._weight.layout
        for _, piece in self._pieces():
            yield _C.pack_dense(_bytes(piece.codes), how.bits, how.add).data

    def _columns(self) -> Iterator[Any]:
        """Transposed, so the packed codes of the whole tensor are in memory."""
        how, placed = self._weight.layout, self._weight.parts["codes"]
        packed = np.zeros(placed.nbytes, np.uint8)
        for rows, piece in self._pieces():
            _C.pack_columns(_bytes(piece.codes), how.bits, how.add, rows.start, placed.shape[1], packed)
        yield packed.data

    def _scale_bytes(self) -> Iterator[Any]:
        if self._weight.layout.kind == "blocks":
            yield from map(receipt.raw, self._scales)
        else:
            yield receipt.raw(torch.cat(self._scales).t())

    def _zero_point_bytes(self) -> Iterator[Any]:
        how, entry = self._weight.layout, self._weight.entry
        points = torch.cat(self._zero_points)
        element = entry.spec.element if entry.spec else Int(8)
        if points.numel() and not element.qmin <= int(points.min()) <= int(points.max()) <= element.qmax:
            raise PhiquantError(f"{entry.name}: a zero point lies outside of {element}; quantize this tensor again")
        if how.kind == "blocks":
            yield _C.pack_dense(_bytes(points.to(torch.uint8)), how.bits, how.add).data
        else:
            flat = points.to(torch.uint8).t().reshape(1, -1)
            yield _C.pack_dense(_bytes(flat), how.bits, how.add).data


def _bytes(codes: torch.Tensor) -> np.ndarray:
    return codes.cpu().contiguous().view(torch.uint8).numpy()


def _per_block(values: torch.Tensor, rows: int, blocks: int) -> torch.Tensor:
    """Parameters [rows or 1, groups] repeated to [rows, blocks]."""
    repeats = blocks // values.shape[1]
    return (values if repeats == 1 else values.repeat_interleave(repeats, dim=1)).expand(rows, -1)


def _bits(spec: QuantSpec) -> int:
    return next(bits for bits in (2, 4, 8) if spec.element.bits <= bits)


def _block(shape: tuple[int, ...], spec: QuantSpec) -> int:
    """The largest block of the kernels in which one scale holds; 0 if there is none."""
    size = spec.granularity.size if isinstance(spec.granularity, PerGroup) else shape[1]
    return next((block for block in BLOCKS if size % block == 0), 0)


def _misfit(entry: Entry, spec: QuantSpec) -> str:
    """Why ONNX cannot hold `spec`, or ""."""
    if len(entry.shape) != 2:
        return f"its quantized tensors are matrices, and this one has shape {list(entry.shape)}"
    if not isinstance(spec.element, Int | Ternary):
        return f"its kernels read integers, not {spec.element}"
    if spec.offset == "minimum":
        return "it has integer zero points, and a float minimum is no whole number of steps"
    if spec.two_level is not None or spec.scale_dtype not in ("float32", "float16", "bfloat16"):
        return f"its scales are single floats, not those of {spec}"
    if not isinstance(spec.granularity, PerTensor | PerGroup) and spec.granularity != PerChannel(0):
        return f"it has no scales per {spec.granularity}"
    if not _block(entry.shape, spec):
        return f"its blocks have {', '.join(map(str, reversed(BLOCKS)))} values, which divide no block of this grid"
    return ""


def _nearest(entry: Entry, spec: QuantSpec) -> str:
    """The target of this format that is most like `spec` and fits the shape."""
    wanted = spec.granularity.size if isinstance(spec.granularity, PerGroup) else 32
    asymmetric = spec.offset != "none"
    best = min(
        (
            (spec.element.bits > t.spec.element.bits, t.spec.element.bits, (t.spec.offset != "none") != asymmetric,
             abs(t.spec.granularity.size - wanted), t.name)
            for t in TARGETS.values()
            if t.format == "onnx" and t.spec and isinstance(t.spec.granularity, PerGroup)
            and len(entry.shape) == 2 and entry.shape[1] % t.spec.granularity.size == 0
        ),
        default=None,
    )  # fmt: skip
    return best[-1] if best else "onnx:BF16"


__all__ = ["BLOCKS", "Layout", "Weight", "Writing", "layout", "place"]
