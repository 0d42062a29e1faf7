"""auto: which solver and transforms suit a model and its grids, by measuring each on text that it has not seen.

KL(float || candidate) per token on the last windows of the calibration data, which no candidate is calibrated on;
the best is then solved on all windows, so its codes are those that asking for it by name gives.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .errors import PhiquantError
from .formats.receipt import version
from .modules import StoredCodes
from .solvers import SOLVERS
from .tensor import sampled
from .transforms import TRANSFORMS

Model = TypeVar("Model", bound=nn.Module)
HELD = 4  # one window in so many is kept to measure on
_ADAROUND = 1e10  # multiplications of one step, N K^2 over the linears: beyond it adaround is not tried
_TOKENS = 64  # whose probabilities are compared at a time
_log = logging.getLogger("phiquant")


@dataclass(frozen=True)
class Candidate:
    """A solver after transforms. data: whether it is calibrated."""

    solver: str
    transforms: tuple[str, ...] = ()
    data: bool = True

    @property
    def name(self) -> str:
        free = not self.data and self.solver in ("mse", "kmeans")  # which would use data
        return "+".join((*self.transforms, f"{self.solver}:free" if free else self.solver))


CANDIDATES = tuple(
    candidate
    for candidate in (
        *(Candidate(solver, data=False) for solver in ("rtn", "mse", "hqq", "kmeans")),
        *(Candidate(solver) for solver in ("mse", "kmeans", "clip", "gptq", "gptq_mse", "gptq_refine", "adaround")),
        *(Candidate(solver, ("awq",)) for solver in ("clip", "gptq", "gptq_mse", "gptq_refine")),
        *(Candidate("gptq_mse", (transform,)) for transform in ("smooth", "rotate")),
    )
    if candidate.solver in SOLVERS and all(name in TRANSFORMS for name in candidate.transforms)
)


# (copy of the model, candidate, windows, folder of the run) -> the copy, quantized in place
Attempt = Callable[[Model, Candidate, Tensor, Path | None], Model]


def auto(
    model: Model, solver: str, grids: str, ids: Tensor, attempt: Attempt[Model], folder: Path | None = None
) -> Model:
    """Quantize `model` in place by the candidate of least KL; receipts tell of all.

    solver: "auto", or "auto:gptq,awq+gptq": only these candidates. grids: what tells this run from others.
    ids: windows [n, T], n >= 2. folder: finished candidates are kept there, for a run that goes on after a kill.
    Memory: the float model twice, and one candidate's codes. A candidate that refuses a grid is left out.
    """
    if len(ids) < 2:
        raise PhiquantError("auto keeps some windows to measure on; give it at least 2 windows of calibration data")
    held = max(1, len(ids) // HELD)
    found: dict[str, Tensor] = {}
    refused: dict[str, str] = {}
    tried = candidates(solver, model)
    results = _Results(folder, model, grids, ids)
    for candidate in tried:
        began = time.monotonic()
        kl = results.read(candidate.name)
        try:
            if kl is None:
                place = None if folder is None else folder / candidate.name
                kl = divergence(attempt(copy.deepcopy(model), candidate, ids[:-held], place), model, ids[-held:])
                results.write(candidate.name, kl)
        except ValueError as error:  # PhiquantError, or a grid that the solver cannot make
            refused[candidate.name] = str(error)
            _log.info("auto: %s does not apply: %s", candidate.name, error)
            continue
        found[candidate.name] = kl
        _log.info("auto: %s has KL %.3e +- %.1e, %.1f s", candidate.name, *_mean(kl), time.monotonic() - began)
    if not found:
        raise PhiquantError(f"auto found no candidate for this model; {tried[0].name}: {refused[tried[0].name]}")
    best = min((c for c in tried if c.name in found), key=lambda c: float(found[c.name].mean()))
    for name, kl in found.items():
        if name != best.name:
            _log.info("auto: %s has %.2e +- %.1e more KL than %s", name, *_mean(kl - found[best.name]), best.name)
    attempt(model, best, ids, None if folder is None else folder / "chosen")
    told = {
        "chosen": best.name,
        "held_tokens": found[best.name].numel(),
        "kl": {name: float(f"{_mean(kl)[0]:.4g}") for name, kl in found.items()},
        "refused": sorted(refused),
    }
    for module in model.modules():
        if isinstance(module, StoredCodes):
            module.origin = {**module.origin, "auto": told}
    return model


def is_auto(solver: str) -> bool:
    """Whether that names auto, maybe with its candidates."""
    return solver.partition(":")[0] == "auto"


def candidates(solver: str, model: nn.Module | None = None) -> Sequence[Candidate]:
    """Those that "auto" or "auto:NAME,NAME" asks for, for a model. PhiquantError for an unknown name."""
    by_name = {candidate.name: candidate for candidate in CANDIDATES}
    named = [name for name in solver.partition(":")[2].split(",") if name]
    if unknown := [name for name in named if name not in by_name]:
        raise PhiquantError(f"auto knows no candidate {unknown[0]!r}; it knows: {', '.join(by_name)}")
    if named:
        return [by_name[name] for name in named]
    linears = [m for n, m in (model.named_modules() if model else ()) if isinstance(m, nn.Linear) and ".layers." in n]
    small = sum(m.out_features * m.in_features**2 for m in linears) <= _ADAROUND
    return [candidate for candidate in CANDIDATES if small or candidate.solver != "adaround"]


def divergence(model: nn.Module, reference: nn.Module, ids: Tensor) -> Tensor:
    """KL(reference || model) in nats at every position of the windows `ids` [n, T]: float64 [n T]."""
    values = []
    device = next(model.parameters()).device
    with torch.no_grad():
        for row in ids.to(device).split(1):
            q, p = (m.eval()(row, use_cache=False).logits[0] for m in (model, reference))
            for ours, theirs in zip(q.split(_TOKENS), p.split(_TOKENS), strict=True):
                q_log, p_log = ours.float().log_softmax(1), theirs.float().log_softmax(1)
                values.append(F.kl_div(q_log, p_log, reduction="none", log_target=True).sum(1, dtype=torch.float64))
    return torch.cat(values).cpu()


def _mean(values: Tensor) -> tuple[float, float]:
    """And its standard error."""
    return float(values.mean()), float(values.std()) / math.sqrt(len(values))


class _Results:
    """The KL of finished candidates, a file each, there whole or not at all; without a folder nothing is kept."""

    def __init__(self, folder: Path | None, model: nn.Module, grids: str, ids: Tensor) -> None:
        self.folder = folder
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        facts = f"{grids} {version('phiquant')} {torch.__version__}"
        digest = hashlib.sha256(facts.encode() + ids.contiguous().numpy().tobytes())
        for name, weight in model.named_parameters():
            digest.update(name.encode() + sampled(weight))
        self.fingerprint = digest.hexdigest()

    def read(self, name: str) -> Tensor | None:
        """The KL of each token; None if the candidate was not finished. PhiquantError if it is of another run."""
        if self.folder is None or not self._path(name).exists():
            return None
        try:
            with safe_open(self._path(name), framework="pt") as file:
                if (file.metadata() or {}).get("fingerprint") == self.fingerprint:
                    return file.get_tensor("kl")
        except SafetensorError as error:
            raise PhiquantError(f"{self._path(name)} is damaged ({error}); delete it to try {name} again") from error
        raise PhiquantError(
            f"{self._path(name)} belongs to a run with another text, grid, model or version; "
            "delete the folder or give another"
        )

    def write(self, name: str, kl: Tensor) -> None:
        if self.folder is None:
            return
        partial = self._path(name).with_suffix(".partial")
        save_file({"kl": kl}, partial, {"fingerprint": self.fingerprint})
        partial.replace(self._path(name))
        shutil.rmtree(self.folder / name, ignore_errors=True)  # its layers have served

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}.kl"
