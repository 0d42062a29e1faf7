"""What a data-driven solver knows of a layer's input: second moments, and the size of each channel.

The linears that read one tensor share one `Statistics`; so do the parts of a fused projection (q, k, v;
gate, up), because the error of every row is weighed by the same inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import PhiquantError
from .ranks import ALONE, Ranks

_STRIP = 512  # rows of the moments computed at a time, from the diagonal on


class Statistics:
    """Sums over the tokens x [K] that a linear of K inputs has seen.

    moments: [K, K] sum of x x^T in `dtype`; `hessian` completes what lies below its diagonal strips.
    abs_sum: float64 [K] sum of |x|. abs_max: float32 [K] largest |x|. tokens: how many were seen.
    drift: [K, K] sum of (f - x) x^T, f what the float model has where this one has x; None unless `update` was told.
    dtype: float32, or float64, which is slower and for data sets of very many tokens.
    ranks: processes that all show the same tokens in the same order; each sums some strips of the moments, and
        `complete` brings these together: to the bit what one process sums.
    """

    def __init__(
        self,
        features: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        ranks: Ranks = ALONE,
    ) -> None:
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"moments are summed in float32 or float64, not {dtype}")
        self.moments = torch.zeros(features, features, dtype=dtype, device=device)
        self.abs_sum = torch.zeros(features, dtype=torch.float64, device=device)
        self.abs_max = torch.zeros(features, device=device)
        self.drift: Tensor | None = None
        self.tokens = 0
        self.ranks = ranks
        self._mirrored = False

    @property
    def features(self) -> int:
        return len(self.abs_max)

    @torch.no_grad()
    def update(self, x: Tensor, exact: Tensor | None = None) -> None:
        """Take in the tokens x [..., K]. An empty tensor changes nothing.

        exact: what the float model has in their place; given for all tokens or for none.
        """
        if x.shape[-1] != self.features:
            raise ValueError(f"these statistics are of {self.features} inputs, the tensor has {x.shape[-1]}")
        rows = x.detach().reshape(-1, self.features).to(self.moments)
        if not len(rows):
            return
        mine = range(_STRIP * self.ranks.rank, self.features, _STRIP * self.ranks.world)
        for start in mine:  # x^T x is symmetric: nearly half of it need not be computed
            self.moments[start : start + _STRIP, start:].addmm_(rows[:, start : start + _STRIP].T, rows[:, start:])
        if exact is not None:
            self.drift = torch.zeros_like(self.moments) if self.drift is None else self.drift
            self.drift.addmm_((exact.detach().reshape(rows.shape).to(rows) - rows).T, rows)
        size = rows.abs()
        self.abs_sum += size.sum(0, dtype=torch.float64)
        self.abs_max = torch.maximum(self.abs_max, size.amax(0).float())
        self.tokens += len(rows)
        self._mirrored = False

    def merge(self, other: Statistics) -> None:
        """Take in what `other` has seen, as if it had been seen here."""
        if other.features != self.features:
            raise ValueError(f"statistics of {other.features} inputs cannot be merged into those of {self.features}")
        if (self.drift is None) != (other.drift is None) and self.tokens and other.tokens:
            raise ValueError("of these statistics one knows the float model's inputs, the other does not")
        self.moments += other.moments.to(self.moments)
        if other.drift is not None:
            drift = other.drift.to(self.moments)
            self.drift = drift.clone() if self.drift is None else self.drift + drift
        self.abs_sum += other.abs_sum.to(self.abs_sum)
        self.abs_max = torch.maximum(self.abs_max, other.abs_max.to(self.abs_max))
        self.tokens += other.tokens
        self._mirrored = False

    def complete(self) -> None:
        """Give every rank the strips of moments that the others have summed. Every rank must call it, once."""
        for index, start in enumerate(range(0, self.features, _STRIP) if self.ranks.world > 1 else ()):
            strip = self.moments[start : start + _STRIP, start:].contiguous()
            self.ranks.broadcast(strip, index % self.ranks.world)
            self.moments[start : start + _STRIP, start:] = strip

    def all_reduce(self, group: torch.distributed.ProcessGroup | None = None) -> None:
        """Merge the statistics of all processes of torch.distributed's `group`, in each of them."""
        tokens = torch.tensor(self.tokens, device=self.moments.device)
        for total in (self.moments, self.abs_sum, tokens, *(() if self.drift is None else (self.drift,))):
            torch.distributed.all_reduce(total, torch.distributed.ReduceOp.SUM, group)
        torch.distributed.all_reduce(self.abs_max, torch.distributed.ReduceOp.MAX, group)
        self.tokens = int(tokens)
        self._mirrored = False

    @property
    def hessian(self) -> Tensor:
        """`moments`, all of it: solvers need no other factor. RuntimeError if no token was seen.

        PhiquantError if the inputs were not finite.
        """
        if not self.tokens:
            raise RuntimeError("these statistics have seen no tokens yet; show them the layer's inputs first")
        if not bool(self.moments.diagonal().isfinite().all()):
            raise PhiquantError("the layer's inputs hold values that are not finite; run the model in float32")
        for start in () if self._mirrored else range(_STRIP, self.features, _STRIP):
            self.moments[start : start + _STRIP, :start] = self.moments[:start, start : start + _STRIP].T
        self._mirrored = True
        return self.moments

    @property
    def square_mean(self) -> Tensor:
        """float32 [K]: mean of x^2 of each input channel, how much an error in its column counts. Errors: `hessian`."""
        return (self.hessian.diagonal() / self.tokens).float()

    @property
    def abs_mean(self) -> Tensor:
        """float32 [K]: mean of |x| of each input channel."""
        return (self.abs_sum / max(1, self.tokens)).float()


def of_inputs(w: Tensor, statistics: Statistics | None, solver: str) -> Statistics:
    """The statistics again. PhiquantError, in the solver's name, if there are none or w is no matrix of that width."""
    if statistics is None:
        raise PhiquantError(f"{solver} needs statistics of the layer's inputs; give calibration data")
    if w.dim() != 2 or statistics.features != w.shape[1]:
        raise PhiquantError(
            f"{solver} takes a matrix of {statistics.features} columns, the inputs of its statistics; "
            f"this weight is {list(w.shape)}"
        )
    return statistics
