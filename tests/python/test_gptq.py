"""GPTQ: against the paper's form in float64, least squared error by hand, its promises, and awkward inputs."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import phiquant.ops as ops
import pytest
import reference
import torch
from phiquant import _C, PhiquantError, QuantizedTensor, quantize_tensor, spec, testing
from phiquant.evaluate import windows
from phiquant.solvers.gptq import gptq
from phiquant.statistics import Statistics

SPECS = [
    "int4-g32-sym",
    "gguf:Q4_0",
    "uint4-g32-asym",
    "uint4-g32-min-f16",
    "int3-channel-sym",
    "int4-tensor-sym",
    "int2-channel1-sym",
]
ELEMENTS = ["nf4-g64-sym", "fp4_e2m1-g32-sym", "fp8_e4m3-channel-sym", "binary-channel-sym", "ternary-channel-absmean"]
STORED_IN_TWO_LEVELS = ["q4_k", "q3_k", "q2_k", "q6_k", "nvfp4", "iq4_xs"]
FLOATS = ["mxfp4", "iq4_nl", "fp8_e5m2-g32-sym", "fp4_e1m2-g16-sym-f16"]
CODEBOOKS = ["codebook16-tensor", "codebook16-row", "codebook8-rows4", "codebook4-g64-f16", "codebook64-row"]


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seen(x: torch.Tensor, dtype: torch.dtype = torch.float32) -> Statistics:
    statistics = Statistics(x.shape[-1], dtype)
    statistics.update(x)
    return statistics


def correlated(tokens: int, features: int, seed: int = 0) -> torch.Tensor:
    return gaussian(tokens, features, seed=seed) @ gaussian(features, features, seed=seed + 1) * 0.1


def output_error(w: torch.Tensor, qt: QuantizedTensor, x: torch.Tensor) -> float:
    return ((w - qt.dequantize()).double() @ x.double().T).square().sum().item()


def paper(w: np.ndarray, start: QuantizedTensor, hessian: np.ndarray, damping: float, act_order: bool) -> np.ndarray:
    """Algorithm 1 of arXiv 2210.17323 in float64, on the parameters of `start`: the inverse, then column by column."""
    n, k = w.shape
    order = np.argsort(-np.diag(hessian), kind="stable") if act_order else np.arange(k)
    h = hessian[np.ix_(order, order)] + damping * np.diag(hessian).mean() * np.eye(k)
    upper = np.linalg.cholesky(np.linalg.inv(h)).T
    w = w[:, order].astype(np.float64)
    groups = start.scales.shape[1]
    scale = np.broadcast_to(start.scales.float().numpy(), (n, groups))
    extra = start.zero_points if start.minimums is None else start.minimums
    offset = np.broadcast_to(np.zeros((1, 1)) if extra is None else extra.float().numpy(), (n, groups))
    minimum, element = start.minimums is not None, start.spec.element
    codes = np.empty((n, k))
    for i, column in enumerate(order):
        s, o = (p[:, [column // (k // groups)]] for p in (scale, offset))
        q = reference.codes(w[:, [i]].astype(np.float32), s, o, minimum, element.qmin, element.qmax)
        codes[:, [column]] = q
        error = (w[:, i] - reference.values(q, s, o, minimum)[:, 0]) / upper[i, i]
        w[:, i:] -= np.outer(error, upper[i, i:])
    return codes


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("text", SPECS)
def test_the_codes_are_those_of_the_paper(text: str, act_order: bool) -> None:
    """Equal but where a value lies within rounding of the middle between two codes: less than one code in 500."""
    x, w = correlated(400, 192), gaussian(20, 192, seed=5)
    statistics = seen(x, torch.float64)
    found = gptq(w, spec(text), statistics, act_order=act_order)
    expected = paper(w.numpy(), quantize_tensor(w, text), statistics.hessian.numpy(), 0.01, act_order)
    assert (found.codes.numpy() != expected).mean() < 0.002
    assert torch.equal(found.scales, quantize_tensor(w, text).scales)


def excess_of_each_choice(w: np.ndarray, found: QuantizedTensor, hessian: np.ndarray) -> np.ndarray:
    """How much farther each chosen value lies from what the paper's loop (float64) aims at than the nearest value of
    any code does, in units of the row's largest value, [N, K]; given the values chosen for the columns before it."""
    n, k = w.shape
    element = found.spec.element
    codes = range(element.qmin, element.qmax + 1)
    every = [dataclasses.replace(found, codes=torch.full_like(found.codes, c)) for c in codes]
    levels = np.stack([one.dequantize().double().numpy() for one in every])
    order = np.argsort(-np.diag(hessian), kind="stable")
    h = hessian[np.ix_(order, order)] + 0.01 * np.diag(hessian).mean() * np.eye(k)
    upper = np.linalg.cholesky(np.linalg.inv(h)).T
    values, aim = found.dequantize().double().numpy()[:, order], w[:, order].astype(np.float64)
    excess = np.empty((n, k))
    for i, column in enumerate(order):
        distance = np.abs(levels[:, :, column] - aim[None, :, i])
        least = np.where(np.isfinite(distance), distance, np.inf).min(0)
        excess[:, i] = np.abs(values[:, i] - aim[:, i]) - least
        aim[:, i:] -= np.outer((aim[:, i] - values[:, i]) / upper[i, i], upper[i, i:])
    return excess / np.abs(w).max(1, keepdims=True)


