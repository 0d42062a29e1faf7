"""Rounded activations on phi3-tiny and its outlier twin: what W8A8 loses plain, folded, smoothed, rotated; int8 caches.

    python benchmarks/activations.py [--windows 24] [--repeats 7] [--only table,cache,speed] [--json]

loss: NLL per token above the float model's, paired, with its standard error. Inputs are rounded per token; calibration
is on the training text. Bar: W8A8 on the twin with smoothing loses <= 0.1x of what plain W8A8 loses. speed: one
thread, the rows of a weight rotated by the kernel against the dense product with Q; bar 10x.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from dataclasses import asdict, dataclass
from typing import Any

import phiquant as pq
import torch
from common import Row, interleave, machine, print_rows
from phiquant import ops
from phiquant.calibrate import token_windows

GRIDS = {
    "W8A8": ("int8-channel-sym", "int8-token-sym"),
    "W4A8": ("int4-g32-sym", "int8-token-sym"),
    "W6A6": ("int6-channel-sym", "int6-token-sym"),
    "W8A8 fp8": ("fp8_e4m3-channel-sym", "fp8_e4m3-token-sym"),
}
TRANSFORMS = {
    "plain": (),
    "fold": ("fold",),
    "smooth": ("smooth",),
    "rotate": ("rotate",),
    "rotate, smooth down": ("rotate", "smooth:pairs=down"),
}
CACHES = ("int8-token-sym-f16", "int8-g32-sym-f16", "fp8_e4m3-token-sym-f16")
BAR, SPEED_BAR = 0.1, 10.0
CALIBRATION = 16  # windows


@dataclass
class Result:
    """One line of the table. share: of what the plain line above loses."""

    model: str
    grid: str
    transform: str
    loss: float
    standard_error: float
    kl: float
    same_top: float
    share: float = 1.0

    @property
    def ok(self) -> bool:
        return (self.model, self.grid, self.transform) != ("twin", "W8A8", "smooth") or self.share <= BAR

    def __str__(self) -> str:
        verdict = "" if self.ok else "  MISSED"
        return (
            f"{self.model:10} {self.grid:24} {self.transform:20} {self.loss:8.5f} +- {self.standard_error:.5f} "
            f"{self.share:7.3f} {self.kl:8.5f} {self.same_top:6.3f}{verdict}"
        )


def models() -> tuple[dict[str, Any], Any]:
    model, tokenizer = pq.load("phi3-tiny")
    return {"phi3-tiny": model, "twin": pq.testing.outlier_twin(model)}, tokenizer


def table(windows: int, show: Any) -> list[Result]:
    named, tokenizer = models()
    rows = pq.evaluate.windows(tokenizer, pq.testing.heldout_text(), limit=windows)
    ids, results = token_windows(None, tokenizer)[:CALIBRATION], []
    logits = {name: list(pq.evaluate.model_logits(model, rows)) for name, model in named.items()}
    for grid, (weights, activations) in GRIDS.items():
        for name, model in named.items():
            base: Result | None = None
            for label, transforms in TRANSFORMS.items():
                work = pq.transform(copy.deepcopy(model), list(transforms), calibration=ids)
                pq.quantize(work, weights, activations=activations)
                found = pq.evaluate.compare_logits(rows, pq.evaluate.model_logits(work, rows), logits[name])
                result = Result(name, grid, label, found.nll_diff, found.nll_diff_se, found.kl, found.same_top)
                base = base or result
                result.share = result.loss / base.loss
                results.append(result)
                show(result)
    return results


def cache(windows: int, show: Any) -> list[Result]:
    """Keys and values on 8 bits under the float model; share: bytes against float16's."""
    named, tokenizer = models()
    model = named["phi3-tiny"]
    rows = pq.evaluate.windows(tokenizer, pq.testing.heldout_text(), limit=windows)
    logits, results = list(pq.evaluate.model_logits(model, rows)), []
    for spec in CACHES:
        found = pq.evaluate.compare_logits(rows, pq.evaluate.model_logits(model, rows, spec), logits)
        head = model.config.hidden_size // model.config.num_attention_heads
        share = pq.spec(spec).bits_per_weight((1, 1, head)) / 16
        results.append(Result("phi3-tiny", spec, "cache", found.nll_diff, found.nll_diff_se, found.kl, found.same_top))
        results[-1].share = share
        show(results[-1])
    return results


def speed(repeats: int) -> list[Row]:
    torch.set_num_threads(1)
    rows = []
    for size in (3072, 5120):
        w = torch.randn(512, size, generator=torch.Generator().manual_seed(0))
        q = ops.hadamard_rotate_(torch.eye(size))
        ours, theirs = (f() for f in (lambda: ops.hadamard_rotate_(w.clone()), lambda: w @ q))  # noqa: B023
        same = bool(torch.allclose(ours, theirs, atol=1e-4))
        runs = {"torch": lambda: w @ q, "ours": lambda: ops.hadamard_rotate_(w.clone())}  # noqa: B023
        times = interleave(runs, repeats)
        rows.append(Row(f"rotate 512 rows of {size}", times["torch"], times["ours"], SPEED_BAR, same))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=24, help="held-out windows of 512 tokens")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", default="table,cache,speed")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    def show(result: Result) -> None:
        if not args.json:
            print(result, flush=True)

    if not args.json:
        print(machine())
        print(f"{'':10} {'grid':24} {'transform':20} {'loss':>8} {'':10} {'share':>7} {'KL':>8} {'top-1':>6}")
    results = table(args.windows, show) if "table" in args.only else []
    results += cache(args.windows, show) if "cache" in args.only else []
    rows = speed(args.repeats) if "speed" in args.only else []
    if args.json:
        lines = {"table": [asdict(r) for r in results], "speed": [row.as_dict() for row in rows]}
        print(json.dumps({"machine": machine(), **lines}, indent=2))
    elif rows:
        print_rows(rows)
    sys.exit(0 if all(r.ok for r in [*results, *rows]) else 1)


if __name__ == "__main__":
    main()
