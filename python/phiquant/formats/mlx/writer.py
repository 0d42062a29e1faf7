"""An MLX folder, which mlx-lm loads: `mlx_lm.generate --model FOLDER`. layout.py says how codes are kept there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...models import phi
from ..safetensors import folder
from ..source import Entry, Progress, Source
from .layout import MLX, check


def write(source: Source, out: Path, *, progress: Progress | None = None, long_factors: str = "long") -> dict[str, Any]:
    """Write the folder `out` and return its receipt. Everything is checked before the first byte.

    long_factors: mlx-lm uses the long factors of LongRoPE at every length. "long": it is told the model's, right
        beyond the original context; "short": the short ones in their place, right within it and wrong beyond.
    """
    return folder.write(source, out, _layout(source, long_factors), progress)


def sizes(source: Source) -> dict[str, int]:
    """Exact bytes of every file that write() makes, the receipt excepted."""
    return folder.sizes(source, _layout(source))


def nbytes(entry: Entry, config: Mapping[str, Any]) -> int:
    """What the entry adds to the files of weights, its line in their header excepted. PhiquantError as of check()."""
    return sum(part.nbytes for part in MLX(config, [entry]).parts(entry))


def encode(source: Source, entry: Entry) -> Iterator[memoryview]:
    """The bytes of one entry, as write() stores them."""
    return folder.encode(source, entry, _layout(source))


def _layout(source: Source, long_factors: str = "long") -> MLX:
    phi.check_architecture(source.config)
    phi.check_complete(source.config, {entry.name: entry.shape for entry in source.entries})
    return MLX(source.config, source.entries, long_factors)


__all__ = ["check", "encode", "nbytes", "sizes", "write"]
