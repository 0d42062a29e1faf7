"""Searching the range of least squared error against plain min-max ranges, int4 g32, 3072 x 8192 fp32.

    python benchmarks/families/search.py [--repeats 9] [--json]

Bars, 1 thread: the grid of 20 ranges <= 8 times min-max, the exact optimum <= 40 times; both for the search of ranges
alone, and for the solvers (ranges and codes: "mse" and "mse_exact" against "rtn"). "equal" stands for the
theorem on this tensor: exact <= grid <= min-max in squared error, in every one of its 786 432 groups.
2 threads >= 1.5x.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import Row, interleave, main
from phiquant import ops, quantize_tensor

ROWS, COLS, GROUP = 3072, 8192, 32
SHAPE = (ROWS, COLS // GROUP)
INT4 = {"qmin": -8, "qmax": 7}
UINT4 = {"qmin": 0, "qmax": 15}


def errors(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    y = ops.fake_quantize(x, scale, **INT4)
    return (y.double() - x.double()).square_().view(-1, GROUP).sum(1)


def rows(repeats: int) -> list[Row]:
    x = torch.randn(ROWS, COLS, generator=torch.Generator().manual_seed(0))
    absmax = {**INT4, "rule": "absmax"}
    signed = {**INT4, "rule": "signed_absmax", "scale_dtype": torch.float16}
    shifted = {**UINT4, "rule": "zero_point"}
    runs: dict[str, Callable[[], object]] = {"min-max": lambda: ops.choose_range(x, SHAPE, **absmax)}
    for name, grid in (("int4 sym", absmax), ("Q4_0, both signs", signed), ("uint4 asym", shifted)):
        runs[f"{name}: grid"] = lambda grid=grid: ops.search_range(x, SHAPE, **grid)
        if name != "uint4 asym":
            runs[f"{name}: exact"] = lambda grid=grid: ops.search_range(x, SHAPE, **grid, exact=True)
    half = x.bfloat16()
    runs["int4 sym, bf16: grid"] = lambda: ops.search_range(half, SHAPE, **absmax)
    repeats = max(2, repeats // 3)
    times = interleave(runs, repeats)
    solvers = interleave(
        {name: lambda name=name: quantize_tensor(x, "int4-g32-sym", name) for name in ("rtn", "mse", "mse_exact")},
        repeats,
    )

    plain, _, _ = ops.choose_range(x, SHAPE, **absmax)
    grid, _, _ = ops.search_range(x, SHAPE, **absmax)
    exact, _, _ = ops.search_range(x, SHAPE, **absmax, exact=True)
    never_worse = bool((errors(x, exact) <= errors(x, grid)).all() and (errors(x, grid) <= errors(x, plain)).all())
    bars = {"int4 sym: grid": 1 / 8, "int4 sym: exact": 1 / 40}
    table = [
        Row(
            f"{name}: {statistics.median(taken) / statistics.median(times['min-max']):.1f} times min-max",
            times["min-max"],
            taken,
            bars.get(name),
            never_worse if name in bars else None,
        )
        for name, taken in times.items()
        if name != "min-max"
    ]
    for name, most in (("mse", 8), ("mse_exact", 40)):
        ratio = statistics.median(solvers[name]) / statistics.median(solvers["rtn"])
        table.append(Row(f"solver {name}: {ratio:.1f} times rtn", solvers["rtn"], solvers[name], 1 / most))

    def with_threads(n: int, exact: bool) -> Callable[[], object]:
        def run() -> object:
            torch.set_num_threads(n)
            return ops.search_range(x, SHAPE, **absmax, exact=exact)

        return run

    for exactly in (False, True):
        both = interleave({n: with_threads(n, exactly) for n in (1, 2)}, repeats)
        table.append(Row(f"int4 sym: {'exact' if exactly else 'grid'}, 2 threads / 1", both[1], both[2], 1.5))
    torch.set_num_threads(1)
    return table


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(__doc__, rows)
