"""How good a quantized model is: perplexity, and its distance from the float model on the same text.

One protocol for every runtime. Logits come from a torch model or from anywhere else (a file, another
program); the same code scores them. T = tokens in a window, V = vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from .errors import PhiquantError
from .quantized_cache import quantized_cache
from .spec import QuantSpec

Logits = torch.Tensor | np.ndarray
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
    if window < 2:
        raise PhiquantError(f"a window has at least 2 tokens (the first is not scored), not {window}")
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    if len(ids) < 2:
        raise PhiquantError(f"the text has {len(ids)} token(s); at least 2 are needed to score one")
    if len(ids) < window:
        return [ids]
    rows = [ids[start : start + window] for start in range(0, len(ids) - window + 1, window)]
    return rows[:limit]


def perplexity(
    model: Any,
    tokenizer: Any,
    text: str,
    window: int = 512,
    limit: int | None = None,
    cache: str | QuantSpec | None = None,
) -> Perplexity:
    """Perplexity of a causal language model (transformers' interface) on `text`, by the protocol it returns.

    cache: the grid of keys and values (see `model_logits`).
    """
    rows = windows(tokenizer, text, window, limit)
    return perplexity_from_logits(rows, model_logits(model, rows, cache))


def compare(
    model: Any,
    reference: Any,
    tokenizer: Any,
    text: str,
    window: int = 512,
    limit: int | None = None,
    cache: str | QuantSpec | None = None,
) -> Comparison:
    """How far `model` is from `reference` (usually the float model) on `text`.

    cache: the grid of the model's keys and values (see `model_logits`); those of the reference stay as they are.
    """
    rows = windows(tokenizer, text, window, limit)
    return compare_logits(rows, model_logits(model, rows, cache), model_logits(reference, rows))


def perplexity_from_logits(rows: list[list[int]], logits: Iterable[Logits]) -> Perplexity:
    """Perplexity from given logits: one [T, V] array, torch or numpy, per window of `rows`."""
    total, tokens = 0.0, 0
    for ids, values in _pairs(rows, logits):
        for start, part in _log_softmax(values[:-1]):
            targets = torch.tensor(ids[start + 1 : start + 1 + len(part)], device=part.device)
            total -= part.gather(1, targets[:, None]).double().sum().item()
        tokens += len(ids) - 1
    nll = total / tokens
    return Perplexity(_exp(nll), nll, tokens, _protocol(rows))


def compare_logits(rows: list[list[int]], logits: Iterable[Logits], reference: Iterable[Logits]) -> Comparison:
    """A model against its reference from given logits: one [T, V] array each per window of `rows`."""
    kl = same = 0.0
    nll, nll_reference = [], []
    for (ids, values), (_, expected) in zip(_pairs(rows, logits), _pairs(rows, reference), strict=True):
        if values.shape[1] != expected.shape[1]:
            raise PhiquantError(f"the vocabularies differ: {values.shape[1]} and {expected.shape[1]} logits a token")
        expected = expected.to(values.device)
        same += (values[:-1].argmax(1) == expected[:-1].argmax(1)).sum().item()
        for (start, q), (_, p) in zip(_log_softmax(values[:-1]), _log_softmax(expected[:-1]), strict=True):
            kl += F.kl_div(q, p, reduction="none", log_target=True).sum(1).double().sum().item()
            targets = torch.tensor(ids[start + 1 : start + 1 + len(q)], device=q.device)[:, None]
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
        protocol=_protocol(rows),
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


def _pairs(rows: list[list[int]], logits: Iterable[Logits]) -> Iterator[tuple[list[int], torch.Tensor]]:
    for index, (ids, values) in enumerate(zip_longest(rows, logits)):
        if ids is None or values is None:
            raise PhiquantError(f"{len(rows)} windows need as many arrays of logits; window {index} has no counterpart")
        tensor = torch.as_tensor(values).detach()
        if tensor.dim() != 2 or len(tensor) != len(ids):
            raise PhiquantError(f"window {index} has {len(ids)} tokens; its logits have shape {list(tensor.shape)}")
        yield ids, tensor


def _log_softmax(values: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """(first row, float32 log-probabilities [rows, V]) in pieces of bounded size."""
    rows = max(1, _CHUNK // values.shape[1])
    for start in range(0, len(values), rows):
        yield start, values[start : start + rows].float().log_softmax(1)


def _exp(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf


def _protocol(rows: list[list[int]]) -> str:
    return (
        f"{len(rows)} consecutive windows of {len(rows[0])} tokens, none added in front, first token of each not scored"
    )
