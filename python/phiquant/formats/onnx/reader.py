"""Reads an ONNX folder back: the graph by the package onnx, the bits by numpy. Shares no code with the writer.

Which grid a tensor is on is told by the node that reads it. N = rows, K = values of a row, B = blocks of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import PhiquantError
from ...extras import need
from ...spec import Int, PerChannel, PerGroup, QuantSpec
from ...untrusted import read_json, reader
from ..stored import Parts, StoredTensor, once
from .model_reader import Model, Stored, read_model

FILE = "model.onnx"
_DTYPES = {"float": "<f4", "float16": "<f2", "bfloat16": "<u2"}


@dataclass(frozen=True, eq=False)
class OnnxTensor(StoredTensor):
    """A weight of the model, decoded on demand.

    tensors: those that hold it, by "codes", "scales", "zero_points", or "values". columns: whether they hold the
    transposed matrix. bits, block: of the codes, and of the values that share a scale (0: all of a row).
    signed: whether codes are two's complement; unsigned ones without zero points mean code - 2^(bits-1).
    """

    tensors: Mapping[str, Stored]
    columns: bool = False
    bits: int = 0
    block: int = 0
    signed: bool = False

    @property
    def spec(self) -> QuantSpec | None:
        if "values" in self.tensors:
            return None
        grain = PerGroup(self.block) if self.block else PerChannel(0)
        if "zero_points" in self.tensors:
            return QuantSpec(Int(self.bits, signed=self.signed), grain, "zero_point")
        return QuantSpec(Int(self.bits), grain)

    def parts(self, spec: QuantSpec, rows: slice | None = None) -> Parts:
        rows = self._rows(rows)
        codes, points = self._codes(rows), self._zero_points(rows)
        if (points is None) != (spec.offset == "none") or spec.offset == "minimum":
            found = "no zero points" if points is None else "zero points"
            raise PhiquantError(f"{self.name}: the file has {found} ({self.stored_as}), so it holds no {spec}")
        middle = 0 if self.signed or not spec.element.signed else 1 << (self.bits - 1)
        if self.signed and not spec.element.signed:
            raise PhiquantError(f"{self.name}: the file has signed codes, {spec} has none")
        shape = spec.scale_shape(codes.shape)
        kind = np.int8 if spec.element.signed else np.uint8
        result = {
            "codes": (codes.view(np.uint8) - np.uint8(middle)).view(kind),  # modulo 256
            "scales": self._narrowed(once(self.name, self._scales(rows), shape), spec),
        }
        if points is not None:
            result["zero_points"] = once(self.name, points.astype(np.int32) - middle, shape)
        return result

    def raw(self, rows: slice | None = None) -> np.ndarray:
        stored = self.tensors["values"]
        return np.asarray(stored.array(_DTYPES[stored.type])[self._rows(rows)])

    def values(self, rows: slice | None = None) -> np.ndarray:
        if self.spec is None:
            raw = self.raw(rows)
            if raw.dtype == np.uint16:
                return (raw.astype(np.uint32) << 16).view(np.float32)
            return raw.astype(np.float32)
        rows = self._rows(rows)
        codes, points, scales = self._codes(rows), self._zero_points(rows), self._scales(rows)
        if points is None:
            points = np.full(scales.shape, 0 if self.signed else 1 << (self.bits - 1), np.int16)
        blocks = codes.reshape(*scales.shape, -1).astype(np.int16) - points.astype(np.int16)[..., None]
        return np.asarray((blocks.astype(np.float32) * scales[..., None]).reshape(codes.shape))

    def reference(self, rows: slice | None = None) -> np.ndarray:
        """By the reference implementation of DequantizeLinear in the package onnx, whose code order is the same."""
        helper = need("onnx", extra="onnx").numpy_helper
        rows = self._rows(rows)
        if self.spec is None:
            stored = self.tensors["values"]
            return np.asarray(helper.to_array(_proto(stored.type, self.raw(rows)))).astype(np.float32)
        type = f"{'int' if self.signed else 'uint'}{self.bits}"
        scales, points = self._scales(rows), self._zero_points(rows)
        if points is None and not self.signed:
            points = np.full(scales.shape, 1 << (self.bits - 1), np.uint8)
        # Rows are decoded as rows: those of a transposed matrix are first copied out of it.
        codes = _pack(self._codes(rows), self.bits) if self.columns else self._packed(rows)
        shape = (rows.stop - rows.start, self.shape[1])
        inputs = [_proto(type, codes, shape), _proto("float", scales)]
        if points is not None:
            inputs.append(_proto(type, _pack(points.reshape(1, -1), self.bits), points.shape))
        return _dequantize_linear(inputs, self.block or self.shape[1])

    def release(self) -> None:
        for stored in self.tensors.values():
            stored.release()

    def _rows(self, rows: slice | None) -> slice:
        count = self.shape[0] if self.shape else 1
        return slice(*(rows or slice(None)).indices(count)[:2])

    def _packed(self, rows: slice) -> np.ndarray:
        """The bytes of some rows, [n, bytes of a row]."""
        return self.tensors["codes"].data.reshape(self.shape[0], -1)[rows]

    def _codes(self, rows: slice) -> np.ndarray:
        """As stored: int8 or uint8 [n, K]."""
        stored, (count, width) = self.tensors["codes"], self.shape
        if not self.columns:
            codes = _unpack(self._packed(rows), self.bits, self.signed)
        elif count * self.bits % 8 == 0:
            per_byte = 8 // self.bits
            first, last = rows.start // per_byte, -(-rows.stop // per_byte)
            piece = _unpack(stored.data.reshape(width, -1)[:, first:last], self.bits, self.signed)
            codes = piece[:, rows.start - first * per_byte :][:, : rows.stop - rows.start].T
        else:  # rows do not begin at bytes
            codes = (
                _unpack(stored.data[None], self.bits, self.signed)[0, : count * width].reshape(width, count)[:, rows].T
            )
        return codes

    def _parameter(self, part: str, rows: slice) -> np.ndarray:
        """[n, B] of some rows."""
        stored = self.tensors[part]
        if part == "scales":
            values = stored.array("<f4")
        else:
            shape = (stored.shape[0], -1) if not self.columns else (1, -1)
            values = _unpack(stored.data.reshape(shape), self.bits, self.signed)
            blocks = self.shape[1] // self.block
            values = values[0, : blocks * self.shape[0]].reshape(blocks, -1) if self.columns else values[:, :blocks]
        values = values[:, None] if values.ndim == 1 else values.T if self.columns else values
        return np.ascontiguousarray(values[rows])

    def _scales(self, rows: slice) -> np.ndarray:
        return self._parameter("scales", rows)

    def _zero_points(self, rows: slice) -> np.ndarray | None:
        return self._parameter("zero_points", rows) if "zero_points" in self.tensors else None

    def _narrowed(self, scales: np.ndarray, spec: QuantSpec) -> np.ndarray:
        """float32 in the dtype of `spec`, which must hold the same values."""
        if spec.scale_dtype == "float32":
            return scales
        if spec.scale_dtype == "float16":
            with np.errstate(over="ignore"):
                narrow = scales.astype(np.float16)
            same = narrow.astype(np.float32) == scales
        elif spec.scale_dtype == "bfloat16":
            bits = scales.view(np.uint32)
            narrow, same = (bits >> 16).astype(np.uint16), bits & 0xFFFF == 0
        else:
            raise PhiquantError(f"{self.name}: the file has float scales, {spec} has {spec.scale_dtype}")
        if not np.all(same):
            row, group = (int(i) for i in np.argwhere(~same)[0])
            raise PhiquantError(
                f"{self.name}: row {row}, group {group}: the scale {scales[row, group]} is no {spec.scale_dtype}"
            )
        return narrow


@reader
def read(path: str | Path) -> dict[str, StoredTensor]:
    """Every weight by its Hugging Face name. PhiquantError for a folder that is damaged or not an export."""
    model = read_model(_file(path))
    users: dict[str, Any] = {}
    for node in model.nodes:
        place = _READS.get(node.op_type)
        if place is not None and len(node.input) > place:
            users.setdefault(node.input[place], node)
    result: dict[str, StoredTensor] = {}
    for name, stored in model.tensors.items():
        if name.endswith(".weight"):
            if stored.type not in _DTYPES:
                raise PhiquantError(f"{model.path}: {name} is of type {stored.type}, not a float")
            dtype = {"float": "float32"}.get(stored.type, stored.type)
            result[name] = OnnxTensor(name, dtype, stored.shape, {"values": stored})
        elif name.endswith(".weight.codes"):
            user = users.get(name) or users.get(_reshaped(model, name))
            if user is None:
                raise PhiquantError(f"{model.path}: no node reads the codes {name}")
            weight = name.removesuffix(".codes")
            result[weight] = _quantized(model, weight, user)
    if not result:
        raise PhiquantError(f"{model.path} has no weights under Hugging Face names, so phiquant did not write it")
    return result


@reader
def read_config(path: str | Path) -> dict[str, Any]:
    """The config.json of the folder. PhiquantError if there is none, or it is damaged."""
    return read_json(_file(path).with_name("config.json"))


def _file(path: str | Path) -> Path:
    path = Path(path)
    return path if path.suffix == ".onnx" else path / FILE


# The input at which an operator reads codes.
_READS = {"MatMulNBits": 1, "GatherBlockQuantized": 0, "DequantizeLinear": 0, "MatMulInteger": 1}


def _reshaped(model: Model, name: str) -> str:
    """The value that a Reshape makes of `name`, or ""."""
    return next((node.output[0] for node in model.nodes if node.op_type == "Reshape" and node.input[0] == name), "")


def _quantized(model: Model, name: str, user: Any) -> StoredTensor:
    """The weight `name`, whose codes the node `user` reads. PhiquantError if shapes do not fit each other."""
    tensors = {part: model.tensors[f"{name}.{part}"] for part in _PARTS if f"{name}.{part}" in model.tensors}
    codes, attributes = tensors["codes"], {a.name: a.i for a in user.attribute}
    reading = _of_rows if user.op_type in ("MatMulNBits", "GatherBlockQuantized") else _of_columns
    try:
        tensor = reading(name, user, tensors, codes, attributes)
        _check_shapes(tensor)
    except (KeyError, IndexError, ValueError) as error:
        found = ", ".join(f"{part} {stored.type} {list(stored.shape)}" for part, stored in tensors.items())
        raise PhiquantError(
            f"{model.path}: {name}: its tensors {found} do not fit the node {user.op_type} that reads them: {error}"
        ) from error
    return tensor


_PARTS = ("codes", "scales", "zero_points")


def _of_rows(name: str, user: Any, tensors: Any, codes: Stored, attributes: Mapping[str, int]) -> OnnxTensor:
    bits, block = attributes["bits"], attributes["block_size"]
    if bits not in (2, 4, 8) or block < 1 or codes.type != "uint8":
        raise ValueError(f"bits {bits}, block_size {block}")
    shape = (codes.shape[0], codes.shape[1] * block)
    if (attributes.get("N", shape[0]), attributes.get("K", shape[1])) != shape:
        raise ValueError(f"N {attributes.get('N')}, K {attributes.get('K')}")
    if codes.shape[2] * 8 != block * bits:
        raise ValueError(f"block_size {block} of {bits} bits")
    return OnnxTensor(name, f"{user.op_type.replace('GatherBlockQuantized', 'MatMulNBits')}{bits}", shape, tensors,
                      bits=bits, block=block)  # fmt: skip


def _of_columns(name: str, user: Any, tensors: Any, codes: Stored, attributes: Mapping[str, int]) -> OnnxTensor:
    kinds = {"int2": 2, "uint2": 2, "int4": 4, "uint4": 4, "int8": 8, "uint8": 8}
    width, count = codes.shape
    block = attributes["block_size"] if user.op_type == "DequantizeLinear" else 0
    if block < 0 or (block and (width % block or attributes.get("axis") != 0)):
        raise ValueError(f"block_size {block}, axis {attributes.get('axis')}")
    stored_as = codes.type if block else "MatMulInteger"
    return OnnxTensor(name, stored_as, (count, width), tensors, True, kinds[codes.type], block, codes.type[0] == "i")


def _check_shapes(tensor: OnnxTensor) -> None:
    """Shapes of the parameters against those of the codes. ValueError says which does not fit."""
    count, width = tensor.shape
    blocks = width // tensor.block if tensor.block else 1
    scales = ((blocks, count) if tensor.block else (count,)) if tensor.columns else (count, blocks)
    packed = (blocks, count) if tensor.columns else (count, (blocks * tensor.bits + 7) // 8)
    kind = tensor.tensors["codes"].type
    for part, type, shape in (("scales", "float", scales), ("zero_points", kind, packed)):
        stored = tensor.tensors.get(part)
        if stored is None and part == "scales":
            raise ValueError("there are no scales")
        if stored is not None and (stored.shape != shape or stored.type != type):
            raise ValueError(f"{part} would be {type} {list(shape)}")
    if tensor.columns and not tensor.signed and "zero_points" not in tensor.tensors:
        raise ValueError("unsigned codes without zero points")


def _unpack(packed: np.ndarray, bits: int, signed: bool) -> np.ndarray:
    """uint8 [n, bytes] -> codes uint8 or int8 [n, bytes * 8 / bits], the first in the lowest bits."""
    per_byte = 8 // bits
    codes = np.arange(256)[:, None] >> np.arange(0, 8, bits) & ((1 << bits) - 1)
    if signed:
        codes = (codes ^ 1 << (bits - 1)) - (1 << (bits - 1))
    table = codes.astype(np.int8 if signed else np.uint8)  # the codes in each of the 256 bytes
    return table.view(f"u{per_byte}")[:, 0][packed].view(table.dtype)


def _pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes of [n, m] in a row, side by side, for the package onnx."""
    flat = np.ascontiguousarray(codes).view(np.uint8).reshape(-1) & np.uint8((1 << bits) - 1)
    per_byte = 8 // bits
    flat = np.pad(flat, (0, -len(flat) % per_byte)).reshape(-1, per_byte)
    return np.bitwise_or.reduce(flat << np.arange(0, 8, bits, dtype=np.uint8), axis=1).astype(np.uint8)


def _proto(type: str, raw: np.ndarray, shape: tuple[int, ...] | None = None) -> Any:
    onnx = need("onnx", extra="onnx")
    kind = onnx.TensorProto.DataType.Value(type.upper())
    data = np.ascontiguousarray(raw).tobytes()
    return onnx.TensorProto(data_type=kind, dims=raw.shape if shape is None else shape, raw_data=data)


def _dequantize_linear(inputs: list[Any], block: int) -> np.ndarray:
    """Rows [n, K] of codes with scales and zero points [n, B], decoded by onnx's reference implementation."""
    onnx = need("onnx", extra="onnx")
    need("onnx.reference", extra="onnx")
    helper, names = onnx.helper, ["codes", "scales", "zero_points"][: len(inputs)]
    for name, proto in zip(names, inputs, strict=True):
        proto.name = name
    node = helper.make_node("DequantizeLinear", names, ["values"], axis=1, block_size=block)
    output = helper.make_tensor_value_info("values", onnx.TensorProto.FLOAT, None)
    graph = helper.make_graph([node], "decode", [], [output], inputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 25)], ir_version=13)
    return np.asarray(onnx.reference.ReferenceEvaluator(model).run(None, {})[0], np.float32)
