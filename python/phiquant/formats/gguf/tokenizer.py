"""The tokenizer of a Hugging Face folder as the keys of a GGUF file.

Two kinds: byte-level BPE (Phi-4-mini, Phi-4; GGUF model "gpt2", read in bpe.py) and
SentencePiece (Phi-3, Phi-3.5; GGUF model "llama", read in spm.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import PhiquantError
from . import bpe as gguf_bpe
from . import spm as gguf_spm
from .container import Metadata
from .vocab import TokenizerFiles, Vocabulary, read_files

# With these in the vocabulary, and a name that holds "phi-3", llama.cpp strips the space after special tokens.
PHI3_MARKERS = ("<s>", "</s>", "<unk>", "<|endoftext|>")
END_OF_TURN = "<|end|>"
_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # ours -> GGUF's


def read_vocabulary(folder: Path, size: int, config: Mapping[str, Any]) -> Vocabulary:
    """The vocabulary of `folder` with `size` = V ids; `config` is config.json (for special ids).

    PhiquantError if a file is missing or broken, or the tokenizer is of a kind llama.cpp cannot run.
    """
    try:
        return _read(folder, size, config)
    except PhiquantError:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise PhiquantError(f"{folder}: the tokenizer's files are malformed ({error!r}); fetch them again") from error


def _read(folder: Path, size: int, config: Mapping[str, Any]) -> Vocabulary:
    files = read_files(folder)
    if gguf_bpe.is_byte_level(files.tokenizer):
        vocabulary = gguf_bpe.read(files, size)
    elif files.sentencepiece or files.tokenizer.get("model", {}).get("byte_fallback"):
        vocabulary = gguf_spm.read(files, size)
    else:
        kind = files.tokenizer.get("model", {}).get("type")
        raise PhiquantError(
            f"{folder}: the tokenizer is neither byte-level BPE nor SentencePiece BPE (tokenizer.json has a model of "
            f"type {kind!r}); GGUF can hold those two"
        )
    _check_unique(vocabulary.tokens, folder)
    vocabulary.special = _special_ids(files, vocabulary.tokens, config)
    vocabulary.add_bos, vocabulary.add_eos = (_adds(files, side, vocabulary.model) for side in ("bos", "eos"))
    vocabulary.chat_template = _chat_template(files)
    rstrip = any(token.rstrip and token.special for token in files.added.values())
    known = set(vocabulary.tokens)
    vocabulary.strips_after_special = rstrip and all(text in known for text in PHI3_MARKERS)
    if any(token.lstrip for token in files.added.values()) or (rstrip and not vocabulary.strips_after_special):
        vocabulary.warnings.append(
            "the tokenizer removes the spaces around its special tokens; llama.cpp does that after those of a "
            "Phi-3 vocabulary only, so put no spaces there"
        )
    return vocabulary


def _check_unique(tokens: list[str], folder: Path) -> None:
    seen: dict[str, int] = {}
    for index, text in enumerate(tokens):
        if seen.setdefault(text, index) != index:
            raise PhiquantError(
                f"{folder}: the ids {seen[text]} and {index} have the same text {text!r}; llama.cpp refuses such a "
                "vocabulary. Remove one from the tokenizer's files"
            )


def _special_ids(files: TokenizerFiles, tokens: list[str], config: Mapping[str, Any]) -> dict[str, int]:
    """Ids of bos, eos, unknown, padding and eot: by the text in tokenizer_config.json, else from config.json."""
    index = {text: i for i, text in enumerate(tokens)}
    found = {}
    for ours, theirs in _SPECIAL.items():
        text = files.config.get(f"{ours}_token")
        text = text.get("content") if isinstance(text, dict) else text
        given = config.get(f"{ours}_token_id")
        given = given[0] if isinstance(given, list) and given else given
        value = index.get(text, given) if isinstance(text, str) else given
        if isinstance(value, int) and 0 <= value < len(tokens):
            found[theirs] = value
    if END_OF_TURN in index:
        found["eot"] = index[END_OF_TURN]
    return found


def _adds(files: TokenizerFiles, side: str, model: str) -> bool:
    """Whether encoding adds the bos (eos) token: as configured, else as tokenizer.json's post-processor does."""
    given = files.config.get(f"add_{side}_token")
    if isinstance(given, bool):
        return given
    if not files.tokenizer:
        return side == "bos" and model == "llama"  # SentencePiece tokenizers' own default
    text = files.config.get(f"{side}_token")
    text = text.get("content") if isinstance(text, dict) else text
    single = (files.tokenizer.get("post_processor") or {}).get("single") or []
    return text is not None and any((step.get("SpecialToken") or {}).get("id") == text for step in single)


def _chat_template(files: TokenizerFiles) -> str | None:
    path = files.folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = files.config.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = next((t.get("template") for t in template if t.get("name") == "default"), None)
    return template


def put_vocabulary(metadata: Metadata, vocabulary: Vocabulary) -> None:
    """Write the `tokenizer.*` keys."""
    prefix = "tokenizer.ggml"
    metadata.string(f"{prefix}.model", vocabulary.model)
    metadata.string(f"{prefix}.pre", vocabulary.pre)
    metadata.strings(f"{prefix}.tokens", vocabulary.tokens)
    if vocabulary.scores is not None:
        metadata.f32s(f"{prefix}.scores", vocabulary.scores)
    metadata.i32s(f"{prefix}.token_type", vocabulary.types)
    if vocabulary.merges is not None:
        metadata.strings(f"{prefix}.merges", vocabulary.merges)
    for name, index in vocabulary.special.items():
        metadata.u32(f"{prefix}.{name}_token_id", index)
    metadata.bool(f"{prefix}.add_bos_token", vocabulary.add_bos)
    metadata.bool(f"{prefix}.add_eos_token", vocabulary.add_eos)
    if vocabulary.add_space_prefix is not None:
        metadata.bool(f"{prefix}.add_space_prefix", vocabulary.add_space_prefix)
    if vocabulary.chat_template is not None:
        metadata.string("tokenizer.chat_template", vocabulary.chat_template)


def model_name(name: str, vocabulary: Vocabulary) -> str:
    """`general.name`. llama.cpp reads it: with "phi-3" in it, special tokens swallow the space that follows.

    Hugging Face's Phi-3 and Phi-3.5 tokenizers do that (rstrip), Phi-4's do not; the name follows them.
    """
    marked = "phi-3" in name.lower() or "phi3" in name.lower()
    if vocabulary.strips_after_special:
        return name if marked else f"{name} (Phi-3)" if name else "Phi-3"
    if not marked:
        return name or "Phi"
    lowered = name.lower()
    for mark in ("phi-3", "phi3"):
        while (at := lowered.find(mark)) >= 0:
            name, lowered = name[: at + 3] + name[at + len(mark) :], lowered[: at + 3] + lowered[at + len(mark) :]
    return name
