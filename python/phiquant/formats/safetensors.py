"""A safetensors folder in the compressed-tensors layout, which plain transformers loads.

`AutoModelForCausalLM.from_pretrained(folder)` needs the package compressed-tensors and nothing of
phiquant. The writer packs the codes it is given; safetensors_layout.py says how and where.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .._extension import load
from ..errors import PhiquantError
from ..models import phi
from ..tensor import QuantizedTensor
from . import receipt
from .partial import PartialFile, write_atomically
from .safetensors_layout import PLAIN, check, config, header, parts, scheme, shards
from .source import Entry, Progress, Source, row_slices

_C = load()
SHARD_BYTES = 4_000_000_000
INDEX = "model.safetensors.index.json"
COMPANIONS = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json",
)  # fmt: skip


@dataclass(frozen=True)
class _Shard:
    name: str
    entries: Sequence[Entry]
    header: bytes

    def open(self, out: Path, fingerprint: str) -> PartialFile:
        names = [entry.name for entry in self.entries]
        sizes = [sum(part.nbytes for part in parts(entry)) for entry in self.entries]
        return PartialFile(out / self.name, self.header, names, sizes, fingerprint)


def write(source: Source, out: Path, *, progress: Progress | None = None) -> dict[str, Any]:
    """Write the folder `out` and return its receipt. Everything is checked before the first byte.

    A run that is interrupted continues with the next one, if the source has the same fingerprint.
    """
    phi.check_architecture(source.config)
    for entry in source.entries:
        check(entry)
    settings = config(source.config, source.entries)
    companions = _companions(source.tokenizer_dir)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    layout = plan(source.entries)
    records = _write_shards(source, out, layout, progress)
    receipt.remove(out)
    files: dict[str, dict[str, Any]] = {}
    for shard in layout:  # all are complete under their partial names
        with shard.open(out, source.fingerprint) as file:
            file.commit(keep_journal=True)
        files[shard.name] = receipt.file_record(out / shard.name, len(shard.header))
    for name in _write_small(out, settings, layout, companions):
        files[name] = receipt.file_record(out / name)
    result = receipt.make("safetensors", files, records, source.entries, ("safetensors",))
    receipt.write(out, result)
    for shard in layout:
        shard.open(out, source.fingerprint).forget()
    return result


def plan(entries: Sequence[Entry]) -> list[_Shard]:
    """The files of weights, by name, with what they hold."""
    groups = shards(entries, SHARD_BYTES)
    count = len(groups)
    names = (
        ["model.safetensors"] if count == 1 else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    )
    return [_Shard(name, group, header(group)) for name, group in zip(names, groups, strict=True)]


def sizes(source: Source) -> dict[str, int]:
    """Exact bytes of every file that write() makes, the receipt excepted."""
    layout = plan(source.entries)
    result = {shard.name: shard.open(Path(), "").size for shard in layout}
    result["config.json"] = len(_json(config(source.config, source.entries)))
    if len(layout) > 1:
        result[INDEX] = len(_json(_index(layout)))
    return result | {path.name: path.stat().st_size for path in _companions(source.tokenizer_dir)}


def encode(source: Source, entry: Entry) -> Iterator[bytes | memoryview]:
    """The bytes of one entry, as write() stores them."""
    return _Writing(source, entry, "").buffers()


def _write_shards(
    source: Source, out: Path, layout: Sequence[_Shard], progress: Progress | None
) -> list[dict[str, Any]]:
    """Every tensor on disk, under the partial names; their records for the receipt."""
    records: list[dict[str, Any]] = []
    total, done = sum(shard.open(out, source.fingerprint).size for shard in layout), 0
    for shard in layout:
        by_name = {entry.name: entry for entry in shard.entries}
        with shard.open(out, source.fingerprint) as file:
            for name in file.remaining():
                writer = _Writing(source, by_name[name], shard.name)
                file.append(name, writer.buffers(), writer.record)
                if progress:
                    progress(name, done + file.written, total)
            file.finish()
            records += file.records.values()
        done += file.size
    return records


class _Writing:
    """The bytes of one entry, and its record once they have passed."""

    def __init__(self, source: Source, entry: Entry, file: str) -> None:
        self._source, self._entry, self._file = source, entry, file
        self._digest = receipt.TensorDigest()
        self._exact = True

    def buffers(self) -> Iterator[bytes | memoryview]:
        if self._entry.spec is None:
            yield from self._float()
        else:
            yield from self._packed()

    def record(self) -> dict[str, Any]:
        entry = self._entry
        if entry.spec is None:
            return receipt.tensor_record(entry, entry.name, self._file, self._digest.values(), exact=self._exact)
        stored_as = parts(entry)[1].name
        return receipt.tensor_record(entry, stored_as, self._file, self._digest.codes())

    def _packed(self) -> Iterator[bytes | memoryview]:
        """All codes of the tensor are kept packed until its scales are known: they may come first."""
        entry, codes, scales = self._entry, [], []
        assert entry.spec is not None
        pack = _plain if scheme(entry.spec).format == PLAIN else _int32
        for rows in row_slices(entry):
            piece = self._source.read(entry, rows)
            if not isinstance(piece, QuantizedTensor) or piece.spec != entry.spec:
                raise PhiquantError(f"{entry.name}: the source gave no codes on the grid {entry.spec}")
            assert piece.scales is not None  # the layout accepts integers only
            if not bool(torch.isfinite(piece.scales).all()):
                raise PhiquantError(f"{entry.name}: a scale is not finite; quantize this tensor again")
            self._digest.add_codes(piece)
            codes.append(pack(piece.codes))
            scales.append(receipt.raw(piece.scales))
        for part in parts(entry):
            if part.name.endswith("_shape"):
                yield struct.pack("<2q", *entry.shape)
            else:
                yield from scales if part.name.endswith("_scale") else codes

    def _float(self) -> Iterator[memoryview]:
        entry = self._entry
        for rows in row_slices(entry):
            piece = self._source.read(entry, rows)
            assert isinstance(piece, torch.Tensor)
            stored = piece.to(getattr(torch, entry.dtype))
            _check_finite(entry, piece, stored, rows.start)
            self._exact = self._exact and (stored.dtype == piece.dtype or torch.equal(stored.float(), piece.float()))
            data = receipt.raw(stored)
            self._digest.add_values(data)
            yield data


def _int32(codes: torch.Tensor) -> memoryview:
    return memoryview(_C.pack_int32(codes.cpu().contiguous().numpy())).cast("B")


def _plain(codes: torch.Tensor) -> memoryview:
    return receipt.raw(codes)


def _check_finite(entry: Entry, piece: torch.Tensor, stored: torch.Tensor, first_row: int) -> None:
    if bool(torch.isfinite(stored.sum())):  # it is not if any value is not: one read, no temporary
        return
    bad = (~torch.isfinite(stored)).nonzero()
    if len(bad):
        index = bad[0].tolist()
        value = piece[tuple(index)]
        hint = "repair the checkpoint"
        if bool(torch.isfinite(value)):
            hint = f"too large for {entry.dtype}; export as safetensors:BF16"
        place = [index[0] + first_row, *index[1:]]
        raise PhiquantError(f"{entry.name}: the value at {place} is {value.item()}: {hint}")


def _companions(folder: Path | None) -> list[Path]:
    """Tokenizer and generation files to copy. PhiquantError without a tokenizer."""
    found = [] if folder is None else [folder / name for name in COMPANIONS if (folder / name).is_file()]
    if not {path.name for path in found} & {"tokenizer.json", "tokenizer.model"}:
        where = f"{folder} has no tokenizer.json or tokenizer.model" if folder else "no tokenizer was given"
        raise PhiquantError(f"{where}; a model without its tokenizer cannot be used: put the tokenizer's files there")
    return found


def _write_small(
    out: Path, settings: dict[str, Any], layout: Sequence[_Shard], companions: Sequence[Path]
) -> list[str]:
    """config.json, the index and the companions, each of them whole or not at all; their names."""
    texts: dict[str, Callable[[], str]] = {"config.json": lambda: _json(settings)}
    if len(layout) > 1:
        texts[INDEX] = lambda: _json(_index(layout))
    else:
        (out / INDEX).unlink(missing_ok=True)  # of an earlier export of more files
    for name, text in texts.items():
        write_atomically(out / name, text())
    for path in companions:
        temporary = out / (path.name + ".tmp")
        shutil.copyfile(path, temporary)
        os.replace(temporary, out / path.name)
    return [*texts, *(path.name for path in companions)]


def _index(layout: Sequence[_Shard]) -> dict[str, Any]:
    weight_map = {part.name: shard.name for shard in layout for entry in shard.entries for part in parts(entry)}
    total = sum(part.nbytes for shard in layout for entry in shard.entries for part in parts(entry))
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def _json(data: dict[str, Any]) -> str:
    return json.dumps(data, indent=2) + "\n"


__all__ = ["COMPANIONS", "INDEX", "check", "encode", "plan", "sizes", "write"]
