"""Reads a QNN export back, for verify: the graphs by onnx, the bytes by numpy. No code of the writer.

What a stage names <module>.weight lies in the data file, rows behind rows; q, k, v, gate and up are rows of one
tensor where their codes lie side by side. N = rows, K = values of a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import PhiquantError
from ...extras import need
from ...spec import QuantSpec
from ...spec import spec as read_spec
from ...untrusted import read_json, reader
from ..receipt import is_plain_name
from ..stored import Parts, StoredTensor

_BITS = {"INT8": 8, "INT4": 4, "UINT16": 16, "FLOAT": 32, "FLOAT16": 16, "BFLOAT16": 16}
_FLOATS = {"FLOAT": "<f4", "FLOAT16": "<f2", "BFLOAT16": "<u2", "UINT16": "<u2"}
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_MOST_BYTES = 1 << 30  # of a graph without its weights


@dataclass(frozen=True)
class _Piece:
    """What a graph says of a weight: type, shape, first byte of its codes and of its scales; the grid of a norm.

    narrow: its products are rounded to 8 bits.
    """

    type: str
    shape: tuple[int, ...]
    offset: int
    scale: int | None = None
    grid: tuple[float, int] | None = None
    narrow: bool = False

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _BITS[self.type] // 8


@dataclass(frozen=True, eq=False)
class QnnTensor(StoredTensor):
    """A tensor of the data file. data: the mapped file."""

    data: np.ndarray
    piece: _Piece

    @property
    def spec(self) -> QuantSpec | None:
        return {"INT8": read_spec("int8-channel-sym"), "INT4": read_spec("int4-channel-sym")}.get(self.piece.type)

    def parts(self, spec: QuantSpec, rows: slice | None = None) -> Parts:
        if spec != self.spec:
            raise PhiquantError(f"{self.name}: the file has {self.spec}, not {spec}")
        return {"codes": self._codes(rows), "scales": self._scales(rows)}

    def raw(self, rows: slice | None = None) -> np.ndarray:
        return self._rows(rows).view(_FLOATS[self.piece.type]).reshape(-1, *self.shape[1:])

    def values(self, rows: slice | None = None) -> np.ndarray:
        if self.spec is not None:
            return self._codes(rows).astype(np.float32) * self._scales(rows)
        raw = self.raw(rows)
        if self.piece.grid is not None:
            scale, zero = self.piece.grid
            return (raw.astype(np.int32) - zero).astype(np.float32) * np.float32(scale)
        if self.piece.type == "BFLOAT16":
            return (raw.astype(np.uint32) << 16).view(np.float32)
        return np.asarray(raw, np.float32)

    def reference(self, rows: slice | None = None) -> np.ndarray:
        """As onnx's own DequantizeLinear decodes the bytes."""
        if self.spec is None:
            return self.values(rows)
        helper, numpy_helper = (need(f"onnx.{part}", extra="qnn") for part in ("helper", "numpy_helper"))
        evaluator = need("onnx.reference", extra="qnn").ReferenceEvaluator
        shape = (len(self._scales(rows)), *self.shape[1:])
        kind = need("onnx", extra="qnn").TensorProto.DataType.Value(self.piece.type)
        codes = helper.make_tensor("codes", kind, shape, self._rows(rows).tobytes(), raw=True)
        scales = numpy_helper.from_array(self._scales(rows)[:, 0].copy(), "scales")
        node = helper.make_node("DequantizeLinear", ["codes", "scales"], ["values"], axis=0)
        output = helper.make_tensor_value_info("values", 1, shape)
        graph = helper.make_graph([node], "decode", [], [output], [codes, scales])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
        return np.asarray(evaluator(model).run(None, {})[0], np.float32)

    def _rows(self, rows: slice | None) -> np.ndarray:
        """The bytes of some rows."""
        start, stop, _ = (rows or slice(None)).indices(self.shape[0])
        size = self.piece.nbytes // self.shape[0]
        return self.data[self.piece.offset + start * size : self.piece.offset + max(start, stop) * size]

    def _codes(self, rows: slice | None) -> np.ndarray:
        stored = self._rows(rows)
        if self.piece.type == "INT4":
            low, high = (stored << 4).view(np.int8) >> 4, stored.view(np.int8) >> 4
            stored = np.stack([low, high], -1)
        return stored.view(np.int8).reshape(-1, *self.shape[1:])

    def _scales(self, rows: slice | None) -> np.ndarray:
        assert self.piece.scale is not None
        bytes_ = self.data[self.piece.scale : self.piece.scale + 4 * self.shape[0]]
        return bytes_.view("<f4")[rows or slice(None), None]


