"""What a format writer receives: the list of tensors, and a way to read each one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from ..spec import FLOAT_BITS, FloatName, PerChannel, PerGroup, QuantSpec
from ..tensor import QuantizedTensor

Progress = Callable[[str, int, int], None]  # (name of the tensor, bytes written, bytes in all)

# Of the float tensor: large enough that calls and page faults cost little, small enough that memory stays low:
# benchmarks/stream.py measured 4, 8, 16 and 32 MiB; 8 packs fastest, 32 raises the peak by 85 MiB.
CHUNK_BYTES = 8 << 20


@dataclass(frozen=True)
class Entry:
    """One tensor of a model.

    name: the Hugging Face name, such as "model.layers.0.mlp.down_proj.weight".
    spec: its grid, or None if it stays float.
    dtype: how a float tensor is to be stored (a writer may widen it); of no meaning if spec is given.
    origin: how its codes were chosen, for the receipt: solver, statistics ...
    """

    name: str
    shape: tuple[int, ...]
    spec: QuantSpec | None
    dtype: FloatName = "bfloat16"
    origin: Mapping[str, Any] | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def module(self) -> str:
        """Name of the module: the tensor's name without its last part."""
        return self.name.rpartition(".")[0]


class Source(Protocol):
    """A model as a writer sees it: in memory, or on disk and quantized while it is read.

    entries: every tensor once; a tied lm_head.weight is absent.
    config: the Hugging Face config.json.
    tokenizer_dir: folder with tokenizer.json and its companions, or None.
    fingerprint: what the bytes depend on (inputs, spec, solver, version). An interrupted file is
        continued only by a source of the same fingerprint.
    """

    @property
    def entries(self) -> Sequence[Entry]: ...

    @property
    def config(self) -> dict[str, Any]: ...

    @property
    def tokenizer_dir(self) -> Path | None: ...

    @property
    def fingerprint(self) -> str: ...

    def read(self, entry: Entry, rows: slice | None = None) -> QuantizedTensor | torch.Tensor:
        """The codes of a quantized entry, or the float tensor in its own dtype.

        rows: only these indices of the first axis, one of `row_slices(entry)`; None: all of it.
        """
        ...


def row_slices(entry: Entry, size: int | None = None) -> Iterator[slice]:
    """Slices of the first axis, in order, of about `size` bytes (None: CHUNK_BYTES) in float32 each.

    Rows of a per-group or per-channel grid do not depend on each other, so a tensor may be read,
    quantized and written piece by piece with the same bytes. Other grids give one slice: all of it.
    """
    rows = entry.shape[0] if entry.shape else 1
    independent = entry.spec is None or entry.spec.granularity == PerChannel(0)
    if not independent and isinstance(entry.spec, QuantSpec):
        whole = entry.spec.two_level is not None and entry.spec.two_level.super_block == "tensor"
        independent = isinstance(entry.spec.granularity, PerGroup) and len(entry.shape) > 1 and not whole
    if not independent or len(entry.shape) < 1:
        yield slice(0, rows)
        return
    row_bytes = max(1, entry.numel // max(1, rows)) * FLOAT_BITS["float32"] // 8
    step = max(1, (size or CHUNK_BYTES) // row_bytes)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
