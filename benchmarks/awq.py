"""AWQ, its clip search, and auto beside the plain solvers, on phi3-tiny and on its outlier twin.

    python benchmarks/awq.py [--windows 40] [--models phi3-tiny,twin] [--specs ...] [--methods ...] [--json]

loss: NLL per token above the float model's; KL: to the float model; means over held-out tokens with their standard
error. Calibration is on the training text. Bars: awq on the twin at int4 g32 loses <= 0.3x of what rtn loses; the KL of
auto is not above that of any other line by more than two standard errors of the paired difference.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from typing import Any

import phiquant as pq
import torch
from common import machine
from phiquant.auto import divergence
from phiquant.calibrate import token_windows

SPECS = ("int4-g32-sym", "uint4-g32-asym", "int3-g32-sym", "gguf:Q4_0", "gguf:Q4_K")
METHODS: dict[str, dict[str, Any]] = {
    "rtn": {"solver": "rtn"},
    "mse": {"solver": "mse"},
    "clip": {"solver": "clip"},
    "awq+mse": {"solver": "mse", "transforms": ["awq"]},
    "awq+clip": {"solver": "awq"},
    "awq+gptq": {"solver": "gptq", "transforms": ["awq"]},
    "gptq": {"solver": "gptq"},
    "gptq_mse": {"solver": "gptq_mse"},
    "auto": {"solver": "auto"},
}
LOSS_BAR = 0.3


@torch.no_grad()
def losses(model: Any, reference: Any, rows: torch.Tensor) -> torch.Tensor:
    """NLL above the reference's at every position but the first."""

    def nll(m: Any) -> torch.Tensor:
        logits = (m(row, use_cache=False).logits[0, :-1].log_softmax(1) for row in rows.split(1))
        return torch.cat([-l.gather(1, row[1:, None])[:, 0] for l, row in zip(logits, rows, strict=True)])  # noqa: E741

    return (nll(model) - nll(reference)).double()


def mean(values: torch.Tensor) -> tuple[float, float]:
    """And its standard error."""
    return float(values.mean()), float(values.std()) / math.sqrt(len(values))


def lines(label: str, reference: Any, spec: str, methods: list[str], rows: torch.Tensor, ids: torch.Tensor) -> Any:
    """A line per method, as soon as it is measured; auto is compared with those before it."""
    kls: dict[str, torch.Tensor] = {}
    base = None
    for method in methods:
        began = time.perf_counter()
        data = {} if method == "rtn" else {"calibration": ids}
        model = pq.quantize(copy.deepcopy(reference), spec, **METHODS[method], **data)
        seconds = time.perf_counter() - began
        kls[method], loss = divergence(model, reference, rows), losses(model, reference, rows)
        base = loss.mean() if base is None else base
        line = dict(zip(("loss", "loss_se", "kl", "kl_se"), (*mean(loss), *mean(kls[method])), strict=True))
        line |= {"model": label, "spec": spec, "method": method, "to_first": float(loss.mean() / base), "ok": True}
        if (label, spec, method) == ("twin", SPECS[0], "awq+clip"):
            line["ok"] = line["to_first"] <= LOSS_BAR
        if method == "auto":
            line["chosen"] = next(
                m.origin["auto"]["chosen"] for m in model.modules() if "auto" in getattr(m, "origin", ())
            )
            worst = [mean(kls["auto"] - kl) for name, kl in kls.items() if name != "auto"]
            line["ok"] = all(more <= 2 * error for more, error in worst)
        yield line | {"seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=40, help="held-out windows of 512 tokens")
    parser.add_argument("--calibration", type=int, default=64, help="calibration windows")
    parser.add_argument("--models", default="phi3-tiny,twin")
    parser.add_argument("--specs", default=",".join(SPECS))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    model, tokenizer = pq.load("phi3-tiny")
    ids = token_windows(None, tokenizer)[: args.calibration]
    rows = torch.tensor(pq.evaluate.windows(tokenizer, pq.testing.heldout_text(), limit=args.windows))
    models = {"phi3-tiny": model, "twin": pq.testing.outlier_twin(model)}
    found = []
    if not args.json:
        print(machine())
    for label in args.models.split(","):
        for spec in args.specs.split(","):
            for line in lines(label, models[label], spec, args.methods.split(","), rows, ids):
                found.append(line)
                if not args.json:
                    print(
                        "{model:9} {spec:14} {method:9} loss {loss:7.4f} +- {loss_se:.4f} ({to_first:.2f}x)  "
                        "KL {kl:.4f} +- {kl_se:.4f} {seconds:6.1f} s".format(**line),
                        line.get("chosen", ""),
                        "" if line["ok"] else "MISSED",
                        flush=True,
                    )
    if args.json:
        print(json.dumps({"machine": machine(), "table": found}, indent=2))
    sys.exit(0 if all(line["ok"] for line in found) else 1)


if __name__ == "__main__":
    main()
