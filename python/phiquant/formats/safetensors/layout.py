"""The compressed-tensors layout: which tensors of a safetensors file hold an entry, and what config.json says.

A quantized `<module>.weight` [N, K] becomes, by the format of its scheme,
    pack-quantized         weight_packed I32 [N, K * bits / 32]: 4- or 8-bit codes, each counted from the lowest
                           weight_shape I64 [2]; weight_zero_point I32 [N * bits / 32, G], packed down the rows
    int-quantized          weight I8 [N, K]; weight_zero_point I8 [N, G]
    float-, naive-quantized        weight F8_E4M3 [N, K]
    mxfp4-, nvfp4-pack-quantized   weight_packed U8 [N, K/2], first code low; U8 or F8_E4M3 scales;
                                   nvfp4 also weight_global_scale F32 [1], by which scales are divided: always 1 here
    mxfp8-quantized        weight F8_E4M3 [N, K]; weight_scale U8
and weight_scale [N, G]: G = K/g per group, 1 per channel; [1] per tensor. "int-" and "float-quantized" are
for layers whose inputs are rounded too: W8A8. (vLLM takes weight-only integers packed, 4 or 8 bits.)

Transformers casts weight_scale to the dtype of the model as it loads, then multiplies code by scale in
that dtype. In float32 both steps are exact for scales stored as float32, float16 or bfloat16, so the
scales are stored as they are and config.json says "dtype": "float32". A model loaded with
dtype=torch.bfloat16 computes with rounded scales and rounded products: near the grid, not on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ... import ops
from ...errors import PhiquantError
from ...models import phi
from ...spec import TARGETS, Float, Int, PerChannel, PerGroup, PerTensor, PerToken, QuantSpec, Ternary
from ...targets.nearest import nearest
from .. import receipt
from ..source import Entry
from .folder import FLOATS, Part

PACKED, PLAIN, FLOAT, NAIVE = "pack-quantized", "int-quantized", "float-quantized", "naive-quantized"
MXFP4, NVFP4, MXFP8 = "mxfp4-pack-quantized", "nvfp4-pack-quantized", "mxfp8-quantized"
_BLOCK = {  # element, group size, scales -> format
    ("e2m1", 32, "float8_e8m0fnu"): MXFP4,
    ("e2m1", 16, "float8_e4m3fn"): NVFP4,
    ("e4m3fn", 32, "float8_e8m0fnu"): MXFP8,
}
_SCALES = {**FLOATS, "float8_e8m0fnu": "U8", "float8_e4m3fn": "F8_E4M3"}


@dataclass(frozen=True)
class Scheme:
    """How compressed-tensors describes a grid. Specs that differ in what it need not know share one."""

    format: str
    bits: int
    symmetric: bool
    strategy: str
    group_size: int | None
    scale_dtype: str | None = None

    def weights(self) -> dict[str, Any]:
        return _arguments(self, dynamic=False)


def _arguments(scheme: Scheme, dynamic: bool) -> dict[str, Any]:
    kind = "int" if scheme.format in (PACKED, PLAIN) else "float"
    required = {"num_bits": scheme.bits, "type": kind, "symmetric": scheme.symmetric, "strategy": scheme.strategy}
    optional = {key: value for key, value in asdict(scheme).items() if key in ("group_size", "scale_dtype") and value}
    return {**required, "dynamic": dynamic, **optional}


class CompressedTensors:
    """The layout for one model. activations: how the inputs of its quantized linears are rounded, if they are.

    PhiquantError if the layout cannot hold an entry, or not together with the others.
    """

    format = "safetensors"
    metadata: Mapping[str, str] = {"format": "pt"}

    def __init__(
        self, config: Mapping[str, Any], entries: Sequence[Entry], activations: QuantSpec | None = None
    ) -> None:
        for entry in entries:
            check(entry)
        self._config, self._entries, self._activations = config, entries, activations
        self._schemes = {e.module: scheme(e.spec, activations is not None) for e in entries if e.spec is not None}
        if len(set(self._schemes.values())) > 1:  # see _dequantized
            self._schemes = {
                name: _unpacked(one) if _packs_zero_points(one) else one for name, one in self._schemes.items()
            }
        if (table := self._schemes.get(phi.EMBEDDING)) is not None and table.format == PACKED:
            self._schemes[phi.EMBEDDING] = _unpacked(table)  # Transformers asks it for "weight"
        self._kinds = list(dict.fromkeys(self._schemes.values()))
        self.warnings = list(self._warnings())
        if phi.sizes(config).tied and phi.EMBEDDING in self._schemes:
            raise PhiquantError(
                f"{phi.EMBEDDING} and {phi.HEAD} share one weight, and Transformers cannot tie packed weights; "
                "leave both in float for safetensors"
            )
        if activations is not None:
            check_activations(activations, self._kinds)

    def float_dtype(self, entry: Entry) -> str:
        return entry.dtype

    def stored_as(self, entry: Entry) -> str:
        return FLOATS[entry.dtype] if entry.spec is None else self._schemes[entry.module].format

    def parts(self, entry: Entry) -> list[Part]:
        name, spec = entry.name, entry.spec
        if spec is None:
            return [Part(name, FLOATS[entry.dtype], entry.shape, "values")]
        (rows, columns), one = entry.shape, self._schemes[entry.module]
        per_tensor = isinstance(spec.granularity, PerTensor)
        shape = (1,) if per_tensor else spec.scale_shape(entry.shape)
        wide = self._dequantized and _packs_zero_points(one)  # it multiplies in the dtype of the file
        parts = [Part(f"{name}_scale", "F32" if wide else _SCALES[spec.scale_dtype], shape, "scales")]
        if one.format == PACKED:
            parts.insert(0, Part(f"{name}_packed", "I32", (rows, columns * one.bits // 32), "codes"))
            parts.insert(0, Part(f"{name}_shape", "I64", (2,), "shape"))
        elif one.format in (MXFP4, NVFP4):
            parts.insert(0, Part(f"{name}_packed", "U8", (rows, columns // 2), "codes"))
        else:
            parts.insert(0, Part(name, "I8" if one.format == PLAIN else "F8_E4M3", entry.shape, "codes"))
        if one.format == NVFP4:
            parts.insert(1, Part(f"{name}_global_scale", "F32", (1,), "one"))
        if not one.symmetric and one.format == PACKED and not per_tensor:
            packed = (-(-shape[0] * one.bits // 32), shape[1])
            parts.insert(2, Part(f"{name}_zero_point", "I32", packed, "zero_points"))
        elif not one.symmetric:
            parts.append(Part(f"{name}_zero_point", "I8", shape, "zero_points"))
        return parts

    def codes(self, entry: Entry, codes: torch.Tensor) -> memoryview:
        one = self._schemes[entry.module]
        if one.format == PACKED:
            assert entry.spec is not None
            low = -(1 << (one.bits - 1)) if entry.spec.element.signed else 0
            return receipt.raw(ops.pack_bits(codes, one.bits, low))
        if one.format == PLAIN:
            return receipt.raw(_centered(codes, entry, one))
        return receipt.raw(codes if one.bits == 8 else ops.pack_bits(codes, one.bits))

    def parameter(self, entry: Entry, part: Part, parameters: Mapping[str, torch.Tensor]) -> memoryview:
        if part.holds == "shape":
            return receipt.raw(torch.tensor(entry.shape, dtype=torch.int64))
        if part.holds == "one":
            return receipt.raw(torch.ones(1))
        value, one = parameters[part.holds], self._schemes[entry.module]
        if part.holds == "scales":
            return receipt.raw(value.float() if part.dtype == "F32" else value)
        zero = _centered(value, entry, one)
        if part.dtype == "I8":
            return receipt.raw(zero)
        down = torch.zeros(part.shape[1], part.shape[0] * 32 // one.bits, dtype=torch.int8)
        down[:, : len(zero)] = zero.T
        low = -(1 << (one.bits - 1))
        down[:, len(zero) :] = low  # what is not there is stored as 0
        words = ops.pack_bits(down, one.bits, low).view(torch.int32).reshape(part.shape[1], part.shape[0])
        return receipt.raw(words.T)

    def config(self) -> dict[str, Any]:
        """The model's own, its dtype, and how its weights are quantized."""
        dropped = ("auto_map", "torch_dtype", "_name_or_path")
        result = {key: value for key, value in self._config.items() if key not in dropped}
        if not self._schemes:
            dtypes = {entry.dtype for entry in self._entries}
            return result | {"dtype": "float32" if len(dtypes) > 1 else dtypes.pop()}
        dtype = "bfloat16" if self._loads_as_bfloat16 else "float32"
        return result | {"dtype": dtype, "quantization_config": self._quantization_config()}

    @property
    def _dequantized(self) -> bool:
        """Whether Transformers must decode as it loads, which it does right where there is one scheme.

        Its other way, to decode before the first call, does not find packed zero points (compressed-tensors 0.20
        expects their shape unpacked), and makes bfloat16 of small floats whatever the dtype of the model.
        """
        if len(self._kinds) != 1 or self._activations is not None:
            return False
        one = self._kinds[0]
        return one.format in _BLOCK.values() or _packs_zero_points(one)

    @property
    def _loads_as_bfloat16(self) -> bool:
        return any(one.format in _BLOCK.values() for one in self._kinds) and not self._dequantized

    def _warnings(self) -> list[str]:
        if not self._loads_as_bfloat16:
            return []
        return [
            "compressed-tensors decodes MX and NVFP4 weights to bfloat16, so plain Transformers computes this mixture "
            "in bfloat16; scales that bfloat16 does not hold are rounded as they load"
        ]

    def _quantization_config(self) -> dict[str, Any]:
        """One scheme for all linears is written as the target "Linear", which every reader knows; else names."""
        linears = [e.module for e in self._entries if phi.is_matrix(e.module) and e.module != phi.EMBEDDING]
        if phi.HEAD not in linears:
            linears.append(phi.HEAD)  # tied
        by_class = len(self._kinds) == 1 and phi.EMBEDDING not in self._schemes
        inputs = None if self._activations is None else _activations(self._activations)
        groups = {
            f"group_{index}": {
                "targets": ["Linear"] if by_class else [module for module, one in self._schemes.items() if one == kind],
                "weights": kind.weights(),
                "input_activations": inputs,
                "output_activations": None,
                "format": kind.format,
            }
            for index, kind in enumerate(self._kinds)
        }
        formats = {kind.format for kind in self._kinds}
        return {
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "config_groups": groups,
            "ignore": [module for module in linears if module not in self._schemes],
            "kv_cache_scheme": None,
            **({"dequantize": True} if self._dequantized else {}),
        }


