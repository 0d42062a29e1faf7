"""Figures that the course on model compression prints, reproduced; where it errs, the right figure is asserted."""

from __future__ import annotations

import math

import phiquant as pq
import pytest
import torch
from phiquant.fake_quant import encode, encode_dynamic
from torch import Tensor

# The 4 x 4 matrix of the chapter on quantization.
W = torch.tensor(
    [[2.09, -0.98, 1.48, 0.09], [0.05, -0.14, -1.08, 2.12], [-0.91, 1.92, 0.0, -1.03], [1.87, 0.0, 1.53, 1.49]]
)


def squared_error(y: Tensor) -> float:
    return float((y - W).double().square().sum())


def error_of(spec: str, solver: str = "rtn") -> float:
    return squared_error(pq.quantize_tensor(W, spec, solver=solver).dequantize())


# --- linear quantization of W ---------------------------------------------------------------------


def test_two_bit_linear_codes_of_the_matrix() -> None:
    qt = encode_dynamic(W, pq.spec("int2-tensor-asym"))
    assert qt.scales is not None
    assert qt.zero_points is not None
    assert qt.scales.item() == pytest.approx(1.0667, abs=5e-5)  # printed as 1.07
    assert qt.zero_points.item() == -1
    assert qt.codes.tolist() == [[1, -2, 0, -1], [-1, -1, -2, 1], [-2, 1, -1, -2], [1, -1, 0, 0]]


def test_a_scale_per_channel_is_closer_than_one_per_tensor() -> None:
    assert math.sqrt(error_of("int2-channel-sym")) == pytest.approx(2.08, abs=5e-3)
    assert math.sqrt(error_of("int2-tensor-sym")) == pytest.approx(2.28, abs=5e-3)


# --- binary and ternary ---------------------------------------------------------------------------


def test_binary_with_and_without_its_scale() -> None:
    spec = pq.spec("binary-tensor-sym")
    assert squared_error(encode(W, spec, torch.ones(1, 1)).dequantize()) == pytest.approx(9.28, abs=5e-3)
    qt = encode_dynamic(W, spec)
    assert qt.scales is not None
    assert qt.scales.item() == pytest.approx(1.05, abs=5e-3)
    assert squared_error(qt.dequantize()) == pytest.approx(9.245, abs=5e-4)  # printed as 9.24
    assert torch.equal(qt.codes == 1, W >= 0)  # zero counts as positive


def test_ternary_threshold_and_scale() -> None:
    qt = encode_dynamic(W, pq.spec("ternary-tensor-sym"))
    assert qt.scales is not None
    assert 0.7 * W.abs().mean().item() == pytest.approx(0.73, abs=5e-3)
    assert torch.equal(qt.codes != 0, W.abs() > 0.7 * W.abs().mean())
    assert int((qt.codes != 0).sum()) == 11
    assert qt.scales.item() == pytest.approx(1.5, abs=1e-6)


def test_order_of_the_representations_of_the_matrix() -> None:
    errors = {
        "k-means, 4 levels": (error_of("codebook4-tensor", "kmeans"), 0.0932),
        "linear, zero point": (error_of("int2-tensor-asym"), 0.745),
        "ternary": (error_of("ternary-tensor-sym"), 2.093),
        "linear, per channel": (error_of("int2-channel-sym"), 4.32),
        "linear, per tensor": (error_of("int2-tensor-sym"), 5.22),
        "binary": (error_of("binary-tensor-sym"), 9.245),
    }
    for name, (found, printed) in errors.items():
        assert found == pytest.approx(printed, rel=2e-3), name
    found_order = [found for found, _ in errors.values()]
    assert found_order == sorted(found_order)


# --- absmax and zero-point quantization to int8 ---------------------------------------------------


def test_absmax_to_int8() -> None:
    qt = encode_dynamic(torch.tensor([[3.2, 0.1, -3.0]]), pq.spec("int8-tensor-sym"))
    assert qt.scales is not None
    assert 1 / qt.scales.item() == pytest.approx(127 / 3.2)
    assert qt.codes.tolist() == [[127, 4, -119]]  # the figure draws -3.0 at -127
    value = qt.dequantize()[0, 1].item()
    assert value == pytest.approx(4 * 3.2 / 127)  # the chapter rounds here, which would give 0
    assert value != round(value)


def test_zero_point_to_int8() -> None:
    qt = encode_dynamic(torch.tensor([[3.2, 0.1, -3.0]]), pq.spec("int8-tensor-asym"))
    assert qt.scales is not None
    assert qt.zero_points is not None
    assert 1 / qt.scales.item() == pytest.approx(255 / 6.2)
    assert qt.zero_points.item() == -5
    assert qt.codes.tolist() == [[127, -1, -128]]


# --- ranges ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(1, 9))
def test_ranges_of_integers(bits: int) -> None:
    unsigned, signed = pq.Int(bits, signed=False), pq.Int(bits)
    assert (unsigned.qmin, unsigned.qmax) == (0, 2**bits - 1)  # the chapter: 2^(n-1)
    assert (signed.qmin, signed.qmax) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)  # [-128, 127], not [-127, 128]
    if bits > 1:  # S = absmax / (2^(n-1) - 1), n the bit width
        qt = encode_dynamic(torch.tensor([[1.0, -0.5]]), pq.QuantSpec(signed, pq.PerTensor()))
        assert qt.scales is not None
        assert qt.scales.item() == pytest.approx(1 / (2 ** (bits - 1) - 1))


def test_int4_holds_sixteen_codes() -> None:
    assert pq.Int(4).levels == tuple(range(-8, 8))
    assert pq.spec("int8-tensor-sym").element.bits * 4 == 32  # a quarter of float32


def test_tables_of_the_four_bit_floats() -> None:
    positive = {name: pq.Float(name).levels[:8] for name in ("e1m2", "e2m1", "e3m0")}
    assert positive["e1m2"] == (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5)
    assert positive["e2m1"] == (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    assert positive["e3m0"] == (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
    assert pq.Float("e2m1").value(0b0111) == 6.0  # the figure says 1


def test_figures_of_the_eight_bit_floats() -> None:
    e4m3, e5m2 = pq.Float("e4m3fn"), pq.Float("e5m2")
    assert (e4m3.largest, e4m3.value(1), e4m3.value(8)) == (448.0, 2.0**-9, 2.0**-6)
    assert (e5m2.largest, e5m2.value(1), e5m2.value(4)) == (57344.0, 2.0**-16, 2.0**-14)
    assert math.isnan(e4m3.value(0x7F))
    assert math.isinf(e5m2.value(0x7C))
    assert math.isnan(e5m2.value(0x7D))
    y = pq.fake_quantize(
        torch.tensor([[464.0, 464.0001, 500.0, 2.0**-10]]), "fp8_e4m3-tensor-sym", scale=torch.ones(1, 1)
    )
    assert y.tolist() == [[448.0, 448.0, 448.0, 0.0]]  # saturated, and a tie to even at half the smallest value


def test_the_estimator_has_gradient_one() -> None:
    w = W.clone().requires_grad_()
    pq.fake_quantize(w, "int4-tensor-sym").sum().backward()
    assert torch.equal(w.grad, torch.ones_like(W))
