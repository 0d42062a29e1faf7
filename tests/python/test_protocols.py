"""Each protocol against the tool it imitates: its definition in float64 on the same logits, and figures it printed."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from phiquant import evaluate, protocols
from phiquant.errors import PhiquantError
from typer.testing import CliRunner


class Tokenizer:
    """Numbers to ids, with BOS 1 and EOS 2 as asked for."""

    def __init__(self, bos: int | None = None, eos: int | None = 2, adds: bool = False) -> None:
        self.bos_token_id, self.eos_token_id, self.adds = bos, eos, adds

    def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> dict[str, list[int]]:
        ids = [3 + int(word) % 40 for word in text.split() if word.isdigit()]
        return {"input_ids": [self.bos_token_id, *ids] if add_special_tokens and self.adds else ids}


def text_of(count: int, seed: int = 0) -> str:
    return " ".join(str(n) for n in np.random.default_rng(seed).integers(0, 40, count))


class Model:
    """Logits that depend on the ids and their place, but not on what comes later: a causal model."""

    def __init__(self, vocabulary: int = 43) -> None:
        rng = np.random.default_rng(1)
        self.own, self.before = rng.normal(size=(2, vocabulary, vocabulary)) * 2
        self.place = rng.normal(size=(64, vocabulary))

    def __call__(self, ids: list[int]) -> np.ndarray:
        x = np.array(ids)
        past = np.cumsum(self.before[x], axis=0) / np.arange(1, len(x) + 1)[:, None]
        return (self.own[x] + past + self.place[: len(x)]).astype(np.float32)

    def nll(self, ids: list[int]) -> np.ndarray:
        """Of each id but the first, given those before it."""
        logits = self(ids).astype(np.float64)
        logits -= logits.max(1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(1, keepdims=True))
        return -logits[np.arange(len(ids) - 1), ids[1:]]


def ours(name: str, tokenizer: Tokenizer, text: Any, **options: Any) -> evaluate.Perplexity:
    rows = protocols.protocol(name, tokenizer, text, **options)
    return evaluate.perplexity_from_logits(rows, [Model()(ids) for ids in rows.rows])


def ids_of(text: str) -> list[int]:
    return Tokenizer()(text)["input_ids"]


@pytest.mark.parametrize("stride", [1, 5, 12, 16])
@pytest.mark.parametrize("count", [10, 16, 50, 61])
def test_a_stride_as_the_guide_of_transformers(count: int, stride: int) -> None:
    """Its loop: windows from begin to begin + 16, the targets before the previous end masked."""
    ids, total, tokens, previous = ids_of(text_of(count)), 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + 16, len(ids))
        masked = np.arange(begin, end) >= previous  # the labels that are not -100
        nll = Model().nll(ids[begin:end])[masked[1:]]  # the labels are shifted by one
        total, tokens, previous = total + nll.sum(), tokens + len(nll), end
        if end == len(ids):
            break
    result = ours("window", Tokenizer(), text_of(count), window=16, stride=stride)
    assert result.tokens == tokens == (count - 1 if stride < 16 else tokens)
    assert result.nll == pytest.approx(total / tokens, rel=1e-6)
    assert f"of 16 tokens, stride {stride}, no BOS in front" in result.protocol


@pytest.mark.parametrize("bos", [None, 1])
def test_llama_cpp_s_rule(bos: int | None) -> None:
    """tools/perplexity/perplexity.cpp: chunks of n_ctx, BOS over the first token, those after the first half scored."""
    text, context = text_of(70), 15
    tokens = ([bos] if bos else []) + ids_of(text)
    total, count = 0.0, 0
    for chunk in range(len(tokens) // context):
        own = tokens[chunk * context : (chunk + 1) * context]
        if bos:
            own[0] = bos
        first = context // 2
        total += Model().nll(own)[first:].sum()
        count += context - first - 1
    result = ours("llama.cpp", Tokenizer(bos=bos, adds=bool(bos)), text, window=context)
    assert result.tokens == count
    assert result.nll == pytest.approx(total / count, rel=1e-6)
    assert ("BOS 1 over the first token of each" if bos else "the vocabulary asks for none") in result.protocol


def test_a_bos_that_the_vocabulary_does_not_ask_for_is_not_put_in_front() -> None:
    rows = protocols.protocol("llama.cpp", Tokenizer(bos=1, adds=False), text_of(40), window=10)
    assert all(ids[0] != 1 for ids in rows.rows)


def rolling(tokens: list[int], prefix: int, longest: int) -> list[tuple[list[int], list[int]]]:
    """(context, continuation) as lm-eval's documentation of loglikelihood_rolling has them, context length 1."""
    pairs = []
    done = 0
    while done < len(tokens):
        take = min(longest, len(tokens) - done)
        end = done + take
        context = [prefix] if done == 0 else tokens[max(0, end - longest - 1) : done]
        pairs.append((context, tokens[done:end]))
        done = end
    return pairs


