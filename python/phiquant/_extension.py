"""Loading of the C++ extension, with an error that names the likely causes when it fails."""

from __future__ import annotations

import importlib
from types import ModuleType


def load() -> ModuleType:
    """Import phiquant._C, which registers torch.ops.phiquant. ImportError says why it may have failed."""
    import torch  # first: the extension links against libraries that torch loads

    try:
        return importlib.import_module("phiquant._C")
    except ImportError as error:
        raise ImportError(_explain(error, torch.__version__)) from error


def _explain(error: ImportError, running: str) -> str:
    try:
        from ._build import TORCH_VERSION as built  # written by the build
    except ImportError:
        built = "unknown (no build record found: the extension was probably never built)"
    return (
        f"phiquant's C++ extension could not be loaded: {error}\n"
        f"torch running: {running}; torch it was built with: {built}. Likely causes:\n"
        "  1. The running torch is older than 2.11: pip install 'torch>=2.11'.\n"
        "  2. The extension was not built: pip install --no-build-isolation -e . in the project's folder.\n"
        "  3. It was built for another Python or another machine: reinstall phiquant."
    )
