"""The RoPE and window gate: a file in its runtime beside torch, at lengths on both sides of every border.

A border is the original context, where LongRoPE changes its factors, and the sliding window. The reference is the
model as its source described it, not as the file does: what the exporter got wrong, the file says wrongly too.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import evaluate, testing
from ..errors import PhiquantError
from ..formats.registry import Format
from ..models.rope import read_rope
from . import deviations
from .check import decoded_model, relative_error, runtime_of
from .deviations import Config, equal, factors_at, short_throughout, window_of

SHORT = 64  # tokens: a length that no border is near
# Relative errors that are no fault: float32 loses some 5e-6 in a long text, and what a runtime's own rounding does
# varies with the text. The faults that the tests seed make several times more, at the least.
ROUNDING, SLACK = 2e-5, 2
_CHARACTERS = 12  # of source code per token, at most on average


@dataclass(frozen=True)
class LengthResult:
    """A text of `tokens` tokens. factors: "short" or "long" with LongRoPE, else None.

    relative_error: of the logits, against torch. deviation: what the runtime is known to do otherwise at this length,
    and deviation_error: against torch doing the same. ok: one of the two errors is within `bar`.
    """

    tokens: int
    factors: str | None
    ok: bool
    relative_error: float
    bar: float
    deviation: str | None = None
    deviation_error: float | None = None

    def __str__(self) -> str:
        known = (
            f" ({self.deviation}; against torch doing the same {self.deviation_error:.2e})" if self.deviation else ""
        )
        factors = f", {self.factors} factors" if self.factors else ""
        verdict = "" if self.ok else f": above the bar of {self.bar:.0e}"
        return f"{self.tokens} tokens{factors}: relative error {self.relative_error:.2e}{known}{verdict}"


@dataclass(frozen=True)
class LongResult:
    """What the gate found. differences: where the file's own settings are not those of the model."""

    name: str
    ok: bool
    lengths: list[LengthResult]
    differences: list[str]

    def __str__(self) -> str:
        return "\n".join([*self.differences, *(f"{self.name}, {one}" for one in self.lengths)])


def run(format: Format, path: Path, config: Config, text: str | None = None) -> LongResult:
    """The export at `path` in its runtime's exact setting, against the model of `config` with the file's weights.

    config: the config.json of the model that was exported. text: None for the held-out standard library modules.
    PhiquantError if the text is too short, or the runtime fails.
    """
    reader, runtime = format.reader_module(), runtime_of(format)
    stored, told = reader.read(path), reader.read_config(path)
    chosen = lengths(config)
    ids = _ids(runtime, path, testing.heldout_text() if text is None else text, chosen[-1])
    rows = [ids[:count] for count in chosen]
    got = runtime.logits(path, rows, exact=True)
    errors = _errors(decoded_model(config, stored), rows, got)
    known = [deviations.find(format, config, told, count) for count in chosen]
    models = {sentence: decoded_model(other, stored) for other, sentence in filter(None, known)}
    rope, bar = read_rope(config), max(SLACK * runtime.bar(stored, True), ROUNDING)
    results = []
    for row, values, error, deviation in zip(rows, got, errors, known, strict=True):
        sentence = deviation[1] if deviation else None
        other = _errors(models[sentence], [row], [values])[0] if sentence else None
        ok = error <= bar or (other is not None and other <= bar)
        results.append(LengthResult(len(row), factors_at(rope, len(row)), ok, error, bar, sentence, other))
    found = differences(config, told)
    return LongResult(runtime.NAME, not found and all(r.ok for r in results), results, found)


def lengths(config: Config) -> list[int]:
    """Numbers of tokens: a short one; at each border the last before it, the first behind it, and half as many more."""
    rope = read_rope(config)
    borders = [rope.original_context] if rope.long else []
    borders += [window] if (window := window_of(config, rope)) else []
    around = {count for border in borders for count in (border, border + 1, border + border // 2)}
    return sorted({min(count, rope.context) for count in {SHORT, *(around or {4 * SHORT})}})


def differences(config: Config, told: Config) -> list[str]:
    """Where the settings that a file states are not those of the model, the known deviations aside."""
    ours, theirs = read_rope(config), read_rope(told)
    found = []
    for name in ("theta", "dimensions", "context", "attention_factor", "short", "long", "original_context"):
        a, b = getattr(ours, name), getattr(theirs, name)
        if name == "original_context" and ours.long is None:
            continue  # it decides nothing
        if name == "long" and short_throughout(ours, theirs):
            continue
        if not equal(a, b):
            found.append(f"RoPE: {name.replace('_', ' ')} is {_text(b)} in the file, {_text(a)} in the model")
    windows = window_of(config, ours), window_of(told, theirs)
    if windows[0] != windows[1]:
        found.append(f"the sliding window is {windows[1]} in the file, {windows[0]} in the model")
    return found


def _ids(runtime: Any, path: Path, text: str, count: int) -> list[int]:
    ids = runtime.tokenize(path, [text[: count * _CHARACTERS]])[0]
    if len(ids) < count:
        raise PhiquantError(f"the text has {len(ids)} tokens; to pass every border of this model takes {count}")
    return list(ids[:count])


def _errors(model: Any, rows: list[list[int]], logits: list[Any]) -> list[float]:
    expected = evaluate.model_logits(model, rows)
    return [
        relative_error([torch.tensor(values)], [wanted.float().cpu()])
        for values, wanted in zip(logits, expected, strict=True)
    ]


def _text(value: Any) -> str:
    if isinstance(value, list):
        return f"{len(value)} factors {value[0]:.6g} .. {value[-1]:.6g}"
    return f"{value:.9g}" if isinstance(value, float) else str(value)
