"""What a perplexity is of: which ids the model reads, and which of them are scored. Three rules, each in its own words.

window     windows of the text, token by token; with a stride they overlap, and each scores its new tokens alone
           (transformers' guide "Perplexity of fixed-length models")
llama.cpp  the second half of each window, the first half being context (llama-perplexity)
words      whole documents after a prefix token, counted by words and bytes (lm-eval's loglikelihood_rolling)

T = tokens in a window. docs/perplexity.md tells when two figures may be compared.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .errors import PhiquantError

PROTOCOLS = ("window", "llama.cpp", "words")


@dataclass(frozen=True)
class Window:
    """ids: what the model reads. targets: the ids that are scored, targets[i] by the logits of position first + i."""

    ids: list[int]
    targets: list[int]
    first: int


@dataclass(frozen=True)
class Protocol:
    """The windows of a text under one rule. text: protocol, window, stride and BOS rule. words, bytes: for "words"."""

    windows: list[Window]
    text: str
    words: int | None = None
    bytes: int | None = None

    @property
    def rows(self) -> list[list[int]]:
        """What the model reads, window by window."""
        return [window.ids for window in self.windows]


def protocol(
    name: str,
    tokenizer: Any,
    text: str | Sequence[str],
    window: int = 512,
    stride: int | None = None,
    limit: int | None = None,
) -> Protocol:
    """The windows of `text` (a document; "words" takes several) by the rule `name`, at most `limit` of them.

    stride: for "window" alone; None: windows do not overlap, and what is left over at the end is not scored.
    tokenizer: transformers' interface; "llama.cpp" and "words" ask it for bos_token_id (and eos_token_id).
    PhiquantError for a text that is too short, an unknown name, an option that the rule does not have.
    """
    if name not in PROTOCOLS:
        raise PhiquantError(f"unknown protocol {name!r}; known: {', '.join(PROTOCOLS)}")
    if stride is not None and name != "window":
        raise PhiquantError(f"the protocol {name} has no stride; leave --stride out, or use --protocol window")
    if window < 2:
        raise PhiquantError(f"a window has at least 2 tokens (the first is not scored), not {window}")
    if name == "words":
        if limit is not None:
            raise PhiquantError("the protocol words scores whole documents; instead of a limit give a shorter text")
        return _words(tokenizer, [text] if isinstance(text, str) else text, window)
    if not isinstance(text, str):
        raise PhiquantError(f"the protocol {name} scores one text; join the documents, or use 'words'")
    ids = encode(tokenizer, text)
    if len(ids) < 2:
        raise PhiquantError(f"the text has {len(ids)} token(s); at least 2 are needed to score one")
    if name == "llama.cpp":
        return _llama_cpp(tokenizer, ids, window, limit)
    return consecutive(cut(ids, window)[:limit]) if stride is None else _strided(ids, window, stride, limit)


def encode(tokenizer: Any, text: str) -> list[int]:
    """The text's ids, no token put in front."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def cut(ids: list[int], window: int) -> list[list[int]]:
    """Consecutive windows; what is left over at the end is dropped, unless it is all there is."""
    if len(ids) < window:
        return [ids]
    return [ids[start : start + window] for start in range(0, len(ids) - window + 1, window)]


def consecutive(rows: list[list[int]]) -> Protocol:
    """Given windows, each scored but for its first token."""
    length = len(rows[0])
    text = (
        f"window: {len(rows)} consecutive windows of {length} tokens, stride {length}, no BOS in front, "
        "first token of each not scored"
    )
    return Protocol([Window(ids, ids[1:], 0) for ids in rows], text)


def _strided(ids: list[int], window: int, stride: int, limit: int | None) -> Protocol:
    if not 1 <= stride <= window:
        raise PhiquantError(f"a stride is 1 to {window}, the window, not {stride}")
    windows, done = [], 0
    for start in range(0, len(ids), stride):
        end = min(start + window, len(ids))
        new = max(done, start + 1)  # a window's first token has no context
        if new < end:
            windows.append(Window(ids[start:end], ids[new:end], new - start - 1))
        done = end
        if end == len(ids):
            break
    text = (
        f"window: {len(windows[:limit])} windows of {window} tokens, stride {stride}, no BOS in front, each scores the "
        "tokens that are new and have one before them"
    )
    return Protocol(windows[:limit], text)


def _llama_cpp(tokenizer: Any, ids: list[int], window: int, limit: int | None) -> Protocol:
    bos = added_bos(tokenizer)
    ids = ids if bos is None else [bos, *ids]  # llama.cpp tokenizes with it, then puts it over each chunk's first token
    if len(ids) < 2 * window:
        raise PhiquantError(
            f"llama.cpp's rule needs two windows, {2 * window} tokens; the text has {len(ids)}: give more text, or a "
            "smaller window"
        )
    half, windows = window // 2, []
    for row in cut(ids, window)[:limit]:
        row = row if bos is None else [bos, *row[1:]]
        windows.append(Window(row, row[half + 1 :], half))
    rule = (
        "no BOS in front (the vocabulary asks for none)" if bos is None else f"BOS {bos} over the first token of each"
    )
    text = (
        f"llama.cpp: {len(windows)} consecutive windows of {window} tokens, stride {window}, {rule}, "
        f"the last {window - 1 - half} of each scored"
    )
    return Protocol(windows, text)


def _words(tokenizer: Any, documents: Sequence[str], window: int) -> Protocol:
    prefix, which = prefix_token(tokenizer)
    windows = []
    for document in documents:
        ids = [prefix, *encode(tokenizer, document)]
        for start in range(1, len(ids), window):
            end = min(start + window, len(ids))
            first = max(0, end - 1 - window)  # the last window reaches back to be as long as the others
            windows.append(Window(ids[first : end - 1], ids[start:end], start - 1 - first))
    if not windows:
        raise PhiquantError("the text has no token to score")
    text = (
        f"words: {len(documents)} document(s) in {len(windows)} windows of up to {window} tokens, stride {window}, "
        f"{which} {prefix} in front of each document, every token scored, one token of context at a window's start"
    )
    return Protocol(
        windows,
        text,
        words=sum(len(re.split(r"\s+", document)) for document in documents),  # lm-eval counts "" at the ends too
        bytes=sum(len(document.encode()) for document in documents),
    )


def added_bos(tokenizer: Any) -> int | None:
    """The BOS that the tokenizer puts in front of a text by itself; None if it does not."""
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is None:
        return None
    ids = tokenizer("a", add_special_tokens=True, verbose=False)["input_ids"]
    return bos if ids and ids[0] == bos else None


def prefix_token(tokenizer: Any) -> tuple[int, str]:
    """What stands before the first token of a document: BOS, else EOS (lm-eval's prefix_token_id)."""
    for name in ("bos", "eos"):
        token = getattr(tokenizer, f"{name}_token_id", None)
        if token is not None:
            return token, name.upper()
    raise PhiquantError("the protocol words needs a tokenizer with a BOS or EOS token; this one names neither")
