"""The .xml of an OpenVINO IR as layers and edges: read with limits, for files that nobody vouches for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from ...errors import PhiquantError

_MOST_BYTES, _MOST_ELEMENTS, _DEEPEST = 64 << 20, 1_000_000, 32  # a decoder of 40 layers: 3 MB, 60,000, 6
_BITS = {
    "boolean": 8, "u1": 1, "u2": 2, "u3": 3, "u4": 4, "u6": 6, "i4": 4, "nf4": 4, "f4e2m1": 4, "u8": 8, "i8": 8,
    "f8e4m3": 8, "f8e5m2": 8, "f8e8m0": 8, "f16": 16, "bf16": 16, "u16": 16, "i16": 16, "f32": 32, "u32": 32,
    "i32": 32, "f64": 64, "u64": 64, "i64": 64,
}  # fmt: skip


@dataclass(frozen=True)
class Constant:
    """Where the bytes of a constant lie in the .bin, and what they are."""

    layer: str
    type: str
    shape: tuple[int, ...]
    offset: int
    size: int

    @property
    def bits(self) -> int:
        return _BITS[self.type]


@dataclass(frozen=True, eq=False)
class Layer:
    """An operation. inputs: port -> the layer it comes from; consumers: (layer, its port)."""

    id: str
    name: str
    type: str
    data: Mapping[str, str]
    constant: Constant | None
    inputs: dict[int, Layer] = field(default_factory=dict)
    consumers: list[tuple[Layer, int]] = field(default_factory=list)


class Graph:
    """The layers of `xml`, whose constants lie in `bin`. PhiquantError names file, layer and cause."""

    def __init__(self, xml: Path, bin: Path) -> None:
        self.xml, self.bin = xml, bin
        self._end = _size(bin)
        root = _parse(xml)
        self.layers: dict[str, Layer] = {}
        for element in root.iterfind("./layers/layer"):
            layer = self._layer(element)
            if layer.id in self.layers:
                self.fail(layer, f"has the id {layer.id!r} of another layer")
            self.layers[layer.id] = layer
        self._refuse_overlaps()
        for edge in root.iterfind("./edges/edge"):
            self._connect(edge)

    def fail(self, layer: Layer | Constant, cause: str) -> NoReturn:
        """PhiquantError about a layer."""
        name = layer.layer if isinstance(layer, Constant) else layer.name
        raise PhiquantError(f"{self.xml}: layer {name[:200]!r} {cause}; export again")

    def read(self, constant: Constant, start: int = 0, stop: int | None = None) -> bytes:
        """Its bytes from `start` to `stop`."""
        stop = constant.size if stop is None else stop
        with open(self.bin, "rb") as file:
            file.seek(constant.offset + start)
            data = file.read(stop - start)
        if len(data) != stop - start:
            raise PhiquantError(f"{self.bin} became shorter while {constant.layer} was read")
        return data

    def _layer(self, element: Element) -> Layer:
        data = element.find("data")
        attributes = {} if data is None else dict(data.attrib)
        kind, name = element.get("type", ""), element.get("name", "")
        constant = self._constant(name, attributes) if kind == "Const" else None
        return Layer(element.get("id", ""), name, kind, attributes, constant)

    def _constant(self, name: str, data: Mapping[str, str]) -> Constant:
        shape = tuple(_integer(text) for text in data.get("shape", "").split(",") if text.strip())
        kind, offset, size = data.get("element_type", ""), _integer(data.get("offset")), _integer(data.get("size"))
        found = Constant(name, kind, shape, offset, size)
        if kind == "string":  # of tokenizers: packed with its own lengths
            return found
        if kind not in _BITS:
            self.fail(found, f"has the element type {kind[:40]!r}, which OpenVINO does not know")
        if min((offset, size, *shape)) < 0:
            self.fail(found, "has no whole numbers as offset, size and shape")
        if size != (math.prod(shape) * found.bits + 7) // 8:
            self.fail(found, f"has {size} bytes, which do not make {list(shape)[:8]} of {kind}")
        if offset + size > self._end:
            self.fail(found, f"ends at byte {offset + size}, but {self.bin.name} has {self._end}: it is cut off")
        return found

    def _refuse_overlaps(self) -> None:
        """Constants may share their bytes, all of them; not some."""
        places = {
            (c.offset, c.offset + c.size): c for layer in self.layers.values() if (c := layer.constant) and c.size
        }
        end, before = 0, ""
        for (start, stop), constant in sorted(places.items(), key=lambda item: item[0]):
            if start < end:
                self.fail(constant, f"overlaps {before!r} at byte {start} of {self.bin.name}")
            end, before = stop, constant.layer

    def _connect(self, edge: Element) -> None:
        source, target = (self.layers.get(edge.get(key, "")) for key in ("from-layer", "to-layer"))
        port = _integer(edge.get("to-port"))
        if source is None or target is None or port < 0:
            raise PhiquantError(f"{self.xml}: the edge {dict(edge.attrib)!s:.200} joins no two layers; export again")
        if port in target.inputs:
            self.fail(target, f"has two edges at its port {port}")
        target.inputs[port] = source
        source.consumers.append((target, port))


def _parse(path: Path) -> Element:
    """The root element. Entities and document types, with which a small file can become a large one, are refused."""
    if _size(path) > _MOST_BYTES:
        raise PhiquantError(f"{path} has {_size(path):,} bytes; no graph of a decoder is that large")
    builder, parser = TreeBuilder(), expat.ParserCreate()
    depth = count = 0

    def start(name: str, attributes: dict[str, str]) -> None:
        nonlocal depth, count
        depth, count = depth + 1, count + 1
        if depth > _DEEPEST or count > _MOST_ELEMENTS:
            raise PhiquantError(f"{path}: line {parser.CurrentLineNumber}: too many elements, or too deep")
        builder.start(name, attributes)

    def end(name: str) -> None:
        nonlocal depth
        depth -= 1
        builder.end(name)

    def refuse(*_: Any) -> NoReturn:
        raise PhiquantError(f"{path}: line {parser.CurrentLineNumber}: an IR has no document type and no entities")

    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.StartDoctypeDeclHandler = parser.EntityDeclHandler = refuse
    try:
        parser.Parse(path.read_bytes(), True)
        root = builder.close()
    except (expat.ExpatError, AssertionError, ValueError, LookupError) as error:
        if isinstance(error, PhiquantError):
            raise
        raise PhiquantError(f"{path} is not whole XML: {error}; export again") from error
    if root.tag != "net":
        raise PhiquantError(f"{path}: its root is <{root.tag[:40]}>, that of an OpenVINO IR is <net>")
    return root


def _size(path: Path) -> int:
    try:
        if path.exists() and not path.is_file():  # a pipe or a device would never end
            raise PhiquantError(f"{path} is no plain file; give the folder of an OpenVINO export")
        return path.stat().st_size
    except OSError as error:
        raise PhiquantError(f"cannot read {path}: {error.strerror}; give the folder of an OpenVINO export") from error


def _integer(text: str | None) -> int:
    """A number of at most 18 digits, or -1."""
    text = (text or "").strip()
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 18 else -1
