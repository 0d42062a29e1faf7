import json

import phiquant as pq
import pytest
import torch
from phiquant import testing
from phiquant.errors import PhiquantError
from phiquant.models import phi
from safetensors import safe_open

SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}


def test_a_sharded_checkpoint_loads(tmp_path):
    small = {**SMALL, "num_key_value_heads": 1}
    total = testing.generate_checkpoint("phi-3-mini", tmp_path, seed=3, shard_bytes=1 << 20, **small)
    model, tokenizer = pq.load(tmp_path)
    assert total == sum(p.numel() for p in model.parameters())
    assert (model.config.hidden_size, model.config.sliding_window, model.config.vocab_size) == (64, 2047, 32064)
    assert tokenizer.convert_tokens_to_ids("<|end|>") == 32007
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(0.02, rel=0.01)
    assert model.model.norm.weight.mean().item() == pytest.approx(1, abs=0.1)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert list(index["weight_map"]) == [name for name, _ in phi.tensors(model.config.to_dict())]
    with safe_open(tmp_path / index["weight_map"]["lm_head.weight"], "pt") as file:
        assert file.get_tensor("lm_head.weight").dtype == torch.bfloat16
    testing.generate_checkpoint("phi-3-mini", tmp_path / "again", seed=3, shard_bytes=1 << 20, **small)
    for path in tmp_path.glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_what_cannot_be_made(tmp_path):
    with pytest.raises(PhiquantError, match="there are phi-3-mini"):
        testing.generate_checkpoint("phi-2", tmp_path)
    with pytest.raises(PhiquantError, match="32064 tokens"):
        testing.generate_checkpoint("phi-3-mini", tmp_path, vocab_size=100)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(PhiquantError, match="there already"):
        testing.generate_checkpoint("phi-3-mini", tmp_path)
