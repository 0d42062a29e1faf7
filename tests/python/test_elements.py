"""Every element at every CPU level: round trips, nearest levels, gradients, layouts, other implementations."""

from __future__ import annotations

import math
import re
import statistics
from pathlib import Path

import ml_dtypes
import numpy as np
import phiquant as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from phiquant import _C, ops
from phiquant.elements import Element, read_element
from phiquant.fake_quant import encode, encode_dynamic
from phiquant.ops.composition import KERNELS
from phiquant.tensor import element_arguments
from torch import Tensor

FLOATS = ["e4m3fn", "e5m2", "e2m1", "e1m2", "e3m0"]
ML_DTYPES = {"e4m3fn": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2, "e2m1": ml_dtypes.float4_e2m1fn}
ELEMENTS: list[Element] = [
    *(pq.Int(bits, signed) for bits in range(1, 9) for signed in (True, False)),
    pq.FixedPoint(3, 4),
    pq.FixedPoint(0, 3),
    *(pq.Float(name) for name in FLOATS),
    pq.NormalFloat(),
    pq.IQ4NL(),
    pq.Binary(),
    pq.Ternary(),
    *(pq.Codebook(size) for size in (2, 3, 16, 17, 64, 65, 256)),
]
SPECS = [
    *(f"int{bits}-g32-signmax" for bits in range(1, 9)),
    *(f"uint{bits}-channel-asym" for bits in range(1, 9)),
    *("int4-tensor-sym", "int8-token-sym", "uint4-g32-min-f16", "int3-rows2-sym"),
    *(f"{name}-{grain}-sym" for name in ("fp8_e4m3", "fp8_e5m2", "fp4_e2m1", "fp4_e1m2", "fp4_e3m0", "nf4")
      for grain in ("tensor", "channel", "channel1", "g32", "row", "rows2", "token")),
    *("iq4nl-g32-signmax-f16", "iq4nl-channel-sym", "iq4nl-g32-signmax"),
    *("nf4-g64-sym-f16", "fp4_e2m1-g32-sym-bf16", "fp8_e4m3-channel-sym-f16"),
    *(f"{name}-{grain}" for name in ("binary", "ternary") for grain in
      ("tensor-sym", "channel-sym", "channel1-sym", "g32-sym-f16", "rows2-sym", "token-sym")),
    *("ternary-channel-absmean", "ternary-g32-absmean-bf16"),
    *("q3.4", "q0.1", "q7.0"),
]  # fmt: skip
CODEBOOKS = ["codebook2-tensor", "codebook16-tensor", "codebook16-row", "codebook64-rows2-f16", "codebook256-g64"]


# avx512vnni has the kernels of avx512 here
LEVELS = [name for name in _C.build_info()["cpu_levels"] if name != "avx512vnni"]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def codebook_for(spec: pq.QuantSpec, shape: tuple[int, ...], seed: int = 1) -> Tensor:
    blocks = math.prod(spec.scale_shape(shape))
    levels = random(blocks, spec.element.qmax + 1, seed=seed).to(getattr(torch, spec.scale_dtype))
    return levels.sort(1).values


def levels_of(element: Element) -> Tensor:
    """Distinct finite values at scale 1, ascending; a codebook gets random ones."""
    values = random(element.qmax + 1, seed=3).tolist() if element.levels is None else element.levels
    return torch.tensor(sorted({v for v in values if math.isfinite(v)}))


def grid(element: Element) -> dict:
    book = None if element.levels is not None else levels_of(element)
    return {"qmin": element.qmin, "qmax": element.qmax, **element_arguments(element, book)}


def step_of(element: Element) -> Tensor:
    return torch.tensor(element.step if isinstance(element, pq.FixedPoint) else 1.0)


# --- codes and values -----------------------------------------------------------------------------


