"""`CodebookLinear`: a Linear whose weight is looked up in a codebook, and which trains the codebook."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops
from .errors import PhiquantError
from .kmeans import kmeans, vector_kmeans
from .spec import Codebook, PerRows, PerTensor, QuantSpec
from .tensor import QuantizedTensor

Reduction = Literal["sum", "mean"]


class CodebookLinear(nn.Module):
    """A Linear with weight = codebook[codes]: x [..., K] -> [..., N]. The levels are trained, the codes stay.

    codebook: Parameter float32 [blocks, k], a row for each run of N / blocks rows of the weight; with dim d > 1
        [1, k, d].
    codes: uint8 buffer [N, K / d].
    reduction: the gradient of a level. "sum", over the cluster of values that share it, is that of the loss (Deep
        Compression). "mean" divides by the size of the cluster: what plain SGD on the weights followed by taking
        cluster means does, and so the learning rate that suited the weights suits it.
    zero: levels that stay exactly 0 whatever the optimizer does to them, bool [blocks, k], or None.

    Made by `from_linear`, or from codes that exist by `from_quantized`. `quantized` gives the trained codes.
    """

    codes: Tensor
    zero: Tensor | None

    def __init__(
        self,
        codebook: Tensor,
        codes: Tensor,
        bias: Tensor | None = None,
        *,
        reduction: Reduction = "sum",
        zero: Tensor | None = None,
    ) -> None:
        super().__init__()
        if reduction not in ("sum", "mean"):
            raise ValueError(f"reduction is 'sum' or 'mean', not {reduction!r}")
        self.reduction = reduction
        self.codebook = nn.Parameter(codebook.detach().clone())
        self.register_buffer("codes", codes)
        self.register_buffer("zero", zero)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        k: int,
        *,
        rows: int | None = None,
        dim: int = 1,
        weights: Tensor | None = None,
        keep_zero: bool = False,
        reduction: Reduction = "sum",
    ) -> CodebookLinear:
        """Cluster the weight of `linear` into k levels: see `kmeans` for rows, weights and keep_zero; dim 2 or 4 is
        `vector_kmeans`, for the whole tensor."""
        w = linear.weight
        zero = None
        if dim > 1:
            if rows is not None or keep_zero:
                raise ValueError("a codebook of vectors is per tensor and keeps no zero; leave rows and keep_zero out")
            levels, codes = vector_kmeans(w, k, dim, weights)
        else:
            levels, codes = kmeans(w, k, weights, rows=rows, keep_zero=keep_zero)
        levels = levels[None] if rows is None else levels
        if keep_zero:
            zero = levels == 0
        return cls(levels, codes, linear.bias, reduction=reduction, zero=zero)

    @classmethod
    def from_quantized(
        cls, quantized: QuantizedTensor, bias: Tensor | None = None, *, reduction: Reduction = "sum"
    ) -> CodebookLinear:
        """A layer that trains the levels of `quantized`, a weight [N, K] with a codebook per tensor, row or rows."""
        spec = quantized.spec
        if quantized.codebook is None or not isinstance(spec.granularity, PerTensor | PerRows):
            raise PhiquantError(f"a CodebookLinear needs a codebook per tensor or per rows, not {spec}")
        return cls(quantized.codebook.float(), quantized.codes, bias, reduction=reduction)

    @property
    def weight(self) -> Tensor:
        """The float weight [N, K], in the dtype of the codebook; differentiable in the codebook."""
        levels = self.codebook if self.zero is None else self.codebook.masked_fill(self.zero, 0)
        dtype, mean = self.codebook.dtype, self.reduction == "mean"
        if levels.ndim == 2:
            return ops.codebook_lookup(levels.float(), self.codes, dtype, mean)
        parts = [ops.codebook_lookup(one.float(), self.codes, dtype, mean) for one in levels.unbind(2)]
        return torch.stack(parts, -1).flatten(-2)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias)

    @property
    def quantized(self) -> QuantizedTensor:
        """The codes and the levels as trained. Levels that crossed are sorted and their codes renamed.

        PhiquantError for a codebook of vectors, which no QuantizedTensor holds.
        """
        if self.codebook.ndim == 3:
            raise PhiquantError("a QuantizedTensor holds levels that are numbers; this codebook holds vectors")
        levels = self.codebook.detach().float()
        levels = levels if self.zero is None else levels.masked_fill(self.zero, 0)
        levels, order = levels.sort(dim=1, stable=True)
        renamed = order.argsort(1).to(torch.uint8)
        blocks, k = levels.shape
        codes = renamed.gather(1, self.codes.reshape(blocks, -1).long()).reshape(self.codes.shape)
        rows = len(codes) // blocks
        granularity = PerTensor() if blocks == 1 else PerRows(rows)
        return QuantizedTensor(codes, None, None, None, QuantSpec(Codebook(k), granularity), levels)

    def extra_repr(self) -> str:
        blocks, k, *dim = self.codebook.shape
        shape = f"in_features={self.codes.shape[1] * (dim[0] if dim else 1)}, out_features={len(self.codes)}"
        return f"{shape}, {blocks} x {k} levels{f' of {dim[0]} values' if dim else ''}, reduction={self.reduction}"
