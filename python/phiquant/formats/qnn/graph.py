"""The program of models/decoder.py as a static ONNX graph: every result rounded to its grid by a Q/DQ pair.

A node between DequantizeLinear and QuantizeLinear is what QNN takes as one integer operation. The weights are
references into a data file; the graph holds the rest: shapes, tables, grids. Names of values as in decoder.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ...models import decoder
from ..onnx import file as onnx_file
from ..onnx.file import DataFile, Placed, nbytes

OPSET, IR_VERSION = 21, 10
FLOAT = 1  # onnx.TensorProto.FLOAT
_TYPES: dict[int, str] = {8: "uint8", 16: "uint16"}


@dataclass(frozen=True)
class Grid:
    """A per-tensor grid of activations, asymmetric: value = scale (code - zero_point), codes of `bits` bits.

    lo, hi: the range it covers; zero is always inside and on the grid.
    """

    lo: float
    hi: float
    bits: int

    @property
    def scale(self) -> np.float32:
        span = max(self.hi, 0.0) - min(self.lo, 0.0)
        return np.float32(max(span / (2**self.bits - 1), 1e-30))

    @property
    def zero_point(self) -> int:
        return min(2**self.bits - 1, round(-min(self.lo, 0.0) / float(self.scale)))

    def codes(self, values: np.ndarray) -> np.ndarray:
        """The nearest codes, uint8 or uint16."""
        codes = np.rint(values / self.scale) + self.zero_point
        return np.clip(codes, 0, 2**self.bits - 1).astype(_TYPES[self.bits])


# Results between 0 and 1. QNN wants this scale of 16-bit softmax and sigmoid.
UNIT = Grid(0.0, 65535 / 65536, 16)


@dataclass(frozen=True)
class Value:
    """A value of the graph: the name of its float form, its shape, and its grid (None: not rounded).

    low: what rounding to that grid left of a cached value, where it is kept too.
    """

    name: str
    shape: tuple[int, ...]
    grid: Grid | None = None
    low: Value | None = None


@dataclass(frozen=True)
class Weight:
    """A matrix or a vector of the data file. scale: of each row of codes; grid: of a vector that is rounded."""

    values: Placed
    scale: Placed | None = None
    grid: Grid | None = None

    def rows(self, module: str, rows: slice) -> Weight:
        """Some rows of it, by the name of the module whose they are."""
        scale = None if self.scale is None else _rows(self.scale, f"{module}.weight.scale", rows)
        return replace(self, values=_rows(self.values, f"{module}.weight", rows), scale=scale)


def _rows(whole: Placed, name: str, rows: slice) -> Placed:
    begin = nbytes(whole.dtype, (rows.start, *whole.shape[1:]))
    shape = (rows.stop - rows.start, *whole.shape[1:])
    return Placed(name, whole.dtype, shape, whole.offset + begin, 0)


class Graph:
    """Interprets the program of models/decoder.py: writes it as nodes (see decoder.Operations).

    grids: of every point, or {} for a graph that rounds nothing. centres: of keys, [G, D]. weights: of modules, as
    decoder.linears() names them, and of norms. tables: cos and sin [context, D]. eps, window, layers: of the model.
    low_cache: see cached().
    """

    def __init__(
        self,
        data: DataFile,
        name: str,
        tokens: int,
        context: int,
        grids: Mapping[str, Grid],
        centres: Mapping[str, np.ndarray],
        weights: Mapping[str, Weight],
        tables: tuple[np.ndarray, np.ndarray],
        *,
        eps: float,
        window: int | None,
        layers: int,
        low_cache: bool,
    ) -> None:
        self.data, self.nodes = data, onnx_file.Graph(name)
        self.tokens, self.context = tokens, context
        self.grids, self.centres, self.weights, self.eps = grids, centres, weights, eps
        self._tables, self._window = tables, window
        self.layers, self.low_cache = layers, low_cache
        self._converted: dict[tuple[str, int], Value] = {}
        self._rotations: dict[str, tuple[Value, Value]] = {}
        self._mask: Value | None = None

    def serialize(self) -> bytes:
        """The bytes of the model file."""
        return self.nodes.serialize(OPSET, IR_VERSION)

    # Values ---------------------------------------------------------------------------------------------------------

    def input(self, name: str, grid: Grid | None, shape: tuple[int, ...]) -> Value:
        """An input of the graph: codes on `grid`, or floats."""
        self.nodes.input(name, _TYPES[grid.bits] if grid else "float32", shape)
        return Value(self._dequantize(name, f"{name}.float", grid), shape, grid) if grid else Value(name, shape)

    def output(self, x: Value, name: str, shape: tuple[int, ...], *, codes: bool) -> None:
        """x in the shape `shape` as an output of the graph: as codes on its grid, or as floats."""
        raw = self.nodes.node("Reshape", [x.name, self._integers(shape)], [f"{name}.raw" if x.grid else name])
        if x.grid is not None:
            names = (name, f"{name}.float") if codes else (f"{name}.codes", name)
            self._rounded(raw, names[1], shape, x.grid, codes=names[0])
        self.nodes.output(name, _TYPES[x.grid.bits] if x.grid and codes else "float32", shape)

    def table(self, name: str, values: np.ndarray, grid: Grid | None) -> Value:
        """A constant on a grid."""
        if grid is None:
            return Value(self.nodes.constant(values, "float32"), values.shape)
        stored = self.nodes.constant(grid.codes(values), _TYPES[grid.bits])
        return Value(self._dequantize(stored, name, grid), values.shape, grid)

    def _emit(
        self, op: str, inputs: Sequence[str], name: str, shape: tuple[int, ...], grid: Grid | None, **attributes: Any
    ) -> Value:
        """A node and, on a grid, the Q/DQ pair behind it. `name`: of the float value that comes out."""
        if grid is None:
            return Value(self.nodes.node(op, inputs, [name], **attributes), shape)
        raw = self.nodes.node(op, inputs, [f"{name}.raw"], **attributes)
        return self._rounded(raw, name, shape, grid)

    def _rounded(self, raw: str, name: str, shape: tuple[int, ...], grid: Grid | None, codes: str = "") -> Value:
        if grid is None:
            return Value(raw, shape)
        codes = self.nodes.node("QuantizeLinear", [raw, *self._parameters(grid)], [codes or f"{name}.codes"])
        return Value(self._dequantize(codes, name, grid), shape, grid)

    def _dequantize(self, codes: str, name: str, grid: Grid) -> str:
        return self.nodes.node("DequantizeLinear", [codes, *self._parameters(grid)], [name])

    def _parameters(self, grid: Grid) -> tuple[str, str]:
        return self.nodes.constant(grid.scale, "float32"), self.nodes.constant(grid.zero_point, _TYPES[grid.bits])

    def _at(self, x: Value, grid: Grid | None) -> Value:
        """x with as many bits as `grid`, on its own range: by one more Q/DQ pair where the width differs."""
        if x.grid is None or grid is None or x.grid.bits == grid.bits:
            return x
        key = (x.name, grid.bits)
        if key not in self._converted:
            own = replace(x.grid, bits=grid.bits)
            self._converted[key] = self._rounded(x.name, f"{x.name}.u{grid.bits}", x.shape, own)
        return self._converted[key]

    def _integers(self, values: Sequence[int]) -> str:
        return self.nodes.constant(values)

    def _binary(self, op: str, a: Value, b: Value, point: str, shape: tuple[int, ...], grid: Grid | None) -> Value:
        return self._emit(op, [self._at(a, grid).name, self._at(b, grid).name], point, shape, grid)

    # Operations of the program ---------------------------------------------------------------------------------------

    def linear(self, x: Value, module: str) -> Value:
        """Gemm with the transposed weight, whose rows lie as in the checkpoint."""
        weight, grid = self.weights[module], self.grids.get(module)
        x = self._at(x, grid)
        shape = (x.shape[0], weight.values.shape[0])
        return self._emit("Gemm", [x.name, self._floats(weight)], f"{module}.out", shape, grid, transB=1)

    def _floats(self, weight: Weight) -> str:
        """The values of a weight in float32."""
        stored, name = self.nodes.external(weight.values, self.data), f"{weight.values.name}.float"
        if weight.grid is not None:
            return self._dequantize(stored, name, weight.grid)
        if weight.scale is None:
            return stored if weight.values.dtype == "float32" else self.nodes.node("Cast", [stored], [name], to=FLOAT)
        dtype, rows = weight.values.dtype, weight.values.shape[0]
        zeros = self.nodes.tensor(f"zeros.{dtype}.{rows}", dtype, [rows], bytes(nbytes(dtype, [rows])))
        inputs = [stored, self.nodes.external(weight.scale, self.data), zeros]
        return self.nodes.node("DequantizeLinear", inputs, [name], axis=0)

    def norm(self, x: Value, module: str) -> Value:
        weight, grid = self.weights[module], self.grids.get(module)
        inputs = [self._at(x, grid).name, self._floats(weight)]
        attributes = {"axis": -1, "epsilon": self.eps, "stash_type": 1}
        return self._emit("SimplifiedLayerNormalization", inputs, f"{module}.out", x.shape, grid, **attributes)

    def add(self, a: Value, b: Value, point: str) -> Value:
        shape = tuple(np.broadcast_shapes(a.shape, b.shape))
        return self._binary("Add", a, b, point, shape, self.grids.get(point))

    def mul(self, a: Value, b: Value, point: str) -> Value:
        shape = tuple(np.broadcast_shapes(a.shape, b.shape))
        return self._binary("Mul", a, b, point, shape, self.grids.get(point))

    def matmul(self, a: Value, b: Value, point: str) -> Value:
        """The second factor keeps its width: QNN multiplies 16 by 8 bits. Its low part is multiplied for itself."""
        grid, shape = self.grids.get(point), (*a.shape[:-1], b.shape[-1])
        a = self._at(a, grid)
        product = self._emit("MatMul", [a.name, b.name], f"{point}.high" if b.low else point, shape, grid)
        if b.low is None or a.grid is None or b.low.grid is None:
            return product
        end = a.shape[-1] * max(-a.grid.lo, a.grid.hi) * max(-b.low.grid.lo, b.low.grid.hi)
        low = self._emit("MatMul", [a.name, b.low.name], f"{point}.low", shape, Grid(-end, end, 16))
        return self._binary("Add", product, low, point, shape, grid)

    def sigmoid(self, x: Value, point: str) -> Value:
        return self._emit("Sigmoid", [self._at(x, UNIT).name], point, x.shape, x.grid and UNIT)

    def softmax(self, x: Value, point: str) -> Value:
        return self._emit("Softmax", [self._at(x, UNIT).name], point, x.shape, x.grid and UNIT, axis=-1)

    def masked(self, scores: Value, point: str) -> Value:
        """The mask is added. A sum below the grid becomes its least value, which softmax takes for nothing."""
        if self._mask is None:
            self._mask = self._make_mask()
        grid = self.grids.get(point)
        return self._binary("Add", scores, self._mask, point, scores.shape, grid)

    def _make_mask(self) -> Value:
        """[1, 1, S, C]: 0 where a token may look, -depth after itself, before the window, before the text."""
        tokens, context = self.tokens, self.context
        spans = [g.hi - g.lo for name, g in self.grids.items() if name.endswith((".scores", ".masked"))]
        depth = max(spans, default=1e4) + decoder.MARGIN
        grid = Grid(-depth, 0.0, 16) if self.grids else None
        text = self.nodes.input("attention_mask", "int32", (1, context))
        choice = self.table("mask.choice", np.array([-depth, 0.0], np.float32), grid)
        row = self._emit("Gather", [choice.name, text], "mask.text", (1, context), grid, axis=0)
        row = self.reshape(row, (1, 1, 1, context))
        places = np.where(decoder.allowed(tokens, context, self._window), np.float32(0), np.float32(-depth))
        return self._binary("Add", row, self.table("mask.places", places[None, None], grid), "mask",
                            (1, 1, tokens, context), grid)  # fmt: skip

    def rotation(self, kind: str) -> tuple[Value, Value]:
        if kind not in self._rotations:
            self._rotations[kind] = (self._turn("cos", self._tables[0], kind), self._turn("sin", self._tables[1], kind))
        return self._rotations[kind]

    def _turn(self, name: str, table: np.ndarray, kind: str) -> Value:
        """Rows of a table for the tokens' positions. D^-1/2 of the query's is in its scale: the codes are the same."""
        head = table.shape[1]
        factor = head**-0.5 if kind == "query" else 1.0
        end = float(np.abs(table).max())
        grid = Grid(-end * factor, end * factor, 16) if self.grids else None
        whole = self.table(f"{name}.{kind}", table * np.float32(factor), grid)
        if not self._rotations and name == "cos":
            self.nodes.input("position_ids", "int32", (1, self.tokens))
        shape = (1, self.tokens, head)
        rows = self._emit("Gather", [whole.name, "position_ids"], f"{name}.{kind}.rows", shape, grid, axis=0)
        return self.reshape(rows, (1, 1, self.tokens, head))

    def centred(self, keys: Value, point: str) -> Value:
        if point not in self.centres:
            return keys
        less = -self.centres[point][:, None, None]
        return self.add(keys, self.table(f"{point}.less", less, Grid(float(less.min()), float(less.max()), 16)), point)

    def cached(self, x: Value, layer: int, kind: str, point: str) -> Value:
        """Rounded to 8 bits, the most that QNN takes as the second factor of a product, and what is left of it to
        8 bits more: the cache of `layer` and, as many layers further, that of its low part."""
        axis = 3 if kind == "key" else 2
        coarse = self.grids.get(f"{point}.8")
        high, whole = self._behind(x, f"{layer}.{kind}", axis, coarse)
        if coarse is None or not self.low_cache:
            return whole
        half = float(coarse.scale) / 2
        left = self._binary("Sub", x, high, f"{point}.left", x.shape, Grid(-half, half, 16))
        _, rest = self._behind(left, f"{layer + self.layers}.{kind}", axis, Grid(-half, half, 8))
        return replace(whole, low=rest)

    def _behind(self, x: Value, name: str, axis: int, grid: Grid | None) -> tuple[Value, Value]:
        """x on `grid`, as the cache of that name gets it, and behind what that holds."""
        dtype = "uint8" if grid else "float32"
        held = tuple(self.context - self.tokens if i == axis else n for i, n in enumerate(x.shape))
        past = self.nodes.input(f"past_key_values.{name}", dtype, held)
        present = f"present.{name}"
        self.nodes.output(present, dtype, x.shape)
        if grid is None:
            new = Value(self.nodes.node("Identity", [x.name], [present]), x.shape)
        else:
            new = self._rounded(x.name, f"{present}.float", x.shape, grid, codes=present)
            past = self._dequantize(past, f"{past}.float", grid)
        shape = tuple(self.context if i == axis else n for i, n in enumerate(x.shape))
        return new, self._emit("Concat", [past, new.name], f"{present}.all", shape, grid, axis=axis)

    def reshape(self, x: Value, shape: tuple[int, ...]) -> Value:
        known = -math.prod(shape)  # the product without the -1, if there is one
        full = tuple(math.prod(x.shape) // known if n == -1 else n for n in shape)
        if full == x.shape:
            return x
        return self._emit("Reshape", [x.name, self._integers(full)], self._new(x, "reshape"), full, x.grid)

    def transpose(self, x: Value, axes: tuple[int, ...]) -> Value:
        shape = tuple(x.shape[i] for i in axes)
        return self._emit("Transpose", [x.name], self._new(x, "transpose"), shape, x.grid, perm=list(axes))

    def cut(self, x: Value, start: int, stop: int) -> Value:
        ends = [self._integers((n,)) for n in (start, stop, len(x.shape) - 1)]
        shape = (*x.shape[:-1], stop - start)
        return self._emit("Slice", [x.name, *ends], self._new(x, f"{start}_{stop}"), shape, x.grid)

    def join(self, parts: Sequence[Value]) -> Value:
        shape = (*parts[0].shape[:-1], sum(part.shape[-1] for part in parts))
        names = [part.name for part in parts]
        return self._emit("Concat", names, self._new(parts[0], "join"), shape, parts[0].grid, axis=len(shape) - 1)

    def _new(self, x: Value, what: str) -> str:
        return f"{x.name}/{what}"
