"""Tokenizers in GGUF: llama.cpp's ids against those of the tokenizers library, and what is refused."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
from gguf_cases import Tensors
from phiquant.errors import PhiquantError
from phiquant.formats.gguf import bpe as gguf_bpe
from phiquant.formats.gguf import spm as gguf_spm
from phiquant.formats.gguf import writer as gguf
from phiquant.formats.gguf.tokenizer import read_vocabulary
from phiquant.formats.gguf.vocab import CONTROL, UNUSED, read_files
from phiquant.runtimes import llamacpp

tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("xllamacpp")

TEXTS = [
    "Hello, world! It's 12345 o'clock, isn't it?",
    "def f(x):\n    return {k: v for k, v in x.items()}  # done\n\n\n\tif x:\r\n        pass\n",
    "   leading,  double   and trailing spaces   ",
    "emoji 🙂👍🏽 and 日本語, العربية, Ελληνικά",
    "नमस्ते दुनिया, यह हिन्दी है।",
    "naïve façade Ünïcödé ﬁne e\u0301",
    "",
    "https://example.org/a_b?c=d&e=%20#f 3.14159e-10 0xFF __init__",
    "CamelCase snake_case SHOUTING iPhone YES'LL we'Ve",
]
CHAT = "<|user|>\nWhat is 2 + 2?<|end|>\n<|assistant|>\nFour.<|end|><|endoftext|> \n<|user|>x<|end|>"
SPECIAL = ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]


def _write(model: Any, folder: Path, out: Path) -> Path:
    gguf.write(Tensors(model, folder), out)
    return out / gguf.FILE


def test_phi3_tiny(make_phi3: Any, tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    path = _write(make_phi3(num_hidden_layers=1), tmp_path, tmp_path / "out")
    texts = [*TEXTS, CHAT]
    expected = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert llamacpp.tokenize(path, texts) == expected
    assert llamacpp.tokenize(path, texts, add_special=True) == [tokenizer(text)["input_ids"] for text in texts]


def _byte_level(pattern: str | None, corpus: str) -> Any:
    """A byte-level BPE of 400 ids that splits by `pattern` (None: GPT-2's way) and has a hole at 350."""
    pre, bpe = tokenizers.pre_tokenizers, tokenizers.Tokenizer(tokenizers.models.BPE())
    if pattern is None:
        bpe.pre_tokenizer = pre.ByteLevel(add_prefix_space=False)
    else:
        split = pre.Split(tokenizers.Regex(pattern), behavior="isolated")
        bpe.pre_tokenizer = pre.Sequence([split, pre.ByteLevel(add_prefix_space=False, use_regex=False)])
    alphabet = sorted(pre.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=345, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator([corpus], trainer)
    bpe.add_special_tokens(SPECIAL)
    bpe.add_tokens(["<tool>"])
    return bpe


@pytest.mark.parametrize(
    ("pattern", "name"), [(None, "gpt-2"), (gguf_bpe._CL100K, "dbrx"), (gguf_bpe._O200K, "granite-embed-multi-97m")]
)
def test_byte_level(pattern: str | None, name: str, make_phi3: Any, short_text: str, tmp_path: Path) -> None:
    bpe = _byte_level(pattern, short_text + " ".join(TEXTS))
    bpe.save(str(tmp_path / "tokenizer.json"))
    vocabulary = read_vocabulary(tmp_path, 400, {})
    assert vocabulary.pre == name
    assert vocabulary.tokens[399] == "[PAD399]"
    assert vocabulary.types[399] == UNUSED
    path = _write(make_phi3(vocab_size=400, num_hidden_layers=1, pad_token_id=None), tmp_path, tmp_path / "out")
    texts = [*TEXTS, CHAT, "a <tool>b</tool>"]
    assert llamacpp.tokenize(path, texts) == [bpe.encode(text).ids for text in texts]


def test_patterns_have_several_spellings() -> None:
    tiktoken = (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
    )
    assert gguf_bpe._normal(tiktoken) == gguf_bpe._CL100K


def _pieces(corpus: str) -> tuple[list[str], list[tuple[str, str]]]:
    """Pieces in SentencePiece's order (markers, bytes, merged, characters), and all their merges, best first."""
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="always")
    trained.train_from_iterator([corpus], tokenizers.trainers.BpeTrainer(vocab_size=400, show_progress=False))
    vocab = trained.get_vocab()
    texts = sorted(vocab, key=vocab.__getitem__)
    merged, characters = [t for t in texts if len(t) > 1], [t for t in texts if len(t) == 1]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *merged, *characters]
    known = set(pieces)
    merges = [(t[:i], t[i:]) for t in merged for i in range(1, len(t)) if t[:i] in known and t[i:] in known]
    return pieces, merges


