"""Rounded inputs: grids and observers, W8A8 in torch against numpy, gradients, files that hold it, refusals."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import phiquant as pq
import pytest
import torch
from phiquant import PhiquantError
from phiquant.input_quantizers import input_grid, input_quantizer, round_inputs
from phiquant.modules import QATLinear, QuantizedLinear

WEIGHTS = "int8-channel-sym"


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 4096, (3, 24), generator=torch.Generator().manual_seed(0))


def inputs(rows: int = 5, width: int = 64) -> torch.Tensor:
    return torch.randn(2, rows, width, generator=torch.Generator().manual_seed(1)) * 3


def by_numpy(x: np.ndarray, lo: np.ndarray, hi: np.ndarray, bits: int, symmetric: bool) -> np.ndarray:
    """The formula in float64: s and z of a range, codes, values."""
    if symmetric:
        scale, zero = np.maximum(-lo, hi) / (2 ** (bits - 1) - 1), 0.0
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    else:
        lo, hi, low, high = np.minimum(lo, 0), np.maximum(hi, 0), 0, 2**bits - 1
        scale = (hi - lo) / high
        zero = np.rint(-lo / scale)
    return (np.clip(np.rint(x / scale) + zero, low, high) - zero) * scale


@pytest.mark.parametrize("text", ["int8-token-sym", "uint8-token-asym", "int6-token-sym", "int8-tensor-sym",
                                  "int16-tensor-sym", "uint16-tensor-asym", "uint8-tensor-asym"])  # fmt: skip
def test_dynamic_ranges_are_the_inputs_own(text: str) -> None:
    x = inputs()
    axes = -1 if "token" in text else None
    spec = pq.spec(text)
    lo, hi = (f(x.double().numpy(), axis=axes, keepdims=True) for f in (np.min, np.max))
    expected = by_numpy(x.double().numpy(), lo, hi, spec.element.bits, spec.symmetric)
    found = input_quantizer(text)(x).numpy()
    step = 2 * np.maximum(-lo, hi).max() / (2**spec.element.bits - 2)
    assert np.abs(found - expected).max() < 1.01 * step  # a value in the middle may go either way
    assert (np.abs(found - expected) > 1e-2 * step).mean() < 0.02


def test_small_floats_are_those_of_torch() -> None:
    x = inputs()
    scale = x.abs().amax(-1, keepdim=True) / 448
    expected = (x / scale).to(torch.float8_e4m3fn).float() * scale
    assert torch.allclose(input_quantizer("fp8_e4m3-token-sym")(x), expected, rtol=1e-6)


@pytest.mark.parametrize("text", ["int8-tensor-sym", "uint8-tensor-asym", "int16-tensor-sym", "uint16-tensor-asym"])
@pytest.mark.parametrize("kind", ["minmax", "ema", "percentile", "mse", "kl"])
def test_observed_ranges_are_those_of_the_observer(text: str, kind: Any) -> None:
    quantizer = input_quantizer(text, kind).train()
    batches = [inputs(400) * factor for factor in (1.0, 0.5)]
    for batch in batches:
        quantizer(batch)
    lo, hi = (float(end) for end in quantizer.observer.range())
    largest = max(batch.abs().max().item() for batch in batches)
    assert -largest <= lo < 0 < hi <= largest
    if kind == "minmax":
        assert (lo, hi) == (min(b.min().item() for b in batches), max(b.max().item() for b in batches))
    x = inputs(7)
    spec = quantizer.spec
    expected = by_numpy(x.double().numpy(), np.array(lo), np.array(hi), spec.element.bits, spec.symmetric)
    found = quantizer.eval()(x).numpy()
    step = (hi - lo) / (2**spec.element.bits - 1)
    assert (np.abs(found - expected) > 0.01 * step).mean() < (0.01 if spec.element.bits == 8 else 0.05)


def test_gradients_pass_inside_the_range_alone() -> None:
    quantizer = input_quantizer("int8-tensor-sym", "minmax").train()
    quantizer(torch.tensor([[-1.0, 1.0]]))
    x = torch.tensor([[-1.5, -1.0, -0.3, 0.9, 1.2]], requires_grad=True)
    quantizer.eval()(x).backward(torch.full((1, 5), 2.0))
    assert x.grad is not None
    assert x.grad.tolist() == [[0.0, 2.0, 2.0, 2.0, 0.0]]
    y = inputs().requires_grad_()
    input_quantizer("int8-token-sym")(y).sum().backward()
    assert y.grad is not None
    assert bool((y.grad == 1).all())


def test_w8a8_is_the_product_of_two_grids(tiny_model: Any, ids: torch.Tensor) -> None:
    pq.quantize(tiny_model, WEIGHTS, activations="int8-token-sym")
    layer = tiny_model.model.layers[0].mlp.down_proj
    x = inputs(5, layer.in_features)
    expected = by_numpy(x.double().numpy(), *(f(x.double().numpy(), axis=-1, keepdims=True) for f in (np.min, np.max)),
                        8, True) @ layer.quantized.dequantize().double().numpy().T  # fmt: skip
    assert torch.allclose(layer(x).detach().double(), torch.from_numpy(expected), atol=2e-2)
    plain = tiny_model(ids).logits
    integers = pq.compute_per_token(copy.deepcopy(tiny_model))(ids).logits  # the same, summed in int32
    assert (plain - integers).abs().max() < 1e-4 * plain.abs().max()
    round_inputs(tiny_model, None)
    assert (tiny_model(ids).logits - plain).abs().max() > 1e-3


def test_integers_refuse_another_grid(tiny_model: Any) -> None:
    pq.quantize(tiny_model, WEIGHTS, activations="fp8_e4m3-token-sym")
    with pytest.raises(PhiquantError, match="fp8_e4m3-token-sym"):
        pq.compute_per_token(tiny_model)


def test_static_ranges_are_found_on_the_windows(tiny_model: Any, ids: torch.Tensor) -> None:
    seen: list[torch.Tensor] = []
    pq.quantize(tiny_model, WEIGHTS)
    layer = tiny_model.model.layers[1].self_attn.o_proj
    hook = layer.register_forward_pre_hook(lambda m, x: seen.append(x[0]))
    tiny_model(ids)
    hook.remove()
    round_inputs(tiny_model, "int8-tensor-sym", "minmax", calibration=ids)
    largest = seen[0].abs().max()
    assert torch.allclose(layer.input_quantizer.scale.reshape(()), largest / 127)
    scale = layer.input_quantizer.scale.clone()
    tiny_model.train()(ids * 0 + 5)
    assert torch.equal(layer.input_quantizer.scale, scale)  # fixed


def test_mse_is_nearer_than_minmax_at_few_bits(tiny_model: Any, ids: torch.Tensor) -> None:
    reference = tiny_model(ids).logits
    pq.quantize(tiny_model, WEIGHTS)
    errors = {}
    for kind in ("minmax", "mse"):
        round_inputs(tiny_model, "int4-tensor-sym", kind, calibration=ids)
        errors[kind] = (tiny_model(ids).logits - reference).square().mean().item()
    assert errors["mse"] < errors["minmax"]


def test_training_observes_and_convert_keeps_the_range(tiny_model: Any, ids: torch.Tensor) -> None:
    pq.prepare_qat(tiny_model, WEIGHTS, activations="int8-tensor-sym", observer="ema")
    layer = tiny_model.model.layers[0].mlp.gate_up_proj
    assert isinstance(layer, QATLinear)
    tiny_model.train()(ids).logits.square().mean().backward()
    assert layer.weight.grad is not None
    first = layer.input_quantizer.scale.clone()
    tiny_model.eval()
    expected = tiny_model(ids).logits
    pq.convert(tiny_model)
    assert isinstance(layer, QuantizedLinear)
    assert torch.equal(tiny_model(ids).logits, expected)
    tiny_model.train()(ids * 0 + 7)
    assert torch.equal(layer.input_quantizer.scale, first)


def test_the_range_is_in_the_state(tiny_model: Any, ids: torch.Tensor) -> None:
    other = copy.deepcopy(tiny_model)
    for model, data in ((tiny_model, ids), (other, ids * 0 + 3)):
        pq.quantize(model, WEIGHTS, activations="int8-tensor-sym", observer="minmax", calibration=data)
    name = "model.layers.0.mlp.down_proj.input_quantizer.scale"
    assert not torch.equal(other.state_dict()[name], tiny_model.state_dict()[name])
    other.load_state_dict(tiny_model.state_dict())
    assert torch.equal(other(ids).logits, tiny_model(ids).logits)


def test_files_hold_the_grid_or_refuse_it(tiny_model: Any, ids: torch.Tensor, tokenizer: Any, tmp_path: Path) -> None:
    pq.quantize(tiny_model, WEIGHTS, activations="int8-token-sym")
    receipt = pq.export(tiny_model, tokenizer, tmp_path / "w8a8", format="safetensors")
    assert "safetensors:w8a8-int8" in receipt["targets"]
    group = json.loads((tmp_path / "w8a8/config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    assert group["input_activations"]["strategy"] == "token"
    assert group["input_activations"]["num_bits"] == 8
    assert pq.verify(tmp_path / "w8a8").ok
    with pytest.raises(PhiquantError, match="gguf files do not say; these targets hold it: safetensors:w8a8-int8"):
        pq.export(tiny_model, tokenizer, tmp_path / "gguf", format="gguf")
    with pytest.raises(PhiquantError, match="the option says fp8"):
        pq.export(tiny_model, tokenizer, tmp_path / "fp8", format="safetensors", activations="fp8_e4m3-token-sym")
    round_inputs(tiny_model, "uint8-tensor-asym", "minmax", calibration=ids)
    with pytest.raises(PhiquantError, match="the ranges of onnx are dynamic"):
        pq.export(tiny_model, tokenizer, tmp_path / "onnx", format="onnx")
    round_inputs(tiny_model, "uint8-tensor-asym")
    receipt = pq.export(tiny_model, tokenizer, tmp_path / "onnx", format="onnx")
    assert receipt["targets"] == ["onnx:int8-dynamic"]
    with pytest.raises(PhiquantError, match="the ranges of qnn are static"):
        pq.export(tiny_model, tokenizer, tmp_path / "qnn", format="qnn")
    assert not (tmp_path / "gguf").exists()
    assert not (tmp_path / "qnn").exists()


class _CompressedTensors(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = x.abs().amax(-1, keepdim=True) / 127.5
        return (x / scale).round().clamp(-128, 127) * scale


def test_transformers_rounds_the_same_inputs(
    tiny_model: Any, ids: torch.Tensor, tokenizer: Any, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    pq.quantize(tiny_model, WEIGHTS, activations="int8-token-sym")
    pq.export(tiny_model, tokenizer, tmp_path / "w8a8", format="safetensors")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "w8a8", dtype=torch.float32)
    ours, theirs = tiny_model(ids).logits, loaded(ids).logits
    unrounded = round_inputs(copy.deepcopy(tiny_model), None)(ids).logits
    assert (ours - theirs).square().mean() < 4 * (ours - unrounded).square().mean()
    # compressed-tensors divides by 127.5 where vLLM and we divide by 127; by its rule the logits are equal.
    for layer in tiny_model.modules():
        if isinstance(layer, QuantizedLinear):
            layer.input_quantizer = _CompressedTensors()
    assert (tiny_model(ids).logits - theirs).abs().max() < 1e-3 * theirs.abs().max()


def test_qnn_takes_static_ranges_and_finds_its_own(
    tiny_model: Any, ids: torch.Tensor, tokenizer: Any, tmp_path: Path
) -> None:
    pytest.importorskip("onnx")
    pq.quantize(tiny_model, WEIGHTS)
    round_inputs(tiny_model, "uint16-tensor-asym", "mse", calibration=ids)
    options = {"calibration": ids, "prefill": 8, "context": 16, "observer": "ema"}
    receipt = pq.export(tiny_model, tokenizer, tmp_path, format="qnn", **options)
    assert receipt["targets"] == ["qnn:a16w8"]
    assert json.loads((tmp_path / "activations.json").read_text())["observer"] == "ema"


def test_refusals(tiny_model: Any, ids: torch.Tensor) -> None:
    with pytest.raises(PhiquantError, match="inside the sum of the product"):
        input_quantizer("int8-channel-sym")
    with pytest.raises(PhiquantError, match="integers or small floats"):
        input_quantizer("nf4-g32-sym")
    with pytest.raises(PhiquantError, match="has a scale for each token"):
        input_quantizer("int8-token-sym", "minmax")
    with pytest.raises(PhiquantError, match="known: minmax, ema, percentile, mse, kl"):
        input_quantizer("int8-tensor-sym", "median")  # type: ignore[arg-type]
    with pytest.raises(PhiquantError, match="use the observer 'minmax', 'ema' or 'percentile'"):
        input_quantizer("fp8_e4m3-tensor-sym", "mse")
    with pytest.raises(PhiquantError, match="no linear with codes"):
        round_inputs(tiny_model, "int8-token-sym")
    before = copy.deepcopy(tiny_model.state_dict())
    with pytest.raises(PhiquantError, match="inside the sum"):
        pq.quantize(tiny_model, WEIGHTS, activations="int8-channel-sym")
    assert type(tiny_model.model.layers[0].mlp.down_proj) is torch.nn.Linear
    assert all(torch.equal(before[name], value) for name, value in tiny_model.state_dict().items())
    pq.quantize(tiny_model, WEIGHTS, activations="int8-token-sym")
    tiny_model.model.layers[0].mlp.down_proj.input_quantizer = None
    with pytest.raises(PhiquantError, match="no format holds that"):
        input_grid(tiny_model)
