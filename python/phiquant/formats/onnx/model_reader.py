"""The tensors of an ONNX model and of the data files beside it, as bytes: every place is checked before it is read.

The graph is untrusted. It is parsed by the package onnx without its external data, which is mapped here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import PhiquantError
from ...extras import need
from ..receipt import is_plain_name
from ..stored import give_back

_MOST_BYTES = (1 << 31) - 1  # of a protobuf message
_BITS = {
    "float": 32, "float16": 16, "bfloat16": 16, "int64": 64, "int32": 32, "uint16": 16, "int16": 16, "int8": 8,
    "uint8": 8, "bool": 8, "int4": 4, "uint4": 4, "int2": 2, "uint2": 2,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Stored:
    """A tensor: type ("float", "uint4" ...), shape, and its bytes, uint8 [n], mapped from the file."""

    name: str
    type: str
    shape: tuple[int, ...]
    data: np.ndarray

    def array(self, dtype: str) -> np.ndarray:
        """The bytes as an array of a whole-byte numpy dtype, in the tensor's shape."""
        return self.data.view(dtype).reshape(self.shape)

    def release(self) -> None:
        """Give back the pages of the file that were read."""
        give_back(self.data)


@dataclass(frozen=True)
class Model:
    """A parsed model file: its nodes (NodeProto) and its tensors by name."""

    path: Path
    nodes: list[Any]
    tensors: Mapping[str, Stored]


def read_model(path: Path) -> Model:
    """Parse `path` and map its data. PhiquantError names the file, the tensor and what is wrong with it."""
    onnx = need("onnx", extra="onnx")
    if not path.is_file():
        raise PhiquantError(f"{path}: no such file; give the folder of an ONNX export")
    if path.stat().st_size > _MOST_BYTES:
        raise PhiquantError(f"{path} has {path.stat().st_size:,} bytes; a model without its data is never that large")
    try:
        graph = onnx.load(str(path), format="protobuf", load_external_data=False).graph
    except Exception as error:  # google.protobuf's DecodeError; which class it is depends on the implementation
        raise PhiquantError(f"{path} is not an ONNX model: {error}; export it or fetch it again") from error
    files: dict[str, np.ndarray] = {}
    tensors: dict[str, Stored] = {}
    extents: list[tuple[str, int, int, str]] = []
    for proto in graph.initializer:
        if not isinstance(proto.name, str):
            raise PhiquantError(f"{path}: the name of tensor {len(tensors)}, {proto.name!r}, is not UTF-8")
        if proto.name in tensors:
            raise PhiquantError(f"{path}: the tensor {proto.name!r} occurs twice")
        tensors[proto.name] = _read(path, proto, files, extents)
    _check_overlaps(path, extents)
    return Model(path, list(graph.node), tensors)


def _read(path: Path, proto: Any, files: dict[str, np.ndarray], extents: list[tuple[str, int, int, str]]) -> Stored:
    where, type, shape = f"{path}: the tensor {proto.name!r}", _type(path, proto), tuple(int(n) for n in proto.dims)
    if any(n < 1 for n in shape):
        raise PhiquantError(f"{where} has the shape {list(shape)}")
    size = (math.prod(shape) * _BITS[type] + 7) // 8
    if proto.data_location != 1:  # TensorProto.EXTERNAL
        data = np.frombuffer(proto.raw_data or _typed(where, proto), np.uint8)
        if len(data) != size:
            raise PhiquantError(f"{where} has {len(data):,} bytes; its shape {list(shape)} takes {size:,}")
        return Stored(proto.name, type, shape, data)
    entries = {entry.key: entry.value for entry in proto.external_data}
    location, offset, length = entries.get("location", ""), _number(entries, "offset"), _number(entries, "length", size)
    if not is_plain_name(location):
        raise PhiquantError(f"{where} lies in {location!r}, which is not the name of a file beside the model")
    if location not in files:
        files[location] = _map(path.parent / location)
    end = len(files[location])
    if offset is None or length != size or offset + size > end:
        raise PhiquantError(
            f"{where} lies at {entries.get('offset', 0)}, {entries.get('length')} bytes, in {location} of {end:,} "
            f"bytes; its shape {list(shape)} takes {size:,}"
        )
    if size:
        extents.append((location, offset, offset + size, proto.name))
    return Stored(proto.name, type, shape, files[location][offset : offset + size])


def _type(path: Path, proto: Any) -> str:
    types = need("onnx", extra="onnx").TensorProto.DataType
    name = types.Name(proto.data_type).lower() if proto.data_type in types.values() else str(proto.data_type)
    if name not in _BITS:
        raise PhiquantError(f"{path}: the tensor {proto.name!r} is of type {name}, which no Phi-3 export has")
    return name


def _typed(where: str, proto: Any) -> bytes:
    """The bytes of a small tensor whose values are listed one by one."""
    try:
        return bytes(need("onnx", extra="onnx").numpy_helper.to_array(proto).tobytes())
    except (ValueError, TypeError, OverflowError, MemoryError) as error:
        raise PhiquantError(f"{where} cannot be read: {error}") from error


def _number(entries: Mapping[str, str], key: str, default: int = 0) -> int | None:
    """A whole number from 0, or None."""
    text = entries.get(key)
    if text is None:
        return default
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else None


def _map(path: Path) -> np.ndarray:
    if not path.is_file():
        raise PhiquantError(f"{path}: no such file; the model beside it has tensors there")
    if path.stat().st_size == 0:
        return np.zeros(0, np.uint8)
    return np.memmap(path, np.uint8, "r")


def _check_overlaps(path: Path, extents: list[tuple[str, int, int, str]]) -> None:
    for before, after in itertools.pairwise(sorted(extents)):
        if before[0] == after[0] and after[1] < before[2]:
            raise PhiquantError(
                f"{path}: the tensors {before[3]!r} and {after[3]!r} overlap in {after[0]} at byte {after[1]}"
            )
