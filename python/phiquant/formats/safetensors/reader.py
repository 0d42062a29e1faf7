"""Reads safetensors folders back: compressed-tensors, and by their quantization_config GPTQ, AWQ and MLX ones.

Shares no code with the writers: headers are checked, bits unpacked and values decoded by numpy. What comes
back is in the words of the tensor's spec. N = rows, K = values of a row, G = groups of a row.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import PhiquantError
from ...extras import need
from ...spec import QuantSpec
from ...spec import spec as read_spec
from ...untrusted import read_json, reader
from ..mlx import reader as mlx_reader
from ..stored import Parts, StoredTensor
from ..tensor_files import SCALES, TensorFiles, blocks, e2m1, e4m3, narrowed, stream, widened
from . import awq_reader, gptq_reader
from .fused_reader import fused

OTHERS = {"gptq": gptq_reader, "awq": awq_reader, "mlx": mlx_reader}
_SMALL = {  # format -> element, codes packed two in a byte
    "mxfp4-pack-quantized": "fp4_e2m1", "nvfp4-pack-quantized": "fp4_e2m1", "mxfp8-quantized": "fp8_e4m3",
    "float-quantized": "fp8_e4m3", "naive-quantized": "fp8_e4m3",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class CompressedTensor(StoredTensor):
    """A weight of the folder. scheme: its config group in config.json, None if it is float."""

    scheme: Mapping[str, Any] | None
    files: TensorFiles

    @cached_property
    def spec(self) -> QuantSpec | None:
        """See StoredTensor.spec. A scheme says no more than this: how a scale was found, it does not."""
        if self.scheme is None:
            return None
        weights = self.scheme["weights"]
        size = f"g{weights['group_size']}" if "group" in weights["strategy"] else weights["strategy"]
        scale = SCALES[self.files.place(f"{self.name}_scale").dtype]
        if weights["type"] == "float":
            above = self._above
            two = "" if above is None or above == 1 else "/tensor"
            return read_spec(f"{_SMALL[self.stored_as]}-{size}-sym-{scale if not two else 'f32-e4m3'}{two}")
        if not weights["symmetric"]:
            return read_spec(f"uint{self._bits}-{size}-asym-{scale}")
        return read_spec(f"int{self._bits}-{size}-{'signmax' if size.startswith('g') else 'sym'}-{scale}")

    def parts(self, spec: QuantSpec, rows: slice | None = None) -> Parts:
        rows = rows or slice(0, self.shape[0])
        scales = self._parameter("_scale", rows)
        shape = spec.scale_shape((rows.stop - rows.start, self.shape[1]))
        if scales.shape != shape:
            raise PhiquantError(f"{self.name}: the file has scales {list(scales.shape)}, which are not {spec}'s")
        middle = 0 if spec.element.signed else 1 << (self._bits - 1)
        codes = self._codes(rows)
        if codes.dtype == np.int8:
            codes = codes if spec.element.signed else (codes.astype(np.int16) + middle).astype(np.uint8)
        wide = self.files.place(f"{self.name}_scale").dtype == "F32"
        narrow = narrowed(scales, spec.scale_dtype) if wide else scales
        if narrow is None:
            raise PhiquantError(f"{self.name}: the file has scales in float32, of which one is no {spec.scale_dtype}")
        found = {"codes": codes, "scales": narrow}
        if spec.offset == "zero_point":
            found["zero_points"] = self._zero_points(rows).astype(np.int32) + middle
        if spec.two_level is not None:
            found["super_scales"] = np.full(spec.super_shape(self.shape), 1 / (self._above or 1), np.float32)
        return found

    def raw(self, rows: slice | None = None) -> np.ndarray:
        return self.files.array(self.name, rows or slice(None))

    def values(self, rows: slice | None = None) -> np.ndarray:
        """The code, less the zero point, times the scale."""
        rows = rows or slice(0, self.shape[0] if self.shape else 1)
        if self.scheme is None:
            return self.files.floats(self.name, rows)
        scales = widened(self._parameter("_scale", rows), self.files.place(f"{self.name}_scale").dtype)
        codes = self._codes(rows)
        if codes.dtype == np.uint8:
            levels = e2m1(codes) if self._bits == 4 else e4m3(codes)
        else:
            levels = codes.astype(np.float32)
        decoded = blocks(levels, scales.shape[1])
        if not self.scheme["weights"]["symmetric"]:
            decoded = decoded - self._zero_points(rows).astype(np.float32)[..., None]
        return np.asarray((decoded * (scales / np.float32(self._above or 1))[..., None]).reshape(codes.shape))

    def reference(self, rows: slice | None = None) -> np.ndarray:
        """The real values as the package compressed-tensors decodes them by config.json, in float32 where it can."""
        if self.scheme is None:
            return self.values(rows)
        import torch

        registry = need("compressed_tensors.compressors", extra="hf").BaseCompressor
        scheme = need("compressed_tensors.quantization", extra="hf").QuantizationScheme(**self.scheme)
        state = {}
        for name in self.files.places:
            if name == self.name or name.startswith(f"{self.name}_"):
                array, dtype = self.files.array(name), self.files.place(name).dtype
                tensor = torch.from_numpy(array)
                views = {"BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn}
                tensor = tensor.view(views[dtype]) if dtype in views else tensor
                exponents = name.endswith("_scale") and "mx" in self.stored_as
                float_scales = name.endswith("_scale") and not exponents
                state["weight" + name.removeprefix(self.name)] = tensor.float() if float_scales else tensor
        decoded = registry.get_value_from_registry(scheme.format).decompress(state, scheme)["weight"]
        return np.asarray(decoded[rows or slice(None)].float().numpy())

    @property
    def _bits(self) -> int:
        return int((self.scheme or {})["weights"]["num_bits"])

    @cached_property
    def _above(self) -> float | None:
        """By what nvfp4's scales are divided. Its inverse must give the same scales: a power of two does."""
        name = f"{self.name}_global_scale"
        if name not in self.files:
            return None
        above = float(self.files.floats(name).reshape(-1)[0])
        scales = self.files.floats(f"{self.name}_scale")
        if not (above > 0 and np.array_equal(scales / np.float32(above), scales * np.float32(1 / above))):
            raise PhiquantError(
                f"{self.name}: its scales are divided by weight_global_scale {above:.9g}; two levels multiply, "
                "and 1 over it does not give the same values"
            )
        return above

    def _codes(self, rows: slice) -> np.ndarray:
        """int8 integers, or the bits of small floats in uint8: [N, K]."""
        stored = self.files.array(self._packed, rows)
        if self._packed == self.name:
            return stored
        codes = stream(stored, self._bits, self.shape[1])
        if self.stored_as != "pack-quantized":
            return codes
        return (codes.astype(np.int16) - (1 << (self._bits - 1))).astype(np.int8)

    @property
    def _packed(self) -> str:
        return f"{self.name}_packed" if f"{self.name}_packed" in self.files else self.name

    def _parameter(self, suffix: str, rows: slice) -> np.ndarray:
        """[N, G] of some rows; [1, 1] of a whole tensor."""
        name = f"{self.name}{suffix}"
        shape = self.files.place(name).shape
        if shape in ((), (1,)):
            return self.files.array(name).reshape(1, 1)
        if len(shape) != 2 or shape[0] != self.shape[0] or not shape[1] or self.shape[1] % shape[1]:
            raise PhiquantError(f"{name} has the shape {list(shape)}, the weight {list(self.shape)}; download it again")
        return self.files.array(name, rows)

    def _zero_points(self, rows: slice) -> np.ndarray:
        """As codes count: from the middle. [N, G] of some rows."""
        name = f"{self.name}_zero_point"
        if self.files.place(name).dtype == "I8":
            return self._parameter("_zero_point", rows)
        words = self.files.array(name)
        if words.ndim != 2 or words.shape[1] != self.files.place(f"{self.name}_scale").shape[-1]:
            raise PhiquantError(f"{name} has the shape {list(words.shape)}, which is not that of the scales, packed")
        down = stream(words.T, self._bits, self.shape[0])
        return (down.astype(np.int16) - (1 << (self._bits - 1))).astype(np.int8).T[rows]


