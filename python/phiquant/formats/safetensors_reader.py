"""Reads a compressed-tensors folder back, for verify: the container by safetensors, the bits by numpy.

Shares no code with the writer. What comes back is in the words of the tensor's spec. N = rows,
K = values of a row.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from ..errors import PhiquantError
from ..extras import need
from ..spec import QuantSpec
from ..spec import spec as read_spec
from .stored import Parts, StoredTensor

_SCALES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


@dataclass(frozen=True, eq=False)
class FolderTensor(StoredTensor):
    """A weight of the folder.

    stored_as: the name of the tensor that holds its codes or values. scheme: its config group in
    config.json, None if it is float. places: file of each of its tensors.
    """

    scheme: Mapping[str, Any] | None
    places: Mapping[str, Path]

    @property
    def spec(self) -> QuantSpec | None:
        if self.scheme is None:
            return None
        weights = self.scheme["weights"]
        size = {"group": f"g{weights.get('group_size')}"}.get(weights["strategy"], weights["strategy"])
        kind = "signmax" if size.startswith("g") else "sym"
        return read_spec(f"int{weights['num_bits']}-{size}-{kind}-{_SCALES[self.scales().dtype]}")

    def parts(self, spec: QuantSpec, rows: slice | None = None) -> Parts:
        """See StoredTensor.parts."""
        rows = rows or slice(0, self.shape[0])
        scales = self.scales()
        whole = scales.numel() == 1
        scales = scales.reshape(1, 1) if whole else scales[rows]
        if tuple(scales.shape) != spec.scale_shape((rows.stop - rows.start, self.shape[1])):
            raise PhiquantError(f"{self.name}: the file has scales {list(self.scales().shape)}, which are not {spec}'s")
        bits = scales.view(torch.int16) if scales.dtype == torch.bfloat16 else scales
        return {"codes": self.codes(rows), "scales": bits.numpy()}

    def raw(self, rows: slice | None = None) -> np.ndarray:
        """See StoredTensor.raw."""
        values = self._get_rows(self.name, rows or slice(0, self.shape[0]))
        return np.asarray((values.view(torch.uint16) if values.dtype == torch.bfloat16 else values).numpy())

    @property
    def _packed(self) -> bool:
        return self.stored_as.endswith("_packed")

    def codes(self, rows: slice) -> np.ndarray:
        """int8 [N, K] of some rows."""
        stored = self._get_rows(self.stored_as, rows)
        if not self._packed:
            if stored.dtype != torch.int8:
                raise PhiquantError(f"{self.name}: config.json says it has codes, the file has {stored.dtype}")
            return np.asarray(stored.numpy())
        words = stored.numpy().view(np.uint32)
        digits = [(words >> np.uint32(4 * j)) & np.uint32(15) for j in range(8)]
        return np.stack(digits, axis=-1).reshape(len(words), -1).astype(np.int8) - np.int8(8)

    def scales(self) -> torch.Tensor:
        """As stored: [N, K/g], [N, 1] or [1]."""
        return self._get("_scale")

    def values(self, rows: slice | None = None) -> np.ndarray:
        """The real values, float32, by the formula: code times scale."""
        rows = rows or slice(0, self.shape[0])
        if self.scheme is None:
            return np.asarray(self._get_rows(self.name, rows).float().numpy())
        codes = self.codes(rows)
        scales = self._scales_of(rows).float().numpy()
        blocks = codes.reshape(len(codes), scales.shape[1], -1).astype(np.float32) * scales[..., None]
        return np.asarray(blocks.reshape(codes.shape))

    def reference(self, rows: slice | None = None) -> np.ndarray:
        """The real values as the package compressed-tensors decodes them by config.json, float32."""
        rows = rows or slice(0, self.shape[0])
        if self.scheme is None:
            return self.values(rows)
        registry = need("compressed_tensors.compressors", extra="hf").BaseCompressor
        scheme = need("compressed_tensors.quantization", extra="hf").QuantizationScheme(**self.scheme)
        state = {"weight_scale": self._scales_of(rows).float()}
        if scheme.weights.strategy == "tensor":
            state["weight_scale"] = state["weight_scale"][:1, 0]
        stored = self._get_rows(self.stored_as, rows)
        state |= (
            {"weight_packed": stored, "weight_shape": torch.tensor([len(stored), self.shape[1]])}
            if self._packed
            else {"weight": stored}
        )
        decoded = registry.get_value_from_registry(scheme.format).decompress(state, scheme)
        return np.asarray(decoded["weight"].numpy())

    def _scales_of(self, rows: slice) -> torch.Tensor:
        """[N, groups] of some rows; the one scale of a whole tensor is repeated."""
        scales = self.scales()
        if scales.numel() == 1:
            return scales.reshape(1, 1).expand(rows.stop - rows.start, 1)
        return scales[rows]

    def _get(self, suffix: str) -> torch.Tensor:
        name = f"{self.name}{suffix}"
        if name not in self.places:
            raise PhiquantError(f"{self.name}: the folder has no tensor {name}; export again")
        with _open(self.places[name]) as file:
            return file.get_tensor(name)

    def _get_rows(self, name: str, rows: slice) -> torch.Tensor:
        """A copy: the file is unmapped when it is made."""
        with _open(self.places[name]) as file:
            return file.get_slice(name)[rows].clone().contiguous()


def read(folder: str | Path) -> dict[str, FolderTensor]:
    """Every weight by its Hugging Face name. PhiquantError for a folder that is damaged."""
    folder = Path(folder)
    config = _json(folder / "config.json").get("quantization_config") or {}
    places: dict[str, Path] = {}
    for path in _files(folder):
        with _open(path) as file:
            places |= dict.fromkeys(file.keys(), path)
    result = {}
    for name in places:
        if name.endswith((".weight", ".weight_packed")):
            weight = name.removesuffix("_packed")
            coded = f"{weight}_scale" in places
            scheme = _scheme(config, weight.removesuffix(".weight")) if coded else None
            result[weight] = FolderTensor(weight, name, _shape(weight, name, places), scheme, places)
    return result


def read_config(folder: str | Path) -> dict[str, Any]:
    """The config.json of the model in the folder."""
    config = _json(Path(folder) / "config.json")
    return {key: value for key, value in config.items() if key not in ("quantization_config", "dtype")}


def _shape(weight: str, name: str, places: Mapping[str, Path]) -> tuple[int, ...]:
    """Of the weight: stored beside packed codes."""
    if name.endswith("_packed"):
        if f"{weight}_shape" not in places:
            raise PhiquantError(f"{weight}: the folder has no tensor {weight}_shape; export again")
        with _open(places[f"{weight}_shape"]) as file:
            return tuple(int(n) for n in file.get_tensor(f"{weight}_shape"))
    with _open(places[name]) as file:
        return tuple(file.get_slice(name).get_shape())


def _files(folder: Path) -> list[Path]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    names = sorted({str(name) for name in _json(index).get("weight_map", {}).values()})
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise PhiquantError(f"{index} names {name!r}, which is not a file of the folder; export again")
    return [folder / name for name in names]


def _scheme(config: Mapping[str, Any], module: str) -> Mapping[str, Any]:
    """The config group whose targets are this module, or all linears unless it is ignored."""
    for group in config.get("config_groups", {}).values():
        targets = group.get("targets", [])
        if module in targets or ("Linear" in targets and module not in config.get("ignore", [])):
            return dict(group)
    raise PhiquantError(f"{module} has scales in the file, but config.json has no scheme for it; export again")


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise PhiquantError(f"cannot read {path}: {error}; export again") from error


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise PhiquantError(f"{path} is not a whole safetensors file: {error}; export again") from error
