"""Magnitude pruning: the smallest weights become zero, and stay zero while the others train.

    pq.prune(model, 0.8)              # masks; train as usual, with any torch optimizer
    pq.finalize_pruning(model)        # plain layers again, with zeros in their weights

A pruned layer is an ordinary Linear or Conv2d of another class: parameters stay the same objects under the
same names, and a bool buffer `weight_mask` is added. Its forward uses the weight where the mask is true and 0
elsewhere, so no gradient reaches what is pruned; and after each step of an optimizer those values are set to
zero again, because momentum from before the pruning, or a decay towards something else, would move them.
"""

from __future__ import annotations

import fnmatch
import weakref
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..errors import PhiquantError


def magnitude_mask(w: Tensor, sparsity: float | None = None, granularity: str = "tensor") -> Tensor:
    """Which values of w stay: bool in w's shape, False for the smallest |w| of each block.

    granularity: "tensor", one block; "row", one per index of the first axis; "N:M" such as "2:4", N of each M
        consecutive values of a row stay (rows as the last axes flattened; sparsity is 1 - N / M and may be left out).
    Of a block of n values exactly round(sparsity * n) are pruned; of equal magnitudes, the first ones.

    ValueError for a sparsity outside 0 <= s < 1, an unknown granularity, rows that M does not divide;
    PhiquantError for values that are not finite.
    """
    kept, of = _ratio(granularity)
    if of:
        if sparsity is not None and abs(sparsity - (1 - kept / of)) > 1e-9:
            raise ValueError(f"{granularity} means a sparsity of {1 - kept / of:g}, not {sparsity:g}")
        if not w.ndim or w[0].numel() % of:
            raise ValueError(f"{granularity} needs rows that {of} divides; the shape is {list(w.shape)}")
        pruned, block = of - kept, of
    else:
        if sparsity is None or not 0 <= sparsity < 1:
            raise ValueError(f"sparsity is the share of weights that become zero, 0 <= s < 1, not {sparsity}")
        block = w.numel() if granularity == "tensor" or not w.ndim else w[0].numel() if len(w) else 0
        pruned = int(sparsity * block + 0.5)
    if pruned == 0 or w.numel() == 0:
        return torch.ones_like(w, dtype=torch.bool)
    size = w.detach().float().abs().reshape(-1, block)
    if not bool(size.isfinite().all()):
        raise PhiquantError("the weight holds values that are not finite; repair the checkpoint before pruning")
    threshold = size.kthvalue(pruned, dim=1, keepdim=True).values
    below, ties = size < threshold, size == threshold
    ties &= ties.cumsum(1) <= pruned - below.sum(1, keepdim=True)
    return ~(below | ties).reshape(w.shape)


def _ratio(granularity: str) -> tuple[int, int]:
    """(N, M) of "N:M"; (0, 0) for a granularity with blocks of any size."""
    if granularity in ("tensor", "row"):
        return 0, 0
    kept, colon, of = granularity.partition(":")
    if not colon or not kept.isdecimal() or not of.isdecimal() or not 0 < int(kept) < int(of):
        raise ValueError(f"granularity is 'tensor', 'row' or N:M such as '2:4', not {granularity!r}")
    return int(kept), int(of)


class _Pruned(nn.Module):
    """A layer whose `weight` counts only where `weight_mask` is true."""

    weight: Tensor
    weight_mask: Tensor

    def masked(self) -> Tensor:
        """The weight with zeros where it is pruned. Selected, so that an infinite gradient there is dropped too."""
        return torch.where(self.weight_mask, self.weight, 0.0)

    @torch.no_grad()
    def clear(self) -> None:
        """Set the pruned values of `weight` to zero, in place."""
        self.weight.masked_fill_(~self.weight_mask, 0.0)

    def __setstate__(self, state: dict[str, Any]) -> None:  # copies and unpickled layers are watched as well
        super().__setstate__(state)
        _watch(self)


