"""What runtimes are documented to compute otherwise than the model says (docs/long-context.md)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from ..formats.registry import Format
from ..models.rope import Rope, read_rope

Config = Mapping[str, Any]
# The config that the runtime computes with instead of the model's, and the sentence that says so.
Deviation = tuple[Config, str]


def find(format: Format, config: Config, told: Config, count: int) -> Deviation | None:
    """What the runtime of `format` does otherwise with a text of `count` tokens; None: nothing known.

    config: of the model; told: what the file says of it.
    """
    known = _DEVIATIONS.get(format.runtime)
    return known(config, told, count) if known else None


def factors_at(rope: Rope, count: int) -> str | None:
    """The set of LongRoPE's factors for a text of `count` tokens; None without LongRoPE."""
    return None if rope.long is None else "short" if count <= rope.original_context else "long"


def window_of(config: Config, rope: Rope) -> int | None:
    """The sliding window, unless it is none or so large that no text reaches it."""
    window = config.get("sliding_window") or 0
    return int(window) if 0 < window < rope.context else None


def short_throughout(model: Rope, file: Rope) -> bool:
    """Whether an MLX file has the short factors in the place of the long ones, as its writer can be asked to."""
    return model.long is not None and equal(model.short, file.short) and equal(model.short, file.long)


def equal(a: Any, b: Any) -> bool:
    """Equal as float32 would have it, number by number."""
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, int | float) and isinstance(b, int | float):
        return math.isclose(a, b, rel_tol=1e-6)
    return bool(a == b)


def _llama_cpp(config: Config, told: Config, count: int) -> Deviation | None:
    window = window_of(config, read_rope(config))
    if window is None or count <= window:
        return None
    return {**config, "sliding_window": None}, f"llama.cpp ignores the sliding window of {window} tokens"


def _mlx(config: Config, told: Config, count: int) -> Deviation | None:
    rope, changed, said = read_rope(config), dict(config), []
    if (window := window_of(config, rope)) and count > window:
        changed["sliding_window"] = None
        said.append(f"mlx-lm ignores the sliding window of {window} tokens")
    if rope.long:
        one = "short" if short_throughout(rope, read_rope(told)) else "long"
        if one != factors_at(rope, count):
            changed |= _one_set(config, rope.short if one == "short" else rope.long)
            said.append(f"mlx-lm uses one set of LongRoPE factors at every length, in this file the {one} ones")
    return (changed, "; ".join(said)) if said else None


def _qnn(config: Config, told: Config, count: int) -> Deviation | None:
    rope, context = read_rope(config), int(told.get("static_context", 0))
    if rope.long is None or count > rope.original_context or context <= rope.original_context:
        return None
    sentence = f"a QNN graph with a context of {context} tokens has LongRoPE's long factors at every length"
    return {**config, **_one_set(config, rope.long)}, sentence


def _one_set(config: Config, factors: list[float] | None) -> Config:
    """The part of the config that says the factors, with the same ones at every length."""
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    return {key: {**config[key], "short_factor": factors, "long_factor": factors}}


_DEVIATIONS: dict[str, Callable[[Config, Config, int], Deviation | None]] = {
    "llamacpp": _llama_cpp,
    "mlx": _mlx,
    "qnn": _qnn,
}
