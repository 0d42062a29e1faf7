"""Draw the pictures of the docs: python docs/pictures.py [name ...], all of them without a name."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import phiquant as pq
import torch
from phiquant import plots


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


PICTURES = {"integer.png": integer_layers}

if __name__ == "__main__":
    for name in sys.argv[1:] or PICTURES:
        PICTURES[name]().savefig(Path(__file__).parent / name, dpi=110)
        print(name)
