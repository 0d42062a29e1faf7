"""The metrics against a numpy oracle that shares no code with them, and the protocol."""

import copy
import math

import numpy as np
import phiquant as pq
import pytest
import torch
from phiquant import evaluate
from phiquant.errors import PhiquantError


def log_softmax(x):
    x = np.asarray(x, dtype=np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def oracle(rows, logits, reference):
    """kl, same_top, and the NLLs of both, position by position, in float64."""
    kl, same, ours, theirs = [], [], [], []
    for ids, a, b in zip(rows, logits, reference, strict=True):
        q, p = log_softmax(a), log_softmax(b)
        for t in range(len(ids) - 1):
            kl.append((np.exp(p[t]) * (p[t] - q[t])).sum())
            same.append(np.argmax(a[t]) == np.argmax(b[t]))
            ours.append(-q[t, ids[t + 1]])
            theirs.append(-p[t, ids[t + 1]])
    return np.mean(kl), np.mean(same), np.array(ours), np.array(theirs)


@pytest.fixture
def case():
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 50, n).tolist() for n in (17, 17, 9)]
    logits = [rng.normal(size=(len(r), 50)).astype(np.float32) * 3 for r in rows]
    reference = [a + rng.normal(size=a.shape).astype(np.float32) for a in logits]
    return rows, logits, reference


def check(result, expected):
    kl, same, ours, theirs = expected
    assert result.kl == pytest.approx(kl, rel=1e-5)
    assert result.same_top == pytest.approx(same, abs=1e-12)
    assert result.perplexity == pytest.approx(math.exp(ours.mean()), rel=1e-5)
    assert result.reference_perplexity == pytest.approx(math.exp(theirs.mean()), rel=1e-5)
    assert result.nll_diff == pytest.approx((ours - theirs).mean(), rel=1e-4)
    assert result.nll_diff_se == pytest.approx((ours - theirs).std(ddof=1) / math.sqrt(len(ours)), rel=1e-4)
    assert result.tokens == len(ours)


def test_comparison_against_numpy(case):
    check(evaluate.compare_logits(*case), oracle(*case))


def test_perplexity_against_numpy(case):
    rows, logits, _ = case
    result = evaluate.perplexity_from_logits(rows, logits)
    nll = oracle(rows, logits, logits)[2]
    assert result.nll == pytest.approx(nll.mean(), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(nll.mean()), rel=1e-5)
    assert result.tokens == len(nll)


def test_pieces_do_not_change_the_result(case, monkeypatch):
    whole = evaluate.compare_logits(*case)
    monkeypatch.setattr(evaluate, "_CHUNK", 200)  # 4 positions at a time
    parts = evaluate.compare_logits(*case)
    assert parts.kl == pytest.approx(whole.kl, rel=1e-9)
    assert parts.nll_diff == pytest.approx(whole.nll_diff, rel=1e-9)


def test_half_precision_logits_are_scored_in_float32(case):
    rows, logits, _ = case
    halves = [torch.from_numpy(a).bfloat16() for a in logits]
    expected = evaluate.perplexity_from_logits(rows, [a.float() for a in halves])
    assert evaluate.perplexity_from_logits(rows, halves) == expected


def test_a_model_against_itself(tiny_model, tokenizer, short_text):
    result = evaluate.compare(tiny_model, tiny_model, tokenizer, short_text, window=64)
    assert result.kl == pytest.approx(0, abs=1e-9)
    assert (result.same_top, result.nll_diff, result.nll_diff_se) == (1.0, 0.0, 0.0)


def test_models_against_their_logits(tiny_model, tokenizer, short_text):
    quantized = pq.quantize(copy.deepcopy(tiny_model), "int3-g32-sym")
    rows = evaluate.windows(tokenizer, short_text, window=64)
    with torch.no_grad():
        logits = [quantized(torch.tensor([r])).logits[0].numpy() for r in rows]
        reference = [tiny_model(torch.tensor([r])).logits[0].numpy() for r in rows]
    result = evaluate.compare(quantized, tiny_model, tokenizer, short_text, window=64)
    check(result, oracle(rows, logits, reference))
    assert result.perplexity == pytest.approx(
        evaluate.perplexity(quantized, tokenizer, short_text, window=64).perplexity, rel=1e-9
    )


def test_phi3_tiny_predicts_source_code(phi3_tiny, short_text):
    model, tokenizer = phi3_tiny
    result = evaluate.perplexity(model, tokenizer, short_text * 2)
    assert result.perplexity < 100  # of a vocabulary of 4096; the opening comments of a file are the hardest


def test_the_mode_of_the_model_is_restored(tiny_model, tokenizer, short_text):
    tiny_model.train()
    evaluate.perplexity(tiny_model, tokenizer, short_text, window=64, limit=1)
    assert tiny_model.training


def test_windows_are_consecutive_and_whole(tokenizer, short_text):
    ids = tokenizer(short_text, add_special_tokens=False)["input_ids"]
    rows = evaluate.windows(tokenizer, short_text, window=50)
    assert [i for row in rows for i in row] == ids[: len(ids) // 50 * 50]
    assert evaluate.windows(tokenizer, short_text, window=50, limit=2) == rows[:2]
    assert evaluate.windows(tokenizer, "import os", window=50) == [tokenizer("import os")["input_ids"]]


def test_end_of_text_is_one_token(tokenizer):
    assert len(evaluate.windows(tokenizer, pq.testing.END_OF_TEXT * 8, window=8)[0]) == 8


def test_the_protocol_is_said(case):
    protocol = evaluate.compare_logits(*case).protocol
    assert "3 consecutive windows of 17 tokens" in protocol
    assert "first token of each not scored" in protocol


@pytest.mark.parametrize(("text", "window", "says"), [("", 8, "0 token"), ("a", 8, "at least 2"), ("a b", 1, "window")])
def test_text_that_cannot_be_scored(tokenizer, text, window, says):
    with pytest.raises(PhiquantError, match=says):
        evaluate.windows(tokenizer, text, window=window)


def test_logits_that_do_not_fit_are_refused(case):
    rows, logits, reference = case
    with pytest.raises(PhiquantError, match="window 2 has no counterpart"):
        evaluate.perplexity_from_logits(rows, logits[:2])
    with pytest.raises(PhiquantError, match="window 3 has no counterpart"):
        evaluate.perplexity_from_logits(rows, [*logits, logits[0]])
    with pytest.raises(PhiquantError, match=r"window 0 has 17 tokens; its logits have shape \[9, 50\]"):
        evaluate.perplexity_from_logits(rows, logits[::-1])
    with pytest.raises(PhiquantError, match="vocabularies differ: 50 and 40"):
        evaluate.compare_logits(rows, logits, [r[:, :40] for r in reference])
