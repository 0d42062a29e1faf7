"""The state of a training run in one safetensors file, so that an interrupted run continues where it was."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from .errors import PhiquantError
from .modules import QATEmbedding, QATLinear
from .tensor import sampled


class Checkpoint:
    """Weights, optimizer moments, ranges and the report of a run; the file is replaced whole each time."""

    def __init__(
        self,
        folder: Path,
        student: nn.Module,
        optimizer: torch.optim.Optimizer,
        trained: dict[str, nn.Parameter],
        settings: dict[str, Any],
        ids: torch.Tensor,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "qat-checkpoint.safetensors"
        self.student, self.optimizer, self.trained = student, optimizer, trained
        self.fingerprint = fingerprint(student, trained, settings, ids)

    def _ranges(self) -> dict[str, torch.Tensor]:
        """The observers' and quantizers' buffers; training replaces them, so they are looked up each time."""
        kinds = (".weight_quantizer.", ".input_quantizer.")
        return {name: buffer for name, buffer in self.student.named_buffers() if any(kind in name for kind in kinds)}

    def save(self, report: dict[str, Any]) -> None:
        """Write the state beside the old file, then replace it."""
        tensors = {f"value.{name}": p.detach() for name, p in self.trained.items()}
        tensors |= {f"buffer.{name}": b for name, b in self._ranges().items()}
        for name, parameter in self.trained.items():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"{key}.{name}"] = value
        partial = self.path.with_suffix(".partial")
        metadata = {"fingerprint": self.fingerprint, "report": json.dumps(report)}
        save_file({name: t.contiguous() for name, t in tensors.items()}, partial, metadata)
        partial.replace(self.path)

    def restore(self) -> dict[str, Any] | None:
        """Load the checkpoint and return its report; None if there is none yet.

        PhiquantError if the file is damaged or belongs to another run.
        """
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("fingerprint") == self.fingerprint:
                    self._load(file)
                    return json.loads(metadata["report"])
        except SafetensorError as error:
            raise PhiquantError(f"{self.path} is damaged ({error}); delete it to start again") from error
        raise PhiquantError(
            f"{self.path} belongs to a run with other settings, text or weights; delete it or give another folder"
        )

    def _load(self, file: Any) -> None:
        names = set(file.keys())
        ranges = [name for name in names if name.startswith("buffer.")]
        self.student.load_state_dict({n.removeprefix("buffer."): file.get_tensor(n) for n in ranges}, strict=False)
        for name, parameter in self.trained.items():
            parameter.data.copy_(file.get_tensor(f"value.{name}"))
            keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}.{name}" in names]
            self.optimizer.state[parameter] = {key: file.get_tensor(f"{key}.{name}") for key in keys}


def fingerprint(
    student: nn.Module, trained: dict[str, nn.Parameter], settings: dict[str, Any], ids: torch.Tensor
) -> str:
    """What the run depends on: settings, text, grids, and some values of every weight it starts from."""
    digest = hashlib.sha256(json.dumps(settings).encode())
    digest.update(ids.numpy().tobytes())
    for name, module in student.named_modules():
        if isinstance(module, QATLinear | QATEmbedding):
            quantizer = module.weight_quantizer
            digest.update(f"{name} {type(quantizer).__name__} {quantizer.spec}".encode())
    on_grid = {f"{n}.weight": m.weight for n, m in student.named_modules() if isinstance(m, QATLinear | QATEmbedding)}
    for name, value in (on_grid | trained).items():
        digest.update(f"{name} {list(value.shape)}".encode() + sampled(value))
    return digest.hexdigest()
