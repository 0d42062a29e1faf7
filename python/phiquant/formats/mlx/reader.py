"""Reads MLX folders back, phiquant's own and those of mlx_lm.convert: bits unpacked and values decoded by numpy.

Shares no code with the writer. N = rows, K = values of a row, G = groups of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import PhiquantError
from ...extras import need
from ...spec import QuantSpec, Ternary
from ...spec import spec as read_spec
from ...untrusted import read_json, reader
from ..safetensors.fused_reader import fused
from ..stored import Parts, StoredTensor, once
from ..tensor_files import SCALES, TensorFiles, blocks, e2m1, e4m3, narrowed, part_names, stream, widened

# mode -> (bits, group size, element, scales): without a minimum there is one of each.
_MODES = {
    "mxfp4": (4, 32, "fp4_e2m1", "e8m0"),
    "mxfp8": (8, 32, "fp8_e4m3", "e8m0"),
    "nvfp4": (4, 16, "fp4_e2m1", "e4m3"),
}
_AFFINE = (2, 3, 4, 5, 6, 8)


@dataclass(frozen=True, eq=False)
class MLXTensor(StoredTensor):
    """A weight. mode: "affine" or one of MLX's small floats, None if it is stored in floats; bits of a code."""

    files: TensorFiles
    mode: str | None = None
    bits: int = 0

    @cached_property
    def spec(self) -> QuantSpec | None:
        """Affine groups whose minimum is always -2^(bits-1) scales are signed integers without one."""
        if self.mode is None:
            return None
        size = self.shape[1] // self.files.place(self._scales).shape[1]
        if self.mode != "affine":
            _, _, element, scale = _MODES[self.mode]
            return read_spec(f"{element}-g{size}-sym-{scale}")
        scale = SCALES[self.files.place(self._scales).dtype]
        if not self._symmetric(slice(None)):
            return read_spec(f"uint{self.bits}-g{size}-min-{scale}")
        kind = "signmax" if (self.files.floats(self._scales) < 0).any() else "sym"
        return read_spec(f"int{self.bits}-g{size}-{kind}-{scale}")

    def parts(self, spec: QuantSpec, rows: slice | None = None) -> Parts:
        rows = rows or slice(0, self.shape[0])
        shape = spec.scale_shape((rows.stop - rows.start, self.shape[1]))
        codes, scales = self._codes(rows), self.files.array(self._scales, rows)
        if self.mode != "affine":
            return {"codes": codes, "scales": once(self.name, scales, shape)}
        minimums = self.files.array(self._biases, rows)
        if spec.offset == "zero_point":
            return self._with_zero_points(spec, shape, codes, scales, minimums)
        found = {"scales": once(self.name, scales, shape)}
        if spec.offset == "minimum":
            return {"codes": codes, **found, "minimums": once(self.name, minimums, shape)}
        if not self._symmetric(rows) or not (spec.element.signed or isinstance(spec.element, Ternary)):
            raise PhiquantError(f"{self.name}: the file has minimums of its own, which {spec} cannot say")
        return {"codes": (codes.astype(np.int16) - (1 << (self.bits - 1))).astype(np.int8), **found}

    def raw(self, rows: slice | None = None) -> np.ndarray:
        return self.files.array(self.name, rows or slice(None))

    def values(self, rows: slice | None = None) -> np.ndarray:
        """scale * code + minimum, or scale * the float that the code is, in float32."""
        rows = rows or slice(0, self.shape[0] if self.shape else 1)
        if self.mode is None:
            return self.files.floats(self.name, rows)
        scales = self._floats(self._scales, rows)
        codes = self._codes(rows)
        if self.mode != "affine":
            levels = e2m1(codes) if self.bits == 4 else e4m3(codes)
            return np.asarray((blocks(levels, scales.shape[1]) * scales[..., None]).reshape(codes.shape))
        products = blocks(codes.astype(np.float32), scales.shape[1]) * scales[..., None]
        return np.asarray((products + self._floats(self._biases, rows)[..., None]).reshape(codes.shape))

    def reference(self, rows: slice | None = None) -> np.ndarray:
        """What mx.dequantize makes of the stored words, its parameters widened to float32."""
        rows = rows or slice(0, self.shape[0] if self.shape else 1)
        if self.mode is None:
            return self.values(rows)
        mx = need("mlx.core", extra="mlx")
        size = self.shape[1] // self.files.place(self._scales).shape[1]
        words, affine = mx.array(self.files.array(self.name, rows)), self.mode == "affine"
        scales = self._floats(self._scales, rows) if affine else self.files.array(self._scales, rows)
        options: dict[str, Any] = {"group_size": size, "bits": self.bits, "mode": self.mode}
        options |= {"biases": mx.array(self._floats(self._biases, rows))} if affine else {"dtype": mx.float32}
        return np.array(mx.dequantize(words, mx.array(scales), **options))

    @property
    def nbytes(self) -> int:
        """Of all that is stored: a signed grid too has minimums in the file."""
        beside = {None: [], "affine": [self._scales, self._biases]}.get(self.mode, [self._scales])
        return sum(self.files.place(name).nbytes for name in (self.name, *beside))

    @property
    def _scales(self) -> str:
        return f"{self.name.removesuffix('.weight')}.scales"

    @property
    def _biases(self) -> str:
        return f"{self.name.removesuffix('.weight')}.biases"

    def _codes(self, rows: slice) -> np.ndarray:
        return stream(self.files.array(self.name, rows), self.bits, self.shape[1])

    def _floats(self, name: str, rows: slice) -> np.ndarray:
        dtype = "F8_E4M3" if self.mode == "nvfp4" else self.files.place(name).dtype
        return widened(self.files.array(name, rows), dtype)

    def _symmetric(self, rows: slice) -> bool:
        scales, minimums = (self.files.floats(name, rows) for name in (self._scales, self._biases))
        return np.array_equal(minimums, scales * np.float32(-(1 << (self.bits - 1))))

    def _with_zero_points(
        self, spec: QuantSpec, shape: tuple[int, ...], codes: np.ndarray, scales: np.ndarray, minimums: np.ndarray
    ) -> Parts:
        """z = -minimum / scale; the file keeps both in float32, in which their product is exact."""
        kept, low = once(self.name, scales, shape), once(self.name, minimums, shape)
        with np.errstate(divide="ignore", invalid="ignore"):
            zero = np.where(kept == 0, 0, np.rint(-low.astype(np.float64) / kept))
        narrow = narrowed(kept, spec.scale_dtype)
        if scales.dtype != np.float32 or narrow is None or not np.array_equal(-zero * kept, low.astype(np.float64)):
            raise PhiquantError(f"{self.name}: its minimums are no zero points times the scales of {spec}")
        middle = 1 << (self.bits - 1) if spec.element.signed else 0
        counted = (codes.astype(np.int16) - middle).astype(np.int8) if middle else codes
        return {"codes": counted, "scales": narrow, "zero_points": zero.astype(np.int32) - middle}


