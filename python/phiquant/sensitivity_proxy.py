"""The second-order term of the KL of a Phi-3 model in each of its slices, from one run forward and one back."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layerwise import Layerwise
from .models import phi
from .sensitivity_kl import first, pieces
from .slices import Slice
from .statistics import Statistics

if TYPE_CHECKING:
    from .sensitivity import Book

_ROWS = 1024  # rows, evenly spaced, on which D H D^T is evaluated
_HEAD_ROWS = 1 << 13  # of the head, widened to float32 at a time


def measure_proxy(walk: Layerwise, book: Book, ids: Tensor) -> None:
    """Estimate what the book is missing, on the windows of token ids `ids` [n, T]."""
    missing = book.missing
    arguments = walk.arguments(ids.shape[1])
    inputs = _Inputs(walk, ids, book.folder)
    for index in range(len(walk)):
        layer = walk.layer(index)
        for window in range(len(ids)):
            inputs[index + 1, window] = first(layer(inputs[index, window], **arguments))
    gradients = _head_proxy(walk, book, inputs)
    for index in reversed(range(len(walk))):
        inside = [one for one in missing if one.layer == index]
        layer, prefix = walk.layer(index), f"model.layers.{index}."
        seen = {one.module: _Fisher(one, book.needs_statistics) for one in inside}
        hooks = [hook for name, f in seen.items() for hook in f.watch(layer.get_submodule(name.removeprefix(prefix)))]
        for window in range(len(ids)):
            with torch.enable_grad():
                states = inputs[index, window].clone().requires_grad_()
                first(layer(states, **arguments)).backward(gradients[window])
            assert states.grad is not None
            gradients[window] = states.grad
        for hook in hooks:
            hook.remove()
        for one in inside:
            book.tell(one)
            began, fisher = time.monotonic(), seen[one.module]
            weight = walk.weight(one.module, one.rows)
            quantized = book.errors(one, weight, missing[one], fisher.plain)
            found = {spec: fisher.loss(one, values - weight.float()) for spec, values in quantized}
            book.add(one, found, began)
        del layer
    _embedding_proxy(walk, book, ids, inputs, gradients)
    inputs.close()


class _Inputs:
    """The hidden states [1, T, D] of a window before each layer, and after the last: in memory, or in a file."""

    def __init__(self, walk: Layerwise, ids: Tensor, folder: Path | None) -> None:
        embedded = walk.embed(ids)
        shape = (len(walk) + 1, *embedded.shape)
        self._file = None if folder is None else folder / "states.bin"
        if self._file is None:
            self._all = torch.empty(shape)
        else:
            size = torch.Size(shape).numel()
            self._all = torch.from_file(str(self._file), shared=True, size=size).view(shape)
        self._all[0] = embedded

    def __getitem__(self, at: tuple[int, int]) -> Tensor:
        layer, window = at
        return self._all[layer, window : window + 1]

    def __setitem__(self, at: tuple[int, int], states: Tensor) -> None:
        self._all[at] = states[0]

    @property
    def windows(self) -> int:
        return self._all.shape[1]

    def close(self) -> None:
        if self._file is not None:
            self._file.unlink(missing_ok=True)


class _Fisher:
    """Of one linear: second moments of its inputs, tokens weighed by their gradients; squared gradients of its rows."""

    def __init__(self, one: Slice, plain: bool) -> None:
        self._moments = Statistics(one.shape[1])
        self.plain = Statistics(one.shape[1]) if plain else None
        self._rows: Tensor = torch.zeros(0)
        self._weight = 0.0

    def watch(self, linear: nn.Module) -> list[Any]:
        """Hooks that gather both while the layer runs forward and back."""
        caught: list[Tensor] = []

        def forward(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            caught[:] = [arguments[0].detach()]
            output.register_hook(backward)

        def backward(gradient: Tensor) -> None:
            squares = gradient[0].double().square()
            weight = squares.sum(1)
            self._rows = squares.sum(0) + (self._rows if len(self._rows) else 0)
            self._weight += weight.sum().item()
            self._moments.update(caught[0][0] * weight.sqrt().float()[:, None])
            if self.plain is not None:
                self.plain.update(caught[0])

        return [linear.register_forward_hook(forward)]

    def loss(self, one: Slice, error: Tensor) -> float:
        """1/2 sum over rows of E[g^2] (D H D^T)_rr, from at most 1024 of the rows."""
        some = torch.linspace(0, len(error) - 1, min(len(error), _ROWS)).long()
        d = error[some]
        outputs = ((d @ self._moments.hessian) * d).sum(1, dtype=torch.float64)
        squares = self._rows[one.rows][some]
        scale = len(error) / len(some) / self._moments.tokens / max(self._weight, 1e-300)
        return 0.5 * scale * float((squares * outputs).sum())


def _head_proxy(walk: Layerwise, book: Book, inputs: _Inputs) -> list[Tensor]:
    """Gradients of a sample of the model's own predictions in the last layer's output, by window; the head's losses."""
    head = walk.weight(phi.HEAD)
    mine = [one for one in book.missing if one.module == phi.HEAD]
    generator = torch.Generator().manual_seed(0)
    gradients, last = [], len(walk)
    seen = Statistics(head.shape[1])
    for window in range(inputs.windows):
        with torch.enable_grad():
            states = inputs[last, window].clone().requires_grad_()
            final = walk.normed(states)
        wanted = torch.empty_like(final)
        for rows in pieces(final.shape[1], len(head)):
            p = _by_rows(final[0, rows].detach(), head).softmax(-1)
            drawn = torch.multinomial(p, 1, generator=generator)
            p.scatter_add_(1, drawn, torch.full(drawn.shape, -1.0))
            wanted[0, rows] = sum((p[:, r] @ head[r].float() for r in _head_rows(head)), torch.zeros(()))
        if mine and book.needs_statistics:
            seen.update(final.detach())
        final.backward(wanted)
        assert states.grad is not None
        gradients.append(states.grad)
    for one in mine:
        book.tell(one)
        began, found = time.monotonic(), {}
        quantized = book.errors(one, head, book.missing[one], seen if book.needs_statistics else None)
        for spec, values in quantized:
            found[spec] = _head_kl(walk, inputs, head, values)
        book.add(one, found, began)
    return gradients


