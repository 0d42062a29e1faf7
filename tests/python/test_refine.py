"""gptq_refine: never worse than gptq_mse on any grid, parameters as stored, against brute force and least squares."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import ggml
import numpy as np
import pytest
import torch
from phiquant import _C, PhiquantError, QuantizedTensor, quantize_tensor, spec, testing
from phiquant.solvers import refine
from phiquant.solvers.refine import gptq_refine
from phiquant.statistics import Statistics
from test_gptq import correlated, gaussian, inputs_of_a_layer, output_error, seen

# text -> the most that the error may be of gptq_mse's: groups with parameters of their own gain most
GRIDS = {
    "int3-g32-sym": 0.9, "gguf:Q4_0": 0.96, "uint2-g32-asym": 0.9, "uint3-g32-min-f16": 0.93, "nf4-g64-sym": 0.97,
    "mxfp4": 0.99, "fp8_e4m3-g32-sym": 1.0, "binary-g32-sym": 0.9, "ternary-g64-sym": 0.9, "int3-channel-sym": 0.99,
    "uint3-channel-min": 0.99, "int3-tensor-sym": 0.99, "int2-channel1-sym": 0.99, "q4_k": 0.93, "q3_k": 0.93,
    "q2_k": 0.9, "q6_k": 0.97, "iq4_xs": 0.96, "nvfp4": 0.97, "gguf:NVFP4": 0.98, "vsq4": 0.97, "codebook8-row": 0.97,
    "codebook4-g64-f16": 0.95, "codebook8-tensor": 0.99, "codebook64-row": 1.0, "q1.2": 1.0,
}  # fmt: skip


def damped_error(w: torch.Tensor, qt: QuantizedTensor, statistics: Statistics) -> torch.Tensor:
    """Of each row, float64, with the damping that solvers use."""
    h = statistics.hessian.double()
    h = h + 0.01 * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    error = (w - qt.dequantize()).double()
    return ((error @ h) * error).sum(1)


@pytest.mark.parametrize("text", GRIDS)
def test_no_row_is_worse_and_the_whole_is_better(text: str) -> None:
    x, w = correlated(600, 256), gaussian(12, 256, seed=5) * 0.5
    statistics = seen(x)
    start, found = (quantize_tensor(w, text, solver, statistics=statistics) for solver in ("gptq_mse", "gptq_refine"))
    before, after = (damped_error(w, qt, statistics) for qt in (start, found))
    rows_share = found.spec.scale_shape((12, 256))[0] != 12
    assert bool((after <= before * (1 + 1e-5)).all()) or rows_share
    assert after.sum() <= GRIDS[text] * before.sum()
    if rows_share:
        for name, parameter in start.parameters.items():
            assert torch.equal(found.parameters[name], parameter)
    if found.codebook is not None:
        assert bool((found.codebook.diff(dim=1) >= 0).all())


def test_two_columns_mostly_reach_the_optimum_of_all_codes_and_scales() -> None:
    """By brute force over the codes, with the best scale for each."""
    x = torch.linalg.cholesky(torch.tensor([[2.0, 1.2], [1.2, 1.5]])).T.repeat(4, 1)
    w, statistics = gaussian(40, 2, seed=3), seen(x)
    h = statistics.hessian.double()
    h = (h + 0.01 * h.diagonal().mean() * torch.eye(2)).numpy()
    least = []
    for row in w.double().numpy():
        errors = [row @ h @ row]
        for codes in itertools.product(range(-2, 2), repeat=2):
            q = np.array(codes, float)
            error = row - (q @ h @ row / (q @ h @ q) if any(codes) else 0.0) * q
            errors.append(error @ h @ error)
        least.append(min(errors))
    start, found = (
        damped_error(w, quantize_tensor(w, "int2-g2-sym", solver, statistics=statistics), statistics).numpy()
        for solver in ("gptq_mse", "gptq_refine")
    )
    assert (start < 1.001 * np.array(least) + 1e-9).mean() < 0.3
    assert (found < 1.001 * np.array(least) + 1e-9).mean() > 0.7


def test_where_no_single_code_can_be_moved() -> None:
    """The codes are a minimum in each coordinate: by trying both neighbours of every one."""
    x, w = correlated(600, 64), gaussian(6, 64, seed=5)
    statistics = seen(x)
    found = gptq_refine(w, spec("int3-g32-sym"), statistics, rounds=30)
    least = damped_error(w, found, statistics)
    for column, step in itertools.product(range(64), (-1, 1)):
        codes = found.codes.clone()
        codes[:, column] = (codes[:, column] + step).clamp(-4, 3)
        moved = damped_error(w, dataclasses.replace(found, codes=codes), statistics)
        assert bool((moved >= least * (1 - 1e-5)).all())


def test_rows_in_parts_and_cpu_levels_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = correlated(600, 256), gaussian(10, 256, seed=5)
    statistics = seen(x)
    for text in ("q2_k", "codebook4-g64-f16"):
        whole = gptq_refine(w, spec(text), statistics)
        monkeypatch.setattr("phiquant.solvers.refine._VALUES", 3 * 256)
        parts = gptq_refine(w, spec(text), statistics)
        monkeypatch.undo()
        before, after = (float(damped_error(w, qt, statistics).sum()) for qt in (whole, parts))
        assert after == pytest.approx(before, rel=0.02)  # matrix products of other sizes add in another order
        assert parts.shape == whole.shape
    digests = set()
    before_level = _C.cpu_level()
    for level in _C.build_info()["cpu_levels"]:
        _C.set_cpu_level(level)
        digests.add(gptq_refine(w, spec("q3_k"), statistics).digests()["codes"])
    _C.set_cpu_level(before_level)
    assert len(digests) == 1


@pytest.mark.parametrize(
    "text",
    ["int4-g32-sym", "uint3-g96-asym-f16", "int3-g128-sym", "q4_k", "nvfp4", "codebook8-row", "int4-channel-sym"],
)
def test_what_is_carried_from_stretch_to_stretch_stays_true(text: str) -> None:
    w, statistics = gaussian(12, 768, seed=5), seen(correlated(1800, 768))
    hessian = statistics.hessian.float() / statistics.hessian.diagonal().mean()
    start = quantize_tensor(w, text, "gptq_mse", statistics=statistics)
    rows = refine._Rows(w, start, hessian, apart=True)
    before, stretches = rows.error(), rows._stretches()
    found = rows.refined(3)
    assert [s.start for s in stretches] == [0, *(s.stop for s in stretches[:-1])]
    assert stretches[-1].stop == 768
    assert len(stretches) == {"int4-channel-sym": 1, "codebook8-row": 1, "uint3-g96-asym-f16": 4}.get(text, 3)
    assert rows.error() < before
    torch.testing.assert_close(rows.values, found.dequantize().T, atol=1e-5, rtol=1e-4)
    wanted = hessian @ (w.T - found.dequantize().T)
    torch.testing.assert_close(rows.gradient, wanted, atol=1e-3 * float(wanted.abs().max()), rtol=0)


def test_awkward_inputs() -> None:
    w = gaussian(4, 64)
    with pytest.raises(PhiquantError, match="gptq_refine needs statistics"):
        quantize_tensor(w, "int4-g32-sym", "gptq_refine")
    with pytest.warns(UserWarning, match="too few for gptq"):
        found = quantize_tensor(w, "int4-g32-sym", "gptq_refine", statistics=seen(gaussian(100, 64)))
    assert found.shape == (4, 64)
    silent = quantize_tensor(w, "int4-g32-sym", "gptq_refine", statistics=seen(torch.zeros(500, 64)))
    assert output_error(w, silent, torch.eye(64)) < 0.01 * w.square().sum()
    zeros = quantize_tensor(torch.zeros(4, 256), "q4_k", "gptq_refine", statistics=seen(gaussian(600, 256)))
    assert not zeros.dequantize().any()
    assert quantize_tensor(torch.zeros(0, 64), "int4-g32-sym", "gptq_refine", statistics=seen(gaussian(200, 64))).shape
    w[2, 7] = float("nan")
    with pytest.raises(PhiquantError, match=r"proj holds 1 value\(s\) .* at index \[2, 7\]"):
        quantize_tensor(w, "int4-g32-sym", "gptq_refine", name="proj", statistics=seen(gaussian(200, 64)))


def test_what_layers_before_did_to_the_inputs_is_made_up_for() -> None:
    """Told of the float model's inputs, the output is nearer to W times those; by less than least squares allows."""
    exact, w = correlated(1500, 64), gaussian(16, 64, seed=5)
    x = exact + 0.2 * exact.roll(1, dims=1) + 0.05 * gaussian(1500, 64, seed=9)
    told = Statistics(64)
    told.update(x, exact)
    wanted = exact.double() @ w.double().T
    errors = [
        (wanted - x.double() @ quantize_tensor(w, "int4-g32-sym", "gptq_refine", statistics=s).dequantize().double().T)
        .square()
        .sum()
        .item()
        for s in (seen(x), told)
    ]
    best = np.linalg.lstsq(x.double().numpy(), wanted.numpy(), rcond=None)[0]
    least = np.square(wanted.numpy() - x.double().numpy() @ best).sum()
    assert least < errors[1] < 0.3 * errors[0]


@pytest.mark.slow
def test_llama_cpps_own_codes_with_an_importance_matrix_err_far_more(phi3_tiny: tuple[Any, Any]) -> None:
    """On a layer of phi3-tiny, other text than that of the calibration, the same grids, the same importance."""
    pytest.importorskip("xllamacpp")
    w, known = inputs_of_a_layer(*phi3_tiny, testing.training_text(120_000), 12)
    _, other = inputs_of_a_layer(*phi3_tiny, testing.heldout_text(), 3)
    importance, h = (known.hessian.diagonal() / known.tokens).numpy(), other.hessian.double()
    names = ["Q4_K", "IQ4_XS", "Q3_K", "Q2_K"]
    blocks = ggml.quantize([(name, w.numpy(), importance) for name in names])
    for name, theirs in zip(names, ggml.decode(list(zip(names, blocks, strict=True))), strict=True):
        ours = quantize_tensor(w, f"gguf:{name}", "gptq_refine", statistics=known).dequantize()
        wrong = [(w - values).double() for values in (ours, torch.from_numpy(theirs).reshape(w.shape))]
        errors = [((one @ h) * one).sum().item() for one in wrong]
        assert errors[0] < 0.85 * errors[1], (name, errors)
