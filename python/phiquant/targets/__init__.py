"""The registry of targets: a file for each format."""

from __future__ import annotations

from . import gguf, mlx, onnx, openvino, qnn, safetensors
from .base import Target

TARGETS: dict[str, Target] = {
    target.name: target for room in (gguf, onnx, qnn, openvino, mlx, safetensors) for target in room.TARGETS
}

__all__ = ["TARGETS", "Target", "target"]


def target(name: str) -> Target:
    """The target of that name, such as "gguf:Q4_0". ValueError lists the format's, or the formats."""
    if name not in TARGETS:
        format = name.partition(":")[0]
        near = [known for known, target in TARGETS.items() if target.format == format]
        formats = dict.fromkeys(target.format for target in TARGETS.values())
        hint = f"known: {', '.join(near)}" if near else f"its format is one of {', '.join(formats)}, as in 'gguf:Q4_0'"
        raise ValueError(f"unknown target {name!r}; {hint}")
    return TARGETS[name]
