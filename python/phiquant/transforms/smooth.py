"""SmoothQuant: what makes a channel of activations large moves into the weights that read it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PhiquantError
from ..models import phi
from ..quant_spec import QuantSpec
from .pairs import Pair, rescale
from .pairs import pairs as all_pairs

_BATCH = 8  # windows in one forward
# The pairs by what their consumer is.
_PARTS = {"qkv": "qkv_proj", "o": "o_proj", "gate_up": "gate_up_proj", "down": "down_proj", "head": phi.HEAD}


@torch.no_grad()
def smooth(
    model: nn.Module,
    ids: Tensor | None,
    specs: Mapping[str, QuantSpec | None],
    alpha: float = 0.5,
    pairs: str = "qkv+o+gate_up+down+head",
) -> dict[str, Any]:
    """Divide each channel j of a linear's input by s_j = max|X_j|^alpha / max|W_j|^(1 - alpha), and multiply W_j by it.

    (Xiao et al., arXiv 2211.10438.) The norm, the v or the up rows that make the channel are divided; under grouped
    queries a value channel has one s for all heads that read it.
    alpha: 0 to 1; how much of the activations' size moves. pairs: which linears, joined by "+"; lm_head is left
        out where it stays in float.
    """
    if not 0 <= alpha <= 1:
        raise PhiquantError(f"smooth: alpha is between 0 and 1, not {alpha}")
    if unknown := [part for part in pairs.split("+") if part not in _PARTS]:
        raise PhiquantError(f"smooth: {unknown[0]!r} is none of the pairs {', '.join(_PARTS)}")
    chosen = [pair for pair in _pairs(model, pairs.split("+")) if _rounded(pair.consumer, specs)]
    assert ids is not None
    largest = input_sizes(model, ids, [pair.consumer for pair in chosen])
    for pair in chosen:
        weight = model.get_submodule(pair.consumer).get_parameter("weight")
        made, read = (pair.channels(size.float()).amax(0) for size in (largest[pair.consumer], weight.abs().amax(0)))
        s = made.pow(alpha) / read.pow(1 - alpha)
        silent = (made == 0) | (read == 0)
        rescale(model, pair, torch.where(silent, 1.0, s.clamp(1e-5, 1e5)))
    return {"alpha": alpha, "pairs": pairs, "windows": len(ids)}


def _pairs(model: nn.Module, parts: Iterable[str]) -> list[Pair]:
    endings = tuple(_PARTS[part] for part in parts)
    return [pair for pair in all_pairs(model) if pair.consumer.endswith(endings)]


def _rounded(name: str, specs: Mapping[str, QuantSpec | None]) -> bool:
    """Whether the linear will have codes. Without specs: those of the decoder layers."""
    if not specs:
        return name != phi.HEAD
    return any(specs.get(part) is not None for part in (name, *phi.slice_names(name)))


@torch.no_grad()
def input_sizes(model: nn.Module, ids: Tensor, names: Iterable[str]) -> dict[str, Tensor]:
    """The largest |x| of each input channel [K] of these linears on the windows `ids` [n, T]."""
    sizes: dict[str, Tensor] = {}

    def see(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            size = arguments[0].detach().abs().flatten(0, -2).amax(0)
            sizes[name] = torch.maximum(sizes[name], size) if name in sizes else size

        return hook

    hooks = [model.get_submodule(name).register_forward_pre_hook(see(name)) for name in names]
    training, device = model.training, next(model.parameters()).device
    try:
        model.eval()
        for start in range(0, len(ids), _BATCH):
            model(ids[start : start + _BATCH].to(device), use_cache=False)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    for name, size in sizes.items():
        if not bool(size.isfinite().all()):
            raise PhiquantError(f"{name}: its inputs on the calibration windows are not finite; run it in float32")
    return sizes
