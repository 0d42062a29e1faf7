"""llama.cpp's importance matrices, written: for each matrix of a model, the sums of the squares of its inputs.

Its quantizer weighs the errors of columns by them. Two forms: a GGUF file (2025 on), and the older .dat. Both
hold sums and a count, by GGUF's names of the matrices; here they go by Hugging Face's. K = inputs of a matrix.

    .dat: i32 entries | per entry: i32 length, name, i32 chunks, i32 K, f32 [K] means times chunks |
          i32 chunks | i32 length, name of the data set
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ...errors import PhiquantError
from ..partial import write_atomically
from .container import Metadata, TensorInfo, header, padded
from .imatrix_reader import Importance
from .names import gguf_name
from .types import F32

CHUNK = 512  # tokens: llama.cpp's usual context while it collects


def write(
    path: str | Path,
    matrices: Mapping[str, Importance],
    *,
    legacy: bool = False,
    chunk: int = CHUNK,
    datasets: Sequence[str] = (),
) -> None:
    """Write the file that llama-quantize takes with --imatrix. matrices: by module, "model.layers.0.mlp.down_proj".

    legacy: the .dat form. chunk: tokens of a window of the data. datasets: what was read; the .dat keeps the last.
    PhiquantError for values that are not finite, or a name that no Phi-3 has.
    """
    if not matrices:
        raise PhiquantError(f"{path}: an importance matrix of no matrices; collect one from some text first")
    named = {gguf_name(f"{module}.weight"): one for module, one in matrices.items()}
    for name, one in named.items():
        if not np.isfinite(one.sums).all() or one.count < 0:
            raise PhiquantError(f"{path}: the sums of {name} are not finite; run the model in float32")
    ordered = dict(sorted(named.items()))  # as llama.cpp has them
    content = _legacy(ordered, chunk, datasets) if legacy else _gguf(ordered, chunk, datasets)
    write_atomically(Path(path), content)


def _gguf(matrices: Mapping[str, Importance], chunk: int, datasets: Sequence[str]) -> bytes:
    metadata = Metadata()
    metadata.string("general.type", "imatrix")
    metadata.strings("imatrix.datasets", datasets)
    metadata.u32("imatrix.chunk_count", max(one.count for one in matrices.values()) // chunk)
    metadata.u32("imatrix.chunk_size", chunk)
    tensors: list[tuple[TensorInfo, bytes]] = []
    for name, one in matrices.items():
        sums, count = np.asarray(one.sums, "<f4"), np.asarray([one.count], "<f4")
        tensors.append((TensorInfo(f"{name}.in_sum2", (1, sums.size), F32), sums.tobytes()))
        tensors.append((TensorInfo(f"{name}.counts", (1, 1), F32), count.tobytes()))
    data = b"".join(raw.ljust(padded(len(raw)), b"\0") for _, raw in tensors)
    return header(metadata, [info for info, _ in tensors]) + data


def _legacy(matrices: Mapping[str, Importance], chunk: int, datasets: Sequence[str]) -> bytes:
    parts = [struct.pack("<i", len(matrices))]
    chunks = 0
    for name, one in matrices.items():
        calls = max(1, -(-one.count // chunk))
        chunks = max(chunks, calls)
        values = np.asarray(one.weights * np.float32(calls), "<f4")
        parts += [_text(name), struct.pack("<ii", calls, values.size), values.tobytes()]
    return b"".join([*parts, struct.pack("<i", chunks), _text(datasets[-1] if datasets else "")])


def _text(text: str) -> bytes:
    return struct.pack("<i", len(text.encode())) + text.encode()
