"""quantize, prepare_qat and convert on whole models."""

import builtins
import copy

import phiquant as pq
import pytest
import torch
from phiquant.modules import QATLinear, QuantizedEmbedding, QuantizedLinear

IDS = torch.randint(0, 4096, (2, 24), generator=torch.Generator().manual_seed(0))
SPECS = ["int3-g32-sym", "gguf:Q4_0", "gguf:Q4_1", "gguf:Q8_0", "uint3-g64-asym", "safetensors:int8-channel"]


def layers(model, kind):
    return {name for name, module in model.named_modules() if isinstance(module, kind)}


def quantizable(model):
    return {name for name in layers(model, torch.nn.Linear) if name != "lm_head"}


@pytest.mark.parametrize("solver", ["rtn", "mse"])
@pytest.mark.parametrize("spec", SPECS)
def test_every_linear_of_the_layers_gets_the_solvers_codes(tiny_model, spec, solver):
    reference = copy.deepcopy(tiny_model)
    assert pq.quantize(tiny_model, spec, solver=solver) is tiny_model
    assert layers(tiny_model, QuantizedLinear) == quantizable(reference)
    assert not layers(tiny_model, QuantizedEmbedding)
    for name in layers(tiny_model, QuantizedLinear):
        weight = reference.get_submodule(name).weight
        expected = pq.quantize_tensor(weight, pq.spec(spec), solver=solver)
        assert tiny_model.get_submodule(name).quantized.digests() == expected.digests()
    for name, parameter in reference.named_parameters():
        if name.removesuffix(".weight") not in quantizable(reference):
            assert torch.equal(tiny_model.get_parameter(name), parameter), name


def test_a_target_without_codes_changes_nothing(tiny_model):
    before = tiny_model(IDS).logits
    pq.quantize(tiny_model, "gguf:F16")
    assert not layers(tiny_model, QuantizedLinear)
    assert torch.equal(tiny_model(IDS).logits, before)


def test_a_recipe_mixes_grids(tiny_model):
    recipe = pq.Recipe(
        {"*.0.*": "int8-channel-sym", "*.down_proj": "float", "lm_head": "gguf:Q8_0"}, default="gguf:Q4_0"
    )
    pq.quantize(tiny_model, recipe)
    chosen = {name: str(tiny_model.get_submodule(name).quantized.spec) for name in layers(tiny_model, QuantizedLinear)}
    assert chosen["model.layers.0.mlp.down_proj"] == "int8-channel-sym"
    assert "model.layers.1.mlp.down_proj" not in chosen
    assert chosen["model.layers.1.self_attn.qkv_proj"] == "int4-g32-signmax-f16"
    assert chosen["lm_head"] == "int8-g32-sym-f16"


def test_mse_is_at_least_as_close_as_rtn(tiny_model):
    errors = {}
    for solver in ("rtn", "mse"):
        model = pq.quantize(copy.deepcopy(tiny_model), "int3-g32-sym", solver=solver)
        errors[solver] = sum(
            (model.get_parameter(f"{name}.weight") - tiny_model.get_parameter(f"{name}.weight")).square().sum().item()
            for name in quantizable(tiny_model)
        )
    assert errors["mse"] < errors["rtn"]


def test_progress_names_every_layer(tiny_model):
    calls = []
    pq.quantize(tiny_model, "gguf:Q8_0", progress=lambda *call: calls.append(call))
    assert [done for _, done, _ in calls] == list(range(9))
    assert calls[0] == ("model.layers.0.self_attn.o_proj", 0, 8)
    assert calls[-1] == ("done", 8, 8)


def test_a_bad_weight_leaves_the_model_as_it_was(tiny_model):
    with torch.no_grad():
        tiny_model.model.layers[1].mlp.down_proj.weight[2, 3] = float("nan")
    with pytest.raises(pq.PhiquantError, match=r"model\.layers\.1\.mlp\.down_proj\.weight.*\[2, 3\]"):
        pq.quantize(tiny_model, "gguf:Q4_0")
    assert not layers(tiny_model, QuantizedLinear)


@pytest.mark.parametrize("prepare", [pq.quantize, pq.prepare_qat])
def test_a_group_that_does_not_divide_is_named(tiny_model, prepare):
    with pytest.raises(ValueError, match=r"o_proj\.weight: group size 96 does not divide the last dimension 128"):
        prepare(tiny_model, "int4-g96-sym")
    assert not layers(tiny_model, QATLinear | QuantizedLinear)


