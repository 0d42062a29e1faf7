"""The layout of MLX: which tensors of a safetensors file hold an entry, and what config.json says.

A quantized `<module>.weight` [N, K] becomes
    <module>.weight   U32 [N, K * bits / 32]: codes from 0, a row after the other, the lowest bit first
    <module>.scales   [N, K / size]; float16, bfloat16 or float32, or U8: the exponents or E4M3 bits of small floats
    <module>.biases   as scales, of mode "affine" alone: the value of code 0
and w = scale * code + bias. Codes without a minimum are counted from -2^(bits-1), so their bias is that many
scales: exact in any float. A zero point times a scale is no float16: there scales and biases are float32.
MLX computes in the dtype of the parameters, and in float32 where they differ: 16-bit floats take that of the scales.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ... import ops
from ...errors import PhiquantError
from ...models import phi
from ...models.rope import Rope, read_rope
from ...spec import Float, Int, PerChannel, PerGroup, PerRows, PerTensor, QuantSpec, Ternary
from ...targets.nearest import nearest
from .. import receipt
from ..safetensors.folder import FLOATS, Part
from ..source import Entry

BITS = (2, 3, 4, 5, 6, 8)
SIZES = (128, 64, 32)  # of groups; of other sizes MLX's kernels return garbage
_MODES = {  # element, group size, scales -> mode
    ("e2m1", 32, "float8_e8m0fnu"): "mxfp4",
    ("e4m3fn", 32, "float8_e8m0fnu"): "mxfp8",
    ("e2m1", 16, "float8_e4m3fn"): "nvfp4",
}
_LARGEST = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class Packing:
    """How MLX stores a grid. dtype: of scales and biases."""

    mode: str
    bits: int
    size: int
    dtype: str

    def settings(self) -> dict[str, Any]:
        """What config.json says of it."""
        return {"group_size": self.size, "bits": self.bits, "mode": self.mode}


class MLX:
    """The layout for one model. long_factors: "long" or "short", which of LongRoPE's factors MLX shall use.

    PhiquantError if MLX cannot hold an entry, or computes another RoPE than the model's.
    """

    format = "mlx"
    metadata: Mapping[str, str] = {"format": "mlx"}

    def __init__(self, config: Mapping[str, Any], entries: Sequence[Entry], long_factors: str = "long") -> None:
        if long_factors not in ("long", "short"):
            raise PhiquantError(f"long_factors is 'long' or 'short', not {long_factors!r}")
        self._config, self._entries, self._long_factors = config, entries, long_factors
        self._rope = read_rope(config)
        _check_rope(self._rope)
        self._packings = {e.module: _checked(e) for e in entries if e.spec is not None}
        dtypes = {one.dtype for one in self._packings.values() if one.mode == "affine"}
        self._dtype = dtypes.pop() if len(dtypes) == 1 else None
        self.warnings = list(self._warnings(mixed=bool(dtypes)))

    def float_dtype(self, entry: Entry) -> str:
        """That of the scales, so that MLX computes in it; float32 is kept, as nothing else holds its values."""
        halves = ("float16", "bfloat16")
        return self._dtype if self._dtype in halves and entry.dtype in halves else entry.dtype

    def stored_as(self, entry: Entry) -> str:
        if entry.spec is None:
            return FLOATS[self.float_dtype(entry)]
        one = self._packings[entry.module]
        return f"affine {one.bits}-bit g{one.size}" if one.mode == "affine" else one.mode

    def parts(self, entry: Entry) -> list[Part]:
        if entry.spec is None:
            return [Part(entry.name, FLOATS[self.float_dtype(entry)], entry.shape, "values")]
        (rows, columns), one = entry.shape, self._packings[entry.module]
        groups = (rows, columns // one.size)
        dtype = FLOATS.get(one.dtype, "U8")
        parts = [
            Part(entry.name, "U32", (rows, columns * one.bits // 32), "codes"),
            Part(f"{entry.module}.scales", dtype, groups, "scales"),
        ]
        return [*parts, Part(f"{entry.module}.biases", dtype, groups, "biases")] if one.mode == "affine" else parts

    def codes(self, entry: Entry, codes: torch.Tensor) -> memoryview:
        one = self._packings[entry.module]
        assert entry.spec is not None
        return receipt.raw(ops.pack_bits(codes, one.bits, -(1 << (one.bits - 1)) if entry.spec.element.signed else 0))

    def parameter(self, entry: Entry, part: Part, parameters: Mapping[str, torch.Tensor]) -> memoryview:
        one, scales = self._packings[entry.module], parameters["scales"]
        if one.mode == "affine":
            scales = scales.to(getattr(torch, one.dtype))
        values = scales if part.holds == "scales" else _biases(entry, one, scales, parameters)
        repeated = values.expand(entry.shape[0], -1) if values.shape[0] == 1 else values
        if repeated.shape[0] != entry.shape[0]:
            repeated = repeated.repeat_interleave(entry.shape[0] // repeated.shape[0], dim=0)
        return receipt.raw(repeated.repeat_interleave(part.shape[1] // repeated.shape[1], dim=1))

    def config(self) -> dict[str, Any]:
        """What mlx-lm reads: the model's own numbers, RoPE in the spelling of Transformers 4, every layer's packing."""
        dropped = ("auto_map", "torch_dtype", "dtype", "_name_or_path", "rope_parameters", "rope_scaling")
        result = {key: value for key, value in self._config.items() if key not in dropped}
        rope, head_dim = self._rope, phi.sizes(self._config).head_dim
        result |= {
            "rope_theta": rope.theta,
            "partial_rotary_factor": rope.dimensions / head_dim,
            "max_position_embeddings": rope.context,
            "original_max_position_embeddings": rope.original_context,
        }
        if rope.long is not None:
            used = rope.long if self._long_factors == "long" else rope.short
            result["rope_scaling"] = {"type": "longrope", "short_factor": rope.short, "long_factor": used}
            if used != rope.long:
                result["phiquant"] = {"long_factor": rope.long}
        if self._packings:
            quantization = self._quantization()
            result |= {"quantization": quantization, "quantization_config": quantization}
        return result

    def _quantization(self) -> dict[str, Any]:
        """The packing of most, and under its name that of every module that differs."""
        kinds = list(self._packings.values())
        usual = max(dict.fromkeys(kinds), key=kinds.count)
        exceptions: dict[str, Any] = {
            name: one.settings() for name, one in self._packings.items() if one.settings() != usual.settings()
        }
        matrices = [entry.module for entry in self._entries if phi.is_matrix(entry.module)]
        return usual.settings() | exceptions | {name: False for name in matrices if name not in self._packings}

    def _warnings(self, mixed: bool) -> list[str]:
        found = []
        if self._rope.long is not None and self._long_factors == "long":
            found.append(
                "mlx-lm uses LongRoPE's long factors at every length: up to the original context of "
                f"{self._rope.original_context} tokens it computes other logits than Transformers. "
                'long_factors="short" is right there, and wrong beyond'
            )
        elif self._rope.long is not None:
            found.append(
                f"LongRoPE's short factors stand in for the long ones: right up to {self._rope.original_context} "
                "tokens, wrong beyond"
            )
        window = self._config.get("sliding_window")
        if window and window < self._rope.context:
            found.append(
                f"mlx-lm ignores sliding_window {window}: beyond that many tokens it computes other logits than "
                "Transformers"
            )
        floats = {self.float_dtype(entry) for entry in self._entries if entry.spec is None}
        if mixed or self._dtype == "float32" or len(floats | ({self._dtype} if self._dtype else set())) > 1:
            found.append("parameters differ in dtype or are float32, so MLX computes in float32: slower, not wrong")
        return found


def check(entry: Entry) -> None:
    """PhiquantError if MLX cannot hold `entry`: names the tensor, the spec, why, and a target that can."""
    if entry.spec is not None:
        _checked(entry)


def _checked(entry: Entry) -> Packing:
    assert entry.spec is not None
    found = _packing(entry, entry.spec)
    if isinstance(found, Packing):
        return found
    raise PhiquantError(
        f"{entry.name}: mlx cannot hold {entry.spec} exactly: {found}. Nearest that can: "
        f"{nearest('mlx', entry.shape, entry.spec)!r}. Quantize with it; export never rounds again"
    )


def _packing(entry: Entry, spec: QuantSpec) -> Packing | str:
    """How MLX stores the entry, or why it cannot."""
    if len(entry.shape) != 2 or not entry.name.endswith(".weight"):
        return f"it holds the weights of linears and embeddings, and this one has shape {list(entry.shape)}"
    if phi.fused_name(entry.module) != entry.module:
        return "mlx-lm's Phi-3 has fused projections, whose slices share one packing"
    if spec.two_level is not None:
        return "its scales have one level"
    rows_differ = isinstance(spec.granularity, PerTensor | PerRows) or spec.granularity == PerChannel(0)
    if not rows_differ and not isinstance(spec.granularity, PerGroup):
        return f"it has no scales per {spec.granularity}"
    own = spec.granularity.size if isinstance(spec.granularity, PerGroup) else entry.shape[1]
    if isinstance(spec.element, Float):
        mode = _MODES.get((spec.element.format, own, spec.scale_dtype))
        known = "of small floats it holds mxfp4, mxfp8 (e4m3) and nvfp4 of one level, in their groups"
        return Packing(mode, spec.element.bits, own, spec.scale_dtype) if mode else known
    if not isinstance(spec.element, Int | Ternary) or spec.scale_dtype not in FLOATS:
        return f"it holds integers with scales in float16, bfloat16 or float32, not {spec.element}"
    size = next((size for size in SIZES if own % size == 0), None)
    if size is None:
        return f"its groups have 32, 64 or 128 values, which do not divide {own}"
    bits = next(bits for bits in BITS if bits >= spec.element.bits)
    if spec.offset != "minimum" and spec.scale_dtype == "float32":
        return "scale times code rounds twice there, which is exact for scales in float16 or bfloat16"
    return Packing("affine", bits, size, "float32" if spec.offset == "zero_point" else spec.scale_dtype)


def _biases(entry: Entry, one: Packing, scales: torch.Tensor, parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The value of code 0. PhiquantError where it passes the largest float16, or a zero point would be lost."""
    if "minimums" in parameters:
        return parameters["minimums"]
    if "zero_points" in parameters:
        zero = parameters["zero_points"]
        if bool(((scales == 0) & (zero != 0)).any()):
            raise PhiquantError(f"{entry.name}: a block of scale 0 has a zero point, which no minimum tells")
        low = -(1 << (one.bits - 1)) if entry.spec is not None and entry.spec.element.signed else 0
        return (low - zero) * scales
    middle = 1 << (one.bits - 1)
    if one.dtype == "float16" and bool((scales.float().abs() * middle > _LARGEST).any()):
        raise PhiquantError(
            f"{entry.name}: {middle} times a scale passes {_LARGEST:g}, the largest float16; store scales as bfloat16"
        )
    return scales * -middle


def _check_rope(rope: Rope) -> None:
    """mlx-lm finds the attention factor from the two context lengths alone."""
    computed = 1.0
    if rope.long is not None and rope.context > rope.original_context:
        computed = math.sqrt(1 + math.log(rope.context / rope.original_context) / math.log(rope.original_context))
    if abs(computed - rope.attention_factor) > 1e-6 * computed:
        raise PhiquantError(
            f"mlx-lm computes LongRoPE's attention factor {computed:.6f} from the context lengths, the model's is "
            f"{rope.attention_factor:.6f}, which its config.json cannot say; export it to another format"
        )
