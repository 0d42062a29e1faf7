"""Every variant of training through qat.train: learned grids, codes to start from, blocks, adapters, inputs."""

import copy
import dataclasses

import phiquant as pq
import pytest
import torch
from phiquant import lora, qat
from phiquant.errors import PhiquantError
from phiquant.learned import LearnedFakeQuantize, TrainedScales
from phiquant.modules import QATLinear, QuantizedLinear
from phiquant.qat_blocks import train_blocks
from phiquant.qat_optimizer import Steps

SETTINGS = qat.Settings(steps=8, batch=4, window=32, learning_rate=1e-3, seed=3, bfloat16=False, checkpoint_seconds=0)
BLOCKS = dataclasses.replace(SETTINGS, steps=0, block_steps=6, block_windows=16)
TEXT_LENGTH = 20_000
IDS = torch.arange(24).reshape(1, 24) * 7


@pytest.fixture(scope="module")
def text():
    return pq.testing.training_text(characters=TEXT_LENGTH)[:TEXT_LENGTH]


def digests(model):
    return {name: m.quantized.digests() for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}


def codes(model):
    return {name: value["codes"] for name, value in digests(model).items()}


def stop_after(steps):
    def progress(share, report):
        if report.steps == steps:
            raise KeyboardInterrupt

    return progress


VARIANTS = {
    "learned": ("int3-g32-sym-f16", {"range": "learned"}),
    "learned, two levels": ("nvfp4", {"range": "learned"}),
    "clip": ("uint4-g32-min-f16", {"range": "clip"}),
    "ternary": ("codebook3-tensor", {"range": "ternary"}),
    "codebook": ("codebook8-row", {"range": "learned"}),
    "scales": ("gguf:Q4_0", {"range": "scales"}),
    "from codes": ("int3-g32-sym", {"range": "learned", "start": "gptq"}),
    "adapters": ("int3-g32-sym", {"range": "learned", "rank": 2}),
    "inputs": ("int4-g32-sym", {"range": "mse", "activations": "int8-tensor-sym", "observer": "ema"}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_interrupted_run_of_any_variant_gives_the_same_bits(tiny_model, tokenizer, text, tmp_path, variant):
    spec, options = VARIANTS[variant]
    options = {"settings": dataclasses.replace(SETTINGS, steps=4, batch=2), "text": text, **options}
    whole, broken, again = (copy.deepcopy(tiny_model) for _ in range(3))
    full = qat.train(whole, tokenizer, spec, **options)
    with pytest.raises(KeyboardInterrupt):
        qat.train(broken, tokenizer, spec, folder=tmp_path, progress=stop_after(3), **options)
    report = qat.train(again, tokenizer, spec, folder=tmp_path, **options)
    assert report.curve == full.curve
    assert (report.steps, report.trained) == (full.steps, full.trained)
    assert digests(again) == digests(whole)
    assert digests(whole)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_another_range_is_another_run(tiny_model, tokenizer, text, tmp_path):
    settings = dataclasses.replace(SETTINGS, steps=1)
    first = copy.deepcopy(tiny_model)
    qat.train(first, tokenizer, "int4-g32-sym", text=text, settings=settings, range="learned", folder=tmp_path)
    with pytest.raises(PhiquantError, match="belongs to a run"):
        qat.train(tiny_model, tokenizer, "int4-g32-sym", text=text, settings=settings, range="lsq", folder=tmp_path)


@pytest.mark.parametrize("range", ["learned", "scales"])
def test_training_learns_scales_and_weights_each_at_its_rate(tiny_model, tokenizer, text, range):
    model, settings = copy.deepcopy(tiny_model), dataclasses.replace(SETTINGS, steps=30, scale_learning_rate=3e-3)
    start = pq.quantize(copy.deepcopy(tiny_model), "int3-g32-sym", "mse")
    report = qat.train(model, tokenizer, "int3-g32-sym", text=text, settings=settings, range=range)
    before, after = (pq.evaluate.compare(m, tiny_model, tokenizer, text[:3000], window=64).kl for m in (start, model))
    assert after < 0.95 * before
    assert (codes(model) == codes(start)) == (range == "scales")
    scales = sum(m.quantized.scales.numel() for m in model.modules() if isinstance(m, QuantizedLinear))
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, QuantizedLinear))
    assert report.trained == scales + (weights if range == "learned" else 0)
    assert report.optimizer_bytes == 8 * report.trained
    assert model.model.norm.weight.requires_grad


