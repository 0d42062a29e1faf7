"""The .xml of an OpenVINO IR, and the first bytes of its .bin, from a graph whose weights are not there yet.

OpenVINO writes the graph with a Parameter in the place of each constant of a weight. Those become constants
whose bytes stand where our layout puts them, after the small constants that OpenVINO wrote itself. So no weight is
in memory, and the .bin can be written tensor by tensor.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from ...extras import need
from ..source import Entry
from .layout import ALIGNMENT, parts


def serialize(model: Any, entries: Sequence[Entry]) -> tuple[bytes, bytes]:
    """(the .xml, the bytes of the .bin before the first entry)."""
    ov = need("openvino", extra="openvino")
    with tempfile.TemporaryDirectory(prefix="phiquant-") as folder:
        xml, small = Path(folder, "model.xml"), Path(folder, "model.bin")
        ov.serialize(model, xml, small)
        tree, head = ElementTree.parse(xml), small.read_bytes()
    head += bytes(-len(head) % ALIGNMENT)
    places = _places(entries, len(head))
    for layer in tree.iterfind("./layers/layer[@type='Parameter']"):
        if place := places.get(layer.get("name", "")):
            layer.set("type", "Const")
            layer.find("data").attrib.update(place)  # type: ignore[union-attr]
    text = ElementTree.tostring(tree.getroot(), encoding="unicode")
    return f'<?xml version="1.0"?>\n{text}\n'.encode(), head


def name_nodes(model: Any, inputs: bool = False) -> None:
    """Names that are the same in every run: OpenVINO's own count all nodes that a process made.

    inputs: rename inputs too, and their tensors.
    """
    for result in model.outputs:
        result.set_names({name for name in result.get_names() if not re.fullmatch(r"Result_\d+", name)})
    for index, node in enumerate(model.get_ordered_ops()):
        name, is_input = f"{node.get_type_name()}_{index}", node.get_type_name() == "Parameter"
        if inputs or not is_input:
            node.set_friendly_name(name)
        if inputs and is_input:
            node.output(0).set_names({name})


def _places(entries: Sequence[Entry], start: int) -> Mapping[str, dict[str, str]]:
    """Offset and size of every constant."""
    result, at = {}, start
    for entry in entries:
        for part in parts(entry):
            result[part.name] = {"offset": str(at), "size": str(part.nbytes)}
            at += part.nbytes + -part.nbytes % ALIGNMENT
    return result
