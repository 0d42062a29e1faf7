"""Solvers: the theorems that hold on any weight, llama.cpp's scales as an oracle, and the errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from phiquant import PhiquantError, QuantizedTensor, quantize_tensor

SPECS = [
    "int4-g32-sym",
    "int3-g32-signmax-f16",
    "int2-g32-sym-f16",
    "uint4-g32-min-f16",
    "uint4-g32-asym",
    "int4-channel-sym",
    "int8-tensor-sym",
]


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.02


def error(w: torch.Tensor, qt: QuantizedTensor) -> float:
    return (qt.dequantize().double() - w.double()).square().sum().item()


@pytest.mark.parametrize("text", SPECS)
def test_mse_is_never_worse_than_rtn_and_better_on_average(text: str) -> None:
    w = gaussian(64, 256)
    rtn, mse = (quantize_tensor(w, text, solver=s) for s in ("rtn", "mse"))
    assert error(w, mse) <= error(w, rtn)
    if "int8" not in text:
        assert error(w, mse) < 0.97 * error(w, rtn)
    per_block = [
        (qt.dequantize() - w).reshape(qt.scales.numel(), -1).square().sum(1, dtype=torch.float64) for qt in (rtn, mse)
    ]
    assert (per_block[1] <= per_block[0] * (1 + 1e-6)).all()


@pytest.mark.parametrize("solver", ["rtn", "mse"])
@pytest.mark.parametrize("text", SPECS)
def test_every_code_is_the_nearest_on_its_grid(text: str, solver: str) -> None:
    w = gaussian(8, 64)
    qt = quantize_tensor(w, text, solver=solver)
    distance = (qt.dequantize() - w).abs()
    for step in (-1, 1):
        element = qt.spec.element
        moved = (qt.codes.int() + step).clamp(element.qmin, element.qmax).to(qt.codes.dtype)
        other = QuantizedTensor(moved, qt.scales, qt.zero_points, qt.minimums, qt.spec)
        assert (distance <= (other.dequantize() - w).abs() + 1e-8).all()


def test_q4_0_scales_are_those_of_llama_cpp() -> None:
    gguf = pytest.importorskip("gguf")
    w = gaussian(16, 256, seed=4)
    raw = gguf.quantize(w.numpy(), gguf.GGMLQuantizationType.Q4_0).reshape(-1, 18)
    expected = raw[:, :2].copy().view(np.float16).reshape(16, 8)
    np.testing.assert_array_equal(quantize_tensor(w, "gguf:Q4_0").scales.numpy(), expected)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    values=st.lists(st.floats(-1e4, 1e4, width=32), min_size=32, max_size=32),
    text=st.sampled_from([s for s in SPECS if "g32" in s]),
    solver=st.sampled_from(["rtn", "mse", "mse_exact"]),
)
def test_codes_survive_a_second_encoding(values: list[float], text: str, solver: str) -> None:
    """The decoded values lie on the grid: encoding them again on that grid changes no code."""
    from phiquant.fake_quant import encode

    qt = quantize_tensor(torch.tensor([values]), text, solver=solver)
    again = encode(qt.dequantize(), qt.spec, qt.scales, qt.zero_points, qt.minimums)
    assert torch.equal(again.dequantize(), qt.dequantize())


def test_16_bit_weights_give_the_codes_of_their_float32_values() -> None:
    w = gaussian(8, 64).bfloat16()
    assert quantize_tensor(w, "gguf:Q4_0").digests() == quantize_tensor(w.float(), "gguf:Q4_0").digests()


def test_all_zero_weight() -> None:
    for text in SPECS:
        assert torch.equal(quantize_tensor(torch.zeros(4, 64), text, solver="mse").dequantize(), torch.zeros(4, 64))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_named(value: float) -> None:
    w = gaussian(4, 64)
    w[2, 7] = value
    w[3, 1] = value
    with pytest.raises(PhiquantError, match=r"layers.0.o_proj holds 2 value\(s\) .* at index \[2, 7\]"):
        quantize_tensor(w, "int4-g32-sym", name="layers.0.o_proj")


def test_huge_finite_values_are_not_called_infinite() -> None:
    quantize_tensor(torch.full((1, 64), 3e38), "int4-g32-sym")


def test_other_errors() -> None:
    with pytest.raises(PhiquantError, match="unknown solver 'best'; known solvers: rtn, mse, mse_exact"):
        quantize_tensor(gaussian(4, 64), "int4-g32-sym", solver="best")
    with pytest.raises(PhiquantError, match="proj: group size 32 does not divide the last dimension 80"):
        quantize_tensor(gaussian(4, 80), "int4-g32-sym", name="proj")
    with pytest.raises(PhiquantError, match="a solver takes float32"):
        quantize_tensor(torch.zeros(4, 64, dtype=torch.int32), "int4-g32-sym")
