"""Disk to disk: a Phi-3-shaped checkpoint of 1.0 G parameters (bf16, sharded) to GGUF Q4_0.

    python benchmarks/stream.py [--json] [--target gguf:Q4_0] [--layers 17] [--folder DIR]

Bars: peak memory of a fresh process <= 1 GiB; quantize-and-pack >= 4 times gguf-py's Q4_0 quantizer,
one thread each, the two interleaved in one process. The checkpoint is random; it takes 2 GB of disk
and the result about 0.7 GB, both removed at the end.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from phiquant.testing import generate_checkpoint

MEMORY_BAR, SPEED_BAR = 1 << 30, 4.0
SIZES = {"hidden_size": 2048, "intermediate_size": 5632, "sliding_window": None}  # 17 layers: 1.0 G parameters
CHILD = """
import json, sys, time
import torch
torch.set_num_threads(int(sys.argv[4]))
from phiquant import stream
before, began = stream.peak_memory_here(), time.perf_counter()
plan = stream.plan(sys.argv[1], sys.argv[3])
planned = time.perf_counter()
receipt = stream.quantize_checkpoint(sys.argv[1], sys.argv[3], sys.argv[2])
done = time.perf_counter()
print(json.dumps({"seconds": done - planned, "plan_seconds": planned - began, "peak": stream.peak_memory_here(),
                  "imports": before, "plan": plan.to_dict(), "tensors": len(receipt["tensors"])}))
"""


def stream_once(folder: Path, out: Path, target: str, threads: int) -> dict[str, Any]:
    """quantize_checkpoint in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder), str(out), target, str(threads)], capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def race(rounds: int) -> dict[str, Any]:
    """Quantize and pack 3072 x 8192 fp32 to Q4_0, ours and gguf-py's, interleaved, one thread."""
    import gguf
    from phiquant import TARGETS, quantize_tensor
    from phiquant.formats.gguf.pack import pack
    from phiquant.formats.gguf.types import TYPES
    from phiquant.formats.source import Entry, row_slices

    torch.set_num_threads(1)
    w = torch.empty(3072, 8192).normal_(0, 0.02, generator=torch.Generator().manual_seed(1))
    spec = TARGETS["gguf:Q4_0"].spec
    assert spec is not None
    slices = list(row_slices(Entry("w", tuple(w.shape), spec)))  # the pieces that a writer asks for

    def pieces() -> Iterator[np.ndarray]:
        return (pack("w", quantize_tensor(w[rows], spec), TYPES["Q4_0"]) for rows in slices)

    ours: Callable[[], Any] = lambda: sum(len(piece) for piece in pieces())  # noqa: E731
    theirs: Callable[[], Any] = lambda: gguf.quants.quantize(w.numpy(), gguf.GGMLQuantizationType.Q4_0)  # noqa: E731
    same = np.concatenate(list(pieces())).reshape(-1, 18) == np.asarray(theirs()).reshape(-1, 18)
    times: dict[str, list[float]] = {"ours": [], "gguf-py": []}
    for _ in range(rounds):
        for name, run in (("ours", ours), ("gguf-py", theirs)):
            began = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "values": w.numel(),
        "ours_ms": 1e3 * medians["ours"],
        "ours_spread_ms": [1e3 * min(times["ours"]), 1e3 * max(times["ours"])],
        "gguf_py_ms": 1e3 * medians["gguf-py"],
        "gguf_py_spread_ms": [1e3 * min(times["gguf-py"]), 1e3 * max(times["gguf-py"])],
        "ratio": medians["gguf-py"] / medians["ours"],
        "identical_blocks": float(same.all(axis=1).mean()),
    }


def show(result: dict[str, Any]) -> None:
    raced, run, plan = result["race"], result["stream"], result["stream"]["plan"]
    mib = 2**20
    print(f"{raced['values'] / 1e6:.1f} M values to Q4_0, 1 thread: median (least, most), {result['rounds']} rounds")
    for name, key in (("phiquant", "ours"), ("gguf-py", "gguf_py")):
        low, high = raced[f"{key}_spread_ms"]
        print(f"  {name:<12}{raced[f'{key}_ms']:8.1f} ms  ({low:.1f}, {high:.1f})")
    print(f"  ratio       {raced['ratio']:8.2f}     bar {SPEED_BAR:g}")
    print(f"  blocks with the same bytes: {100 * raced['identical_blocks']:.2f} %")
    count = result["parameters"] / 1e9
    print(f"{count:.3f} G parameters to {result['target']} in a new process, threads: {result['threads']}")
    print(
        f"  peak memory {run['peak'] / mib:8.0f} MiB   bar {MEMORY_BAR / mib:.0f}; imports {run['imports'] / mib:.0f}"
    )
    print(f"  time        {run['seconds']:8.1f} s     read, quantize, write, sync, read back and compare every code")
    bits = 8 * result["bytes"] / result["parameters"]
    print(f"  size        {result['bytes'] / 1e6:8.1f} MB    {bits:.2f} bits per weight")
    print(f"  plan said   {plan['bytes'] / 1e6:8.1f} MB, {plan['peak_memory'] / mib:.0f} MiB, {plan['seconds']:.1f} s")
    print("all bars met" if result["ok"] else "A BAR IS MISSED")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--target", default="gguf:Q4_0")
    parser.add_argument("--layers", type=int, default=17, help="17 layers make 1.0 G parameters")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--folder", type=Path, help="where the temporary files go")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="phiquant-stream-", dir=arguments.folder) as place:
        checkpoint, out = Path(place) / "checkpoint", Path(place) / "out"
        parameters = generate_checkpoint("phi-3-mini", checkpoint, **SIZES, num_hidden_layers=arguments.layers)
        run = stream_once(checkpoint, out, arguments.target, arguments.threads)
        size = sum(path.stat().st_size for path in out.iterdir())
    raced = race(arguments.rounds)
    result = {
        "target": arguments.target,
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "parameters": parameters,
        "bytes": size,
        "stream": run,
        "race": raced,
        "ok": run["peak"] <= MEMORY_BAR and raced["ratio"] >= SPEED_BAR,
    }
    if arguments.json:
        print(json.dumps(result))
    else:
        show(result)


if __name__ == "__main__":
    main()
