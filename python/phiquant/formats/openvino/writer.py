"""An OpenVINO folder: what openvino_genai.LLMPipeline opens, and any program that reads OpenVINO IR.

The weights pass tensor by tensor into openvino_model.bin; openvino_model.xml says what stands where and how it is
computed with. Codes stay as they are: the graph decodes them, and the plugins keep them compressed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ...errors import PhiquantError
from ...models import phi
from .. import receipt
from ..partial import PartialFile
from ..source import Entry, Progress, Source
from . import layout
from .folder import small_files, write_small
from .graph import build
from .ir import serialize
from .layout import ALIGNMENT, problem
from .weights import Encoding

XML, BIN = "openvino_model.xml", "openvino_model.bin"


def check(entry: Entry) -> None:
    """PhiquantError if OpenVINO cannot hold `entry` exactly: it names tensor, spec and what it can hold."""
    if entry.spec is not None and (found := problem(entry.spec, entry.shape)):
        raise PhiquantError(f"{entry.name}: {entry.spec} cannot be stored: {found}")


def write(source: Source, out: Path, *, progress: Progress | None = None) -> dict[str, Any]:
    """Write the folder `out` and return its receipt. Everything is checked before the first byte.

    A run that is interrupted continues with the next one, if the source has the same fingerprint.
    """
    xml, head = _graph(source)
    small = {XML: xml, **small_files(source)}
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    entries = {entry.name: entry for entry in source.entries}
    with _weights(source, out, head) as file:
        for name in file.remaining():
            encoding = Encoding(source, entries[name])
            file.append(name, encoding.buffers(), partial(encoding.record, BIN))
            if progress is not None:
                progress(name, file.written, file.size)
        file.finish()
        receipt.remove(out)
        for name, data in small.items():
            write_small(out / name, data)
        file.commit(keep_journal=True)
        files = {BIN: receipt.file_record(out / BIN, len(head))}
        files |= {name: receipt.file_record(out / name) for name in small}
        packages = ("openvino", "openvino-tokenizers")
        result = receipt.make("openvino", files, list(file.records.values()), source.entries, packages)
        receipt.write(out, result)
        file.forget()
    return result


def sizes(source: Source) -> dict[str, int]:
    """Exact bytes of every file that write() makes, the receipt excepted."""
    xml, head = _graph(source)
    small = {name: len(data) for name, data in small_files(source).items()}
    return {BIN: _weights(source, Path(), head).size, XML: len(xml), **small}


def nbytes(entry: Entry, config: Mapping[str, Any]) -> int:
    """What the entry adds to openvino_model.bin, padded. PhiquantError as of check()."""
    check(entry)
    size = layout.nbytes(entry)
    return size + -size % ALIGNMENT


def encode(source: Source, entry: Entry) -> Iterator[bytes | memoryview]:
    """The bytes of one entry, as write() stores them."""
    return Encoding(source, entry).buffers()


def _graph(source: Source) -> tuple[bytes, bytes]:
    phi.check_architecture(source.config)
    phi.check_complete(source.config, {entry.name: tuple(entry.shape) for entry in source.entries})
    for entry in source.entries:
        check(entry)
    return serialize(build(source.config, source.entries), source.entries)


def _weights(source: Source, out: Path, head: bytes) -> PartialFile:
    names = [entry.name for entry in source.entries]
    lengths = [layout.nbytes(entry) for entry in source.entries]
    return PartialFile(out / BIN, head, names, lengths, source.fingerprint, align=ALIGNMENT)
