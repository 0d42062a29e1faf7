"""What linears read, rounded: a quantizer on the input of each layer that has codes or trains towards them.

A weight grid and an activation grid together are what the field calls W8A8, W4A8 and so on. Weights are rounded once;
activations in every forward, on a range that is each tensor's or token's own (dynamic) or that an observer has found
beforehand (static). The quantizer is a `FakeQuantize`, named `input_quantizer`, so gradients pass where the
range held the value and nowhere else.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .calibrate import Calibration, token_windows
from .errors import PhiquantError
from .fake_quant import FakeQuantize
from .formats.registry import find
from .modules import QATLinear, QuantizedLinear
from .observers import KINDS, Kind, Observer
from .spec import TARGETS, Float, Int, PerGroup, PerTensor, PerToken, QuantSpec
from .spec import spec as read_spec

Model = TypeVar("Model", bound=nn.Module)
_BATCH = 8  # windows in one forward


@dataclasses.dataclass(frozen=True)
class InputGrid:
    """How inputs are rounded. static: on a range that was fixed beforehand; else on each input's own."""

    spec: QuantSpec
    static: bool

    def __str__(self) -> str:
        return f"{self.spec}, {'static' if self.static else 'dynamic'}"


def input_quantizer(activations: str | QuantSpec, observer: Kind | None = None) -> FakeQuantize:
    """A quantizer for inputs [..., K]. PhiquantError for a grid that activations cannot have.

    activations: integers of up to 8 bits or of 16, or small floats: per "token" (a scale for each vector of K values),
        per group of them, or per "tensor".
    observer: None, the range is taken from each input; else, per tensor, one of observers.KINDS, shown every input
        in training mode, or by `round_inputs`.
    """
    spec = read_spec(activations)
    if not isinstance(spec.element, Int | Float) or spec.two_level is not None:
        raise PhiquantError(
            f"activations are rounded to integers or small floats with one level of scales, not to {spec}; "
            "use 'int8-token-sym' or 'fp8_e4m3-token-sym'"
        )
    if not isinstance(spec.granularity, PerToken | PerTensor | PerGroup):
        raise PhiquantError(
            f"activations have a scale per token, group or tensor, not {spec}: one for each channel would stand inside "
            "the sum of the product; 'smooth' moves what differs between channels into the weights (docs/methods)"
        )
    if observer is None:
        return FakeQuantize(spec)
    if spec.granularity != PerTensor():
        raise PhiquantError(
            f"an observer fixes the one range of a tensor, and {spec} has a scale for each "
            f"{spec.granularity}; leave the observer out, or use '{spec.element}-tensor-...'"
        )
    return FakeQuantize(spec, "observer", _observer(spec, observer))


def _observer(spec: QuantSpec, kind: Kind) -> Observer:
    """One that looks for a range of `spec`: with 8 bits where it has 16, for more levels than bins tell nothing."""
    if kind not in KINDS:
        raise PhiquantError(f"unknown observer {kind!r}; known: {', '.join(KINDS)}")
    if isinstance(spec.element, Int) and spec.element.bits > 8:
        spec = dataclasses.replace(spec, element=Int(8, spec.element.signed))
    try:
        return KINDS[kind](spec)
    except ValueError as error:
        raise PhiquantError(f"{error}; use the observer 'minmax', 'ema' or 'percentile'") from error