def check(entry: Entry) -> None:
    """PhiquantError if the layout cannot hold `entry`: names the tensor, the spec, why, and a target that can."""
    if entry.spec is None:
        return
    if reason := _misfit(entry, entry.spec):
        name = nearest("safetensors", entry.shape, entry.spec)
        if TARGETS[name].spec == entry.spec:  # it fits other tensors than this one
            name = "safetensors:BF16"
        raise PhiquantError(
            f"{entry.name}: safetensors (compressed-tensors) cannot hold {entry.spec} exactly: {reason}. Nearest "
            f"that can: {name!r}. Quantize with it; export never rounds again"
        )


def scheme(spec: QuantSpec, activations: bool = False) -> Scheme:
    """The scheme of a spec that check() accepted. Codes of 2, 3 bits are held in containers of 4; of 5 to 7, of 8."""
    size = spec.granularity.size if isinstance(spec.granularity, PerGroup) else None
    strategy = "group" if size else "tensor" if isinstance(spec.granularity, PerTensor) else "channel"
    if isinstance(spec.element, Float):
        if (kind := _BLOCK.get((spec.element.format, size or 0, spec.scale_dtype))) is not None:
            scales = "torch.float8_e4m3fn" if kind == NVFP4 else "torch.uint8"
            return Scheme(kind, spec.element.bits, True, "tensor_group" if kind == NVFP4 else strategy, size, scales)
        return Scheme(FLOAT if activations else NAIVE, 8, True, strategy, size)
    bits = 4 if spec.element.bits <= 4 else 8
    return Scheme(PLAIN if activations and bits == 8 else PACKED, bits, spec.symmetric, strategy, size)


