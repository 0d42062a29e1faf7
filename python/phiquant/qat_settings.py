"""How to train, and what a run says of itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from .errors import PhiquantError


@dataclass(frozen=True)
class Settings:
    """How to train. The defaults suit a small model and a few minutes on a CPU.

    steps: AdamW steps at most. seconds: stop (and let the learning rate fall) by time as well; a run
        limited by time is not repeatable to the bit.
    learning_rate: of the weights, at its peak. scale_learning_rate: of learned scales, offsets and levels, as a share
        of the mean scale of each layer (`learned_groups`); they get no weight decay.
    freeze: from this share of the run on, the ranges that observers have seen stay as they are; 1: never.
    train_float: also train what stays in float (embedding, norms, head). Off, those tensors remain
        bit for bit those of the checkpoint, at the same distance from the teacher.
    language_model: share of the plain language-model loss; 0 is distillation alone, 1 needs no teacher.
    block_steps: steps for each decoder layer alone, before the whole model is trained (qat_blocks.py); 0: none.
    block_windows: windows of the text that they take turns with. end_to_end: what is trained after them: "scales",
        the codes staying, or "all".
    bfloat16: autocast the matrix products; None: where the processor is fast at it.
    checkpoint_seconds: how often the state is saved when a folder is given.
    """

    steps: int = 600
    seconds: float | None = None
    batch: int = 8
    window: int = 128
    learning_rate: float = 2.5e-4
    scale_learning_rate: float = 1e-3
    warmup: float = 0.05
    freeze: float = 1.0
    temperature: float = 1.0
    language_model: float = 0.0
    train_float: bool = False
    weight_decay: float = 0.0
    clip: float = 1.0
    block_steps: int = 0
    block_windows: int = 128
    end_to_end: Literal["scales", "all"] = "scales"
    seed: int = 0
    bfloat16: bool | None = None
    checkpoint_seconds: float = 60.0

    def __post_init__(self) -> None:
        if self.steps < (0 if self.block_steps else 1) or self.batch < 1 or self.window < 2 or self.block_steps < 0:
            raise PhiquantError(
                "steps and batch are at least 1, window at least 2; after training by blocks, steps may be 0"
            )
        if min(self.learning_rate, self.scale_learning_rate, self.temperature) <= 0:
            raise PhiquantError("learning_rate, scale_learning_rate and temperature are positive")
        if not (0 <= self.language_model <= 1 and 0 <= self.freeze <= 1):
            raise PhiquantError("language_model and freeze are shares, between 0 and 1")
        if (self.block_steps and self.block_windows < self.batch) or self.end_to_end not in ("scales", "all"):
            raise PhiquantError("block_windows is at least batch; end_to_end is 'scales' or 'all'")
        if self.seconds is not None and self.seconds <= 0:
            raise PhiquantError(f"seconds must be positive, not {self.seconds}")


@dataclass
class Report:
    """What a run did. curve: [step, loss] of some steps; the loss is that of the batch, in nats.

    trained: values with a gradient; optimizer_bytes: of the moments kept for them.
    """

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    curve: list[list[float]] = field(default_factory=list)
    trained: int = 0
    optimizer_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def done(self, settings: Settings) -> float:
        """How much of the run is over, 0 to 1: by steps or by time, whichever is further."""
        by_time = self.seconds / settings.seconds if settings.seconds else 0.0
        return min(1.0, max(self.steps / settings.steps, by_time)) if settings.steps else 1.0

    def record(self, loss: float, tokens: int, seconds: float) -> None:
        """Count a step."""
        if self.steps % 10 == 0:
            self.curve.append([self.steps, loss])
        self.steps += 1
        self.tokens += tokens
        self.seconds = seconds


Progress = Callable[[float, Report], None]  # (share of the run that is done, 0 to 1; the report so far)


def schedule(done: float, warmup: float) -> float:
    """The learning rate's share of its peak: a linear warm-up over the first share of the run, then a cosine to 0."""
    if done < warmup:
        return (done + 0.1 * warmup) / (1.1 * warmup)
    return 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))