def test_a_model_without_layers_is_refused():
    with pytest.raises(pq.PhiquantError, match=r"no torch\.nn\.Linear"):
        pq.quantize(torch.nn.LayerNorm(4), "gguf:Q8_0")


def test_each_step_only_once(tiny_model):
    with pytest.raises(pq.PhiquantError, match="call prepare_qat"):
        pq.convert(tiny_model)
    pq.prepare_qat(tiny_model, "gguf:Q4_0")
    for again in (pq.prepare_qat, pq.quantize):
        with pytest.raises(pq.PhiquantError, match=r"already prepared for QAT; convert\(model\) comes next"):
            again(tiny_model, "gguf:Q4_0")
    pq.convert(tiny_model)
    for again in (pq.prepare_qat, pq.quantize):
        with pytest.raises(pq.PhiquantError, match="codes are chosen once"):
            again(tiny_model, "gguf:Q4_0")
    with pytest.raises(pq.PhiquantError, match="call prepare_qat"):
        pq.convert(tiny_model)


def test_an_unknown_range_is_refused(tiny_model):
    with pytest.raises(pq.PhiquantError, match=r"range is 'tensor', .* or 'scales', not 'guess'"):
        pq.prepare_qat(tiny_model, "gguf:Q4_0", range="guess")


@pytest.mark.parametrize("range", ["tensor", "observer", "mse", "learned"])
@pytest.mark.parametrize("spec", SPECS)
def test_what_trains_is_what_converts(tiny_model, spec, range):
    """Bar: the largest difference between the weights of the last QAT forward and the decoded codes is 0."""
    pq.prepare_qat(tiny_model, spec, range=range)
    optimizer = torch.optim.SGD(tiny_model.parameters(), lr=1e-3)
    tiny_model.train()
    for _ in builtins.range(2):
        tiny_model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    used = {}
    for name in layers(tiny_model, QATLinear):
        quantizer = tiny_model.get_submodule(name).weight_quantizer
        quantizer.register_forward_hook(lambda _m, _i, out, name=name: used.update({name: out.detach().clone()}))
    with torch.no_grad():
        last = tiny_model(IDS).logits
    pq.convert(tiny_model)
    assert set(used) == layers(tiny_model, QuantizedLinear)
    for name, values in used.items():
        assert torch.equal(tiny_model.get_submodule(name).quantized.dequantize(), values), name
        assert torch.equal(tiny_model.get_submodule(name).weight, values), name
    assert torch.equal(tiny_model(IDS).logits, last)


def test_rtn_is_qat_without_training(tiny_model):
    trained = pq.convert(pq.prepare_qat(copy.deepcopy(tiny_model), "gguf:Q4_0"))
    rounded = pq.quantize(tiny_model, "gguf:Q4_0")
    for name in layers(rounded, QuantizedLinear):
        assert trained.get_submodule(name).quantized.digests() == rounded.get_submodule(name).quantized.digests()


def test_gradient_checkpointing_changes_nothing(tiny_model):
    plain, saving = copy.deepcopy(tiny_model), tiny_model
    saving.gradient_checkpointing_enable()
    for model in (plain, saving):
        pq.prepare_qat(model, "int4-g32-sym").train()
        model(IDS, labels=IDS, use_cache=False).loss.backward()
    for (name, a), (_, b) in zip(plain.named_parameters(), saving.named_parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-6), name


def test_tied_weights_share_one_grid(make_phi3):
    model = make_phi3(tie_word_embeddings=True)
    recipe = pq.Recipe({"lm_head": "gguf:Q8_0", "*embed_tokens": "gguf:Q8_0"}, default="gguf:Q4_0")
    for prepare in (lambda m: pq.quantize(m, recipe), lambda m: pq.convert(pq.prepare_qat(m, recipe))):
        tied = prepare(copy.deepcopy(model))
        assert isinstance(tied.model.embed_tokens, QuantizedEmbedding)
        assert tied.lm_head.weight is tied.model.embed_tokens.weight
        assert tied.lm_head.quantized.digests() == tied.model.embed_tokens.quantized.digests()
        assert tied(IDS).logits.isfinite().all()


def test_tied_weights_with_two_specs_are_refused(make_phi3):
    with pytest.raises(pq.PhiquantError, match="share one weight"):
        pq.quantize(make_phi3(tie_word_embeddings=True), pq.Recipe({"lm_head": "gguf:Q8_0"}, default="gguf:Q4_0"))


def test_tied_weights_stay_tied_in_float(make_phi3):
    model = pq.quantize(make_phi3(tie_word_embeddings=True), "gguf:Q4_0")
    assert model.lm_head.weight is model.model.embed_tokens.weight
