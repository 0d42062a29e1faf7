"""Quantization-aware training: the student goes through its grid, the float model is the teacher.

    report = qat.train(model, tokenizer, "gguf:Q4_0", settings=qat.Settings(seconds=120))

The loss is KL(teacher || student) on the logits. Plain language-model loss, also offered, drifts away
from the model it started from, which costs more than a few bits do. B = batch size, T = tokens in a window.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import random
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from . import testing
from .errors import PhiquantError
from .modules import QATEmbedding, QATLinear
from .quantize import Range, What, convert, prepare_qat
from .recipe import as_recipe


@dataclass(frozen=True)
class Settings:
    """How to train. The defaults suit a small model and a few minutes on a CPU.

    steps: AdamW steps at most. seconds: stop (and let the learning rate fall) by time as well; a run
        limited by time is not repeatable to the bit.
    language_model: share of the plain language-model loss; 0 is distillation alone, 1 needs no teacher.
    bfloat16: autocast the matrix products; None: where the processor is fast at it.
    checkpoint_seconds: how often the state is saved when a folder is given.
    """

    steps: int = 600
    seconds: float | None = None
    batch: int = 16
    window: int = 128
    learning_rate: float = 1e-3
    warmup: float = 0.05
    temperature: float = 1.0
    language_model: float = 0.0
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
    """What a run did. curve: (step, loss) of some steps; the loss is that of the batch, in nats."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    curve: list[tuple[int, float]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


Progress = Callable[[float, Report], None]  # (share of the run that is done, 0 to 1; the report so far)


