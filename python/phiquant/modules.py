"""Layers that train through a grid (QATLinear, QATEmbedding) and layers that hold codes (QuantizedLinear, ...).

All are ordinary Linear and Embedding layers of another class: parameter names, hooks and references
stay. What is added lives under `weight_quantizer`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from . import integer
from .errors import PhiquantError
from .fake_quant import FakeQuantize, KnownGrid
from .learned import Learned
from .observers import KeepsDtype
from .spec import PerToken, QuantSpec
from .tensor import PARAMETERS, QuantizedTensor

Quantizer = FakeQuantize | KnownGrid | Learned  # or an AdaptedWeight (lora.py) around one
Origin = dict[str, Any]  # how codes were chosen, fit for JSON: {"solver": "gptq", "statistics": {...}}


class _RoundsInput(nn.Module):
    """A linear that may round what it reads: by `input_quantizer`, where there is one (input_quantizers.py)."""

    def rounded(self, input: torch.Tensor) -> torch.Tensor:
        quantizer = getattr(self, "input_quantizer", None)
        return input if quantizer is None else quantizer(input)


class QATLinear(_RoundsInput, nn.Linear):
    """A Linear whose weight passes through its grid in every forward: x [..., K] -> [..., N].

    `weight` is the float master, the very Parameter of the Linear it was; gradients reach it by the
    straight-through estimator. Under autocast the master is rounded to the grid in its own dtype and cast then.
    """

    weight_quantizer: Quantizer
    origin: Origin

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.linear(self.rounded(input), self.weight_quantizer(self.weight), self.bias)


class QATEmbedding(nn.Embedding):
    """An Embedding whose table passes through its grid in every forward: ids [...] -> [..., K]."""

    weight_quantizer: Quantizer
    origin: Origin

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.embedding(
            input,
            self.weight_quantizer(self.weight),
            self.padding_idx,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.sparse,
        )


class StoredCodes(KeepsDtype):
    """The codes and parameters of one weight, as buffers that keep their dtype when the model changes its own.

    origin: how they were chosen, which receipts tell; {} if nobody said.
    """

    codes: torch.Tensor
    scales: torch.Tensor | None
    zero_points: torch.Tensor | None
    minimums: torch.Tensor | None
    codebook: torch.Tensor | None

    def __init__(self, quantized: QuantizedTensor, origin: Origin | None = None) -> None:
        super().__init__()
        self.spec: QuantSpec = quantized.spec
        self.origin: Origin = origin or {}
        for name in ("codes", *PARAMETERS):
            self.register_buffer(name, getattr(quantized, name))

    @property
    def quantized(self) -> QuantizedTensor:
        return QuantizedTensor(spec=self.spec, **{name: getattr(self, name) for name in ("codes", *PARAMETERS)})

    def extra_repr(self) -> str:
        return f"{self.spec}, shape={list(self.codes.shape)}"


class _HoldsCodes(nn.Module):
    """A layer whose float `weight` is the decode of the codes in `weight_quantizer`."""

    weight: torch.Tensor
    weight_quantizer: StoredCodes

    @property
    def quantized(self) -> QuantizedTensor:
        return self.weight_quantizer.quantized

    def is_intact(self) -> bool:
        """Whether `weight` still is what the codes decode to, in its dtype."""
        return torch.equal(self.weight.detach(), self.quantized.dequantize(self.weight.dtype))

    def checked(self, name: str) -> QuantizedTensor:
        """The codes. PhiquantError, naming the layer, if `weight` was changed after they were chosen."""
        if not self.is_intact():
            raise PhiquantError(
                f"{name}.weight was changed after it was quantized, so its codes no longer describe it; "
                "start again from the float model and train before convert(), or undo the change"
            )
        return self.quantized

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        dtype, intact = self.weight.dtype, self.weight.is_meta or self.is_intact()
        super()._apply(fn, recurse)
        if intact and self.weight.dtype != dtype and not self.weight.is_meta:
            self.weight.data.copy_(self.quantized.dequantize(self.weight.dtype))  # bf16 -> fp32 regains the bits
        return self


class _ComputesInIntegers(_HoldsCodes):
    """A layer that computes on codes when it is given a QuantizedTensor: the result is one on its output's grid.

    output_quantizer: that grid, an `integer.ActivationQuantizer` set by `integer_model.to_integer` or by hand;
    relu: whether the result is cut at 0. Floats still meet the decoded weight.
    """

    relu: bool = False
    groups: int = 1
    _packed: tuple[list[tuple[torch.Tensor, int]], integer.IntegerWeight] | None = None

    @property
    def integer_weight(self) -> integer.IntegerWeight:
        """The codes as the integer kernels take them, laid out once and again when they change."""
        stored = self.weight_quantizer
        state = [(t, t._version) for t in (stored.codes, stored.scales, stored.zero_points) if t is not None]
        if self._packed is None or [(id(t), v) for t, v in self._packed[0]] != [(id(t), v) for t, v in state]:
            self._packed = (state, integer.IntegerWeight.pack(self.quantized, self.groups))
        return self._packed[1]

    def output_grid(self) -> integer.ActivationQuantizer:
        grid = getattr(self, "output_quantizer", None)
        if grid is None:
            raise PhiquantError(
                f"this {type(self).__name__} was given codes, but knows no grid for its result; "
                "set output_quantizer, or convert the model by phiquant.to_integer"
            )
        return grid


class QuantizedLinear(_RoundsInput, _ComputesInIntegers, nn.Linear):
    """A Linear with codes. `.quantized` is what a file gets.

    Given floats, it rounds them by its input_quantizer, if any, and computes with the decoded codes, or, where
    per_token is set, on int8 activations with a scale for each token (`integer.linear_per_token`). Given a
    QuantizedTensor, it computes in integers alone, or, where that has a scale for each token, gives floats.
    """

    per_token: bool = False

    def forward(self, input: torch.Tensor | QuantizedTensor) -> Any:
        if isinstance(input, QuantizedTensor):
            if input.spec.granularity == PerToken():
                return integer.linear_tokens(input, self.integer_weight, self.bias)
            return integer.linear(input, self.integer_weight, self.bias, self.output_grid(), self.relu)
        if self.per_token:
            return integer.linear_per_token(input, self.integer_weight, self.bias)
        return super().forward(self.rounded(input))


class QuantizedConv2d(_ComputesInIntegers, nn.Conv2d):
    """A Conv2d with codes. Given floats, it computes with the decoded codes; given a QuantizedTensor, in integers."""

    def forward(self, input: torch.Tensor | QuantizedTensor) -> Any:
        if not isinstance(input, QuantizedTensor):
            return super().forward(input)
        if self.padding_mode != "zeros" or isinstance(self.padding, str):
            raise PhiquantError(
                f"integer convolution pads with zeros by numbers, not padding={self.padding!r}, "
                f"padding_mode={self.padding_mode!r}; give the numbers, or keep this layer in float"
            )
        window: Any = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}
        return integer.conv2d(input, self.integer_weight, self.bias, self.output_grid(), self.relu, **window)


class QuantizedEmbedding(_HoldsCodes, nn.Embedding):
    """An Embedding with codes. It looks up their decoded values; `.quantized` is what a file gets."""


QAT_CLASS: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: QATLinear, nn.Embedding: QATEmbedding}
CONTINUED_CLASS: dict[type[nn.Module], type[nn.Module]] = {QuantizedLinear: QATLinear, QuantizedEmbedding: QATEmbedding}
QUANTIZED_CLASS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: QuantizedLinear,
    nn.Embedding: QuantizedEmbedding,
    nn.Conv2d: QuantizedConv2d,
    QATLinear: QuantizedLinear,
    QATEmbedding: QuantizedEmbedding,
}


def to_qat(module: nn.Module, quantizer: Quantizer, origin: Origin | None = None) -> None:
    """Make a Linear or Embedding, in place, one that trains through `quantizer`. Parameters stay the same objects.

    The layer may hold codes already: their decoded values are then trained. origin: what its codes will tell.
    """
    module.__class__ = (QAT_CLASS | CONTINUED_CLASS)[type(module)]
    module.weight_quantizer = quantizer
    module.origin = origin or {}  # type: ignore[assignment]
    module.get_parameter("weight").requires_grad_(not isinstance(quantizer, Learned) or quantizer.moves_weights)


def to_quantized(
    module: nn.Module, quantized: QuantizedTensor, weight: nn.Parameter, origin: Origin | None = None
) -> None:
    """Make a layer, in place, one that holds `quantized`; `weight` is its decode (shared by tied layers)."""
    module.__class__ = QUANTIZED_CLASS[type(module)]
    module.weight = weight
    module.weight_quantizer = StoredCodes(quantized, origin)
    if isinstance(inputs := getattr(module, "input_quantizer", None), FakeQuantize):
        inputs.observing = False  # what it has seen in training is its range from now on