def _packs_zero_points(one: Scheme) -> bool:
    return one.format == PACKED and not one.symmetric


def _unpacked(one: Scheme) -> Scheme:
    """A byte for every code and zero point: for what loads in no other way."""
    return Scheme(PLAIN, 8, one.symmetric, one.strategy, one.group_size)


def check_activations(activations: QuantSpec, kinds: Sequence[Scheme]) -> None:
    """PhiquantError unless inputs are rounded as W8A8 rounds them, and the weights are of that kind."""
    wanted = {Int(8): PLAIN, Float("e4m3fn"): FLOAT}.get(activations.element)
    if wanted is None or activations.granularity != PerToken() or not activations.symmetric:
        raise PhiquantError(
            f"safetensors (compressed-tensors) rounds activations to int8-token-sym or fp8_e4m3-token-sym, "
            f"not to {activations}"
        )
    if others := [kind.format for kind in kinds if kind.format != wanted]:
        raise PhiquantError(
            f"activations in {activations} need weights of 8 bits of the same kind per channel or tensor "
            f"({wanted}), and some would be {others[0]}; leave those in float, or drop the activations"
        )


def _activations(spec: QuantSpec) -> dict[str, Any]:
    kind = PLAIN if isinstance(spec.element, Int) else FLOAT
    return _arguments(Scheme(kind, 8, True, "token", None), dynamic=True)