def test_scales_have_groups_of_their_own_without_decay(tiny_model):
    pq.prepare_qat(tiny_model, "int4-g32-sym", range="learned")
    steps = Steps(tiny_model, dataclasses.replace(SETTINGS, weight_decay=0.1))
    weights, *scales = steps.optimizer.param_groups
    assert (weights["lr"], weights["weight_decay"]) == (SETTINGS.learning_rate, 0.1)
    layers = [m.weight_quantizer for m in tiny_model.modules() if isinstance(m, QATLinear)]
    assert len(scales) == len(layers)
    for group, layer in zip(scales, layers, strict=True):
        assert group["params"] == [layer.scale]
        assert group["weight_decay"] == 0
        assert group["lr"] == pytest.approx(SETTINGS.scale_learning_rate * layer.scale.mean().item())


def test_training_begins_with_the_codes_of_the_solver(tiny_model, tokenizer, text):
    still = dataclasses.replace(SETTINGS, steps=1, learning_rate=1e-12, scale_learning_rate=1e-12)
    solved = copy.deepcopy(tiny_model)
    ids = qat.windows(qat.encode(tokenizer, text), 4 * 32, 64)
    pq.quantize(solved, "int3-g32-sym", "gptq_mse", calibration=ids)
    for range in ("learned", "mse", "scales"):
        model = copy.deepcopy(tiny_model)
        qat.train(model, tokenizer, "int3-g32-sym", text=text, settings=still, range=range, start="gptq_mse")
        assert codes(model) == codes(solved)
    with pytest.raises(PhiquantError, match="the model has its codes"):
        qat.train(model, tokenizer, None, text=text, settings=still, start="gptq")
    origin = model.model.layers[0].mlp.down_proj.weight_quantizer.origin
    assert (origin["solver"], origin["range"], origin["from"]["solver"]) == ("qat", "scales", "gptq_mse")


def test_observers_stop_after_their_share(tiny_model, tokenizer, text):
    """freeze=0.5: what linears read in the second half of the steps no longer moves their ranges."""
    seen = []

    def progress(share, report):
        layer = tiny_model.model.layers[0].mlp.down_proj
        seen.append((layer.weight_quantizer.scale.clone(), layer.input_quantizer.scale.clone()))

    settings = dataclasses.replace(SETTINGS, freeze=0.5, learning_rate=1e-2)
    qat.train(
        tiny_model, tokenizer, "int4-g32-sym", text=text, settings=settings, range="observer",
        activations="int8-tensor-sym", observer="minmax", progress=progress,
    )  # fmt: skip
    for i in range(2):
        assert not torch.equal(seen[0][i], seen[3][i])
        assert all(torch.equal(seen[3][i], later[i]) for later in seen[4:])


# --- blocks -------------------------------------------------------------------------------------------


def test_blocks_come_closer_than_the_codes_they_start_from(tiny_model, tokenizer, text):
    rounded = pq.quantize(copy.deepcopy(tiny_model), "int2-g32-sym", "mse")
    model, settings = copy.deepcopy(tiny_model), dataclasses.replace(BLOCKS, block_steps=30)
    report = qat.train(model, tokenizer, "int2-g32-sym", text=text, settings=settings, range="learned")
    rows = qat.windows(qat.encode(tokenizer, text), 32, 4)
    with torch.no_grad():
        wanted, before, after = (m.model(rows).last_hidden_state for m in (tiny_model, rounded, model))
    assert (after - wanted).square().mean() < 0.8 * (before - wanted).square().mean()
    assert report.steps == 2 * 30
    layer = tiny_model.model.layers[0]
    linears = sum(m.weight.numel() for m in layer.modules() if isinstance(m, torch.nn.Linear))
    assert report.trained == linears + linears // 32  # one layer's weights and scales at a time
    assert torch.equal(model.model.layers[1].input_layernorm.weight, tiny_model.model.layers[1].input_layernorm.weight)


