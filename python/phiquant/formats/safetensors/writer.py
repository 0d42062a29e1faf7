"""A safetensors folder in the compressed-tensors layout, which plain transformers loads.

`AutoModelForCausalLM.from_pretrained(folder)` needs the package compressed-tensors and nothing of
phiquant. The writer packs the codes it is given; layout.py says how and where.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...models import phi
from ...spec import QuantSpec
from ...spec import spec as read_spec
from ..source import Entry, Progress, Source
from . import folder
from .layout import CompressedTensors, check


def write(
    source: Source, out: Path, *, progress: Progress | None = None, activations: QuantSpec | str | None = None
) -> dict[str, Any]:
    """Write the folder `out` and return its receipt. Everything is checked before the first byte.

    activations: "int8-token-sym" or "fp8_e4m3-token-sym": the runtime rounds the inputs of quantized linears so (W8A8).
    """
    return folder.write(source, out, _layout(source, activations), progress)


def sizes(source: Source, *, activations: QuantSpec | str | None = None) -> dict[str, int]:
    """Exact bytes of every file that write() makes, the receipt excepted."""
    return folder.sizes(source, _layout(source, activations))


def nbytes(entry: Entry, config: Mapping[str, Any]) -> int:
    """What the entry adds to the files of weights, its line in their header excepted. PhiquantError as of check()."""
    return sum(part.nbytes for part in CompressedTensors(config, [entry]).parts(entry))


def encode(source: Source, entry: Entry) -> Iterator[memoryview]:
    """The bytes of one entry, as write() stores them."""
    return folder.encode(source, entry, _layout(source))


def _layout(source: Source, activations: QuantSpec | str | None = None) -> CompressedTensors:
    phi.check_architecture(source.config)
    for entry in source.entries:
        check(entry)
    phi.check_complete(source.config, {entry.name: entry.shape for entry in source.entries})
    return CompressedTensors(source.config, source.entries, None if activations is None else read_spec(activations))


__all__ = ["check", "encode", "nbytes", "sizes", "write"]
