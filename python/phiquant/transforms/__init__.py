"""Transforms: rewrites of the float model that leave its function alone and make it easier to quantize.

A file per transform. They act in place, before codes are chosen; what is exported is the rewritten model.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..calibrate import Calibration, token_windows
from ..errors import PhiquantError
from ..models import phi
from ..quant_spec import QuantSpec
from .awq import awq
from .fold import fold
from .rotate import rotate
from .smooth import smooth

# (model, windows of token ids [n, T] or None, the grid that each module will get, options) -> what receipts tell.
Transform = Callable[..., dict[str, Any]]

TRANSFORMS: dict[str, Transform] = {"fold": fold, "smooth": smooth, "awq": awq, "rotate": rotate}
NEEDS_DATA = frozenset({"awq", "smooth"})
WITH_TRANSFORMS = {"awq": (("awq",), "clip")}  # solvers of whole models: transforms, then what chooses the codes


def transform(
    model: nn.Module,
    names: str | Sequence[str],
    *,
    specs: Mapping[str, QuantSpec | None] | None = None,
    calibration: Calibration | None = None,
    tokenizer: Any = None,
) -> nn.Module:
    """Rewrite a float Phi-3 model in place by these transforms, one after the other; returns it.

    names: of TRANSFORMS, each alone or with options: "fold", "smooth:alpha=0.8".
    specs: the grid that each module will get, for transforms that look for what suits it.
    calibration: as for `quantize`; transforms that need data and are given none take testing.training_text().
    PhiquantError for an unknown name or option, before anything is changed.
    """
    chosen = [read(name) for name in ([names] if isinstance(names, str) else names)]
    if not isinstance(getattr(getattr(model, "model", None), "layers", None), nn.ModuleList):
        raise PhiquantError(f"transforms follow a {phi.ARCHITECTURE}; {type(model).__name__} has no model.layers")
    data: Tensor | None = None
    if any(name in NEEDS_DATA for name, _ in chosen):
        data = token_windows(calibration, tokenizer)
    for name, options in chosen:
        told = TRANSFORMS[name](model, data, specs or {}, **options)
        model.phiquant_transforms = [*applied(model), {"name": name, **options, **told}]  # type: ignore[assignment]
    return model


def applied(model: nn.Module) -> list[dict[str, Any]]:
    """The transforms that made this model, in order, for its receipt."""
    return getattr(model, "phiquant_transforms", [])


def read(text: str) -> tuple[str, dict[str, Any]]:
    """ "smooth:alpha=0.8" as ("smooth", {"alpha": 0.8}). PhiquantError for an unknown name or option."""
    name, _, rest = text.partition(":")
    if name not in TRANSFORMS:
        raise PhiquantError(f"unknown transform {name!r}; known transforms: {', '.join(TRANSFORMS)}")
    known = list(inspect.signature(TRANSFORMS[name]).parameters)[3:]
    options = {}
    for part in rest.split(",") if rest else ():
        key, equals, value = part.partition("=")
        if not equals or key not in known:
            raise PhiquantError(
                f"{part!r} is no option of the transform {name}; its options: {', '.join(known) or 'none'}"
            )
        try:
            options[key] = json.loads(value)
        except json.JSONDecodeError:
            options[key] = value
    return name, options
