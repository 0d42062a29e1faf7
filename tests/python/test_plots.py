"""The pictures show the numbers they are given."""

from __future__ import annotations

import matplotlib as mpl
import phiquant as pq
import pytest
import torch
from phiquant import plots

mpl.use("Agg")


@pytest.fixture
def weight():
    return torch.randn(8, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("text", ["int4-g32-signmax-f16", "uint3-g32-asym", "uint4-g32-min-f16", "int4-channel-sym"])
def test_block_on_grid_draws_codes_on_grid_lines(weight, text):
    quantized = pq.quantize_tensor(weight, text)
    axes = plots.block_on_grid(weight, quantized, row=3, block=0)
    element = quantized.spec.element
    lines = [line.get_xdata()[0] for line in axes.lines[: element.qmax - element.qmin + 1]]
    decoded = axes.collections[1].get_offsets()[:, 0]
    assert all(min(abs(x - line) for line in lines) == 0 for x in decoded)


def test_block_that_does_not_exist_is_an_error(weight):
    with pytest.raises(ValueError, match="8 rows of 2 blocks"):
        plots.block_on_grid(weight, pq.quantize_tensor(weight, "int4-g32-sym"), row=8)


def test_histogram_counts_every_weight_within_the_edges(weight):
    axes = plots.weight_histogram(weight, pq.quantize_tensor(weight, "int8-g32-sym"), bins=10)
    assert sum(bar.get_height() for bar in axes.patches[:10]) >= weight.numel() - 1


def test_bars_and_curves_hold_the_given_values():
    errors = plots.layer_errors({"rtn": {"a": 1.0, "b": 2.0}, "mse": {"a": 0.5, "b": 1.0}})
    assert [bar.get_height() for bar in errors.patches] == [1.0, 2.0, 0.5, 1.0]
    curve = plots.training_curve({"run": [[0, 3.0], [10, 2.0], [20, 1.0]]})
    assert curve.lines[0].get_ydata().tolist() == [3.0, 2.0, 1.0]
    assert curve.lines[0].get_xdata().tolist() == [0, 10, 20]
    bars = plots.bars({"float": 0.0, "rtn": 2.0, "qat": -1.0})
    assert [bar.get_width() for bar in bars.patches] == [-1.0, 2.0, 0.0]
    assert bars.get_xlim()[0] < -1


def test_thresholds_are_drawn_where_they_lie():
    x = torch.tensor([-2.0, 0.0, 1.0, 4.0, float("nan"), float("inf")])
    axes = plots.thresholds(
        x, {"min-max": (-2, 4), "clipped": (torch.tensor([-1.5]), 3.0), "wide": (-9.0, 9.0)}, bins=6
    )
    assert sum(bar.get_height() for bar in axes.patches) == 4
    assert [line.get_xdata()[0] for line in axes.lines if len(line.get_xdata())] == [-2, 4, -1.5, 3]
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == ["min-max: -2 .. 4", "clipped: -1.5 .. 3", "wide: -9 .. 9"]


def test_number_lines_hold_the_finite_levels_of_an_element():
    axes = plots.levels({"e2m1": pq.Float("e2m1").levels, "e5m2": pq.Float("e5m2").levels})
    lower, upper = (c.get_offsets()[:, 0].tolist() for c in axes.collections)
    assert upper == pytest.approx([v / 6 for v in (-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6)])
    assert len(lower) == 2 * 123 + 1
    assert [label.get_text() for label in axes.get_yticklabels()] == ["e5m2", "e2m1"]
