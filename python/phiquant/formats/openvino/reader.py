"""Reads an OpenVINO folder back, for verify: the graph by xml, the bits by numpy.

Shares no code with the writer: what a constant means is told by the operations that follow it, from the constant to
the MatMul or Gather that uses the weight. N = rows, K = values of a row, G = groups of a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import PhiquantError
from ...spec import IQ4NL, Binary, Codebook, FixedPoint, Float, QuantSpec, Ternary
from ...spec import spec as read_spec
from ...untrusted import read_json, reader
from ..stored import Parts, StoredTensor
from .bits_reader import ELEMENTS, packed, stored, values
from .chain_reader import Chain, find_chain
from .fold_reader import fold
from .xml_reader import Constant, Graph, Layer

_SCALES = {"f32": "", "f16": "-f16", "bf16": "-bf16", "f8e8m0": "-e8m0", "f8e4m3": "-e4m3"}
_SUBS = {"f8e4m3": "e4m3", "i8": "int8", "u8": "uint8"}
_DTYPES = {
    "float32": "f32", "float16": "f16", "bfloat16": "bf16", "float8_e8m0fnu": "f8e8m0", "float8_e4m3fn": "f8e4m3",
    "int8": "i8", "uint8": "u8",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class GraphTensor(StoredTensor):
    """A weight of the graph. stored_as: the element type of its constant."""

    graph: Graph
    chain: Chain

    @property
    def spec(self) -> QuantSpec | None:
        """See StoredTensor.spec. The rule by which a scale was chosen is not in the file."""
        chain = self.chain
        if not chain.coded:
            return None
        if chain.scale is None:
            assert chain.codebook is not None
            levels, grain = chain.codebook.shape[-1], self._codebook_grain()
            return read_spec(f"codebook{levels}-{grain}{_SCALES[chain.codebook.type]}")
        element, kind = self._element()
        upper, levels_text = chain.super_scale, ""
        if upper is not None:
            block = "tensor" if upper.shape[0] == 1 else "channel" if upper.shape[1] == 1 else ""
            levels_text = f"-{_SUBS[chain.scale.type]}/{block or self.shape[1] // upper.shape[1]}"
        scale_type = (upper or chain.scale).type
        if kind == "signmax" and (scale_type == "f8e8m0" or levels_text.startswith(("-u", "-e"))):
            kind = "sym"
        size = chain.codes.shape[2] if len(chain.codes.shape) == 3 else 0
        grain = f"g{size}" if size else "tensor" if chain.scale.shape[0] == 1 else "channel"
        return read_spec(f"{element}-{grain}-{kind}{_SCALES[scale_type]}{levels_text}")

    def parts(self, spec: QuantSpec, rows: slice | None = None) -> Parts:
        """See StoredTensor.parts."""
        rows, chain, element = rows or slice(0, self.shape[0]), self.chain, spec.element
        codes, zero, shift = self._codes(rows), self._zero(rows), 0
        if chain.codes.type[0] == "u" and element.signed:  # stored shifted
            shift = 1 if isinstance(element, Ternary) else 1 << chain.codes.bits - 1
        if isinstance(element, Binary):
            if (codes & 1).any():
                raise PhiquantError(f"{self.name}: a code stands for 0, which binary weights do not have")
            codes = codes >> 1
        codes = (codes.astype(np.int16) - shift).astype(np.int8 if element.signed else np.uint8)
        result = {"codes": codes}
        if spec.offset == "zero_point":
            if zero is None or zero.shape != spec.scale_shape(codes.shape):
                raise self._differs(spec)
            result["zero_points"] = zero.astype(np.int32) - np.int32(shift)
        elif zero is not None and (zero.size != 1 or zero.flat[0] != (1 if isinstance(element, Binary) else shift)):
            raise self._differs(spec)
        if isinstance(element, Codebook):
            return result | {"codebook": self._codebook_of(spec, rows)}
        return result | self._scales(spec, rows)

    def raw(self, rows: slice | None = None) -> np.ndarray:
        """See StoredTensor.raw."""
        if self.chain.coded:
            raise PhiquantError(f"{self.name}: the file has codes ({self.stored_as}), not floats")
        return self._numbers(self.chain.codes, rows or slice(0, self.shape[0]))

    def values(self, rows: slice | None = None) -> np.ndarray:
        """(code - zero point) * scale, or the level of each code, in float32."""
        rows, chain = rows or slice(0, self.shape[0]), self.chain
        if not chain.coded:
            return values(self.raw(rows), chain.codes.type)
        codes = self._codes(rows)
        result = values(codes, chain.codes.type) if chain.codebook is None else self._look_up(codes, rows)
        if chain.scale is None:
            return result
        scale = values(self._numbers(chain.scale, rows), chain.scale.type)
        if chain.super_scale is not None:
            scale = scale * values(self._numbers(chain.super_scale, rows), chain.super_scale.type)
        scale = scale.reshape(scale.shape[0], -1, 1)
        blocks = result.reshape(len(result), scale.shape[1], -1)
        if (zero := self._zero(rows)) is not None:
            blocks = blocks - zero.astype(np.float32)[..., None]
        return np.asarray((blocks * scale).reshape(result.shape), np.float32)

    def reference(self, rows: slice | None = None) -> np.ndarray:
        """As OpenVINO folds the constants and the operations after them."""
        rows = rows or slice(0, self.shape[0])
        return fold(self.chain, lambda constant: self._bytes(constant, rows), rows.stop - rows.start)

    def row_slices(self) -> Iterator[slice]:
        """See StoredTensor.row_slices; rows that share a codebook stay together."""
        blocks = math.prod(self.chain.codebook.shape[:-1]) if self.chain.codebook else 1
        return iter([slice(0, self.shape[0])]) if 1 < blocks < self.shape[0] else super().row_slices()

    def _element(self) -> tuple[str, str]:
        """(element, kind) of codes with scales."""
        codes, zero, scale, codebook = (
            self.chain.codes, self.chain.zero_point, self.chain.scale, self.chain.codebook,
        )  # fmt: skip
        assert scale is not None
        if codebook is not None:
            levels = stored(self.graph.read(codebook), codebook.type, codebook.bits)
            for element in (Float("e1m2"), Float("e3m0"), IQ4NL()):
                if np.array_equal(levels, np.array(element.levels, np.float32)):
                    return str(element), "sym"
            raise PhiquantError(f"{self.name}: its table of levels with scales is none that phiquant knows")
        if codes.type in ELEMENTS:
            return str(ELEMENTS[codes.type]), "sym"
        if zero is None:
            return f"{'u' if codes.type[0] == 'u' else ''}int{codes.bits}", "signmax" if codes.bits == 4 else "sym"
        if codes.type == "u2" and math.prod(zero.shape) == 1 < math.prod(scale.shape):  # it only shifts
            number = values(stored(self.graph.read(zero), zero.type, zero.bits), zero.type)[0]
            return ("ternary", "sym") if number == 1 else ("int2", "signmax")
        return f"{'u' if codes.type[0] == 'u' else ''}int{codes.bits}", "asym"

    def _codes(self, rows: slice) -> np.ndarray:
        """The stored codes of some rows, int8 or uint8 [rows, K]."""
        codes = self.chain.codes
        return stored(self._bytes(codes, rows), codes.type, codes.bits).reshape(rows.stop - rows.start, self.shape[1])

    def _zero(self, rows: slice) -> np.ndarray | None:
        """Zero points of some rows, whole numbers [rows or 1, G]."""
        zero = self.chain.zero_point
        if zero is None:
            return None
        count = math.prod(zero.shape)
        numbers = stored(self.graph.read(zero), zero.type, zero.bits)[:count].reshape(zero.shape[0], -1)
        numbers = numbers if zero.shape[0] == 1 else numbers[rows]
        return values(numbers, zero.type).astype(np.int16) if zero.type == "f8e4m3" else numbers.astype(np.int16)

    def _scales(self, spec: QuantSpec, rows: slice) -> Parts:
        shape = (rows.stop - rows.start, self.shape[1])
        wanted: dict[str, tuple[Constant | None, str, tuple[int, ...]]] = {}
        wanted["scales"] = (self.chain.scale, spec.scale_dtype, spec.scale_shape(shape))
        if isinstance(spec.element, FixedPoint):
            scale = self.chain.scale
            if scale is None or scale.shape != (1, 1) or scale.type != "f32":
                raise self._differs(spec)
            if self._numbers(scale, rows).item() != spec.element.step:
                raise self._differs(spec)
            return {}
        if spec.two_level is not None:
            wanted["scales"] = (self.chain.scale, spec.two_level.dtype, spec.scale_shape(shape))
            wanted["super_scales"] = (self.chain.super_scale, spec.scale_dtype, spec.super_shape(shape))
        elif self.chain.super_scale is not None:
            raise self._differs(spec)
        result = {}
        for name, (constant, dtype, size) in wanted.items():
            if constant is None or constant.type != _DTYPES[dtype]:
                raise self._differs(spec)
            numbers = self._numbers(constant, rows)
            if numbers.size != math.prod(size):
                raise self._differs(spec)
            result[name] = numbers.reshape(size)
        return result

    def _codebook_of(self, spec: QuantSpec, rows: slice) -> np.ndarray:
        codebook, size = self.chain.codebook, spec.element.qmax + 1
        if codebook is None or self.chain.scale is not None or codebook.type != _DTYPES[spec.scale_dtype]:
            raise self._differs(spec)
        if codebook.shape[-1] != size or math.prod(codebook.shape[:-1]) != math.prod(spec.scale_shape(self.shape)):
            raise self._differs(spec)
        return self._numbers(codebook, rows).reshape(-1, size)

    def _look_up(self, codes: np.ndarray, rows: slice) -> np.ndarray:
        codebook = self.chain.codebook
        assert codebook is not None
        levels = values(self._numbers(codebook, rows), codebook.type).reshape(-1, codebook.shape[-1])
        if codes.size and int(codes.max()) >= levels.shape[1]:
            raise PhiquantError(f"{self.name}: a code of {int(codes.max())} is none of its {levels.shape[1]} levels")
        blocks = codes.reshape(len(levels), -1).astype(np.int64)
        return np.asarray(np.take_along_axis(levels, blocks, axis=1).reshape(codes.shape))

    def _numbers(self, constant: Constant, rows: slice) -> np.ndarray:
        """The stored numbers of a constant of whole bytes, for some rows of the weight."""
        numbers = stored(self._bytes(constant, rows), constant.type, constant.bits)
        return numbers.reshape(-1, *constant.shape[1:])

    def _bytes(self, constant: Constant, rows: slice) -> bytes:
        """The bytes of some rows of the weight; all, where rows share them."""
        first, read = constant.shape[0], self.graph.read
        if constant is self.chain.codes:  # a row of the weight is a whole number of bytes, whatever the shape
            row = constant.size // self.shape[0]
            return read(constant, rows.start * row, rows.stop * row)
        if len(constant.shape) < 2 or first < self.shape[0] or (rows.start, rows.stop) == (0, self.shape[0]):
            return read(constant)
        each = first // self.shape[0]
        blocks = slice(rows.start * each, rows.stop * each)
        if constant.bits < 8:
            count = math.prod(constant.shape)
            codes = stored(read(constant), constant.type, constant.bits)[:count].reshape(first, -1)
            return packed(codes[blocks], constant.bits)
        row = constant.size // first
        return read(constant, blocks.start * row, blocks.stop * row)

    def _codebook_grain(self) -> str:
        assert self.chain.codebook is not None
        blocks, rows = math.prod(self.chain.codebook.shape[:-1]), self.shape[0]
        if blocks == 1:
            return "tensor"
        return f"rows{rows // blocks}" if blocks <= rows else f"g{self.shape[1] * rows // blocks}"

    def _differs(self, spec: QuantSpec) -> PhiquantError:
        return PhiquantError(f"{self.name}: the file has codes on the grid {self.spec}, which is not {spec}")


@reader
def read(folder: str | Path) -> dict[str, GraphTensor]:
    """Every weight by its Hugging Face name. PhiquantError for a folder that is damaged."""
    folder = Path(folder)
    graph = Graph(folder / "openvino_model.xml", folder / "openvino_model.bin")
    result: dict[str, GraphTensor] = {}
    for layer in graph.layers.values():
        if layer.constant is not None and layer.name.endswith(".weight"):
            if layer.name in result:
                graph.fail(layer, "has the name of another weight")
            result[layer.name] = _tensor(graph, layer)
    return result


@reader
def read_config(folder: str | Path) -> dict[str, Any]:
    """The config.json of the model in the folder."""
    path = Path(folder) / "config.json"
    config = read_json(path)
    return {key: value for key, value in config.items() if key not in ("quantization_config", "dtype")}


def _tensor(graph: Graph, layer: Layer) -> GraphTensor:
    chain = find_chain(graph, layer)
    tensor = GraphTensor(layer.name, chain.codes.type, chain.shape, graph, chain)
    try:
        tensor.spec  # noqa: B018 (whether the constants make a grid)
    except PhiquantError:
        raise
    except ValueError as error:
        graph.fail(layer, f"stands for no grid of phiquant: {error}")
    return tensor