@torch.no_grad()
def round_inputs(
    model: Model,
    activations: str | QuantSpec | None,
    observer: Kind | None = None,
    *,
    calibration: Calibration | None = None,
    tokenizer: Any = None,
) -> Model:
    """Let the linears of a model that have codes, or train towards them, round what they read, in place.

    activations, observer: see `input_quantizer`; None takes the rounding away.
    calibration: for a static range of a model that has codes: text, texts or windows of ids [n, T], on which it runs
        once, inputs not rounded. None: testing.training_text(). A model in training is observed while it trains.
    Returns the model. On an error it is unchanged.
    """
    layers: dict[str, Any] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear | QATLinear):
            layers[name] = module
    if not layers:
        raise PhiquantError(
            f"{type(model).__name__} has no linear with codes; quantize it first: "
            "quantize(model, 'int8-channel-sym', activations='int8-token-sym')"
        )
    if activations is None:
        for layer in layers.values():
            layer.input_quantizer = None
        return model
    made = {name: input_quantizer(activations, observer) for name in layers}
    if observer is not None and all(isinstance(layer, QuantizedLinear) for layer in layers.values()):
        _observe(model, layers, made, token_windows(calibration, tokenizer))
    for name, layer in layers.items():
        layer.input_quantizer = made[name].to(layer.weight.device).train(layer.training)
    return model


def _observe(model: nn.Module, layers: dict[str, Any], made: dict[str, FakeQuantize], ids: Tensor) -> None:
    """Show each quantizer what its layer reads on the windows `ids` [n, T], and fix its range."""
    device = next(iter(layers.values())).weight.device
    before = {name: getattr(layer, "input_quantizer", None) for name, layer in layers.items()}
    training = model.training
    try:
        model.eval()
        for name, layer in layers.items():
            layer.input_quantizer = made[name].to(device).observer  # which gives its input back unchanged
        for start in range(0, len(ids), _BATCH):
            model(ids[start : start + _BATCH].to(device), use_cache=False)
    finally:
        model.train(training)
        for name, layer in layers.items():
            layer.input_quantizer = before[name]
    for name, quantizer in made.items():
        assert quantizer.observer is not None
        lo, hi = quantizer.observer.range()
        if not bool((lo.isfinite() & hi.isfinite()).all()):
            raise PhiquantError(
                f"{name}: its inputs on the calibration windows are not finite, or there were none; run in float32"
            )
        quantizer.set_range(*quantizer.observer.parameters_of_range(quantizer.spec))
        quantizer.observing = False


def input_grid(model: nn.Module) -> InputGrid | None:
    """How the linears with codes round what they read; None: not at all. PhiquantError if they differ."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    grids = {name: _grid_of(getattr(layer, "input_quantizer", None)) for name, layer in layers.items()}
    if len(set(grids.values())) > 1:
        (one, first), *others = grids.items()
        two, second = next((name, grid) for name, grid in others if grid != first)
        raise PhiquantError(
            f"{one} rounds its inputs to {first or 'nothing'} and {two} to {second or 'nothing'}; no format holds "
            "that: round_inputs(model, ...) gives all of them one grid"
        )
    return next(iter(grids.values()), None)


def _grid_of(quantizer: Any) -> InputGrid | None:
    return None if quantizer is None else InputGrid(quantizer.spec, getattr(quantizer, "range", "known") != "tensor")


def ask_writer(format: str, grid: InputGrid | None, options: dict[str, Any]) -> dict[str, Any]:
    """The writer's options, with the grid of the inputs among them. PhiquantError if its files cannot say it."""
    if grid is None:
        return options
    static = "observer" in (accepted := inspect.signature(find(format).writer().write).parameters)
    holding = [t.name for t in TARGETS.values() if t.activations == grid.spec]
    instead = f"these targets hold it: {', '.join(holding)}" if holding else "no target holds it"
    if "activations" not in accepted:
        raise PhiquantError(
            f"the model rounds what its linears read to {grid}, which {format} files do not say; {instead}. "
            "round_inputs(model, None) takes the rounding away"
        )
    if static != grid.static:
        kinds = ("dynamic, from each input", "static, from calibration")
        raise PhiquantError(
            f"the model rounds what its linears read to {grid}; the ranges of {format} are {kinds[static]}"
        )
    asked = options.get("activations", grid.spec)
    if read_spec(asked) != grid.spec:
        raise PhiquantError(f"the model rounds what its linears read to {grid}, and the option says {asked}")
    return options | {"activations": grid.spec}
