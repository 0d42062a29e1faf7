"""read_rope() against the rotary embedding of transformers itself, for every spelling of a config."""

import copy
import math
from typing import Any

import pytest
import torch
from phiquant.errors import PhiquantError
from phiquant.miniatures import MINIATURES, miniature_config
from phiquant.models.configs import CONFIGS
from phiquant.models.rope import read_rope

transformers = pytest.importorskip("transformers")
LONGROPE = [name for name in MINIATURES if CONFIGS[name]["rope_scaling"]]


def old(config: dict[str, Any]) -> dict[str, Any]:
    """As the published checkpoints spell it: rope_theta and rope_scaling with "type"."""
    return config


def new(config: dict[str, Any]) -> dict[str, Any]:
    """As transformers 5 saves it: everything in rope_parameters."""
    return dict(transformers.Phi3Config(**copy.deepcopy(config)).to_dict())


def bare(config: dict[str, Any]) -> dict[str, Any]:
    """rope_parameters alone, with nothing of it beside them."""
    config = copy.deepcopy(config)
    scaling = dict(config.pop("rope_scaling") or {"type": "default"})
    scaling["rope_type"] = scaling.pop("type")
    for key in ("rope_theta", "partial_rotary_factor"):
        scaling[key] = config.pop(key)
    return {**config, "rope_parameters": scaling}


def agree(config: dict[str, Any]) -> None:
    """The same frequencies and factor as transformers' at lengths on both sides of every border."""
    rope = read_rope(config)
    embedding_class = transformers.models.phi3.modeling_phi3.Phi3RotaryEmbedding
    embedding = embedding_class(transformers.Phi3Config.from_dict(copy.deepcopy(config)))
    assert embedding.attention_scaling == pytest.approx(rope.attention_factor, rel=1e-7)
    lengths = {1, 2, 40, rope.original_context - 1, rope.original_context, rope.original_context + 1, rope.context}
    for length in lengths:
        cos, sin = embedding(torch.zeros(1), torch.arange(length)[None])
        factors = (rope.short if length <= rope.original_context else rope.long) or [1.0] * (rope.dimensions // 2)
        inverse = torch.tensor([
            1 / (factor * rope.theta ** (2 * i / rope.dimensions)) for i, factor in enumerate(factors)
        ])  # fmt: skip
        torch.testing.assert_close(embedding.inv_freq, inverse, rtol=1e-6, atol=0)
        angles = torch.arange(length)[:, None] * embedding.inv_freq
        assert cos.shape[-1] == rope.dimensions
        torch.testing.assert_close(cos[0, :, : len(factors)], angles.cos() * rope.attention_factor)
        torch.testing.assert_close(sin[0, :, : len(factors)], angles.sin() * rope.attention_factor)


@pytest.mark.parametrize("spelling", [old, new, bare])
@pytest.mark.parametrize("name", MINIATURES)
def test_every_miniature(name, spelling):
    agree(spelling(miniature_config(name)))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_real_configs(name):
    rope = read_rope(CONFIGS[name])
    assert rope.context == CONFIGS[name]["max_position_embeddings"]
    assert rope.dimensions == {"phi-3-medium": 128, "phi-4": 128}.get(name, 96)
    expected = 1.1902380714238083 if CONFIGS[name]["rope_scaling"] else 1.0  # sqrt(1 + ln 32 / ln 4096)
    assert rope.attention_factor == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("changes", [
    {"type": "su"}, {"type": "yarn"}, {"rope_type": "longrope"}, {"rope_type": "su", "type": "longrope"},
    {"attention_factor": 1.3}, {"factor": 16.0}, {"factor": 0.5}, {"rope_theta": 5e5}, {"partial_rotary_factor": 0.5},
    {"original_max_position_embeddings": 300},
])  # fmt: skip
@pytest.mark.parametrize("name", LONGROPE)
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_variants_of_longrope(name, key, changes):
    config = miniature_config(name)
    scaling = {**config.pop("rope_scaling"), **changes}
    if "su" in changes.values():  # transformers takes this name only with the original context beside it
        assert read_rope({**config, key: scaling}) == read_rope(miniature_config(name))
        scaling["original_max_position_embeddings"] = config["original_max_position_embeddings"]
    if "partial_rotary_factor" in changes:
        half = int(changes["partial_rotary_factor"] * config["hidden_size"] / config["num_attention_heads"]) // 2
        scaling |= {f"{side}_factor": scaling[f"{side}_factor"][:half] for side in ("short", "long")}
    agree({**config, key: scaling})


@pytest.mark.parametrize("name", LONGROPE)
def test_both_keys_and_no_original_context(name):
    config = miniature_config(name)
    agree({**config, "rope_parameters": {"rope_type": "default", "rope_theta": 77.0, "partial_rotary_factor": 1.0}})
    config["max_position_embeddings"] = 16384
    del config["original_max_position_embeddings"]
    assert read_rope(config).original_context == 4096
    agree(config)


def test_mscale():
    """Transformers' phi3 ignores it: only one that says the same is taken."""
    config = miniature_config("phi-4-mini")
    factor = read_rope(config).attention_factor
    for key in ("short_mscale", "long_mscale"):
        same = {**config, "rope_scaling": {**config["rope_scaling"], key: factor}}
        assert read_rope(same).attention_factor == factor
        agree(same)
        with pytest.raises(PhiquantError, match=rf"{key} 1\.25 belongs to Phi-3\.5-MoE"):
            read_rope({**config, "rope_scaling": {**config["rope_scaling"], key: 1.25}})


@pytest.mark.parametrize(("changes", "says"), [
    ({"short_factor": [1.0] * 47}, "list of 48 numbers"),
    ({"long_factor": None}, "list of 48 numbers"),
    ({"long_factor": [1.0] * 47 + [math.nan]}, "above 0, not nan"),
    ({"short_factor": [0.0] * 48}, "above 0"),
    ({"short_factor": ["1"] * 48}, "above 0, not '1'"),
    ({"attention_factor": "big"}, "attention_factor must be a number"),
    ({"rope_theta": -1.0}, "rope_theta must be a number above 0"),
    ({"partial_rotary_factor": 2.0}, "no even number"),
    ({"type": "linear"}, "none of Phi-3's"),
])  # fmt: skip
def test_what_is_refused(changes, says):
    config = miniature_config("phi-4-mini")
    with pytest.raises(PhiquantError, match=says):
        read_rope({**config, "rope_scaling": {**config["rope_scaling"], **changes}})
