"""`phiquant demo --all`: one set of codes in every format, each file run in its own runtime, in one table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape

from .. import evaluate, testing
from ..errors import PhiquantError
from ..export import export, verify
from ..extras import missing
from ..formats.detect import existing
from ..formats.registry import FORMATS, Format
from ..runtimes.check import relative_error, runtime_of
from ..same_codes import same_codes
from .inspect import bits_of_layers
from .session import Ui, size, table

PROMPT = "def read_lines(path):\n"
NEW_TOKENS = 64
_DEFAULT = 1  # windows in the default setting: MLX takes a minute for each, it multiplies float16 slowly on a CPU


@dataclass(frozen=True)
class Row:
    """A format. reason: why there are no figures. relative_error, same_top: in the exact setting, against torch.

    ..._default: in the runtime's default setting, on the first window; the change of perplexity is a share of torch's.
    same_codes: whether `verify` finds the codes of the first file in this one, from the files alone; same_floats:
    and the values of all other tensors.
    """

    format: str
    runtime: str
    reason: str = ""
    bytes: int = 0
    bits_per_weight: float = 0.0
    perplexity: float = 0.0
    relative_error: float = 0.0
    same_top: float = 0.0
    perplexity_change_default: float = 0.0
    relative_error_default: float = 0.0
    same_tokens: bool = False
    verified: bool = False
    same_codes: bool = False
    same_floats: bool = False


@dataclass(frozen=True)
class Measured:
    """What torch computes with the codes: logits of the windows `ids`, and the greedy continuation of PROMPT."""

    ids: list[list[int]]
    logits: list[torch.Tensor]
    perplexity: float
    tokens: list[int]


def in_torch(model: Any, tokenizer: Any, windows: int) -> Measured:
    """The model itself on `windows` windows of 512 held-out tokens."""
    ids = evaluate.windows(tokenizer, testing.heldout_text(), 512, windows)
    logits = [values.float() for values in evaluate.model_logits(model, ids)]
    prompt = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    made = model.generate(prompt, max_new_tokens=NEW_TOKENS, do_sample=False)[0, prompt.shape[1] :]
    return Measured(ids, logits, evaluate.perplexity_from_logits(ids, logits).perplexity, made.tolist())


def rows(ui: Ui, model: Any, tokenizer: Any, out: Path, torch_: Measured) -> Iterator[Row]:
    """A row for each format; where a runtime is not installed or refuses, the reason."""
    first: Path | None = None
    for format in FORMATS.values():
        name = runtime_of(format).NAME
        if lacking := missing(format.extra):
            reason = f"{', '.join(lacking)} not installed: pip install 'phiquant[{format.extra}]'"
            yield Row(format.name, name, reason)
            continue
        ui.note(f"{format.name}: {name}")
        try:
            row = _run(format, model, tokenizer, out / format.name, torch_, first)
        except (PhiquantError, ImportError, OSError, RuntimeError) as error:
            ui.log.info("failed", exc_info=True)
            row = Row(format.name, name, str(error).splitlines()[0])
        first = first or (out / format.name if not row.reason else None)
        yield row


def _run(format: Format, model: Any, tokenizer: Any, folder: Path, torch_: Measured, first: Path | None) -> Row:
    export(model, tokenizer, folder, format=format.name)
    found, runtime = existing(folder), runtime_of(format)
    exact = _logits(runtime, found.path, torch_, len(torch_.ids), exact=True)
    default = _logits(runtime, found.path, torch_, _DEFAULT, exact=False)
    made = runtime.generate(found.path, PROMPT, max_new_tokens=NEW_TOKENS).tokens
    compared = same_codes(first or folder, folder)
    return Row(
        format=format.name,
        runtime=runtime.NAME,
        bytes=sum(path.stat().st_size for pattern in format.weights for path in folder.glob(pattern)),
        bits_per_weight=bits_of_layers(found),
        perplexity=exact[0].perplexity,
        relative_error=exact[1],
        same_top=exact[0].same_top,
        perplexity_change_default=default[0].perplexity / default[0].reference_perplexity - 1,
        relative_error_default=default[1],
        same_tokens=made in (torch_.tokens, torch_.tokens[:-1]),  # some keep the token that ends it, some do not
        verified=verify(folder).ok,
        same_codes=compared.codes_ok,
        same_floats=compared.ok,
    )


def _logits(runtime: Any, path: Path, torch_: Measured, count: int, *, exact: bool) -> tuple[Any, float]:
    """The first `count` windows in the runtime: what evaluate.compare_logits finds, and the relative error."""
    ids, expected = torch_.ids[:count], torch_.logits[:count]
    got = [torch.tensor(values) for values in runtime.logits(path, ids, exact=exact)]
    return evaluate.compare_logits(ids, got, expected), relative_error(got, expected)


def report(made: Sequence[Row], torch_: Measured, seconds: float) -> dict[str, Any]:
    """The table as JSON. ok: every file that was written holds the same codes and what its receipt says."""
    ok = all(row.reason or (row.verified and row.same_codes) for row in made)
    figures = {"perplexity_torch": torch_.perplexity, "windows": len(torch_.ids), "seconds": seconds}
    return {"ok": ok, "rows": [asdict(row) for row in made], **figures}


def show(made: Sequence[Row], torch_: Measured, seconds: float) -> list[Any]:
    """The table, and what its columns mean."""
    shown = table(
        "format", "runtime", "size>", "bits per\nweight>", "perplexity>", "relative\nerror>", "same top\ntoken>",
        "same 64\ntokens", "perplexity\nby default>", "error\nby default>", "same\ncodes",
    )  # fmt: skip
    for row in made:
        if row.reason:
            shown.add_row(row.format, row.runtime, *[""] * 9)
            continue
        shown.add_row(
            row.format,
            row.runtime,
            size(row.bytes),
            f"{row.bits_per_weight:.2f}",
            f"{row.perplexity:.4f}",
            f"{row.relative_error:.1e}",
            f"{100 * row.same_top:.2f} %",
            "yes" if row.same_tokens else "no",
            f"{100 * row.perplexity_change_default:+.2f} %",
            f"{row.relative_error_default:.1e}",
            "NO" if not (row.verified and row.same_codes) else "yes" if row.same_floats else "yes; floats rounded",
        )
    reasons = [f"{row.format}: {row.reason}" for row in made if row.reason]
    return [
        shown,
        *map(escape, reasons),
        f"In torch the same codes have perplexity {torch_.perplexity:.4f}, on {len(torch_.ids)} windows of 512 tokens",
        "that the model never saw. Perplexity, error and tokens: in the setting that computes as torch (but llama.cpp",
        "rounds activations to 8 bits); by default: as the runtime comes, on one window. Same tokens: those of the",
        "runtime's own greedy generate call are torch's. Same codes: `verify` finds them in the files.",
        f"Took {seconds / 60:.1f} minutes.",
    ]
