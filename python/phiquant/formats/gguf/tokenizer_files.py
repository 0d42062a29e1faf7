"""The Hugging Face files of the tokenizer inside a GGUF file: only where nothing has to be guessed.

Byte-level BPE alone: tokens, merges and the name of the pre-tokenizer are all that such a tokenizer is. Of a
SentencePiece vocabulary GGUF does not keep how spaces around special tokens are treated: its own files are asked for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...errors import PhiquantError
from .bpe import PATTERNS
from .tokenizer import read_vocabulary
from .vocab import CONTROL, NORMAL, USER_DEFINED, Vocabulary

_KEY = "tokenizer.ggml."
_NAMES = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}  # GGUF's -> tokenizer_config.json's
_ASK = "give the folder of the model's own tokenizer: --tokenizer DIR"


def write_tokenizer(metadata: Mapping[str, Any], config: Mapping[str, Any], folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja into `folder`.

    metadata: the keys of the file; config: config.json. Proved before it returns: the files, read as an export
    reads them, give the very keys they were made of. PhiquantError otherwise, which asks for the tokenizer.
    """
    wanted = _vocabulary(metadata)
    if wanted.model != "gpt2" or wanted.pre not in PATTERNS:
        raise PhiquantError(
            f"the GGUF file has a tokenizer of the kind {wanted.model!r} / {wanted.pre!r}, whose Hugging Face files "
            f"do not follow from it; {_ASK}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "tokenizer.json", _tokenizer(wanted))
    _write(folder / "tokenizer_config.json", _settings(wanted))
    if wanted.chat_template is not None:
        (folder / "chat_template.jinja").write_text(wanted.chat_template, encoding="utf-8")
    made = read_vocabulary(folder, len(wanted.tokens), config)
    if replace(made, strips_after_special=False, warnings=[]) != wanted:
        raise PhiquantError(f"the tokenizer in the GGUF file cannot be rebuilt exactly; {_ASK}")


def _vocabulary(metadata: Mapping[str, Any]) -> Vocabulary:
    """The `tokenizer.*` keys. PhiquantError if the file has none."""
    keys = {name.removeprefix(_KEY): value for name, value in metadata.items() if name.startswith(_KEY)}
    if not isinstance(keys.get("tokens"), list) or len(keys.get("token_type") or []) != len(keys["tokens"]):
        raise PhiquantError(f"the GGUF file has no vocabulary; {_ASK}")
    special = {n.removesuffix("_token_id"): int(v) for n, v in keys.items() if n.endswith("_token_id")}
    return Vocabulary(
        model=str(keys.get("model")),
        pre=str(keys.get("pre")),
        tokens=keys["tokens"],
        types=[int(kind) for kind in keys["token_type"]],
        scores=keys.get("scores"),
        merges=keys.get("merges"),
        add_space_prefix=keys.get("add_space_prefix"),
        add_bos=bool(keys.get("add_bos_token")),
        add_eos=bool(keys.get("add_eos_token")),
        special=special,
        chat_template=metadata.get("tokenizer.chat_template"),
    )


def _tokenizer(v: Vocabulary) -> dict[str, Any]:
    added = [
        {"id": index, "content": v.tokens[index], "single_word": False, "lstrip": False, "rstrip": False}
        | {"normalized": False, "special": kind == CONTROL}
        for index, kind in enumerate(v.types)
        if kind in (CONTROL, USER_DEFINED)
    ]
    split = {"type": "Split", "pattern": {"Regex": PATTERNS[v.pre]}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": _post_processor(v),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {text: index for index, text in enumerate(v.tokens) if v.types[index] == NORMAL},
            "merges": [merge.split(" ", 1) for merge in v.merges or []],
        },
    }  # fmt: skip


def _post_processor(v: Vocabulary) -> dict[str, Any] | None:
    """The tokens that encoding adds in front and behind."""
    sides = [name for name, adds in (("bos", v.add_bos), ("eos", v.add_eos)) if adds and name in v.special]
    if not sides:
        return None
    texts = {name: v.tokens[v.special[name]] for name in sides}
    steps = [{"SpecialToken": {"id": text, "type_id": 0}} for text in texts.values()]
    single = [*(steps[:1] if "bos" in texts else []), {"Sequence": {"id": "A", "type_id": 0}}]
    single += steps[-1:] if "eos" in texts else []
    known = {text: {"id": text, "ids": [v.special[name]], "tokens": [text]} for name, text in texts.items()}
    return {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": known}


def _settings(v: Vocabulary) -> dict[str, Any]:
    named = {f"{_NAMES[name]}_token": v.tokens[index] for name, index in v.special.items() if name in _NAMES}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": v.add_bos,
        "add_eos_token": v.add_eos,
        **named,
    }


def _write(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, ensure_ascii=False, indent=1), encoding="utf-8")
