"""python -m quality_peers TOOL [--windows 60] [--only NAME]: one JSON line for each of its methods and each model."""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import sys
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import torch
from quality import MODELS, Judge


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tool")
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    peer = importlib.import_module(f"quality_peers.{args.tool}")
    name = f"{peer.PACKAGE} {version(peer.PACKAGE)}"
    for judge in (Judge(model, args.windows) for model in MODELS):
        for method, make in peer.METHODS.items():
            if args.only in method:
                run(judge, name, method, make)


def run(judge: Judge, tool: str, method: str, make: Any) -> None:
    torch.manual_seed(0)
    try:
        made = judge.run(tool, method, lambda: make(copy.deepcopy(judge.model), judge.ids, judge.tokenizer))
        print(json.dumps(asdict(made)), flush=True)
    except Exception as error:  # a peer's failure is a finding, not the end
        print(f"{tool} {method}: {type(error).__name__}: {error}", file=sys.stderr)


main()
