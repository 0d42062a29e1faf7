"""llama.cpp's importance matrices, read: of either form (imatrix.py), by Hugging Face's names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...errors import PhiquantError
from . import guard as gguf_guard
from .hf_names import hf_name

_SUMS, _COUNTS = ".in_sum2", ".counts"
_MOST = 1 << 20  # entries, bytes of a name, values of an entry: more than any model has


@dataclass(frozen=True)
class Importance:
    """What the inputs of one matrix were like.

    sums: float32 [K], sums of x^2. count: of tokens; in a .dat file of chunks, whose sums are means times that.
    """

    sums: np.ndarray
    count: int

    @property
    def weights(self) -> np.ndarray:
        """Mean of x^2 of each column, float32 [K]; 1 where no token was seen, as llama.cpp has it."""
        if self.count == 0:
            return np.ones_like(self.sums)
        return self.sums / np.float32(self.count)


def read(path: str | Path) -> dict[str, Importance]:
    """The matrices of an imatrix file of either form, by module. PhiquantError for any other file."""
    path = Path(path)
    if not path.is_file():
        raise PhiquantError(f"{path}: no such file")
    with open(path, "rb") as file:
        modern = file.read(4) == b"GGUF"
    found = _read_gguf(path) if modern else _read_legacy(path)
    return {hf_name(name, path).removesuffix(".weight"): one for name, one in found.items()}


def _read_gguf(path: Path) -> dict[str, Importance]:
    known = gguf_guard.read_header(path)
    if known.metadata.get("general.type") != "imatrix":
        raise PhiquantError(f"{path} is a GGUF file, but no importance matrix: its general.type is not 'imatrix'")
    data = np.memmap(path, np.uint8, mode="r")
    places = {place.name: place for place in known.tensors}

    def values(name: str) -> np.ndarray:
        place = places.get(name)
        if place is None or place.kind != "F32" or place.shape[0] != 1 or len(place.shape) > 2:
            raise PhiquantError(f"{path}: {name} is missing, or is no row of float32 values")
        return np.array(data[place.start : place.start + place.bytes].view("<f4"))

    found = {}
    for name in (name.removesuffix(_SUMS) for name in places if name.endswith(_SUMS)):
        sums, count = values(name + _SUMS), values(name + _COUNTS)
        if count.size != 1 or not np.isfinite(sums).all() or not 0 <= count[0] < 1 << 53:
            raise PhiquantError(f"{path}: the sums of {name} are not finite, or it has no one count")
        found[name] = Importance(sums, round(float(count[0])))
    if not found:
        raise PhiquantError(f"{path}: an importance matrix of no matrices")
    return found


def _read_legacy(path: Path) -> dict[str, Importance]:
    data = memoryview(path.read_bytes())
    try:
        return _entries(gguf_guard.Walk(data), data)
    except ValueError as error:
        raise PhiquantError(f"{path} is not an importance matrix of llama.cpp: {error}; make it again") from error


def _entries(walk: gguf_guard.Walk, data: memoryview) -> dict[str, Importance]:
    found: dict[str, Importance] = {}
    for _ in range(_number(walk, "entries")):
        length = _number(walk, "bytes of a name")
        walk.skip(length)
        name = str(data[walk.at - length : walk.at], "utf-8")
        if name in found:
            raise ValueError(f"at byte {walk.at} it has {name} a second time")
        calls, size = _number(walk, "chunks"), _number(walk, "values")
        walk.skip(4 * size)
        sums = np.frombuffer(data, "<f4", size, walk.at - 4 * size).copy()
        if not np.isfinite(sums).all():
            raise ValueError(f"the values of {name} before byte {walk.at} are not finite")
        found[name] = Importance(sums, calls)
    return found


def _number(walk: gguf_guard.Walk, what: str) -> int:
    """A count, at least 1."""
    value = int(walk.number("i"))
    if not 1 <= value <= _MOST:
        raise ValueError(f"at byte {walk.at - 4} it names {value} {what}")
    return value
