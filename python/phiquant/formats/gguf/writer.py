"""GGUF: one file with weights, tokenizer and metadata, for llama.cpp and everything built on it.

The writer packs the codes it is given; float tensors are stored as the recipe says, norms as float32
(llama.cpp multiplies by nothing else). The tensors stream: a few rows are in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from ...errors import PhiquantError
from ...models import phi
from ...models.rope import Rope, read_rope
from ...targets import gguf_mixtures
from ...tensor import QuantizedTensor
from .. import receipt
from ..partial import PartialFile
from ..source import Entry, Progress, Source, row_slices
from . import metadata as gguf_metadata
from .container import ALIGNMENT, Metadata, TensorInfo, header, padded
from .names import gguf_name
from .pack import pack, pack_float
from .tokenizer import model_name, put_vocabulary, read_vocabulary
from .types import F32, FLOAT_TYPES, GGMLType, has_tensor_scale, type_for

FILE = "model.gguf"
Ternary = Literal["TQ2_0", "TQ1_0"]


@dataclass(frozen=True)
class _Stored:
    """A tensor of the file. `values` is given where the source has none: LongRoPE's factors.

    scale: it is the scale of the whole tensor `entry`, llama.cpp's "<name>.scale".
    """

    entry: Entry
    info: TensorInfo
    values: torch.Tensor | None = None
    scale: bool = False


def storage_type(entry: Entry, ternary: Ternary = "TQ2_0") -> GGMLType:
    """The GGUF type that holds `entry` exactly (a float one: that stores it). PhiquantError if there is none."""
    if entry.spec is not None:
        return type_for(entry.name, entry.spec, entry.shape, ternary)
    return F32 if len(entry.shape) == 1 else FLOAT_TYPES[entry.dtype]


def check(entry: Entry) -> None:
    """PhiquantError if GGUF cannot hold `entry` exactly: it names tensor, spec and the nearest one that it can."""
    list(_place(entry))


def write(
    source: Source, out_dir: Path, *, ternary: Ternary = "TQ2_0", progress: Progress | None = None
) -> dict[str, Any]:
    """Write out_dir/model.gguf and receipt.json; return the receipt.

    ternary: how ternary codes in groups of 256 are stored: in 2.06 bits each, or as "TQ1_0" in 1.69, read more slowly.
    Everything that can be refused is refused before the first byte. A killed run continues. The
    receipt's "warnings" say where llama.cpp computes something else than Transformers.
    """
    phi.check_architecture(source.config)
    rope = read_rope(source.config)
    stored = _tensors(source, rope, ternary)
    phi.check_complete(source.config, {entry.name: entry.shape for entry in source.entries})
    head, warnings = _header(source, rope, stored)
    out_dir = Path(out_dir)
    receipt.remove(out_dir)
    layout = {s.info.name: s for s in stored}
    sizes = [s.info.nbytes for s in stored]
    with PartialFile(out_dir / FILE, head, list(layout), sizes, source.fingerprint, align=ALIGNMENT) as file:
        for name in file.remaining():
            writing = _Writing(source, layout[name])
            file.append(name, writing.buffers(), writing.record)
            if progress is not None:
                progress(layout[name].entry.name, file.written, file.size)
        file.commit(keep_journal=True)
        files = {FILE: receipt.file_record(out_dir / FILE, header=len(head))}
        result = receipt.make("gguf", files, [r for r in file.records.values() if r], list(source.entries))
        result["warnings"] = warnings
        receipt.write(out_dir, result)
        file.forget()
    return result


def sizes(source: Source, ternary: Ternary = "TQ2_0") -> dict[str, int]:
    """Exact bytes of the file that write() makes."""
    rope = read_rope(source.config)
    stored = _tensors(source, rope, ternary)
    head, _ = _header(source, rope, stored)
    lengths = [s.info.nbytes for s in stored]
    return {FILE: PartialFile(Path(FILE), head, [s.info.name for s in stored], lengths, "", align=ALIGNMENT).size}


def nbytes(entry: Entry, config: Mapping[str, Any]) -> int:
    """What the entry adds to the file: its bytes, padded, and its line in the table of tensors."""
    return sum(padded(stored.info.nbytes) + len(stored.info.line(0)) for stored in _place(entry))


def encode(source: Source, entry: Entry) -> Iterator[memoryview]:
    """The bytes of one entry, as write() stores them."""
    return _Writing(source, next(_place(entry))).buffers()


def _tensors(source: Source, rope: Rope, ternary: Ternary) -> list[_Stored]:
    if ternary not in get_args(Ternary):
        raise PhiquantError(f"ternary is one of {', '.join(get_args(Ternary))}, not {ternary!r}")
    return [*_rope_tensors(rope), *(stored for entry in source.entries for stored in _place(entry, ternary))]


def _place(entry: Entry, ternary: Ternary = "TQ2_0") -> Iterator[_Stored]:
    """The tensor that holds the entry, and the one of its second scale."""
    name = gguf_name(entry.name)
    yield _Stored(entry, TensorInfo(name, entry.shape, storage_type(entry, ternary)))
    if entry.spec is not None and has_tensor_scale(entry.spec):
        if entry.module == phi.EMBEDDING or ".mlp." in entry.name:
            raise PhiquantError(
                f"{entry.name}: GGUF holds {entry.spec} with a scale of the whole tensor, which llama.cpp does not "
                "apply to the embedding, nor to a Phi-3's mlp; give it gguf:NVFP4, whose scales have one level"
            )
        yield _Stored(entry, TensorInfo(f"{name.removesuffix('.weight')}.scale", (1,), F32), scale=True)


def _rope_tensors(rope: Rope) -> Iterator[_Stored]:
    for kind, factors in (("long", rope.long), ("short", rope.short)):
        if factors is not None:
            name = f"rope_factors_{kind}.weight"
            entry = Entry(name, (len(factors),), None, "float32")
            yield _Stored(entry, TensorInfo(name, entry.shape, F32), torch.tensor(factors, dtype=torch.float32))


def _header(source: Source, rope: Rope, stored: list[_Stored]) -> tuple[bytes, list[str]]:
    """The bytes before the first tensor, and what the reader of the receipt should know."""
    if source.tokenizer_dir is None:
        raise PhiquantError("a GGUF file holds the tokenizer, and this model came without one; pass it to export()")
    config = source.config
    vocabulary = read_vocabulary(source.tokenizer_dir, phi.sizes(config).vocab, config)
    infos = [s.info for s in stored]
    grids = {e.module: e.spec for e in source.entries if len(e.shape) == 2}
    file_type = gguf_mixtures.file_type(config, grids) or gguf_metadata.most_used(infos).file_type
    metadata = Metadata()
    name = Path(str(config.get("_name_or_path") or "")).name
    gguf_metadata.put_general(metadata, model_name(name, vocabulary), file_type)
    gguf_metadata.put_model(metadata, config, rope)
    put_vocabulary(metadata, vocabulary)
    return header(metadata, infos), [*gguf_metadata.warnings(config, rope), *vocabulary.warnings]


class _Writing:
    """The bytes of one tensor, rows by rows, and its line of the receipt once they have passed."""

    def __init__(self, source: Source, stored: _Stored) -> None:
        self._source, self._stored = source, stored
        self._digest = receipt.TensorDigest()
        self._exact = True

    def buffers(self) -> Iterator[memoryview]:
        entry, kind = self._stored.entry, self._stored.info.type
        for rows in row_slices(entry):
            piece = self._source.read(entry, rows) if self._stored.values is None else self._stored.values[rows]
            if self._stored.scale:
                yield receipt.raw(piece.super_scales)  # type: ignore[union-attr, arg-type]
            elif isinstance(piece, QuantizedTensor):
                yield pack(entry.name, piece, kind).data
                self._digest.add_codes(piece)
            else:
                stored, exact = pack_float(entry.name, piece, kind, rows.start)
                self._digest.add_values(stored.data)
                self._exact = self._exact and exact
                yield stored.data

    def record(self) -> dict[str, Any]:
        """The tensor's line of the receipt; none of a second scale, which is part of its tensor."""
        entry, kind = self._stored.entry, self._stored.info.type
        if self._stored.scale:
            return {}
        if entry.spec is not None:
            return receipt.tensor_record(entry, kind.name, FILE, self._digest.codes())
        dtype = next(name for name, known in FLOAT_TYPES.items() if known is kind)
        digests = self._digest.values()
        return receipt.tensor_record(entry, kind.name, FILE, digests, dtype=dtype, exact=self._exact)


__all__ = ["FILE", "check", "encode", "nbytes", "sizes", "storage_type", "write"]
