"""Targets of static QDQ ONNX models, for Qualcomm's QNN."""

from __future__ import annotations

from .base import Target

TARGETS: tuple[Target, ...] = ()
