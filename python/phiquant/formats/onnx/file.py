"""ONNX files, piece by piece: a graph that grows node by node, and the file beside it that holds its large tensors.

Places in that file are known from shapes alone, so the graph can be written without a weight in memory,
and weights can stream. Element types go by numpy-like names: "float32", "uint4" (two per byte, the first low).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...extras import need
from .. import receipt
from ..partial import PartialFile

BITS = {
    "float32": 32, "float16": 16, "bfloat16": 16, "int64": 64, "int32": 32, "int16": 16, "uint16": 16, "bool": 8,
    "int8": 8, "uint8": 8, "int4": 4, "uint4": 4, "int2": 2, "uint2": 2,
}  # fmt: skip
PAGE, LINE = 4096, 64  # tensors of a page and more begin at a page, so that they can be mapped; others at a line
MICROSOFT = "com.microsoft"
PRODUCER = "phiquant"

Shape = Sequence[int | str | None]


@dataclass(frozen=True)
class Placed:
    """A tensor of the data file: `gap` zero bytes come before it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    gap: int

    @property
    def nbytes(self) -> int:
        return nbytes(self.dtype, self.shape)


class DataFile:
    """The file beside one or more models: what lies where. Tensors that are written together make a unit."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.units: dict[str, list[Placed]] = {}
        self._end = 0

    def place(self, unit: str, name: str, dtype: str, shape: Sequence[int]) -> Placed:
        """Reserve room for the tensor `name` behind all others. A unit is placed without another in between."""
        if unit in self.units and unit != next(reversed(self.units)):
            raise ValueError(f"{unit} is placed in two pieces")
        gap = -self._end % (PAGE if nbytes(dtype, shape) >= PAGE else LINE)
        placed = Placed(name, dtype, tuple(shape), self._end + gap, gap)
        self.units.setdefault(unit, []).append(placed)
        self._end = placed.offset + placed.nbytes
        return placed

    def open(self, folder: Path, fingerprint: str) -> PartialFile:
        """The file to append units to, in order; see buffers()."""
        sizes = [sum(part.gap + part.nbytes for part in parts) for parts in self.units.values()]
        return PartialFile(folder / self.name, b"", list(self.units), sizes, fingerprint)

    @property
    def size(self) -> int:
        """Bytes of the complete file."""
        return self._end

    def buffers(self, unit: str, contents: Iterable[Iterable[Any]]) -> Iterator[Any]:
        """The bytes of a unit for PartialFile.append: of each of its tensors the gap, then its buffers."""
        for part, content in zip(self.units[unit], contents, strict=True):
            yield bytes(part.gap)
            yield from content


class Graph:
    """A graph under construction. Values are named by whoever makes them; unnamed ones are numbered."""

    def __init__(self, name: str = "model") -> None:
        self._onnx = need("onnx", extra="onnx")
        self.name = name
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []
        self._nodes: list[Any] = []
        self._initializers: dict[str, Any] = {}
        self._constants: dict[Any, str] = {}
        self._counts: dict[str, int] = {}

    def input(self, name: str, dtype: str, shape: Shape) -> str:
        """An input; text in a shape is the name of an open dimension."""
        self.inputs.append(self._value(name, dtype, shape))
        return name

    def output(self, name: str, dtype: str, shape: Shape) -> None:
        """Make the value `name` an output of the graph."""
        self.outputs.append(self._value(name, dtype, shape))

    def constant(self, value: Any, dtype: str = "int64") -> str:
        """A small tensor inside the graph (shapes, axes, parameters); equal ones are stored once."""
        array = np.asarray(value, dtype)
        key = (array.shape, dtype, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self._number("constant")
            made = self._onnx.numpy_helper.from_array(array, self._constants[key])
            self._initializers[made.name] = made
        return self._constants[key]

    def tensor(self, name: str, dtype: str, shape: Sequence[int], raw: bytes) -> str:
        """A tensor inside the graph from its raw bytes, of any type of BITS."""
        self._initializers[name] = self._onnx.helper.make_tensor(name, self._type(dtype), list(shape), raw, raw=True)
        return name

    def external(self, placed: Placed, file: DataFile) -> str:
        """A tensor of the data file. Tools that read shapes need theirs inside the graph: use constant()."""
        if placed.name not in self._initializers:
            proto = self._onnx.TensorProto(name=placed.name, data_type=self._type(placed.dtype), dims=placed.shape)
            proto.data_location = self._onnx.TensorProto.EXTERNAL
            for key, value in (("location", file.name), ("offset", placed.offset), ("length", placed.nbytes)):
                proto.external_data.add(key=key, value=str(value))
            self._initializers[placed.name] = proto
        return placed.name

    def node(
        self,
        op: str,
        inputs: Sequence[str],
        outputs: Sequence[str] | None = None,
        *,
        domain: str = "",
        **attributes: Any,
    ) -> str:
        """Append a node and return its first output; with `outputs` None it has one, which is numbered."""
        outputs = [self._number(op)] if outputs is None else list(outputs)
        made = self._onnx.helper.make_node(
            op, list(inputs), outputs, name=f"{op}/{next(filter(None, outputs))}", domain=domain, **attributes
        )
        self._nodes.append(made)
        return outputs[0]

    def proto(self) -> Any:
        """The GraphProto, also for the branches of an If."""
        return self._onnx.helper.make_graph(
            self._nodes, self.name, self.inputs, self.outputs, list(self._initializers.values())
        )

    def serialize(self, opset: int, ir_version: int, metadata: Mapping[str, str] | None = None) -> bytes:
        """The bytes of the model file; com.microsoft is imported at version 1."""
        helper = self._onnx.helper
        imports = [helper.make_opsetid("", opset), helper.make_opsetid(MICROSOFT, 1)]
        model = helper.make_model(self.proto(), opset_imports=imports, ir_version=ir_version)
        model.producer_name, model.producer_version = PRODUCER, receipt.version(PRODUCER)
        helper.set_model_props(model, dict(metadata or {}))
        return bytes(model.SerializeToString(deterministic=True))

    def _number(self, op: str) -> str:
        self._counts[op] = self._counts.get(op, 0) + 1
        return f"{self.name}/{op}_{self._counts[op]}"

    def _value(self, name: str, dtype: str, shape: Shape) -> Any:
        return self._onnx.helper.make_tensor_value_info(name, self._type(dtype), shape)

    def _type(self, dtype: str) -> int:
        names = {"float32": "FLOAT"}
        return int(self._onnx.TensorProto.DataType.Value(names.get(dtype, dtype.upper())))


def nbytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor; types below a byte are packed without gaps."""
    return (math.prod(shape) * BITS[dtype] + 7) // 8
