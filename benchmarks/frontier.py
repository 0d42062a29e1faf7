"""The low-bit frontier: gptq and gptq_refine on llama.cpp's own grids and on grids of other sizes, beside llama.cpp.

    python benchmarks/frontier.py [--windows 32] [--models phi3-tiny,twin] [--solvers ...] [--grids ...] [--json]

Linears of the decoder layers are quantized. KL(float || quantized) per token and loss (NLL above the float model's,
paired, with its standard error) on held-out text; calibration on the training text. llama.cpp's quantizers get an
importance matrix of the same windows; their blocks are decoded by llama.cpp, whose decoders tests find equal to ours.
bits: every stored bit, of codes, scales, scales of scales. Bars: on the grid of Q4_K, Q3_K, Q2_K and IQ4_XS KL is
<= 0.85x of llama.cpp's own; against all of its types of at most as many bits <= 0.9x.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import phiquant as pq
import torch
from common import machine
from methods import bits_per_weight
from phiquant.calibrate import token_windows

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/python"))
import ggml

# grid -> llama.cpp's type on it, or None; of about 4.5, 3.5 and 2.5 bits
GRIDS = {
    "q4_k": "Q4_K",
    "iq4_xs": "IQ4_XS",
    "uint4-g64-asym-f16": None,
    "q3_k": "Q3_K",
    "uint3-g32-min-f16-uint6/256": None,
    "q2_k": "Q2_K",
    "uint2-g32-min-f16-uint6/256": None,
}
PEERS = ("Q4_K", "IQ4_XS", "Q3_K", "IQ3_S", "Q2_K", "IQ2_S")
SAME_GRID, SAME_BITS = 0.85, 0.9
_ABOUT = 0.07  # bits by which sizes may differ and still be about the same


@dataclass
class Result:
    """One line of the table; ratio is KL to that of `against`."""

    model: str
    grid: str
    solver: str
    bits: float
    kl: float
    loss: float
    standard_error: float
    seconds: float
    ratio: float | None = None
    against: str | None = None
    bar: float | None = None

    @property
    def ok(self) -> bool:
        return self.bar is None or (self.ratio is not None and self.ratio <= self.bar)


class Judge:
    """Measures models against one float model."""

    def __init__(self, label: str, model: Any, rows: list[list[int]]) -> None:
        self.label, self.rows = label, rows
        self.logits = list(pq.evaluate.model_logits(model, rows))

    def result(self, model: Any, grid: str, solver: str, bits: float, seconds: float) -> Result:
        found = pq.evaluate.compare_logits(self.rows, pq.evaluate.model_logits(model, self.rows), self.logits)
        return Result(self.label, grid, solver, bits, found.kl, found.nll_diff, found.nll_diff_se, seconds)


def linears(model: Any) -> dict[str, torch.nn.Linear]:
    named = model.model.layers.named_modules(prefix="model.layers")
    return {name: module for name, module in named if isinstance(module, torch.nn.Linear)}


def own_blocks(model: Any, known: Any, kind: str) -> dict[str, Any]:
    """The bytes of each linear's weight by llama.cpp's quantizer, by the name of the linear. known: its imatrix."""
    layers = linears(model)
    jobs = [(kind, layer.weight.detach().numpy(), known[name].weights) for name, layer in layers.items()]
    return dict(zip(layers, ggml.quantize(jobs), strict=True))


def llama_cpp(model: Any, judge: Judge, ids: torch.Tensor) -> list[Result]:
    """llama.cpp's quantizers with an importance matrix."""
    layers, known = linears(model), pq.imatrix.collect(model, ids)
    results = []
    for kind in PEERS:
        began = time.perf_counter()
        decoded = ggml.decode([(kind, block) for block in own_blocks(model, known, kind).values()])
        seconds = time.perf_counter() - began
        changed = copy.deepcopy(model)
        for (name, layer), values in zip(layers.items(), decoded, strict=True):
            changed.get_submodule(name).weight.data = torch.from_numpy(values).reshape(layer.weight.shape)
        _, values, size = ggml.TYPES[kind]
        results.append(judge.result(changed, kind, "llama.cpp+imatrix", 8 * size / values, seconds))
    return results


def compare(results: list[Result]) -> None:
    """Each of ours against llama.cpp's own on its grid, else against the best of about as many bits or fewer."""
    theirs = {r.grid: r for r in results if r.solver.startswith("llama.cpp")}
    for r in results:
        if r in theirs.values() or not theirs:
            continue
        same = theirs.get(GRIDS.get(r.grid) or "")
        peers = [p for p in theirs.values() if p.bits <= r.bits + _ABOUT]
        peer = same or min(peers, key=lambda p: p.kl, default=None)
        if peer is not None:
            bar = SAME_GRID if same else SAME_BITS
            r.ratio, r.against, r.bar = r.kl / peer.kl, peer.grid, bar if r.solver == "gptq_refine" else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=32, help="held-out windows of 512 tokens, evenly spaced")
    parser.add_argument("--models", default="phi3-tiny,twin")
    parser.add_argument("--solvers", default="gptq_mse,gptq_refine")
    parser.add_argument("--grids", default=",".join(GRIDS))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    model, tokenizer = pq.load("phi3-tiny")
    ids = token_windows(None, tokenizer)
    rows = pq.evaluate.windows(tokenizer, pq.testing.heldout_text(), limit=80)
    rows = rows[:: max(1, len(rows) // args.windows)][: args.windows]
    everything = []
    print(machine(), file=sys.stderr)
    for label in args.models.split(","):
        reference = pq.testing.outlier_twin(model) if label == "twin" else model
        judge = Judge(label, reference, rows)
        results = llama_cpp(reference, judge, ids)
        for grid in filter(None, args.grids.split(",")):
            for solver in args.solvers.split(","):
                began = time.perf_counter()
                quantized = pq.quantize(copy.deepcopy(reference), grid, solver, calibration=ids)
                seconds = time.perf_counter() - began
                results.append(judge.result(quantized, grid, solver, bits_per_weight(quantized), seconds))
                print(results[-1], file=sys.stderr, flush=True)
        compare(results)
        everything += results
    if args.json:
        print(json.dumps({"machine": machine(), "rows": [asdict(r) for r in everything]}, indent=2))
    for r in () if args.json else everything:
        ratio = "" if r.ratio is None else f"  {r.ratio:5.3f} of {r.against}"
        verdict = "" if r.bar is None else "  ok" if r.ok else "  MISSED"
        print(
            f"{r.model:9} {r.grid:28} {r.solver:17} {r.bits:5.3f} bits  KL {r.kl:.5f}  "
            f"loss {r.loss:.4f} +- {r.standard_error:.4f}  {r.seconds:5.1f} s{ratio}{verdict}"
        )
    sys.exit(0 if all(r.ok for r in everything) else 1)


if __name__ == "__main__":
    main()
