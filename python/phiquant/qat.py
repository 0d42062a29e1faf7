"""Quantization-aware training: the student goes through its grid, the float model is the teacher.

    report = qat.train(model, tokenizer, "gguf:Q4_0", settings=qat.Settings(seconds=120))

The loss is KL(teacher || student) on the logits. Plain language-model loss, also offered, drifts away
from the model it started from, which costs more than a few bits do. B = batch size, T = tokens in a window.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from . import testing
from .errors import PhiquantError
from .modules import QATEmbedding, QATLinear
from .qat_checkpoint import Checkpoint
from .quantize import Range, What, convert, prepare_qat
from .recipe import as_recipe


@dataclass(frozen=True)
class Settings:
    """How to train. The defaults suit a small model and a few minutes on a CPU.

    steps: AdamW steps at most. seconds: stop (and let the learning rate fall) by time as well; a run
        limited by time is not repeatable to the bit.
    train_float: also train what stays in float (embedding, norms, head). Off, those tensors remain
        bit for bit those of the checkpoint, at the same distance from the teacher.
    language_model: share of the plain language-model loss; 0 is distillation alone, 1 needs no teacher.
    bfloat16: autocast the matrix products; None: where the processor is fast at it.
    checkpoint_seconds: how often the state is saved when a folder is given.
    """

    steps: int = 600
    seconds: float | None = None
    batch: int = 8
    window: int = 128
    learning_rate: float = 2.5e-4
    warmup: float = 0.05
    temperature: float = 1.0
    language_model: float = 0.0
    train_float: bool = False
    weight_decay: float = 0.0
    clip: float = 1.0
    seed: int = 0
    bfloat16: bool | None = None
    checkpoint_seconds: float = 60.0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or self.window < 2:
            raise PhiquantError("steps and batch are at least 1, window at least 2")
        if self.learning_rate <= 0 or self.temperature <= 0 or not 0 <= self.language_model <= 1:
            raise PhiquantError("learning_rate and temperature are positive, language_model is between 0 and 1")
        if self.seconds is not None and self.seconds <= 0:
            raise PhiquantError(f"seconds must be positive, not {self.seconds}")


@dataclass
class Report:
    """What a run did. curve: [step, loss] of some steps; the loss is that of the batch, in nats."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    curve: list[list[float]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


Progress = Callable[[float, Report], None]  # (share of the run that is done, 0 to 1; the report so far)


def train(
    model: Any,
    tokenizer: Any,
    what: What | None,
    *,
    text: str | None = None,
    settings: Settings | None = None,
    teacher: Any = None,
    range: Range = "mse",
    folder: Path | None = None,
    progress: Progress | None = None,
) -> Report:
    """Prepare, train and convert `model` in place: afterwards it holds codes, ready to export.

    what: a target, spec or Recipe; "float" in a Recipe's place trains a float control; None: go on with the codes
        that the model has, on their grids.
    text: what to train on; default: the standard library without the held-out modules.
    teacher: the model to stay close to; default: a copy of `model` as it comes.
    range: as in prepare_qat, but for "learned". A range frozen where the mse solver puts it comes closer than one that
        follows the weight: KL 0.0102 against 0.0155 after 200 k tokens at 3 bits on an early phi3-tiny,
        each at the best of three or two learning rates.
    folder: where to keep a checkpoint, from which the same call continues after an interruption.
    """
    if range == "learned":
        raise PhiquantError(
            "qat.train trains weights alone; learned scales want a learning rate of their own: docs/learned-scales.md"
        )
    settings = settings or Settings()
    recipe = None if what is None else as_recipe(what, getattr(model, "config", None))
    ids = encode(tokenizer, text if text is not None else _default_text(settings))
    _check(model, ids, settings)
    if teacher is None and settings.language_model < 1:
        teacher = copy.deepcopy(model)
    prepare_qat(model, recipe, range=range)
    on_grid = {id(m.weight) for m in model.modules() if isinstance(m, QATLinear | QATEmbedding)}
    with _frozen([p for p in model.parameters() if on_grid and not settings.train_float and id(p) not in on_grid]):
        report = distill(model, teacher, ids, settings, folder=folder, progress=progress)
    if on_grid:
        convert(model, trained={"steps": report.steps, "tokens": report.tokens})
    return report