@pytest.mark.parametrize(("bos", "prefix"), [(None, 2), (1, 1)])
def test_words_as_lm_eval_counts_them(bos: int | None, prefix: int) -> None:
    documents = [text_of(n, n) for n in (50, 16, 7, 33)] + [" 4 5\n"]
    total, tokens = 0.0, 0
    for document in documents:
        for context, continuation in rolling(ids_of(document), prefix, 16):
            total += Model().nll([*context, *continuation])[-len(continuation) :].sum()
            tokens += len(continuation)
    words = sum(len(re.split(r"\s+", d)) for d in documents)
    size = sum(len(d.encode()) for d in documents)
    result = ours("words", Tokenizer(bos=bos), documents, window=16)
    assert isinstance(result, evaluate.WordPerplexity)
    assert (result.tokens, result.words, result.bytes) == (tokens, words, size)
    assert result.word_perplexity == pytest.approx(math.exp(total / words), rel=1e-5)
    assert result.byte_perplexity == pytest.approx(math.exp(total / size), rel=1e-5)
    assert result.bits_per_byte == pytest.approx(total / size / math.log(2), rel=1e-5)
    assert f"{'BOS' if bos else 'EOS'} {prefix} in front of each document" in result.protocol


MEAN = '''def mean(values):
    """Return the arithmetic mean of the values."""
    total = 0.0
    for value in values:
        total += value
    return total / len(values)
'''
QUEUE = """class Queue:
    def __init__(self, size=None):
        self.items = []
        self.size = size

    def put(self, item):
        if self.size is not None and len(self.items) >= self.size:
            raise OverflowError("the queue is full")
        self.items.append(item)
"""


def test_the_figures_of_lm_eval_and_of_transformers(phi3_tiny: tuple[Any, Any]) -> None:
    """From lm-eval 0.4.13's HFLM and wikitext task, and transformers 5.23.0's loss: benchmarks/perplexity_peers.py."""
    words = evaluate.perplexity(*phi3_tiny, [MEAN, QUEUE], 24, protocol="words")
    assert isinstance(words, evaluate.WordPerplexity)
    assert words.word_perplexity == pytest.approx(762.0299976681715, rel=1e-5)
    assert words.byte_perplexity == pytest.approx(2.2578577241263385, rel=1e-6)
    assert words.bits_per_byte == pytest.approx(1.1749545794836564, rel=1e-6)
    strided = evaluate.perplexity(*phi3_tiny, MEAN + QUEUE, 24, stride=8)
    assert (strided.nll, strided.tokens) == (pytest.approx(2.399678810698087, rel=1e-6), 122)


def test_what_cannot_be_scored() -> None:
    tokenizer = Tokenizer()
    for name, options, says in (
        ("perplexity", {}, "unknown protocol 'perplexity'; known: window, llama.cpp, words"),
        ("llama.cpp", {"stride": 4}, "has no stride"),
        ("words", {"limit": 1}, "whole documents"),
        ("llama.cpp", {"window": 30}, "needs two windows, 60 tokens; the text has 50"),
        ("window", {"window": 8, "stride": 9}, "a stride is 1 to 8"),
    ):
        with pytest.raises(PhiquantError, match=re.escape(says)):
            protocols.protocol(name, tokenizer, text_of(50), **options)
    with pytest.raises(PhiquantError, match="BOS or EOS"):
        protocols.protocol("words", Tokenizer(eos=None), text_of(50))
    with pytest.raises(PhiquantError, match="no token to score"):
        protocols.protocol("words", tokenizer, "")
    with pytest.raises(PhiquantError, match="scores one text"):
        protocols.protocol("window", tokenizer, [text_of(9)])


def test_a_model_by_every_protocol(tiny_model: Any, tokenizer: Any, short_text: str) -> None:
    """Through the model: its logits are those of the rows, the mode of a comparison too."""
    for name, options in (("window", {"stride": 24}), ("llama.cpp", {}), ("words", {})):
        rows = protocols.protocol(name, tokenizer, short_text, 48, **options)
        with torch.no_grad():
            logits = [tiny_model(torch.tensor([ids])).logits[0] for ids in rows.rows]
        result = evaluate.perplexity(tiny_model, tokenizer, short_text, 48, protocol=name, **options)
        assert result == evaluate.perplexity_from_logits(rows, logits)
        same = evaluate.compare(tiny_model, tiny_model, tokenizer, short_text, 48, protocol=name, **options)
        assert (same.kl, same.tokens) == (pytest.approx(0, abs=1e-9), result.tokens)
        assert same.perplexity == pytest.approx(result.perplexity, rel=1e-9)


def test_the_command_line_says_the_protocol(tmp_path: Any, short_text: str) -> None:
    from phiquant.cli.app import app

    (tmp_path / "text.txt").write_text(short_text)
    shared = ["eval", "phi3-tiny", "--text", str(tmp_path / "text.txt"), "--window", "128", "--json"]
    for options, says in (
        (["--protocol", "words"], "words: 1 document(s)"),
        (["--protocol", "llama.cpp"], "llama.cpp: "),
        (["--stride", "64", "--limit", "3"], "3 windows of 128 tokens, stride 64, no BOS in front"),
    ):
        result = CliRunner().invoke(app, [*shared, *options])
        assert result.exit_code == 0, result.output
        data = json.loads(result.stdout)
        assert says in data["protocol"]
        assert ("word_perplexity" in data) == ("words" in options)
    assert CliRunner().invoke(app, [*shared, "--protocol", "words", "--stride", "4"]).exit_code != 0
