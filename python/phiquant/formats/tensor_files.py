"""The tensors of a folder of safetensors files as numpy arrays, and the small decodings that its readers share.

Headers are checked by header.py; values come through a map that ends when they are copied.
numpy has no bfloat16 and no float8: their bits come as uint16 and uint8.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import PhiquantError
from ..untrusted import read_json
from .safetensors.header import INDEX, SINGLE, Place, read_header, read_index

_DTYPES = {
    "BOOL": "u1", "U8": "u1", "I8": "i1", "F8_E4M3": "u1", "F8_E5M2": "u1", "U16": "<u2", "I16": "<i2", "F16": "<f2",
    "BF16": "<u2", "U32": "<u4", "I32": "<i4", "F32": "<f4", "U64": "<u8", "I64": "<i8", "F64": "<f8",
}  # fmt: skip
SCALES = {"F32": "f32", "F16": "f16", "BF16": "bf16", "F8_E4M3": "e4m3", "U8": "e8m0"}  # in the words of specs
_NIBBLES = (np.arange(256, dtype="<u2") >> 4 << 8) | (np.arange(256, dtype="<u2") & 15)  # of a byte, the low one first
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


class TensorFiles:
    """The tensors of model.safetensors, of the shards of an index, or of all files that match `pattern`.

    config: the folder's config.json. PhiquantError for a folder that is damaged, or a shard outside of it.
    """

    def __init__(self, folder: str | Path, pattern: str | None = None) -> None:
        self.folder = Path(folder)
        self.config = read_json(self.folder / "config.json")
        self.places: dict[str, Place] = {}
        for path in _files(self.folder, pattern):
            header = read_header(path)
            if twice := sorted(header.keys() & self.places.keys()):
                raise PhiquantError(f"{path}: {twice[0]} is in {self.places[twice[0]].file.name} too; download again")
            self.places |= header

    def __contains__(self, name: str) -> bool:
        return name in self.places

    def place(self, name: str) -> Place:
        """Where a tensor lies, its dtype and shape. PhiquantError if the folder lacks it."""
        if name not in self.places:
            raise PhiquantError(f"{self.folder} has no tensor {name}; download or export it again")
        return self.places[name]

    def array(self, name: str, index: slice | tuple[slice, ...] = slice(None)) -> np.ndarray:
        """A copy of those rows, or rows and columns, of a tensor."""
        place = self.place(name)
        dtype = np.dtype(_DTYPES[place.dtype])
        if not place.nbytes:
            return np.empty(place.shape, dtype)[index if place.shape else ()]
        mapped = np.memmap(place.file, np.uint8, "r", place.offset, (place.nbytes,)).view(dtype).reshape(place.shape)
        return np.array(mapped[index] if place.shape else mapped)

    def floats(self, name: str, index: slice | tuple[slice, ...] = slice(None)) -> np.ndarray:
        """As array(), in float32. uint8 counts as the exponents of E8M0."""
        return widened(self.array(name, index), self.place(name).dtype)


def widened(values: np.ndarray, dtype: str) -> np.ndarray:
    """The float32 values of an array as TensorFiles.array gives it; dtype: safetensors' name."""
    match dtype:
        case "F32" | "F16" | "F64":
            return values.astype(np.float32)
        case "BF16":
            return (values.astype(np.uint32) << 16).view(np.float32)
        case "F8_E4M3":
            return e4m3(values)
        case "U8":
            return np.ldexp(np.float32(1), values.astype(np.int32) - 127).astype(np.float32)
    raise PhiquantError(f"{dtype} is no dtype of floats here; F32, F16, BF16, F8_E4M3 are")


def narrowed(values: np.ndarray, dtype: str) -> np.ndarray | None:
    """float32 as float16 or as the bits of bfloat16, if none changes."""
    if dtype == "float32":
        return values
    if dtype == "float16":
        narrow = values.astype(np.float16)
        return narrow if np.array_equal(narrow.astype(np.float32), values) else None
    bits = values.view(np.uint32)
    return None if (bits & 0xFFFF).any() else (bits >> 16).astype(np.uint16)


def e4m3(bits: np.ndarray) -> np.ndarray:
    """float8 E4M3 (no infinity; x1111111 is NaN) as float32."""
    exponent, fraction = (bits >> 3 & 15).astype(np.int32), (bits & 7).astype(np.float32)
    normal = exponent > 0
    magnitude = np.ldexp(fraction / 8 + normal, np.where(normal, exponent, 1) - 7)
    magnitude[(bits & 0x7F) == 0x7F] = np.nan
    return np.where(bits >> 7, -magnitude, magnitude).astype(np.float32)


def e2m1(codes: np.ndarray) -> np.ndarray:
    """float4 E2M1 as float32."""
    return _E2M1[codes]


def stream(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The `count` codes, uint8 [N, count], in rows of words [N, W]: `bits` each, the lowest bit first."""
    data = np.ascontiguousarray(packed).view(np.uint8).reshape(len(packed), -1)
    if data.shape[1] * 8 < count * bits:
        raise PhiquantError(f"rows of {data.shape[1]} bytes hold no {count} codes of {bits} bits")
    if bits == 8:
        return data[:, :count]
    if bits == 4:
        return _NIBBLES[data].view(np.uint8)[:, :count]
    digits = np.unpackbits(data, axis=1, bitorder="little")[:, : count * bits].reshape(len(data), count, bits)
    return np.packbits(digits, axis=2, bitorder="little")[..., 0]


def _files(folder: Path, pattern: str | None) -> list[Path]:
    if pattern is not None:
        found = sorted(folder.glob(pattern))
    elif (folder / SINGLE).is_file():
        found = [folder / SINGLE]
    elif (folder / INDEX).is_file():
        found = [folder / name for name in sorted(set(read_index(folder / INDEX).values()))]
    else:
        found = []
    if not found:
        raise PhiquantError(f"{folder} has neither {SINGLE} nor {INDEX}; download or export it again")
    for path in found:
        if not path.is_file():
            raise PhiquantError(f"{folder} has no file {path.name}, which its index names; download it again")
    return found


def blocks(values: np.ndarray, groups: int) -> np.ndarray:
    """[N, K] as [N, groups, K / groups]."""
    return values.reshape(len(values), groups, -1)


def part_names(tensors: Mapping[str, Any], suffix: str) -> list[str]:
    """Names of modules that have a tensor of that suffix."""
    return [name.removesuffix(suffix) for name in tensors if name.endswith(suffix)]
