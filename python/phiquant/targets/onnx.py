"""Targets of ONNX folders, for ONNX Runtime and ORT-GenAI."""

from __future__ import annotations

from .base import Target

TARGETS: tuple[Target, ...] = ()
