"""A source of tensors for the GGUF tests: a model in memory, with a spec for each matrix."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from phiquant.formats.source import Entry
from phiquant.solvers import quantize_tensor
from phiquant.spec import spec as read_spec
from phiquant.tensor import QuantizedTensor


class Tensors:
    """Source of `model`: `layers` is the spec of the decoder layers' matrices, `tables` that of embedding and head.

    Either may be a mapping from the tensor's name to its spec, None for floats; `solver` chooses the codes.
    """

    def __init__(
        self,
        model: Any,
        tokenizer_dir: Path | None,
        layers: str | Mapping[str, str | None] | None = None,
        tables: str | None = None,
        dtype: str = "float16",
        solver: str = "rtn",
    ) -> None:
        self.config = {"architectures": ["Phi3ForCausalLM"], **model.config.to_dict()}
        self.tokenizer_dir = tokenizer_dir
        self.fingerprint = f"{layers} {tables} {dtype}"
        self.tensors: dict[str, Any] = {}
        self.entries: list[Entry] = []
        for name, value in model.state_dict().items():
            if name == "lm_head.weight" and model.config.tie_word_embeddings:
                continue
            chosen = (layers if ".layers." in name else tables) if value.dim() == 2 else None
            if isinstance(chosen, Mapping):
                chosen = chosen.get(name)
            spec = None if chosen is None else read_spec(chosen)
            self.tensors[name] = value if spec is None else quantize_tensor(value, spec, solver=solver)
            self.entries.append(Entry(name, tuple(value.shape), spec, dtype))  # type: ignore[arg-type]

    def read(self, entry: Entry, rows: slice | None = None) -> Any:
        value = self.tensors[entry.name]
        if rows is None or not isinstance(value, QuantizedTensor):
            return value if rows is None else value[rows]

        def part(t: torch.Tensor | None) -> torch.Tensor | None:
            return t if t is None or t.shape[0] == 1 else t[rows]

        parts = {name: part(given) for name, given in value.parameters.items()}
        return dataclasses.replace(value, codes=value.codes[rows], **parts)


def stored_model(model: Any, source: Tensors) -> Any:
    """`model` in float32 with the values that the file holds, so that only a runtime's arithmetic differs."""
    same = copy.deepcopy(model).float()
    values = {}
    for entry in source.entries:
        value = source.tensors[entry.name]
        if isinstance(value, QuantizedTensor):
            values[entry.name] = value.dequantize()
        else:
            values[entry.name] = value.to(getattr(torch, entry.dtype)) if value.dim() == 2 else value
    same.load_state_dict(values, strict=False)
    same.tie_weights()
    return same.eval()