def _centered(values: torch.Tensor, entry: Entry, one: Scheme) -> torch.Tensor:
    """Codes or zero points of an unsigned element, counted from the middle of the signed container."""
    assert entry.spec is not None
    if entry.spec.element.signed:
        return values.to(torch.int8)
    return (values.to(torch.int16) - (1 << (one.bits - 1))).to(torch.int8)


def _misfit(entry: Entry, spec: QuantSpec) -> str:
    if len(entry.shape) != 2 or not entry.name.endswith(".weight"):
        return f"it holds the weights of linears and embeddings, and this one has shape {list(entry.shape)}"
    if phi.fused_name(entry.module) != entry.module:
        return "its modules are those of Transformers, where the slices of a fused linear share one scheme"
    if spec.two_level is not None:
        return "it has no scales of two levels here (nvfp4: compressed-tensors divides by the upper one, and rounds)"
    if spec.offset == "minimum":
        return "it has no float minimums"
    if not isinstance(spec.granularity, PerTensor | PerGroup) and spec.granularity != PerChannel(0):
        return f"it has no scales per {spec.granularity}"
    if entry.shape[1] % 8 or entry.shape[0] * entry.shape[1] % 16:
        return f"codes share words, and rows have {entry.shape[1]} values"
    if entry.module == phi.EMBEDDING and spec.element == Float("e2m1"):
        return "Transformers asks the embedding for its weight, which packed floats do not have"
    if isinstance(spec.element, Int | Ternary):
        return "" if spec.scale_dtype in FLOATS else f"it has no {spec.scale_dtype} scales for integers"
    if not isinstance(spec.element, Float) or spec.element.format not in ("e4m3fn", "e2m1"):
        return f"it holds integers, fp8_e4m3 and fp4_e2m1, not {spec.element}"
    size = spec.granularity.size if isinstance(spec.granularity, PerGroup) else 0
    if (spec.element.format, size, spec.scale_dtype) in _BLOCK:
        return ""
    if spec.element.format == "e2m1" or size or spec.scale_dtype not in FLOATS:
        return "its blocks of small floats are mxfp4, mxfp8 (e4m3) and nvfp4 of one level"
    return ""
