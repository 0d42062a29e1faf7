import json

import phiquant as pq
import pytest
from phiquant import stream
from phiquant.errors import PhiquantError, UnsupportedModelError
from phiquant.load import read_config
from phiquant.models import phi


def test_tensors_are_those_of_transformers(make_phi3):
    for tied in (False, True):
        model = make_phi3(tie_word_embeddings=tied)
        named = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        assert dict(phi.tensors(model.config.to_dict())) == named
        assert list(dict(phi.tensors(model.config.to_dict()))) == list(named)


def test_parameter_count_of_phi_4_mini():
    config = {
        "vocab_size": 200064, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
        "num_attention_heads": 24, "num_key_value_heads": 8, "tie_word_embeddings": True,
    }  # fmt: skip
    total = 0
    for _, shape in phi.tensors(config):
        count = 1
        for n in shape:
            count *= n
        total += count
    assert total == 3_836_021_760


def test_fused_rows_cover_the_linear(tiny_model):
    config = tiny_model.config.to_dict()
    for name in ("self_attn.qkv_proj", "mlp.gate_up_proj"):
        rows = phi.fused_rows(config, f"model.layers.1.{name}")
        weight = tiny_model.model.layers[1].get_submodule(name).weight
        covered = [i for part in rows.values() for i in range(part.start, part.stop)]
        assert covered == list(range(len(weight)))
    assert phi.fused_rows(config, "model.layers.0.mlp.down_proj") == {}


def test_is_matrix_knows_the_linears_and_the_embedding(tiny_model):
    from torch import nn

    for name, module in tiny_model.named_modules():
        assert phi.is_matrix(name) == isinstance(module, nn.Linear | nn.Embedding), name


@pytest.mark.parametrize(
    ("architecture", "model_type", "says"),
    [
        ("PhiForCausalLM", "phi", "Phi-2"),
        ("Phi3SmallForCausalLM", "phi3small", "block-sparse"),
        ("PhimoeForCausalLM", "phimoe", "16 experts"),
        ("Phi3VForCausalLM", "phi3_v", "image tower"),
        ("Phi4MMForCausalLM", "phi4mm", "LoRA"),
        ("Phi4MultimodalForCausalLM", "phi4_multimodal", "speech"),
        ("Phi4FlashForCausalLM", "phi4flash", "SambaY"),
        ("LlamaForCausalLM", "llama", "not supported"),
        ("Phi3ForSequenceClassification", "phi3", "not supported"),
    ],
)
def test_relatives_are_refused_by_name(architecture, model_type, says):
    with pytest.raises(UnsupportedModelError, match=says) as caught:
        phi.check_architecture({"architectures": [architecture], "model_type": model_type})
    assert architecture in str(caught.value)
    assert "Phi3ForCausalLM" in str(caught.value)


NAMED = {
    "phi": ("PhiForCausalLM", "Phi-1, Phi-1.5 and Phi-2"),
    "mixformer-sequential": ("MixFormerSequentialForCausalLM", "Phi-1.5"),
    "phi-msft": ("PhiForCausalLM", "Phi-2"),
    "phi3small": ("Phi3SmallForCausalLM", "Phi-3-small"),
    "phimoe": ("PhiMoEForCausalLM", "Phi-3.5-MoE"),
    "phi3_v": ("Phi3VForCausalLM", "Phi-3-vision"),
    "phi4mm": ("Phi4MMForCausalLM", "Phi-4-multimodal"),
    "phi4_multimodal": ("Phi4MultimodalForCausalLM", "Phi-4-multimodal"),
    "phi4flash": ("Phi4FlashForCausalLM", "Phi-4-mini-flash"),
}


@pytest.mark.parametrize("model_type", NAMED)
def test_every_relative_is_refused_wherever_it_comes_in(model_type, tmp_path):
    assert set(NAMED) == set(phi._RELATIVES)
    architecture, says = NAMED[model_type]
    for config in ({"model_type": model_type}, {"model_type": model_type, "architectures": [architecture]}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        for enter in (pq.load, lambda folder: stream.plan(folder, "gguf:Q4_0"), read_config):
            with pytest.raises(UnsupportedModelError, match=rf"is not supported: .*{says}.*phiquant supports Phi3For"):
                enter(tmp_path)


def test_a_quantized_checkpoint_is_refused():
    config = {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "quantization_config": {"quant_method": "gptq"},
    }
    with pytest.raises(UnsupportedModelError, match=r"already quantized \(gptq\)"):
        phi.check_architecture(config)


def test_phi3_passes(tiny_model):
    phi.check_architecture({**tiny_model.config.to_dict(), "architectures": ["Phi3ForCausalLM"]})


@pytest.mark.parametrize("broken", [{"hidden_size": 0}, {"hidden_size": "256"}, {"num_attention_heads": 3}])
def test_sizes_that_do_not_fit_are_refused(tiny_model, broken):
    with pytest.raises(PhiquantError, match=r"config\.json"):
        phi.sizes({**tiny_model.config.to_dict(), **broken})
