"""Levels that are trained: TTQ (two levels of three per tensor) and codebooks.

Sources: Zhu et al., "Trained ternary quantization" (2017); Han et al., "Deep compression" (2016), whose gradient of a
level is the sum over its cluster. Formulas and when to use which: docs/learned-scales.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .fake_quant import fake_quantize
from .learned import Learned
from .learned_gradients import stored, through
from .spec import Codebook, PerTensor, QuantSpec
from .tensor import QuantizedTensor


class TrainedTernary(Learned):
    """TTQ: y = positive where x > d, -negative where x < -d, else 0; d = threshold * max|x|; two levels per tensor.

    Parameters `positive` and `negative`, float32 scalars, used as |.|; they start at the mean magnitude of the values
    on their side, from the first tensor or `initialize`. Gradients, g that of y: positive gets the sum of g over its
    values, negative minus the sum of g over its; x gets g times the size of its level where it is beyond d, and g
    elsewhere (the paper's rule).
    """

    initialized: Tensor

    def __init__(self, threshold: float = 0.05) -> None:
        super().__init__()
        if not 0.0 <= threshold < 1.0:
            raise ValueError(f"threshold is a share of max|x|, in [0, 1), not {threshold}")
        self.threshold = threshold
        self.spec = QuantSpec(Codebook(3), PerTensor())
        self.positive = nn.Parameter(torch.tensor(1.0))
        self.negative = nn.Parameter(torch.tensor(1.0))
        self.register_buffer("initialized", torch.tensor(False))

    def forward(self, x: Tensor) -> Tensor:
        if not self.initialized:
            self.initialize(x)
        return _Ternary.apply(x, self.positive.abs(), self.negative.abs(), self._bound(x))

    def unit(self) -> float:
        """The mean level."""
        return float((self.positive.detach().abs() + self.negative.detach().abs()) / 2)

    def _bound(self, x: Tensor) -> Tensor:
        return self.threshold * x.detach().abs().max()

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Set both levels from x."""
        d = self._bound(x)
        for level, side in ((self.positive, x[x > d]), (self.negative, -x[x < -d])):
            if side.numel():
                level.copy_(side.float().mean())
        self.initialized.fill_(True)

    @torch.no_grad()
    def quantize(self, x: Tensor) -> QuantizedTensor:
        """The codes that `forward(x)` decodes: indices 0, 1, 2 of the levels -negative, 0, positive."""
        if not self.initialized:
            self.initialize(x)
        d = self._bound(x)
        codes = (x > d).to(torch.uint8) - (x < -d).to(torch.uint8) + 1
        levels = torch.stack([-self.negative.abs(), torch.zeros_like(self.positive), self.positive.abs()])
        return QuantizedTensor(codes.to(torch.uint8), None, None, None, self.spec, levels.float().reshape(1, 3))

    def extra_repr(self) -> str:
        return f"threshold={self.threshold}"


class _Ternary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, positive: Tensor, negative: Tensor, d: Tensor) -> Tensor:
        ctx.save_for_backward(x, positive, negative, d)
        zero = torch.zeros((), dtype=x.dtype, device=x.device)
        return torch.where(x > d, positive.to(x.dtype), torch.where(x < -d, -negative.to(x.dtype), zero))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        (g,) = gradients
        x, positive, negative, d = ctx.saved_tensors
        above, below = x > d, x < -d
        slope = torch.where(above, positive.to(g.dtype), torch.where(below, negative.to(g.dtype), 1.0))
        sums = (torch.where(side, g, 0.0).sum(dtype=torch.float64).to(positive.dtype) for side in (above, below))
        return g * slope, next(sums), -next(sums), None


class LearnedCodebook(Learned):
    """A codebook that is trained: every level, and with them, unless the codes stay, the weights.

    quantized: a tensor with a codebook: its levels to start from, its codes. fixed: the codes stay as they are and
        the weight is not used: what `CodebookLinear` does. Else a value gets the nearest level of each step.

    Parameter `codebook` float32 [blocks, size], in any order; in use are its levels in ascending order, rounded to the
    spec's type. The gradient of a level is the sum of those of its values; x gets the straight-through estimator's.
    """

    codes: Tensor | None

    def __init__(self, quantized: QuantizedTensor, fixed: bool = False) -> None:
        super().__init__()
        if quantized.codebook is None:
            raise ValueError(f"{quantized.spec} has no codebook to train")
        self.spec = quantized.spec
        self.codebook = nn.Parameter(quantized.codebook.detach().float().clone())
        self.register_buffer("codes", quantized.codes if fixed else None)

    @property
    def moves_weights(self) -> bool:
        return self.codes is None

    def unit(self) -> float:
        """The mean distance of two levels that are neighbours."""
        levels = self.codebook.detach()
        return float((levels.amax(1) - levels.amin(1)).mean() / max(1, levels.shape[1] - 1))

    def in_use(self) -> Tensor:
        """The levels as stored, float32 [blocks, size]; ascending, but in the order of fixed codes."""
        levels = through(self.codebook, lambda t: stored(t, getattr(torch, self.spec.scale_dtype)))
        return levels if self.codes is not None else levels.sort(dim=1, stable=True).values

    def forward(self, x: Tensor) -> Tensor:
        """x on its nearest levels, or the levels of the codes that stay; same shape and dtype."""
        levels = self.in_use()
        if self.codes is not None:
            return ops.codebook_lookup(levels, self.codes, x.dtype)
        y = fake_quantize(x, self.spec, codebook=levels.detach())
        if not torch.is_grad_enabled():
            return y
        looked_up = ops.codebook_lookup(levels, ops.codebook_assign(x.detach(), levels.detach()), x.dtype)
        return y + (looked_up - looked_up.detach())  # adds zeros, and the gradient of the levels

    @torch.no_grad()
    def quantize(self, x: Tensor) -> QuantizedTensor:
        """The codes that `forward(x)` decodes."""
        dtype = getattr(torch, self.spec.scale_dtype)
        levels = self.in_use().detach()
        if self.codes is None:
            codes = ops.codebook_assign(x.detach(), levels)
            return QuantizedTensor(codes, None, None, None, self.spec, levels.to(dtype))
        levels, order = levels.sort(dim=1, stable=True)  # levels may have crossed: the codes take their new names
        renamed = order.argsort(1).gather(1, self.codes.reshape(len(levels), -1).long())
        codes = renamed.to(torch.uint8).reshape(self.codes.shape)
        return QuantizedTensor(codes, None, None, None, self.spec, levels.to(dtype))

    def extra_repr(self) -> str:
        return f"{self.spec}, {'codes stay' if self.codes is not None else 'nearest levels'}"
