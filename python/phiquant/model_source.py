"""A model in memory as a source of codes: those that quantize() or convert() left in its layers."""

from __future__ import annotations

import json
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import PhiquantError
from .formats.source import Entry
from .models import phi
from .modules import QATEmbedding, QATLinear, QuantizedEmbedding, QuantizedLinear
from .spec import FloatName
from .split_linear import projection_name
from .tensor import QuantizedTensor, take_rows

_NAMES: dict[torch.dtype, FloatName] = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}


class ModelSource:
    """The codes and the float tensors of a Phi-3 model.

    float_dtype: how tensors without codes are stored; None: each in bfloat16 or float16 if that holds
        its values exactly, else as it is. A checkpoint loaded as float32 thus gets its own size again.
    PhiquantError if the model is of another architecture, is prepared for training and not converted,
    or had a quantized weight changed after its codes were chosen.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, float_dtype: FloatName | None = None) -> None:
        self.config: dict[str, Any] = config_of(model)
        self.fingerprint = uuid.uuid4().hex  # nothing identifies a model in memory after its process ended
        self._parameters = {_entry_name(name): value for name, value in model.named_parameters()}
        self._codes = _codes(model)
        self._origins = {
            projection_name(name): module.weight_quantizer.origin
            for name, module in model.named_modules()
            if isinstance(module, QuantizedLinear | QuantizedEmbedding)
        }
        phi.check_complete(self.config, {name: tuple(value.shape) for name, value in self._parameters.items()})
        self.entries: Sequence[Entry] = [self._entry(name, float_dtype) for name in self._names()]
        self._refuse_strangers(model)
        self._temporary = tempfile.TemporaryDirectory(prefix="phiquant-")
        self.tokenizer_dir: Path | None = save_companions(model, tokenizer, Path(self._temporary.name))

    def read(self, entry: Entry, rows: slice | None = None) -> QuantizedTensor | torch.Tensor:
        """See Source.read: views of the model's own tensors, nothing is copied."""
        rows = rows or slice(None)
        if entry.spec is None:
            value = self._parameters[entry.name].detach()
            return value[rows].cpu() if entry.shape else value.cpu()
        return take_rows(self._codes[entry.module], rows)

    def _names(self) -> Iterator[str]:
        """The tensors in the order of the model, a split projection's slices in place of it."""
        for name, _ in phi.tensors(self.config):
            slices = [f"{part}.weight" for part in phi.slice_names(name.removesuffix(".weight"))]
            yield from [name] if name in self._parameters else slices

    def _entry(self, name: str, float_dtype: FloatName | None) -> Entry:
        value = self._parameters[name]
        shape = tuple(value.shape)
        codes = self._codes.get(name.removesuffix(".weight"))
        if codes is not None:
            return Entry(name, shape, codes.spec, origin=self._origins[name.removesuffix(".weight")] or None)
        return Entry(name, shape, None, float_dtype or narrowest(value.detach()))

    def _refuse_strangers(self, model: nn.Module) -> None:
        names = {entry.name for entry in self.entries}
        if strangers := [name for name in self._parameters if name not in names]:
            raise PhiquantError(
                f"the model has parameters that {phi.ARCHITECTURE} does not have, first {strangers[0]}; "
                "merge adapters before exporting"
            )


def _entry_name(parameter: str) -> str:
    module, _, last = parameter.rpartition(".")
    return f"{projection_name(module)}.{last}"


def config_of(model: nn.Module) -> dict[str, Any]:
    """The config.json of a model in memory. PhiquantError if it has none, or is no Phi-3."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_json_string"):
        raise PhiquantError(f"{type(model).__name__} has no transformers config; export takes a {phi.ARCHITECTURE}")
    result: dict[str, Any] = json.loads(config.to_json_string())
    result["architectures"] = [type(model).__name__]
    phi.check_architecture(result)
    return result


def _codes(model: nn.Module) -> dict[str, QuantizedTensor]:
    """The checked codes of every quantized layer; one name for those that share a weight."""
    codes = {}
    for name, module in model.named_modules():
        if isinstance(module, QATLinear | QATEmbedding):
            raise PhiquantError(f"{name} is prepared for QAT and has no codes yet; call convert(model) first")
        if isinstance(module, QuantizedLinear | QuantizedEmbedding):
            codes[projection_name(name)] = module.checked(name)
    return codes


def narrowest(value: torch.Tensor) -> FloatName:
    """The narrowest dtype that holds the values exactly."""
    if value.dtype not in _NAMES:
        raise PhiquantError(f"a weight is {value.dtype}; export takes float32, float16 or bfloat16")
    if value.dtype == torch.float32:
        for dtype in (torch.bfloat16, torch.float16):
            if torch.equal(value.to(dtype).float(), value):
                return _NAMES[dtype]
    return _NAMES[value.dtype]


def save_companions(model: nn.Module, tokenizer: Any, folder: Path) -> Path | None:
    """Tokenizer and generation settings as save_pretrained writes them. None without a tokenizer."""
    if tokenizer is None:
        return None
    tokenizer.save_pretrained(folder)
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(folder)
    return folder
