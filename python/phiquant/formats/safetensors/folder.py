"""A folder of safetensors files: what the layouts of compressed-tensors and of MLX have in common.

A `Layout` says which tensors hold an entry and what config.json says; this file cuts them into shards and
streams them: codes pass as they are packed, their parameters follow once all of them are known.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from ...errors import PhiquantError
from ...tensor import PARAMETERS, QuantizedTensor
from .. import receipt
from ..companions import companions, copy
from ..floats import cast
from ..partial import PartialFile, write_atomically
from ..source import Entry, Progress, Source, row_slices

SHARD_BYTES = 4_000_000_000
INDEX = "model.safetensors.index.json"
FLOATS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
ITEM_BYTES = {"I64": 8, "I32": 4, "U32": 4, "F32": 4, "F16": 2, "BF16": 2, "I8": 1, "U8": 1, "F8_E4M3": 1}


@dataclass(frozen=True)
class Part:
    """One tensor of a file. holds: "values" of a float entry, its "codes", or what Layout.parameter() makes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    holds: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


class Layout(Protocol):
    """How a format keeps a model's tensors in safetensors files.

    metadata: what a file says of itself. warnings: what the reader of the receipt should know.
    """

    format: str
    metadata: Mapping[str, str]
    warnings: list[str]

    def parts(self, entry: Entry) -> list[Part]:
        """The tensors that hold `entry`. What needs its parameters comes after the codes."""
        ...

    def float_dtype(self, entry: Entry) -> str:
        """In which a float entry is stored."""
        ...

    def stored_as(self, entry: Entry) -> str:
        """What the format calls that storage."""
        ...

    def codes(self, entry: Entry, codes: torch.Tensor) -> memoryview:
        """The packed codes of some rows."""
        ...

    def parameter(self, entry: Entry, part: Part, parameters: Mapping[str, torch.Tensor]) -> memoryview:
        """The bytes of another part, from the parameters of the whole tensor."""
        ...

    def config(self) -> dict[str, Any]:
        """The config.json of the folder."""
        ...


@dataclass(frozen=True)
class _Shard:
    name: str
    entries: Sequence[Entry]
    header: bytes
    sizes: Sequence[int]

    def open(self, out: Path, fingerprint: str) -> PartialFile:
        names = [entry.name for entry in self.entries]
        return PartialFile(out / self.name, self.header, names, self.sizes, fingerprint)


def write(source: Source, out: Path, layout: Layout, progress: Progress | None = None) -> dict[str, Any]:
    """Write the folder `out` and return its receipt. What can be refused was, when `layout` was made.

    A run that is interrupted continues with the next one, if the source has the same fingerprint.
    """
    settings = layout.config()
    beside = companions(source.tokenizer_dir)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    shards = plan(source.entries, layout)
    records = _write_shards(source, out, layout, shards, progress)
    receipt.remove(out)
    files: dict[str, dict[str, Any]] = {}
    for shard in shards:  # all are complete under their partial names
        with shard.open(out, source.fingerprint) as file:
            file.commit(keep_journal=True)
        files[shard.name] = receipt.file_record(out / shard.name, len(shard.header))
    for name in _write_small(out, settings, layout, shards, beside):
        files[name] = receipt.file_record(out / name)
    result = receipt.make(layout.format, files, records, source.entries)
    result["warnings"] = list(layout.warnings)
    receipt.write(out, result)
    for shard in shards:
        shard.open(out, source.fingerprint).forget()
    return result


def sizes(source: Source, layout: Layout) -> dict[str, int]:
    """Exact bytes of every file that write() makes, the receipt excepted."""
    shards = plan(source.entries, layout)
    result = {shard.name: shard.open(Path(), "").size for shard in shards}
    result["config.json"] = len(_json(layout.config()))
    if len(shards) > 1:
        result[INDEX] = len(_json(_index(shards, layout)))
    return result | {path.name: path.stat().st_size for path in companions(source.tokenizer_dir)}


def encode(source: Source, entry: Entry, layout: Layout) -> Iterator[memoryview]:
    """The bytes of one entry, as write() stores them."""
    return _Writing(source, entry, layout, "").buffers()


def plan(entries: Sequence[Entry], layout: Layout) -> list[_Shard]:
    """The files of weights, by name, with what they hold."""
    groups = cut(entries, layout, SHARD_BYTES)
    count = len(groups)
    names = (
        ["model.safetensors"] if count == 1 else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    )
    shards = []
    for name, group in zip(names, groups, strict=True):
        stored = [layout.parts(entry) for entry in group]
        sizes = [sum(part.nbytes for part in parts) for parts in stored]
        shards.append(_Shard(name, group, header([part for parts in stored for part in parts], layout.metadata), sizes))
    return shards


def cut(entries: Sequence[Entry], layout: Layout, limit: int) -> list[list[Entry]]:
    """Entries of each file: at most `limit` bytes (more only for a single tensor), every tensor aligned.

    Readers map a file and want items at multiples of their size, and gaps are not allowed; where an
    odd shape would break that, a new file begins.
    """
    result: list[list[Entry]] = []
    position = 0
    for entry in entries:
        stored = layout.parts(entry)
        size = sum(part.nbytes for part in stored)
        aligned = all(at % ITEM_BYTES[part.dtype] == 0 for part, at in _offsets(stored, position))
        if not result or position + size > limit or not aligned:
            result.append([])
            position = 0
        result[-1].append(entry)
        position += size
    return result


