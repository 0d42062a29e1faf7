"""What a calibrated run has done so far: one file of codes per decoder layer, each there whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .errors import PhiquantError
from .formats.receipt import version
from .spec import QuantSpec
from .tensor import PARAMETERS, QuantizedTensor


class CalibrationState:
    """The folder of a run; without one, nothing is kept.

    A run goes on only with the same solver, windows, grids, weights and versions: PhiquantError otherwise.
    """

    def __init__(
        self, folder: Path | None, solver: str, ids: Tensor, chosen: Sequence[tuple[str, nn.Module, QuantSpec]]
    ) -> None:
        self.folder = folder
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256(json.dumps([solver, version("phiquant"), torch.__version__]).encode())
        digest.update(ids.numpy().tobytes())
        for name, module, spec in chosen:
            weight = module.get_parameter("weight").detach()
            some = weight.flatten()[:: max(1, weight.numel() // 64)].float().cpu()
            digest.update(f"{name} {list(weight.shape)} {spec}".encode() + some.numpy().tobytes())
        self.fingerprint = digest.hexdigest()

    def activations(self, offload: bool) -> Path | None:
        """The file for activations, if they are to be kept in one."""
        return self.folder / "activations.bin" if offload and self.folder is not None else None

    def write(self, key: str, solved: Mapping[str, QuantizedTensor]) -> None:
        """Keep the codes of one decoder layer."""
        if self.folder is None:
            return
        tensors = {}
        for name, quantized in solved.items():
            for part, value in {"codes": quantized.codes, **quantized.parameters}.items():
                tensors[f"{name}.{part}"] = value.contiguous().cpu()
        path = self._path(key)
        partial = path.with_suffix(".partial")
        save_file(tensors, partial, {"fingerprint": self.fingerprint})
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)

    def read(self, key: str, specs: Mapping[str, QuantSpec]) -> dict[str, QuantizedTensor] | None:
        """The codes of one decoder layer; None if it was not finished."""
        if self.folder is None or not self._path(key).exists():
            return None
        path = self._path(key)
        try:
            with safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("fingerprint") != self.fingerprint:
                    raise PhiquantError(
                        f"{path} belongs to a run with another solver, text, grid, model or version; "
                        "delete the folder or give another"
                    )
                names = set(file.keys())
                solved = {}
                for name, spec in specs.items():
                    parts = {p: file.get_tensor(f"{name}.{p}") for p in PARAMETERS if f"{name}.{p}" in names}
                    parts = dict.fromkeys(("scales", "zero_points", "minimums")) | parts
                    solved[name] = QuantizedTensor(file.get_tensor(f"{name}.codes"), spec=spec, **parts)
                return solved
        except SafetensorError as error:
            raise PhiquantError(f"{path} is damaged ({error}); delete it to solve its layer again") from error

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{key}.safetensors"
