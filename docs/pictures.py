"""Draw the pictures of the docs: python docs/pictures.py [name ...], all of them without a name."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import phiquant as pq
import torch
from phiquant import plots
from phiquant.search import joint_kl


def compression() -> Any:
    """Bits a weight of Huffman-coded k-means codes, with their zeros or with gaps, as more of them are zero."""
    from phiquant.compression.writer import gaps

    w = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0))
    shares = [0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.98]
    lines: dict[str, list[float]] = {}
    for share in shares:
        pruned = w.masked_fill(~pq.magnitude_mask(w, share), 0.0)
        codebook, codes = pq.kmeans(pruned, 16, keep_zero=True)
        zero = codes == int((codebook == 0).nonzero()[0])
        p = codes.bincount(minlength=16).double() / len(w)
        fillers = int((gaps(~zero) // 16).sum())  # a gap of 4 bits is at most 15; then a zero is stored
        for name, size in {
            "codes with their zeros": len(pq.ops.huffman_encode(codes)),
            "codes and gaps": sum(len(pq.ops.huffman_encode(s)) for s in (codes[~zero], gaps(~zero))),
            "4-bit codes and 4-bit gaps, no Huffman": (int((~zero).sum()) + fillers) * (4 + 4) / 8,
            "entropy of the codes": float(-(p * p.clamp(min=1e-30).log2()).sum()) * len(w) / 8,
        }.items():
            lines.setdefault(name, []).append(8 * size / len(w))
    figure, ax = plt.subplots(figsize=(9, 3.4), layout="constrained")
    for (name, values), color, style in zip(
        lines.items(), (*plots.CYCLE[:3], "#333333"), ("-o", "-o", ":", "--"), strict=True
    ):
        ax.plot(shares, values, style, label=name, color=color, ms=4, lw=1.4)
    ax.set(xlabel="share of zeros", ylabel="bits a weight", ylim=(0, 8), title="a million normal weights, 16 levels")
    ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    return figure


def integer_layers() -> Any:
    """What the codes of a linear layer cost as channels of its input grow beyond the others."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 512, generator=generator) for n in (256, 512))
    factors = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0]
    errors: dict[str, list[float]] = {}
    exact = x @ w.T
    for factor in factors:
        scaled, weights = x.clone(), w.clone()
        scaled[:, :3] *= factor
        weights[:, :3] /= factor  # the same function, as where a norm's weight grows and the next layer's shrinks
        quantized = pq.quantize_tensor(weights, "int8-channel-sym")
        weight = pq.integer.IntegerWeight.pack(quantized)
        grids = []
        for values in (scaled, exact):
            observer = pq.MinMaxObserver("uint8-tensor-asym")
            observer(values)
            grids.append(pq.integer.ActivationQuantizer.from_observer(observer))
        codes = pq.integer.linear(grids[0](scaled), weight, None, grids[1])
        for name, y in {
            "int8 weights, float activations": scaled @ quantized.dequantize().T,
            "int8 activations, a scale per token": pq.integer.linear_per_token(scaled, weight),
            "uint8 in and out, a scale per tensor": codes.dequantize(),
        }.items():
            errors.setdefault(name, []).append(((y - exact).norm() / exact.norm()).item())
    figure, ax = plt.subplots(figsize=(9, 3.4), layout="constrained")
    for (name, values), color in zip(errors.items(), plots.CYCLE, strict=False):
        ax.plot(factors, values, "o-", label=name, color=color, ms=4)
    ax.set(
        xscale="log", yscale="log", xlabel="3 of 512 input channels are this many times larger", ylabel="relative error"
    )
    ax.set_xticks(factors, [f"{factor:.0f}" for factor in factors])
    ax.set_yticks([0.01, 0.03, 0.1, 0.3], ["1 %", "3 %", "10 %", "30 %"])
    ax.minorticks_off()
    ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    return figure


