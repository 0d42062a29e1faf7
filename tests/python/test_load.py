import json

import phiquant as pq
import pytest
import torch
from phiquant.errors import PhiquantError, UnsupportedModelError


@pytest.fixture
def folder(tmp_path, tiny_model, tokenizer):
    """A checkpoint of two shards."""
    tiny_model.save_pretrained(tmp_path, max_shard_size="3MB")
    tokenizer.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    return tmp_path


def test_the_embedded_model():
    model, tokenizer = pq.load("phi3-tiny")
    assert type(model).__name__ == "Phi3ForCausalLM"
    assert not model.training
    assert next(model.parameters()).dtype == torch.float32
    assert tokenizer.decode(tokenizer("import os")["input_ids"]) == "import os"


def test_a_folder_loads_as_saved(folder, tiny_model):
    model, _ = pq.load(folder)
    for name, value in tiny_model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_dtype(folder):
    model, _ = pq.load(str(folder), dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_a_missing_shard_is_named(folder):
    victim = sorted(folder.glob("model-*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(PhiquantError, match=victim.name):
        pq.load(folder)


def test_a_truncated_file_is_named(folder):
    victim = sorted(folder.glob("model-*.safetensors"))[0]
    victim.write_bytes(victim.read_bytes()[:-100])
    with pytest.raises(PhiquantError, match=rf"{victim.name} is damaged or incomplete"):
        pq.load(folder)


def test_a_broken_index_is_refused(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    with pytest.raises(PhiquantError, match="damaged, or not what it seems"):
        pq.load(folder)


def test_pickled_weights_are_refused(folder):
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(PhiquantError, match="pickle can run any code"):
        pq.load(folder)


def test_no_weights_at_all(folder):
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    with pytest.raises(PhiquantError, match=r"no \*\.safetensors"):
        pq.load(folder)


def test_a_missing_tokenizer_is_named(folder):
    for path in folder.glob("token*"):
        path.unlink()
    with pytest.raises(PhiquantError, match="tokenizer"):
        pq.load(folder)


def test_missing_weights_are_named(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(PhiquantError, match=r"missing keys model\.layers\.2"):
        pq.load(folder)


def test_weights_of_another_size_are_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 512}))
    with pytest.raises(PhiquantError, match=r"do not fit its config\.json"):
        pq.load(folder)


def test_tied_embeddings(tmp_path, make_phi3, tokenizer):
    saved = make_phi3(tie_word_embeddings=True)
    saved.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, _ = pq.load(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, saved.lm_head.weight)


def test_a_shard_outside_the_folder_is_not_read(folder):
    index = folder / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"]["lm_head.weight"] = "../../elsewhere.safetensors"
    index.write_text(json.dumps(data))
    with pytest.raises(PhiquantError, match=r"lacks the shard.*elsewhere"):
        pq.load(folder)


def test_another_architecture_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["PhimoeForCausalLM"], "model_type": "phimoe"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match=r"Phi-3\.5-MoE"):
        pq.load(folder)


@pytest.mark.parametrize("text", ["", "[]", '{"architectures": ', "\xff"])
def test_a_broken_config_is_refused(folder, text):
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(PhiquantError, match=r"config\.json"):
        pq.load(folder)


def test_a_path_that_is_not_there():
    with pytest.raises(PhiquantError, match=r"no folder '\./nowhere'"):
        pq.load("./nowhere")


def test_a_file_instead_of_a_folder(folder):
    with pytest.raises(PhiquantError, match="is a file"):
        pq.load(folder / "config.json")


def test_a_hub_name_offline_says_what_to_do():
    with pytest.raises(PhiquantError, match="Offline: copy the model's folder"):
        pq.load("microsoft/a-model-that-is-not-in-the-cache")
