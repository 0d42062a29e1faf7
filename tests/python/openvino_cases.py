"""A source for the OpenVINO tests that gives every matrix a grid of its own, and what OpenVINO makes of a folder."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import torch
from openvino.passes import ConstantFolding, Manager
from phiquant.formats.source import Entry
from phiquant.models import phi
from phiquant.solvers import quantize_tensor
from phiquant.spec import Codebook
from phiquant.spec import spec as read_spec
from phiquant.tensor import PARAMETERS, QuantizedTensor

EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}


class Grids:
    """Source of `model`: `grids` maps names of weights to grids; the others stay in `dtype`."""

    def __init__(self, model: Any, folder: Path | None, grids: Mapping[str, str], dtype: str = "float32") -> None:
        self.config = {"architectures": ["Phi3ForCausalLM"], **model.config.to_dict()}
        self.tokenizer_dir = folder
        self.fingerprint = f"{sorted(grids.items())} {dtype}"
        self.tensors: dict[str, Any] = {}
        self.entries: list[Entry] = []
        for name, value in model.state_dict().items():
            if name == "lm_head.weight" and model.config.tie_word_embeddings:
                continue
            spec = read_spec(grids[name]) if name in grids else None
            if spec is not None:
                solver = "kmeans" if isinstance(spec.element, Codebook) else "rtn"
                value = quantize_tensor(value, spec, solver=solver)
            self.tensors[name] = value
            self.entries.append(Entry(name, tuple(value.shape), spec, dtype))  # type: ignore[arg-type]

    def read(self, entry: Entry, rows: slice | None = None) -> Any:
        value = self.tensors[entry.name]
        if rows is None or rows == slice(0, entry.shape[0]):
            return value
        if not isinstance(value, QuantizedTensor):
            return value[rows]

        def cut(part: torch.Tensor | None) -> torch.Tensor | None:
            if part is None or part.shape[0] == 1:
                return part
            each = part.shape[0] // entry.shape[0]
            return part[rows.start * each : rows.stop * each]

        return QuantizedTensor(
            value.codes[rows], spec=value.spec, **{name: cut(getattr(value, name)) for name in PARAMETERS}
        )

    def decoded(self, name: str) -> np.ndarray:
        """The values that the codes stand for, by phiquant's own decode; a float as its dtype holds it."""
        value = self.tensors[name]
        if isinstance(value, QuantizedTensor):
            return value.dequantize().numpy()
        entry = next(entry for entry in self.entries if entry.name == name)
        dtype = torch.float32 if value.dim() == 1 else getattr(torch, entry.dtype)
        return value.to(dtype).float().numpy()

    @torch.no_grad()
    def model(self, like: Any) -> Any:
        """`like` with the decoded values."""
        same = copy.deepcopy(like).float()
        for entry in self.entries:
            same.get_parameter(entry.name).copy_(torch.from_numpy(self.decoded(entry.name).copy()))
        return same


def matrices(layers: int, head: bool = True) -> list[str]:
    """Names of the matrices of a model."""
    inner = [f"model.layers.{i}.{part}.weight" for i in range(layers) for part in phi.LAYER_LINEARS]
    return [*inner, "model.embed_tokens.weight", *(["lm_head.weight"] if head else [])]


def folded(folder: Path) -> Iterator[tuple[str, str, np.ndarray]]:
    """(weight, the operation that uses it, its values as OpenVINO folds the graph of the file)."""
    model = ov.Core().read_model(folder / "openvino_model.xml")
    uses = {"MatMul": 1, "Gather": 0}
    for node in model.get_ordered_ops():
        kind = node.get_type_name()
        source = node.input_value(uses[kind]) if kind in uses else None
        name = "" if source is None else _weight(source.get_node())
        if name:
            part = ov.Model([source], []).clone()
            manager = Manager()
            manager.register_pass(ConstantFolding())
            manager.run_passes(part)
            yield name, kind, np.array(part.get_results()[0].input_value(0).get_node().data)


def kept(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """The type in which each FullyConnected of the compiled model has its weight, by the name of the weight."""
    core = ov.Core()
    path = folder / "openvino_model.xml"
    weights = {
        node.get_friendly_name(): _weight(node.input_value(1).get_node())
        for node in core.read_model(path).get_ordered_ops()
        if node.get_type_name() == "MatMul"
    }
    result = {}
    for node in core.compile_model(path, "CPU", dict(settings)).get_runtime_model().get_ordered_ops():
        info = node.get_rt_info()
        if info["layerType"].astype(str) == "FullyConnected":
            names = [name for name in info["originalLayersNames"].astype(str).split(",") if weights.get(name)]
            result[weights[names[0]]] = node.input(1).get_element_type().get_type_name()
    return result


def _weight(node: Any) -> str:
    """The weight that a node is computed from, "" if it is computed from an input."""
    names, queue = [], [node]
    while queue:
        node = queue.pop()
        if node.get_type_name() in ("Parameter", "ReadValue"):
            return ""
        if node.get_type_name() == "Constant" and node.get_friendly_name().endswith(".weight"):
            names.append(node.get_friendly_name())
        queue += [value.get_node() for value in node.input_values()]
    return names[0] if len(names) == 1 else ""
