"""Byte-level BPE: Hugging Face's tokenizer.json to GGUF's tokenizer model "gpt2"."""

from __future__ import annotations

from typing import Any

from ...errors import PhiquantError
from .vocab import CONTROL, NORMAL, USER_DEFINED, TokenizerFiles, Vocabulary, fill_holes, place

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CL100K = "|".join([
    _CONTRACTIONS, r"[^\r\n\p{L}\p{N}]?\p{L}+", r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+",
])  # fmt: skip
_O200K = "|".join([
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?",
    r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+",
])  # fmt: skip
# How the text is split before merging -> llama.cpp's name for it. Phi-4 is "dbrx". What llama.cpp calls "gpt-4o" is
# not o200k's pattern: it tears words at their combining marks (Hindi, Telugu, ...). The name here stands for the whole
# pattern and is known since May 2026; docs/runtimes/tokenizers.md says how to run the file in older builds.
_PRE = {_GPT2: "gpt-2", _CL100K: "dbrx", _O200K: "granite-embed-multi-97m"}
_PREFERS_WORDS = "granite-embed-multi-97m"  # it takes a word that is in the vocabulary before it merges
# And back: of a file with the older name, the tokenizer it was made of had the whole pattern.
PATTERNS = {name: pattern for pattern, name in _PRE.items()} | {"gpt-4o": _O200K}


def is_byte_level(tokenizer: dict[str, Any]) -> bool:
    """Whether tokenizer.json is BPE over bytes."""
    kind = (tokenizer.get("model") or {}).get("type")
    return kind == "BPE" and any(step.get("type") == "ByteLevel" for step in _steps(tokenizer))


def read(files: TokenizerFiles, size: int) -> Vocabulary:
    """Tokens stay in the GPT-2 spelling of bytes, in which tokenizer.json has them too."""
    source = files.folder / "tokenizer.json"
    model = files.tokenizer["model"]
    tokens: list[str | None] = [None] * size
    types = [NORMAL] * size
    for text, index in (model.get("vocab") or {}).items():
        place(tokens, index, text, source)
    for index, token in files.added.items():
        place(tokens, index, token.text, source)
        types[index] = CONTROL if token.special else USER_DEFINED
    warnings = []
    if files.tokenizer.get("normalizer"):
        warnings.append("the tokenizer normalizes text before splitting it; llama.cpp does not")
    pre = pre_tokenizer(files)
    if model.get("ignore_merges") and pre != _PREFERS_WORDS:
        warnings.append("the tokenizer prefers whole words over merges (ignore_merges); llama.cpp does not here")
    return Vocabulary("gpt2", pre, fill_holes(tokens, types), types, merges=_merges(model), warnings=warnings)


def pre_tokenizer(files: TokenizerFiles) -> str:
    """llama.cpp's name of the way tokenizer.json splits text. PhiquantError if it has none."""
    steps = _steps(files.tokenizer)
    byte_level = next(step for step in steps if step.get("type") == "ByteLevel")
    pattern = next((_pattern(step) for step in steps if step.get("type") == "Split"), None)
    if pattern is None and byte_level.get("use_regex", True):
        pattern = _GPT2
    name = _PRE.get(_normal(pattern)) if pattern is not None else None
    others = [step.get("type") for step in steps if step.get("type") not in ("Split", "ByteLevel")]
    if name is None or others or byte_level.get("add_prefix_space"):
        raise PhiquantError(
            f"{files.folder / 'tokenizer.json'}: llama.cpp has no name for this pre-tokenizer "
            f"({', '.join(str(s.get('type')) for s in steps)}, pattern {pattern!r}, "
            f"add_prefix_space {bool(byte_level.get('add_prefix_space'))}); those of GPT-2, cl100k (Phi-4) and o200k "
            "(Phi-4-mini) can be written. Export to safetensors instead"
        )
    return name


def _steps(tokenizer: dict[str, Any]) -> list[dict[str, Any]]:
    pre = tokenizer.get("pre_tokenizer") or {}
    return pre.get("pretokenizers") or [] if pre.get("type") == "Sequence" else [pre]


def _pattern(step: dict[str, Any]) -> str | None:
    pattern = step.get("pattern") or {}
    keeps = step.get("behavior") == "Isolated" and not step.get("invert")
    removes = step.get("behavior") == "Removed" and step.get("invert")
    return pattern.get("Regex") if keeps or removes else None


def _normal(pattern: str) -> str:
    """One spelling: possessive quantifiers change the speed only, and tiktoken shortens the contractions."""
    pattern = pattern.replace("?+", "?").replace("++", "+").replace(r"\s*[\r\n]|", r"\s*[\r\n]+|")
    return pattern.replace("'(?i:[sdmt]|ll|ve|re)", _CONTRACTIONS)


def _merges(model: dict[str, Any]) -> list[str]:
    """Merges as "left right"; a space inside a part is spelled as the byte it is."""
    merges = model.get("merges")
    if not merges:
        raise PhiquantError("tokenizer.json has no merges; llama.cpp needs them for a byte-level BPE")
    if isinstance(merges[0], str):
        return list(merges)
    return [" ".join(part.replace(" ", "\u0120") for part in pair) for pair in merges]
