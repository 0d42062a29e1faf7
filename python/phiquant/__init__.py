"""phiquant: choose a grid, choose the codes, keep the codes."""

from __future__ import annotations

import importlib
from typing import Any

_WHERE = {
    "load": "load", "quantize": "quantize", "prepare_qat": "quantize", "convert": "quantize", "Recipe": "recipe",
    "spec": "spec", "target": "spec", "quantize_tensor": "solvers", "fake_quantize": "fake_quant",
    "QuantizedTensor": "tensor", "export": "export", "verify": "export",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        value = getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)
    elif name in ("evaluate", "testing", "qat"):
        value = importlib.import_module(f".{name}", __name__)
    else:
        raise AttributeError(name)
    globals()[name] = value
    return value
