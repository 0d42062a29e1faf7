"""Reads a compressed-tensors folder back, for verify: the container by safetensors, the bits by numpy.

Shares no code with the writer. What comes back is in the words of the tensor's spec. N = rows,
K = values of a row.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from ..errors import PhiquantError
from ..extras import need
from ..spec import QuantSpec

_CHUNK = 1 << 22  # values decoded at once
_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A weight of the folder, decoded on demand.

    name: "<module>.weight". stored_as: the name of the tensor that holds its codes or values.
    scheme: its config group in config.json, None if it is float. places: file of each of its tensors.
    """

    name: str
    stored_as: str
    scheme: Mapping[str, Any] | None
    places: Mapping[str, Path]

    @property
    def shape(self) -> tuple[int, ...]:
        if self._packed:
            return tuple(int(n) for n in self._get("_shape"))
        with _open(self.places[self.stored_as]) as file:
            return tuple(file.get_slice(self.stored_as).get_shape())

    @property
    def quantized(self) -> bool:
        return self.scheme is not None

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
        if not self.quantized:
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

    def digests(self, spec: QuantSpec | None) -> dict[str, str]:
        """What the receipt lists: SHA-256 of codes and parameters in the words of `spec`, or of the float bytes."""
        if (spec is not None) != self.quantized:
            found = "codes" if self.quantized else "float values"
            raise PhiquantError(f"{self.name}: the file has {found}, the receipt says {spec or 'float'}")
        digest = hashlib.sha256()
        for rows in self.row_slices():
            if spec is None:
                digest.update(_bytes(self._get_rows(self.name, rows)))
            else:
                codes = self.codes(rows)
                if codes.size and not spec.element.qmin <= codes.min() <= codes.max() <= spec.element.qmax:
                    raise PhiquantError(
                        f"{self.name}: codes {codes.min()}..{codes.max()} in the file do not fit {spec}"
                    )
                digest.update(np.ascontiguousarray(codes).data)
        if spec is None:
            return {"values": digest.hexdigest()}
        return {"codes": digest.hexdigest(), "parameters": hashlib.sha256(_bytes(self.scales())).hexdigest()}

    def row_slices(self) -> Iterator[slice]:
        """Slices of the rows, so that a large tensor is never decoded at once."""
        shape = self.shape
        rows = shape[0] if shape else 1
        step = max(1, _CHUNK // max(1, int(np.prod(shape[1:]))))
        for start in range(0, rows, step):
            yield slice(start, min(start + step, rows))

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


def read(folder: str | Path) -> dict[str, StoredTensor]:
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
            result[weight] = StoredTensor(weight, name, scheme, places)
    return result


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


def _bytes(t: torch.Tensor) -> memoryview:
    return t.contiguous().reshape(-1).view(torch.uint8).numpy().data
