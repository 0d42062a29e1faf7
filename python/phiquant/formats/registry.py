"""The formats that phiquant writes and reads back, a line for each.

formats/<name>/writer.py writes, formats/<name>/reader.py reads back independently of it, runtimes/<runtime>.py runs.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from ..errors import PhiquantError


@dataclass(frozen=True)
class Format:
    """A format. runtime: the module under runtimes/ that runs it; extra: of pyproject.toml, what it needs.

    weights: patterns of its weight files. reader: the package that opens its container when it is verified.
    single_file: whether readers and runtimes open the one weight file instead of the folder.
    """

    name: str
    runtime: str
    extra: str
    weights: tuple[str, ...]
    reader: str
    single_file: bool = False

    def writer(self) -> Any:
        """The module that writes it: write, check, sizes, encode."""
        return importlib.import_module(f".{self.name}.writer", __package__)

    def reader_module(self) -> Any:
        """The module that reads it back: read, read_config."""
        return importlib.import_module(f".{self.name}.reader", __package__)


FORMATS = {
    one.name: one
    for one in (
        Format("gguf", "llamacpp", "gguf", ("*.gguf",), "gguf", single_file=True),
        Format("onnx", "onnx", "onnx", ("*.onnx", "*.onnx.data"), "onnx"),
        Format("safetensors", "transformers", "hf", ("*.safetensors",), "numpy"),
        Format("mlx", "mlx", "mlx", ("*.safetensors",), "numpy"),
        Format("openvino", "openvino", "openvino", ("openvino_model.bin",), "openvino"),
        Format("qnn", "qnn", "qnn", ("*.onnx", "*.onnx.data"), "onnx"),
    )
}


def find(name: str) -> Format:
    """The format of that name. PhiquantError lists the names."""
    if name not in FORMATS:
        raise PhiquantError(f"unknown format {name!r}; known formats: {', '.join(FORMATS)}")
    return FORMATS[name]
