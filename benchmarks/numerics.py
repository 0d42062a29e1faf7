"""Every bar of the numerics: data types, ranges, learned scales, clustering, integer arithmetic, compression.

    python benchmarks/numerics.py [--repeats 9] [--json] [--only kmeans,ranges]

One file per family in benchmarks/families; each also runs alone. Peers run in the same process, interleaved.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path

import torch
from common import machine, print_rows

FAMILIES = sorted(path.stem for path in (Path(__file__).parent / "families").glob("[a-z]*.py"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", type=lambda text: text.split(","), default=FAMILIES)
    args = parser.parse_args()
    if not args.json:
        print(machine())
    missed = 0
    report = {}
    for family in args.only:
        torch.set_num_threads(1)
        rows = importlib.import_module(f"families.{family}").rows(args.repeats)
        missed += sum(not row.ok for row in rows)
        report[family] = [row.as_dict() for row in rows]
        if not args.json:
            print(f"\n{family}")
            print_rows(rows)
    if args.json:
        print(json.dumps({"machine": machine(), "families": report}, indent=2))
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
