"""Fuzz the Python readers: python tests/fuzz/readers/run.py [SUBJECT ...] [--seconds 30] [--seed 0] [--case N].

Each damaged folder must be read, or refused by a PhiquantError that names a file or a tensor of it: without another
exception, a crash, twenty seconds of silence, 1.5 GiB of memory, or a file opened outside the folder.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

SILENCE = 20.0  # seconds that one small folder may take: generous, for a machine that stalls is not a fault
START = 300.0  # seconds for imports and seeds
MOST = 20  # faults, after which a subject is given up
_HERE = Path(__file__).parent


@dataclass
class Outcome:
    """What became of the cases of one subject: how many were read and refused, and the faults."""

    verdicts: Counter[str] = field(default_factory=Counter)
    faults: dict[str, str] = field(default_factory=dict)

    def add(self, case: int, told: str, verdict: str) -> None:
        """Count a verdict; of faults of one kind the first is kept."""
        fine = verdict in ("read", "refused")
        self.verdicts[verdict if fine else "fault"] += 1
        if not fine:
            self.faults.setdefault(":".join(verdict.split(":")[:2])[:40], f"case {case} ({told}): {verdict}")


def fuzz(subject: str, seconds: float, seed: int = 0, first: int = 0, count: int = 1 << 30) -> Outcome:
    """Try damaged folders for `seconds` (or `count` of them, from case `first`). The same seed, the same cases."""
    outcome = Outcome()
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="phiquant-fuzz-", dir=place, ignore_cleanup_errors=True) as folder:
        while first is not None and outcome.verdicts["fault"] < MOST:
            done = sum(outcome.verdicts.values())
            first = _worker([subject, str(seed), str(first), str(seconds), str(count - done), folder], outcome)
    return outcome


def _worker(arguments: list[str], outcome: Outcome) -> int | None:
    """Run the cases in a process; the case to go on with if it died, None if it is through."""
    command = [sys.executable, str(_HERE / "worker.py"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_pump, args=(process, lines), daemon=True).start()
        case, told, wait = None, "", START
        while True:
            try:
                line = lines.get(timeout=wait)
            except queue.Empty:
                process.kill()
                line = None
                problem = f"no answer in {wait:g} s"
            else:
                problem = f"the process ended with {process.wait()}" if line is None else ""
            if line is None:
                break
            word, number, rest = [*line.split(" ", 2), ""][:3]
            if word == "begin":
                case, told, wait = int(number), rest.strip(), SILENCE
            elif word == "end":
                outcome.add(int(number), told, ast.literal_eval(rest))
                case, wait = None, START
        process.wait()
        if case is None:
            if process.returncode:
                log.seek(0)
                outcome.faults["start"] = f"{problem}: {log.read()[-2000:]}"
            return None
        outcome.add(case, told, problem)
        return case + 1


def _pump(process: subprocess.Popen, lines: queue.Queue) -> None:
    with contextlib.suppress(ValueError):
        for line in process.stdout or ():
            lines.put(line)
    lines.put(None)


def main() -> None:
    sys.path.insert(0, str(_HERE))
    from subjects import subjects

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subjects", nargs="*", choices=[*subjects(), []], metavar="SUBJECT")
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="only this one")
    arguments = parser.parse_args()
    faulty = False
    for name in arguments.subjects or subjects():
        only = {} if arguments.case is None else {"first": arguments.case, "count": 1}
        outcome = fuzz(name, arguments.seconds, arguments.seed, **only)
        counts = ", ".join(f"{n} {verdict}" for verdict, n in sorted(outcome.verdicts.items()))
        print(f"fuzz: reader {name}: {counts}", *map(ascii, outcome.faults.values()), sep="\n  ", flush=True)
        faulty |= bool(outcome.faults)
    sys.exit(1 if faulty else 0)


if __name__ == "__main__":
    main()
