"""Models that compute in integers: a Sequential end to end, or the linears of any model on int8 tokens."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import integer
from .errors import PhiquantError
from .modules import QuantizedLinear, to_quantized
from .observers import MinMaxObserver
from .solvers import quantize_tensor
from .spec import QuantSpec
from .tensor import QuantizedTensor

_FLOAT_ONLY = (nn.Dropout, nn.Identity)


class OnCodes(nn.Module):
    """A step that changes codes and keeps their grid: max pooling, ReLU, flattening."""

    def __init__(self, function: Callable[[QuantizedTensor], QuantizedTensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: QuantizedTensor) -> QuantizedTensor:
        return self.function(x)

    def extra_repr(self) -> str:
        function = self.function
        return function.func.__name__ if isinstance(function, partial) else getattr(function, "__name__", "")


class Dequantize(nn.Module):
    """Codes -> floats, the way out of an integer model."""

    def forward(self, x: QuantizedTensor) -> Tensor:
        return x.dequantize()


@torch.no_grad()
def to_integer(
    model: nn.Sequential,
    batches: Iterable[Tensor],
    weights: str | QuantSpec = "int8-channel-sym",
    activations: str | QuantSpec = "uint8-tensor-asym",
    observer: Callable[[QuantSpec], MinMaxObserver] = MinMaxObserver,
) -> nn.Sequential:
    """A copy of a float Sequential that computes in integers: floats in, codes between, floats out.

    batches: inputs whose activations set the grids, by an `observer` for the input and for the output of each
        Conv2d and Linear. A ReLU after one of these is folded into its clamp. MaxPool2d, ReLU and Flatten work on
        codes; Dropout and Identity vanish. Layers keep their names, so the float model's bias keeps its name.
    PhiquantError, naming the layer, for any other module. `model` is left as it is.
    """
    spec = integer.activation_spec(activations)
    steps = [(name, module) for name, module in model.named_children() if not isinstance(module, _FLOAT_ONLY)]
    observers = {name: observer(spec) for name, _ in [("", None), *_layers(steps)]}
    for batch in batches:
        observers[""](batch)
        _observe(steps, batch, observers)
    if not observers[""].seen:
        raise PhiquantError("no batch was given to calibrate with; give a few inputs of the model")
    grids = {name: integer.ActivationQuantizer.from_observer(seen) for name, seen in observers.items()}
    made: OrderedDict[str, nn.Module] = OrderedDict(quantize=grids[""])
    for index, (name, module) in enumerate(steps):
        if isinstance(module, nn.Conv2d | nn.Linear):
            made[name] = _layer(name, module, weights, grids[name], _relu_follows(steps, index))
        elif not (isinstance(module, nn.ReLU) and index and _relu_follows(steps, index - 1)):
            made[name] = OnCodes(_on_codes(name, module))
    made["dequantize"] = Dequantize()
    return nn.Sequential(made).eval()


def compute_per_token(model: nn.Module, on: bool = True) -> nn.Module:
    """Let the QuantizedLinears of a quantized model compute on int8 activations, one scale per token, in integers.

    In place. Needs symmetric weights with one scale per output channel: PhiquantError names the first layer of
    another grid, and nothing is changed. `on=False` goes back to the decoded weights.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    if not layers:
        raise PhiquantError("the model has no QuantizedLinear; quantize it first, by 'int8-channel-sym' for example")
    for name, layer in layers.items():
        try:
            zero_points = layer.integer_weight.packed.zero_points
        except PhiquantError as error:
            raise PhiquantError(f"{name}: {error}") from error
        if zero_points is not None:
            raise PhiquantError(f"{name}: {layer.quantized.spec} has zero points; use a symmetric grid")
        inputs = getattr(layer, "input_quantizer", None)
        if on and inputs is not None and inputs.spec != integer.TOKENS:
            raise PhiquantError(f"{name} rounds what it reads to {inputs.spec}; integers take {integer.TOKENS}")
    for layer in layers.values():
        layer.per_token = on
    return model


def _layers(steps: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    return [(name, module) for name, module in steps if isinstance(module, nn.Conv2d | nn.Linear)]


def _relu_follows(steps: list[tuple[str, nn.Module]], index: int) -> bool:
    """Whether step `index` is a layer with a ReLU right after it."""
    layer = isinstance(steps[index][1], nn.Conv2d | nn.Linear)
    return layer and index + 1 < len(steps) and isinstance(steps[index + 1][1], nn.ReLU)


def _observe(steps: list[tuple[str, nn.Module]], x: Tensor, observers: dict[str, MinMaxObserver]) -> None:
    """Run x through the float steps; a layer's output is seen after the ReLU that is folded into it."""
    waiting = None
    for index, (name, module) in enumerate(steps):
        x = module(x)
        if name in observers and _relu_follows(steps, index):
            waiting = name
        elif name in observers or waiting is not None:
            observers[waiting or name](x)
            waiting = None


def _layer(
    name: str, module: nn.Module, weights: str | QuantSpec, grid: integer.ActivationQuantizer, relu: bool
) -> nn.Module:
    layer: Any = copy.deepcopy(module)
    quantized = quantize_tensor(layer.weight, weights, name=f"{name}.weight")
    to_quantized(layer, quantized, nn.Parameter(quantized.dequantize(), requires_grad=False))
    layer.output_quantizer = grid
    layer.relu = relu
    return layer


def _on_codes(name: str, module: nn.Module) -> Callable[[QuantizedTensor], QuantizedTensor]:
    if isinstance(module, nn.ReLU):
        return integer.relu
    if isinstance(module, nn.Flatten):
        return partial(integer.flatten, start_dim=module.start_dim, end_dim=module.end_dim)
    if isinstance(module, nn.MaxPool2d) and module.dilation == 1 and not module.ceil_mode:
        options: dict[str, Any] = {"stride": module.stride, "padding": module.padding}
        return partial(integer.max_pool2d, kernel_size=module.kernel_size, **options)
    raise PhiquantError(
        f"{name}: {module} has no form on codes; integer models are made of Conv2d, Linear, ReLU, "
        "MaxPool2d (no dilation, no ceil_mode), Flatten, Dropout and Identity"
    )
