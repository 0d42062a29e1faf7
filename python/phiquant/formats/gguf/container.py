"""The GGUF container, version 3, little endian: typed metadata, tensor table.

    "GGUF" | version | tensor count | key count | keys | tensor table | padding | tensors, each padded

Knows bytes only, nothing of models.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...errors import PhiquantError
from .types import GGMLType

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32  # the default of the format; a file with another one must name it
MAX_NAME = 63  # ggml keeps names in 64 bytes, NUL included

_U32, _I32, _F32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of the file: GGUF name, shape in numpy's order (rows first), storage type."""

    name: str
    shape: tuple[int, ...]
    type: GGMLType

    def __post_init__(self) -> None:
        if len(self.name.encode()) > MAX_NAME:
            raise PhiquantError(f"tensor name {self.name!r} is longer than GGUF's {MAX_NAME} bytes")
        if not self.shape or self.shape[-1] % self.type.block:
            raise PhiquantError(
                f"tensor {self.name!r} of shape {list(self.shape)}: {self.type.name} stores rows in blocks of "
                f"{self.type.block} values, which do not divide them; store it as F16, BF16 or F32"
            )

    @property
    def nbytes(self) -> int:
        values = 1
        for n in self.shape:
            values *= n
        return values // self.type.block * self.type.block_bytes

    def line(self, offset: int) -> bytes:
        """What the table of tensors says of it."""
        dims = self.shape[::-1]  # GGUF counts dimensions from the innermost
        return _string(self.name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, self.type.id, offset)


class Metadata:
    """Key-value pairs in the order they are put, encoded at once. A key may come only once."""

    def __init__(self) -> None:
        self._pairs: dict[str, bytes] = {}

    def u32(self, key: str, value: int) -> None:
        if not 0 <= value < 1 << 32:
            raise PhiquantError(f"{key} = {value} does not fit into the unsigned 32 bits that GGUF gives it")
        self._put(key, _U32, struct.pack("<I", value))

    def f32(self, key: str, value: float) -> None:
        self._put(key, _F32, struct.pack("<f", value))

    def bool(self, key: str, value: bool) -> None:
        self._put(key, _BOOL, struct.pack("<?", value))

    def string(self, key: str, value: str) -> None:
        self._put(key, _STRING, _string(value))

    def strings(self, key: str, values: Sequence[str]) -> None:
        self._array(key, _STRING, len(values), b"".join(map(_string, values)))

    def f32s(self, key: str, values: Sequence[float]) -> None:
        self._array(key, _F32, len(values), np.asarray(values, "<f4").tobytes())

    def i32s(self, key: str, values: Sequence[int]) -> None:
        self._array(key, _I32, len(values), np.asarray(values, "<i4").tobytes())

    def _array(self, key: str, kind: int, count: int, body: bytes) -> None:
        self._put(key, _ARRAY, struct.pack("<IQ", kind, count) + body)

    def _put(self, key: str, kind: int, body: bytes) -> None:
        if key in self._pairs:
            raise PhiquantError(f"GGUF key {key!r} is given twice")
        self._pairs[key] = _string(key) + struct.pack("<I", kind) + body

    def __len__(self) -> int:
        return len(self._pairs)

    def encode(self) -> bytes:
        return b"".join(self._pairs.values())


def header(metadata: Metadata, tensors: Sequence[TensorInfo]) -> bytes:
    """Everything before the first tensor's bytes, padded. Tensors follow in this order, each padded."""
    names = [t.name for t in tensors]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise PhiquantError(f"two tensors of the model have the GGUF name {twice!r}")
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(metadata)), metadata.encode()]
    offset = 0
    for t in tensors:
        parts.append(t.line(offset))
        offset = padded(offset + t.nbytes)
    encoded = b"".join(parts)
    return encoded.ljust(padded(len(encoded)), b"\0")


def padded(size: int) -> int:
    """`size` rounded up to the alignment."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def _string(text: str) -> bytes:
    encoded = text.encode("utf-8")
    return struct.pack("<Q", len(encoded)) + encoded