@pytest.mark.parametrize("element", ELEMENTS, ids=str)
def test_every_code_makes_the_round_trip(level: str, element: Element) -> None:
    codes = torch.arange(element.qmin, element.qmax + 1).to(torch.int8 if element.signed else torch.uint8)
    arguments = grid(element)
    values = ops.dequantize(codes, step_of(element), **_without_range(arguments))
    expected = levels_of(element) if element.levels is None else torch.tensor(element.levels)
    torch.testing.assert_close(values, expected, rtol=0, atol=0, equal_nan=True)
    known = values.isfinite()
    again = ops.quantize(values[known], step_of(element), **arguments)
    assert torch.equal(again, codes[known])


def _without_range(arguments: dict) -> dict:
    return {name: value for name, value in arguments.items() if name not in ("qmin", "qmax")}


@pytest.mark.parametrize("element", ELEMENTS, ids=str)
def test_codes_are_the_nearest_by_brute_force(level: str, element: Element) -> None:
    levels = levels_of(element).double()
    middles = (levels[1:] + levels[:-1]) / 2
    x = torch.cat([random(2000) * levels.abs().max() * 0.6, levels, middles]).float()
    x = torch.cat([x, x.nextafter(torch.tensor(math.inf)), x.nextafter(torch.tensor(-math.inf))])
    y = ops.fake_quantize(x, step_of(element), **grid(element))
    assert torch.isin(y.double(), levels).all()
    x, y = x[(x == 0) | (x.abs() > 1e-30)], y[(x == 0) | (x.abs() > 1e-30)]  # distances stay exact in float64
    distance = (x.double()[:, None] - levels).abs()
    best, at = distance.min(1)
    assert torch.equal((y.double() - x.double()).abs(), best)
    tied = (distance == best[:, None]).sum(1) == 2
    assert tied.any() or isinstance(element, pq.Codebook)
    upper = levels[torch.where(tied, at + 1, at)].float()[tied]
    lower = levels[at].float()[tied]
    if isinstance(element, pq.NormalFloat | pq.IQ4NL | pq.Binary | pq.Codebook):  # a tie goes up
        assert torch.equal(y[tied], upper)
    elif not (isinstance(element, pq.Float) and element.format == "e3m0"):  # a tie goes to the even code
        code = ops.quantize(x[tied], step_of(element), **grid(element))
        assert not (code.int() & 1).any()
    else:  # no fraction bit decides: ties go away from zero, but the one between 0 and the smallest value
        away = torch.where(upper.abs() > lower.abs(), upper, lower)
        assert torch.equal(y[tied], torch.where(x[tied].abs() == 0.125, 0.0, away))


@pytest.mark.parametrize("text", SPECS)
def test_decode_of_encode_is_the_fake_quantization_and_stays(level: str, text: str) -> None:
    dtype = torch.bfloat16 if "channel" in text else torch.float32
    w = random(6, 64).to(dtype)
    spec = pq.spec(text)
    assert pq.spec(str(spec)) == spec
    qt = encode_dynamic(w, spec)
    assert torch.equal(qt.dequantize(dtype), pq.fake_quantize(w, spec))
    again = encode(qt.dequantize(), spec, qt.scales, qt.zero_points, qt.minimums)
    assert torch.equal(again.dequantize(), qt.dequantize())
    assert qt.digests() == encode_dynamic(w, spec).digests()