def test_a_layer_that_is_done_is_not_trained_again(tiny_model, tokenizer, text, tmp_path, monkeypatch):
    inputs = {"activations": "int8-tensor-sym", "observer": "minmax"}

    def run(model, **options):
        how = {"settings": BLOCKS, "range": "learned", **inputs, **options}
        return qat.train(model, tokenizer, "gguf:Q4_0", text=text, **how)

    whole, broken, again = (copy.deepcopy(tiny_model) for _ in range(3))
    run(whole)
    with pytest.raises(KeyboardInterrupt):
        run(broken, folder=tmp_path, progress=stop_after(6))
    assert [path.name for path in (tmp_path / "blocks").iterdir()] == ["layer-0000.safetensors"]
    trained = []
    take = Steps.take
    monkeypatch.setattr(Steps, "take", lambda self, done: (trained.append(done), take(self, done))[1])
    run(again, folder=tmp_path)
    assert len(trained) == BLOCKS.block_steps
    assert digests(again) == digests(whole)
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, whole(IDS).logits)
    (tmp_path / "blocks" / "layer-0001.safetensors").write_bytes(b"no file of safetensors")
    with pytest.raises(PhiquantError, match=r"layer-0001.safetensors is damaged"):
        run(copy.deepcopy(tiny_model), folder=tmp_path)
    with pytest.raises(PhiquantError, match=r"layer-0000.safetensors belongs to a run"):
        run(copy.deepcopy(tiny_model), folder=tmp_path, settings=dataclasses.replace(BLOCKS, seed=9))


def test_end_to_end_after_blocks_trains_the_scales_alone_or_all(tiny_model, tokenizer, text):
    blocks = copy.deepcopy(tiny_model)
    qat.train(blocks, tokenizer, "int3-g32-sym", text=text, settings=BLOCKS, range="learned")
    for what in ("scales", "all"):
        settings = dataclasses.replace(BLOCKS, steps=4, end_to_end=what)
        model = copy.deepcopy(tiny_model)
        qat.train(model, tokenizer, "int3-g32-sym", text=text, settings=settings, range="learned")
        assert (codes(model) == codes(blocks)) == (what == "scales")
        assert digests(model) != digests(blocks)


def test_blocks_start_from_codes_and_round_inputs(tiny_model, tokenizer, text):
    qat.train(
        tiny_model, tokenizer, "int3-g32-sym", text=text, settings=BLOCKS, range="learned", start="gptq",
        activations="int8-token-sym",
    )  # fmt: skip
    layer = tiny_model.model.layers[0].mlp.down_proj
    assert layer.input_quantizer is not None
    assert layer.weight_quantizer.origin["block_steps"] == 6
    assert layer.weight_quantizer.origin["from"]["solver"] == "gptq"


def test_blocks_follow_a_phi_in_any_dtype(make_phi3):
    model = make_phi3(num_key_value_heads=1, tie_word_embeddings=True).to(torch.bfloat16)
    pq.prepare_qat(model, "int4-g32-sym", range="learned")
    train_blocks(model, {}, torch.arange(2000) % 4000, BLOCKS)
    assert model.model.layers[1].mlp.down_proj.weight.dtype == torch.bfloat16
    assert model.model.layers[1].mlp.down_proj.is_intact()
    assert model(IDS).logits.isfinite().all()
    with pytest.raises(PhiquantError, match="training by blocks follows a Phi3ForCausalLM"):
        train_blocks(torch.nn.Sequential(), {}, torch.arange(2000), BLOCKS)


# --- adapters -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("spec", "range"), [("int3-g32-sym-f16", "learned"), ("gguf:Q4_0", "mse"), ("q4_k", "tensor")])
def test_adapters_merge_into_the_grid_without_another_rounding(make_phi3, spec, range, autocast):
    """Bar: 0 between the weights of the last forward and the decoded codes; the base stays as it was."""
    model = make_phi3(hidden_size=256, intermediate_size=256)
    pq.prepare_qat(model, spec, range=range)
    base = {name: m.weight.detach().clone() for name, m in model.named_modules() if isinstance(m, QATLinear)}
    adapters = lora.add_adapters(model, rank=4, seed=1)
    steps = Steps(model, dataclasses.replace(SETTINGS, learning_rate=1e-2))
    used = {}
    for name in base:
        layer = model.get_submodule(name)
        layer.weight_quantizer.register_forward_hook(lambda _m, _i, out, name=name: used.update({name: out.detach()}))
    for step in torch.arange(3):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(IDS, labels=IDS).loss
        loss.backward()
        steps.take(float(step) / 3)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model(IDS)
    for name, value in base.items():
        assert torch.equal(model.get_submodule(name).weight, value), name
        assert model.get_submodule(name).weight.grad is None
    assert all(p.abs().max() > 0 for p in adapters)  # B began as 0
    pq.convert(model)
    for name, value in used.items():
        assert torch.equal(model.get_submodule(name).quantized.dequantize(), value), name
        assert model.get_submodule(name).weight_quantizer.origin["adapter_rank"] == 4


