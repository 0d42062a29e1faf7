"""The compressed-tensors layout: which tensors of a safetensors file hold an entry, and what config.json says.

A quantized `<module>.weight` [N, K] becomes, with at most 4 bits ("pack-quantized"),
    <module>.weight_packed  I32 [N, K/8]   eight codes, each + 8, in a word; value j of the eight in bits 4j
    <module>.weight_scale   [N, K/g]; [N, 1] per channel; [1] per tensor
    <module>.weight_shape   I64 [2]
and with 5 to 8 bits ("int-quantized")
    <module>.weight         I8 [N, K]
    <module>.weight_scale   as above

Transformers casts weight_scale to the dtype of the model as it loads, then multiplies code by scale in
that dtype. In float32 both steps are exact for scales stored as float32, float16 or bfloat16, so the
scales are stored as they are and config.json says "dtype": "float32". A model loaded with
dtype=torch.bfloat16 computes with rounded scales and rounded products: near the grid, not on it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import PhiquantError
from ..models import phi
from ..spec import TARGETS, Int, PerChannel, PerGroup, PerTensor, QuantSpec
from .source import Entry

PACKED, PLAIN = "pack-quantized", "int-quantized"
FLOATS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
ITEM_BYTES = {"I64": 8, "I32": 4, "F32": 4, "F16": 2, "BF16": 2, "I8": 1}


@dataclass(frozen=True)
class Part:
    """One tensor of a safetensors file."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Scheme:
    """How compressed-tensors describes a grid. Specs that differ in what it need not know share one."""

    bits: int
    strategy: str
    group_size: int | None

    @property
    def format(self) -> str:
        return PACKED if self.bits == 4 else PLAIN

    def weights(self) -> dict[str, Any]:
        size = {} if self.group_size is None else {"group_size": self.group_size}
        return {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": True,
            "strategy": self.strategy,
            "dynamic": False,
        } | size


def check(entry: Entry) -> None:
    """PhiquantError if the layout cannot hold `entry`: names the tensor, the spec, why, and a target that can."""
    if entry.spec is None:
        return
    if reason := _misfit(entry, entry.spec):
        raise PhiquantError(
            f"{entry.name}: safetensors (compressed-tensors) cannot hold {entry.spec} exactly: {reason}. Nearest "
            f"that can: {_nearest(entry.shape, entry.spec)!r}. Quantize with it; export never rounds again"
        )


def scheme(spec: QuantSpec) -> Scheme:
    """The scheme of a spec that check() accepted. Codes of 2 or 3 bits are held in the int4 container."""
    bits = 4 if spec.element.bits <= 4 else 8
    match spec.granularity:
        case PerGroup(size):
            return Scheme(bits, "group", size)
        case PerTensor():
            return Scheme(bits, "tensor", None)
    return Scheme(bits, "channel", None)


