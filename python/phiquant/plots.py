"""Pictures of quantization, for notebooks: each function draws into the given axes, or into new ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .extras import need
from .tensor import QuantizedTensor, element_arguments

FLOAT_COLOR, CODES_COLOR = "#9aa5b1", "#0b6e99"
CYCLE = ("#0b6e99", "#d9730d", "#448361", "#9065b0", "#c14c8a")


def block_on_grid(
    weight: torch.Tensor, quantized: QuantizedTensor, row: int = 0, block: int = 0, ax: Any = None
) -> Any:
    """The weights of one block of `weight` [N, K], the grid of that block, and where each weight goes.

    Returns the axes. ValueError if the row or block does not exist.
    """
    axes = _axes(ax, (9, 3.2))
    if quantized.scales is None:
        raise ValueError(f"{quantized.spec} has no blocks with scales to draw; plots.levels draws an element")
    blocks = quantized.scales.shape[1]
    if not (0 <= row < weight.shape[0] and 0 <= block < blocks):
        raise ValueError(f"row {row}, block {block}: the tensor has {weight.shape[0]} rows of {blocks} blocks")
    part = slice(block * weight.shape[1] // blocks, (block + 1) * weight.shape[1] // blocks)
    before = weight[row, part].detach().float().tolist()
    after = quantized.dequantize()[row, part].tolist()
    for level in _grid(quantized, row, block):
        axes.axvline(level, color="#dfe3e8", lw=1, zorder=0)
    for x, y in zip(before, after, strict=True):
        axes.plot([x, y], [1, 0], color=FLOAT_COLOR, lw=0.8, zorder=1)
    axes.scatter(before, [1] * len(before), s=18, color=FLOAT_COLOR, zorder=2)
    axes.scatter(after, [0] * len(after), s=18, color=CODES_COLOR, zorder=2)
    axes.set_yticks([1, 0], ["float", "codes"])
    axes.set_ylim(-0.35, 1.35)
    axes.set_xlabel("weight")
    axes.set_title(f"row {row}, block {block}: {len(before)} weights on the grid of {quantized.spec}", loc="left")
    return _clean(axes)


def weight_histogram(weight: torch.Tensor, quantized: QuantizedTensor, bins: int = 120, ax: Any = None) -> Any:
    """Histograms of a weight in float and of the decoded codes, over the same bins. Returns the axes."""
    axes = _axes(ax, (9, 3.2))
    values, decoded = weight.detach().float().flatten(), quantized.dequantize().flatten()
    end = values.abs().quantile(0.9995).item() if values.numel() < 1 << 24 else values.abs().max().item()
    edges = torch.linspace(-end, end, bins + 1).tolist()
    axes.hist(values.numpy(), bins=edges, color=FLOAT_COLOR, label="float")
    axes.hist(decoded.numpy(), bins=edges, histtype="step", color=CODES_COLOR, label=f"decoded {quantized.spec}")
    axes.set_xlabel("weight")
    axes.set_ylabel("count")
    axes.legend(frameon=False)
    return _clean(axes)


def thresholds(
    values: torch.Tensor, ranges: Mapping[str, tuple[float, float]], bins: int = 200, log: bool = True, ax: Any = None
) -> Any:
    """The histogram of `values` and, for each method in ranges[method] = (lo, hi), where it clips: lines of one color.

    A side on which a method's end lies beyond all values gets no line. log: counts on a logarithmic scale, so
    that the few outliers show. Returns the axes.
    """
    axes = _axes(ax, (9, 3.6))
    values = values.detach().float().flatten()
    values = values[values.isfinite()]
    axes.hist(values.numpy(), bins=bins, color=FLOAT_COLOR, log=log)
    lowest, highest = values.min().item(), values.max().item()
    for i, (name, ends) in enumerate(ranges.items()):
        lo, hi = (float(end) for end in ends)
        style: dict[str, Any] = {"color": CYCLE[i % len(CYCLE)], "ls": "-" if i < len(CYCLE) else "--", "lw": 1.6}
        label = f"{name}: {lo:.3g} .. {hi:.3g}"
        for end in (lo, hi):
            if lowest <= end <= highest:
                axes.axvline(end, label=label, **style)
                label = ""
        if label:
            axes.plot([], [], label=label, **style)
    axes.set_xlabel("value")
    axes.set_ylabel("count")
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
    return _clean(axes)


def layer_errors(errors: Mapping[str, Mapping[str, float]], ax: Any = None) -> Any:
    """Grouped bars: errors[method][layer], the layers of the first method in their order. Returns the axes."""
    layers = list(next(iter(errors.values())))
    axes = _axes(ax, (9, 3.6))
    width = 0.8 / len(errors)
    for i, (method, values) in enumerate(errors.items()):
        places = [n + (i - (len(errors) - 1) / 2) * width for n in range(len(layers))]
        axes.bar(places, [values[name] for name in layers], width, label=method, color=CYCLE[i % len(CYCLE)])
    axes.set_xticks(range(len(layers)), layers, rotation=60, ha="right", fontsize=8)
    axes.legend(frameon=False, ncols=len(errors), loc="lower right", bbox_to_anchor=(1, 1))
    return _clean(axes)


def training_curve(curves: Mapping[str, Sequence[Sequence[float]]], ax: Any = None) -> Any:
    """One line per run through its [step, loss] pairs, as in qat.Report.curve. Returns the axes."""
    axes = _axes(ax, (9, 3.2))
    for i, (name, pairs) in enumerate(curves.items()):
        steps, losses = zip(*pairs, strict=True)
        axes.plot(steps, losses, label=name, color=CYCLE[i % len(CYCLE)], lw=1.4)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.legend(frameon=False)
    return _clean(axes)


def bars(values: Mapping[str, float], reference: float | None = None, label: str = "perplexity", ax: Any = None) -> Any:
    """Horizontal bars with their figures; a dashed line at `reference`, such as the float model. Returns the axes."""
    axes = _axes(ax, (9, 0.5 + 0.4 * len(values)))
    names = list(values)[::-1]
    made = axes.barh(names, [values[name] for name in names], color=CODES_COLOR, height=0.6)
    axes.bar_label(made, fmt="%.3g", padding=4)
    shown = [0.0, reference or 0.0, *values.values()]
    room = 0.14 * (max(shown) - min(shown))
    axes.set_xlim(min(shown) - (room if min(shown) < 0 else 0), max(shown) + room)
    if reference is not None:
        axes.axvline(reference, color="#333333", lw=1, ls="--")
    axes.set_xlabel(label)
    return _clean(axes)


def size_against_loss(
    frontier: Sequence[tuple[float, float]],
    points: Mapping[str, tuple[float, float]],
    chosen: Mapping[str, tuple[float, float]] | None = None,
    ax: Any = None,
) -> Any:
    """Sizes in bytes against losses, on a logarithmic scale: a line through `frontier`, and named points.

    chosen: points that stand out, such as the recipe that search() found. Returns the axes.
    """
    axes = _axes(ax, (9, 4))
    unit, name = next((u, n) for u, n in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "bytes")) if frontier[-1][0] >= u)
    drawn = [(size / unit, loss) for size, loss in frontier if loss > 0]
    axes.plot(*zip(*drawn, strict=True), color=CODES_COLOR, lw=1.4, label="best recipes, predicted", zorder=1)
    for label, (size, loss) in points.items():
        axes.plot(size / unit, loss, "o", color=FLOAT_COLOR, ms=6, zorder=2)
        axes.annotate(label, (size / unit, loss), xytext=(6, 4), textcoords="offset points", fontsize=9)
    for i, (label, (size, loss)) in enumerate((chosen or {}).items()):
        color = CYCLE[1 + i % (len(CYCLE) - 1)]
        axes.plot(size / unit, loss, "D", color=color, ms=7, label=label, ls="", zorder=3)
    axes.set_yscale("log")
    axes.set_xlabel(f"size, {name}")
    axes.set_ylabel("nats per token")
    axes.legend(frameon=False)
    return _clean(axes)


def levels(lines: Mapping[str, Sequence[float]], ax: Any = None) -> Any:
    """A number line per element: its finite levels (such as `pq.Float("e2m1").levels`), each divided by the largest.

    Returns the axes; the first line is on top.
    """
    axes = _axes(ax, (9, 0.6 + 0.34 * len(lines)))
    for height, values in enumerate(reversed(list(lines.values()))):
        finite = sorted({float(v) for v in values if math.isfinite(v)})
        largest = max(abs(v) for v in finite)
        axes.axhline(height, color="#dfe3e8", lw=1, zorder=0)
        marks = [v / largest for v in finite]
        size, width = (130, 1.6) if len(marks) <= 16 else (90, 0.7)
        axes.scatter(marks, [height] * len(marks), marker="|", s=size, lw=width, color=CODES_COLOR)
    axes.set_yticks(range(len(lines)), list(lines)[::-1])
    axes.set_ylim(-0.6, len(lines) - 0.4)
    axes.set_xlabel("level / largest level")
    return _clean(axes)


def error_against_scale(x: torch.Tensor, bits: int, ax: Any = None) -> Any:
    """The squared error of one block x [n] on a symmetric grid of `bits`, against its scale. Returns the axes.

    Marked: the ranges that `ops.search_range` tries, the best of them, the optimum, and the min-max range.
    """
    from . import ops

    axes = _axes(ax, (9, 3.2))
    row = x.detach().float().reshape(1, -1)
    grid: dict[str, Any] = {"qmin": -(1 << (bits - 1)), "qmax": (1 << (bits - 1)) - 1}
    plain, _, _ = ops.choose_range(row, (1, 1), **grid, rule="absmax")

    def error(scale: float) -> float:
        y = ops.fake_quantize(row, torch.full((1, 1), scale), **grid)
        return (y.double() - row.double()).square().sum().item()

    scales = [plain.item() * (0.6 + 0.0008 * i) for i in range(1000)]
    axes.plot(scales, [error(s) for s in scales], color=FLOAT_COLOR, lw=1.2, label="squared error")
    tried = [plain.item() * (1 - 0.04 * i) for i in range(16)]
    axes.plot(tried, [error(s) for s in tried], "o", color=CODES_COLOR, ms=4, label="ranges tried")
    found = {"min-max": plain.item()}
    for name, exact in (("mse", False), ("mse_exact", True)):
        found[name] = ops.search_range(row, (1, 1), **grid, rule="absmax", exact=exact)[0].item()
    for (name, scale), color, marker in zip(found.items(), CYCLE[1:], ("s", "D", "*"), strict=False):
        label = f"{name}: {error(scale):.3f}"
        axes.plot(scale, error(scale), marker, color=color, ms=11 if marker == "*" else 7, label=label, ls="")
    axes.set_xlim(scales[0], scales[-1])
    axes.set_ylim(0, 2.5 * error(plain.item()))
    axes.set_xlabel("scale")
    axes.set_title(f"{row.numel()} values, {bits} bits", loc="left")
    axes.legend(frameon=False)
    return _clean(axes)


def scale_gradient(bits: int, ax: Any = None) -> Any:
    """What a value at v = x / s contributes to the gradient of a learned scale: a sawtooth. Returns the axes."""
    axes = _axes(ax, (5, 3.2))
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    v = torch.linspace(low - 2, high + 2, 2401)
    code = v.round().clamp(low, high)
    inside = v.round() == code
    slope = torch.where(inside, code - v, code)
    slope[1:][(slope.diff().abs() > 0.5)] = float("nan")  # no line across a jump
    axes.plot(v.tolist(), slope.tolist(), color=CODES_COLOR, lw=1.2)
    axes.axhline(0, color="#dfe3e8", lw=1, zorder=0)
    axes.set(xlabel="x / s", ylabel="dy / ds", title=f"gradient of the scale, {bits} bits")
    return _clean(axes)


def _grid(quantized: QuantizedTensor, row: int, block: int) -> list[float]:
    """The real values that the codes of one block can stand for, decoded as every other code is."""
    from . import ops

    element = quantized.spec.element
    assert quantized.scales is not None  # block_on_grid checked it
    codes = torch.arange(element.qmin, element.qmax + 1, dtype=quantized.codes.dtype)[None]
    scales, zero_points, minimums = quantized.grid()
    rows = row if scales.shape[0] > 1 else 0

    def one(values: torch.Tensor | None) -> torch.Tensor | None:
        return None if values is None else values[rows : rows + 1, block : block + 1].contiguous()

    scale = scales[rows : rows + 1, block : block + 1].contiguous()
    offsets = (one(zero_points), one(minimums))
    return ops.dequantize(codes, scale, *offsets, **element_arguments(element))[0].tolist()


def _axes(ax: Any, figsize: tuple[float, float]) -> Any:
    if ax is not None:
        return ax
    plt = need("matplotlib.pyplot", extra="plots")
    return plt.subplots(figsize=figsize, layout="constrained")[1]


def _clean(axes: Any) -> Any:
    axes.spines[["top", "right"]].set_visible(False)
    return axes
