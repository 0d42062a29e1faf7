"""python -m peers NAME CHECKPOINT OUT: one conversion; prints its seconds, imports left out, and peak memory."""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes; a mapped file's pages count."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024


def main() -> None:
    name, checkpoint, out = sys.argv[1:4]
    peer = importlib.import_module(f"peers.{name}")
    imports, before, began = peak_memory(), time.process_time(), time.perf_counter()
    peer.convert(checkpoint, out)
    seconds, cpu = time.perf_counter() - began, time.process_time() - before
    print(json.dumps({"seconds": seconds, "cpu": cpu, "peak": peak_memory(), "imports": imports}))


main()
