"""The target that is nearest to a grid which a format cannot hold: what an error proposes."""

from __future__ import annotations

from ..elements import Float
from ..granularity import PerGroup
from ..quant_spec import QuantSpec
from . import TARGETS


def nearest(format: str, shape: tuple[int, ...], spec: QuantSpec) -> str:
    """Name of the target of `format` that fits `shape` and is closest to `spec`: in its kind, its bits, its groups.

    The float target "<format>:BF16" if none fits.
    """
    best: tuple[tuple[int, ...], str] | None = None
    for target in TARGETS.values():
        grid = target.spec
        if target.format != format or grid is None or target.activations is not None or len(shape) != 2:
            continue
        try:
            grid.scale_shape(shape)
        except ValueError:
            continue
        distance = (
            int(isinstance(grid.element, Float) != isinstance(spec.element, Float)),
            int(grid.element.bits < spec.element.bits),
            int(grid.symmetric != spec.symmetric),
            abs(grid.element.bits - spec.element.bits),
            abs(_group(grid, shape) - _group(spec, shape)),
        )
        if best is None or distance < best[0]:
            best = distance, target.name
    return best[1] if best else f"{format}:BF16"


def _group(spec: QuantSpec, shape: tuple[int, ...]) -> int:
    return spec.granularity.size if isinstance(spec.granularity, PerGroup) else shape[-1]