class PrunedLinear(_Pruned, nn.Linear):
    """A Linear whose pruned weights stay zero in training."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.masked(), self.bias)


class PrunedConv2d(_Pruned, nn.Conv2d):
    """A Conv2d whose pruned weights stay zero in training."""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.masked(), self.bias)


PRUNED_CLASS: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: PrunedLinear, nn.Conv2d: PrunedConv2d}
_PLAIN_CLASS = {pruned: plain for plain, pruned in PRUNED_CLASS.items()}
_watched: weakref.WeakSet[_Pruned] = weakref.WeakSet()
_hook: Any = None


def _watch(module: _Pruned) -> None:
    global _hook
    _watched.add(module)
    if _hook is None:
        _hook = register_optimizer_step_post_hook(_clear_after_step)


def _clear_after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """What the optimizer may have moved is set to zero: runs after every step of every torch optimizer."""
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for module in list(_watched):
        if isinstance(module, _Pruned) and id(module.weight) in stepped:
            module.clear()


def prune(
    model: nn.Module, sparsity: float | Mapping[str, float] | None = None, granularity: str = "tensor"
) -> nn.Module:
    """Prune the Linear and Conv2d layers of `model`, in place, by magnitude; returns the model.

    sparsity: the share of zeros, for every layer; or shares by name pattern, the first that matches a layer counts
        and a layer that none matches stays as it is: {"lm_head": 0.5, "*": 0.8}. None with granularity "N:M".
    granularity: as in `magnitude_mask`. Weights pruned before count as zeros: a larger sparsity extends the mask,
        a smaller one returns weights, at the value zero, to training.

    PhiquantError if no layer, or a pattern no layer, matches, or a weight holds values that are not finite.
    """
    wishes = dict(sparsity) if isinstance(sparsity, Mapping) else {"*": sparsity}
    layers = {n: m for n, m in model.named_modules() if type(m) in PRUNED_CLASS or type(m) in _PLAIN_CLASS}
    chosen = {name: next((p for p in wishes if fnmatch.fnmatch(name, p)), None) for name in layers}
    if unused := [p for p in wishes if p not in chosen.values()]:
        raise PhiquantError(
            f"no Linear or Conv2d layer is left for {unused[0]!r}; the layers are {', '.join(layers) or 'none'}"
        )
    masks = {}
    for name, pattern in chosen.items():
        if pattern is not None:
            try:
                masks[name] = magnitude_mask(_weight(layers[name]), wishes[pattern], granularity)
            except ValueError as error:
                raise type(error)(f"{name}: {error}") from error
    for name, mask in masks.items():
        module = layers[name]
        if not isinstance(module, _Pruned):
            module.__class__ = PRUNED_CLASS[type(module)]
            module.register_buffer("weight_mask", mask)
        module.weight_mask = mask
        module.clear()
        _watch(module)
    return model


def _weight(module: nn.Module) -> Tensor:
    weight = module.masked() if isinstance(module, _Pruned) else module.weight
    assert isinstance(weight, Tensor)
    return weight


def finalize_pruning(model: nn.Module) -> nn.Module:
    """Turn pruned layers into what they were, zeros in their weights, masks gone; in place, returns the model."""
    for module in model.modules():
        if isinstance(module, _Pruned):
            module.clear()
            del module.weight_mask
            _watched.discard(module)
            plain: type = _PLAIN_CLASS[type(module)]
            module.__class__ = plain
    return model


def sparsity(model: nn.Module) -> dict[str, float]:
    """The share of zeros in the weight of every Linear and Conv2d layer, pruned or not, by name."""
    return {
        name: float((module.weight == 0).double().mean())
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }


class GradualPruning:
    """Prune little by little while training, fast at first, by the cubic schedule of Zhu and Gupta (2017).

        schedule = GradualPruning(model, 0.9, end=1000)
        for batch in batches:
            ...; optimizer.step(); schedule.step()

    After step t the sparsity is final + (initial - final) (1 - (t - begin) / (end - begin))^3, from `begin` to
    `end`, set anew each `every` steps and at the end. Weights pruned once stay pruned: they are zero, and no
    weight is smaller. final: a share, or shares by name pattern as `prune` takes them.
    """

    def __init__(
        self,
        model: nn.Module,
        final: float | Mapping[str, float],
        *,
        end: int,
        begin: int = 0,
        every: int = 10,
        initial: float = 0.0,
        granularity: str = "tensor",
    ) -> None:
        if not 0 <= begin < end or every < 1:
            raise ValueError(f"steps must satisfy 0 <= begin < end and every >= 1, got {begin}, {end}, {every}")
        if _ratio(granularity)[1]:
            raise ValueError(f"{granularity} prunes at once; gradual pruning takes 'tensor' or 'row'")
        self.model, self.granularity = model, granularity
        self.final = dict(final) if isinstance(final, Mapping) else {"*": final}
        self.begin, self.end, self.every, self.initial = begin, end, every, initial
        self.steps = 0

    def share(self) -> float:
        """How far the sparsity is from `initial` to `final` after the steps so far, 0 to 1."""
        left = 1 - (self.steps - self.begin) / (self.end - self.begin)
        return 1 - min(1.0, max(0.0, left)) ** 3

    def step(self) -> None:
        """Call after each step of the optimizer."""
        self.steps += 1
        due = (self.steps - self.begin) % self.every == 0 or self.steps == self.end
        if due and self.begin <= self.steps <= self.end:
            done = self.share()
            wishes = {name: self.initial + done * (final - self.initial) for name, final in self.final.items()}
            prune(self.model, wishes, self.granularity)

    def state_dict(self) -> dict[str, int]:
        """The steps taken; masks are in the model's own state."""
        return {"steps": self.steps}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue after the steps of `state`."""
        self.steps = int(state["steps"])
