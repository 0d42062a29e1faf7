"""Loads the compiled part, phiquant._C, and says in plain words why when that fails."""

from __future__ import annotations

import importlib
import importlib.util
import platform
import sys
from pathlib import Path
from types import ModuleType

import torch

OLDEST_TORCH = (2, 11)
EXTENSION = "phiquant._C"


def load() -> ModuleType:
    """phiquant._C, which registers torch.ops.phiquant. ImportError with the likely causes and both torch versions."""
    try:
        return importlib.import_module(EXTENSION)
    except ImportError as error:
        raise ImportError(explain(error)) from error


def explain(error: ImportError) -> str:
    """What to tell someone whose import of the extension failed with `error`."""
    origin = _origin()
    running = f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}"
    built = _built_with(origin)
    lines = [
        f"phiquant's compiled part ({EXTENSION}) could not be loaded: {error}",
        f"  running: {running} ({sys.executable})",
        f"  built:   {'not found beside the Python files' if origin is None else f'with torch {built}, {origin.name}'}",
        "Likely causes, likeliest first:",
    ]
    lines += [f"  - {cause}" for cause in _causes(str(error), origin)]
    return "\n".join(lines)


def _causes(message: str, origin: Path | None) -> list[str]:
    rebuild = "pip install --no-build-isolation --no-deps --force-reinstall ."
    if origin is None:
        return [
            f"it was never built for this Python: in the source tree run `{rebuild}` (with this Python's pip)",
            "Python found the source folder python/phiquant before the installed package: check PYTHONPATH",
        ]
    causes = []
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        causes.append(f"torch {torch.__version__} is too old: phiquant needs torch {oldest} or later")
    if "undefined symbol" in message or "symbol not found" in message.lower():
        causes.append(f"it was built with a newer torch than the one running: upgrade torch, or `{rebuild}`")
    if "GLIBC" in message:
        causes.append(f"it was built on a system with a newer C++ runtime: `{rebuild}` here")
    if "libtorch" in message or "libc10" in message:
        causes.append("torch was moved or only half installed: reinstall torch into this environment")
    causes.append(f"torch or Python changed since the build: `{rebuild}`")
    return causes


def _origin() -> Path | None:
    try:
        spec = importlib.util.find_spec(EXTENSION)
    except (ImportError, ValueError):
        return None
    return Path(spec.origin) if spec and spec.origin else None


def _built_with(origin: Path | None) -> str:
    """The torch version of the build, which the build writes to a file beside the extension."""
    note = origin.with_name("_built_with.txt") if origin else None
    return note.read_text(encoding="utf-8").strip() if note and note.is_file() else "of an unknown version"
