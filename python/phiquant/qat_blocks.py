"""Training one decoder layer at a time: weights and grids of a layer learn to give what the float layer gives.

The first phase of EfficientQAT (Chen et al., 2024). Each layer reads what the trained layers before it make of the
text, and is trained towards what the float model has after it, so that it makes up for their errors as well. Gradients
and moments are there for one layer, activations for `block_windows` windows: n windows, T tokens, D = hidden size.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .errors import PhiquantError
from .models import phi
from .modules import QATLinear, QuantizedLinear, to_quantized
from .qat_checkpoint import fingerprint
from .qat_optimizer import Steps, autocast, only_grids
from .qat_settings import Progress, Report, Settings
from .quantize import convert
from .tensor import PARAMETERS, QuantizedTensor

_log = logging.getLogger("phiquant")
_INPUTS = ".input_quantizer."


def train_blocks(
    model: Any,
    floats: Mapping[str, Tensor],
    ids: Tensor,
    settings: Settings,
    *,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> Report:
    """Train the decoder layers of a prepared Phi-3 model one after the other and convert each, in place.

    floats: the float weights by module, of layers that do not start from them. ids: the text, int [n].
    settings: block_steps for each layer, on block_windows windows; batch, window, rates, seed.
    folder: where each finished layer is kept: the same call goes on after the last of them, to the same codes.
    PhiquantError for another architecture, and for a folder of another run.
    """
    layers = getattr(getattr(model, "model", None), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise PhiquantError(f"training by blocks follows a {phi.ARCHITECTURE}; {type(model).__name__} has no layers")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    run = "" if folder is None else fingerprint(model, trained, {"blocks": repr(settings)}, ids)
    rows = windows(ids, settings.window, settings.block_windows)
    hidden, arguments = _first(model, rows)
    table = floats.get(phi.EMBEDDING)
    wanted = hidden.clone() if table is None else F.embedding(rows.to(table.device), table).float()
    report = Report()
    for index, layer in enumerate(layers):
        prefix, dtype = f"model.layers.{index}", next(layer.parameters()).dtype
        target = _float_layer(layer, {n.removeprefix(f"{prefix}."): w for n, w in floats.items()})
        layer.float()
        _advance(target, wanted, arguments)
        path = None if folder is None else folder / f"layer-{index:04}.safetensors"
        if path is None or not _restore(layer, path, run):
            _train_layer(prefix, layer, hidden, wanted, arguments, settings, report)
            convert(layer, trained={"block_steps": settings.block_steps})
            if path is not None:
                _keep(layer, path, run)
        _advance(layer, hidden, arguments)
        layer.to(dtype)
        if progress:
            progress((index + 1) / len(layers), report)
    if any(isinstance(module, QATLinear) for module in model.modules()):
        convert(model)  # what lies outside of the layers is not trained
    return report


def windows(ids: Tensor, window: int, most: int) -> Tensor:
    """The text in windows [n, T], at most so many, evenly spaced."""
    rows = ids[: len(ids) // window * window].view(-1, window).long()
    return rows[torch.linspace(0, len(rows) - 1, min(most, len(rows))).long()]


def _train_layer(
    name: str,
    layer: nn.Module,
    hidden: Tensor,
    wanted: Tensor,
    arguments: dict[str, Any],
    settings: Settings,
    report: Report,
) -> None:
    """Bring layer(hidden) close to `wanted`, both [n, T, D]; the loss is the error relative to the mean square."""
    began, size = time.monotonic(), wanted.square().mean()
    generator = torch.Generator().manual_seed(settings.seed)
    layer.train()
    with only_grids(layer, settings.train_float):
        steps = Steps(layer, settings)
        report.trained = max(report.trained, steps.values)
        report.optimizer_bytes = 8 * report.trained
        before = None
        for step in range(settings.block_steps):
            chosen = torch.randperm(len(hidden), generator=generator)[: settings.batch]
            with autocast(hidden.device, settings):
                result = _call(layer, hidden[chosen], arguments)
            loss = F.mse_loss(result.float(), wanted[chosen]) / size
            loss.backward()
            steps.take(step / settings.block_steps)
            report.record(loss.item(), chosen.numel() * hidden.shape[1], 0.0)
            before = loss.item() if before is None else before
    layer.eval()
    _log.info(
        "%s: output error %.2e at first, %.2e trained; %d values, %.1f s",
        *(name, before, loss.item(), steps.values, time.monotonic() - began),
    )


def _float_layer(layer: nn.Module, floats: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the layer that computes in float32 with the float weights."""
    target = copy.deepcopy(layer).float().eval()
    for name, module in target.named_modules():
        if isinstance(module, QATLinear):
            module.__class__ = nn.Linear  # type: ignore[assignment]
            del module.weight_quantizer
            module.input_quantizer = None  # type: ignore[assignment]
            if name in floats:
                module.weight.data.copy_(floats[name])
    return target


@torch.no_grad()
def _first(model: Any, rows: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """What the first decoder layer reads, float32 [n, T, D], and what layers are called with besides."""
    hidden = torch.cat([model.get_submodule(phi.EMBEDDING)(row[None].to(model.device)).float() for row in rows])
    caught: dict[str, Any] = {}

    def catch(_: nn.Module, arguments: tuple, named: dict[str, Any]) -> None:
        caught.update(named)
        raise _Stop

    hook = model.model.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    try:
        with suppress(_Stop):
            model.model(inputs_embeds=hidden[:1], use_cache=False)
    finally:
        hook.remove()
    caught.pop("hidden_states", None)
    return hidden, caught


class _Stop(Exception):
    """What comes after the first layer's arguments is of no use."""


def _call(layer: nn.Module, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
    result = layer(hidden, **arguments)
    return result[0] if isinstance(result, tuple) else result


@torch.no_grad()
def _advance(layer: nn.Module, hidden: Tensor, arguments: dict[str, Any], batch: int = 8) -> None:
    """Replace the activations by the layer's output."""
    for start in range(0, len(hidden), batch):
        hidden[start : start + batch] = _call(layer, hidden[start : start + batch], arguments)


def _keep(layer: nn.Module, path: Path, run: str) -> None:
    """Write the codes of a layer, and what its inputs are rounded to, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{name}.{part}": value.contiguous().cpu()
        for name, module in layer.named_modules()
        if isinstance(module, QuantizedLinear)
        for part, value in {"codes": module.quantized.codes, **module.quantized.parameters}.items()
    }
    tensors |= {name: value.contiguous().cpu() for name, value in layer.named_buffers() if _INPUTS in name}
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, {"run": run})
    partial.replace(path)


def _restore(layer: nn.Module, path: Path, run: str) -> bool:
    """Give a layer the codes of the file, if there is one."""
    if not path.exists():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("run") != run:
                raise PhiquantError(
                    f"{path} belongs to a run with other settings, text or weights; delete it or give another folder"
                )
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise PhiquantError(f"{path} is damaged ({error}); delete it to train its layer again") from error
    for name, module in list(layer.named_modules()):
        if isinstance(module, QATLinear):
            parts: dict[str, Any] = {part: stored.get(f"{name}.{part}") for part in ("codes", *PARAMETERS)}
            quantized = QuantizedTensor(spec=module.weight_quantizer.spec, **parts)
            weight = nn.Parameter(quantized.dequantize(module.weight.dtype), requires_grad=False)
            to_quantized(module, quantized, weight, module.origin)
    layer.load_state_dict({name: value for name, value in stored.items() if _INPUTS in name}, strict=False)
    return True
