"""Optional packages: imported where they are needed, with an error that says how to install them."""

from __future__ import annotations

import importlib
import re
from importlib import metadata
from types import ModuleType


def need(module: str, extra: str) -> ModuleType:
    """Import `module`, a part of the optional packages of `phiquant[extra]`.

    ImportError with the pip command when the package is absent. A package that is present but
    fails to import keeps its own error, which says more than ours could.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing != module.partition(".")[0]:
            raise
        raise ImportError(f"this needs the package {missing!r}: pip install 'phiquant[{extra}]'") from error


def packages(extra: str) -> list[str]:
    """The packages of `phiquant[extra]`, by the names that pip knows, without those that other extras of ours bring."""
    try:
        required = metadata.requires("phiquant") or []
    except metadata.PackageNotFoundError:  # used from its sources
        return []
    mine = (line for line in required if re.search(rf"""extra == ['"]{re.escape(extra)}['"]""", line))
    names = (re.match(r"[A-Za-z0-9._-]+", line) for line in mine)
    return [name[0] for name in names if name and name[0] != "phiquant"]


def missing(extra: str) -> list[str]:
    """Those packages of `phiquant[extra]` that are not installed."""
    return [name for name in packages(extra) if not _installed(name)]


def _installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True
