"""Observers: they see tensors and remember what a range is found from, for `FakeQuantize` or a solver.

An observer's state is its buffers, so it goes through `state_dict`; two observers of the same spec can be merged, and
`all_reduce` merges those of all ranks. docs/ranges.md compares what they find.
"""

from __future__ import annotations

from .base import KeepsDtype, Observer, range_arguments
from .histogram import HistogramObserver, KLObserver, PercentileObserver
from .min_max import EmaObserver, MinMaxObserver
from .torch_histogram import TorchHistogramObserver

__all__ = [
    "EmaObserver",
    "HistogramObserver",
    "KLObserver",
    "KeepsDtype",
    "MinMaxObserver",
    "Observer",
    "PercentileObserver",
    "TorchHistogramObserver",
    "range_arguments",
]
