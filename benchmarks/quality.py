"""One judge for every method, ours and peers': held-out text, the float model's logits, memory and time.

Text, windows and calibration data are the same for all: 64 windows of 512 tokens of the training text to calibrate on,
windows of 512 tokens of held-out text to judge by.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import phiquant as pq
import torch
from phiquant.calibrate import token_windows

MODELS = ("phi3-tiny", "twin")


@dataclass
class Quality:
    """What a method costs and loses. loss: nats per token above the float model's, paired. memory: bytes above idle."""

    model: str
    tool: str
    method: str
    bits: float
    kl: float
    loss: float
    standard_error: float
    perplexity: float
    same_top: float
    seconds: float
    memory: int


class Judge:
    """Scores what is made of one of MODELS."""

    def __init__(self, name: str, windows: int) -> None:
        model, self.tokenizer = pq.load("phi3-tiny")
        self.name = name
        self.model = (model if name == "phi3-tiny" else pq.testing.outlier_twin(model)).eval()
        self.ids = token_windows(None, self.tokenizer)
        self.rows = pq.evaluate.windows(self.tokenizer, pq.testing.heldout_text(), limit=windows)
        self.logits = list(pq.evaluate.model_logits(self.model, self.rows))

    def run(self, tool: str, method: str, make: Callable[[], tuple[Any, float]]) -> Quality:
        """make() -> (a model, or a function from windows to logits; its bits per weight of the decoder's linears)."""
        before, began = reset_peak(), time.perf_counter()
        made, bits = make()
        seconds, memory = time.perf_counter() - began, peak() - before
        logits: Iterable[Any] = made(self.rows) if not isinstance(made, torch.nn.Module) else (
            pq.evaluate.model_logits(made.eval(), self.rows)
        )  # fmt: skip
        found = pq.evaluate.compare_logits(self.rows, logits, self.logits)
        return Quality(
            *(self.name, tool, method, bits, found.kl, found.nll_diff, found.nll_diff_se, found.perplexity),
            *(found.same_top, seconds, max(0, memory)),
        )


def linears(model: Any) -> dict[str, torch.nn.Linear]:
    """The linears of the decoder layers, by name: what every method here quantizes."""
    return {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in n}


def reset_peak() -> int:
    """Begin to measure the peak anew; returns the resident bytes now."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    """Largest resident size since reset_peak(), in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024
