"""Layers on codes against the decode of their codes, the course's two toys, and whole models in integers."""

from __future__ import annotations

import copy

import phiquant as pq
import pytest
import torch
import torch.nn.functional as F
from phiquant import digits, integer, ops
from phiquant.integer import ActivationQuantizer, IntegerWeight
from torch import Tensor, nn

WEIGHTS = ["int8-channel-sym", "int8-tensor-sym", "int8-channel-asym", "uint8-tensor-asym", "int4-channel-sym"]
ACTIVATIONS = ["uint8-tensor-asym", "int8-tensor-asym", "int8-tensor-sym", "int4-tensor-asym"]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def grid_of(x: Tensor, spec: str) -> ActivationQuantizer:
    observer = pq.MinMaxObserver(spec)
    observer(x)
    return ActivationQuantizer.from_observer(observer)


def steps_apart(found: pq.QuantizedTensor, exact: Tensor, relu: bool = False) -> float:
    """How many steps of its grid `found` is from the exact result, which is clamped as codes are."""
    grid = ActivationQuantizer(found.scales, 0 if found.zero_points is None else found.zero_points, found.spec)
    zero = int(grid.zero_point)
    lo = zero if relu else grid.spec.element.qmin
    ideal = (exact / grid.scale.double() + zero).clamp(lo, grid.spec.element.qmax)
    return (found.codes.double() - ideal).abs().max().item()


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("spec", WEIGHTS)
@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_linear_is_that_of_the_decoded_codes(spec: str, activations: str, relu: bool) -> None:
    x, w, bias = random(3, 7, 37), random(21, 37, seed=1), random(21, seed=2)
    qx, qw = grid_of(x, activations)(x), pq.quantize_tensor(w, spec)
    exact = F.linear(qx.dequantize(torch.float32).double(), qw.dequantize().double(), bias.double())
    output = grid_of(exact.float(), activations)
    found = integer.linear(qx, IntegerWeight.pack(qw), bias, output, relu)
    assert found.shape == (3, 7, 21)
    # half a step for each of the two roundings, and half of the bias's smaller steps
    assert steps_apart(found, exact, relu) <= 1.1


@pytest.mark.parametrize("spec", WEIGHTS)
@pytest.mark.parametrize("groups", [1, 2])
def test_convolution_is_that_of_the_decoded_codes(spec: str, groups: int) -> None:
    x, w, bias = random(2, 6, 9, 8) + 1, random(10, 6 // groups, 3, 2, seed=1), random(10, seed=2)
    window = {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)}
    qx, qw = grid_of(x, "uint8-tensor-asym")(x), pq.quantize_tensor(w, spec)
    assert int(qx.zero_points) != 0
    exact = F.conv2d(qx.dequantize().double(), qw.dequantize().double(), bias.double(), **window, groups=groups)
    output = grid_of(exact.float(), "uint8-tensor-asym")
    found = integer.conv2d(qx, IntegerWeight.pack(qw, groups), bias, output, **window)
    assert found.shape == exact.shape
    assert steps_apart(found, exact) <= 1.1


def test_a_channel_of_zeros_gives_its_bias() -> None:
    x, w, bias = random(4, 8), random(3, 8, seed=1), torch.tensor([0.5, -2.0, 1.0])
    w[1] = 0
    qw = pq.quantize_tensor(w, "int8-channel-sym")
    output = ActivationQuantizer(0.03, 100)
    found = integer.linear(grid_of(x, "uint8-tensor-asym")(x), IntegerWeight.pack(qw), bias, output)
    assert found.codes[:, 1].tolist() == [round(-2.0 / 0.03) + 100] * 4


def test_a_sum_that_could_exceed_32_bits_is_refused() -> None:
    x, w = grid_of(torch.ones(1, 4), "uint8-tensor-asym")(torch.ones(1, 4)), torch.full((2, 4), 1e-6)
    weight = IntegerWeight.pack(pq.quantize_tensor(w, "int8-channel-sym"))
    with pytest.raises(pq.PhiquantError, match="output channel 1 can exceed 32 bits"):
        integer.linear(x, weight, torch.tensor([0.0, 1e6]), ActivationQuantizer(1.0, 0))


def test_grids_that_integer_layers_cannot_take_are_refused() -> None:
    for spec in ("int8-g32-sym", "uint8-channel-min", "fp8_e4m3-channel-sym"):
        with pytest.raises(pq.PhiquantError, match="integers with one scale for each output channel"):
            IntegerWeight.pack(pq.quantize_tensor(random(4, 64), spec))
    with pytest.raises(pq.PhiquantError, match="one scale for the whole tensor"):
        ActivationQuantizer(1.0, 0, "int8-channel-sym")
    weight = IntegerWeight.pack(pq.quantize_tensor(random(4, 64), "int8-channel-sym"))
    with pytest.raises(pq.PhiquantError, match="one scale for the whole tensor"):
        integer.linear(pq.quantize_tensor(random(2, 64), "int8-token-sym"), weight, None, ActivationQuantizer(1.0, 0))
    with pytest.raises(ValueError, match="finite and above 0"):
        ActivationQuantizer(float("nan"), 0)


