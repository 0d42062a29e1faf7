"""What a calibrated run has solved so far: in memory, or a file for each matrix, there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .errors import PhiquantError
from .formats.source import Entry, row_slices
from .spec import QuantSpec
from .tensor import PARAMETERS, QuantizedTensor, join_rows, rows_of, take_rows

PIECE_BYTES = (
    1 << 28
)  # of a matrix in float32, solved at a time where the grids of its rows do not depend on each other


class Solved:
    """The codes of the modules `matrices`, name -> (spec, shape), in pieces of rows.

    folder: where each piece is kept; None: in memory. fingerprint: what the codes depend on; those of another are
    refused by a PhiquantError.
    """

    def __init__(
        self,
        folder: Path | None,
        fingerprint: str,
        matrices: Mapping[str, tuple[QuantSpec, tuple[int, ...]]],
    ) -> None:
        self.folder, self.fingerprint = folder, fingerprint
        self.specs = {name: spec for name, (spec, _) in matrices.items()}
        self.shapes = {name: shape for name, (_, shape) in matrices.items()}
        self._memory: dict[str, QuantizedTensor] = {}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def pieces(self, name: str) -> dict[str, slice]:
        """The rows that are solved at a time, by the name they are kept under."""
        rows = list(row_slices(Entry(name, self.shapes[name], self.specs[name]), PIECE_BYTES))
        return {name if len(rows) == 1 else f"{name}.rows-{piece.start}": piece for piece in rows}

    def missing(self, name: str) -> dict[str, slice]:
        """The pieces that are not solved yet."""
        return {key: rows for key, rows in self.pieces(name).items() if not self._has(key)}

    def write(self, key: str, quantized: QuantizedTensor) -> None:
        """Keep the codes of one piece."""
        if self.folder is None:
            self._memory[key] = quantized
            return
        parts = {"codes": quantized.codes, **quantized.parameters}
        path = self._path(key)
        partial = path.with_suffix(".partial")
        tensors = {part: value.contiguous().cpu() for part, value in parts.items()}
        save_file(tensors, partial, {"fingerprint": self.fingerprint})
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)

    def read(self, name: str, rows: slice = slice(None)) -> QuantizedTensor:
        """The codes of a module, or of some of its rows; all of it must be solved."""
        start, stop, _ = rows.indices(self.shapes[name][0])
        found = []
        for key, piece in self.pieces(name).items():
            first, last = max(start, piece.start), min(stop, piece.stop)
            if first < last:
                found.append(self._read(name, key, slice(first - piece.start, last - piece.start)))
        return join_rows(found)

    def _read(self, name: str, key: str, rows: slice) -> QuantizedTensor:
        if self.folder is None:
            return take_rows(self._memory[key], rows)
        with self._open(key) as file:
            stored = {part: file.get_slice(part) for part in file.keys()}  # noqa: SIM118
            count = stored["codes"].get_shape()[0]
            parts: dict[str, Any] = dict.fromkeys(PARAMETERS)
            parts |= {part: value[rows_of(value.get_shape()[0], count, rows)] for part, value in stored.items()}
            return QuantizedTensor(spec=self.specs[name], **parts)

    def _has(self, key: str) -> bool:
        if self.folder is None or not self._path(key).exists():
            return key in self._memory
        with self._open(key):
            return True

    @contextmanager
    def _open(self, key: str) -> Iterator[Any]:
        path = self._path(key)
        try:
            with safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("fingerprint") != self.fingerprint:
                    raise PhiquantError(
                        f"{path} belongs to a run with another solver, text, grid, model or version; "
                        "delete the folder or give another"
                    )
                yield file
        except SafetensorError as error:
            raise PhiquantError(f"{path} is damaged ({error}); delete it to solve its matrix again") from error

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{key}.safetensors"
