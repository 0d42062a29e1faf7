"""Range estimation against torch and the course's numpy: the same answers, and how much sooner.

    python benchmarks/families/ranges.py [--repeats 15] [--json]

Bars (1 thread unless said): per-channel min-max against torch.aminmax(dim=1), 3072 x 8192: >= 3x. Histogram observers
against torch.ao's, 6 M values, a first batch and its threshold: >= 4x, TorchHistogramObserver with the same threshold.
KL threshold of 2048 bins: < 5 ms, and >= 50x the notebook's steps in numpy. 2 threads against 1: >= 1.5x.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from phiquant import HistogramObserver, PercentileObserver, TorchHistogramObserver, ops
from torch.ao.quantization import HistogramObserver as TorchAo

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2] / "tests/python"))
import ranges_reference as reference
from common import Row, interleave, main

SPEC = "uint8-tensor-asym"


def with_threads(n: int, run: Callable[[], object]) -> Callable[[], object]:
    def timed() -> object:
        torch.set_num_threads(n)
        return run()

    return timed


def two_threads(name: str, run: Callable[[], object], repeats: int) -> Row:
    times = interleave({n: with_threads(n, run) for n in (1, 2)}, repeats)
    torch.set_num_threads(1)
    return Row(f"{name}: 2 threads against 1", times[1], times[2], 1.5)


def min_max(repeats: int) -> list[Row]:
    x = torch.randn(3072, 8192, generator=torch.Generator().manual_seed(0))
    rows = []
    for dtype, bar in ((torch.float32, 3.0), (torch.bfloat16, None)):
        w = x.to(dtype)
        theirs, ours = w.aminmax(dim=1), ops.min_max(w, (3072, 1))
        equal = all(torch.equal(a.float(), b.flatten()) for a, b in zip(theirs, ours, strict=True))
        runs = {"theirs": lambda w=w: w.aminmax(dim=1), "ours": lambda w=w: ops.min_max(w, (3072, 1))}
        times = interleave(runs, repeats)
        name = f"min-max per channel, 3072x8192 {str(dtype).removeprefix('torch.')}"
        rows.append(Row(name, times["theirs"], times["ours"], bar, equal))
    cached = x[
        :1024, :3072
    ].contiguous()  # in the cache; the 100 MB of x are read at the speed of memory, which cores share
    rows.append(two_threads("min-max per channel, 1024x3072", lambda: ops.min_max(cached, (1024, 1)), 5 * repeats))
    times = interleave({n: with_threads(n, lambda: ops.min_max(x, (3072, 1))) for n in (1, 2)}, repeats)
    torch.set_num_threads(1)
    return [*rows, Row("min-max per channel, 3072x8192: 2 threads against 1", times[1], times[2], None)]


def observe(make: Callable[[], torch.nn.Module], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    observer = make()
    observer(x)
    return observer._non_linear_param_search() if isinstance(observer, TorchAo) else observer.range()


def histograms(repeats: int) -> list[Row]:
    x = torch.randn(6_000_000, generator=torch.Generator().manual_seed(0))
    strided = torch.randn(2_000_000, 4, generator=torch.Generator().manual_seed(0))[:, :3]
    makes: dict[str, Callable[[], torch.nn.Module]] = {
        "torch.ao": TorchAo,
        "TorchHistogramObserver": lambda: TorchHistogramObserver(SPEC),
        "HistogramObserver": lambda: HistogramObserver(SPEC),
        "PercentileObserver": lambda: PercentileObserver(SPEC),
    }
    rows = []
    for label, values in (("6 M fp32", x), ("6 M bf16", x.bfloat16()), ("6 M of every 4th left out", strided)):
        wide = values.float() if label == "6 M bf16" else values  # torch.ao counts bf16 in bf16
        runs = {
            name: lambda make=make, v=wide if name == "torch.ao" else values: observe(make, v)
            for name, make in makes.items()
        }
        times = interleave(runs, repeats)
        for name in list(makes)[1:]:
            same = None
            if name == "TorchHistogramObserver":
                same = all(
                    map(torch.equal, (t.reshape(1) for t in observe(TorchAo, wide)), observe(makes[name], values))
                )
            bar = 4.0 if "fp32" in label and name != "PercentileObserver" else None
            rows.append(Row(f"{name}, {label}, with range", times["torch.ao"], times[name], bar, same))
    for name in ("TorchHistogramObserver", "HistogramObserver"):
        rows.append(two_threads(name, lambda make=makes[name]: observe(make, x), repeats))
    exact = interleave(
        {"kthvalue": lambda: x.abs().kthvalue(5_994_000), "ours": lambda: ops.percentile(x, (1,), 0.999, True)}, repeats
    )
    return [*rows, Row("exact percentile of 6 M |x|, against kthvalue", exact["kthvalue"], exact["ours"], None)]


def kl(repeats: int) -> list[Row]:
    counts = np.histogram(reference.course_samples(0), bins=2048)[0]
    ours = torch.from_numpy(counts)
    numpy_takes_seconds = interleave({"numpy": lambda: reference.kl_notebook(counts, 128)}, 1)["numpy"]
    rows = []
    for form, oracle in (("notebook", reference.kl_notebook), ("tensorrt", reference.kl_tensorrt)):
        times = interleave({form: lambda form=form: ops.kl_threshold(ours, 128, form)}, repeats)[form]
        equal = int(ops.kl_threshold(ours, 128, form)) == oracle(counts, 128).argmin()
        theirs = numpy_takes_seconds * len(times)
        rows.append(Row(f"KL threshold, 2048 bins, {form} form", theirs, times, 50.0, equal, limit=5e-3))
        rows.append(
            two_threads(f"KL threshold, {form} form", lambda form=form: ops.kl_threshold(ours, 128, form), repeats)
        )
    return rows


def rows(repeats: int) -> list[Row]:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    return min_max(repeats) + histograms(repeats) + kl(repeats)


if __name__ == "__main__":
    main(__doc__, rows)