@pytest.mark.parametrize("solver", ["gptq", "gptq_mse"])
@pytest.mark.parametrize("text", ELEMENTS + STORED_IN_TWO_LEVELS + FLOATS + CODEBOOKS)
def test_the_codes_are_those_of_the_paper_on_every_grid(text: str, solver: str) -> None:
    """Each value is the nearest one of all codes to what the paper's loop aims at, but for rounding."""
    x, w = correlated(600, 256), gaussian(12, 256, seed=5)
    statistics = seen(x, torch.float64)
    grid = "kmeans" if "codebook" in text else "mse" if solver == "gptq_mse" else "rtn"
    start = quantize_tensor(w, text, grid, statistics=statistics)
    found = quantize_tensor(w, text, solver, statistics=statistics)
    for name, parameter in start.parameters.items():
        assert torch.equal(found.parameters[name].view(torch.uint8), parameter.view(torch.uint8)), name
    assert excess_of_each_choice(w.numpy(), found, statistics.hessian.numpy()).max() < 1e-5


def test_a_grid_weighed_by_the_inputs_is_better_where_they_differ() -> None:
    """Columns of very different inputs: on the K-quants and MXFP4 too."""
    sizes = torch.logspace(0, -1.5, 256)[torch.randperm(256, generator=torch.Generator().manual_seed(0))]
    x, w = correlated(2000, 256) * sizes, gaussian(48, 256, seed=3)
    for text in ("int3-g32-sym", "q3_k", "q2_k", "mxfp4"):
        plain, weighed = (quantize_tensor(w, text, solver, statistics=seen(x)) for solver in ("gptq", "gptq_mse"))
        assert output_error(w, weighed, x) < 0.97 * output_error(w, plain, x), text


@pytest.mark.parametrize("columns", [128, 160, 512, 672])
def test_runs_of_columns_make_up_for_each_other(columns: int) -> None:
    """Widths that fill the runs, and widths that do not."""
    x, w = correlated(1400, columns), gaussian(4, columns, seed=5)
    found = gptq(w, spec("int4-g32-sym"), seen(x, torch.float64))
    expected = paper(w.numpy(), quantize_tensor(w, "int4-g32-sym"), (x.double().T @ x.double()).numpy(), 0.01, True)
    assert (found.codes.numpy() != expected).mean() < 0.004


def test_two_columns_by_hand() -> None:
    """H = [[2, 1], [1, 2]]: column 0 is rounded first; the best column 1 is then w_1 + (w_0 - q_0) H_01 / H_11."""
    x = torch.linalg.cholesky(torch.tensor([[2.0, 1.0], [1.0, 2.0]])).T
    w = torch.tensor([[0.4, 0.45, 7.0]])
    statistics = seen(torch.block_diag(x, torch.tensor([[0.1]])).repeat(2, 1))
    found = gptq(w, spec("int4-channel-sym"), statistics, damping=0.0, act_order=False)
    assert found.scales.item() == 1.0
    assert found.codes.tolist() == [[0, 1, 7]]  # 0.45 + 0.4 / 2 = 0.65 rounds up, 0.45 does not
    assert quantize_tensor(w, "int4-channel-sym").codes.tolist() == [[0, 0, 7]]


def test_compensation_is_least_squares() -> None:
    """With the first columns fixed, the value each column aims at minimises the error that is left, by lstsq."""
    x = correlated(50, 3)
    statistics = seen(x, torch.float64)
    w = torch.tensor([[0.83, -0.41, 7.0], [2.37, 7.0, -0.73]])
    found = gptq(w, spec("int4-channel-sym"), statistics, damping=0.0, act_order=False).codes.numpy()
    xs, ws = x.double().numpy(), w.double().numpy()
    for row in range(2):
        for k in range(3):
            left = xs[:, :k] @ (ws[row, :k] - found[row, :k])  # what the columns before got wrong in the output
            best = np.linalg.lstsq(xs[:, k:], xs[:, k:] @ ws[row, k:] + left, rcond=None)[0]
            assert found[row, k] == np.clip(np.rint(best[0]), -8, 7)


