"""What training and quantization do to layers: same names, same parameters, and what a user does with them."""

import copy
import io

import phiquant as pq
import pytest
import torch
import torch.nn.functional as F
from phiquant.modules import QATLinear, QuantizedEmbedding, QuantizedLinear
from torch import nn

SPECS = ["int4-g32-sym", "gguf:Q4_0", "uint4-g64-asym", "gguf:Q4_1", "int8-channel-sym", "int3-tensor-sym-bf16"]


def layer(seed=0, bias=True):
    torch.manual_seed(seed)
    return nn.Linear(64, 24, bias=bias)


def x(seed=1, dtype=torch.float32):
    return torch.randn(5, 64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def qat_layer(spec="int4-g32-sym", **options):
    model = nn.Sequential(layer())
    pq.prepare_qat(model, spec, **options)
    return model


@pytest.mark.parametrize("spec", SPECS)
def test_the_forward_is_that_of_the_fake_quantized_weight(spec):
    model = qat_layer(spec)
    expected = F.linear(x(), pq.fake_quantize(model[0].weight, spec), model[0].bias)
    assert isinstance(model[0], QATLinear)
    assert torch.equal(model(x()), expected)


@pytest.mark.parametrize("spec", SPECS)
def test_gradients_reach_weight_bias_and_input(spec):
    model, reference = qat_layer(spec), layer()
    inputs = x().requires_grad_()
    model(inputs).square().sum().backward()
    weight = pq.fake_quantize(reference.weight.detach(), spec).requires_grad_()
    again = x().requires_grad_()
    F.linear(again, weight, reference.bias).square().sum().backward()
    assert torch.equal(inputs.grad, again.grad)
    assert torch.equal(model[0].bias.grad, reference.bias.grad)
    passed = model[0].weight.grad == weight.grad  # where the code was not clamped
    assert passed.float().mean() > 0.9
    assert (model[0].weight.grad[~passed] == 0).all()


def test_parameters_stay_the_same_objects_under_the_same_names():
    model = nn.Sequential(layer())
    weight, bias, names = model[0].weight, model[0].bias, list(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pq.prepare_qat(model, "int4-g32-sym")
    assert model[0].weight is weight
    assert model[0].bias is bias
    assert list(model.state_dict()) == names
    before = weight.detach().clone()
    model(x()).sum().backward()
    optimizer.step()
    assert not torch.equal(weight, before)


def test_hooks_and_references_stay():
    model = nn.Sequential(layer())
    module, seen = model[0], []
    module.register_forward_hook(lambda *_: seen.append(1))
    pq.prepare_qat(model, "int4-g32-sym")
    model(x())
    assert model[0] is module
    assert seen == [1]


def test_autocast_rounds_the_float32_master_to_the_grid_first():
    model = qat_layer("int3-g32-sym")
    with torch.autocast("cpu", torch.bfloat16):
        result = model(x())
    grid = pq.fake_quantize(model[0].weight.detach(), "int3-g32-sym").bfloat16()
    expected = F.linear(x(dtype=torch.bfloat16), grid, model[0].bias.bfloat16())
    assert result.dtype == torch.bfloat16
    assert torch.equal(result, expected)
    result.float().sum().backward()
    assert model[0].weight.grad.dtype == torch.float32


@pytest.mark.parametrize("spec", ["int4-g32-sym", "gguf:Q4_1"])
def test_compile_fullgraph(spec):
    model = qat_layer(spec)
    compiled = torch.compile(model[0], fullgraph=True, backend="aot_eager")
    result = compiled(x())
    assert torch.allclose(result, model(x()), atol=1e-6)
    result.sum().backward()
    gradient = model[0].weight.grad.clone()
    model[0].weight.grad = None
    model(x()).sum().backward()
    assert torch.allclose(gradient, model[0].weight.grad, atol=1e-5)


def test_checkpointing_gives_the_same_gradients():
    from torch.utils.checkpoint import checkpoint

    plain, saving = qat_layer(), qat_layer()
    plain(x()).square().sum().backward()
    checkpoint(saving, x().requires_grad_(), use_reentrant=False).square().sum().backward()
    assert torch.equal(plain[0].weight.grad, saving[0].weight.grad)


@pytest.mark.parametrize("range", ["tensor", "observer", "mse", "learned"])
def test_a_copy_is_independent_and_equal(range):
    model = qat_layer(range=range)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x()), model(x()))
    with torch.no_grad():
        twin[0].weight.add_(1.0)
    assert twin[0].weight_quantizer is not model[0].weight_quantizer
    assert not torch.equal(twin(x()), model(x()))


