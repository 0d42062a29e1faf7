"""Deep Compression (Han et al. 2016): prune, tune, share weights, tune, Huffman.

    report = pq.deep_compress(model, tune, "lenet.phiq", sparsity=0.9, levels=16)
    fresh_model.load_state_dict(pq.decompress("lenet.phiq"))

Each step is also a call of its own: `prune`, `finalize_pruning`, `share_weights`, `compress`.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..codebook_linear import CodebookLinear, Reduction
from ..errors import PhiquantError
from .prune import finalize_pruning, prune
from .reader import CompressedSize
from .writer import compress

Tune = Callable[[nn.Module], Any]


class CodebookConv2d(CodebookLinear):
    """A Conv2d with weight = codebook[codes], codes [N, C, H, W]; otherwise as CodebookLinear."""

    options: dict[str, Any]

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, k: int, **options: Any) -> CodebookConv2d:
        """Cluster the weight of `conv` into k levels; options as for CodebookLinear.from_linear."""
        if conv.padding_mode != "zeros":
            raise PhiquantError(f"a CodebookConv2d pads with zeros, not by {conv.padding_mode!r}")
        layer: Any = cls.from_linear(conv, k, **options)  # type: ignore[arg-type]
        layer.options = {name: getattr(conv, name) for name in ("stride", "padding", "dilation", "groups")}
        return layer

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input, self.weight, self.bias, **self.options)

    def extra_repr(self) -> str:
        blocks, k = self.codebook.shape[:2]
        return f"kernel {list(self.codes.shape)}, {blocks} x {k} levels, reduction={self.reduction}"


def share_weights(
    model: nn.Module,
    levels: int | Mapping[str, int] = 16,
    *,
    keep_zero: bool = True,
    rows: int | None = None,
    reduction: Reduction = "sum",
) -> nn.Module:
    """Replace each Linear and Conv2d of `model`, in place, by one that trains the levels of a codebook.

    levels: how many, for every layer, or by name pattern, the first that matches a layer counts and a layer that
        none matches stays as it is. A layer gets no more levels than it has values.
    keep_zero: one of the levels is 0 and stays 0, and k-means spends the others on what is not 0.
    rows: a codebook for each `rows` rows; None, one for the layer. reduction: as in CodebookLinear.

    Returns the model. PhiquantError if no layer, or a pattern no layer, matches.
    """
    wishes = dict(levels) if isinstance(levels, Mapping) else {"*": levels}
    layers = {name: m for name, m in model.named_modules() if name and type(m) in (nn.Linear, nn.Conv2d)}
    chosen = {name: next((p for p in wishes if fnmatch.fnmatch(name, p)), None) for name in layers}
    if unused := [p for p in wishes if p not in chosen.values()]:
        raise PhiquantError(
            f"no Linear or Conv2d inside the model is left for {unused[0]!r}; these are: {', '.join(layers) or 'none'}"
        )
    for name, pattern in chosen.items():
        if pattern is None:
            continue
        layer: Any = layers[name]
        make = CodebookConv2d.from_conv if isinstance(layer, nn.Conv2d) else CodebookLinear.from_linear
        k = min(wishes[pattern], layer.weight.numel())
        parent, _, child = name.rpartition(".")
        shared = make(layer, k, rows=rows, keep_zero=keep_zero, reduction=reduction).train(layer.training)
        setattr(model.get_submodule(parent), child, shared)
    return model


@dataclass(frozen=True)
class DeepCompression:
    """What a run did. size: the file, to the byte; tuned: what `tune` returned after pruning and after sharing."""

    size: CompressedSize
    tuned: dict[str, Any] = field(default_factory=dict)


def deep_compress(
    model: nn.Module,
    tune: Tune,
    path: str | Path,
    *,
    sparsity: float | Mapping[str, float],
    levels: int | Mapping[str, int] = 16,
    reduction: Reduction = "sum",
) -> DeepCompression:
    """Prune, tune, share weights, tune, and write the file; `model` is changed in place.

    tune(model): trains the model as it is then; what it returns (an accuracy, say) is kept in the report. Pruned
        weights stay zero in both trainings. sparsity: as for `prune`; levels: as for `share_weights`, zero included.
    """
    prune(model, sparsity)
    tuned = {"pruned": tune(model)}
    finalize_pruning(model)
    share_weights(model, levels, reduction=reduction)
    tuned["shared"] = tune(model)
    return DeepCompression(compress(model, path), tuned)