@pytest.mark.parametrize(("text", "grid"), [(t, "minmax") for t in SPECS + ELEMENTS] + [(t, "mse") for t in SPECS])
def test_inputs_that_do_not_correlate_leave_the_nearest_codes(text: str, grid: str) -> None:
    w = gaussian(8, 64, seed=2)
    statistics = seen(torch.diag(gaussian(64, seed=1)).repeat(2, 1))
    found = gptq(w, spec(text), statistics, grid=grid)
    nearest = quantize_tensor(w, text, "mse" if grid == "mse" else "rtn", statistics=statistics)
    assert found.digests() == nearest.digests()


@pytest.mark.parametrize("text", SPECS)
@pytest.mark.parametrize("solver", ["gptq", "gptq_mse"])
def test_less_output_error_more_weight_error(text: str, solver: str) -> None:
    x, w = correlated(2000, 192), gaussian(32, 192, seed=3)
    nearest = quantize_tensor(w, text, "mse" if solver == "gptq_mse" else "rtn", statistics=seen(x))
    found = quantize_tensor(w, text, solver, statistics=seen(x))
    assert output_error(w, found, x) < 0.65 * output_error(w, nearest, x)
    assert output_error(w, found, torch.eye(192)) > output_error(w, nearest, torch.eye(192))


@pytest.mark.parametrize("text", [*ELEMENTS, *STORED_IN_TWO_LEVELS, *FLOATS, *CODEBOOKS])
def test_other_elements_and_scales_stored_in_two_levels(text: str) -> None:
    x, w = correlated(2000, 256), gaussian(32, 256, seed=3)
    statistics = seen(x)
    nearest = quantize_tensor(w, text, "kmeans" if "codebook" in text else "rtn", statistics=statistics)
    found = quantize_tensor(w, text, "gptq", statistics=statistics)
    assert output_error(w, found, x) < (0.9 if "ary" in text or "code" in text else 0.65) * output_error(w, nearest, x)
    for name, parameter in nearest.parameters.items():
        assert torch.equal(found.parameters[name].view(torch.uint8), parameter.view(torch.uint8))


def test_act_order_lowers_the_output_error() -> None:
    x = (
        correlated(2000, 192)
        * torch.logspace(0, -2, 192)[torch.randperm(192, generator=torch.Generator().manual_seed(0))]
    )
    w = gaussian(64, 192, seed=3)
    ordered, plain = (gptq(w, spec("int3-g32-sym"), seen(x), act_order=order) for order in (True, False))
    assert output_error(w, ordered, x) < 0.9 * output_error(w, plain, x)


def test_every_level_gives_the_same_codes() -> None:
    x, w = correlated(500, 160), gaussian(37, 160, seed=3)
    digests = set()
    before = _C.cpu_level()
    for level in _C.build_info()["cpu_levels"]:
        _C.set_cpu_level(level)
        digests |= {
            gptq(w, spec(text), seen(x)).digests()["codes"]
            for text in ("int3-g32-sym", "codebook16-g32", "codebook40-row")
        }
    _C.set_cpu_level(before)
    assert len(digests) == 3


def test_16_bit_and_transposed_weights_give_the_codes_of_their_values() -> None:
    x, w = correlated(500, 64), gaussian(16, 64, seed=3).bfloat16()
    expected = gptq(w.float(), spec("gguf:Q4_0"), seen(x)).digests()
    assert gptq(w, spec("gguf:Q4_0"), seen(x)).digests() == expected
    assert gptq(w.T.contiguous().T, spec("gguf:Q4_0"), seen(x)).digests() == expected


def test_inputs_that_were_always_zero_get_the_nearest_code() -> None:
    x, w = correlated(500, 64), gaussian(8, 64, seed=3)
    x[:, 10:20] = 0
    found, nearest = gptq(w, spec("int4-g32-sym"), seen(x)), quantize_tensor(w, "int4-g32-sym")
    assert torch.equal(found.codes[:, 10:20], nearest.codes[:, 10:20])
    assert not torch.equal(found.codes, nearest.codes)
    silent = gptq(w, spec("int4-g32-sym"), seen(torch.zeros(500, 64)))
    assert torch.equal(silent.codes, nearest.codes)


@pytest.mark.parametrize("damping", [0.0, 1e-9, 0.01])
def test_moments_that_are_not_positive_definite(damping: float) -> None:
    """Fewer tokens than inputs, equal inputs, and a sum that rounding made indefinite."""
    w = gaussian(8, 64, seed=3)
    x = correlated(20, 64)
    x[:, 1] = x[:, 0]
    statistics = seen(x)
    statistics.moments[5, 5] *= 0.5
    statistics.tokens = 128
    found, nearest = gptq(w, spec("int4-g32-sym"), statistics, damping=damping), quantize_tensor(w, "int4-g32-sym")
    h = statistics.hessian.double()
    errors = [((d := (w - qt.dequantize()).double()) @ h * d).sum() for qt in (found, nearest)]
    assert errors[0] < errors[1]