@reader
def read(path: str | Path) -> dict[str, StoredTensor]:
    """Every tensor by its Hugging Face name. PhiquantError for files that are damaged or do not fit together."""
    folder = Path(path)
    names = sorted(file.name for file in folder.glob("*.onnx"))
    if not names:
        raise PhiquantError(f"{folder} has no .onnx file; give the folder of a QNN export")
    pieces: dict[str, _Piece] = {}
    data: dict[str, np.ndarray] = {}
    for name in names:
        for module, piece in _pieces(folder, name, data):
            if pieces.setdefault(module, piece) != piece:
                raise PhiquantError(f"{folder / name}: {module} is not what the other stages take; export again")
    (mapped,) = data.values() if len(data) == 1 else (None,)
    if mapped is None:
        raise PhiquantError(f"{folder}: the stages name {len(data)} data files instead of one; export again")
    head, table = pieces.get("lm_head"), pieces.get("model.embed_tokens")
    if head and table and (head.type, head.shape, head.offset) == (table.type, table.shape, table.offset):
        pieces.pop("lm_head")  # tied: the same bytes
    found = _fused(pieces)
    return {f"{m}.weight": QnnTensor(f"{m}.weight", p.type, p.shape, mapped, p) for m, p in found.items()}


@reader
def read_config(path: str | Path) -> dict[str, Any]:
    """The Hugging Face config.json beside the graphs, and the tokens that they see at once: "static_context"."""
    folder = Path(path)
    mask = next((v for v in _parse(folder / "decode.onnx").graph.input if v.name == "attention_mask"), None)
    sizes = [int(d.dim_value) for d in mask.type.tensor_type.shape.dim] if mask else []
    if len(sizes) != 2 or sizes[1] < 1:
        raise PhiquantError(f"{folder / 'decode.onnx'} has no attention_mask of a fixed size; export again")
    return {**read_json(folder / "config.json"), "static_context": sizes[1]}


def _pieces(folder: Path, name: str, data: dict[str, np.ndarray]) -> Iterator[tuple[str, _Piece]]:
    """The weights that a graph names, each checked to lie inside its data file, which is mapped into `data`."""
    file = folder / name
    model = _parse(file)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    grids = {n.input[0]: n.input[1:3] for n in model.graph.node if n.op_type == "DequantizeLinear" and len(n.input) > 2}
    narrow = _narrow(model.graph, constants)
    for weight, tensor in constants.items():
        if not weight.endswith(".weight"):
            continue
        kind = _type(file, tensor)
        offset = _place(folder, file, tensor, _bytes(kind, tensor.dims), data)
        scale, grid = None, None
        if f"{weight}.scale" in constants:
            rows = int(tensor.dims[0])
            scale = _place(folder, file, constants[f"{weight}.scale"], 4 * rows, data)
        elif kind == "UINT16":
            grid = _grid(file, weight, [constants.get(name) for name in grids.get(weight, ())])
        if (scale is None) == (kind in ("INT8", "INT4")):
            raise PhiquantError(f"{file}: {weight} is {kind}, {'without' if scale is None else 'with'} scales")
        yield (
            weight.removesuffix(".weight"),
            _Piece(kind, tuple(int(n) for n in tensor.dims), offset, scale, grid, narrow),
        )


def _narrow(graph: Any, constants: dict[str, Any]) -> bool:
    """Whether the graph rounds what its linears give to 8 bits."""
    given = {node.output[0] for node in graph.node if node.op_type == "Gemm"}
    zeros = [
        n.input[2] for n in graph.node if n.op_type == "QuantizeLinear" and len(n.input) > 2 and n.input[0] in given
    ]
    uint8 = need("onnx", extra="qnn").TensorProto.UINT8
    return any(zero in constants and constants[zero].data_type == uint8 for zero in zeros)