@pytest.mark.parametrize("text", CODEBOOKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_codebooks_by_brute_force(level: str, text: str, dtype: torch.dtype) -> None:
    w = random(6, 64).to(dtype)
    spec = pq.spec(text)
    book = codebook_for(spec, (6, 64))
    qt = encode(w, spec, None, codebook=book)
    wide = book.double()
    middles = (wide[:, 1:] + wide[:, :-1]) / 2
    rows = w.double().reshape(len(book), -1, 1)
    expected = (rows >= middles[:, None]).sum(2).reshape(6, 64)  # a tie goes up
    assert torch.equal(qt.codes.long(), expected)
    y = pq.fake_quantize(w, spec, codebook=book)
    assert torch.equal(y, book.float().gather(1, expected.reshape(len(book), -1)).reshape(6, 64).to(dtype))
    assert torch.equal(qt.dequantize(dtype), y)


@pytest.mark.parametrize("name", ML_DTYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_floats_equal_ml_dtypes(level: str, name: str, dtype: torch.dtype) -> None:
    element = pq.Float(name)
    inputs = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)  # every bfloat16
    x = torch.cat([inputs[inputs.isfinite()].float(), random(5000) * element.largest / 3]).to(dtype)
    x = x[x.isfinite()]
    saturated = x.float().clamp(-element.largest, element.largest).numpy()
    expected = saturated.astype(ML_DTYPES[name])
    codes = ops.quantize(x, torch.tensor(1.0), qmin=0, qmax=element.qmax, format=name)
    np.testing.assert_array_equal(codes.numpy(), expected.view(np.uint8))
    values = ops.fake_quantize(x.float(), torch.tensor(1.0), qmin=0, qmax=element.qmax, format=name)
    np.testing.assert_array_equal(values.numpy().view(np.int32), expected.astype(np.float32).view(np.int32))
    every = np.arange(element.qmax + 1, dtype=np.uint8)
    decoded = ops.dequantize(torch.from_numpy(every), torch.tensor(1.0), format=name).numpy()
    np.testing.assert_array_equal(decoded, every.view(ML_DTYPES[name]).astype(np.float32))


@pytest.mark.parametrize(("name", "dtype"), [("e4m3fn", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)])
def test_floats_equal_torch_where_it_does_not_overflow(level: str, name: str, dtype: torch.dtype) -> None:
    largest = pq.Float(name).largest
    x = (random(20_000) * largest / 2).clamp(-largest, largest)
    codes = ops.quantize(x, torch.tensor(1.0), qmin=0, qmax=255, format=name)
    assert torch.equal(codes.view(dtype).float(), x.to(dtype).float())


def test_nan_gets_the_lowest_level_and_infinities_the_ends(level: str) -> None:
    x = torch.tensor([math.nan, -math.inf, math.inf, 3e38, -3e38])
    for element in ELEMENTS:
        levels = levels_of(element)
        low, high = levels[0], levels[-1]
        y = ops.fake_quantize(x, step_of(element), **grid(element))
        assert torch.equal(y, torch.stack([low, low, high, high, low])), element


def test_zero_keeps_its_sign_in_floats_and_counts_as_positive_in_binary(level: str) -> None:
    x = torch.tensor([0.0, -0.0, -1e-30])
    codes = ops.quantize(x, torch.tensor(1.0), qmin=0, qmax=15, format="e2m1")
    assert codes.tolist() == [0, 8, 8]
    assert ops.quantize(x, torch.tensor(1.0), **grid(pq.Binary())).tolist() == [1, 1, 0]


def test_nf4_levels_are_the_quantiles_of_the_paper() -> None:
    """create_normal_map of QLoRA: 8 quantiles up to 0.9677083 above zero, 7 below, divided by the largest."""
    quantile = statistics.NormalDist().inv_cdf
    end = 0.9677083
    above = [quantile(end + (0.5 - end) * i / 8) for i in range(8)]
    below = [-quantile(end + (0.5 - end) * i / 7) for i in range(7)]
    levels = sorted(v / above[0] for v in [*above, 0.0, *below])
    np.testing.assert_allclose(pq.NormalFloat().levels, levels, atol=2e-7)


# --- scales ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("element", [*FLOATS, "nf4"])
def test_absmax_goes_to_the_largest_level(element: str) -> None:
    w = random(4, 64)
    spec = pq.QuantSpec(read_element(element), pq.PerChannel())
    qt = encode_dynamic(w, spec)
    largest = max(v for v in spec.element.levels if math.isfinite(v))
    np.testing.assert_array_equal(qt.scales.numpy(), w.abs().amax(1, keepdim=True).numpy() / np.float32(largest))


@pytest.mark.parametrize("shape", [(3, 1), (3, 7), (5, 4096), (2, 5000), (1, 40_001), (2, 70_000)])
def test_means_of_magnitudes(level: str, shape: tuple[int, int]) -> None:
    w = random(*shape)
    w[0, 0] = math.nan  # passed over
    size = w.abs().double()
    mean = size.nanmean(1, keepdim=True)
    binary, absmean, twn = (
        pq.fake_quantize(w, f"{text}")
        for text in ("binary-channel-sym", "ternary-channel-absmean", "ternary-channel-sym")
    )
    if shape != (3, 1):
        torch.testing.assert_close(binary.abs().amax(1, keepdim=True).double(), mean, rtol=1e-5, atol=0)
    sign = torch.where(w >= 0, 1.0, -1.0)
    assert torch.equal(binary.sign()[~w.isnan()], sign[~w.isnan()])
    keep = ~w.isnan() & ((size / mean - 0.5).abs() > 1e-5)
    assert torch.equal((absmean != 0)[keep], (size > 0.5 * mean)[keep])
    above = size > 0.7 * mean
    keep = ~w.isnan() & ((size / mean - 0.7).abs() > 1e-5)
    assert torch.equal((twn != 0)[keep], above[keep])
    scale = (size * above).nansum(1, keepdim=True) / above.sum(1, keepdim=True)
    found = twn.abs().amax(1, keepdim=True).double()
    torch.testing.assert_close(found[1:], scale[1:], rtol=1e-5, atol=0)


def test_binary_scale_is_the_least_squares_one() -> None:
    w = random(1, 500)
    qt = encode_dynamic(w, pq.spec("binary-tensor-sym"))
    best = (w.abs().sum() / w.numel()).item()
    for factor in (0.9, 1.1):
        worse = encode(w, qt.spec, torch.tensor([[best * factor]]))
        assert (worse.dequantize() - w).square().sum() > (qt.dequantize() - w).square().sum()


# --- gradients ------------------------------------------------------------------------------------

REACH = {  # how far beyond the outermost level the gradient passes, in units of the scale
    "e4m3fn": (464.0, True), "e5m2": (61440.0, False), "e2m1": (7.0, False), "e1m2": (3.75, False),
    "e3m0": (24.0, False), "nf4": (1 + (1 - 0.7229568362236023) / 2, True), "binary": (2.0, True),
}  # fmt: skip


@pytest.mark.parametrize("name", REACH)
def test_the_gradient_passes_up_to_half_a_step_beyond_the_end(level: str, name: str) -> None:
    edge, inclusive = REACH[name]
    edge32 = torch.tensor(edge)
    up, down = edge32.nextafter(torch.tensor(math.inf)), edge32.nextafter(torch.tensor(0.0))
    x = torch.stack([down, edge32, up, torch.tensor(0.0), torch.tensor(math.inf), torch.tensor(math.nan)])
    x.requires_grad_()
    ops.fake_quantize(x, torch.tensor(1.0), **grid(read_element(name))).backward(torch.arange(1.0, 7.0))
    assert x.grad.tolist() == [1.0, 2.0 if inclusive else 0.0, 0.0, 4.0, 0.0, 0.0]


@pytest.mark.parametrize("text", [s for s in SPECS if "channel1" not in s])
def test_the_gradient_is_the_mask_of_the_position(level: str, text: str) -> None:
    spec = pq.spec(text)
    x = random(6, 64)
    x[0, 0], x[1, 3] = 8.0, -9.0
    x.requires_grad_()
    qt = encode_dynamic(x.detach(), spec)
    weights = random(6, 64, seed=9)
    (
        pq.fake_quantize(x, spec, scale=qt.scales, zero_point=qt.zero_points, minimum=qt.minimums) * weights
    ).sum().backward()
    assert torch.equal(torch.where(x.grad == 0, 0.0, weights), x.grad)  # selected, never scaled
    inside = (qt.dequantize() - x.detach()).abs() <= 1e-6
    assert (x.grad[inside] != 0).all()


@pytest.mark.parametrize("text", ["ternary-channel-sym", "fp4_e2m1-g32-sym-f16", "nf4-row-sym", "binary-tensor-sym"])
def test_training_moves_a_weight_towards_its_target(text: str) -> None:
    w = random(8, 32).requires_grad_()
    target = pq.fake_quantize(random(8, 32, seed=5), text)
    before = (pq.fake_quantize(w, text) - target).square().sum()
    optimizer = torch.optim.SGD([w], lr=0.2)
    for _ in range(60):
        optimizer.zero_grad()
        (pq.fake_quantize(w, text) - target).square().sum().backward()
        optimizer.step()
    assert (pq.fake_quantize(w, text) - target).square().sum() < 0.2 * before


# --- layouts, levels, other devices ---------------------------------------------------------------


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.data())
def test_any_shape_stride_and_value(data: st.DataObject) -> None:
    rows, columns = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 70))
    bits = data.draw(st.lists(st.integers(0, 2**32 - 1), min_size=rows * columns, max_size=rows * columns))
    x = torch.tensor(bits, dtype=torch.int64).to(torch.uint32).view(torch.float32).reshape(columns, rows).t()
    x = x.to(data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])))
    spec = pq.spec(
        data.draw(st.sampled_from([s for s in SPECS if "g32" not in s and "g64" not in s and "rows2" not in s]))
    )
    before, found = _C.cpu_level(), []
    for name in LEVELS:
        _C.set_cpu_level(name)
        found.append(pq.fake_quantize(x, spec))
    _C.set_cpu_level(before)
    whole = x.contiguous()
    codes = {str(encode_dynamic(v, spec).digests()["codes"]) for v in (x, whole)}
    assert len(codes) == 1
    for y in [*found[1:], pq.fake_quantize(whole, spec), pq.fake_quantize(x, spec, out=torch.empty_like(x))]:
        assert _same_bits(y, found[0])


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if not a.is_floating_point():
        return a.dtype == b.dtype and torch.equal(a, b)
    ints = {4: torch.int32, 2: torch.int16}[a.element_size()]
    both_nan = a.isnan() & b.isnan()
    same = a.contiguous().view(ints) == b.contiguous().view(ints)
    return a.dtype == b.dtype and bool((same | both_nan).all())