def parts(entry: Entry) -> list[Part]:
    """The tensors that hold `entry`, wider items first, so that each begins at a multiple of its item."""
    if entry.spec is None:
        return [Part(entry.name, FLOATS[entry.dtype], entry.shape)]
    rows, columns = entry.shape
    shape = (1,) if isinstance(entry.spec.granularity, PerTensor) else entry.spec.scale_shape(entry.shape)
    scale = Part(f"{entry.name}_scale", FLOATS[entry.spec.scale_dtype], shape)
    if scheme(entry.spec).format == PLAIN:
        return [scale, Part(entry.name, "I8", entry.shape)]
    packed = Part(f"{entry.name}_packed", "I32", (rows, columns // 8))
    return [Part(f"{entry.name}_shape", "I64", (2,)), packed, scale]


def shards(entries: Sequence[Entry], limit: int) -> list[list[Entry]]:
    """Entries of each file: at most `limit` bytes (more only for a single tensor), every tensor aligned.

    Readers map a file and want items at multiples of their size, and gaps are not allowed; where an
    odd shape would break that, a new file begins.
    """
    result: list[list[Entry]] = []
    position = 0
    for entry in entries:
        stored = parts(entry)
        size = sum(part.nbytes for part in stored)
        aligned = all(at % ITEM_BYTES[part.dtype] == 0 for part, at in _offsets(stored, position))
        if not result or position + size > limit or not aligned:
            result.append([])
            position = 0
        result[-1].append(entry)
        position += size
    return result


def header(entries: Sequence[Entry]) -> bytes:
    """The bytes of a safetensors file before the data of `entries`."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    stored = [part for entry in entries for part in parts(entry)]
    for part, begin in _offsets(stored, 0):
        table[part.name] = {
            "dtype": part.dtype,
            "shape": list(part.shape),
            "data_offsets": [begin, begin + part.nbytes],
        }
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def config(source_config: Mapping[str, Any], entries: Sequence[Entry]) -> dict[str, Any]:
    """The config.json of the folder: the model's own, its dtype, and how its weights are quantized."""
    result = {
        key: value for key, value in source_config.items() if key not in ("auto_map", "torch_dtype", "_name_or_path")
    }
    schemes = {entry.module: scheme(entry.spec) for entry in entries if entry.spec is not None}
    if not schemes:
        widest = max((entry.dtype for entry in entries), key=lambda d: (d == "float32", d == "bfloat16"))
        mixed = len({entry.dtype for entry in entries}) > 1
        return result | {"dtype": "float32" if mixed else widest}
    if phi.sizes(source_config).tied and phi.EMBEDDING in schemes:
        raise PhiquantError(
            f"{phi.EMBEDDING} and {phi.HEAD} share one weight, and Transformers cannot tie packed weights; "
            "leave both in float for safetensors"
        )
    return result | {"dtype": "float32", "quantization_config": _quantization_config(schemes, entries)}


def _quantization_config(schemes: Mapping[str, Scheme], entries: Sequence[Entry]) -> dict[str, Any]:
    """One scheme for all linears is written as the target "Linear", which every reader knows; else names."""
    kinds = list(dict.fromkeys(schemes.values()))
    linears = [entry.module for entry in entries if phi.is_matrix(entry.module) and entry.module != phi.EMBEDDING]
    if phi.HEAD not in linears:
        linears.append(phi.HEAD)  # tied
    by_class = len(kinds) == 1 and phi.EMBEDDING not in schemes
    groups = {
        f"group_{index}": {
            "targets": ["Linear"] if by_class else [module for module, one in schemes.items() if one == kind],
            "weights": kind.weights(),
            "input_activations": None,
            "output_activations": None,
            "format": kind.format,
        }
        for index, kind in enumerate(kinds)
    }
    formats = {kind.format for kind in kinds}
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "config_groups": groups,
        "ignore": [module for module in linears if module not in schemes],
        "kv_cache_scheme": None,
    }


def _offsets(stored: Sequence[Part], start: int) -> Iterator[tuple[Part, int]]:
    for part in stored:
        yield part, start
        start += part.nbytes


def _misfit(entry: Entry, spec: QuantSpec) -> str:
    if len(entry.shape) != 2 or not entry.name.endswith(".weight"):
        return f"it holds the weights of linears and embeddings, and this one has shape {list(entry.shape)}"
    if not isinstance(spec.element, Int):
        return f"it stores grids of integers here, not {spec.element}"
    if spec.offset == "minimum":
        return "it has no float minimums"
    if spec.offset == "zero_point":
        return "it stores grids without zero points here"
    if spec.element.bits <= 4 and entry.shape[1] % 8:
        return f"eight codes share a word, and rows have {entry.shape[1]} values"
    if not isinstance(spec.granularity, PerTensor | PerGroup) and spec.granularity != PerChannel(0):
        return f"it has no scales per {spec.granularity}"
    return ""


def _nearest(shape: tuple[int, ...], spec: QuantSpec) -> str:
    wanted = spec.granularity.size if isinstance(spec.granularity, PerGroup) else 32
    best = "safetensors:BF16" if len(shape) != 2 else "safetensors:int8-channel"
    distance = math.inf
    for target in TARGETS.values():
        if target.format != "safetensors" or target.spec is None or target.spec.element.bits < spec.element.bits:
            continue
        size = target.spec.granularity.size if isinstance(target.spec.granularity, PerGroup) else 0
        if size and len(shape) == 2 and shape[1] % size == 0 and abs(size - wanted) < distance:
            best, distance = target.name, abs(size - wanted)
    return best
