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

from .errors import PhiquantError
from .fake_quant import FakeQuantize
from .observers import KeepsDtype
from .spec import QuantSpec
from .tensor import PARAMETERS, QuantizedTensor


class QATLinear(nn.Linear):
    """A Linear whose weight passes through its grid in every forward: x [..., K] -> [..., N].

    `weight` is the float master, the very Parameter of the Linear it was; gradients reach it by the
    straight-through estimator. Under autocast the master is rounded to the grid in its own dtype and cast then.
    """

    weight_quantizer: FakeQuantize

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.linear(input, self.weight_quantizer(self.weight), self.bias)


class QATEmbedding(nn.Embedding):
    """An Embedding whose table passes through its grid in every forward: ids [...] -> [..., K]."""

    weight_quantizer: FakeQuantize

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
    """The codes and parameters of one weight, as buffers that keep their dtype when the model changes its own."""

    codes: torch.Tensor
    scales: torch.Tensor | None
    zero_points: torch.Tensor | None
    minimums: torch.Tensor | None
    codebook: torch.Tensor | None

    def __init__(self, quantized: QuantizedTensor) -> None:
        super().__init__()
        self.spec: QuantSpec = quantized.spec
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


class QuantizedLinear(_HoldsCodes, nn.Linear):
    """A Linear with codes. It computes with their decoded values; `.quantized` is what a file gets."""


class QuantizedEmbedding(_HoldsCodes, nn.Embedding):
    """An Embedding with codes. It looks up their decoded values; `.quantized` is what a file gets."""


QAT_CLASS: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: QATLinear, nn.Embedding: QATEmbedding}
QUANTIZED_CLASS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: QuantizedLinear,
    nn.Embedding: QuantizedEmbedding,
    QATLinear: QuantizedLinear,
    QATEmbedding: QuantizedEmbedding,
}


def to_qat(module: nn.Module, quantizer: FakeQuantize) -> None:
    """Make a Linear or Embedding, in place, one that trains through `quantizer`. Parameters stay the same objects."""
    module.__class__ = QAT_CLASS[type(module)]
    module.weight_quantizer = quantizer


def to_quantized(module: nn.Module, quantized: QuantizedTensor, weight: nn.Parameter) -> None:
    """Make a layer, in place, one that holds `quantized`; `weight` is its decode (shared by tied layers)."""
    module.__class__ = QUANTIZED_CLASS[type(module)]
    module.weight = weight
    module.weight_quantizer = StoredCodes(quantized)
