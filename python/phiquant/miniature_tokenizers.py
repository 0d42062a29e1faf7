"""Small tokenizers of the two kinds that Phi models have, trained in a second on the standard library's source.

Same structure as the real ones: Phi-3's SentencePiece BPE with byte fallback, as Llama's fast tokenizer
spells it in tokenizer.json, and the byte-level BPE of Phi-4-mini (o200k pattern) and Phi-4 (cl100k pattern),
with the real special tokens, at the real distance from the end of the trained vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from .extras import need
from .texts import END_OF_TEXT, training_text

CHARACTERS = 400_000  # of source code to train on
TRAINED = 1500  # pieces that training gives; a larger vocabulary is filled up with tokens no text has

# So that other scripts, too, are partly in the vocabulary and partly spelled in bytes.
SENTENCES = (
    "नमस्ते दुनिया, यह हिन्दी में एक छोटा वाक्य है। आज मौसम अच्छा है और हम किताब पढ़ रहे हैं।",
    "నమస్కారం ప్రపంచం, ఇది తెలుగులో ఒక చిన్న వాక్యం. ఈ రోజు వాతావరణం బాగుంది.",
    "你好、世界。这是一个很短的中文句子。今天天气很好。我们在读书。",
    "مرحبا بالعالم، هذه جملة قصيرة باللغة العربية. الطقس جميل اليوم.",
    "Привет, мир! Это короткое предложение на русском языке. Καλημέρα κόσμε, μια μικρή πρόταση.",
    "Ünïcödé naïve façade, Straße, ¿qué tal?, œuvre, 1½ €, “quotes” and 😀 👍 🎉 emoji ❤️.",
)

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CL100K = "|".join([
    CONTRACTIONS, r"[^\r\n\p{L}\p{N}]?\p{L}+", r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+",
])  # fmt: skip
O200K = "|".join([
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{CONTRACTIONS}?",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{CONTRACTIONS}?",
    r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+",
])  # fmt: skip
# What SentencePiece's trainer keeps apart: words, runs of spaces, each digit, letters from signs.
_SENTENCEPIECE_WORDS = r"▁+(?=▁)|▁?[\p{L}\p{M}]+|\p{N}|▁?[^▁\p{L}\p{M}\p{N}]+|▁"

_PHI_3_CHAT = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
_PHI_4_MINI_CHAT = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)
_PHI_4_CHAT = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '<|im_sep|>' + message['content'] + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """A kind of tokenizer. `size` is the real number of trained pieces; `added` are the tokens that follow.

    pattern: how text is split before merging, None for SentencePiece.
    """

    size: int
    pattern: str | None
    added: tuple[str, ...]
    bos: str
    eos: str
    chat: str
    pad: str = END_OF_TEXT
    ordinary: tuple[str, ...] = ()  # added tokens that are not special


_PHI_3_ADDED = (
    END_OF_TEXT, "<|assistant|>", *(f"<|placeholder{i}|>" for i in range(1, 5)), "<|system|>", "<|end|>",
    "<|placeholder5|>", "<|placeholder6|>", "<|user|>",
)  # fmt: skip
_PHI_4_MINI_TOOLS = ("<|tool|>", "<|/tool|>", "<|tool_call|>", "<|/tool_call|>", "<|tool_response|>", "<|tag|>")
_PHI_4_MINI_ADDED = (
    END_OF_TEXT, *(f"<|reserved_{i}|>" for i in range(18)), "<|endofprompt|>", "<|assistant|>", "<|end|>", "<|user|>",
    "<|system|>", *_PHI_4_MINI_TOOLS,
)  # fmt: skip
_PHI_4_ADDED = (
    "<|dummy_0|>", END_OF_TEXT, "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>",
    *(f"<|dummy_{i}|>" for i in range(1, 4)), "<|im_start|>", "<|im_end|>", "<|im_sep|>",
    *(f"<|dummy_{i}|>" for i in range(4, 13)), "<|endofprompt|>", *(f"<|dummy_{i}|>" for i in range(13, 88)),
)  # fmt: skip
PHI_3 = Family(32000, None, _PHI_3_ADDED, "<s>", END_OF_TEXT, _PHI_3_CHAT)
PHI_4_MINI = Family(
    199999, O200K, _PHI_4_MINI_ADDED, END_OF_TEXT, END_OF_TEXT, _PHI_4_MINI_CHAT, ordinary=_PHI_4_MINI_TOOLS
)
PHI_4 = Family(100256, CL100K, _PHI_4_ADDED, END_OF_TEXT, "<|im_end|>", _PHI_4_CHAT, pad="<|dummy_85|>")


def tokenizer(family: Family, size: int, context: int) -> Any:
    """A transformers tokenizer with `size` trained pieces (family.size gives the real ids) and the added tokens."""
    transformers = need("transformers", extra="hf")
    if size < TRAINED:
        raise ValueError(f"the vocabulary needs at least {TRAINED} pieces, not {size}")
    text = _sentencepiece(family, size) if family.pattern is None else _byte_level(family, size)
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=need("tokenizers", extra="hf").Tokenizer.from_str(text),
        bos_token=family.bos,
        eos_token=family.eos,
        pad_token=family.pad,
        unk_token="<unk>" if family.pattern is None else END_OF_TEXT,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
    made.chat_template = family.chat
    return made


@lru_cache(maxsize=8)
def _sentencepiece(family: Family, size: int) -> str:
    """tokenizer.json as transformers makes it of Llama's SentencePiece model with Phi-3's added tokens."""
    tokenizers = need("tokenizers", extra="hf")
    markers = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(_SENTENCEPIECE_WORDS), "isolated")
    lines = ["▁" + line.replace(" ", "▁") for text in _corpus() for line in text.splitlines() if line.isprintable()]
    vocab, _ = _train(trained, lines, TRAINED - len(markers), limit_alphabet=400, initial_alphabet=["▁"])
    # SentencePiece's order: merged pieces, best first, then the characters.
    pieces = markers + [t for t in vocab if len(t) > 1] + [t for t in vocab if len(t) == 1]
    known = set(pieces)
    merges = [
        (piece[:i], piece[i:])
        for piece in pieces[len(markers) :]
        for i in range(1, len(piece))
        if piece[:i] in known and piece[i:] in known
    ]
    pieces += [f"<unused{i}>" for i in range(size - len(pieces))]
    model = tokenizers.models.BPE(
        {text: i for i, text in enumerate(pieces)}, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    made = tokenizers.Tokenizer(model)
    normalizers, decoders, added = tokenizers.normalizers, tokenizers.decoders, tokenizers.AddedToken
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    made.add_special_tokens([added("<unk>"), added("<s>"), added("</s>", rstrip=True), added(family.added[0])])
    made.add_special_tokens([added(text, rstrip=True) for text in family.added[1:]])
    return str(made.to_str())


@lru_cache(maxsize=8)
def _byte_level(family: Family, size: int) -> str:
    """tokenizer.json of a byte-level BPE that splits text by the family's pattern."""
    tokenizers = need("tokenizers", extra="hf")
    pre = tokenizers.pre_tokenizers
    split = pre.Sequence([
        pre.Split(tokenizers.Regex(family.pattern), "isolated"), pre.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = split
    vocab, merges = _train(trained, _corpus(), TRAINED, initial_alphabet=sorted(pre.ByteLevel.alphabet()))
    vocab += [f"<unused{i}>" for i in range(size - len(vocab))]
    made = tokenizers.Tokenizer(tokenizers.models.BPE({text: i for i, text in enumerate(vocab)}, merges))
    made.pre_tokenizer = split
    made.decoder = tokenizers.decoders.ByteLevel()
    for text in family.added:
        special = text not in family.ordinary
        (made.add_special_tokens if special else made.add_tokens)([tokenizers.AddedToken(text, normalized=False)])
    return str(made.to_str())


def _train(trained: Any, texts: Sequence[str], size: int, **settings: Any) -> tuple[list[str], list[tuple[str, str]]]:
    """The pieces in the order of their ids, and the merges."""
    trainer = need("tokenizers", extra="hf").trainers.BpeTrainer(vocab_size=size, show_progress=False, **settings)
    trained.train_from_iterator(texts, trainer)
    model = json.loads(trained.to_str())["model"]
    merges = [(left, right) for left, right in model["merges"]]
    return sorted(model["vocab"], key=model["vocab"].__getitem__), merges


@lru_cache(maxsize=1)
def _corpus() -> list[str]:
    return [*training_text(CHARACTERS).split(END_OF_TEXT), *(SENTENCES * 20)]
