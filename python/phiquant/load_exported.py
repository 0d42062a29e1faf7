"""An exported model, of any format and of any maker that a reader knows, as a model in torch with its codes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import nn

from .errors import PhiquantError
from .extras import need
from .formats.detect import Found
from .formats.gguf import reader as gguf_reader
from .formats.gguf.tokenizer_files import write_tokenizer
from .formats.stored import StoredTensor
from .granularity import PerChannel, PerGroup
from .models import phi
from .modules import to_quantized
from .split_linear import module_path, split
from .tensor import PARAMETERS, QuantizedTensor

_TOKENIZERS = ("tokenizer.json", "tokenizer.model")


def load_exported(found: Found, dtype: torch.dtype, tokenizer: Path | None = None) -> tuple[Any, Any]:
    """(a Phi3ForCausalLM whose layers are QuantizedLinear and QuantizedEmbedding, its tokenizer).

    Codes are the file's; the weights they decode to and what is float are in `dtype`. Projections that the file has
    apart are fused where they share a grid, else their layer is a SplitLinear.
    """
    config, stored = found.config(), dict(found.read())
    phi.check_complete(config, {name: tensor.shape for name, tensor in stored.items()})
    model = _empty(config, dtype)
    tensors = dict(_tensors(found, config, stored))
    with split(model, [name.removesuffix(".weight") for name in tensors]):
        pass
    tied = phi.sizes(config).tied
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        modules = [model.get_submodule(module_path(module))]
        if tied and module == phi.EMBEDDING:
            modules.append(model.get_submodule(phi.HEAD))
        if isinstance(tensor, QuantizedTensor):
            weight = nn.Parameter(tensor.dequantize(dtype), requires_grad=False)
            origin = found.record(name).get("origin")
            for one in modules:
                to_quantized(one, tensor, weight, origin if isinstance(origin, dict) else None)
        else:
            modules[0].get_parameter("weight").data.copy_(tensor)
    return model.eval(), load_tokenizer(found, config, tokenizer)


def load_tokenizer(found: Found, config: Mapping[str, Any], folder: Path | None = None) -> Any:
    """The Hugging Face tokenizer: of `folder`, of the files beside the model, or rebuilt from a GGUF file."""
    transformers = need("transformers", extra="hf")
    own = found.folder if any((found.folder / name).is_file() for name in _TOKENIZERS) else None
    with TemporaryDirectory(prefix="phiquant-") as made:
        place = folder or own
        if place is None and found.format.name == "gguf":
            place = Path(made)
            write_tokenizer(gguf_reader.read_metadata(found.path), config, place)
        if place is None:
            raise PhiquantError(f"{found.folder} has no tokenizer; give the folder of one: load(..., tokenizer=)")
        try:
            return transformers.AutoTokenizer.from_pretrained(place, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise PhiquantError(
                f"{place} has no usable tokenizer ({reason}); load(..., tokenizer=) takes another"
            ) from error


def _empty(config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    transformers = need("transformers", extra="hf")
    plain = {key: value for key, value in config.items() if key not in ("quantization_config", "dtype", "auto_map")}
    settings = transformers.Phi3Config.from_dict(plain)
    with need("transformers.initialization", extra="hf").no_init_weights():  # every value comes from the file
        return transformers.Phi3ForCausalLM._from_config(settings, dtype=dtype)


def _tensors(
    found: Found, config: Mapping[str, Any], stored: Mapping[str, StoredTensor]
) -> Iterator[tuple[str, QuantizedTensor | torch.Tensor]]:
    """Every weight of the model, fused where that is possible."""
    for name, _ in phi.tensors(config):
        slices = [f"{part}.weight" for part in phi.slice_names(name.removesuffix(".weight"))]
        names = [name] if name in stored else slices
        parts = [_tensor(found, stored[one]) for one in names]
        specs = {part.spec if isinstance(part, QuantizedTensor) else None for part in parts}
        fused = _fused(parts) if len(specs) == 1 else None
        yield from zip(names, parts, strict=True) if fused is None else ((name, fused),)


def _tensor(found: Found, stored: StoredTensor) -> QuantizedTensor | torch.Tensor:
    spec = found.words(stored)
    return torch.from_numpy(np.array(stored.values())) if spec is None else stored.quantized(spec)


def _fused(parts: list[QuantizedTensor | torch.Tensor]) -> QuantizedTensor | torch.Tensor | None:
    """Rows on one grid put together; None where a parameter is shared by all rows of a part."""
    if len(parts) == 1:
        return parts[0]
    if not all(isinstance(part, QuantizedTensor) for part in parts):
        return torch.cat([part for part in parts if isinstance(part, torch.Tensor)])
    coded = [part for part in parts if isinstance(part, QuantizedTensor)]
    spec = coded[0].spec
    whole = spec.two_level is not None and spec.two_level.super_block == "tensor"
    if whole or not (isinstance(spec.granularity, PerGroup) or spec.granularity == PerChannel(0)):
        return None
    joined: dict[str, Any] = {
        name: torch.cat([getattr(part, name) for part in coded])
        for name in ("codes", *PARAMETERS)
        if getattr(coded[0], name) is not None
    }
    return QuantizedTensor(spec=spec, **{**dict.fromkeys(PARAMETERS), **joined})


__all__ = ["load_exported", "load_tokenizer"]