def _awkward(dtype: torch.dtype) -> Tensor:
    special = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e30, -1e30, 1e-40, 0.5, 2.5, -2.5, 65520.0, 7.0, 464.0, 0.25]
    x = random(6, 64) * 3
    x[:, : len(special)] = torch.tensor(special)
    x[4], x[5] = math.nan, 0.0
    return x.to(dtype)


def _tables() -> list[tuple[int, Tensor | None]]:
    shared = [levels_of(element)[None] for element in (pq.Binary(), pq.NormalFloat())]
    own = [random(12, size, seed=size).sort(1).values for size in (2, 16, 40, 256)]
    return [*((format, None) for format in range(1, 6)), *((6, table) for table in (*shared, *own))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("format", "levels"), _tables(), ids=lambda v: str(v if isinstance(v, int) else v.shape if v is not None else "")
)
def test_kernels_equal_the_composition_bit_for_bit(
    level: str, format: int, levels: Tensor | None, dtype: torch.dtype
) -> None:
    x = _awkward(dtype)
    scale = torch.tensor([1.0, 0.0, 0.1, 1e-45, -0.25, 3e-3, 0.5, 2, 1, 1, 1, 1])
    named = {"format": format, "levels": levels}
    codes = torch.arange(6 * 64).reshape(6, 64).to(torch.uint8)
    calls: list[tuple[str, tuple]] = [
        ("quantize", (x, scale, None, False, 0, 255)),
        ("fake_quantize", (x, scale, None, False, 0, 255)),
        ("fake_quantize_backward", (torch.ones_like(x), x, scale, None, False, 0, 255)),
        ("dequantize_out", (codes, scale, None, False)),
    ]
    if levels is None or len(levels) == 1:
        rules = (ops.RULES["absmax"], ops.RULES["absmean"])
        dynamic = [(x, 32, 0, 255, rule, storage) for rule in rules for storage in range(3)]
        calls += [(name, a) for a in dynamic for name in ("quantize_dynamic", "fake_quantize_dynamic")]
        calls += [("fake_quantize_dynamic_backward", (x, *a)) for a in dynamic]
    check_calls(calls, named, dtype)


