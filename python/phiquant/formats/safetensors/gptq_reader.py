"""Reads GPTQ checkpoints as AutoGPTQ and GPTQModel write them.

A linear [N, K] is stored by columns of the weight, in codes of b = 2, 3, 4 or 8 bits:
    qweight I32 [K b / 32, N]   the codes of a column, one after the other down the rows, the lowest bit first
    qzeros  I32 [G, N b / 32]   zero points along the row; of "gptq" (version 1) less one, of "gptq_v2" as they are
    scales  F16 [G, N]          g_idx I32 [K]: the group of each input channel
and w = s (q - z). Version 1 wraps: a stored 2^b - 1 is the zero point 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import PhiquantError
from ...spec import QuantSpec
from ...spec import spec as read_spec
from ..stored import Parts, StoredTensor
from ..tensor_files import SCALES, TensorFiles, blocks, part_names, stream, widened
from .fused_reader import fused

SUFFIXES = (".qweight", ".qzeros", ".scales", ".g_idx")


@dataclass(frozen=True, eq=False)
class ColumnTensor(StoredTensor):
    """A weight stored with its input channels first. bits: of a code; N = rows of the weight, G = groups of a row."""

    files: TensorFiles
    bits: int
    one_less: bool = False

    @cached_property
    def spec(self) -> QuantSpec:
        """Symmetric if every zero point is the middle."""
        groups = self.files.place(f"{self._module}.scales").shape[0]
        grain = "channel" if groups == 1 else f"g{self.shape[1] // groups}"
        scale = SCALES[self.files.place(f"{self._module}.scales").dtype]
        middle = bool((self._all_zero_points == 1 << (self.bits - 1)).all())
        return read_spec(f"int{self.bits}-{grain}-sym-{scale}" if middle else f"uint{self.bits}-{grain}-asym-{scale}")

    def parts(self, spec: QuantSpec, rows: slice | None = None) -> Parts:
        rows = rows or slice(0, self.shape[0])
        scales, zeros, codes = self._scales(rows), self._all_zero_points[rows], self.codes(rows)
        if scales.shape != spec.scale_shape((rows.stop - rows.start, self.shape[1])):
            raise PhiquantError(f"{self.name}: the file has {scales.shape[1]} groups in a row, which are not {spec}'s")
        if spec.offset == "zero_point":
            return {"codes": codes, "scales": scales, "zero_points": zeros.astype(np.int32)}
        middle = 1 << (self.bits - 1)
        if not (zeros == middle).all():
            raise PhiquantError(f"{self.name}: the file has zero points besides {middle}, which {spec} cannot say")
        return {"codes": (codes.astype(np.int16) - middle).astype(np.int8), "scales": scales}

    def raw(self, rows: slice | None = None) -> np.ndarray:
        raise PhiquantError(f"{self.name} is stored as codes ({self.stored_as}), not as floats")

    def values(self, rows: slice | None = None) -> np.ndarray:
        """s (q - z) in float32, where the difference is exact."""
        rows = rows or slice(0, self.shape[0])
        scales = widened(self._scales(rows), self.files.place(f"{self._module}.scales").dtype)
        zeros = self._all_zero_points[rows].astype(np.float32)
        codes = self.codes(rows)
        decoded = (blocks(codes.astype(np.float32), scales.shape[1]) - zeros[..., None]) * scales[..., None]
        return np.asarray(decoded.reshape(codes.shape))

    def reference(self, rows: slice | None = None) -> np.ndarray:
        """The same: the packages that define the layout bring kernels for GPUs alone."""
        return self.values(rows)

    def codes(self, rows: slice) -> np.ndarray:
        """uint8 [N, K] of some rows."""
        return stream(self.files.array(f"{self._module}.qweight", (slice(None), rows)).T, self.bits, self.shape[1])

    def zero_points(self) -> np.ndarray:
        """Of the whole tensor: uint8 [N, G]."""
        stored = stream(self.files.array(f"{self._module}.qzeros"), self.bits, self.shape[0])
        return (stored + np.uint8(self.one_less)) & np.uint8((1 << self.bits) - 1)

    @property
    def _module(self) -> str:
        return self.name.removesuffix(".weight")

    @cached_property
    def _all_zero_points(self) -> np.ndarray:
        zeros = self.zero_points()
        return np.ascontiguousarray(zeros.T)

    def _scales(self, rows: slice) -> np.ndarray:
        return np.ascontiguousarray(self.files.array(f"{self._module}.scales", (slice(None), rows)).T)


@dataclass(frozen=True, eq=False)
class FloatTensor(StoredTensor):
    """A tensor that was left in float."""

    files: TensorFiles

    @property
    def spec(self) -> None:
        return None

    def parts(self, spec: QuantSpec, rows: slice | None = None) -> Parts:
        raise PhiquantError(f"{self.name} is stored as {self.stored_as}, and holds no codes on {spec}")

    def raw(self, rows: slice | None = None) -> np.ndarray:
        return self.files.array(self.name, rows or slice(None))

    def values(self, rows: slice | None = None) -> np.ndarray:
        return self.files.floats(self.name, rows or slice(None))

    def reference(self, rows: slice | None = None) -> np.ndarray:
        return self.values(rows)


def read(folder: str | Path) -> dict[str, StoredTensor]:
    """Every weight by its Hugging Face name. PhiquantError for a folder that is damaged, or ordered by activations."""
    files = TensorFiles(folder)
    settings = files.config["quantization_config"]
    bits, version = settings.get("bits"), settings.get("checkpoint_format", "gptq")
    if bits not in (2, 3, 4, 8) or version not in ("gptq", "gptq_v2"):
        raise PhiquantError(f"{folder}: GPTQ of {bits!r} bits in the form {version!r} is none that phiquant reads")
    result = {}
    for module in part_names(files.places, ".qweight"):
        rows = files.place(f"{module}.qweight").shape[-1]
        columns = _columns(files, module, bits)
        name = f"{module}.weight"
        check_shapes(files, module, {".qzeros": -(-rows * bits // 32), ".scales": rows})
        _check_groups(files, module, columns)
        result[name] = ColumnTensor(name, f"GPTQ {bits}-bit", (rows, columns), files, bits, version == "gptq")
    return with_floats(files, result)


def read_config(folder: str | Path) -> dict[str, Any]:
    """The config.json of the model in the folder."""
    config = TensorFiles(folder).config
    return {key: value for key, value in config.items() if key not in ("quantization_config", "dtype", "torch_dtype")}


def with_floats(files: TensorFiles, coded: dict[str, ColumnTensor]) -> dict[str, StoredTensor]:
    """The coded tensors and those left in float, fused. PhiquantError for a bias that is not 0: Phi-3 has none."""
    result: dict[str, StoredTensor] = dict(coded)
    for name, place in files.places.items():
        module = name.rpartition(".")[0]
        if f"{module}.weight" in coded:
            if name.endswith(".bias"):
                if files.floats(name).any():
                    raise PhiquantError(f"{name} is not 0, and Phi-3's linears have no bias; refused")
            elif not name.endswith(SUFFIXES):
                raise PhiquantError(f"{name} is no part of a quantized linear; refused")
        elif place.dtype in ("F32", "F16", "BF16") and not name.endswith("rotary_emb.inv_freq"):
            result[name] = FloatTensor(name, place.dtype, place.shape, files)
    return fused(result)


def check_shapes(files: TensorFiles, module: str, widths: dict[str, int]) -> None:
    """PhiquantError unless the parts of a module have as many columns, and a row for every group."""
    groups = set()
    for suffix, width in widths.items():
        shape = files.place(f"{module}{suffix}").shape
        if len(shape) != 2 or shape[1] != width:
            raise PhiquantError(f"{module}{suffix} has the shape {list(shape)}; {width} columns were due")
        groups.add(shape[0])
    if len(groups) != 1 or 0 in groups:
        raise PhiquantError(f"{module}: its scales and zero points have {sorted(groups)} groups; download it again")
    for suffix, kinds in ((".qweight", ("I32",)), (".qzeros", ("I32",)), (".scales", ("F16", "BF16", "F32"))):
        if files.place(f"{module}{suffix}").dtype not in kinds:
            raise PhiquantError(f"{module}{suffix} is {files.place(f'{module}{suffix}').dtype}, not {kinds[0]}")


def _columns(files: TensorFiles, module: str, bits: int) -> int:
    """Input channels: words of 32 bits hold whole runs of codes, so their number tells."""
    shape = files.place(f"{module}.qweight").shape
    if len(shape) != 2 or not shape[0] or shape[0] * 32 % bits:
        raise PhiquantError(f"{module}.qweight has the shape {list(shape)}, which no codes of {bits} bits fill")
    return shape[0] * 32 // bits


def _check_groups(files: TensorFiles, module: str, columns: int) -> None:
    """Groups of neighbours, in order: what a grid of groups is. PhiquantError for act-order, with the first place."""
    groups = (files.place(f"{module}.scales").shape or (0,))[0]
    if not groups or columns % groups:
        raise PhiquantError(f"{module}: {groups} groups do not divide {columns} input channels")
    if f"{module}.g_idx" not in files:
        return
    expected = np.repeat(np.arange(groups), columns // groups)
    found = files.array(f"{module}.g_idx").reshape(-1)
    if found.shape != expected.shape:
        raise PhiquantError(f"{module}.g_idx has {found.size} entries for {columns} input channels")
    if (found != expected).any():
        at = int(np.argmax(found != expected))
        raise PhiquantError(
            f"{module}: input channel {at} belongs to group {found[at]} (g_idx), {expected[at]} was due: columns were "
            "grouped by activation order (desc_act), and a group of scattered columns is no block of a grid. Quantize "
            "with desc_act=False or static groups"
        )