@reader
def read(folder: str | Path) -> dict[str, StoredTensor]:
    """Every weight by its Hugging Face name. PhiquantError for a folder that is damaged."""
    files = TensorFiles(folder, "model*.safetensors")
    settings = _settings(files.config)
    coded = set(part_names(files.places, ".scales"))
    result: dict[str, StoredTensor] = {}
    for name, place in files.places.items():
        module, _, last = name.rpartition(".")
        if last in ("scales", "biases") and f"{module}.weight" in files:
            continue
        if module in coded and last == "weight":
            result[name] = _coded(files, name, settings.get(module) or settings)
        elif place.dtype in ("F32", "F16", "BF16"):
            result[name] = MLXTensor(name, place.dtype, place.shape, files)
        else:
            raise PhiquantError(f"{name} is {place.dtype} and has no scales beside it; refused")
    return fused(result)


@reader
def read_config(folder: str | Path) -> dict[str, Any]:
    """The Hugging Face config.json of the model: of LongRoPE its true long factors, whatever MLX was told."""
    config = read_json(Path(folder) / "config.json")
    kept = {k: v for k, v in config.items() if k not in ("quantization", "quantization_config", "phiquant", "dtype")}
    own = config.get("phiquant")
    if isinstance(own, dict) and "long_factor" in own and isinstance(kept.get("rope_scaling"), dict):
        kept["rope_scaling"] = {**kept["rope_scaling"], "long_factor": own["long_factor"]}
    return kept


def _settings(config: Mapping[str, Any]) -> Mapping[str, Any]:
    found = config.get("quantization") or config.get("quantization_config") or {}
    if not isinstance(found, dict):
        raise PhiquantError("config.json: quantization is not an object")
    return found


def _coded(files: TensorFiles, name: str, settings: Any) -> MLXTensor:
    """Bits and groups by the shapes, as mlx-lm finds them; config.json must not say otherwise."""
    module = name.removesuffix(".weight")
    words, scales = files.place(name), files.place(f"{module}.scales")
    if words.dtype != "U32" or len(words.shape) != 2 or len(scales.shape) != 2 or words.shape[0] != scales.shape[0]:
        raise PhiquantError(
            f"{name} ({words.dtype} {list(words.shape)}) and its scales ({list(scales.shape)}) are no rows of codes"
        )
    settings = settings if isinstance(settings, dict) else {}
    size, bits = settings.get("group_size"), settings.get("bits")
    mode = settings.get("mode", "affine")
    if mode != "affine" and mode not in _MODES:
        raise PhiquantError(f"{module}: the mode {mode!r} is none of affine, {', '.join(_MODES)}")
    size, bits = _MODES[mode][1::-1] if mode in _MODES else (size, bits)
    if type(size) is not int or bits not in _AFFINE or size < 1:
        raise PhiquantError(f"{module}: config.json says {bits!r} bits and groups of {size!r}")
    columns = scales.shape[1] * size
    if not columns or words.shape[1] * 32 != columns * bits:
        raise PhiquantError(
            f"{name} has {words.shape[1]} words in a row; {scales.shape[1]} groups of {size} codes of {bits} bits "
            f"would take {columns * bits / 32:g}"
        )
    if (scales.dtype == "U8") != (mode in _MODES):
        raise PhiquantError(f"{module}.scales is {scales.dtype}, which the mode {mode} does not have")
    if mode == "affine" and files.place(f"{module}.biases").shape != scales.shape:
        raise PhiquantError(f"{module}.biases has another shape than its scales; download it again")
    stored_as = f"affine {bits}-bit g{size}" if mode == "affine" else mode
    return MLXTensor(name, stored_as, (words.shape[0], columns), files, mode, bits)
