"""Full-size dry runs: checkpoints of the shapes of Phi-3.5-mini and Phi-4-mini, planned, then quantized, disk to disk.

    python benchmarks/dry_run.py [--models phi-3.5-mini,phi-4-mini] [--solvers rtn,mse] [--folder DIR] [--json]
    python benchmarks/dry_run.py --calibrated smaller [--solvers gptq]      0.21 G parameters, solved on data
    python benchmarks/dry_run.py --calibrated wide      four layers of Phi-3.5-mini's own widths, 0.65 G parameters

Bars: each completes; peak memory <= 2 GiB (data-free); time and memory within 20 % of what plan() said. Each run is a
fresh process that plans and then quantizes, so that a busy machine slows both. The weights are random: 7.6 GB on
disk for each model, and the result 2.8 or 3.4 GB; both are removed. --checkpoints DIR keeps them for the next time.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import machine
from phiquant.testing import generate_checkpoint

MEMORY_BAR, WITHIN = 2 << 30, 0.2
SMALLER = {"hidden_size": 1280, "intermediate_size": 2560, "num_attention_heads": 20, "num_key_value_heads": 20}
SMALLER |= {"num_hidden_layers": 8, "rope_scaling": None, "sliding_window": None}
# Changes to Phi-3.5-mini's config, and windows: gptq wants two tokens for each of the inputs of down_proj.
CALIBRATED: dict[str, tuple[dict[str, Any], int]] = {"smaller": (SMALLER, 10), "wide": ({"num_hidden_layers": 4}, 32)}
WINDOW = 512
CHILD = """
import json, sys, time
from pathlib import Path
import torch
from phiquant import stream
checkpoint, out, target, solver, windows, window = sys.argv[1:]
options = {"solver": solver}
if int(windows):
    ids = torch.randint(0, 32000, (int(windows), int(window)), generator=torch.Generator().manual_seed(0))
    options |= {"calibration": ids, "offload": True}
began = time.perf_counter()
plan = stream.plan(checkpoint, target, place=Path(out).parent, **options)
planned = time.perf_counter()
try:
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    fresh = True
except OSError:
    fresh = False
start = time.perf_counter()
receipt = stream.quantize_checkpoint(checkpoint, target, out, **options)
print(json.dumps({"seconds": time.perf_counter() - start, "plan_seconds": planned - began, "peak_is_the_runs": fresh,
                  "peak": stream.peak_memory_here(), "plan": plan.to_dict(), "tensors": len(receipt["tensors"])}))
"""


def dry_run(checkpoint: Path, out: Path, target: str, solver: str, windows: int) -> dict[str, Any]:
    """Plan and quantize in a fresh process."""
    arguments = [sys.executable, "-c", CHILD, *map(str, (checkpoint, out, target, solver, windows, WINDOW))]
    done = subprocess.run(arguments, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def judged(name: str, solver: str, run: dict[str, Any], calibrated: bool) -> dict[str, Any]:
    time_off = run["plan"]["seconds"] / run["seconds"] - 1
    memory_off = run["plan"]["peak_memory"] / run["peak"] - 1
    small = calibrated or run["peak"] <= MEMORY_BAR
    ok = small and abs(time_off) <= WITHIN and abs(memory_off) <= WITHIN
    return {"model": name, "solver": solver, **run, "time_off": time_off, "memory_off": memory_off, "ok": ok}


def show(row: dict[str, Any]) -> None:
    mib, plan = 2**20, row["plan"]
    print(
        f"{row['model']:<22}{row['solver']:<8}{plan['parameters'] / 1e9:6.2f} G  "
        f"{row['seconds']:7.1f} s, plan {plan['seconds']:7.1f} s ({100 * row['time_off']:+.0f} %, took "
        f"{row['plan_seconds']:.1f} s)  {row['peak'] / mib:6.0f} MiB, plan {plan['peak_memory'] / mib:6.0f} MiB "
        f"({100 * row['memory_off']:+.0f} %)  {'ok' if row['ok'] else 'MISSED'}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    parser.add_argument("--models", default="phi-3.5-mini,phi-4-mini")
    parser.add_argument("--solvers")
    parser.add_argument("--target", default="gguf:Q4_0")
    parser.add_argument("--calibrated", choices=CALIBRATED)
    parser.add_argument("--folder", type=Path, help="where the temporary files go")
    parser.add_argument("--checkpoints", type=Path, help="where generated checkpoints are kept, and found")
    arguments = parser.parse_args()
    solvers = (arguments.solvers or ("gptq" if arguments.calibrated else "rtn,mse")).split(",")
    names = ["phi-3.5-mini"] if arguments.calibrated else arguments.models.split(",")
    changes, windows = CALIBRATED.get(arguments.calibrated, ({}, 0))
    rows = []
    if not arguments.json:
        print(machine())
    for name in names:
        with tempfile.TemporaryDirectory(prefix="phiquant-dry-run-", dir=arguments.folder) as place:
            kept = arguments.checkpoints or Path(place)
            checkpoint = kept / (f"{name}-{arguments.calibrated}" if arguments.calibrated else name)
            if not (checkpoint / "model.safetensors.index.json").exists():
                generate_checkpoint(name, checkpoint, **changes)
            for solver in solvers:
                out = Path(place) / solver
                run = dry_run(checkpoint, out, arguments.target, solver, windows)
                shutil.rmtree(out)
                rows.append(judged(checkpoint.name, solver, run, bool(arguments.calibrated)))
                if not arguments.json:
                    show(rows[-1])
    if arguments.json:
        print(json.dumps({"machine": machine(), "rows": rows}, indent=2))
    sys.exit(0 if all(row["ok"] for row in rows) else 1)


if __name__ == "__main__":
    main()
