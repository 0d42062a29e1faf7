"""Targets of MLX folders, for mlx-lm."""

from __future__ import annotations

from .base import Target

TARGETS: tuple[Target, ...] = ()
