"""Export time and memory against each runtime's own converter, from one checkpoint of 1.0 G parameters.

    python benchmarks/export.py [--repeats 3] [--formats gguf mlx ...] [--python PEER=PATH ...] [--folder DIR]

bf16, sharded, Phi-3's shape. Ours is quantize_checkpoint(): digests, fsync and the reading back of every code included,
which no peer does. Every run is a fresh process, ours and theirs in turn, page cache warm; imports are not counted.
Bars: at least 3 times faster, peak memory at most 1.5 GiB. optimum-intel and llm-compressor pin other versions of
transformers: --python optimum=/path/to/venv/bin/python runs them in an environment of their own; a peer that does not
start is skipped with the reason. Needs 5 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import Row, machine, print_rows
from phiquant.testing import generate_checkpoint
from stream import SIZES

SPEED, MEMORY = 3.0, 3 << 29
# format -> (our target, the peer in peers/)
PAIRS = {
    "gguf": ("gguf:Q4_0", "gguf_py"),
    "onnx": ("onnx:int4-g32", "genai"),
    "openvino": ("openvino:i4-g64", "optimum"),
    "mlx": ("mlx:4bit-g64", "mlx_lm"),
    "safetensors": ("safetensors:int4-g32", "llmcompressor"),
}
MINUTES = {"optimum"}  # run once
OURS = """
import json, sys, time
from phiquant import stream
imports, before, began = stream.peak_memory_here(), time.process_time(), time.perf_counter()
stream.quantize_checkpoint(sys.argv[1], sys.argv[3], sys.argv[2])
print(json.dumps({"seconds": time.perf_counter() - began, "cpu": time.process_time() - before,
                  "peak": stream.peak_memory_here(), "imports": imports}))
"""


def run(command: list[str], out: Path) -> dict[str, Any] | str:
    """What a fresh process measured of itself, or the last line of its complaint."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parent)
    for path in (out, Path(f"{out}.cache")):
        shutil.rmtree(path, ignore_errors=True)
    if done.returncode:
        return next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no reason")[:200]
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measure(checkpoint: Path, out: Path, format: str, repeats: int, python: str) -> dict[str, Any]:
    """The runs of ours and of its peer, in turn. A peer that fails is named in "skipped"."""
    target, peer = PAIRS[format]
    ours_command = [sys.executable, "-c", OURS, str(checkpoint), str(out), target]
    found: dict[str, Any] = {"format": format, "target": target, "peer": peer, "ours": [], "theirs": []}
    for index in range(repeats):
        ours = run(ours_command, out)
        if isinstance(ours, str):
            raise SystemExit(f"{target}: {ours}")
        found["ours"].append(ours)
        if "skipped" in found or (index and peer in MINUTES):
            continue
        theirs = run([python, "-m", "peers", peer, str(checkpoint), str(out)], out)
        if isinstance(theirs, str):
            found["skipped"] = theirs
        else:
            found["theirs"].append(theirs)
    found["peak"] = max(each["peak"] for each in found["ours"])
    found["peer_peak"] = max((each["peak"] for each in found["theirs"]), default=None)
    return found


def row(found: dict[str, Any]) -> Row:
    ours, theirs = ([each["seconds"] for each in found[side]] for side in ("ours", "theirs"))
    count = min(len(ours), len(theirs))  # a peer of minutes ran once: beside the first of ours
    return Row(f"{found['target']} / {found['peer']}", theirs, ours[:count] if count == 1 else ours, SPEED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--formats", nargs="+", choices=PAIRS, default=list(PAIRS))
    parser.add_argument("--python", nargs="+", default=[], metavar="PEER=PATH")
    parser.add_argument("--checkpoint", type=Path, help="use this one instead of making one")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--folder", type=Path, help="where the temporary files go")
    arguments = parser.parse_args()
    interpreters = dict(pair.split("=", 1) for pair in arguments.python)
    results = []
    with tempfile.TemporaryDirectory(prefix="phiquant-export-", dir=arguments.folder) as place:
        checkpoint = arguments.checkpoint
        if checkpoint is None:
            checkpoint = Path(place) / "checkpoint"
            generate_checkpoint("phi-3-mini", checkpoint, **SIZES, num_hidden_layers=17)
        print(machine(), flush=True)
        for format in arguments.formats:
            python = interpreters.get(PAIRS[format][1], sys.executable)
            results.append(measure(checkpoint, Path(place) / "out", format, arguments.repeats, python))
    raced = [found for found in results if found["theirs"]]
    if raced:
        print_rows([row(found) for found in raced])
    ok = all(row(found).ok for found in raced) and all(found["peak"] <= MEMORY for found in results)
    for found in results:
        verdict = "ok" if found["peak"] <= MEMORY else "MISSED"
        theirs = "" if found["peer_peak"] is None else f"; {found['peer']} {found['peer_peak'] >> 20:,} MiB"
        cpu = [f"{min(each['cpu'] for each in found[side]):.1f}" for side in ("ours", "theirs") if found[side]]
        theirs += f"; CPU seconds {' against '.join(cpu)}"
        print(f"{found['target']}: peak {found['peak'] >> 20:,} MiB of {MEMORY >> 20:,}  {verdict}{theirs}")
        if "skipped" in found:
            print(f"  {found['peer']} did not run: {found['skipped']}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine(), "results": results}, indent=2) + "\n")
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main()
