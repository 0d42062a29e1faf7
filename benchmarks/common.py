"""What the benchmarks share: interleaved timing, rows with a bar, the machine, a table or JSON."""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TypeVar

import torch

Key = TypeVar("Key", bound=Hashable)


def interleave(runs: dict[Key, Callable[[], object]], repeats: int) -> dict[Key, list[float]]:
    """Seconds of each run, `repeats` times, one after the other: load of the machine hits all alike."""
    times: dict[Key, list[float]] = {name: [] for name in runs}
    for i in range(repeats + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            result = run()
            elapsed = time.perf_counter() - began
            del result
            if i:  # the first round warms up
                times[name].append(elapsed)
    return times


@dataclass
class Row:
    """One claim: how much faster `ours` is than `theirs` (medians), and whether results are equal."""

    name: str
    theirs: list[float]
    ours: list[float]
    bar: float | None
    equal: bool | None = None

    @property
    def ratio(self) -> float:
        return statistics.median(self.theirs) / statistics.median(self.ours)

    @property
    def spread(self) -> tuple[float, float]:
        """Quartiles of the ratio within the rounds."""
        ratios = [a / b for a, b in zip(self.theirs, self.ours, strict=True)]
        quarter, _, three = statistics.quantiles(ratios, n=4)
        return quarter, three

    @property
    def ok(self) -> bool:
        return (self.bar is None or self.ratio >= self.bar) and self.equal is not False

    def as_dict(self) -> dict:
        return {
            "name": self.name,
            "theirs_ms": 1e3 * statistics.median(self.theirs),
            "ours_ms": 1e3 * statistics.median(self.ours),
            "ratio": self.ratio,
            "spread": self.spread,
            "bar": self.bar,
            "equal": self.equal,
            "ok": self.ok,
        }


def machine() -> str:
    """CPU, cores, versions, date: what a figure means nothing without."""
    cpu = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as info:
            cpu = next(line.split(":")[1].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    from phiquant import _C

    return (
        f"{cpu}, {torch.multiprocessing.cpu_count()} cores, level {_C.cpu_level()}, torch {torch.__version__}, "
        f"Python {platform.python_version()}, {datetime.date.today()}"
    )


def print_rows(rows: list[Row]) -> None:
    print(f"{'':46} {'theirs':>10} {'ours':>10} {'ratio':>7} {'quartiles':>13} {'bar':>6}  ")
    for row in rows:
        low, high = row.spread
        bar = f"{row.bar:.1f}x" if row.bar is not None else ""
        verdict = ("ok" if row.ok else "MISSED") if row.bar is not None else ""
        equal = {True: ", bit-equal", False: ", NOT EQUAL", None: ""}[row.equal]
        print(
            f"{row.name:46} {1e3 * statistics.median(row.theirs):8.3f}ms {1e3 * statistics.median(row.ours):8.3f}ms "
            f"{row.ratio:6.2f}x {low:5.2f}..{high:5.2f}  {bar:>6}  {verdict}{equal}"
        )


def main(doc: str | None, run: Callable[[int], list[Row]]) -> None:
    """Command line of a benchmark: prints the rows, exits 1 if one misses its bar."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = run(args.repeats)
    if args.json:
        print(json.dumps({"machine": machine(), "rows": [row.as_dict() for row in rows]}, indent=2))
    else:
        print(machine())
        print_rows(rows)
    sys.exit(0 if all(row.ok for row in rows) else 1)
