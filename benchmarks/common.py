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
    """One claim: how much faster `ours` is than `theirs` (medians), and whether results are equal.

    bar: the least ratio theirs / ours. "Within 1.5 times of copy_" is theirs = copy_, bar = 1 / 1.5.
    limit: the most seconds ours may take; "at least r values a second" is limit = values / r.
    """

    name: str
    theirs: list[float]
    ours: list[float]
    bar: float | None
    equal: bool | None = None
    limit: float | None = None

    @property
    def ratio(self) -> float:
        return statistics.median(self.theirs) / statistics.median(self.ours)

    @property
    def spread(self) -> tuple[float, float]:
        """Quartiles of the ratio within the rounds."""
        ratios = [a / b for a, b in zip(self.theirs, self.ours, strict=True)]
        if len(ratios) < 2:  # a peer that takes minutes is run once
            return ratios[0], ratios[0]
        quarter, _, three = statistics.quantiles(ratios, n=4)
        return quarter, three

    @property
    def ok(self) -> bool:
        within = self.limit is None or statistics.median(self.ours) <= self.limit
        return (self.bar is None or self.ratio >= self.bar) and within and self.equal is not False

    @property
    def wanted(self) -> str:
        wishes = [f"{self.bar:.2f}x"] if self.bar is not None else []
        return " ".join(wishes + ([f"<{1e3 * self.limit:.1f}ms"] if self.limit is not None else []))

    def as_dict(self) -> dict:
        return {
            "name": self.name,
            "theirs_ms": 1e3 * statistics.median(self.theirs),
            "ours_ms": 1e3 * statistics.median(self.ours),
            "ratio": self.ratio,
            "spread": self.spread,
            "bar": self.bar,
            "limit_ms": None if self.limit is None else 1e3 * self.limit,
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
    width = max(46, *(len(row.name) for row in rows))
    print(f"{'':{width}} {'theirs':>12} {'ours':>10} {'ratio':>8} {'quartiles':>16} {'bar':>8}  ")
    for row in rows:
        low, high = row.spread
        verdict = ("ok" if row.ok else "MISSED") if row.wanted else ""
        equal = {True: ", equal", False: ", NOT EQUAL", None: ""}[row.equal]
        theirs, ours = 1e3 * statistics.median(row.theirs), 1e3 * statistics.median(row.ours)
        print(
            f"{row.name:{width}} {theirs:10.3f}ms {ours:8.3f}ms "
            f"{row.ratio:7.2f}x {low:7.2f}..{high:7.2f} {row.wanted:>8}  {verdict}{equal}"
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
