"""AdamW as training takes it: weights at one rate, what grids learn at rates of their own, both on one schedule."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from .learned import learned_groups
from .modules import QATEmbedding, QATLinear
from .qat_settings import Settings, schedule


class Steps:
    """The steps over what of `module` requires a gradient.

    trained: those parameters by name. Gradients are clipped at settings.clip, those of weights and those of what
    grids learn each by the norm of their own: sums over groups would drown the weights'.
    """

    def __init__(self, module: nn.Module, settings: Settings) -> None:
        self.settings = settings
        self.trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        groups = learned_groups(module, settings.scale_learning_rate)
        self.learned = [p for group in groups for p in group["params"]]
        known = {id(p) for p in self.learned}
        self.weights = [p for p in self.trained.values() if id(p) not in known]
        if self.weights:
            decay = settings.weight_decay
            groups.insert(0, {"params": self.weights, "lr": settings.learning_rate, "weight_decay": decay})
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
        self.peaks = [group["lr"] for group in groups]

    def take(self, done: float) -> None:
        """One step by the gradients that are there, `done` of the run being over; then they are gone."""
        share = schedule(done, self.settings.warmup)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * share
        for parameters in (self.weights, self.learned):
            nn.utils.clip_grad_norm_(parameters, self.settings.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @property
    def values(self) -> int:
        """How many values are trained; AdamW keeps two moments of each."""
        return sum(p.numel() for p in self.trained.values())


@contextmanager
def only_grids(module: nn.Module, train_float: bool = False) -> Iterator[bool]:
    """Where some layers train through grids, nothing else receives a gradient meanwhile, but with `train_float`.

    Gives whether there are such layers.
    """
    on_grid = {id(p) for m in module.modules() if isinstance(m, QATLinear | QATEmbedding) for p in _of_grid(m)}
    frozen = [
        p for p in module.parameters() if on_grid and not train_float and id(p) not in on_grid and p.requires_grad
    ]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield bool(on_grid)
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


def _of_grid(layer: nn.Module) -> Iterator[nn.Parameter]:
    """What of a layer is trained: its weight, and what its grids learn."""
    yield layer.get_parameter("weight")
    for name in ("weight_quantizer", "input_quantizer"):
        if (quantizer := getattr(layer, name, None)) is not None:
            yield from quantizer.parameters()


def autocast(device: torch.device, settings: Settings) -> Any:
    """The products of a step in bfloat16, if the settings or, by default, the device say so."""
    wanted = _fast_bfloat16(device) if settings.bfloat16 is None else settings.bfloat16
    return torch.autocast(device.type, torch.bfloat16) if wanted else nullcontext()


def _fast_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported())
