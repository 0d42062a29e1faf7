"""How good a quantized model is: perplexity, and its distance from the float model on the same text.

One protocol for every runtime. Logits come from a torch model or from anywhere else (a file, another
program); the same code scores them. T = tokens in a window, V = vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from . import protocols
from .errors import PhiquantError
from .protocols import Protocol, Window, consecutive
from .quantized_cache import quantized_cache
from .spec import QuantSpec

Logits = torch.Tensor | np.ndarray
Rows = list[list[int]] | Protocol
_CHUNK = 1 << 24  # logits turned into log-probabilities at a time: 64 MiB in float32


@dataclass(frozen=True)
class Perplexity:
    """nll: mean negative log-likelihood in nats per scored token; perplexity: exp(nll); tokens: how many scored."""

    perplexity: float
    nll: float
    tokens: int
    protocol: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class WordPerplexity(Perplexity):
    """As lm-eval counts: exp of the nats of all documents over their words and over their bytes; bits of a byte."""

    word_perplexity: float
    byte_perplexity: float
    bits_per_byte: float
    words: int
    bytes: int


@dataclass(frozen=True)
class Comparison:
    """A model against its reference, position by position.

    kl: mean KL(reference || model) in nats. same_top: share of positions with the same most likely token.
    nll_diff: mean NLL of the model minus the reference's; nll_diff_se: its standard error, from the
    paired differences per token.
    """

    kl: float
    same_top: float
    nll_diff: float
    nll_diff_se: float
    perplexity: float
    reference_perplexity: float
    tokens: int
    protocol: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def windows(tokenizer: Any, text: str, window: int = 512, limit: int | None = None) -> list[list[int]]:
    """The text's ids in consecutive windows of `window` tokens, at most `limit` of them.

    No token is put in front. What is left over at the end is dropped, unless it is all there is.
    """
    return protocols.protocol("window", tokenizer, text, window, limit=limit).rows


def perplexity(
    model: Any,
    tokenizer: Any,
    text: str | Sequence[str],
    window: int = 512,
    limit: int | None = None,
    cache: str | QuantSpec | None = None,
    *,
    protocol: str = "window",
    stride: int | None = None,
) -> Perplexity:
    """Perplexity of a causal language model (transformers' interface) on `text`, by the protocol it returns.

    protocol: "window", "llama.cpp" or "words" (`phiquant.protocols`, docs/perplexity.md); "words" gives a
        WordPerplexity, and takes several documents. stride: of "window", tokens between two windows.
    cache: the grid of keys and values (see `model_logits`).
    """
    rows = protocols.protocol(protocol, tokenizer, text, window, stride, limit)
    return perplexity_from_logits(rows, model_logits(model, rows.rows, cache))


def compare(
    model: Any,
    reference: Any,
    tokenizer: Any,
    text: str | Sequence[str],
    window: int = 512,
    limit: int | None = None,
    cache: str | QuantSpec | None = None,
    *,
    protocol: str = "window",
    stride: int | None = None,
) -> Comparison:
    """How far `model` is from `reference` (usually the float model) on what the protocol scores of `text`.

    cache: the grid of the model's keys and values (see `model_logits`); those of the reference stay as they are.
    """
    rows = protocols.protocol(protocol, tokenizer, text, window, stride, limit)
    return compare_logits(rows, model_logits(model, rows.rows, cache), model_logits(reference, rows.rows))


def perplexity_from_logits(rows: Rows, logits: Iterable[Logits]) -> Perplexity:
    """Perplexity from given logits: one [T, V] array, torch or numpy, per window of `rows`."""
    rows = _known(rows)
    total, tokens = 0.0, 0
    for window, values in _pairs(rows, logits):
        for part, targets in _log_softmax(values, window):
            total -= part.gather(1, targets).double().sum().item()
        tokens += len(window.targets)
    nll = total / tokens
    if rows.words is None or rows.bytes is None:
        return Perplexity(_exp(nll), nll, tokens, rows.text)
    by_word, by_byte = total / rows.words, total / rows.bytes
    return WordPerplexity(
        *(_exp(nll), nll, tokens, rows.text),
        word_perplexity=_exp(by_word),
        byte_perplexity=_exp(by_byte),
        bits_per_byte=by_byte / math.log(2),
        words=rows.words,
        bytes=rows.bytes,
    )


def compare_logits(rows: Rows, logits: Iterable[Logits], reference: Iterable[Logits]) -> Comparison:
    """A model against its reference from given logits: one [T, V] array each per window of `rows`."""
    rows = _known(rows)
    kl = same = 0.0
    nll, nll_reference = [], []
    for (window, values), (_, expected) in zip(_pairs(rows, logits), _pairs(rows, reference), strict=True):
        if values.shape[1] != expected.shape[1]:
            raise PhiquantError(f"the vocabularies differ: {values.shape[1]} and {expected.shape[1]} logits a token")
        expected = expected.to(values.device)
        scored = slice(window.first, window.first + len(window.targets))
        same += (values[scored].argmax(1) == expected[scored].argmax(1)).sum().item()
        for (q, targets), (p, _) in zip(_log_softmax(values, window), _log_softmax(expected, window), strict=True):
            kl += F.kl_div(q, p, reduction="none", log_target=True).sum(1).double().sum().item()
            nll.append(-q.gather(1, targets)[:, 0].double().cpu())
            nll_reference.append(-p.gather(1, targets)[:, 0].double().cpu())
    ours, theirs = torch.cat(nll), torch.cat(nll_reference)
    tokens, difference = len(ours), ours - theirs
    return Comparison(
        kl=kl / tokens,
        same_top=same / tokens,
        nll_diff=difference.mean().item(),
        nll_diff_se=difference.std().item() / math.sqrt(tokens) if tokens > 1 else math.nan,
        perplexity=_exp(ours.mean().item()),
        reference_perplexity=_exp(theirs.mean().item()),
        tokens=tokens,
        protocol=rows.text,
    )


@torch.no_grad()
def model_logits(model: Any, rows: list[list[int]], cache: str | QuantSpec | None = None) -> Iterator[torch.Tensor]:
    """The logits [T, V] of each window of `rows`, one window in memory at a time. The model's mode is restored.

    cache: attention reads keys and values as a `quantized_cache` of that grid stores them, "int8-token-sym-f16".
    """
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    try:
        for ids in rows:
            stored: dict[str, Any] = {} if cache is None else {"past_key_values": quantized_cache(model, cache)}
            yield model(torch.tensor([ids], device=device), use_cache=cache is not None, **stored).logits[0]
    finally:
        model.train(training)


def _known(rows: Rows) -> Protocol:
    """Plain rows of ids are consecutive windows."""
    return rows if isinstance(rows, Protocol) else consecutive(rows)


def _pairs(rows: Protocol, logits: Iterable[Logits]) -> Iterator[tuple[Window, torch.Tensor]]:
    for index, (window, values) in enumerate(zip_longest(rows.windows, logits)):
        if window is None or values is None:
            count = len(rows.windows)
            raise PhiquantError(f"{count} windows need as many arrays of logits; window {index} has no counterpart")
        tensor = torch.as_tensor(values).detach()
        if tensor.dim() != 2 or len(tensor) != len(window.ids):
            raise PhiquantError(
                f"window {index} has {len(window.ids)} tokens; its logits have shape {list(tensor.shape)}"
            )
        yield window, tensor


def _log_softmax(values: torch.Tensor, window: Window) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(float32 log-probabilities [n, V], what came next [n, 1]) of what is scored, in pieces of bounded size."""
    step, targets = max(1, _CHUNK // values.shape[1]), torch.tensor(window.targets, device=values.device)[:, None]
    for start in range(0, len(targets), step):
        part = targets[start : start + step]
        first = window.first + start
        yield values[first : first + len(part)].float().log_softmax(1), part


def _exp(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf
