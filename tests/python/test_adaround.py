"""AdaRound: never worse than the nearest codes on the error it minimises, and well below it on correlated inputs."""

from __future__ import annotations

import phiquant as pq
import pytest
import torch
from phiquant.errors import PhiquantError
from phiquant.solvers.adaround import adaround
from phiquant.statistics import Statistics

K = 64


@pytest.fixture(scope="module")
def layer() -> tuple[torch.Tensor, Statistics]:
    """A weight, and inputs of which a few directions carry most."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(K, K, generator=generator) * torch.logspace(0, -2, K)
    statistics = Statistics(K)
    statistics.update(torch.randn(2000, K, generator=generator) @ mix.T)
    return torch.randn(48, K, generator=generator), statistics


def error(w: torch.Tensor, quantized: pq.QuantizedTensor, statistics: Statistics) -> torch.Tensor:
    """Of each row, in float64."""
    d = (quantized.dequantize() - w).double()
    return ((d @ statistics.hessian.double()) * d).sum(1)


@pytest.mark.parametrize(
    "text",
    ["int4-channel-sym", "int3-channel-sym", "uint4-g32-asym", "uint3-g16-min-f16", "gguf:Q4_0", "nf4-g32-sym",
     "mxfp4", "fp8_e4m3-channel-sym", "ternary-g32-absmean", "int4-g16-signmax-f16-int6/64", "int4-tensor-sym"],
)  # fmt: skip
def test_no_row_is_worse_than_nearest(text: str, layer: tuple[torch.Tensor, Statistics]) -> None:
    w, statistics = layer
    spec = pq.spec(text)
    nearest, found = pq.quantize_tensor(w, spec, "mse"), adaround(w, spec, statistics, steps=200)
    assert found.codes.dtype == nearest.codes.dtype
    assert all(torch.equal(value, nearest.parameters[name]) for name, value in found.parameters.items())
    before, after = error(w, nearest, statistics), error(w, found, statistics)
    assert bool((after <= before * (1 + 1e-5)).all())
    assert after.sum() <= 0.65 * before.sum()


def test_codes_are_next_to_the_value(layer: tuple[torch.Tensor, Statistics]) -> None:
    w, statistics = layer
    found = adaround(w, pq.spec("int8-channel-sym"), statistics, steps=50)
    assert float(((w / found.scales) - found.codes).abs().max()) <= 1 + 1e-4


def test_zero_weights_and_zero_blocks_stay(layer: tuple[torch.Tensor, Statistics]) -> None:
    _, statistics = layer
    w = torch.zeros(3, K)
    w[0, 0] = 1
    found = adaround(w, pq.spec("int4-g32-sym"), statistics, steps=20).dequantize()
    assert torch.equal(found[1:], w[1:])


def test_it_says_what_it_cannot_do(layer: tuple[torch.Tensor, Statistics]) -> None:
    w, statistics = layer
    with pytest.raises(PhiquantError, match="needs statistics"):
        pq.quantize_tensor(w, "int4-g32-sym", "adaround")
    with pytest.raises(PhiquantError, match="matrix of 64 columns"):
        adaround(w[:, :32], pq.spec("int4-g32-sym"), statistics)
    with pytest.raises(PhiquantError, match="known beforehand"):
        adaround(w, pq.spec("codebook16-tensor"), statistics)
