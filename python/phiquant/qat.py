"""Quantization-aware training: the student goes through its grid, the float model is the teacher.

    report = qat.train(model, tokenizer, "gguf:Q4_0", range="learned", settings=qat.Settings(seconds=120))

The loss is KL(teacher || student) on the logits. Plain language-model loss, also offered, drifts away
from the model it started from, which costs more than a few bits do. B = batch size, T = tokens in a window.
"""

from __future__ import annotations

import copy
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from . import testing
from .errors import PhiquantError
from .fake_quant import FakeQuantize
from .lora import add_adapters
from .modules import QATEmbedding, QATLinear
from .observers import Kind
from .qat_blocks import train_blocks, windows
from .qat_checkpoint import Checkpoint
from .qat_optimizer import Steps, autocast, only_grids
from .qat_settings import Progress, Report, Settings
from .quant_spec import QuantSpec
from .quantize import What, convert, prepare_qat, quantize
from .recipe import as_recipe
from .weight_quantizers import Range, into_cells

__all__ = ["Progress", "Report", "Settings", "distill", "distillation_loss", "encode", "stop_observing", "train"]


def train(
    model: Any,
    tokenizer: Any,
    what: What | None,
    *,
    text: str | None = None,
    settings: Settings | None = None,
    teacher: Any = None,
    range: Range = "mse",
    start: str | None = None,
    rank: int = 0,
    activations: str | QuantSpec | None = None,
    observer: Kind | None = None,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> Report:
    """Prepare, train and convert `model` in place: afterwards it holds codes, ready to export.

    what: a target, spec or Recipe; "float" in a Recipe's place trains a float control; None: go on with the codes
        that the model has, on their grids.
    text: what to train on; default: the standard library without the held-out modules.
    teacher: the model to stay close to; default: a copy of `model` as it comes.
    range: as in prepare_qat. A range frozen where the mse solver puts it comes closer than one that follows the
        weight: KL 0.0102 against 0.0155 after 200 k tokens at 3 bits on an early phi3-tiny, each at the best of three
        or two learning rates. "learned" trains the scales as well.
    start: a solver, such as "gptq_mse", whose codes training begins with, calibrated on windows of the same text. The
        float weights then start as near to where they were as these codes allow.
    rank: of adapters that are trained instead of the weights (LoRA; lora.py); 0: the weights themselves.
    activations, observer: as in prepare_qat: linears round what they read, too.
    folder: where to keep a checkpoint, from which the same call continues after an interruption.
    """
    settings = settings or Settings()
    recipe = None if what is None else as_recipe(what, getattr(model, "config", None))
    if recipe is None and start is not None:
        raise PhiquantError(f"the model has its codes; to choose others by {start}, start from the float model")
    ids = encode(tokenizer, text if text is not None else _default_text(settings))
    _check(model, ids, settings)
    if teacher is None and settings.language_model < 1 and settings.steps:
        teacher = copy.deepcopy(model)
    floats = {name: m.weight.detach() for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding)}
    if recipe is not None and start is not None:
        place = None if folder is None else folder / "start"
        quantize(model, recipe, start, calibration=windows(ids, 4 * settings.window, 64), folder=place)
    prepare_qat(model, recipe if start is None else None, range, activations=activations, observer=observer)
    if start is not None:
        _into_cells(model, floats)
    if settings.block_steps:
        place = None if folder is None else folder / "blocks"
        report = train_blocks(model, floats, ids, settings, folder=place, progress=progress)
        if not settings.steps:
            return report
        prepare_qat(model, None, "scales" if settings.end_to_end == "scales" else range)
        _into_cells(model, floats)
    if rank:
        add_adapters(model, rank, seed=settings.seed)
    with only_grids(model, settings.train_float) as on_grid:
        report = distill(model, teacher, ids, settings, folder=folder, progress=progress)
    if on_grid:
        convert(model, trained={"steps": report.steps, "tokens": report.tokens})
    return report


def _into_cells(model: nn.Module, floats: dict[str, torch.Tensor]) -> None:
    """Start from the float weights as near as the codes allow, not from what these decode to."""
    for name, module in model.named_modules():
        if isinstance(module, QATLinear | QATEmbedding) and name in floats and module.weight.requires_grad:
            into_cells(module.weight.data, floats[name], module.weight_quantizer)


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
    steps = Steps(student, settings)
    keeper = Checkpoint(folder, student, steps.optimizer, steps.trained, asdict(settings), ids) if folder else None
    report = Report(**(keeper.restore() or {})) if keeper else Report()
    report.trained, report.optimizer_bytes = steps.values, 8 * steps.values
    mode, before = student.training, report.seconds
    student.train()
    if teacher is not None:
        teacher.eval()
    began = saved = time.monotonic()
    try:
        while (done := report.done(settings)) < 1:
            if done >= settings.freeze:
                stop_observing(student)
            rows = _batch(ids, settings, report.steps)
            loss = _step(student, teacher, rows, settings)
            steps.take(done)
            report.record(loss, rows.numel(), before + time.monotonic() - began)
            if progress:
                progress(report.done(settings), report)
            if keeper and time.monotonic() - saved > settings.checkpoint_seconds:
                keeper.save(report.to_dict())
                saved = time.monotonic()
    finally:
        student.train(mode)
    if keeper:
        keeper.save(report.to_dict())
    return report


def stop_observing(model: nn.Module) -> None:
    """From now on ranges stay where observers have them."""
    for module in model.modules():
        if isinstance(module, FakeQuantize):
            module.observing = False


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
    with autocast(device, settings):
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
