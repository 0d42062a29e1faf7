"""Reads damaged folders, one after the other, in a process that is not trusted to survive. Run by run.py.

    python worker.py SUBJECT SEED FIRST SECONDS COUNT FOLDER

Prints "begin N" and "end N VERDICT" for each case N: "read", "refused", or what is wrong.
"""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import struct
import sys
import time
import traceback
import warnings
from pathlib import Path
from random import Random

MEMORY = 1536 << 20  # what reading a small file may take beyond the imports


class Watch:
    """Which files outside the folder are opened: those beside it by the kernel's word, others by Python's."""

    def __init__(self, inside: Path, outside: Path) -> None:
        self.opened: list[str] = []
        self._inside, self._active = f"{inside}/", False
        self._allowed = tuple({sys.prefix, sys.base_prefix, *filter(None, sys.path), "/proc", "/sys", "/dev/urandom"})
        libc = ctypes.CDLL(None, use_errno=True)
        self._notify = libc.inotify_init1(os.O_NONBLOCK) if hasattr(libc, "inotify_init1") else -1  # Linux
        if self._notify >= 0:
            libc.inotify_add_watch(self._notify, os.fsencode(outside), 0x20)  # IN_OPEN
        sys.addaudithook(self._audit)

    def __enter__(self) -> Watch:
        self._escaped()
        self.opened, self._active = [], True
        return self

    def __exit__(self, *error: object) -> None:
        self._active = False
        self.opened += self._escaped()

    def _audit(self, event: str, arguments: tuple) -> None:
        if self._active and event == "open" and isinstance(arguments[0], str | bytes):
            path = os.path.abspath(os.fsdecode(arguments[0]))
            if not path.startswith(self._inside) and not path.startswith(self._allowed) and f"{path}/" != self._inside:
                self.opened.append(path)

    def _escaped(self) -> list[str]:
        found = []
        while self._notify >= 0:
            try:
                data = os.read(self._notify, 1 << 16)
            except BlockingIOError:
                break
            while data:
                length = struct.unpack_from("<I", data, 12)[0]
                if length:  # 0: the folder itself, which os.path.exists() and the like do not open
                    found.append(data[16 : 16 + length].rstrip(b"\0").decode())
                data = data[16 + length :]
        return found


def place(folder: Path, files: dict[str, bytes]) -> None:
    """Make `folder` hold these files and nothing else."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def odd(folder: Path, files: dict[str, bytes], rng: Random) -> str:
    """In one of twelve cases a file becomes something that is no file, or is missing."""
    if rng.randrange(12):
        return ""
    path = folder / rng.choice(sorted(files))
    path.unlink()
    kind = rng.choice(("missing", "a folder", "a pipe", "a link to itself", "a link to nowhere", "a device"))
    if kind == "a folder":
        path.mkdir()
    elif kind == "a pipe":
        os.mkfifo(path)
    elif kind != "missing":
        path.symlink_to({"a link to itself": path.name, "a device": "/dev/zero"}.get(kind, "nowhere"))
    return f", {path.name} is {kind}"


def main() -> None:
    import torch
    from mutate import damage
    from phiquant import PhiquantError
    from subjects import subjects

    name, seed, first, seconds, count, at = sys.argv[1], *map(int, sys.argv[2:4]), float(sys.argv[4]), *sys.argv[5:7]
    folder, outside = Path(at) / "folder", Path(at) / "outside"
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    subject = subjects()[name]
    seeds = subject.seeds()
    for files in seeds:  # a valid one is read: imports are done, and the seeds are what they should be
        place(folder, files)
        subject.read(folder)
    place(outside, {name: data for files in seeds for name, data in files.items()})
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    watch = Watch(folder, outside)
    end = time.monotonic() + seconds
    for case in range(first, first + int(count)):
        if time.monotonic() > end:
            break
        rng = Random(f"{seed} {name} {case}")
        files, told = damage(rng.choice(seeds), rng, outside)
        place(folder, files)
        told += odd(folder, files, rng)
        print(f"begin {case} {told}", flush=True)
        verdict = "read"
        try:
            with watch:
                subject.read(folder)
        except PhiquantError as error:
            known = (*files, "model.", "lm_head", str(folder))
            verdict = "refused" if any(word in str(error) for word in known) else f"names no file: {error}"
            if "\ud800" in str(error):
                verdict = f"a message that cannot be printed: {error}"
        except BaseException as error:  # a panic of Rust is no Exception
            where = traceback.extract_tb(error.__traceback__)[-1]
            verdict = f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}: {error}"
        if watch.opened:
            verdict = f"opened outside its folder: {watch.opened[0]}"
        print(f"end {case} {verdict[:300]!a}", flush=True)


if __name__ == "__main__":
    main()
