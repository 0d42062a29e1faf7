"""Granularities: which values of a tensor share one scale. This module imports nothing of phiquant and no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor. Shape [N, K] -> scales [1, 1]."""

    def __str__(self) -> str:
        return "tensor"


@dataclass(frozen=True)
class PerChannel:
    """One scale per index of `axis`. Shape [N, K], axis 0 -> scales [N, 1]."""

    axis: int = 0

    def __str__(self) -> str:
        return "channel" if self.axis == 0 else f"channel{self.axis}"


@dataclass(frozen=True)
class PerGroup:
    """One scale per `size` consecutive values of the last axis. Shape [N, K] -> scales [N, K / size]."""

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"a group has at least one value, not {self.size}")

    def __str__(self) -> str:
        return f"g{self.size}"


@dataclass(frozen=True)
class PerToken:
    """One scale per vector along the last axis (activations). Shape [B, T, K] -> scales [B, T, 1]."""

    def __str__(self) -> str:
        return "token"


@dataclass(frozen=True)
class PerRows:
    """One scale or codebook per `rows` consecutive indices of the first axis. Shape [N, K] -> [N / rows, 1]."""

    rows: int = 1

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise ValueError(f"a group of rows has at least one row, not {self.rows}")

    def __str__(self) -> str:
        return "row" if self.rows == 1 else f"rows{self.rows}"


Granularity = PerTensor | PerChannel | PerGroup | PerToken | PerRows
