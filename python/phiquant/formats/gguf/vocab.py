"""A vocabulary as GGUF stores it, and the files of a Hugging Face tokenizer it is read from.

V = vocabulary: the rows of the embedding, which may be more than the tokenizer has.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import PhiquantError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


@dataclass
class Vocabulary:
    """What GGUF stores of a tokenizer. tokens, types and scores have V items, ids are their indices."""

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None = None
    merges: list[str] | None = None
    add_space_prefix: bool | None = None
    add_bos: bool = False
    add_eos: bool = False
    special: dict[str, int] = field(default_factory=dict)
    chat_template: str | None = None
    strips_after_special: bool = False
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class AddedToken:
    """A token beside the trained vocabulary, found in the text before it is split."""

    text: str
    special: bool
    rstrip: bool = False
    lstrip: bool = False


@dataclass(frozen=True)
class TokenizerFiles:
    """The files of a tokenizer's folder, parsed. `tokenizer` is tokenizer.json, {} if there is none."""

    folder: Path
    tokenizer: dict[str, Any]
    config: dict[str, Any]
    added: dict[int, AddedToken]

    @property
    def sentencepiece(self) -> Path | None:
        path = self.folder / "tokenizer.model"
        return path if path.is_file() else None


def read_files(folder: Path) -> TokenizerFiles:
    """Parse tokenizer.json, tokenizer_config.json and added_tokens.json, as far as they are there."""
    if not (folder / "tokenizer.json").is_file() and not (folder / "tokenizer.model").is_file():
        raise PhiquantError(
            f"{folder}: no tokenizer.json and no tokenizer.model; a GGUF file holds the tokenizer, so copy the "
            "tokenizer's files into this folder"
        )
    tokenizer, config = _json(folder / "tokenizer.json"), _json(folder / "tokenizer_config.json")
    added: dict[int, AddedToken] = {}
    for text, index in _json(folder / "added_tokens.json").items():
        added[int(index)] = AddedToken(text, special=False)
    listed = [(t.get("id"), t) for t in tokenizer.get("added_tokens") or []]
    for index, token in [*(config.get("added_tokens_decoder") or {}).items(), *listed]:
        flags = (bool(token.get(key)) for key in ("special", "rstrip", "lstrip"))
        added[int(index)] = AddedToken(token["content"], *flags)
    return TokenizerFiles(folder, tokenizer, config, added)


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise PhiquantError(f"{path} is not valid JSON ({error}); fetch the tokenizer's files again") from error
    if not isinstance(value, dict):
        raise PhiquantError(f"{path} must hold a JSON object; fetch the tokenizer's files again")
    return value


def place(tokens: list[str | None], index: int, text: str, source: Path) -> None:
    """Put `text` at id `index`; PhiquantError if the model has no such row."""
    if not isinstance(text, str) or not 0 <= index < len(tokens):
        raise PhiquantError(
            f"{source}: token {text!r} has id {index}, but the model's embedding has {len(tokens)} rows; tokenizer and "
            "model do not belong together"
        )
    tokens[index] = text


def fill_holes(tokens: list[str | None], types: list[int]) -> list[str]:
    """Ids without a token get a text of their own, as llama.cpp's converter names them."""
    for index, text in enumerate(tokens):
        if text is None:
            tokens[index], types[index] = f"[PAD{index}]", UNUSED
    return [text for text in tokens if text is not None]