@reader
def read(folder: str | Path) -> dict[str, StoredTensor]:
    """Every weight by its Hugging Face name. PhiquantError for a folder that is damaged."""
    other = _other(folder)
    if other is not None:
        return dict(other.read(folder))
    files = TensorFiles(folder)
    config = files.config.get("quantization_config") or {}
    result: dict[str, StoredTensor] = {}
    for name in files.places:
        if name.endswith("_g_idx"):
            raise PhiquantError(f"{name}: columns are grouped by activation order, which no grid of groups is; refused")
        if name.endswith((".weight", ".weight_packed")):
            weight = name.removesuffix("_packed")
            scheme = _scheme(config, weight.removesuffix(".weight")) if f"{weight}_scale" in files else None
            result[weight] = _tensor(files, weight, name, scheme)
    return fused(result)


@reader
def read_config(folder: str | Path) -> dict[str, Any]:
    """The config.json of the model in the folder."""
    other = _other(folder)
    if other is not None:
        return dict(other.read_config(folder))
    config = TensorFiles(folder).config
    return {key: value for key, value in config.items() if key not in ("quantization_config", "dtype")}


def _other(folder: str | Path) -> Any:
    """The reader of another layout, or None."""
    config = read_json(Path(folder) / "config.json")
    quantization = config.get("quantization_config") or config.get("quantization") or {}
    if not isinstance(quantization, dict):
        raise PhiquantError(f"{folder}: quantization_config in config.json is not an object")
    method = quantization.get("quant_method")
    if "quantization" in config or (quantization and method is None and "bits" in quantization):
        return mlx_reader
    if method not in (None, "compressed-tensors", *OTHERS):
        raise PhiquantError(
            f"{folder}: quant_method {method!r} is none that phiquant reads: compressed-tensors, {', '.join(OTHERS)}"
        )
    return OTHERS.get(str(method))


