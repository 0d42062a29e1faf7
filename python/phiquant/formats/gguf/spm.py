"""SentencePiece BPE (Phi-3, Phi-3.5): tokenizer.model, or tokenizer.json alone, to GGUF's model "llama".

llama.cpp merges the neighbours whose joined piece has the highest score, so the scores are what
decides. tokenizer.model holds them; from tokenizer.json they follow from the order of the merges.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import PhiquantError
from .vocab import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, TokenizerFiles, Vocabulary, fill_holes, place

ADDED_SCORE, UNUSED_SCORE = -1000.0, -10000.0  # what llama.cpp's converter writes
_BPE = 2  # TrainerSpec.model_type
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


@dataclass
class Pieces:
    """Pieces in the order of their ids."""

    texts: list[str]
    scores: list[float]
    types: list[int]
    add_space_prefix: bool


def read(files: TokenizerFiles, size: int) -> Vocabulary:
    """Pieces of tokenizer.model (or tokenizer.json), over them the added tokens, holes filled."""
    source = files.sentencepiece or files.folder / "tokenizer.json"
    pieces = read_model(source) if files.sentencepiece else _from_json(files, source)
    tokens: list[str | None] = [None] * size
    scores, types = [UNUSED_SCORE] * size, [UNUSED] * size
    for index, text in enumerate(pieces.texts):
        place(tokens, index, text, source)
        scores[index], types[index] = pieces.scores[index], pieces.types[index]
    for index, token in files.added.items():
        if 0 <= index < size and types[index] == UNKNOWN and tokens[index] == token.text:
            continue
        place(tokens, index, token.text, source)
        scores[index], types[index] = ADDED_SCORE, CONTROL if token.special else USER_DEFINED
    found = Vocabulary("llama", "default", fill_holes(tokens, types), types, scores)
    found.add_space_prefix = pieces.add_space_prefix
    if found.add_space_prefix and _scheme(files.tokenizer):
        found.warnings.append(
            "the tokenizer adds a space in front of a text that starts with none; llama.cpp adds one always, and after "
            "special tokens as well"
        )
    return found


def _from_json(files: TokenizerFiles, source: Path) -> Pieces:
    """A tokenizer.json with byte fallback, as transformers makes it of a SentencePiece model."""
    model = files.tokenizer["model"]
    vocab: dict[str, int] = model.get("vocab") or {}
    if sorted(vocab.values()) != list(range(len(vocab))):
        raise PhiquantError(f"{source}: the ids of the vocabulary are not 0..{len(vocab) - 1}; use tokenizer.model")
    rank: dict[str, int] = {}
    for index, pair in enumerate(model.get("merges") or []):
        rank.setdefault("".join(pair.split(" ", 1) if isinstance(pair, str) else pair), index)
    texts = sorted(vocab, key=vocab.__getitem__)
    scores = [-float(rank.get(text, len(rank))) for text in texts]
    unknown = model.get("unk_token") or files.config.get("unk_token")
    types = [UNKNOWN if t == unknown else BYTE if _BYTE.fullmatch(t) else NORMAL for t in texts]
    return Pieces(texts, scores, types, _prefixes_space(files.tokenizer))


def _prefixes_space(tokenizer: dict[str, Any]) -> bool:
    normalizer = tokenizer.get("normalizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    return _scheme(tokenizer) in ("first", "always") or any(step.get("type") == "Prepend" for step in steps)


def _scheme(tokenizer: dict[str, Any]) -> str | None:
    """Where a Metaspace pre-tokenizer puts a space: "always", "first", "never"; None if there is no such step."""
    pre = tokenizer.get("pre_tokenizer") or {}
    return pre.get("prepend_scheme", "always") if pre.get("type") == "Metaspace" else None


def read_model(path: Path) -> Pieces:
    """Parse a SentencePiece model (a protocol buffer). PhiquantError if it is broken or not BPE."""
    pieces = Pieces([], [], [], add_space_prefix=True)
    kind = 1  # SentencePiece's default: unigram
    try:
        for number, value in _fields(path.read_bytes()):
            if number == 1 and isinstance(value, bytes):
                part = dict(_fields(value))
                pieces.texts.append(bytes(part[1]).decode("utf-8"))
                pieces.scores.append(struct.unpack("<f", part.get(2, b"\0\0\0\0"))[0])
                pieces.types.append(int(part.get(3, NORMAL)))
            elif number == 2 and isinstance(value, bytes):
                kind = dict(_fields(value)).get(3, kind)
            elif number == 3 and isinstance(value, bytes):
                pieces.add_space_prefix = bool(dict(_fields(value)).get(3, 1))
    except (KeyError, IndexError, TypeError, ValueError, struct.error) as error:
        raise PhiquantError(f"{path} is not a whole SentencePiece model ({error!r}); fetch it again") from error
    if kind != _BPE or not pieces.texts:
        raise PhiquantError(f"{path}: only SentencePiece BPE can be written for llama.cpp, not model type {kind}")
    return pieces


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field of a protocol buffer message: int for varints, bytes for the rest."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            number_value, at = _varint(data, at)
            yield number, number_value
            continue
        if wire == 2:
            length, at = _varint(data, at)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if at + length > len(data):
            raise ValueError("it ends inside a field")
        yield number, data[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a number has no end")
