"""The miniatures: real configurations, small sizes, tokenizers of the real structure."""

import json

import phiquant as pq
import pytest
import torch
from phiquant import miniature_tokenizers, testing
from phiquant.errors import PhiquantError
from phiquant.miniatures import MINIATURES, miniature_config
from phiquant.models import phi
from phiquant.models.configs import CONFIGS

NAMES = list(MINIATURES)
MIXED = "Hello <|user|>\n नमस्ते 😀 \n\n  12345\tdef f(): ఇది 你好 naïve\r\n"


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("phi-3-mini", 3_821_079_552),
        ("phi-3.5-mini", 3_821_079_552),
        ("phi-3-medium", 13_960_238_080),
        ("phi-4-mini", 3_836_021_760),
        ("phi-4", 14_659_507_200),
    ],
)
def test_the_real_configs_have_the_published_size(name, parameters):
    phi.check_architecture(CONFIGS[name])
    total = 0
    for _, shape in phi.tensors(CONFIGS[name]):
        total += int(torch.Size(shape).numel())
    assert total == parameters


@pytest.mark.parametrize("name", NAMES)
def test_sizes(name):
    config = miniature_config(name)
    assert config["hidden_size"] % 256 == config["intermediate_size"] % 256 == 0
    vocab = config["vocab_size"]
    shapes = [shape for tensor, shape in phi.tensors(config) if "embed" not in tensor and "lm_head" not in tensor]
    assert vocab not in {size for shape in shapes for size in shape}


@pytest.mark.parametrize("name", NAMES)
def test_features_are_the_real_ones(name):
    real, small = CONFIGS[name], miniature_config(name)
    for key in ("tie_word_embeddings", "partial_rotary_factor", "rope_theta", "rope_scaling", "rms_norm_eps"):
        assert small[key] == real[key], key
    assert phi.sizes(small).heads // phi.sizes(small).kv_heads == phi.sizes(real).heads // phi.sizes(real).kv_heads
    for key in ("sliding_window", "original_max_position_embeddings"):  # present, absent, larger than the context
        compared = [None if c[key] is None else c[key] < c["max_position_embeddings"] for c in (small, real)]
        assert compared[0] == compared[1], key
    if real["rope_scaling"]:
        assert phi.sizes(small).head_dim == phi.sizes(real).head_dim


@pytest.mark.parametrize("name", NAMES)
def test_model(name):
    model, tokenizer = testing.miniature(name)
    ids = torch.tensor([tokenizer(testing.heldout_text()[:600])["input_ids"][:150]])
    with torch.no_grad():
        logits = model(ids).logits
    assert 2 < logits.std() < 4
    again, other = testing.miniature(name)[0], testing.miniature(name, seed=1)[0]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert not torch.equal(model.model.layers[0].mlp.down_proj.weight, other.model.layers[0].mlp.down_proj.weight)
    model.model.norm.weight.data.zero_()
    assert testing.miniature(name)[0].model.norm.weight.abs().sum() > 0  # every call gets its own copy


@pytest.mark.parametrize("name", NAMES)
def test_special_ids(name):
    model, tokenizer = testing.miniature(name)
    for key in ("bos", "pad"):
        assert getattr(tokenizer, f"{key}_token_id") == getattr(model.config, f"{key}_token_id")
    stops = model.config.eos_token_id
    assert tokenizer.eos_token_id in (stops if isinstance(stops, list) else [stops])
    family = MINIATURES[name].family
    texts = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    assert tuple(texts[MINIATURES[name].pieces :]) == family.added
    assert len(set(texts)) == len(texts) <= model.config.vocab_size
    turn = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    end = "<|im_end|>" if name == "phi-4" else "<|end|>"
    assert end in turn
    assert tokenizer.convert_tokens_to_ids(end) in model.generation_config.eos_token_id


def test_real_ids_at_the_real_size():
    """The full vocabularies put <|end|> and its like where the published tokenizers have them."""
    for family, ids in (
        (miniature_tokenizers.PHI_3, {"<s>": 1, "<|endoftext|>": 32000, "<|end|>": 32007, "<|user|>": 32010}),
        (miniature_tokenizers.PHI_4_MINI, {"<|endoftext|>": 199999, "<|end|>": 200020, "<|user|>": 200021}),
        (miniature_tokenizers.PHI_4, {"<|endoftext|>": 100257, "<|im_end|>": 100265, "<|dummy_85|>": 100349}),
    ):
        tokenizer = miniature_tokenizers.tokenizer(family, family.size, 4096)
        assert {text: tokenizer.convert_tokens_to_ids(text) for text in ids} == ids
        small = miniature_tokenizers.tokenizer(family, miniature_tokenizers.TRAINED, 4096)
        assert tokenizer("def f(x): return 12 नम")["input_ids"] == small("def f(x): return 12 नम")["input_ids"]


def test_the_sentencepiece_structure():
    tokenizer = testing.miniature("phi-3-mini")[1]
    made = json.loads(tokenizer.backend_tokenizer.to_str())
    assert [step["type"] for step in made["normalizer"]["normalizers"]] == ["Prepend", "Replace"]
    assert made["pre_tokenizer"] is None
    assert (made["model"]["byte_fallback"], made["model"]["fuse_unk"], made["model"]["unk_token"]) == (
        True,
        True,
        "<unk>",
    )
    rstrip = {t["content"] for t in made["added_tokens"] if t["rstrip"]}
    assert {"</s>", "<|user|>", "<|end|>", "<|assistant|>"} <= rstrip
    assert not {"<s>", "<unk>", "<|endoftext|>"} & rstrip
    assert tokenizer.convert_ids_to_tokens(tokenizer("a\u1234")["input_ids"])[-3:] == ["<0xE1>", "<0x88>", "<0xB4>"]


@pytest.mark.parametrize("name", NAMES)
def test_text_survives_the_tokenizer(name):
    tokenizer = testing.miniature(name)[1]
    plain = MIXED.replace("<|user|>\n", "")
    ids = tokenizer(plain)["input_ids"]
    assert tokenizer.decode(ids) == plain
    assert len(ids) < len(plain.encode())
    assert len(tokenizer(MIXED)["input_ids"]) > len(ids)


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_miniature_loads(name, tmp_path):
    model, tokenizer = testing.miniature(name)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, loaded = pq.load(tmp_path)
    assert loaded(MIXED)["input_ids"] == tokenizer(MIXED)["input_ids"]
    ids = torch.tensor([tokenizer(MIXED)["input_ids"]])
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_unknown_names():
    with pytest.raises(PhiquantError, match="there are phi-3-mini"):
        testing.miniature("phi-2")
    with pytest.raises(ValueError, match="at least 1500"):
        miniature_tokenizers.tokenizer(miniature_tokenizers.PHI_4, 100, 10)