def _sentencepiece_like(corpus: str) -> tuple[Any, list[str]]:
    """A tokenizer as transformers makes it of Phi-3's SentencePiece model, with Phi-3's added tokens."""
    pieces, merges = _pieces(corpus)
    model = tokenizers.models.BPE(
        {t: i for i, t in enumerate(pieces)}, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    spm = tokenizers.Tokenizer(model)
    normalizers = tokenizers.normalizers
    spm.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    added = tokenizers.AddedToken
    spm.add_special_tokens([added("<unk>"), added("<s>"), added("</s>", rstrip=True), added(SPECIAL[0])])
    spm.add_special_tokens([added(text, rstrip=True) for text in SPECIAL[1:]])
    return spm, pieces


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _field(number: int, body: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(body)) + body


def _sentencepiece_model(pieces: list[str], kind: int = 2) -> bytes:
    """The protocol buffer that SentencePiece would write of these pieces."""
    message = b""
    for index, text in enumerate(pieces):
        type_ = 2 if text == "<unk>" else 3 if index < 3 else 6 if index < 259 else 1
        score = 0.0 if index < 259 else float(258 - index)
        message += _field(1, _field(1, text.encode()) + b"\x15" + struct.pack("<f", score) + b"\x18" + _varint(type_))
    return message + _field(2, b"\x18" + _varint(kind)) + _field(3, _field(1, b"identity") + b"\x18\x01\x20\x00")


@pytest.mark.parametrize("files", ["tokenizer.json", "tokenizer.model"])
def test_sentencepiece(files: str, make_phi3: Any, short_text: str, tmp_path: Path) -> None:
    spm, pieces = _sentencepiece_like(short_text + " ".join(TEXTS))
    size = spm.get_vocab_size() + 7
    spm.save(str(tmp_path / "tokenizer.json"))
    if files == "tokenizer.model":
        added = {t["id"]: t for t in json.loads((tmp_path / "tokenizer.json").read_text())["added_tokens"]}
        config = {"added_tokens_decoder": added, "add_bos_token": False, "bos_token": "<s>"}
        (tmp_path / "tokenizer.model").write_bytes(_sentencepiece_model(pieces))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        (tmp_path / "tokenizer.json").unlink()
    vocabulary = read_vocabulary(tmp_path, size, {"bos_token_id": 1, "eos_token_id": [2, 5]})
    assert (vocabulary.model, vocabulary.pre, vocabulary.strips_after_special) == ("llama", "default", True)
    assert (vocabulary.special["bos"], vocabulary.special["eos"], vocabulary.add_bos) == (1, 2, False)
    assert vocabulary.types[pieces.index("<s>")] == CONTROL
    path = _write(make_phi3(vocab_size=size, num_hidden_layers=1, pad_token_id=None), tmp_path, tmp_path / "out")
    texts = [*TEXTS, CHAT]
    assert llamacpp.tokenize(path, texts) == [spm.encode(text).ids for text in texts]


def test_sentencepiece_as_transformers_saves_it(make_phi3: Any, short_text: str, tmp_path: Path) -> None:
    """Its LlamaTokenizer writes another tokenizer.json than the one of Phi-3: Metaspace, "first"."""
    pieces, merges = _pieces(short_text + " ".join(TEXTS))
    transformers = pytest.importorskip("transformers")
    ours = transformers.LlamaTokenizer(vocab={t: i for i, t in enumerate(pieces)}, merges=merges, add_bos_token=True)
    ours.save_pretrained(tmp_path)
    vocabulary = read_vocabulary(tmp_path, len(pieces), {})
    assert (vocabulary.add_space_prefix, vocabulary.add_bos, vocabulary.special["unknown"]) == (True, True, 0)
    assert "that starts with none" in vocabulary.warnings[0]
    model = make_phi3(vocab_size=len(pieces), num_hidden_layers=1, pad_token_id=None)
    path = _write(model, tmp_path, tmp_path / "out")
    texts = [text for text in TEXTS if not text.startswith(" ")]
    assert llamacpp.tokenize(path, texts, add_special=True) == [ours(text)["input_ids"] for text in texts]


def test_sentencepiece_scores_from_both_files(short_text: str, tmp_path: Path) -> None:
    """The order of the merges says the same as the scores."""
    spm, pieces = _sentencepiece_like(short_text)
    spm.save(str(tmp_path / "tokenizer.json"))
    from_json = gguf_spm.read(read_files(tmp_path), len(pieces) + 5)
    (tmp_path / "tokenizer.model").write_bytes(_sentencepiece_model(pieces))
    from_model = gguf_spm.read(read_files(tmp_path), len(pieces) + 5)
    merged = [i for i, t in enumerate(pieces) if i >= 259 and len(t) > 1]

    def order(scores: list[float] | None) -> list[int]:
        assert scores is not None
        return sorted(merged, key=lambda i: -scores[i])

    assert order(from_json.scores) == order(from_model.scores)
    assert from_json.tokens == from_model.tokens
    assert from_json.types == from_model.types


def test_chat_template_and_bos(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    assert read_vocabulary(tmp_path, 4096, {}).chat_template == tokenizer.chat_template
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}]
    config["add_bos_token"] = True
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    vocabulary = read_vocabulary(tmp_path, 4096, {})
    assert (vocabulary.chat_template, vocabulary.add_bos, vocabulary.add_eos) == ("d", True, False)