def kmeans() -> Any:
    """The 16 levels of phi3-tiny's weights, even and by k-means; how near to the optimum Lloyd's algorithm comes."""
    model, _ = pq.load("phi3-tiny")
    parts = [p.detach().float().flatten() for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n]
    w = torch.cat(parts)

    def error(codebook: torch.Tensor, codes: torch.Tensor) -> float:
        return (codebook[codes.long()] - w).square().sum().item()

    exact, codes = pq.kmeans(w, 16)
    least = error(exact, codes)
    even = torch.linspace(w.min(), w.max(), 16)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), width_ratios=(3, 2), layout="constrained")
    left.hist(w.numpy(), bins=200, range=(-0.6, 0.6), color=plots.FLOAT_COLOR)
    top = left.get_ylim()[1]
    for levels, height, color, label in (
        (even, -0.06, plots.CYCLE[1], "even from min to max"),
        (exact, -0.13, plots.CYCLE[0], "exact k-means"),
    ):
        left.plot(levels, [height * top] * 16, "|", color=color, ms=11, mew=2, label=label)
    left.set(xlim=(-0.6, 0.6), ylim=(-0.2 * top, top), yticks=[], xlabel="weight")
    left.legend(frameon=False, loc="upper left", title="16 levels", alignment="left")
    iterations = [0, 1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100]
    for init, color in zip(("linear", "random", "quantile", "kmeans++"), plots.CYCLE[1:], strict=False):
        runs = [pq.kmeans(w, 16, method="lloyd", init=init, iterations=i) for i in iterations]
        right.plot(iterations, [error(*run) / least for run in runs], "o-", ms=3, color=color, label=init)
    right.axhline(1, color=plots.CYCLE[0], lw=1.2, label="exact")
    right.set(yscale="log", xlabel="iterations of Lloyd's algorithm", ylabel="error / least error")
    right.set_yticks([1, 2, 5, 10], ["1", "2", "5", "10"])
    right.minorticks_off()
    right.legend(frameon=False, title="start", alignment="left")
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
    return figure


def ranges() -> Any:
    """A bell with outliers, and where each method clips it for 8 and for 4 bits."""
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([torch.randn(200_000, generator=generator), 12 + 3 * torch.randn(40, generator=generator)])
    figure, axes = plt.subplots(2, 1, figsize=(9, 5.4), layout="constrained")
    for ax, bits in zip(axes, (8, 4), strict=True):
        spec = f"int{bits}-tensor-sym"
        found = {}
        for name, observer in {
            "min-max": pq.MinMaxObserver(spec),
            "percentile 99.9": pq.PercentileObserver(spec),
            "KL, TensorRT": pq.KLObserver(spec),
            "KL, notebook": pq.KLObserver(spec, form="notebook"),
            "histogram MSE": pq.HistogramObserver(spec),
        }.items():
            observer(x)
            found[name] = tuple(end.item() for end in observer.range())
        exact = pq.quantize_tensor(x, spec, solver="mse_exact")
        element = exact.spec.element
        found["mse_exact"] = tuple(exact.scales.item() * q for q in (element.qmin, element.qmax))
        plots.thresholds(x, found, ax=ax).set_title(f"200 000 normal values and 40 outliers, {bits} bits", loc="left")
    return figure


def elements() -> Any:
    """The levels of every kind of element, and what each loses on normal values."""
    w = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0))
    specs = {
        "int8": "int8-g64-sym",
        "fp8 e4m3": "fp8_e4m3-g64-sym",
        "fp8 e5m2": "fp8_e5m2-g64-sym",
        "int4": "int4-g64-sym",
        "fp4 e2m1": "fp4_e2m1-g64-sym",
        "fp4 e1m2": "fp4_e1m2-g64-sym",
        "fp4 e3m0": "fp4_e3m0-g64-sym",
        "nf4": "nf4-g64-sym",
        "codebook16": "codebook16-tensor",
        "int2": "int2-g64-sym",
        "ternary": "ternary-g64-sym",
        "binary": "binary-g64-sym",
    }
    lines, errors = {}, {}
    for name, text in specs.items():
        spec = pq.spec(text)
        qt = pq.quantize_tensor(w, spec, solver="kmeans" if spec.element.levels is None else "rtn")
        lines[name] = spec.element.levels if qt.codebook is None else qt.codebook[0].tolist()
        errors[name] = ((qt.dequantize() - w).square().mean() / w.square().mean()).sqrt().item()
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 4.6), width_ratios=(3, 1), layout="constrained", sharey=True
    )
    plots.levels(lines, ax=left)
    bars = right.barh(range(len(errors)), list(errors.values())[::-1], color=plots.CYCLE[1], height=0.55)
    right.bar_label(bars, fmt="%.3f", padding=3, fontsize=8)
    right.set(xscale="log", xlim=(0.003, 2), xlabel="relative error, normal values")
    right.spines[["top", "right"]].set_visible(False)
    return figure


def mse_search() -> Any:
    """The squared error of one group against its scale: what min-max, the grid and the sweep find."""
    figure, axes = plt.subplots(2, 1, figsize=(9, 5.4), layout="constrained")
    for ax, (bits, seed) in zip(axes, ((4, 159), (6, 82)), strict=True):
        x = torch.randn(32, generator=torch.Generator().manual_seed(seed))
        plots.error_against_scale(x, bits, ax=ax)
    return figure