def header(stored: Sequence[Part], metadata: Mapping[str, str]) -> bytes:
    """The bytes of a safetensors file before the data of those tensors."""
    table: dict[str, Any] = {"__metadata__": dict(metadata)}
    for part, begin in _offsets(stored, 0):
        table[part.name] = {
            "dtype": part.dtype,
            "shape": list(part.shape),
            "data_offsets": [begin, begin + part.nbytes],
        }
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _offsets(stored: Sequence[Part], start: int) -> Iterator[tuple[Part, int]]:
    for part in stored:
        yield part, start
        start += part.nbytes


def _write_shards(
    source: Source, out: Path, layout: Layout, shards: Sequence[_Shard], progress: Progress | None
) -> list[dict[str, Any]]:
    """Every tensor on disk, under the partial names; their records for the receipt."""
    records: list[dict[str, Any]] = []
    total, done = sum(shard.open(out, source.fingerprint).size for shard in shards), 0
    for shard in shards:
        by_name = {entry.name: entry for entry in shard.entries}
        with shard.open(out, source.fingerprint) as file:
            for name in file.remaining():
                writing = _Writing(source, by_name[name], layout, shard.name)
                file.append(name, writing.buffers(), writing.record)
                if progress:
                    progress(name, done + file.written, total)
            file.finish()
            records += file.records.values()
        done += file.size
    return records


class _Writing:
    """The bytes of one entry, and its record once they have passed."""

    def __init__(self, source: Source, entry: Entry, layout: Layout, file: str) -> None:
        self._source, self._entry, self._layout, self._file = source, entry, layout, file
        self._digest = receipt.TensorDigest()
        self._exact = True

    def buffers(self) -> Iterator[memoryview]:
        entry, layout = self._entry, self._layout
        pieces: list[dict[str, torch.Tensor]] = []
        for part in layout.parts(entry):
            if part.holds == "values":
                yield from self._float()
            elif part.holds == "codes":
                for piece in self._pieces():
                    yield layout.codes(entry, piece.codes)
                    pieces.append(piece.parameters)
            else:
                whole = {name: torch.cat([p[name] for p in pieces]) for name in (pieces[0] if pieces else ())}
                yield layout.parameter(entry, part, whole)

    def record(self) -> dict[str, Any]:
        entry, layout = self._entry, self._layout
        if entry.spec is not None:
            return receipt.tensor_record(entry, layout.stored_as(entry), self._file, self._digest.codes())
        digests, dtype = self._digest.values(), layout.float_dtype(entry)
        return receipt.tensor_record(
            entry, layout.stored_as(entry), self._file, digests, dtype=dtype, exact=self._exact
        )

    def _pieces(self) -> Iterator[QuantizedTensor]:
        entry = self._entry
        for rows in row_slices(entry):
            piece = self._source.read(entry, rows)
            if not isinstance(piece, QuantizedTensor) or piece.spec != entry.spec:
                raise PhiquantError(f"{entry.name}: the source gave no codes on the grid {entry.spec}")
            for name in PARAMETERS:
                value = piece.parameters.get(name)
                if value is not None and not bool(torch.isfinite(value.float()).all()):
                    raise PhiquantError(f"{entry.name}: one of its {name} is not finite; quantize this tensor again")
            self._digest.add_codes(piece)
            yield piece

    def _float(self) -> Iterator[memoryview]:
        entry = self._entry
        dtype = self._layout.float_dtype(entry)
        for rows in row_slices(entry):
            piece = self._source.read(entry, rows)
            assert isinstance(piece, torch.Tensor)
            hint = f"too large for {dtype}; store its floats, and the scales beside them, as bfloat16"
            stored, exact = cast(entry.name, piece, getattr(torch, dtype), rows.start, hint)
            self._exact = self._exact and exact
            data = receipt.raw(stored)
            self._digest.add_values(data)
            yield data


def _write_small(
    out: Path, settings: dict[str, Any], layout: Layout, shards: Sequence[_Shard], beside: Sequence[Path]
) -> list[str]:
    """config.json, the index and the companions, each of them whole or not at all; their names."""
    texts: dict[str, Callable[[], str]] = {"config.json": lambda: _json(settings)}
    if len(shards) > 1:
        texts[INDEX] = lambda: _json(_index(shards, layout))
    else:
        (out / INDEX).unlink(missing_ok=True)  # of an earlier export of more files
    for name, text in texts.items():
        write_atomically(out / name, text())
    return [*texts, *copy(beside, out)]


def _index(shards: Sequence[_Shard], layout: Layout) -> dict[str, Any]:
    stored = [(part, shard.name) for shard in shards for entry in shard.entries for part in layout.parts(entry)]
    total = sum(part.nbytes for part, _ in stored)
    weight_map = {part.name: name for part, name in stored}
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def _json(data: dict[str, Any]) -> str:
    return json.dumps(data, indent=2) + "\n"
