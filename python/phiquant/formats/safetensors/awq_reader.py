"""Reads AWQ checkpoints in AutoAWQ's "gemm" layout.

A linear [N, K] is stored by rows of the transposed weight, 4 bits a code:
    qweight I32 [K, N/8]   scales F16 [G, N]   qzeros I32 [G, N/8]
and w = s (q - z). Value j of the eight in a word stands for column (0, 2, 4, 6, 1, 3, 5, 7)[j].
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import PhiquantError
from ..stored import StoredTensor
from ..tensor_files import TensorFiles, part_names
from . import gptq_reader
from .gptq_reader import ColumnTensor

_PLACE_OF = np.array([0, 4, 1, 5, 2, 6, 3, 7], np.uint32)  # of columns 0, 1, ... in a word
BITS = 4


@dataclass(frozen=True, eq=False)
class AWQTensor(ColumnTensor):
    """A weight whose words hold eight neighbours of a row of the transposed weight, interleaved."""

    def codes(self, rows: slice) -> np.ndarray:
        words = slice(rows.start // 8, -(-rows.stop // 8))
        columns = _unpacked(self.files.array(f"{self._module}.qweight", (slice(None), words)))
        first = rows.start - 8 * words.start
        return np.ascontiguousarray(columns[:, first : first + rows.stop - rows.start].T)

    def zero_points(self) -> np.ndarray:
        return _unpacked(self.files.array(f"{self._module}.qzeros"))


def read(folder: str | Path) -> dict[str, StoredTensor]:
    """Every weight by its Hugging Face name. PhiquantError for a folder that is damaged, or in another layout."""
    files = TensorFiles(folder)
    settings = files.config["quantization_config"]
    version = str(settings.get("version", "gemm")).lower()
    if settings.get("bits") != BITS or version != "gemm":
        raise PhiquantError(
            f"{folder}: AWQ of {settings.get('bits')!r} bits in the layout {version!r}; phiquant reads 4 bits in 'gemm'"
        )
    result: dict[str, ColumnTensor] = {}
    for module in part_names(files.places, ".qweight"):
        shape = files.place(f"{module}.qweight").shape
        if len(shape) != 2:
            raise PhiquantError(f"{module}.qweight has the shape {list(shape)}; a matrix was due")
        columns, rows = shape[0], shape[1] * 8
        gptq_reader.check_shapes(files, module, {".qzeros": rows // 8, ".scales": rows})
        if columns % files.place(f"{module}.scales").shape[0]:
            raise PhiquantError(f"{module}: its groups do not divide {columns} input channels")
        name = f"{module}.weight"
        result[name] = AWQTensor(name, "AWQ gemm", (rows, columns), files, BITS)
    return gptq_reader.with_floats(files, result)


def read_config(folder: str | Path) -> dict[str, Any]:
    """The config.json of the model in the folder."""
    return gptq_reader.read_config(folder)


def _unpacked(words: np.ndarray) -> np.ndarray:
    """int32 [A, B] -> uint8 [A, 8 B]."""
    digits = words.view(np.uint32)[..., None] >> (4 * _PLACE_OF) & np.uint32(15)
    return digits.astype(np.uint8).reshape(len(words), -1)
