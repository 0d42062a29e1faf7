"""KL of a Phi-3 model with one slice quantized, measured: a run of the layers behind the slice for each grid."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layerwise import Layerwise
from .models import phi
from .slices import Slice
from .statistics import Statistics

if TYPE_CHECKING:
    from .sensitivity import Book

_PIECE = 1 << 24  # logits in float32 at a time


def measure_kl(walk: Layerwise, book: Book, ids: Tensor) -> None:
    """Measure what the book is missing, on the windows of token ids `ids` [n, T]."""
    layers = [walk.layer(index) for index in range(len(walk))]
    reference = _Reference(walk, layers, ids)
    missing = book.missing
    for index in (None, *range(len(layers))):
        inside = [one for one in missing if one.layer == index and one.module != phi.HEAD]
        seen: dict[str, Statistics] = {}
        if index is not None and book.needs_statistics:
            seen = _statistics(layers[index], f"model.layers.{index}.", inside, reference)
        for one in inside:
            book.tell(one)
            began, found = time.monotonic(), {}
            weight = walk.weight(one.module, one.rows)
            for spec, values in book.errors(one, weight, missing[one], seen.get(one.module)):
                if index is None:
                    hidden = F.embedding(ids, values)
                    found[spec] = reference.head_kl(values, hidden) if walk.tied else reference.kl(hidden, 0)
                    continue
                linear = layers[index].get_submodule(one.module.removeprefix(f"model.layers.{index}."))
                with _replaced(linear, one.rows, values):
                    found[spec] = reference.kl(reference.hidden, index)
            book.add(one, found, began)
        if index is not None:
            reference.advance()
    for one in (one for one in missing if one.module == phi.HEAD):
        book.tell(one)
        began = time.monotonic()
        seen_head = Statistics(one.shape[1])
        if book.needs_statistics:
            seen_head.update(reference.final)
        weight = walk.weight(phi.HEAD)
        quantized = book.errors(one, weight, missing[one], seen_head if book.needs_statistics else None)
        book.add(one, {spec: reference.head_kl(values) for spec, values in quantized}, began)


class _Reference:
    """The float model on the windows: its tokens' distribution p, and its states before one layer at a time.

    Of p two things are needed, since KL = sum p log p - sum p z + log sum e^z for the logits z = W h of a model with
    the same head W: its entropy, and sum p W, a state for each token.
    """

    def __init__(self, walk: Layerwise, layers: Sequence[nn.Module], ids: Tensor) -> None:
        self._layers, self._arguments = layers, walk.arguments(ids.shape[1])
        self._head, self._normed = walk.weight(phi.HEAD).float(), walk.normed
        self._at, self.hidden = 0, walk.embed(ids)
        self.final = torch.cat([self._normed(self._run(hidden, 0)) for hidden in self.hidden.split(1)])
        self._mean = torch.empty_like(self.final)
        self._own = torch.empty(ids.shape)
        for window, final in enumerate(self.final):
            for rows in pieces(len(final), len(self._head)):
                logits = F.linear(final[rows], self._head)
                self._mean[window, rows] = logits.softmax(-1) @ self._head
                self._own[window, rows] = self._surprise(final[rows], logits, self._mean[window, rows])

    def advance(self) -> None:
        """Go to the input of the next layer."""
        self.hidden = torch.cat([self._one(self._at, hidden) for hidden in self.hidden.split(1)])
        self._at += 1

    def kl(self, hidden: Tensor, layer: int) -> float:
        """Nats per token, for the states `hidden` [n, T, D] before `layer`."""
        total = 0.0
        for window, states in enumerate(hidden.split(1)):
            final = self._normed(self._run(states, layer))[0]
            for rows in pieces(len(final), len(self._head)):
                logits = F.linear(final[rows], self._head)
                surprise = self._surprise(final[rows], logits, self._mean[window, rows])
                total += (surprise - self._own[window, rows]).sum(dtype=torch.float64).item()
        return total / hidden[..., 0].numel()

    def head_kl(self, head: Tensor, hidden: Tensor | None = None) -> float:
        """The same with another head, and other embedded tokens [n, T, D] if they are given."""
        total = 0.0
        for window, own in enumerate(self.final):
            final = own if hidden is None else self._normed(self._run(hidden[window : window + 1], 0))[0]
            for rows in pieces(len(own), len(head)):
                p, q = F.linear(own[rows], self._head).log_softmax(-1), F.linear(final[rows], head).log_softmax(-1)
                total += F.kl_div(q, p, reduction="none", log_target=True).sum(dtype=torch.float64).item()
        return total / self._own.numel()

    def see(self, layer: nn.Module) -> None:
        """Let the layer see the states that it gets, for hooks on its parts."""
        for hidden in self.hidden.split(1):
            layer(hidden, **self._arguments)

    def _surprise(self, final: Tensor, logits: Tensor, mean: Tensor) -> Tensor:
        """-sum p log q of each token, for the final states [T, D] that give `logits` [T, V]."""
        return logits.logsumexp(-1) - (final * mean).sum(-1)

    def _run(self, hidden: Tensor, start: int) -> Tensor:
        for index in range(start, len(self._layers)):
            hidden = self._one(index, hidden)
        return hidden

    def _one(self, index: int, hidden: Tensor) -> Tensor:
        return first(self._layers[index](hidden, **self._arguments))


def _statistics(layer: nn.Module, prefix: str, inside: Sequence[Slice], reference: _Reference) -> dict[str, Statistics]:
    """Of the inputs of the linears to which these slices belong, by the linear's name."""
    seen = {one.module: Statistics(one.shape[1]) for one in inside}
    hooks = [
        layer.get_submodule(name.removeprefix(prefix)).register_forward_pre_hook(lambda _, x, s=s: s.update(x[0]))
        for name, s in seen.items()
    ]
    try:
        if hooks:
            reference.see(layer)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


@contextmanager
def _replaced(linear: nn.Module, rows: slice, values: Tensor) -> Iterator[None]:
    """With these rows of its weight the linear computes, inside the block."""
    weight = linear.get_parameter("weight").data
    before = weight[rows].clone()
    weight[rows] = values
    try:
        yield
    finally:
        weight[rows] = before


def pieces(tokens: int, vocabulary: int) -> Iterator[slice]:
    """Some tokens at a time, so that their logits stay small."""
    step = max(1, _PIECE // vocabulary)
    for start in range(0, tokens, step):
        yield slice(start, min(start + step, tokens))


def first(result: Any) -> Tensor:
    """The hidden states in what a decoder layer returns."""
    return result[0] if isinstance(result, tuple) else result
