"""The tokenizer of every runtime against Hugging Face's, on 200 texts in many scripts, with each vocabulary.

docs/runtimes/tokenizers.md lists what differs; DIFFERENT pins that list.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import phiquant as pq
import pytest
from phiquant import testing
from phiquant.export import locate
from phiquant.formats import receipt
from phiquant.formats.gguf.tokenizer import read_vocabulary
from phiquant.formats.registry import FORMATS, find
from phiquant.runtimes import check, llamacpp

pytest.importorskip("xllamacpp")
TEXTS = json.loads((Path(__file__).parents[1] / "data" / "tokenizer_texts.json").read_text(encoding="utf-8"))
FAST = {"gguf"}  # the others load large packages in their own process
VOCABULARIES = ["phi-3-mini", "phi-4-mini", "phi-4"]

# Texts whose ids a runtime makes differently, by (format, vocabulary).
DIFFERENT: dict[tuple[str, str], set[str]] = {
    # After a special token that swallows white space, llama.cpp swallows ASCII's only.
    ("gguf", "phi-3-mini"): {"<|end|> \u00a0x", "<|end|>\u3000x"},
    # ONNX Runtime GenAI too; and it merges no further than 100 characters at a time.
    ("onnx", "phi-3-mini"): {"<|end|> \u00a0x", "<|end|>\u3000x", " " * 100 + "x"},
    # openvino-tokenizers takes a text that is spelled like a token which no merge makes for that token.
    ("openvino", "phi-3-mini"): {"<0x41> <0x0A>", "<unused3>"},
}
# Vocabularies are trained on the sources of the Python that runs: with some, no merge comes so late.
NOT_ALWAYS = {" " * 100 + "x"}


def cases() -> list[Any]:
    formats = [name for name in FORMATS if name != "qnn"]  # a QNN folder is run by ids
    return [
        pytest.param(name, vocabulary, marks=[] if name in FAST else pytest.mark.slow, id=f"{name}-{vocabulary}")
        for name in formats
        for vocabulary in VOCABULARIES
    ]


def exported(model: Any, tokenizer: Any, out: Path, format: str) -> Path:
    pq.export(model, tokenizer, out, format=format)
    return locate(out, receipt.read(out))


def test_the_texts() -> None:
    assert len(TEXTS) == len(set(TEXTS)) >= 200
    for name in VOCABULARIES:
        tokenizer = testing.miniature(name)[1]
        ids = [tokenizer(text)["input_ids"] for text in TEXTS]
        assert len({tuple(row) for row in ids}) > 190
        assert len({index for row in ids for index in row}) > 500


@pytest.mark.parametrize(("format", "vocabulary"), cases())
def test_ids(format: str, vocabulary: str, tmp_path: Path) -> None:
    model, tokenizer = testing.miniature(vocabulary)
    found = check.runtime_of(find(format)).tokenize(exported(model, tokenizer, tmp_path, format), TEXTS)
    expected = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    different = {text for text, a, b in zip(TEXTS, found, expected, strict=True) if a != b}
    known = DIFFERENT.get((format, vocabulary), set())
    assert different <= known
    assert known - different <= NOT_ALWAYS


def test_every_token_of_the_vocabulary_in_llama_cpp(tmp_path: Path) -> None:
    """Phi-4-mini's name in llama.cpp takes whole words from the vocabulary; merging gives the same."""
    model, tokenizer = testing.miniature("phi-4-mini")
    texts = [tokenizer.decode([index]) for index in range(len(tokenizer))]
    texts = [text for text in texts if "\ufffd" not in text and not text.startswith("<unused")]
    assert len(texts) > 1200
    path = exported(model, tokenizer, tmp_path, "gguf")
    assert llamacpp.tokenize(path, texts) == [tokenizer(text)["input_ids"] for text in texts]


def test_spaces_around_special_tokens_in_llama_cpp(tmp_path: Path) -> None:
    """Tokens that swallow spaces on both sides: llama.cpp cannot, and the export says so."""
    import tokenizers

    model, tokenizer = testing.miniature("phi-4")
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in content["added_tokens"]:
        token["lstrip"] = token["rstrip"] = True
    tokenizer._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
    path = exported(model, tokenizer, tmp_path, "gguf")
    assert "removes the spaces around" in " ".join(receipt.read(tmp_path)["warnings"])
    texts = ["<|im_start|>user<|im_sep|>Hi<|im_end|>", "a <|im_end|> b"]
    found = llamacpp.tokenize(path, texts)
    expected = [tokenizer(text)["input_ids"] for text in texts]
    assert (found[0] == expected[0], found[1] == expected[1]) == (True, False)


@pytest.mark.parametrize("name", VOCABULARIES)
def test_nothing_is_warned_of_without_need(name: str, tmp_path: Path) -> None:
    model, tokenizer = testing.miniature(name)
    tokenizer.save_pretrained(tmp_path)
    assert read_vocabulary(tmp_path, model.config.vocab_size, model.config.to_dict()).warnings == []
