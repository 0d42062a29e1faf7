"""One small file for a model of few values: codes by Huffman, codebooks beside them, nothing lost.

    report = pq.compress(model, "lenet.phiq")       # what is stored, to the byte
    model.load_state_dict(pq.decompress("lenet.phiq"))

The file is a safetensors file of these parts (`:` and a word after the tensor's name):

    codes       Huffman data (csrc/core/huffman.h): the codes, less the smallest of their element
    gaps        Huffman data: where the values lie that are not the common one. Symbol g < 255: g common values,
                then one that is stored; 255: 255 common values. Up to 254 common values may follow the last one
    levels      the codebook of a float tensor: value of code i
    values      the values of a sparse float tensor that are not 0, in order
    scales, zero_points, codebook ...   the parameters of a QuantizedTensor, under the names of its fields

or the tensor itself under its own name. A tensor that is another's (tied weights) has no parts. The metadata
holds "phiquant" (the version of this layout), "tensors", a JSON object that says of each tensor in parts its
shape, dtype or spec, and common code, and "sha256", of everything else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from .. import ops
from ..codebook_linear import CodebookLinear
from ..errors import PhiquantError
from ..formats.partial import PartialFile
from ..modules import StoredCodes
from ..tensor import PARAMETERS, QuantizedTensor
from .prune import PrunedConv2d, PrunedLinear
from .reader import FILLER, VERSION, CompressedSize, compressed_size, digest

Parts = dict[str, Tensor]
PART_BYTES = 80  # about what the container spends on one more part: its name, dtype, shape and place


def compress(model: nn.Module | Mapping[str, Tensor | QuantizedTensor], path: str | Path) -> CompressedSize:
    """Write the tensors of `model`, exactly, to the file `path`; returns what each takes in it.

    model: a module, whose layers with codes are stored by their codes, or named tensors. Of each tensor the
    smallest form is taken: codes (a float tensor of at most 256 different values has codes too), codes where
    they are not the common one and the gaps between those, the values that are not 0 and their gaps, or the
    plain tensor. The file appears when it is complete.

    PhiquantError for a weight that was changed after its codes were chosen, a name that holds a colon, a full disk.
    """
    path = Path(path)
    parts: Parts = {}
    described: dict[str, dict[str, Any]] = {}
    names: dict[tuple, str] = {}
    for name, value in (tensors_of(model) if isinstance(model, nn.Module) else model).items():
        if ":" in name:
            raise PhiquantError(f"tensor {name}: a name in {path.name} holds no colon")
        if (first := names.setdefault(_identity(value), name)) != name:
            described[name] = {"same": first}
            continue
        forms = _forms_of_codes(value) if isinstance(value, QuantizedTensor) else _forms_of_floats(value.detach().cpu())
        description, stored = min(forms, key=_cost)
        if description:
            described[name] = description
        parts.update({f"{name}:{word}" if word else name: part for word, part in stored.items()})
    text = json.dumps(described, separators=(",", ":"))
    parts = {name: part.clone(memory_format=torch.contiguous_format) for name, part in parts.items()}
    metadata = {"phiquant": VERSION, "tensors": text, "sha256": digest(text, parts)}
    _write(path, save(parts, metadata))
    return compressed_size(path)


def _identity(value: Tensor | QuantizedTensor) -> tuple:
    """Equal for tensors that are the same memory, seen the same way."""
    t = value.codes if isinstance(value, QuantizedTensor) else value
    return (t.data_ptr(), t.dtype, t.shape, t.stride()) if t.numel() else (id(value),)


def tensors_of(model: nn.Module) -> dict[str, Tensor | QuantizedTensor]:
    """The state of a module by name, layers with codes by their codes; no masks, and no second copy of codes."""
    found: dict[str, Tensor | QuantizedTensor] = {}
    hidden: tuple[str, ...] = ()
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, PrunedLinear | PrunedConv2d):
            module.clear()
            hidden += (f"{prefix}weight_mask",)
        if isinstance(module, CodebookLinear) and module.codebook.ndim == 2:
            found[f"{prefix}weight"] = module.quantized
            hidden += tuple(prefix + word for word in ("codebook", "codes", "zero"))
        elif isinstance(getattr(module, "weight_quantizer", None), StoredCodes):
            found[f"{prefix}weight"] = module.checked(name)
            hidden += (f"{prefix}weight_quantizer.",)
    for name, value in model.state_dict().items():
        if name not in found and not name.startswith(hidden):
            found[name] = value
    return found


def _forms_of_codes(tensor: QuantizedTensor) -> list[tuple[dict[str, Any], Parts]]:
    element = tensor.spec.element
    symbols = (tensor.codes.cpu().to(torch.int16) - element.qmin).to(torch.uint8)
    description = {"shape": list(tensor.shape), "spec": str(tensor.spec)}
    parameters = {word: getattr(tensor, word) for word in PARAMETERS}
    parameters = {word: part.detach().cpu() for word, part in parameters.items() if part is not None}
    return _forms(description, parameters, symbols)


def _forms_of_floats(tensor: Tensor) -> list[tuple[dict[str, Any], Parts]]:
    forms: list[tuple[dict[str, Any], Parts]] = [({}, {"": tensor})]
    if tensor.dtype not in _BITS or tensor.numel() < 2:
        return forms
    bits = tensor.contiguous().view(_BITS[tensor.dtype]).flatten()
    description = {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
    if len(bits[:4096].unique()) <= 256:
        levels, symbols = bits.unique(return_inverse=True)
        if len(levels) <= 256:
            forms += _forms(description, {"levels": levels.view(tensor.dtype)}, symbols.to(torch.uint8))
    zero = bits == 0  # not -0: its sign is kept
    if bool(zero.any()):
        sparse = {"gaps": ops.huffman_encode(gaps(~zero)), "values": bits[~zero].view(tensor.dtype)}
        forms.append((description, sparse))
    return forms


_BITS = {
    torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16,
    torch.uint8: torch.uint8, torch.int8: torch.uint8,
}  # fmt: skip


def _forms(description: dict[str, Any], parameters: Parts, symbols: Tensor) -> list[tuple[dict[str, Any], Parts]]:
    """All codes, or those that differ from the most common one and the gaps between them."""
    flat = symbols.flatten()
    common = int(flat.bincount().argmax()) if flat.numel() else 0
    differs = flat != common
    sparse = {"codes": ops.huffman_encode(flat[differs]), "gaps": ops.huffman_encode(gaps(differs))}
    return [
        (description, {"codes": ops.huffman_encode(flat), **parameters}),
        ({**description, "common": common}, {**sparse, **parameters}),
    ]


def gaps(stored: Tensor) -> Tensor:
    """Where a flat bool tensor is true, as relative indices: uint8, the symbols of part `gaps`."""
    places = stored.nonzero().flatten()
    before = torch.cat([places.new_full((1,), -1), places])
    ends = torch.cat([places, places.new_full((1,), stored.numel())])
    gap = ends - before - 1  # the last one leads to the end of the tensor
    fillers = gap // FILLER
    at = (fillers + 1).cumsum(0)[:-1] - 1
    symbols = torch.full((int(fillers.sum()) + len(places),), FILLER, dtype=torch.uint8)
    symbols[at] = (gap[:-1] % FILLER).to(torch.uint8)
    return symbols


def _cost(form: tuple[dict[str, Any], Parts]) -> int:
    description, parts = form
    words = len(json.dumps(description)) if description else 0
    return words + sum(part.numel() * part.element_size() + PART_BYTES for part in parts.values())


def _write(path: Path, data: bytes) -> None:
    fingerprint = hashlib.sha256(data).hexdigest()
    with PartialFile(path, b"", [path.name], [len(data)], fingerprint) as file:
        for name in file.remaining():
            file.append(name, [data], {})
        file.commit()