def _tensor(files: TensorFiles, weight: str, name: str, scheme: Mapping[str, Any] | None) -> CompressedTensor:
    if scheme is None:
        if files.place(name).dtype not in ("F32", "F16", "BF16"):
            raise PhiquantError(f"{name} is {files.place(name).dtype}, and has no {weight}_scale; download it again")
        return CompressedTensor(weight, files.place(name).dtype, files.place(name).shape, None, files)
    wanted = {"int-quantized": "I8", "pack-quantized": "I32"}.get(scheme["format"])
    wanted = wanted or ("U8" if _SMALL[scheme["format"]] == "fp4_e2m1" else "F8_E4M3")
    if files.place(name).dtype != wanted:
        raise PhiquantError(f"{name} is {files.place(name).dtype}; by config.json ({scheme['format']}) it is {wanted}")
    shape = files.place(name).shape
    if len(shape) != 2:
        raise PhiquantError(f"{name} has the shape {list(shape)}; codes are those of a matrix")
    if wanted == "I32":
        stored = files.array(f"{weight}_shape")
        bits, words = int(scheme["weights"]["num_bits"]), shape[1]
        shape = tuple(int(n) for n in stored.reshape(-1))
        if len(shape) != 2 or shape[0] != files.place(name).shape[0] or -(-shape[1] * bits // 32) != words:
            raise PhiquantError(f"{weight}_shape says {list(shape)}, which {words} words in a row do not hold")
    elif wanted == "U8":
        shape = (shape[0], 2 * shape[1])
    return CompressedTensor(weight, scheme["format"], shape, scheme, files)


def _scheme(config: Mapping[str, Any], module: str) -> Mapping[str, Any]:
    """The config group whose targets are this module, or its class unless it is ignored."""
    kind = "Embedding" if module.endswith("embed_tokens") else "Linear"
    groups = config.get("config_groups") or {}
    for group in groups.values() if isinstance(groups, dict) else ():
        targets, ignored = group.get("targets") or [], config.get("ignore") or []
        if module in targets or (
            any(_matches(target, module, kind) for target in targets)
            and not any(_matches(name, module, kind) for name in ignored)
        ):
            return _checked_scheme({"format": config.get("format"), **group}, module)
    raise PhiquantError(f"{module} has scales in the file, but config.json has no scheme for it; export again")


def _checked_scheme(group: Mapping[str, Any], module: str) -> Mapping[str, Any]:
    weights, kind = group.get("weights"), group.get("format")
    known = {"pack-quantized": "int", "int-quantized": "int"} | dict.fromkeys(_SMALL, "float")
    if not isinstance(weights, dict) or kind not in known:
        raise PhiquantError(f"{module}: config.json gives it the format {kind!r}; {', '.join(known)} can be read")
    plain = {"symmetric": True, "type": "int", "num_bits": 8, **weights}
    plain.setdefault("strategy", "group" if plain.get("group_size") else "tensor")
    if plain["type"] == "int" and kind == "naive-quantized":
        kind = "int-quantized"
    grouped = plain["strategy"] in ("group", "tensor_group")
    fits = (
        known[kind] == plain["type"]
        and plain["num_bits"] in ((1, 2, 3, 4, 5, 6, 7, 8) if plain["type"] == "int" else (4, 8))
        and (grouped or plain["strategy"] in ("channel", "tensor"))
        and (not grouped or (type(plain.get("group_size")) is int and plain["group_size"] > 0))
    )
    if not fits:
        described = {key: plain.get(key) for key in ("type", "num_bits", "strategy", "group_size")}
        raise PhiquantError(f"{module}: a scheme of {described} in {kind} is none that phiquant reads")
    return {**group, "format": kind, "weights": plain}


def _matches(target: str, module: str, kind: str) -> bool:
    """A name, a class, or "re:" and a regular expression, which must be too simple to run long."""
    if not target.startswith("re:"):
        return target in (module, kind)
    pattern = target.removeprefix("re:")
    if len(pattern) > 200 or sum(pattern.count(c) for c in "*+{") > 4 or re.search(r"\)[*+?{]", pattern):
        raise PhiquantError(f"config.json: the pattern {pattern[:80]!r} is too involved to be run on names")
    try:
        return re.match(pattern, module) is not None
    except re.error as error:
        raise PhiquantError(f"config.json: {pattern[:80]!r} is no regular expression ({error})") from error
