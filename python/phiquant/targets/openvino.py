"""Targets of OpenVINO IR folders."""

from __future__ import annotations

from .base import Target

TARGETS: tuple[Target, ...] = ()