def _parse(file: Path) -> Any:
    onnx = need("onnx", extra="qnn")
    if not file.is_file():
        raise PhiquantError(f"{file} is missing; export again")
    if file.stat().st_size > _MOST_BYTES:
        raise PhiquantError(f"{file} has {file.stat().st_size:,} bytes; no graph without its weights is that large")
    try:
        return onnx.ModelProto.FromString(file.read_bytes())
    except Exception as error:  # protobuf's DecodeError has no stable home
        raise PhiquantError(f"{file} is not a whole ONNX file: {error}; export again") from error


def _type(file: Path, tensor: Any) -> str:
    names = {v: k for k, v in need("onnx", extra="qnn").TensorProto.DataType.items()}
    kind = names.get(tensor.data_type, "?")
    dims = [int(n) for n in tensor.dims]
    if kind not in _BITS or not 1 <= len(dims) <= 2 or any(n < 1 for n in dims):
        raise PhiquantError(f"{file}: {tensor.name} is {kind} {dims}, which no QNN export holds")
    if kind == "INT4" and dims[-1] % 2:
        raise PhiquantError(f"{file}: {tensor.name} has rows of {dims[-1]} codes of 4 bits, which end inside a byte")
    return kind


def _bytes(kind: str, dims: Any) -> int:
    return math.prod(int(n) for n in dims) * _BITS[kind] // 8


def _place(folder: Path, file: Path, tensor: Any, length: int, data: dict[str, np.ndarray]) -> int:
    """The first byte of an external tensor of `length` bytes."""
    facts = {entry.key: entry.value for entry in tensor.external_data}
    location = facts.get("location")
    where = f"{file}: {tensor.name}"
    if not is_plain_name(location) or location is None:
        raise PhiquantError(f"{where} is not in a file beside the graph: {location!r}")
    try:
        offset, claimed = int(facts.get("offset", 0)), int(facts.get("length", length))
    except ValueError as error:
        raise PhiquantError(f"{where} has an offset or a length that is no number; export again") from error
    if location not in data:
        if not (folder / location).is_file() or (folder / location).is_symlink():
            raise PhiquantError(f"{where} is in {location}, which is missing; export again")
        data[location] = np.memmap(folder / location, np.uint8, "r")
    size = len(data[location])
    if claimed != length or offset < 0 or offset + length > size:
        raise PhiquantError(
            f"{where} is said to be the {claimed} bytes from {offset} of {location}; it takes {length}, and the file "
            f"has {size}. Export again"
        )
    return offset


def _grid(file: Path, weight: str, constants: list[Any]) -> tuple[float, int]:
    to_array = need("onnx.numpy_helper", extra="qnn").to_array
    try:
        scale, zero = (to_array(tensor) for tensor in constants)
        return float(scale), int(zero)
    except (ValueError, TypeError, AttributeError) as error:
        raise PhiquantError(f"{file}: {weight} has no scale and zero point of its own; export again") from error


def _fused(pieces: dict[str, _Piece]) -> dict[str, _Piece]:
    """The same weights, with the rows of a fused tensor put together again."""
    found: dict[str, _Piece] = {}
    for module, piece in pieces.items():
        parent, _, part = module.rpartition(".")
        whole = next((name for name, parts in _FUSED.items() if part in parts), None)
        if whole is None:
            found[module] = piece
            continue
        rows = [pieces.get(f"{parent}.{other}") for other in _FUSED[whole]]
        if any(other is None for other in rows):
            raise PhiquantError(f"{module} is there without the other parts of {whole}; export again")
        joined = _joined([other for other in rows if other is not None])
        found |= {module: piece} if joined is None else {f"{parent}.{whole}": joined}
    return found


def _joined(rows: list[_Piece]) -> _Piece | None:
    """Pieces side by side as one; None if they are tensors of their own."""
    first, count = rows[0], 0
    for piece in rows:
        place = first.offset + count * (first.nbytes // first.shape[0])
        scale = None if first.scale is None else first.scale + 4 * count
        if (piece.type, piece.shape[1:], piece.offset, piece.scale) != (first.type, first.shape[1:], place, scale):
            return None
        count += piece.shape[0]
    return replace(first, shape=(count, *first.shape[1:]))