@contextmanager
def _frozen(parameters: list[nn.Parameter]) -> Iterator[None]:
    """These parameters receive no gradient meanwhile."""
    frozen = [p for p in parameters if p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


def distill(
    student: Any,
    teacher: Any,
    ids: torch.Tensor,
    settings: Settings,
    *,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> Report:
    """The training loop alone: `student` (any transformers causal model) towards `teacher` on the stream `ids` [n]."""
    _check(student, ids, settings)
    trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        trained.values(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=settings.weight_decay, fused=True
    )
    keeper = Checkpoint(folder, student, optimizer, trained, asdict(settings), ids) if folder else None
    report = Report(**(keeper.restore() or {})) if keeper else Report()
    mode, before = student.training, report.seconds
    student.train()
    if teacher is not None:
        teacher.eval()
    began = saved = time.monotonic()
    try:
        while (done := _done(report, settings)) < 1:
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * _schedule(done, settings.warmup)
            rows = _batch(ids, settings, report.steps)
            loss = _step(student, teacher, rows, settings)
            nn.utils.clip_grad_norm_(trained.values(), settings.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            _record(report, loss, rows.numel(), before + time.monotonic() - began)
            if progress:
                progress(_done(report, settings), report)
            if keeper and time.monotonic() - saved > settings.checkpoint_seconds:
                keeper.save(report.to_dict())
                saved = time.monotonic()
    finally:
        student.train(mode)
    if keeper:
        keeper.save(report.to_dict())
    return report


def _check(student: Any, ids: torch.Tensor, settings: Settings) -> None:
    if len(ids) <= settings.window:
        raise PhiquantError(f"the training text has {len(ids)} tokens; a window of {settings.window} needs more")
    for name, parameter in student.named_parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            raise PhiquantError(
                f"{name} is {parameter.dtype}, in which small steps are lost; training takes float32 (bfloat16=True "
                "casts the products alone): load the model with dtype=torch.float32"
            )


def encode(tokenizer: Any, text: str) -> torch.Tensor:
    """The ids of a text, int32 [n]: the parts between <|endoftext|>, each ended by the tokenizer's own end token."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    stream: list[int] = []
    for row in tokenizer(text.split(testing.END_OF_TEXT), add_special_tokens=False, verbose=False)["input_ids"]:
        stream += [*row, *end]
    return torch.tensor(stream, dtype=torch.int32)


def _default_text(settings: Settings) -> str:
    """Enough of the standard library that no window comes twice in a short run; about 3 characters make a token."""
    tokens = settings.batch * settings.window * settings.steps
    if settings.seconds:
        tokens = min(tokens, int(10_000 * settings.seconds))  # faster than any CPU trains phi3-tiny
    return testing.training_text(characters=min(20_000_000, max(1_000_000, 5 * tokens)), seed=settings.seed)


def _batch(ids: torch.Tensor, settings: Settings, step: int) -> torch.Tensor:
    """The windows of one step, int64 [B, T]: a function of the step, so that a resumed run sees the same."""
    window, batch, last = settings.window, settings.batch, len(ids) - settings.window
    windows = len(ids) // window
    epoch, index = divmod(step, max(1, windows // batch))
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + epoch)
    shift = int(torch.randint(window, (1,), generator=generator))  # each epoch cuts the text at other places
    chosen = torch.randperm(windows, generator=generator)[index * batch : (index + 1) * batch]
    starts = (chosen * window + shift).clamp(max=last)
    return torch.stack([ids[start : start + window] for start in starts.tolist()]).long()


def _step(student: Any, teacher: Any, rows: torch.Tensor, settings: Settings) -> float:
    """Forward and backward of one batch [B, T]; returns the loss."""
    device = next(student.parameters()).device
    rows = rows.to(device)
    with _autocast(device, settings):
        logits = student(rows, use_cache=False).logits
        with torch.no_grad():
            expected = teacher(rows, use_cache=False).logits if settings.language_model < 1 else None
    loss = logits.new_zeros((), dtype=torch.float32)
    if expected is not None:
        loss = loss + (1 - settings.language_model) * distillation_loss(logits, expected, settings.temperature)
    if settings.language_model > 0:
        flat = logits[:, :-1].float().flatten(0, 1)
        loss = loss + settings.language_model * F.cross_entropy(flat, rows[:, 1:].flatten())
    loss.backward()
    value = loss.item()
    if not math.isfinite(value):
        raise PhiquantError("the training loss is not finite; lower the learning rate")
    return value


def distillation_loss(logits: torch.Tensor, expected: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Mean over positions of KL(softmax(expected / t) || softmax(logits / t)) t^2, in float32; logits [..., V]."""
    if temperature != 1:  # the usual case is spared two passes over the largest tensors of a step
        logits, expected = logits.float() / temperature, expected.float() / temperature
    student = logits.log_softmax(-1, dtype=torch.float32).flatten(0, -2)
    teacher = expected.log_softmax(-1, dtype=torch.float32).flatten(0, -2)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def _autocast(device: torch.device, settings: Settings) -> Any:
    wanted = _fast_bfloat16(device) if settings.bfloat16 is None else settings.bfloat16
    return torch.autocast(device.type, torch.bfloat16) if wanted else nullcontext()


def _fast_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported())


def _done(report: Report, settings: Settings) -> float:
    """How much of the run is over, 0 to 1: by steps or by time, whichever is further."""
    by_time = report.seconds / settings.seconds if settings.seconds else 0.0
    return min(1.0, max(report.steps / settings.steps, by_time))


def _schedule(done: float, warmup: float) -> float:
    """Linear warm-up over the first share of the run, then a cosine to zero."""
    if done < warmup:
        return (done + 0.1 * warmup) / (1.1 * warmup)
    return 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))


def _record(report: Report, loss: float, tokens: int, seconds: float) -> None:
    if report.steps % 10 == 0:
        report.curve.append([report.steps, loss])
    report.steps += 1
    report.tokens += tokens
    report.seconds = seconds