def train(
    model: Any,
    tokenizer: Any,
    what: What,
    *,
    text: str | None = None,
    settings: Settings | None = None,
    teacher: Any = None,
    range: Range = "tensor",
    folder: Path | None = None,
    progress: Progress | None = None,
) -> Report:
    """Prepare, train and convert `model` in place: afterwards it holds codes, ready to export.

    what: a target, spec or Recipe; "float" in a Recipe's place trains a float control.
    text: what to train on; default: the standard library without the held-out modules.
    teacher: the model to stay close to; default: a copy of `model` as it comes.
    folder: where to keep a checkpoint, from which the same call continues after an interruption.
    """
    settings = settings or Settings()
    recipe = as_recipe(what)
    ids = encode(tokenizer, text if text is not None else _default_text(settings))
    if teacher is None and settings.language_model < 1:
        teacher = copy.deepcopy(model)
    prepare_qat(model, recipe, range=range)
    report = distill(model, teacher, ids, settings, folder=folder, progress=progress)
    if any(isinstance(module, QATLinear | QATEmbedding) for module in model.modules()):
        convert(model)
    return report


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
    if len(ids) <= settings.window:
        raise PhiquantError(f"the training text has {len(ids)} tokens; a window of {settings.window} needs more")
    trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        trained.values(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=settings.weight_decay, fused=True
    )
    keeper = _Checkpoint(folder, student, optimizer, trained, settings, ids) if folder else None
    report = keeper.restore() if keeper else Report()
    mode, before = student.training, report.seconds
    student.train()
    if teacher is not None:
        teacher.eval()
    began = saved = time.monotonic()
    try:
        while (done := _done(report, settings)) < 1:
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * _schedule(done, settings.warmup)
            loss = _step(student, teacher, _batch(ids, settings, report.steps), settings)
            nn.utils.clip_grad_norm_(trained.values(), settings.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            _record(report, loss, settings, before + time.monotonic() - began)
            if progress:
                progress(_done(report, settings), report)
            if keeper and time.monotonic() - saved > settings.checkpoint_seconds:
                keeper.save(report)
                saved = time.monotonic()
    finally:
        student.train(mode)
    if keeper:
        keeper.save(report)
    return report


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
    return testing.training_text(characters=min(20_000_000, max(1_000_000, 5 * tokens)), seed=settings.seed)


def _batch(ids: torch.Tensor, settings: Settings, step: int) -> torch.Tensor:
    """The windows of one step, int64 [B, T]: a function of the step, so that a resumed run sees the same."""
    window, batch = settings.window, settings.batch
    starts = list(range(0, len(ids) - window, window))
    per_epoch = max(1, len(starts) // batch)
    epoch, index = divmod(step, per_epoch)
    order = random.Random(f"{settings.seed}/{epoch}")
    shift = order.randrange(window) if len(starts) > 1 else 0
    order.shuffle(starts)
    rows = [ids[min(s + shift, len(ids) - window) :][:window] for s in starts[index * batch : (index + 1) * batch]]
    return torch.stack(rows).long()


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
    student = (logits.float() / temperature).log_softmax(-1).flatten(0, -2)
    teacher = (expected.float() / temperature).log_softmax(-1).flatten(0, -2)
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


def _record(report: Report, loss: float, settings: Settings, seconds: float) -> None:
    if report.steps % 10 == 0:
        report.curve.append((report.steps, loss))
    report.steps += 1
    report.tokens += settings.batch * settings.window
    report.seconds = seconds


class _Checkpoint:
    """The state of a run in one safetensors file, replaced whole each time."""

    def __init__(
        self,
        folder: Path,
        student: nn.Module,
        optimizer: torch.optim.Optimizer,
        trained: dict[str, nn.Parameter],
        settings: Settings,
        ids: torch.Tensor,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "qat-checkpoint.safetensors"
        self.student, self.optimizer, self.trained = student, optimizer, trained
        self.fingerprint = self._fingerprint(student, settings, ids)

    def _fingerprint(self, student: nn.Module, settings: Settings, ids: torch.Tensor) -> str:
        """What the run depends on: settings, text, grids, and some values of every weight it starts from."""
        digest = hashlib.sha256(json.dumps(asdict(settings)).encode())
        digest.update(ids.numpy().tobytes())
        for name, module in student.named_modules():
            if isinstance(module, QATLinear | QATEmbedding):
                digest.update(f"{name} {module.weight_quantizer.spec}".encode())
        for name, value in self.trained.items():
            some = value.detach().flatten()[:: max(1, value.numel() // 64)].float().cpu()
            digest.update(f"{name} {list(value.shape)}".encode() + some.numpy().tobytes())
        return digest.hexdigest()

    def _ranges(self) -> dict[str, torch.Tensor]:
        """The observers' and quantizers' buffers; training replaces them, so they are looked up each time."""
        return {name: buffer for name, buffer in self.student.named_buffers() if ".weight_quantizer." in name}

    def save(self, report: Report) -> None:
        from safetensors.torch import save_file

        tensors = {f"value.{name}": p.detach() for name, p in self.trained.items()}
        tensors |= {f"buffer.{name}": b for name, b in self._ranges().items()}
        for name, parameter in self.trained.items():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"{key}.{name}"] = value
        partial = self.path.with_suffix(".partial")
        metadata = {"fingerprint": self.fingerprint, "report": json.dumps(report.to_dict())}
        save_file({name: t.contiguous() for name, t in tensors.items()}, partial, metadata)
        partial.replace(self.path)

    def restore(self) -> Report:
        """Load the checkpoint if there is one; PhiquantError if it belongs to another run."""
        if not self.path.exists():
            return Report()
        from safetensors import safe_open

        with safe_open(self.path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("fingerprint") != self.fingerprint:
                raise PhiquantError(
                    f"{self.path} belongs to a run with other settings, text or weights; "
                    "delete it or give another folder"
                )
            names = set(file.keys())
            ranges = {name: file.get_tensor(f"buffer.{name}") for name in self._ranges() if f"buffer.{name}" in names}
            self.student.load_state_dict(ranges, strict=False)
            for name, parameter in self.trained.items():
                parameter.data.copy_(file.get_tensor(f"value.{name}"))
                keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}.{name}" in names]
                self.optimizer.state[parameter] = {key: file.get_tensor(f"{key}.{name}") for key in keys}
        data = json.loads(metadata["report"])
        return Report(data["steps"], data["tokens"], data["seconds"], [(s, v) for s, v in data["curve"]])
