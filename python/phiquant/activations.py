"""Grids of activations: a model runs on calibration windows, observers see every result, and each gets a range.

For runtimes that round activations to fixed grids (QNN). The weights are the values of the codes already chosen;
nothing here changes them. The model is read tensor by tensor, so memory holds one layer and the activations between
two layers. T = tokens in a window, H = hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import PhiquantError
from .formats.source import Source
from .models import decoder, phi
from .models.rope import read_rope
from .observers import KINDS, Kind, Observer
from .spec import spec as read_spec
from .tensor import QuantizedTensor

Progress = Callable[[str, int, int], None]

# An observer looks for a range, not for codes; 8 bits decide how coarse mse and kl take the grid to be.
_SPEC = read_spec("uint8-tensor-asym")


@dataclass
class Ranges:
    """lo and hi of every point of the decoder, by the names of models/decoder.py; "embedding" is its input.

    centres: what is taken from keys, [G, D] for each layer. observer, tokens: how all was found.
    """

    observer: str
    tokens: int
    points: dict[str, tuple[float, float]]
    centres: dict[str, list[list[float]]]


@torch.no_grad()
def observe(source: Source, ids: Tensor, kind: Kind = "minmax", *, progress: Progress | None = None) -> Ranges:
    """The ranges of a Phi-3 model's activations on the windows `ids` [n, T], int64.

    kind: "minmax", "ema", "percentile" (99.99), "mse" or "kl"; docs/ranges.md compares them. PhiquantError if a
    value is not finite, which 16 bits cannot hold.
    """
    if kind not in KINDS:
        raise PhiquantError(f"unknown observer {kind!r}; known: {', '.join(KINDS)}")
    run = _Run(source, int(ids.shape[1]), kind)
    hidden = [F.embedding(row, run.weight(f"{phi.EMBEDDING}.weight")) for row in ids]
    run.see("embedding", run.weight(f"{phi.EMBEDDING}.weight"))
    total = phi.sizes(source.config).layers
    for index in range(total):
        if progress:
            progress(f"model.layers.{index}", index, total)
        hidden = [decoder.layer(run, run.sizes, index, x) for x in hidden]
        run.forget()
    for x in hidden:
        run.linear(run.norm(x, phi.FINAL_NORM), phi.HEAD)
    centres = {point: centre[:, 0, 0].tolist() for point, centre in run.centres.items()}
    return Ranges(kind, ids.numel(), {name: run.ends(name) for name in run.observers}, centres)


class _Run:
    """Interprets the program of models/decoder.py in torch, float32, without a cache, and observes its points."""

    def __init__(self, source: Source, tokens: int, kind: Kind) -> None:
        config = source.config
        self.source, self.kind = source, kind
        self.rope = read_rope(config)
        self.sizes = decoder.Sizes.of(config, self.rope)
        self.observers: dict[str, Observer] = {}
        self.centres: dict[str, Tensor] = {}  # [G, 1, 1, D], of the first window: any constant will do
        self.entries = {entry.name: entry for entry in source.entries}
        self.linears = decoder.linears(config, set(self.entries))
        self.weights: dict[str, Tensor] = {}
        self.eps = float(config.get("rms_norm_eps", 1e-5))
        self.allowed = torch.from_numpy(decoder.allowed(tokens, tokens, config.get("sliding_window")))
        long = self.rope.long is not None and tokens > self.rope.original_context
        tables = decoder.rotation_tables(self.rope, self.sizes.head, tokens, long)
        cos, sin = (torch.from_numpy(table)[None, None] for table in tables)
        scale = self.sizes.head**-0.5
        self.rotations = {"query": (cos * scale, sin * scale), "key": (cos, sin)}

    def see(self, point: str, x: Tensor) -> Tensor:
        """Observe x under that name, and return it."""
        if not torch.isfinite(x).all():
            raise PhiquantError(f"{point}: the model computes values that are not finite on the calibration windows")
        self.observers.setdefault(point, KINDS[self.kind](_SPEC))(x)
        return x

    def ends(self, point: str) -> tuple[float, float]:
        lo, hi = (float(end) for end in self.observers[point].range())
        return lo, hi

    def weight(self, name: str) -> Tensor:
        """The values of a tensor, float32; kept until forget()."""
        if name not in self.weights:
            read = self.source.read(self.entries[name])
            self.weights[name] = read.dequantize() if isinstance(read, QuantizedTensor) else read.float()
        return self.weights[name]

    def forget(self) -> None:
        """Drop the weights of a finished layer."""
        self.weights.clear()

    def linear(self, x: Tensor, module: str) -> Tensor:
        name, rows = self.linears[module]
        return self.see(module, x @ self.weight(name)[rows].T)

    def norm(self, x: Tensor, module: str) -> Tensor:
        return self.see(module, F.rms_norm(x, x.shape[-1:], self.weight(f"{module}.weight"), self.eps))

    def add(self, a: Tensor, b: Tensor, point: str) -> Tensor:
        return self.see(point, a + b)

    def mul(self, a: Tensor, b: Tensor, point: str) -> Tensor:
        return self.see(point, a * b)

    def matmul(self, a: Tensor, b: Tensor, point: str) -> Tensor:
        return self.see(point, a @ b)

    def sigmoid(self, x: Tensor, point: str) -> Tensor:
        return x.sigmoid()

    def masked(self, scores: Tensor, point: str) -> Tensor:
        self.see(point, scores[..., self.allowed])
        return scores.masked_fill(~self.allowed, -torch.inf)

    def softmax(self, x: Tensor, point: str) -> Tensor:
        return x.softmax(-1)

    def rotation(self, kind: str) -> tuple[Tensor, Tensor]:
        return self.rotations[kind]

    def centred(self, keys: Tensor, point: str) -> Tensor:
        centre = self.centres.setdefault(point, keys.mean(2, keepdim=True))
        return self.see(point, keys - centre)

    def cached(self, x: Tensor, layer: int, kind: str, point: str) -> Tensor:
        return self.see(point, x)

    def reshape(self, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        return x.reshape(shape)

    def transpose(self, x: Tensor, axes: tuple[int, ...]) -> Tensor:
        return x.permute(axes)

    def cut(self, x: Tensor, start: int, stop: int) -> Tensor:
        return x[..., start:stop]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(parts), -1)
