"""What quantization-aware training costs and what it gains.

    python benchmarks/qat.py step      # time of a training step: float, phiquant's QAT, torchao's QAT
    python benchmarks/qat.py gain      # 3-bit QAT of phi3-tiny against RTN, MSE and a float control
    python benchmarks/qat.py           # both

Bars. step, at 2048 tokens: QAT at most 1.10 times the float step, and below torchao's (measured if it
is installed: pip install --no-deps torchao). gain: mean KL to the float model at most 0.35 times RTN's
on the same grid in at most 3 minutes on 2 cores, and a perplexity no worse than that of RTN after a
float control trained as long. B = batch size, T = tokens in a window.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import phiquant as pq
import torch
from common import interleave, machine
from phiquant import qat

Step = Callable[[], None]
STEP_BAR = 1.10
KL_BAR = 0.35
SPECS = {"phiquant": "int4-g32-sym", "phiquant Q4_0": "gguf:Q4_0"}  # absmax, signed absmax with fp16 scales


def build(hidden: int, layers: int, vocab: int) -> Any:
    return pq.testing.random_phi3(
        hidden_size=hidden,
        intermediate_size=round(hidden * 8 / 3 / 256) * 256,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        vocab_size=vocab,
    ).train()


def prepare_torchao(model: Any) -> str | None:
    """Prepare every Linear of the layers for torchao's QAT. Returns why that is not possible, if so."""
    try:
        from torchao.quantization import quantize_
        from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig
    except ImportError as error:
        return f"torchao is not measured: {error} (pip install --no-deps torchao)"
    weight = IntxFakeQuantizeConfig(torch.int4, group_size=32, is_symmetric=True)
    chosen = lambda module, name: isinstance(module, torch.nn.Linear) and "layers." in name  # noqa: E731
    quantize_(model, QATConfig(weight_config=weight, step="prepare"), filter_fn=chosen)
    return None


def training_step(model: Any, rows: torch.Tensor, bfloat16: bool) -> Step:
    """Forward, backward and AdamW step on `rows` [B, T]."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16) if bfloat16 else nullcontext():
            loss = model(rows, labels=rows, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def spread(values: list[float]) -> tuple[float, float, float]:
    """Median and the quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return middle, low, high


def step_benchmark(args: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    base = build(args.hidden, args.layers, args.vocab)
    models = {"float": base}
    for name, spec in SPECS.items():
        models[name] = pq.prepare_qat(copy.deepcopy(base), spec)
    ao = copy.deepcopy(base)
    note = prepare_torchao(ao)
    if note is None:
        models["torchao"] = ao
    result: dict[str, Any] = {"threads": torch.get_num_threads(), "note": note, "rows": [], "ok": True}
    print(f"Phi3 hidden {args.hidden}, {args.layers} layers, int4 g32 weights, {torch.get_num_threads()} thread(s)")
    if note:
        print(note)
    for bfloat16 in (False, True):
        for tokens in args.tokens:
            rows = torch.randint(0, args.vocab, (max(1, tokens // 256), min(tokens, 256)))
            steps = {name: training_step(model, rows, bfloat16) for name, model in models.items()}
            times = interleave(steps, args.repeats)
            for name, seconds in times.items():
                median, low, high = spread(seconds)
                ratio = spread([a / b for a, b in zip(seconds, times["float"], strict=True)])
                kind = "bf16 autocast" if bfloat16 else "float32"
                row = {"what": name, "tokens": tokens, "dtype": kind, "ms": 1e3 * median, "ratio": ratio[0]}
                result["rows"].append(row)
                if name in SPECS and tokens >= 2048 and ratio[0] > STEP_BAR:
                    result["ok"] = False
                print(
                    f"  {kind:14} {tokens:5} tokens  {name:13} {1e3 * median:8.1f} ms ({1e3 * low:.1f} to "
                    f"{1e3 * high:.1f})  {ratio[0]:.3f} of float ({ratio[1]:.3f} to {ratio[2]:.3f})",
                    flush=True,
                )
    return result


def gain_benchmark(args: argparse.Namespace) -> dict[str, Any]:
    model, tokenizer = pq.load(args.model)
    text = pq.testing.heldout_text()
    settings = qat.Settings(steps=args.steps)
    spec = args.spec
    print(f"{spec}; {settings.steps} steps of {settings.batch} x {settings.window} tokens, seed {settings.seed}")

    def trained(what: Any, language_model: float = 0.0) -> tuple[Any, qat.Report]:
        other = copy.deepcopy(model)
        chosen = qat.Settings(steps=args.steps, language_model=language_model)
        return other, qat.train(other, tokenizer, what, settings=chosen)

    rows: dict[str, Any] = {}

    def show(name: str, other: Any, report: qat.Report | None = None) -> None:
        result = pq.evaluate.compare(other, model, tokenizer, text, limit=args.windows)
        rows[name] = {**result.to_dict(), "seconds": report.seconds if report else 0.0}
        print(
            f"  {name:32} KL {result.kl:.5f}  same top {100 * result.same_top:5.2f} %  perplexity "
            f"{result.perplexity:7.3f}  {report.seconds if report else 0:6.1f} s",
            flush=True,
        )

    show("float", model)
    for solver in ("rtn", "mse"):
        show(solver, pq.quantize(copy.deepcopy(model), spec, solver=solver))
    show("QAT", *trained(spec))
    control, report = trained(pq.Recipe(default="float"), language_model=1.0)
    show("float control (LM loss)", control, report)
    show("float control, then rtn", pq.quantize(control, spec))
    if not args.quick:
        show("QAT by LM loss", *trained(spec, language_model=1.0))
    ratio = rows["QAT"]["kl"] / rows["rtn"]["kl"]
    better = rows["float control, then rtn"]["perplexity"] - rows["QAT"]["perplexity"]
    ok = ratio <= KL_BAR and better >= 0
    print(
        f"KL of QAT / KL of RTN = {ratio:.3f} (bar {KL_BAR}); perplexity below control + RTN by {better:.3f} (bar 0): "
        f"{'ok' if ok else 'MISSED'}"
    )
    return {"spec": spec, "kl_ratio": ratio, "perplexity_margin": better, "rows": rows, "ok": ok}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--json", help="also write the figures to this file")
    parser.add_argument("what", nargs="?", choices=("all", "step", "gain"), default="all")
    step = parser.add_argument_group("step")
    step.add_argument("--hidden", type=int, default=1024)
    step.add_argument("--layers", type=int, default=4)
    step.add_argument("--vocab", type=int, default=4096)
    step.add_argument("--tokens", type=int, nargs="+", default=[512, 2048])
    step.add_argument("--repeats", type=int, default=9)
    gain = parser.add_argument_group("gain")
    gain.add_argument("--model", default="phi3-tiny")
    gain.add_argument("--spec", default="int3-g32-sym")
    gain.add_argument("--steps", type=int, default=qat.Settings().steps)
    gain.add_argument("--windows", type=int, help="evaluate on so many windows of 512 tokens; default: all")
    gain.add_argument("--quick", action="store_true", help="without the QAT by language-model loss")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    print(machine())
    result: dict[str, Any] = {"machine": machine()}
    if args.what in ("all", "step"):
        result["step"] = step_benchmark(args)
    if args.what in ("all", "gain"):
        result["gain"] = gain_benchmark(args)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=2)
    sys.exit(0 if all(part.get("ok", True) for part in result.values() if isinstance(part, dict)) else 1)


if __name__ == "__main__":
    main()