def _changed(folder: Path, **changes: Any) -> None:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_tokenizers_llama_cpp_cannot_run_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"

    def refused(message: str, size: int = 4096, **changes: Any) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        tokenizer.save_pretrained(folder)
        _changed(folder, **changes)
        with pytest.raises(PhiquantError, match=message):
            read_vocabulary(folder, size, {})

    steps = json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"]["pretokenizers"]
    other = {**steps[0], "pattern": {"Regex": r"\d|\D+"}}
    refused("no name for this pre-tokenizer", pre_tokenizer={"type": "Sequence", "pretokenizers": [other, steps[1]]})
    digits = {"type": "Digits", "individual_digits": True}
    refused("Digits", pre_tokenizer={"type": "Sequence", "pretokenizers": [digits, *steps]})
    refused("neither byte-level BPE nor SentencePiece", model={"type": "WordPiece", "vocab": {}})
    refused("no merges", model={"type": "BPE", "vocab": {"a": 0}, "merges": []})
    refused("do not belong together", size=100)
    refused("the same text", added_tokens=[{"id": 4091, "content": "!", "special": True}])
    refused("malformed", added_tokens=[{"id": 4091}])


def test_broken_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(PhiquantError, match="not valid JSON"):
        read_vocabulary(tmp_path, 10, {})
    (tmp_path / "tokenizer.json").unlink()
    whole = _sentencepiece_model(["<unk>", "<s>", "</s>", "a"])
    for data in (b"\xff" * 20, whole[:9], b"", _sentencepiece_model(["<unk>"], kind=1)):
        (tmp_path / "tokenizer.model").write_bytes(data)
        with pytest.raises(PhiquantError, match=r"tokenizer\.model"):
            read_vocabulary(tmp_path, 10, {})
