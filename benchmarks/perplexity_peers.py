"""`evaluate`'s protocols beside the tools they imitate, on phi3-tiny: lm-eval, and the loop of transformers' guide.

    python benchmarks/perplexity_peers.py [--characters 6000] [--window 256]

In an environment of its own beside phiquant: `pip install lm-eval`. lm-eval's own HFLM computes loglikelihood_rolling,
and its own wikitext task the words and bytes; ours must agree to 1e-5. llama.cpp's program is not run here:
its rule is restated on the same logits in tests/python/test_protocols.py.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import sys

import phiquant as pq
import torch
from phiquant import evaluate


def lm_eval(model: object, tokenizer: object, documents: list[str], window: int) -> tuple[float, float, float]:
    """(word perplexity, byte perplexity, bits per byte)."""
    from lm_eval.api.instance import Instance
    from lm_eval.api.metrics import bits_per_byte, weighted_perplexity
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks.wikitext.preprocess_wikitext import process_results

    peer = HFLM(pretrained=model, tokenizer=tokenizer, max_length=window, batch_size=1, device="cpu")
    requests = [Instance("loglikelihood_rolling", {"page": d}, (d,), i) for i, d in enumerate(documents)]
    sums = peer.loglikelihood_rolling(requests, disable_tqdm=True)
    found = [process_results({"page": d}, [s]) for d, s in zip(documents, sums, strict=True)]
    words, bytes_, bits = (
        [one[key] for one in found] for key in ("word_perplexity", "byte_perplexity", "bits_per_byte")
    )
    return weighted_perplexity(words), weighted_perplexity(bytes_), bits_per_byte(bits)


@torch.no_grad()
def guide(model: object, tokenizer: object, text: str, window: int, stride: int) -> tuple[float, int]:
    """(nll, tokens) by the model's own loss, each window's mean weighed by the tokens that it is a mean of."""
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    total, tokens, previous = 0.0, 0, 0
    for begin in range(0, ids.shape[1], stride):
        end = min(begin + window, ids.shape[1])
        labels = ids[:, begin:end].clone()
        labels[:, : previous - begin if begin else 0] = -100
        count = int((labels[:, 1:] != -100).sum())
        total += model(ids[:, begin:end], labels=labels).loss.item() * count
        tokens, previous = tokens + count, end
        if end == ids.shape[1]:
            break
    return total / tokens, tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--characters", type=int, default=6000)
    parser.add_argument("--window", type=int, default=256)
    args = parser.parse_args()
    model, tokenizer = pq.load("phi3-tiny")
    text = pq.testing.heldout_text()[: args.characters]
    documents = [text[: args.characters // 3], text[args.characters // 3 :]]
    ok = True

    def line(name: str, theirs: float, ours: float) -> None:
        nonlocal ok
        ok = ok and math.isclose(theirs, ours, rel_tol=1e-5)
        print(f"{name:32} {theirs:14.8f} {ours:14.8f}")

    print(f"{'':32} {'theirs':>14} {'ours':>14}")
    for stride in (args.window, args.window // 2):
        nll, tokens = guide(model, tokenizer, text, args.window, stride)
        result = evaluate.perplexity(model, tokenizer, text, args.window, stride=stride)
        line(f"guide, stride {stride}, {tokens} tokens", math.exp(nll), result.perplexity)
        ok = ok and tokens == result.tokens
    found = evaluate.perplexity(model, tokenizer, documents, args.window, protocol="words")
    assert isinstance(found, evaluate.WordPerplexity)
    version = importlib.metadata.version("lm_eval")
    ours = (found.word_perplexity, found.byte_perplexity, found.bits_per_byte)
    names = ("words", "bytes", "bits of a byte")
    for name, a, b in zip(names, lm_eval(model, tokenizer, documents, args.window), ours, strict=True):
        line(f"lm-eval {version}, {name}", a, b)
    print(found.protocol)
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main()
