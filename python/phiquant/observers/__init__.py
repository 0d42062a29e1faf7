"""Observers: they see tensors and remember what a range is found from, for `FakeQuantize` or a solver.

An observer's state is its buffers, so it goes through `state_dict`; two observers of the same spec can be merged, and
`all_reduce` merges those of all ranks. docs/ranges.md compares what they find.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from ..spec import QuantSpec
from .base import KeepsDtype, Observer, range_arguments
from .histogram import HistogramObserver, KLObserver, PercentileObserver
from .min_max import EmaObserver, MinMaxObserver
from .torch_histogram import TorchHistogramObserver

Kind = Literal["minmax", "ema", "percentile", "mse", "kl"]
# The observers of activations by the names they go by.
KINDS: dict[Kind, Callable[[QuantSpec], Observer]] = {
    "minmax": MinMaxObserver,
    "ema": EmaObserver,
    "percentile": lambda spec: PercentileObserver(spec, 99.99),
    "mse": HistogramObserver,
    "kl": KLObserver,
}

__all__ = [
    "KINDS",
    "EmaObserver",
    "HistogramObserver",
    "KLObserver",
    "KeepsDtype",
    "Kind",
    "MinMaxObserver",
    "Observer",
    "PercentileObserver",
    "TorchHistogramObserver",
    "range_arguments",
]