def test_adapters_cost_their_rank(tiny_model, tokenizer, text):
    linears = [m for n, m in tiny_model.named_modules() if isinstance(m, torch.nn.Linear) and "layers" in n]
    expected = sum(2 * (m.in_features + m.out_features) for m in linears)
    report = qat.train(tiny_model, tokenizer, "gguf:Q4_0", text=text, settings=SETTINGS, rank=2)
    assert report.trained == expected
    assert report.optimizer_bytes == 8 * expected


def test_adapters_learn_the_sum(tiny_model):
    """Their gradients are those of W + s B A through the grid: B gets s G A^T, A gets s B^T G."""
    layer = tiny_model.model.layers[0].mlp.down_proj
    pq.prepare_qat(tiny_model, "int4-g32-sym", range="mse")
    lora.add_adapters(tiny_model, rank=3, alpha=6.0)
    adapter = layer.weight_quantizer
    torch.nn.init.normal_(adapter.lora_B, std=0.01, generator=torch.Generator().manual_seed(0))
    g = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(1))
    summed = (layer.weight + 2.0 * adapter.lora_B @ adapter.lora_A).detach().requires_grad_()
    adapter.grid(summed).backward(g)
    adapter(layer.weight).backward(g)
    torch.testing.assert_close(adapter.lora_B.grad, 2.0 * summed.grad @ adapter.lora_A.detach().t())
    torch.testing.assert_close(adapter.lora_A.grad, 2.0 * adapter.lora_B.detach().t() @ summed.grad)


def test_adapters_go_through_a_folder_in_the_words_of_peft(tiny_model, tmp_path):
    pq.prepare_qat(tiny_model, "int4-g32-sym")
    other = copy.deepcopy(tiny_model)
    for model, seed in ((tiny_model, 0), (other, 7)):
        lora.add_adapters(model, rank=2, alpha=3.0, seed=seed)
    for parameter in lora._adapters(tiny_model).values():
        torch.nn.init.normal_(parameter.lora_B, generator=torch.Generator().manual_seed(1))
    lora.save_adapters(tiny_model, tmp_path)
    from safetensors.torch import load_file

    state = load_file(tmp_path / lora.STATE)
    assert state["base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"].shape == (2, 256)
    lora.load_adapters(other, tmp_path)
    with torch.no_grad():
        assert torch.equal(other(IDS).logits, tiny_model(IDS).logits)
    third = pq.prepare_qat(pq.testing.random_phi3(), "int4-g32-sym")
    with pytest.raises(PhiquantError, match="has no adapters"):
        lora.load_adapters(third, tmp_path)
    lora.add_adapters(third, rank=4)
    with pytest.raises(PhiquantError, match=r"lora_A is \[4, .*\] here, \[2"):
        lora.load_adapters(third, tmp_path)
    with pytest.raises(PhiquantError, match="has an adapter already"):
        lora.add_adapters(third, rank=4)
    (tmp_path / lora.FACTS).write_text("{}")
    with pytest.raises(PhiquantError, match="no readable adapters"):
        lora.load_adapters(other, tmp_path)


def test_where_adapters_cannot_go(tiny_model):
    with pytest.raises(PhiquantError, match="call prepare_qat"):
        lora.add_adapters(tiny_model, rank=2)
    pq.prepare_qat(tiny_model, "int4-g32-sym", range="scales")
    with pytest.raises(PhiquantError, match="keeps its codes"):
        lora.add_adapters(tiny_model, rank=2)
    with pytest.raises(PhiquantError, match="at least 1"):
        lora.add_adapters(tiny_model, rank=0)
    assert isinstance(tiny_model.model.layers[0].mlp.down_proj.weight_quantizer, TrainedScales)


@pytest.mark.parametrize(
    "wrong",
    [
        {"scale_learning_rate": 0.0},
        {"freeze": 1.5},
        {"steps": 0},
        {"block_steps": -1},
        {"block_steps": 1, "block_windows": 2},
        {"end_to_end": "nothing"},
    ],
)
def test_settings_that_make_no_sense(wrong):
    with pytest.raises(PhiquantError):
        dataclasses.replace(SETTINGS, **wrong)


def test_a_learned_grid_goes_on_from_a_loaded_model(tiny_model, tokenizer, tmp_path):
    pq.quantize(tiny_model, "gguf:Q4_0", "mse")
    pq.export(tiny_model, tokenizer, tmp_path, format="gguf")
    model, _ = pq.load(tmp_path)
    pq.prepare_qat(model, range="learned")
    assert isinstance(model.model.layers[0].mlp.down_proj.weight_quantizer, LearnedFakeQuantize)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, tiny_model(IDS).logits)
    pq.convert(model)
    assert codes(model) == codes(tiny_model)
