"""What a QNN export holds of each tensor, and where: codes and scales in one data file that all stages share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..._extension import load
from ...errors import PhiquantError
from ...models import decoder, phi
from ...spec import spec as read_spec
from ...tensor import QuantizedTensor
from .. import receipt
from ..onnx.file import DataFile
from ..partial import PartialFile
from ..source import Entry, Source, row_slices
from .graph import Grid, Weight

_C = load()
DATA = "model.onnx.data"
_TYPES = {read_spec("int8-channel-sym"): "int8", read_spec("int4-channel-sym"): "int4"}


def check(entry: Entry) -> None:
    """PhiquantError if QNN cannot hold `entry` exactly: it names tensor, spec and the nearest target that can."""
    if entry.spec is None:
        return
    if entry.spec not in _TYPES:
        nearest = "qnn:a16w4" if entry.spec.element.bits <= 4 else "qnn:a16w8"
        raise PhiquantError(
            f"{entry.name}: QNN has no {entry.spec}; it holds integers of 8 or 4 bits with a float32 scale for each "
            f"output channel. The nearest target is {nearest}"
        )
    if entry.module == phi.EMBEDDING and _TYPES[entry.spec] != "int8":
        raise PhiquantError(f"{entry.name}: the embedding stage looks rows up in int8 or float, not in {entry.spec}")
    if entry.shape[-1] % 2:
        raise PhiquantError(f"{entry.name}: rows of {entry.shape[-1]} codes of 4 bits do not end at a byte")


class Layout:
    """The data file. norms: the grids of the norms' weights, by tensor, where the graph rounds; else {}."""

    def __init__(self, source: Source, norms: Mapping[str, Grid]) -> None:
        self.source, self.norms = source, norms
        self.entries = {entry.name: entry for entry in source.entries}
        self.data = DataFile(DATA)
        self.stored = {name: self._place(entry) for name, entry in self.entries.items()}

    def _place(self, entry: Entry) -> Weight:
        values = self.data.place(entry.name, entry.name, self.dtype(entry), entry.shape)
        if entry.spec is None:
            return Weight(values, grid=self.norms.get(entry.name))
        return Weight(values, self.data.place(entry.name, f"{entry.name}.scale", "float32", entry.shape[:1]))

    def dtype(self, entry: Entry) -> str:
        """What a code or a value is stored as."""
        if entry.spec is not None:
            return _TYPES[entry.spec]
        return "uint16" if entry.name in self.norms else entry.dtype

    def weights(self) -> dict[str, Weight]:
        """The weight of every module of the decoder, as models/decoder.py names them."""
        found = {name.removesuffix(".weight"): weight for name, weight in self.stored.items()}
        for module, (name, rows) in decoder.linears(self.source.config, set(self.entries)).items():
            found[module] = self.stored[name].rows(module, rows)
        return found

    def open(self, folder: Path) -> PartialFile:
        """The data file, to be written."""
        return self.data.open(folder, self.source.fingerprint + repr(sorted(self.norms.items())))

    def buffers(self, writing: Writing) -> Iterator[Any]:
        """The bytes of a tensor in the data file, with the gaps."""
        parts = [writing.values(), writing.scales()] if writing.entry.spec else [writing.values()]
        return self.data.buffers(writing.entry.name, parts)


def norm_grids(source: Source) -> dict[str, Grid]:
    """A grid of 16 bits for the weight of every norm: QNN takes it rounded, as it takes activations."""
    grids = {}
    for entry in source.entries:
        if len(entry.shape) == 1:
            values = source.read(entry)
            assert isinstance(values, torch.Tensor)
            grids[entry.name] = Grid(float(values.min()), float(values.max()), 16)
    return grids


class Writing:
    """The bytes of one tensor, and its record once they have passed."""

    def __init__(self, layout: Layout, entry: Entry) -> None:
        self.entry, self._source = entry, layout.source
        self._dtype, self._grid = layout.dtype(entry), layout.norms.get(entry.name)
        self._digest = receipt.TensorDigest()
        self._scales: list[memoryview] = []
        self._exact = True

    def values(self) -> Iterator[memoryview]:
        """Codes or floats, some rows at a time."""
        for rows in row_slices(self.entry):
            piece = self._source.read(self.entry, rows)
            if isinstance(piece, QuantizedTensor):
                yield self._codes(piece)
            else:
                data = self._floats(piece)
                self._digest.add_values(data)
                yield data

    def scales(self) -> Iterator[memoryview]:
        """Those of the codes that have passed."""
        yield from self._scales

    def record(self) -> dict[str, Any]:
        """Of the receipt."""
        entry, stored_as = self.entry, self._dtype.upper()
        if entry.spec is not None:
            return receipt.tensor_record(entry, stored_as, DATA, self._digest.codes())
        return receipt.tensor_record(
            entry, stored_as, DATA, self._digest.values(), dtype=self._dtype, exact=self._exact
        )

    def _codes(self, piece: QuantizedTensor) -> memoryview:
        assert piece.scales is not None  # check() lets integers with a scale pass
        if not bool(torch.isfinite(piece.scales).all()):
            raise PhiquantError(f"{self.entry.name}: a scale is not finite; quantize this tensor again")
        self._digest.add_codes(piece)
        self._scales.append(receipt.raw(piece.scales))
        codes = piece.codes.detach().cpu().contiguous()
        if self._dtype == "int8":
            return receipt.raw(codes)
        return memoryview(_C.pack_dense(codes.view(torch.uint8).numpy(), 4)).cast("B")

    def _floats(self, piece: torch.Tensor) -> memoryview:
        if not bool(torch.isfinite(piece).all()):
            raise PhiquantError(f"{self.entry.name}: a value is not finite; repair the checkpoint")
        if self._grid is not None:
            self._exact = False
            return receipt.raw(torch.from_numpy(self._grid.codes(piece.float().numpy())))
        stored = piece.to(getattr(torch, self.entry.dtype))
        self._exact = self._exact and torch.equal(stored.float(), piece.float())
        return receipt.raw(stored)


def refuse_mixtures(entries: Sequence[Entry]) -> bool:
    """Whether the graph rounds activations: all linears of the layers have codes, or none. PhiquantError else."""
    inside = [entry for entry in entries if len(entry.shape) == 2 and entry.module not in (phi.EMBEDDING, phi.HEAD)]
    coded = [entry for entry in inside if entry.spec is not None]
    if coded and len(coded) < len(inside):
        float_one = next(entry for entry in inside if entry.spec is None)
        raise PhiquantError(
            f"{float_one.name} is float and {coded[0].name} has codes: a QNN graph rounds the activations of all "
            "layers or of none; quantize every linear of the decoder layers"
        )
    return bool(coded)
