"""Every method at 8, 4, 3 and 2 bits on phi3-tiny and its outlier twin; what peers reach; the bars of both.

    python benchmarks/methods.py [--windows 24] [--models phi3-tiny,twin] [--bits 8,4,3,2] [--only gptq,rtn]
                                 [--out results.jsonl] [--peers DIR] [--report results.jsonl]

One line for each model, grid and method (kept in --out): perplexity, KL to the float model, loss (nats per token above
it, paired, with its standard error), same top token, bits per weight with every stored byte counted, seconds, memory
above the model's own. --peers: a folder of the lines that `python -m quality_peers TOOL` printed, each in an
environment of its own (quality_peers/README.md). --report: print the tables and bars of lines measured before.
Bars: gptq at int4 g32 and int3 g32 on phi3-tiny loses <= 0.65x of what rtn loses and has <= 0.6x of its output
error; at about 4.5, 3.5 and 2.5 bits the best solver's KL is <= 0.9x of the best peer's of as many bits or more.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import phiquant as pq
import torch
from common import machine
from phiquant.calibrate import output_error
from phiquant.modules import QuantizedLinear
from phiquant.statistics import Statistics
from quality import MODELS, Judge, Quality, linears

LOSS_BAR, ERROR_BAR, PEER_BAR = 0.65, 0.6, 0.9
BUDGETS = (4.63, 3.63, 2.63)  # what a peer of "about 4.5" bits may have: int4 asym g32 is 4.625

# method -> (solver, transforms, grids by their bits); grids of integers unless told
INTEGERS = ("uint{}-g32-asym-f16",)
K_QUANTS = ("q{}_k", "uint{}-g32-min-f16-uint6/256")  # of 2, 3 and 4 bits; the second has half a bit beside the codes
METHODS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "rtn": ("rtn", (), ("int{}-g32-sym", *INTEGERS)),
    "mse": ("mse", (), INTEGERS),
    "mse_exact": ("mse_exact", (), INTEGERS),
    "kl": ("kl", (), INTEGERS),
    "hqq": ("hqq", (), INTEGERS),
    "kmeans": ("kmeans", (), ("codebook{levels}-tensor",)),
    "adaround": ("adaround", (), INTEGERS),
    "awq": ("awq", (), INTEGERS),
    "gptq": ("gptq", (), ("int{}-g32-sym", *INTEGERS)),
    "gptq_mse": ("gptq_mse", (), INTEGERS),
    "gptq_refine": ("gptq_refine", (), (*INTEGERS, "uint{}-g64-asym-f16", *K_QUANTS)),
    "awq, gptq_mse": ("gptq_mse", ("awq",), INTEGERS),
}


def cells(bits: list[int], only: set[str]) -> Iterator[tuple[str, str, str, tuple[str, ...]]]:
    """(method, grid, solver, transforms)."""
    for number in bits:
        for name, (solver, transforms, grids) in METHODS.items():
            for grid in grids if not only or name in only else ():
                if number < 8 or grid not in K_QUANTS:
                    yield name, grid.format(number, levels=2**number), solver, transforms


@torch.no_grad()
def held_out_statistics(judge: Judge) -> dict[str, Statistics]:
    """Of the input of every linear of the decoder layers, on 16 held-out windows."""
    seen = {name: Statistics(linear.in_features) for name, linear in linears(judge.model).items()}
    hooks = [
        m.register_forward_pre_hook(lambda _, x, s=seen[n]: s.update(x[0])) for n, m in linears(judge.model).items()
    ]
    for row in judge.rows[:16]:
        judge.model(torch.tensor([row]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


def mean_output_error(model: Any, judge: Judge, seen: dict[str, Statistics]) -> float:
    """|(W - Q) X|^2 / |W X|^2 of each linear on held-out inputs of the float model, mean over the linears."""
    errors = [
        output_error(judge.model.get_submodule(name).weight.detach(), layer.quantized, seen[name])
        for name, layer in model.named_modules()
        if isinstance(layer, QuantizedLinear)
    ]
    return sum(errors) / len(errors)


def bits_per_weight(model: Any) -> float:
    """Codes and their parameters, every stored bit, over the quantized linears."""
    layers = [m.quantized for m in model.modules() if isinstance(m, QuantizedLinear)]
    bits = sum(q.spec.bits_per_weight(q.shape) * q.codes.numel() for q in layers)
    return bits / sum(q.codes.numel() for q in layers)


def measure(models: list[str], bits: list[int], only: set[str], windows: int) -> Iterator[dict[str, Any]]:
    for name in models:
        judge = Judge(name, windows)
        seen = held_out_statistics(judge)
        for method, grid, solver, transforms in cells(bits, only):
            quality, model = one(judge, method, grid, solver, transforms)
            error = mean_output_error(model, judge, seen) if solver in ("rtn", "gptq", "gptq_mse") else None
            yield asdict(quality) | {"grid": grid, "output_error": error}


def one(judge: Judge, method: str, grid: str, solver: str, transforms: tuple[str, ...]) -> tuple[Quality, Any]:
    model = copy.deepcopy(judge.model)

    def make() -> tuple[Any, float]:
        data = {"calibration": judge.ids} if transforms or solver not in DATA_FREE else {}
        pq.quantize(model, grid, solver, transforms=transforms, **data)
        return model, bits_per_weight(model)

    return judge.run("phiquant", method, make), model


DATA_FREE = {"rtn", "mse_exact", "kl", "hqq"}


def print_table(lines: list[dict[str, Any]]) -> None:
    """A row for each method on a grid, with both models side by side; seconds and memory are of the first one."""
    rows: dict[tuple[int, str, str, str], dict[str, dict[str, Any]]] = {}
    for r in lines:
        key = (-int(r["bits"]), "" if r["tool"] == "phiquant" else r["tool"], r["method"], r.get("grid") or "")
        rows.setdefault(key, {})[r["model"]] = r
    columns = "| perplexity | loss | KL | same top "
    print("| method | grid | bits " + "".join(columns.replace("| ", f"| {m}: ", 1) for m in MODELS) + "| s | MiB |")
    print("|---" * (5 + 4 * len(MODELS)) + "|")
    for (_, tool, method, grid), by_model in sorted(rows.items(), key=lambda row: _rank(*row)):
        first = next(iter(by_model.values()))
        print(
            f"| {f'{tool}: ' if tool else ''}{method} | {grid} | {first['bits']:.2f} |"
            + "".join(_cells(by_model.get(model)) for model in MODELS)
            + f" {first['seconds']:.1f} | {first['memory'] / 2**20:.0f} |"
        )


def _rank(key: tuple[int, str, str, str], by_model: dict[str, dict[str, Any]]) -> tuple[int, float]:
    return key[0], min(r["kl"] for r in by_model.values())


def _cells(r: dict[str, Any] | None) -> str:
    if r is None:
        return " | | | |"
    loss = f"{r['loss']:.4f} +- {r['standard_error']:.4f}"
    return f" {r['perplexity']:.2f} | {loss} | {r['kl']:.4f} | {100 * r['same_top']:.1f} % |"


def bars(lines: list[dict[str, Any]]) -> Iterator[tuple[str, float, float]]:
    """(what, measured ratio, bar)."""
    ours = {(r["model"], r["method"], r["grid"]): r for r in lines if r["tool"] == "phiquant"}
    for bits in (4, 3):
        rtn, gptq = (ours.get(("phi3-tiny", m, f"int{bits}-g32-sym")) for m in ("rtn", "gptq"))
        if rtn and gptq:
            yield f"gptq int{bits} g32: loss against rtn", gptq["loss"] / rtn["loss"], LOSS_BAR
            yield f"gptq int{bits} g32: output error", gptq["output_error"] / rtn["output_error"], ERROR_BAR
    for model in MODELS:
        for most in BUDGETS:
            within = [r for r in lines if r["model"] == model and most - 1 < r["bits"] <= most]
            peer = _best(r for r in within if r["tool"] != "phiquant")
            mine = _best(r for r in within if r["tool"] == "phiquant" and peer and r["bits"] <= peer["bits"])
            if mine and peer:
                what = f"{model}, up to {most} bits: {mine['method']} {mine['grid']} ({mine['bits']:.2f}) against "
                what += f"{peer['tool']} {peer['method']} ({peer['bits']:.2f})"
                yield what, mine["kl"] / peer["kl"], PEER_BAR


def _best(lines: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    return min(lines, key=lambda r: r["kl"], default=None)


def report(lines: list[dict[str, Any]]) -> bool:
    print_table(lines)
    print()
    ok = True
    for what, ratio, bar in bars(lines):
        ok &= ratio <= bar
        print(f"{what}: {ratio:.3f} (bar {bar}) {'ok' if ratio <= bar else 'MISSED'}")
    return ok


def read(paths: list[Path]) -> list[dict[str, Any]]:
    return [json.loads(line) for path in paths for line in path.read_text().splitlines() if line.startswith("{")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=24, help="held-out windows of 512 tokens")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--bits", default="8,4,3,2")
    parser.add_argument("--only", default="", help="methods, separated by ';'")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--peers", type=Path)
    parser.add_argument("--report", type=Path, nargs="*")
    args = parser.parse_args()
    lines = read(args.report or [])
    if not args.report:
        only = {name for name in args.only.split(";") if name}
        for line in measure(args.models.split(","), [int(b) for b in args.bits.split(",")], only, args.windows):
            lines.append(line)
            if args.out:
                with args.out.open("a") as file:
                    file.write(json.dumps(line) + "\n")
    if args.peers:
        lines += read(sorted(args.peers.glob("*.jsonl")))
    print(machine())
    sys.exit(0 if report(lines) else 1)


if __name__ == "__main__":
    main()
