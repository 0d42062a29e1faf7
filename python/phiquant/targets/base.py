"""What a target is: a named grid of a deployment format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..quant_spec import FloatName, QuantSpec


@dataclass(frozen=True)
class Target:
    """A named grid of a deployment format: "<format>:<grid>".

    spec: the grid; None where weights stay float, in `float_dtype`.
    activations: the grid on which the runtime rounds activations by the file's own word; None: it computes with floats.
    note: a limit that a user should know, in one sentence.
    mixture: of a target with several grids: config.json -> the spec of each module by its name; `spec` is None.
    asks: options of the format's writer by which this target is told from others of the same grid.
    bits: stored per weight, where the container packs codes tighter than by their own bits.
    """

    name: str
    spec: QuantSpec | None
    float_dtype: FloatName = "bfloat16"
    activations: QuantSpec | None = None
    note: str = ""
    mixture: Callable[[Mapping[str, Any]], dict[str, QuantSpec]] | None = None
    asks: tuple[tuple[str, Any], ...] = ()
    bits: float | None = None

    @property
    def format(self) -> str:
        return self.name.partition(":")[0]

    @property
    def options(self) -> dict[str, Any]:
        """What it asks of its format's writer beside the grid of the weights."""
        return dict(self.asks) | ({} if self.activations is None else {"activations": self.activations})


def floats(format: str) -> tuple[Target, ...]:
    """The targets of a format that store weights as F32, F16 and BF16."""
    return (
        Target(f"{format}:F32", None, "float32"),
        Target(f"{format}:F16", None, "float16"),
        Target(f"{format}:BF16", None, "bfloat16"),
    )