def _head_kl(walk: Layerwise, inputs: _Inputs, head: Tensor, values: Tensor) -> float:
    """The head's own KL is measured: nothing comes after it."""
    total, tokens, last = 0.0, 0, len(walk)
    for window in range(inputs.windows):
        final = walk.normed(inputs[last, window])[0]
        for rows in pieces(len(final), len(head)):
            p, q = (_by_rows(final[rows], w).log_softmax(-1) for w in (head, values))
            total += F.kl_div(q, p, reduction="none", log_target=True).sum(1).double().sum().item()
        tokens += len(final)
    return total / tokens


def _embedding_proxy(walk: Layerwise, book: Book, ids: Tensor, inputs: _Inputs, gradients: Sequence[Tensor]) -> None:
    """1/2 E[(g . d)^2] with the error d of each token's own row; of a tied head its KL is added."""
    mine = [one for one in book.missing if one.module == phi.EMBEDDING]
    for one in mine:
        book.tell(one)
        began, found = time.monotonic(), {}
        table = walk.weight(phi.EMBEDDING)
        for spec, values in book.errors(one, table, book.missing[one], None):
            error = F.embedding(ids, values) - F.embedding(ids, table).float()
            along = sum(
                float((g[0].double() * e.double()).sum(1).square().sum()) for g, e in zip(gradients, error, strict=True)
            )
            found[spec] = 0.5 * along / ids.numel()
            if walk.tied:
                found[spec] += _head_kl(walk, inputs, table, values)
        book.add(one, found, began)


def _head_rows(head: Tensor) -> Iterator[slice]:
    for start in range(0, len(head), _HEAD_ROWS):
        yield slice(start, min(start + (_HEAD_ROWS), len(head)))


def _by_rows(states: Tensor, head: Tensor) -> Tensor:
    """Logits in float32, with some rows of the head widened at a time."""
    return torch.cat([states @ head[rows].float().T for rows in _head_rows(head)], -1)