def check_calls(calls: list[tuple[str, tuple]], named: dict, dtype: torch.dtype) -> None:
    by_name = {k.__name__: k for k in KERNELS}
    for name, arguments in calls:
        results = []
        for run in (getattr(torch.ops.phiquant, name).default, by_name[name]):
            if name.endswith("_out"):
                results.append(torch.empty(6, 64, dtype=dtype))
                run(*arguments, results[-1], **named)
            else:
                results.append(run(*arguments, **named))
        for a, b in zip(*(r if isinstance(r, tuple) else (r,) for r in results), strict=True):
            assert _same_bits(a, b), (name, arguments[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", ["absmean", "twn"])
def test_means_equal_the_composition_bit_for_bit(level: str, rule: str, dtype: torch.dtype) -> None:
    dynamic = [(_awkward(dtype), block, -1, 1, ops.RULES[rule], 0) for block in (1, 2, 16, 48, 64, 384)]
    long = random(2, 70_001, seed=4).to(dtype)
    dynamic += [(long[:, :n].contiguous(), n, -1, 1, ops.RULES[rule], 0) for n in (5000, 40_000, 70_001)]
    calls = [(name, a) for a in dynamic for name in ("quantize_dynamic", "fake_quantize_dynamic")]
    check_calls([*calls, *(("fake_quantize_dynamic_backward", (a[0], *a)) for a in dynamic)], {}, dtype)


def test_long_blocks_are_cut_without_a_trace() -> None:
    x = random(1, 200_001)
    for text in ("fp8_e4m3-tensor-sym", "nf4-tensor-sym", "binary-tensor-sym", "ternary-tensor-sym"):
        whole = encode_dynamic(x, pq.spec(text))
        rows = encode_dynamic(x, pq.spec(text.replace("tensor", "row")))
        assert torch.equal(whole.codes, rows.codes)
        assert torch.equal(whole.dequantize(), pq.fake_quantize(x, text))
    book = random(1, 200).sort(1).values
    expected = (x.reshape(-1, 1) - book).abs().argmin(1).to(torch.uint8)
    assert torch.equal(encode(x, pq.spec("codebook200-tensor"), None, codebook=book).codes.flatten(), expected)


def _samples() -> list[tuple[str, tuple, dict]]:
    x = random(4, 64).requires_grad_()
    scale, table = torch.full((8,), 0.1), {"format": 6, "levels": random(8, 16).sort(1).values}
    shared = {"format": 6, "levels": levels_of(pq.NormalFloat())[None]}
    e2m1, dynamic = {"format": 3}, (32, 0, 15, 0, 0)
    return [
        ("quantize", (x.detach(), scale, None, False, 0, 15), table),
        ("dequantize_out", (torch.ones(4, 64, dtype=torch.uint8), scale, None, False, torch.empty(4, 64)), table),
        ("fake_quantize", (x, scale, None, False, 0, 15), e2m1),
        ("fake_quantize", (x, scale, None, False, 0, 15), table),
        ("fake_quantize_backward", (x.detach(), x.detach(), scale, None, False, 0, 15), table),
        ("quantize_dynamic", (x.detach(), *dynamic), shared),
        ("fake_quantize_dynamic", (x, *dynamic), e2m1),
        ("fake_quantize_dynamic", (x, 32, -1, 1, 5, 0), {}),
        ("fake_quantize_dynamic_out", (x.detach(), *dynamic, torch.empty(4, 64)), shared),
        ("choose_range", (x.detach(), *dynamic), e2m1),
        ("range_from_min_max", (-scale, scale, 0, 15, 0, 0), shared),
    ]


@pytest.mark.parametrize(("name", "arguments", "named"), _samples(), ids=lambda v: v if isinstance(v, str) else "")
def test_opcheck(name: str, arguments: tuple, named: dict) -> None:
    torch.library.opcheck(getattr(torch.ops.phiquant, name).default, arguments, named)


def test_compile_whole_graph() -> None:
    def step(x: Tensor) -> Tensor:
        return sum(pq.fake_quantize(x, s).square().sum() for s in ("nf4-g32-sym", "fp8_e4m3-row-sym", "binary-row-sym"))

    eager, compiled = (random(4, 64).requires_grad_() for _ in range(2))
    expected = step(eager)
    expected.backward()
    found = torch.compile(step, fullgraph=True, backend="aot_eager")(compiled)
    found.backward()
    assert torch.equal(found, expected)
    assert torch.equal(compiled.grad, eager.grad)


# --- modules, solvers, errors ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["fp8_e4m3-channel-sym", "nf4-g32-sym", "binary-channel-sym", "ternary-channel-sym", "q1.6"]
)
def test_layers_train_on_the_grid_and_keep_its_codes(text: str) -> None:
    spec = pq.spec(text)
    layer = torch.nn.Linear(64, 8)
    quantizer = pq.FakeQuantize(spec)
    assert torch.equal(quantizer(layer.weight), pq.fake_quantize(layer.weight, spec))
    assert torch.equal(quantizer.quantize(layer.weight).dequantize(), quantizer(layer.weight))


@pytest.mark.parametrize("text", ["fp8_e5m2-tensor-sym", "fp4_e2m1-token-sym", "nf4-channel-sym"])
def test_observers_find_the_range_of_floats(text: str) -> None:
    x = random(4, 64)
    quantizer = pq.FakeQuantize(text, range="observer")
    assert torch.equal(quantizer(x), pq.fake_quantize(x, text))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: pq.fake_quantize(w, "codebook16-row"), r"needs codebook= of shape \[4, 16\]; none was given"),
        (lambda w: pq.fake_quantize(w, "codebook16-row", codebook=w), r"got \[4, 64\]"),
        (lambda w: pq.fake_quantize(w, "nf4-row-sym", scale=w[:, :1].abs(), codebook=w), "has no codebook"),
        (lambda w: encode_dynamic(w, pq.spec("codebook4-tensor")), "chosen by k-means"),
        (lambda w: encode(w, pq.spec("codebook64-row"), None, codebook=w), "must ascend"),
        (lambda w: pq.FakeQuantize("codebook4-tensor"), "keeps no codebook"),
        (lambda w: pq.FakeQuantize("q3.4", range="observer"), "no scale to observe"),
        (lambda w: pq.FakeQuantize("binary-row-sym", range="observer")(w), "mean of |x|, which no range gives"),
        (lambda w: pq.spec("int1-channel-sym"), "no largest level"),
        (lambda w: pq.spec("nf4-g64-asym"), "only integers take"),
        (lambda w: pq.spec("int4-g32-absmean"), "rule of binary and ternary"),
        (lambda w: pq.spec("codebook16-channel"), "a codebook is per tensor"),
        (lambda w: pq.spec("q3.4-channel"), "step of q3.4 is fixed"),
        (lambda w: pq.spec("q5.5"), "2 to 8 are possible"),
        (lambda w: pq.spec("codebook1-tensor"), "2 to 256 levels"),
        (lambda w: pq.spec("fp6_e3m2-tensor-sym"), "unknown element 'fp6_e3m2'"),
        (lambda w: pq.spec("nf4-g64"), "cannot read spec"),
        (lambda w: pq.spec("int4-rows3-sym").scale_shape((4, 64)), "3 rows do not divide"),
        (lambda w: ops.quantize(w, torch.ones(4, 1), qmin=0, qmax=15, format="table"), "levels are given"),
        (lambda w: ops.quantize(w, torch.ones(4, 1), qmin=0, qmax=15, format="e9"), "format is one of"),
        (lambda w: ops.quantize(w, torch.ones(4, 1), qmin=0, qmax=15, format="table", levels=w[:3]), "row per block"),
    ],
)  # fmt: skip
def test_errors_say_what_is_wrong(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        call(random(4, 64))


def test_gguf_and_safetensors_refuse_other_elements() -> None:
    from phiquant.formats.gguf.types import type_for

    with pytest.raises(pq.PhiquantError, match="Q4_0 has codes of int4, not of nf4"):
        type_for("w", pq.spec("nf4-g32-sym-f16"), (32, 32))


# --- the range of least squared error -------------------------------------------------------------

SEARCHED = [
    *("fp8_e4m3-channel-sym", "fp8_e5m2-g32-sym", "fp4_e2m1-g32-sym-f16", "fp4_e1m2-row-sym", "fp4_e3m0-g32-sym"),
    *("nf4-g64-sym", "nf4-tensor-sym", "binary-channel-sym", "ternary-channel-sym", "ternary-g32-sym-bf16"),
]


@pytest.mark.parametrize("text", SEARCHED)
def test_the_search_is_never_worse_than_the_rule(level: str, text: str) -> None:
    w = random(16, 320, seed=8)
    spec = pq.spec(text)
    searched, plain = (pq.quantize_tensor(w, spec, solver=solver) for solver in ("mse", "rtn"))
    blocks = math.prod(spec.scale_shape((16, 320)))
    found, before = ((qt.dequantize() - w).double().reshape(blocks, -1).square().sum(1) for qt in (searched, plain))
    assert (found <= before * (1 + 1e-6)).all()
    if text != "binary-channel-sym":
        assert found.sum() < before.sum()
    _C.set_cpu_level("scalar")
    assert torch.equal(pq.quantize_tensor(w, spec, solver="mse").scales, searched.scales)


@pytest.mark.parametrize("text", ["fp4_e2m1-row-sym", "nf4-row-sym"])
def test_the_search_finds_the_best_of_its_candidates(text: str) -> None:
    w = random(1, 64, seed=2)
    spec = pq.spec(text)
    largest = max(spec.element.levels)
    widest = w.abs().max() / largest

    def error(ratio: float) -> float:
        scale = (widest * ratio).reshape(1, 1)
        return float((pq.fake_quantize(w, spec, scale=scale) - w).double().square().sum())

    found = float((pq.quantize_tensor(w, spec, solver="mse").dequantize() - w).double().square().sum())
    assert found <= min(error(1 - 0.04 * i) for i in range(16)) * (1 + 1e-5)


def test_a_value_that_is_not_finite_is_seen_by_every_solver() -> None:
    w = random(4, 64)
    w[2, 5] = math.inf
    for text in ("nf4-g32-sym", "binary-channel-sym", "ternary-channel-sym", "q3.4", "fp8_e4m3-tensor-sym"):
        for solver in ("rtn", "mse"):
            with pytest.raises(pq.PhiquantError, match=r"index \[2, 5\]"):
                pq.quantize_tensor(w, text, solver=solver)


def test_the_table_of_the_docs_is_what_is_measured() -> None:
    w = random(64, 4096)
    page = (Path(__file__).parents[2] / "docs/elements.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| `([\w.-]+)` \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", page, re.M)
    assert len(table) == 12
    for text, bits, *errors in table:
        assert float(bits) == pytest.approx(pq.spec(text).bits_per_weight((64, 4096)), abs=5e-3)
        for solver, error in zip(("rtn", "mse"), errors, strict=True):
            y = pq.quantize_tensor(w, text, solver=solver).dequantize()
            assert float((y - w).norm() / w.norm()) == pytest.approx(float(error), abs=5.1e-4), (text, solver)
