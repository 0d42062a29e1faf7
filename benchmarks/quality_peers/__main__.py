"""python -m quality_peers TOOL [--windows 60] [--only NAME]: one JSON line for each of its methods and each model."""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import sys
from dataclasses import asdict
from importlib.metadata import version

import torch
from quality import MODELS, Judge


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tool")
    parser.add_argument("--windows", type=int, default=60)
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    peer = importlib.import_module(f"quality_peers.{args.tool}")
    name = f"{peer.PACKAGE} {version(peer.PACKAGE)}"
    for model in MODELS:
        judge = Judge(model, args.windows)
        for method, make in peer.METHODS.items():
            if args.only not in method:
                continue
            torch.manual_seed(0)
            try:
                found = judge.run(name, method, lambda m=make: m(copy.deepcopy(judge.model), judge.ids, judge.tokenizer))
            except Exception as error:  # a peer's failure is a finding, not the end
                print(f"{name} {method}: {type(error).__name__}: {error}", file=sys.stderr)
                continue
            print(json.dumps(asdict(found)), flush=True)


main()
