"""The tokenizer of a GGUF file as Hugging Face files again: exact, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import phiquant as pq
import pytest
from phiquant import PhiquantError
from phiquant.formats.gguf import reader as gguf_reader
from phiquant.formats.gguf.tokenizer_files import write_tokenizer
from transformers import AutoTokenizer

TEXTS = ["def main():\n    return 0\n", "नमस्ते 😀 తెలుగు", "<|user|>\n  hi<|end|>", "\t\r\n  x=1234567", ""]


@pytest.fixture
def metadata(tiny_model: Any, tokenizer: Any, tmp_path: Path) -> dict[str, Any]:
    pq.export(tiny_model, tokenizer, tmp_path / "gguf")
    return gguf_reader.read_metadata(tmp_path / "gguf" / "model.gguf")


def config(model: Any) -> dict[str, Any]:
    return json.loads(model.config.to_json_string())


def test_the_rebuilt_tokenizer_is_the_original(
    metadata: dict[str, Any], tiny_model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    write_tokenizer(metadata, config(tiny_model), tmp_path / "made")
    made = AutoTokenizer.from_pretrained(tmp_path / "made")
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert made(text)["input_ids"] == ids
        assert made.decode(ids) == tokenizer.decode(ids)
    assert made.chat_template == tokenizer.chat_template
    assert made.eos_token == tokenizer.eos_token
    pq.export(tiny_model, made, tmp_path / "again")
    first, again = (tmp_path / name / "model.gguf" for name in ("gguf", "again"))
    assert again.read_bytes() == first.read_bytes()


def test_tokens_that_encoding_adds_are_kept(metadata: dict[str, Any], tiny_model: Any, tmp_path: Path) -> None:
    metadata |= {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    write_tokenizer(metadata, config(tiny_model), tmp_path / "made")
    ids = AutoTokenizer.from_pretrained(tmp_path / "made")("x")["input_ids"]
    assert (ids[0], ids[-1]) == (4091, 4091)
    assert len(ids) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.model": "llama"}, "kind 'llama'"),
        ({"tokenizer.ggml.pre": "qwen2"}, "kind 'gpt2' / 'qwen2'"),
        ({"tokenizer.ggml.tokens": None}, "no vocabulary"),
        ({"tokenizer.ggml.scores": [0.0] * 4096}, "cannot be rebuilt exactly"),
    ],
)
def test_what_would_be_guessed_is_asked_for(
    metadata: dict[str, Any], tiny_model: Any, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(PhiquantError, match=f"{message}.*--tokenizer DIR"):
        write_tokenizer(metadata | changes, config(tiny_model), tmp_path / "made")
