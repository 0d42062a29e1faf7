"""hqq against its formula in float64 numpy; on every kind of grid never worse than rtn in its norm; outliers told."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import phiquant as pq
import pytest
import torch
from phiquant import PhiquantError, QuantizedTensor, quantize_tensor
from phiquant.calibrate import output_error
from phiquant.solvers.hqq import hqq
from phiquant.statistics import Statistics

GRIDS = (
    "uint4-g32-min", "uint4-g64-min-f16", "uint2-g32-min-bf16", "uint8-g32-min-f16", "uint4-channel-min",
    "uint4-tensor-min", "int4-g32-sym", "int3-g32-signmax-f16", "uint4-g32-asym", "int8-channel-sym",
    "fp4_e2m1-g32-sym", "fp8_e4m3-channel-sym", "nf4-g64-sym-f16", "binary-channel-sym", "ternary-channel-sym",
    "gguf:Q4_0", "gguf:Q4_1", "gguf:Q4_K", "gguf:Q3_K", "gguf:Q2_K", "gguf:Q6_K", "gguf:IQ4_NL", "mlx:4bit-g64",
    "nvfp4", "mxfp4",
)  # fmt: skip


def weight(*shape: int, seed: int = 0) -> torch.Tensor:
    """Laplacian, as large as weights are."""
    return torch.from_numpy(np.random.default_rng(seed).laplace(size=shape) * 0.02).float()


def norm(w: torch.Tensor, quantized: QuantizedTensor, unit: np.ndarray, p: float = 0.7) -> np.ndarray:
    """sum |w - q|^p of each block, errors in units of its step."""
    error = np.abs(w.double().numpy() - quantized.dequantize().double().numpy())
    return ((error.reshape(len(unit), -1) / unit[:, None]) ** p).sum(1)


def paper(
    x: np.ndarray, qmax: int, p: float = 0.7, beta: float = 10.0, kappa: float = 1.01
) -> tuple[np.ndarray, np.ndarray]:
    """(sum |d|^p of the best iterate, of the start) of blocks x [B, g], by the formula in float64."""
    low, high = x.min(1, keepdims=True), x.max(1, keepdims=True)
    scale, minimum = (high - low) / qmax, low
    errors = []
    for i in range(20):
        q = np.clip(np.round((x - minimum) / scale), 0, qmax)
        d = x - (scale * q + minimum)
        u = np.abs(d) / scale
        errors.append((u**p).sum(1))
        shrunk = np.sign(d) * np.maximum(u - np.maximum(u, 1e-37) ** (p - 1) / (beta * kappa**i), 0) * scale
        minimum = minimum + (d - shrunk).mean(1, keepdims=True)
    return np.min(errors, axis=0), errors[0]


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (3, 64), (2, 32), (4, 512)])
def test_the_minimum_is_that_of_the_formula(bits: int, group: int) -> None:
    w = weight(64, 512)
    unit = (w.reshape(-1, group).amax(1) - w.reshape(-1, group).amin(1)).double().numpy() / (2**bits - 1)
    best, first = paper(w.double().numpy().reshape(-1, group), 2**bits - 1)
    found = norm(w, hqq(w, pq.spec(f"uint{bits}-g{group}-min")), unit)
    np.testing.assert_allclose(norm(w, quantize_tensor(w, f"uint{bits}-g{group}-min"), unit), first, rtol=1e-4)
    # A code at a tie, or an iterate that is as good, may differ; few do, and by little.
    assert np.mean(np.abs(found / best - 1) < 1e-4) > 0.8
    assert found.sum() == pytest.approx(best.sum(), rel=1e-3)


@pytest.mark.parametrize("name", GRIDS)
def test_no_block_is_worse_than_with_rtn(name: str) -> None:
    w, spec = weight(16, 512), pq.spec(name)
    rtn, found = quantize_tensor(w, spec), quantize_tensor(w, spec, solver="hqq")
    blocks = np.ones(rtn.super_scales.numel() if spec.two_level else rtn.scales.numel())
    before, after = norm(w, rtn, blocks), norm(w, found, blocks)
    assert (after <= before * (1 + 1e-6)).all()
    if spec.element.bits <= 4 and "mxfp4" not in name:
        assert after.sum() < before.sum()


def test_the_minimum_alone_is_solved_for() -> None:
    w, spec = weight(256, 256), pq.spec("uint3-g64-min-f16")
    rtn, found = quantize_tensor(w, spec), quantize_tensor(w, spec, solver="hqq")
    unit = rtn.scales.double().numpy().reshape(-1)
    assert torch.equal(found.scales, rtn.scales)
    assert norm(w, found, unit).sum() < 0.98 * norm(w, rtn, unit).sum()
    assert norm(w, found, unit, 2.0).sum() < 0.95 * norm(w, rtn, unit, 2.0).sum()


@pytest.mark.parametrize("name", ["uint4-g32-min-f16", "int4-g32-sym", "uint4-g32-asym"])
@pytest.mark.parametrize("factor", [2.0**-9, 2.0**5])
def test_the_size_of_the_weight_does_not_matter(name: str, factor: float) -> None:
    w = weight(32, 128).bfloat16().float()
    spec = pq.spec(name.removesuffix("-f16"))
    assert torch.equal(hqq(w, spec).codes, hqq(w * factor, spec).codes)


@pytest.mark.parametrize("name", ["uint4-g32-min-f16", "int4-g32-sym", "uint4-g32-asym", "uint4-channel-min"])
def test_every_level_dtype_and_cut_gives_the_same(name: str, level: str) -> None:
    w = weight(33, 384).bfloat16()
    whole = quantize_tensor(w.float(), name, solver="hqq")
    for other in (quantize_tensor(w, name, solver="hqq"), quantize_tensor(w[7:20], name, solver="hqq")):
        rows = slice(None) if len(other.codes) == 33 else slice(7, 20)
        assert torch.equal(other.codes, whole.codes[rows])
        assert torch.equal(other.scales, whole.scales[rows])


def test_threads_do_not_matter() -> None:
    w, before = weight(256, 1024), torch.get_num_threads()
    one = quantize_tensor(w, "uint4-g32-min-f16", solver="hqq").digests()
    torch.set_num_threads(2)
    try:
        assert quantize_tensor(w, "uint4-g32-min-f16", solver="hqq").digests() == one
    finally:
        torch.set_num_threads(before)


def test_errors_and_awkward_blocks() -> None:
    with pytest.raises(PhiquantError, match="use kmeans"):
        quantize_tensor(weight(8, 64), "codebook16-row", solver="hqq")
    w = weight(8, 64)
    w[3, 40] = float("nan")
    with pytest.raises(PhiquantError, match=r"index \[3, 40\]"):
        quantize_tensor(w, "uint4-g32-min", solver="hqq")
    for value in (0.0, 3.0):
        same = torch.full((4, 64), value)
        assert torch.equal(quantize_tensor(same, "uint4-g32-min", solver="hqq").dequantize(), same)
    assert quantize_tensor(torch.zeros(0, 64), "uint4-g32-min", solver="hqq").codes.shape == (0, 64)


def statistics_of(model: Any, ids: torch.Tensor) -> dict[str, Statistics]:
    """What the linears of the decoder layers that follow a norm read."""
    wanted = {n: m for n, m in model.named_modules() if n.endswith(("qkv_proj", "gate_up_proj"))}
    seen = {name: Statistics(linear.in_features) for name, linear in wanted.items()}
    hooks = [m.register_forward_pre_hook(lambda _, x, s=seen[n]: s.update(x[0])) for n, m in wanted.items()]
    with torch.no_grad():
        model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


def test_outlier_channels_are_told_and_it_collapses_there(phi3_tiny: tuple[Any, Any]) -> None:
    """A float minimum, which has no exact zero, against rtn on an integer zero point: the error of the output."""
    model, tokenizer = phi3_tiny
    ids = torch.tensor(pq.evaluate.windows(tokenizer, pq.testing.training_text(characters=8_000), 128, 8))
    for which, told in ((model, False), (pq.testing.outlier_twin(model), True)):
        ratios = []
        for name, statistics in statistics_of(which, ids).items():
            w = which.get_submodule(name).weight.detach()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                found = quantize_tensor(w, "uint2-g32-min", solver="hqq", statistics=statistics)
            assert bool(caught) == told, name
            assert not told or "times as large as the mean channel" in str(caught[0].message)
            plain = quantize_tensor(w, "uint2-g32-asym")
            ratios.append(output_error(w, found, statistics) / output_error(w, plain, statistics))
        assert min(ratios) > 3 if told else max(ratios) < 1