@pytest.mark.parametrize("range", ["observer", "mse", "learned"])
def test_a_range_goes_through_the_state_dict(range):
    model, other = qat_layer(range=range), nn.Sequential(layer(seed=7))
    with torch.no_grad():
        model[0].weight.mul_(1.7)
    model(x())
    pq.prepare_qat(other, "int4-g32-sym", range=range)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(x()), model.eval()(x()))


@pytest.mark.parametrize("range", ["observer", "mse", "learned"])
def test_training_in_half_precision_keeps_the_grid(range):
    model = qat_layer("int3-g32-sym", range=range)
    scale = model[0].weight_quantizer.scale.clone()
    model.to(torch.bfloat16)
    assert torch.equal(model[0].weight_quantizer.scale, scale)
    assert model.eval()(x(dtype=torch.bfloat16)).dtype == torch.bfloat16
    pq.convert(model)
    assert torch.equal(model[0].quantized.scales, scale)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_quantized_linear_computes_with_the_decode_of_its_codes(spec, dtype):
    model = nn.Sequential(layer()).to(dtype)
    pq.quantize(model, spec)
    module = model[0]
    assert isinstance(module, QuantizedLinear)
    assert module.weight.dtype == dtype
    assert not module.weight.requires_grad
    assert torch.equal(module.weight, module.quantized.dequantize(dtype))
    assert module.quantized.spec == pq.spec(spec)
    assert torch.equal(model(x(dtype=dtype)), F.linear(x(dtype=dtype), module.weight, module.bias))


def test_a_change_of_dtype_keeps_the_grid():
    model = nn.Sequential(layer())
    pq.quantize(model, "gguf:Q4_0")
    before, digests = model[0].weight.clone(), model[0].quantized.digests()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        model.to(dtype)
        assert model[0].weight.dtype == dtype
        assert model[0].quantized.digests() == digests
        assert model[0].is_intact()
    assert torch.equal(model[0].weight, before)


def test_an_edited_weight_is_noticed():
    model = nn.Sequential(layer())
    pq.quantize(model, "int4-g32-sym")
    assert model[0].checked("0").shape == (24, 64)
    model[0].weight.data[3, 5] += 0.5
    with pytest.raises(pq.PhiquantError, match=r"down_proj\.weight was changed after it was quantized"):
        model[0].checked("down_proj")
    model.to(torch.bfloat16).to(torch.float32)  # must not hide the edit
    assert not model[0].is_intact()


@pytest.mark.parametrize("spec", SPECS)
def test_codes_go_through_the_state_dict(spec):
    model, other = nn.Sequential(layer()), nn.Sequential(layer(seed=9))
    pq.quantize(model, spec)
    pq.quantize(other, spec)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert other[0].checked("0").digests() == model[0].quantized.digests()
    assert torch.equal(other(x()), model(x()))


def test_state_dict_names():
    model = nn.Sequential(layer(bias=False))
    pq.quantize(model, "uint4-g32-asym")
    prefix = "0.weight_quantizer."
    assert list(model.state_dict()) == ["0.weight", prefix + "codes", prefix + "scales", prefix + "zero_points"]


def test_embedding():
    table = nn.Sequential(nn.Embedding(40, 64))
    ids = torch.tensor([[3, 39, 0]])
    recipe = pq.Recipe({"0": "int8-channel-sym"})
    expected = F.embedding(ids, pq.fake_quantize(table[0].weight.detach(), "int8-channel-sym"))
    pq.prepare_qat(table, recipe)
    assert torch.equal(table(ids), expected)
    table(ids).sum().backward()
    assert table[0].weight.grad[3].abs().sum() > 0
    assert table[0].weight.grad[4].abs().sum() == 0
    pq.convert(table)
    assert isinstance(table[0], QuantizedEmbedding)
    assert torch.equal(table(ids), expected)


def test_repr_shows_the_grid():
    model = nn.Sequential(layer())
    pq.quantize(model, "gguf:Q4_0")
    assert "int4-g32-signmax-f16, shape=[24, 64]" in repr(model)