def test_a_starved_layer_gets_the_nearest_codes_and_a_warning() -> None:
    w = gaussian(8, 256, seed=3)
    with pytest.warns(UserWarning, match="256 inputs saw 511 tokens, too few"):
        found = gptq(w, spec("int4-g32-sym"), seen(gaussian(511, 256)))
    assert found.digests() == quantize_tensor(w, "int4-g32-sym").digests()


def test_errors() -> None:
    w = gaussian(4, 64)
    negative = seen(gaussian(200, 64))
    negative.moments[:2, :2] = torch.tensor([[1.0, -1e9], [-1e9, 1.0]])
    with pytest.raises(PhiquantError, match="cannot be factored"):
        gptq(w, spec("int4-g32-sym"), negative)
    with pytest.raises(PhiquantError, match="proj: the solver gptq needs statistics of the layer's inputs"):
        quantize_tensor(w, "int4-g32-sym", "gptq", name="proj")
    with pytest.raises(PhiquantError, match="has 64 inputs, its statistics are of 32"):
        gptq(w, spec("int4-g32-sym"), seen(gaussian(50, 32)))
    w[2, 7] = float("nan")
    with pytest.raises(PhiquantError, match=r"proj holds 1 value\(s\) .* at index \[2, 7\]"):
        quantize_tensor(w, "int4-g32-sym", "gptq", name="proj", statistics=seen(gaussian(200, 64)))


def arguments() -> dict:
    return {
        "target": gaussian(4, 6),
        "weight": gaussian(4, 6),
        "feedback": gaussian(4, 4),
        "column": torch.tensor([3, 1, 0, 2]),
        "scale": torch.rand(2, 6) + 0.1,
        "offset": torch.zeros(2, 6),
        "codes": torch.empty(4, 6, dtype=torch.int8),
    }


def test_opcheck() -> None:
    op = torch.ops.phiquant.gptq_run.default
    torch.library.opcheck(op, (*list(arguments().values())[:6], False, -8, 7, arguments()["codes"]))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("weight", torch.zeros(4, 5), "weight must have shape"),
        ("feedback", torch.zeros(4, 4).double(), "feedback must be float32"),
        ("scale", torch.zeros(3, 6), "offset must have shape"),
        ("column", torch.tensor([0, 1, 2, 4]), "column must be an index"),
        ("column", torch.tensor([0, 1, 2]), "column must be int64"),
        ("codes", torch.empty(4, 6, dtype=torch.uint8), "codes must be int8"),
        ("target", torch.zeros(129, 6), "at most 128 columns"),
        ("target", torch.zeros(6, 4).T, "target must be contiguous"),
    ],
)
def test_the_op_checks_its_arguments(name: str, value: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.gptq_run(**(arguments() | {name: value}), minimum=False, qmin=-8, qmax=7)


def inputs_of_a_layer(model: Any, tokenizer: Any, text: str, count: int) -> tuple[torch.Tensor, Statistics]:
    """256 rows of the second layer's gate_up_proj, and what that reads in the float model."""
    layer, found = model.model.layers[1], Statistics(256)
    hook = layer.mlp.gate_up_proj.register_forward_pre_hook(lambda _, x: found.update(x[0]))
    with torch.no_grad():
        model(torch.tensor(windows(tokenizer, text, 512, count)), use_cache=False, logits_to_keep=1)
    hook.remove()
    return layer.mlp.gate_up_proj.weight.detach()[:256], found


def test_levels_and_codes_weighed_by_the_inputs_on_the_outlier_twin(phi3_tiny: tuple[Any, Any]) -> None:
    """k-means with the diagonal of H errs less than without; gptq on its levels less still, and gptq_refine."""
    twin = testing.outlier_twin(phi3_tiny[0])
    w, found = inputs_of_a_layer(twin, phi3_tiny[1], testing.training_text(60_000), 4)
    h = found.hessian.double()
    for text in ("codebook8-row", "codebook4-g64-f16"):
        errors = []
        for solver, known in (("kmeans", None), ("kmeans", found), ("gptq", found), ("gptq_refine", found)):
            wrong = (w - quantize_tensor(w, text, solver, statistics=known).dequantize()).double()
            errors.append(((wrong @ h) * wrong).sum().item())
        assert errors[1] < 0.5 * errors[0], errors
        assert errors[2] < 0.9 * errors[1], errors
        assert errors[3] < 0.97 * errors[2], errors
