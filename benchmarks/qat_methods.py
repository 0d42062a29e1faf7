"""What training through the grid gains: against rtn, gptq and a float control, and against torchao's QAT.

    python benchmarks/qat_methods.py             # everything, about 40 minutes on 2 idle cores
    python benchmarks/qat_methods.py bars        # LSQ and distillation at 4, 3 and 2 bits
    python benchmarks/qat_methods.py torchao     # same steps and text as torchao's QAT (pip install --no-deps torchao)
    python benchmarks/qat_methods.py variants    # every range, codes to start from, blocks, adapters, at 3 bits

KL is the mean of KL(float || model) per token on held-out source code, loss the mean difference of negative
log-likelihoods to the float model with its paired standard error. The float control is the float model trained as
long, by plain language-model loss (distilled from itself it would not move), then rounded by rtn.

Bars, phi3-tiny, g32 symmetric, at most 5 minutes of training on 2 idle cores: KL <= 0.2x of rtn's at 2 bits and
<= 0.3x at 3, and below the better of gptq and gptq_mse at 4, 3 and 2 bits. Against torchao: a lower KL after the same
steps, and less time for a step.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from dataclasses import dataclass, replace
from typing import Any

import phiquant as pq
import torch
from common import machine
from phiquant import qat
from phiquant.calibrate import token_windows
from phiquant.qat_optimizer import Steps, only_grids
from qat import prepare_torchao

RTN_BAR = {3: 0.3, 2: 0.2}
RATES = {4: 1e-4, 3: 2.5e-4, 2: 5e-4}  # of the weights, by bits: coarser grids take larger steps
PEERS = ("rtn", "gptq", "gptq_mse")


@dataclass
class Line:
    """One model of the table."""

    what: str
    kl: float
    loss: float
    standard_error: float
    same_top: float
    seconds: float = 0.0
    verdict: str = ""

    def show(self) -> None:
        print(
            f"  {self.what:44} KL {self.kl:8.5f}  loss {self.loss:8.4f} +- {self.standard_error:.4f}  same top "
            f"{100 * self.same_top:5.2f} %  {self.seconds:6.0f} s  {self.verdict}",
            flush=True,
        )


class Judge:
    """Compares models with the float one on the same windows, whose float logits are computed once."""

    def __init__(self, model: Any, tokenizer: Any, windows: int) -> None:
        self.rows = pq.evaluate.windows(tokenizer, pq.testing.heldout_text(), limit=windows)
        self.logits = list(pq.evaluate.model_logits(model, self.rows))

    def __call__(self, what: str, model: Any, seconds: float = 0.0) -> Line:
        found = pq.evaluate.compare_logits(self.rows, pq.evaluate.model_logits(model, self.rows), self.logits)
        return Line(what, found.kl, found.nll_diff, found.nll_diff_se, found.same_top, seconds)


class Bench:
    """The float model, its text, and the lines measured so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.model, self.tokenizer = pq.load("phi3-tiny")
        self.judge = Judge(self.model, self.tokenizer, args.windows)
        self.text = pq.testing.training_text(characters=max(1_000_000, 5 * args.steps * args.batch * args.window))
        self.settings = qat.Settings(steps=args.steps, batch=args.batch, window=args.window)
        self.lines: list[Line] = []
        self.ok = True

    def rounded(self, spec: str, solver: str, model: Any = None) -> Line:
        data = {"calibration": token_windows(None, self.tokenizer)} if solver != "rtn" else {}
        began = time.monotonic()
        quantized = pq.quantize(copy.deepcopy(self.model if model is None else model), spec, solver, **data)
        return self.judge(f"{spec} {solver}", quantized, time.monotonic() - began)

    def trained(self, what: str, spec: Any, settings: qat.Settings, **options: Any) -> Line:
        student = copy.deepcopy(self.model)
        began = time.monotonic()
        report = qat.train(student, self.tokenizer, spec, text=self.text, settings=settings, **options)
        line = self.judge(what, student, time.monotonic() - began)
        line.verdict = f"{report.steps} steps, {report.tokens:,} tokens, {report.trained:,} values trained"
        return line

    def add(self, line: Line) -> Line:
        line.show()
        self.lines.append(line)
        return line

    def require(self, ok: bool, line: Line, verdict: str) -> None:
        self.ok &= ok
        line.verdict = f"{verdict}: {'ok' if ok else 'MISSED'}; {line.verdict}"

    def bars(self, bits: list[int]) -> None:
        control = copy.deepcopy(self.model)
        by_language = replace(self.settings, language_model=1.0, learning_rate=RATES[4])
        qat.train(control, self.tokenizer, pq.Recipe(default="float"), text=self.text, settings=by_language)
        self.add(self.judge("float control, by language-model loss", control))
        for number in bits:
            spec = f"int{number}-g32-sym"
            peers = {solver: self.add(self.rounded(spec, solver)) for solver in PEERS}
            line = self.rounded(spec, "rtn", control)
            line.what = f"float control, then {spec} rtn"
            self.add(line)
            settings = replace(self.settings, learning_rate=RATES[number])
            line = self.trained(f"{spec} QAT (LSQ, distilled)", spec, settings, range="learned")
            to_rtn, best = line.kl / peers["rtn"].kl, min(peers["gptq"].kl, peers["gptq_mse"].kl)
            self.require(line.kl < best, line, f"{line.kl / best:.3f} of gptq's (bar 1)")
            if bar := RTN_BAR.get(number):
                self.require(to_rtn <= bar, line, f"{to_rtn:.3f} of rtn's (bar {bar})")
            self.add(line)

    def variants(self, spec: str, learning_rate: float) -> None:
        settings = replace(self.settings, learning_rate=learning_rate)
        for range in ("tensor", "observer", "mse", "learned", "lsq", "clip", "scales"):
            self.add(self.trained(f"{spec} range={range}", spec, settings, range=range))
        for range in ("learned", "scales"):
            options = {"range": range, "start": "gptq_mse"}
            self.add(self.trained(f"{spec} range={range} from gptq_mse's codes", spec, settings, **options))
        low_rank = replace(settings, learning_rate=10 * learning_rate)
        self.add(self.trained(f"{spec} adapters of rank 8", spec, low_rank, range="learned", rank=8))
        per_layer = settings.steps // len(self.model.model.layers)
        blocks = replace(settings, steps=0, block_steps=per_layer)
        self.add(self.trained(f"{spec} by blocks", spec, blocks, range="learned"))
        then = replace(settings, steps=settings.steps // 4, block_steps=per_layer)
        self.add(self.trained(f"{spec} by blocks, then scales", spec, then, range="learned"))
        self.add(self.trained("codebook8-row range=learned", "codebook8-row", settings, range="learned"))
        self.add(self.trained("codebook3-tensor range=ternary", "codebook3-tensor", settings, range="ternary"))

    def torchao(self) -> None:
        """The same loop over both, a step of one after a step of the other: the machine's load hits both alike."""
        settings = replace(self.settings, learning_rate=RATES[4])
        ids = qat.encode(self.tokenizer, self.text)
        models = {"phiquant": copy.deepcopy(self.model), "torchao": copy.deepcopy(self.model)}
        pq.prepare_qat(models["phiquant"], "int4-g32-sym", range="learned")
        if note := prepare_torchao(models["torchao"]):
            print(note)
            self.ok = False
            return
        linears = [m for n, m in models["torchao"].named_modules() if isinstance(m, torch.nn.Linear) and "layers." in n]
        kept = {id(m.weight) for m in linears}
        for parameter in models["torchao"].parameters():
            parameter.requires_grad_(id(parameter) in kept)
        with only_grids(models["phiquant"]):
            steps = {name: Steps(model, settings) for name, model in models.items()}
            times: dict[str, list[float]] = {name: [] for name in models}
            for step in range(settings.steps):
                rows = qat._batch(ids, settings, step)
                for name, model in models.items():
                    model.train()
                    began = time.perf_counter()
                    qat._step(model, self.model, rows, settings)
                    steps[name].take(step / settings.steps)
                    times[name].append(time.perf_counter() - began)
        ratios = [a / b for a, b in zip(times["torchao"], times["phiquant"], strict=True)][2:]
        low, middle, high = statistics.quantiles(ratios, n=4)
        pq.convert(models["phiquant"])
        ours, theirs = (
            self.judge(f"int4-g32 {n}, {settings.steps} steps", m, sum(times[n])) for n, m in models.items()
        )
        rows, logits = self.judge.rows, pq.evaluate.model_logits
        paired = pq.evaluate.compare_logits(rows, *(logits(models[name], rows) for name in ("torchao", "phiquant")))
        ours.verdict = f"torchao loses {paired.nll_diff:.4f} +- {paired.nll_diff_se:.4f} more, paired"
        self.require(ours.kl < theirs.kl, ours, f"{ours.kl / theirs.kl:.3f} of torchao's KL (bar 1)")
        self.require(middle > 1, ours, f"torchao takes {middle:.3f}x ({low:.3f} to {high:.3f}) of a step (bar 1)")
        self.add(theirs)
        self.add(ours)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("all", "bars", "torchao", "variants"), default="all")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--windows", type=int, default=48, help="held-out windows of 512 tokens")
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--json", help="also write the figures to this file")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    bench = Bench(args)
    print(
        f"{machine()}\n{torch.get_num_threads()} thread(s); {args.steps} steps of {args.batch} x {args.window} tokens"
    )
    if args.what in ("all", "bars"):
        bench.bars(args.bits)
    if args.what in ("all", "torchao"):
        bench.torchao()
    if args.what in ("all", "variants"):
        bench.variants("int3-g32-sym", RATES[3])
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({"machine": machine(), "lines": [vars(line) for line in bench.lines]}, file, indent=2)
    sys.exit(0 if bench.ok else 1)


if __name__ == "__main__":
    main()
