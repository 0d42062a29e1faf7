"""Walks a GGUF header with every count and length checked against the file's size.

gguf-py trusts the counts it reads: a damaged one makes it loop for hours or look past the end. This
walk refuses such a file first; it keeps nothing of what it reads.
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path

from ..errors import PhiquantError

# value type -> bytes; strings (8) and arrays (9) are walked
_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9
# ggml type -> (values, bytes) of a block; the types phiquant reads
_BLOCKS = {0: (1, 4), 1: (1, 2), 30: (1, 2), 2: (32, 18), 3: (32, 20), 8: (32, 34)}


class _Walk:
    """A position in the file's bytes that never leaves them."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self.at = data, 0

    def skip(self, count: int) -> None:
        if count > len(self._data) - self.at:
            raise ValueError(f"at byte {self.at} it names {count:,} bytes, {len(self._data) - self.at:,} are left")
        self.at += count

    def read(self, form: str) -> int:
        start = self.at
        self.skip(struct.calcsize("<" + form))
        return int(struct.unpack_from("<" + form, self._data, start)[0])

    def string(self) -> bytes:
        length = self.read("Q")
        self.skip(length)
        return self._data[self.at - length : self.at]

    def value(self, kind: int) -> int | None:
        """Pass a value; returns those of 32 bits without a sign, for the alignment."""
        if kind == _STRING:
            self.skip(self.read("Q"))
        elif kind == _ARRAY:
            kind, count = self.read("I"), self.read("Q")
            if kind in _SCALARS:
                self.skip(count * _SCALARS[kind])
            elif kind == _STRING:
                for _ in range(count):  # each takes 8 bytes at least, so this ends
                    self.skip(self.read("Q"))
            else:
                raise ValueError(f"at byte {self.at} it has an array of type {kind}")
        elif kind == 4:
            return self.read("I")
        elif kind in _SCALARS:
            self.skip(_SCALARS[kind])
        else:
            raise ValueError(f"at byte {self.at} it has a value of type {kind}")
        return None

    def tensor(self) -> tuple[int, int]:
        """Pass a tensor's line of the table; returns its offset and bytes."""
        name = self.string().decode("utf-8", "replace")
        dimensions = self.read("I")
        if not 1 <= dimensions <= 4:
            raise ValueError(f"tensor {name!r} has {dimensions} dimensions")
        shape = [self.read("Q") for _ in range(dimensions)]
        kind, offset = self.read("I"), self.read("Q")
        if kind not in _BLOCKS:
            raise ValueError(f"tensor {name!r} is of ggml type {kind}, which phiquant does not read")
        values, size = _BLOCKS[kind]
        if shape[0] % values:
            raise ValueError(f"tensor {name!r} has rows of {shape[0]} values, not whole blocks of {values}")
        return offset, math.prod(shape) // values * size


def check(path: Path) -> None:
    """PhiquantError unless the whole of `path`'s header and all of its tensors lie inside the file."""
    if not path.is_file():
        raise PhiquantError(f"{path}: no such file")
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _walk(_Walk(data), len(data))
    except ValueError as error:  # an empty file as well: it cannot be mapped
        raise PhiquantError(f"{path} is not a whole GGUF file: {error}; export it or fetch it again") from error


def _walk(walk: _Walk, size: int) -> None:
    if walk.read("I") != 0x46554747:
        raise ValueError("it does not start with GGUF")
    version = walk.read("I")
    if version != 3:
        raise ValueError(f"its version is {version}, not 3")
    tensors, pairs = walk.read("Q"), walk.read("Q")
    alignment = 32
    for _ in range(pairs):
        key = walk.string()
        value = walk.value(walk.read("I"))
        if key == b"general.alignment":
            alignment = value or 0
    if alignment < 1 or alignment & (alignment - 1):
        raise ValueError("its alignment is not a power of two")
    places = [walk.tensor() for _ in range(tensors)]
    start = -(-walk.at // alignment) * alignment
    for offset, count in places:
        if start + offset + count > size:
            raise ValueError(f"a tensor ends at byte {start + offset + count:,} and the file at {size:,}")
