"""Graphs and data files, read back by the package onnx and run by ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from phiquant.formats.onnx.file import DataFile, Graph

onnx = pytest.importorskip("onnx")


def written(folder: Path, graph: Graph, data: DataFile, contents: dict[str, list[Any]]) -> Path:
    with data.open(folder, "test") as file:
        for unit in file.remaining():
            file.append(unit, data.buffers(unit, contents[unit]), {})
        file.commit()
    (folder / "model.onnx").write_bytes(graph.serialize(21, 10, {"key": "value"}))
    return folder / "model.onnx"


def test_a_graph_with_tensors_beside_it(tmp_path: Path) -> None:
    data, graph = DataFile("model.onnx.data"), Graph()
    values = np.arange(5000, dtype=np.float32).reshape(50, 100)
    odd = np.array([[1], [2], [3]], np.uint8)
    placed = [data.place("one", "odd", "uint4", (3, 1)), data.place("one", "values", "float32", (50, 100))]
    last = data.place("two", "last", "int8", (3,))
    x = graph.input("x", "float32", ["rows", 50])
    product = graph.node("MatMul", [x, graph.external(placed[1], data)])
    codes = graph.node("Cast", [graph.external(placed[0], data)], to=1)
    graph.node("Add", [product, graph.node("ReduceSum", [codes], keepdims=0)], ["y"])
    graph.node("Identity", [graph.external(last, data)], ["z"])
    graph.output("y", "float32", ["rows", 100])
    graph.output("z", "int8", [3])
    packed = bytes([1 | 2 << 4, 3])
    contents = {"one": [[packed], [values[:10].tobytes(), values[10:].tobytes()]], "two": [[b"\x01\xff\x02"]]}
    path = written(tmp_path, graph, data, contents)
    assert placed[1].offset % 4096 == 0
    assert data.size == (tmp_path / "model.onnx.data").stat().st_size == last.offset + 3
    model = onnx.load(path)
    tensors = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    assert np.array_equal(tensors["odd"].astype(np.uint8), odd)
    assert np.array_equal(tensors["values"], values)
    ort = pytest.importorskip("onnxruntime")
    x = np.ones((2, 50), np.float32)
    y, z = ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})
    assert np.array_equal(y, x @ values + 6)
    assert z.tolist() == [1, -1, 2]


def test_constants_are_stored_once() -> None:
    graph = Graph()
    assert graph.constant([1, 2]) == graph.constant((1, 2)) != graph.constant([1, 3])
    assert graph.constant(0) != graph.constant([0]) != graph.constant(0, "float32")
    assert len(graph.proto().initializer) == 5


def test_a_unit_is_one_piece() -> None:
    data = DataFile("data")
    for unit in ("a", "b"):
        data.place(unit, f"{unit}.1", "int8", (3,))
    with pytest.raises(ValueError, match="a is placed in two pieces"):
        data.place("a", "a.2", "int8", (3,))