def test_steps_that_keep_the_grid_commute_with_decoding() -> None:
    x = random(2, 3, 9, 8)
    for spec in ACTIVATIONS:
        qx = grid_of(x, spec)(x)
        y = qx.dequantize()
        assert torch.equal(integer.relu(qx).dequantize(), y.relu())
        assert torch.equal(integer.flatten(qx).dequantize(), y.flatten(1))
        for window in ({"kernel_size": 2}, {"kernel_size": (3, 2), "stride": (2, 1)}, {"kernel_size": 3, "padding": 1}):
            assert torch.equal(integer.max_pool2d(qx, **window).dequantize(), F.max_pool2d(y, **window))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_linear_per_token(dtype: torch.dtype) -> None:
    x, w, bias = random(2, 5, 40).to(dtype), random(9, 40, seed=1), random(9, seed=2)
    x[0, 1] *= 50
    qw = pq.quantize_tensor(w, "int8-channel-sym")
    found = integer.linear_per_token(x, IntegerWeight.pack(qw), bias)
    assert found.dtype == dtype
    tokens = pq.quantize_tensor(x, "int8-token-sym").dequantize().double()
    exact = F.linear(tokens, qw.dequantize().double(), bias.double())
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    assert torch.allclose(found.double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("tokens", ["int8-token-sym", "uint8-token-asym", "int8-token-asym", "int4-token-asym"])
def test_a_layer_takes_codes_with_a_scale_for_each_token(tokens: str) -> None:
    model = nn.Sequential(nn.Linear(40, 9))
    pq.quantize(model, "int8-channel-sym")
    qx = pq.quantize_tensor(random(2, 5, 40) + 0.3, tokens)
    exact = F.linear(qx.dequantize().double(), model[0].weight.double(), model[0].bias.double())
    assert torch.allclose(model(qx).double(), exact, rtol=1e-5, atol=1e-5)


def test_products_with_tokens_refuse_other_grids() -> None:
    tokens = pq.quantize_tensor(random(2, 8), "int8-token-sym")
    weight = IntegerWeight.pack(pq.quantize_tensor(random(4, 8), "int8-channel-asym"))
    with pytest.raises(pq.PhiquantError, match="zero points have no product with tokens"):
        integer.linear_tokens(tokens, weight)
    weight = IntegerWeight.pack(pq.quantize_tensor(random(4, 8), "int8-channel-sym"))
    with pytest.raises(pq.PhiquantError, match="a scale for each token, not int8-tensor-sym"):
        integer.linear_tokens(pq.quantize_tensor(random(2, 8), "int8-tensor-sym"), weight)


def test_linear_per_token_keeps_what_is_not_finite_in_its_row() -> None:
    weight = IntegerWeight.pack(pq.quantize_tensor(random(9, 40), "int8-channel-sym"))
    x = random(3, 40, seed=1)
    x[1, 7] = float("nan")
    found = integer.linear_per_token(x, weight)
    assert found[1].isnan().all()
    assert found[[0, 2]].isfinite().all()
    assert integer.linear_per_token(random(0, 40), weight).shape == (0, 9)


# --- the toys of the course's exercise: 2 bits, small enough to follow by hand --------------------


def range_of(x: Tensor, bits: int) -> tuple[float, int]:
    """The course's range, from smallest to largest value; ours is widened to hold 0."""
    qmin, qmax = -(1 << bits - 1), (1 << bits - 1) - 1
    scale = (x.max() - x.min()).item() / (qmax - qmin)
    return scale, min(max(round(qmin - x.min().item() / scale), qmin), qmax)


def test_toy_of_linear_quantization() -> None:
    x = torch.tensor(
        [
            [0.0523, 0.6364, -0.0968, -0.0020, 0.1940],
            [0.7500, 0.5507, 0.6188, -0.1734, 0.4677],
            [-0.0669, 0.3836, 0.4297, 0.6267, -0.0695],
            [0.1536, -0.0038, 0.6075, 0.6817, 0.0601],
            [0.6446, -0.2500, 0.5376, -0.2226, 0.2333],
        ]
    )
    q = pq.quantize_tensor(x, "int2-tensor-asym")
    assert round(q.scales.item(), 4) == 0.3333
    assert q.zero_points.item() == -1
    assert q.codes.tolist() == [[-1, 1, -1, -1, 0], [1, 1, 1, -2, 0], [-1, 0, 0, 1, -1], [-1, -1, 1, 1, -1], [1, -2, 1, -2, 0]]  # fmt: skip # noqa: E501


TOY_X = torch.tensor(
    [
        [0.6118, 0.7288, 0.8511, 0.2849, 0.8427, 0.7435, 0.4014, 0.2794],
        [0.3676, 0.2426, 0.1612, 0.7684, 0.6038, 0.0400, 0.2240, 0.4237],
        [0.6565, 0.6878, 0.4670, 0.3470, 0.2281, 0.8074, 0.0178, 0.3999],
        [0.1863, 0.3567, 0.6104, 0.0497, 0.0577, 0.2990, 0.6687, 0.8626],
    ]
)
TOY_W = torch.tensor(
    [
        [0.12626, -0.14752, 0.08191, 0.24982, -0.10495, -0.19227, -0.18550, -0.15700],
        [0.27624, -0.43835, 0.05101, -0.12020, -0.20344, 0.10202, -0.20799, 0.24112],
        [-0.38216, -0.28047, 0.085238, -0.42504, -0.20952, 0.32018, -0.33619, 0.20219],
        [0.089233, -0.10124, 0.11467, 0.20091, 0.11438, -0.42427, 0.10178, -0.00030941],
        [-0.018837, -0.21256, -0.45285, 0.20949, -0.38684, -0.17100, -0.45331, -0.20433],
        [-0.20038, -0.053757, 0.18997, -0.36866, 0.055484, 0.15643, -0.23538, 0.21103],
        [-0.26875, 0.24984, -0.23514, 0.25527, 0.20322, 0.37675, 0.061563, 0.17201],
        [0.33541, -0.33555, -0.43349, 0.43043, -0.20498, -0.18366, -0.091553, -0.41168],
    ]
)
TOY_B = torch.tensor([0.1954, -0.2756, 0.3113, 0.1149, 0.4274, 0.2429, -0.1721, -0.2502])


def test_toy_of_a_quantized_linear_layer() -> None:
    def rounded(values: Tensor) -> list[float]:
        return [round(v, 4) for v in values.flatten().tolist()]

    x_grid = ActivationQuantizer(*range_of(TOY_X, 2), "int2-tensor-asym")
    exact = F.linear(TOY_X, TOY_W, TOY_B)
    y_grid = ActivationQuantizer(*range_of(exact, 2), "int2-tensor-asym")
    weight = pq.quantize_tensor(TOY_W, "int2-channel-sym")
    assert (round(x_grid.scale.item(), 6), int(x_grid.zero_point)) == (0.281600, -2)
    assert (round(y_grid.scale.item(), 6), int(y_grid.zero_point)) == (0.468152, 0)
    assert rounded(weight.scales) == [0.2498, 0.4383, 0.4250, 0.4243, 0.4533, 0.3687, 0.3767, 0.4335]
    bias_scales = weight.scales.flatten() * x_grid.scale
    assert rounded(bias_scales) == [0.0703, 0.1234, 0.1197, 0.1195, 0.1277, 0.1038, 0.1061, 0.1221]

    q_bias = torch.round(TOY_B / bias_scales).int()
    assert q_bias.tolist() == [3, -2, 3, 1, 3, 2, -2, -2]
    packed = IntegerWeight.pack(weight)
    folded = ops.linear_sums(torch.zeros(1, 8, dtype=torch.int8), -2, packed.packed, q_bias)
    assert folded[0].tolist() == [-1, 0, -3, -1, -3, 0, 2, -4]  # the bias with - Z_x sum q_w folded in

    codes = x_grid(TOY_X)
    sums = ops.linear_sums(codes.codes, -2, packed.packed, q_bias)
    once = torch.round(sums * (x_grid.scale * weight.scales.flatten() / y_grid.scale)).int()
    assert once.tolist() == [
        [0, -1, 0, -1, -1, 0, 1, -2],
        [0, 0, -1, 0, 0, 0, 0, -1],
        [0, 0, 0, -1, 0, 0, 0, -1],
        [0, 0, 0, 0, 0, 1, -1, -2],
    ]
    # The fixed point rounds twice. Sums of 2-bit codes are so small that this shows: 12 of 32 codes are 1 off.
    found = integer.linear(codes, packed, TOY_B, y_grid).codes
    assert (found - once).abs().max() == 1
    assert int((found != once).sum()) == 12


# --- models ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lenet() -> nn.Module:
    return digits.train()


@pytest.mark.parametrize("weights", ["int8-channel-sym", "int8-tensor-sym", "uint8-tensor-asym"])
@pytest.mark.parametrize("activations", ["uint8-tensor-asym", "int8-tensor-sym"])
def test_digits_in_integers_are_within_half_a_point_of_float(lenet: nn.Module, weights: str, activations: str) -> None:
    train, test = digits.data()
    before = copy.deepcopy(lenet.state_dict())
    model = pq.to_integer(lenet, [train.x[:400]], weights, activations)
    assert abs(digits.accuracy(model, test) - digits.accuracy(lenet, test)) <= 0.005
    assert all(torch.equal(before[name], value) for name, value in lenet.state_dict().items())
    assert type(model.get_submodule("0")) is pq.QuantizedConv2d
    assert type(model.get_submodule("7")) is pq.QuantizedLinear


def test_nothing_between_the_ends_of_an_integer_model_is_float(lenet: nn.Module) -> None:
    model = pq.to_integer(lenet, [digits.data()[0].x[:64]])
    seen = []
    for module in list(model)[:-1]:
        module.register_forward_hook(lambda _, inputs, output: seen.append(output))
    model(digits.data()[1].x[:3])
    assert len(seen) == 9
    for output in seen:
        assert isinstance(output, pq.QuantizedTensor)
        assert output.codes.dtype == torch.uint8


def test_an_integer_model_goes_through_its_state_dict(lenet: nn.Module) -> None:
    x = digits.data()[1].x[:50]
    model = pq.to_integer(lenet, [digits.data()[0].x[:64]])
    other = pq.to_integer(digits.lenet(seed=5), [digits.data()[0].x[:64]])
    assert not torch.equal(other(x), model(x))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    model.to(torch.bfloat16)  # the bias is a float and is rounded; codes and grids are not
    for name, value in model.state_dict().items():
        if not name.endswith((".bias", ".weight")):
            assert torch.equal(value, other.state_dict()[name]), name
    assert (model(x) - other(x)).abs().max() < 1


def test_relu_and_pooling_need_not_follow_a_layer() -> None:
    torch.manual_seed(0)
    first = (nn.ReLU(), nn.Conv2d(2, 5, 3, padding=1), nn.MaxPool2d(3, stride=2, padding=1), nn.ReLU())
    model = nn.Sequential(*first, nn.Dropout(), nn.Flatten(), nn.Linear(80, 4)).eval()  # fmt: skip
    x = random(6, 2, 8, 8)
    found = pq.to_integer(model, [x, x[:0]])(x)
    assert (found - model(x)).abs().max() < 0.05


def test_what_has_no_form_on_codes_is_named() -> None:
    with pytest.raises(pq.PhiquantError, match="1: Sigmoid\\(\\) has no form on codes"):
        pq.to_integer(nn.Sequential(nn.Linear(4, 4), nn.Sigmoid()), [random(2, 4)])
    with pytest.raises(pq.PhiquantError, match="no batch was given"):
        pq.to_integer(nn.Sequential(nn.Linear(4, 4)), [])
    strange = nn.Sequential(nn.Conv2d(1, 2, 3, padding="same"))
    with pytest.raises(pq.PhiquantError, match="padding='same'"):
        pq.to_integer(strange, [random(1, 1, 5, 5)])(random(1, 1, 5, 5))


def test_a_layer_without_an_output_grid_says_so() -> None:
    model = pq.quantize(nn.Sequential(nn.Linear(8, 4)), "int8-channel-sym")
    with pytest.raises(pq.PhiquantError, match="knows no grid for its result"):
        model[0](grid_of(random(2, 8), "uint8-tensor-asym")(random(2, 8)))


def test_phi3_tiny_on_int8_tokens_is_close_to_float(phi3_tiny, short_text) -> None:
    model, tokenizer = phi3_tiny
    reference = copy.deepcopy(model)
    pq.compute_per_token(pq.quantize(model, "int8-channel-sym"))
    result = pq.evaluate.compare(model, reference, tokenizer, short_text, window=256)
    assert result.kl < 2e-3
    assert abs(result.nll_diff) < 0.01
    before = result.kl
    pq.compute_per_token(model, on=False)
    assert pq.evaluate.compare(model, reference, tokenizer, short_text, window=256).kl < before


def test_per_token_needs_symmetric_weights_per_channel(tiny_model) -> None:
    with pytest.raises(pq.PhiquantError, match="no QuantizedLinear"):
        pq.compute_per_token(tiny_model)
    pq.quantize(tiny_model, "int8-channel-asym")
    with pytest.raises(pq.PhiquantError, match=r"o_proj: int8-channel-asym has zero points"):
        pq.compute_per_token(tiny_model)
    assert not any(getattr(module, "per_token", False) for module in tiny_model.modules())
