"""Optional packages: imported where they are needed, with an error that says how to install them."""

from __future__ import annotations

import importlib
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