def learned_scales() -> Any:
    """What one value contributes to the gradient of the scale, and a scale on its way to the least error."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    plots.scale_gradient(bits=3, ax=axes[0])
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    for start, color in zip(("lsq", "lsq+", "mse"), plots.CYCLE, strict=False):
        learned = pq.LearnedFakeQuantize("int3-tensor-sym", start=start)
        learned.initialize(x)
        optimizer = torch.optim.SGD(learned.parameters(), lr=0.2)
        line = []
        for _ in range(120):
            line.append(learned.scale.item())
            optimizer.zero_grad()
            (0.5 * (learned(x) - x).square().sum() / x.numel() ** 0.5).backward()
            optimizer.step()
        axes[1].plot(line, label=f'start="{start}"', color=color, lw=1.4)
    best, _, _ = pq.ops.search_range(x, (1, 1), qmin=-4, qmax=3, rule="absmax", exact=True)
    axes[1].axhline(best.item(), color="#333333", lw=1, ls="--", label="least squared error")
    axes[1].set(xlabel="step", ylabel="scale", title="SGD on the squared error, 3 bits")
    axes[1].legend(frameon=False)
    axes[1].spines[["top", "right"]].set_visible(False)
    return figure


def storage() -> Any:
    """What the scales of block formats cost, and what is lost, on weights with and without heavy tails."""
    normal = torch.randn(128, 4096, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    heavy = torch.distributions.StudentT(4.0).sample((128, 4096))
    one_level = ["int4-channel-sym", "gguf:Q4_0", "uint4-g32-min-f16"]
    one_level += ["mxfp4", "mxint8", "mxfp8_e4m3"]
    two_levels = ["q2_k", "q3_k", "vsq4", "q4_k", "nvfp4", "q5_k", "q6_k"]
    figure, axes = plt.subplots(1, 2, figsize=(11, 5.2), sharey=True, layout="constrained")
    for ax, w, title in zip(
        axes, (normal, heavy), ("normal weights", "Student's t, 4 degrees of freedom"), strict=True
    ):
        for names, color, label in (
            (one_level, plots.CYCLE[0], "one level"),
            (two_levels, plots.CYCLE[1], "two levels"),
        ):
            bits = [pq.spec(name).bits_per_weight((4096, 4096)) for name in names]
            lost = [((pq.fake_quantize(w, name) - w).norm() / w.norm()).item() for name in names]
            ax.scatter(bits, lost, color=color, s=22, label=label, zorder=3)
            for name, x, y in zip(names, bits, lost, strict=True):
                left = name in ("vsq4", "q4_k", "mxfp4")
                place = (-5, -9 if name == "q4_k" else 2) if left else (5, 2)
                how = {"textcoords": "offset points", "fontsize": 7, "ha": "right" if left else "left"}
                ax.annotate(name.removesuffix("-f16"), (x, y), place, **how)
        ax.set(yscale="log", xlabel="bits a weight, scales counted", title=title, xlim=(2.3, 9.4))
        ax.grid(alpha=0.25, which="both", lw=0.5)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("relative error")
    axes[0].legend(frameon=False)
    return figure


def mixed_precision() -> Any:
    """The best recipes of their sizes for phi3-tiny as GGUF, uniform grids, and recipes measured as wholes."""
    model, tokenizer = pq.load("phi3-tiny")
    rows = pq.evaluate.windows(tokenizer, pq.testing.training_text(200_000), 256, 6)
    options = {"calibration": torch.tensor(rows), "tokenizer": tokenizer, "method": "proxy"}
    measured = {}
    with tempfile.TemporaryDirectory() as folder:
        for budget in (2_000_000, 2_400_000, 2_800_000, 3_600_000):
            found = pq.search(model, "gguf", budget, folder=folder, **options)
            loss = joint_kl(model, found.recipe, options["calibration"])
            measured[f"{found.bytes / 1e6:.2f} MB, measured"] = (found.bytes, loss)
    uniform = {point.name.rpartition(":")[2]: (point.bytes, point.loss) for point in found.uniform}
    axes = plots.size_against_loss([(p.bytes, p.loss) for p in found.frontier], uniform, measured)
    return axes.figure


PICTURES = {
    "compression.png": compression,
    "elements.png": elements,
    "integer.png": integer_layers,
    "kmeans.png": kmeans,
    "learned-scales.png": learned_scales,
    "mixed-precision.png": mixed_precision,
    "mse-search.png": mse_search,
    "ranges.png": ranges,
    "storage.png": storage,
}

if __name__ == "__main__":
    for name in sys.argv[1:] or PICTURES:
        PICTURES[name]().savefig(Path(__file__).parent / name, dpi=110)
        print(name)
