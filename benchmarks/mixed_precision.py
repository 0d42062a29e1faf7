"""Bits by measured sensitivity against simple rules, 3.5 bits a weight on average: what each loses on held-out text.

    python benchmarks/mixed_precision.py [--windows 24] [--measured 8] [--searches proxy,kl] [--json]

Grids int2 .. int6 in groups of 32 for the linears of the decoder, embedding and head in float, on phi3-tiny and its
outlier twin, codes by rtn and by gptq. Rules give half of the layers (or of the linears, at random) 3 bits, the rest 4;
the budget of the search is their number of bytes. kl: every slice measured on every grid; refined: the best of four
recipes, measured as wholes on the calibration windows; proxy: one run forward and back. KL to the float model, and NLL
per token beside the best rule's, paired, with its standard error. Bar: every search loses less than every rule, by
more than two standard errors of the difference to the best of them.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import phiquant as pq
import torch
from common import machine
from phiquant.calibrate import token_windows
from phiquant.evaluate import compare_logits, model_logits
from phiquant.model_source import ModelSource
from phiquant.models import phi
from phiquant.search import Found, search
from phiquant.solvers import NEEDS_STATISTICS
from phiquant.spec import FLOAT_BITS

GRIDS = {bits: f"int{bits}-g32-sym-f16" for bits in (2, 3, 4, 5, 6)}
CALIBRATION = 24  # windows for gptq
FLOATS = ("model.embed_tokens", "lm_head")


@dataclass
class Result:
    """One recipe. ahead: NLL per token of the best rule minus its own, paired; predicted: by the search."""

    model: str
    solver: str
    name: str
    bytes: int
    loss: float
    standard_error: float
    kl: float
    predicted: float | None
    calibration_kl: float | None
    ahead: float
    ahead_se: float
    seconds: float

    @property
    def ok(self) -> bool:
        return self.name in RULES or self.ahead > 2 * self.ahead_se


def by_layer(low: tuple[int, ...]) -> pq.Recipe:
    """3 bits in the layers `low`, 4 in the others."""
    return pq.Recipe({f"model.layers.{i}.*": GRIDS[3] for i in low}, default=GRIDS[4])


def at_random(seed: int, layers: int = 4) -> pq.Recipe:
    """3 bits in half of the linears of each kind."""
    generator, rules = random.Random(seed), {}
    for part in phi.LAYER_LINEARS:
        for index in generator.sample(range(layers), layers // 2):
            rules[f"model.layers.{index}.{part}"] = GRIDS[3]
    return pq.Recipe(rules, default=GRIDS[4])


RULES = {
    "first half 3 bits": by_layer((0, 1)),
    "last half 3 bits": by_layer((2, 3)),
    "even layers 3 bits": by_layer((0, 2)),
    "odd layers 3 bits": by_layer((1, 3)),
    **{f"random {seed}": at_random(seed) for seed in range(2)},
}


def stored_bytes(model: Any) -> int:
    """Codes and their parameters, and the tensors that stay in float, as the search counts them."""
    total = 0
    for entry in ModelSource(model, None).entries:
        bits = FLOAT_BITS[entry.dtype] if entry.spec is None else entry.spec.bits_per_weight(entry.shape)
        total += math.ceil(entry.numel * bits / 8)
    return total


class Case:
    """One model and one solver: recipes, quantized and compared with the float model on the same windows."""

    def __init__(self, label: str, model: Any, solver: str, rows: list[list[int]], ids: torch.Tensor) -> None:
        self.label, self.model, self.solver, self.rows, self.ids = label, model, solver, rows, ids
        self.floats = list(model_logits(model, rows))
        self.made: dict[str, tuple[Result, list[torch.Tensor]]] = {}

    def add(self, name: str, recipe: pq.Recipe, found: Found | None = None, seconds: float = 0.0) -> None:
        data = self.ids if self.solver in NEEDS_STATISTICS else None
        quantized = pq.quantize(copy.deepcopy(self.model), recipe, self.solver, calibration=data)
        logits = list(model_logits(quantized, self.rows))
        lost = compare_logits(self.rows, logits, self.floats)
        told = (found.loss, found.measured) if found else (None, None)
        measured = (stored_bytes(quantized), lost.nll_diff, lost.nll_diff_se, lost.kl)
        result = Result(self.label, self.solver, name, *measured, *told, 0.0, 0.0, seconds)
        self.made[name] = result, logits

    def results(self) -> list[Result]:
        best = min((name for name in self.made if name in RULES), key=lambda name: self.made[name][0].loss)
        for result, logits in self.made.values():
            beside = compare_logits(self.rows, self.made[best][1], logits)
            result.ahead, result.ahead_se = beside.nll_diff, beside.nll_diff_se
        return [result for result, _ in self.made.values()]


def table(windows: int, measured: int, searches: list[str], cases: list[str], kept: Path) -> Iterator[Result]:
    model, tokenizer = pq.load("phi3-tiny")
    ids = token_windows(None, tokenizer)[:CALIBRATION]
    rows = pq.evaluate.windows(tokenizer, pq.testing.heldout_text(), limit=windows)
    models = {"phi3-tiny": model, "twin": pq.testing.outlier_twin(model)}
    for label, solver in (case.split(":") for case in cases):
        case = Case(label, models[label], solver, rows, ids)
        for name, rule in RULES.items():
            case.add(name, rule)
        budget = max(result.bytes for result, _ in case.made.values())
        for name in searches:
            method, _, refined = name.partition("+")
            began = time.perf_counter()
            found = search(
                *(models[label], "stored", budget),
                **{"candidates": list(GRIDS.values()), "keep": FLOATS, "calibration": ids, "windows": measured},
                **{"solver": solver, "method": method, "refine": bool(refined)},
                folder=kept / f"{label}-{solver}-{method}",  # a refined search finds there what was measured before
            )
            case.add(name, found.recipe, found, time.perf_counter() - began)
        yield from case.results()


def line(r: Result) -> str:
    told = [f"{value:9.4f}" if value is not None else " " * 9 for value in (r.predicted, r.calibration_kl)]
    return (
        f"{r.model:9} {r.solver:5} {r.name:18} {r.bytes:9} {r.loss:8.4f} {r.standard_error:7.4f} {r.kl:8.4f} "
        f"{told[0]} {told[1]} {r.ahead:8.4f} {r.ahead_se:7.4f} {r.seconds:6.1f}{'' if r.ok else '  MISSED'}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=24, help="held-out windows of 512 tokens")
    parser.add_argument("--measured", type=int, default=8, help="calibration windows for the losses of slices")
    parser.add_argument("--searches", default="proxy,proxy+refined,kl,kl+refined")
    parser.add_argument("--cases", default="phi3-tiny:rtn,phi3-tiny:gptq,twin:rtn,twin:gptq")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    results = []
    if not args.json:
        head = f"{'':9} {'codes':5} {'recipe':18} {'bytes':>9} {'loss':>8} {'+-':>7} {'KL':>8} {'predicted':>9}"
        print(f"{machine()}\n{head} {'on calib.':>9} {'ahead':>8} {'+-':>7} {'s':>6}")
    with tempfile.TemporaryDirectory() as kept:
        options = (args.windows, args.measured, args.searches.split(","), args.cases.split(","))
        for result in table(*options, Path(kept)):
            results.append(result)
            if not args.json:
                print(line(result), flush=True)
    if args.json:
        print(json.dumps({"machine": machine(), "results": [asdict(r) for r in results]}, indent=2))
    sys.exit(0 if all(r.ok for r in results) else 1)


if __name__ == "__main__":
    main()
