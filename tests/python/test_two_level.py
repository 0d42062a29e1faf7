"""Two-level scales against gguf-py, numpy with ml_dtypes, and MLX; their projection, gradient, digests and errors."""

from __future__ import annotations

import kquants
import ml_dtypes
import numpy as np
import phiquant as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from phiquant import _C, ops, two_level
from phiquant.fake_quant import encode_two_level
from phiquant.modules import StoredCodes
from phiquant.observers import range_arguments
from phiquant.spec import NAMED, Float, Int, PerChannel, PerGroup, QuantSpec, TwoLevel, spec
from torch import Tensor

K_QUANTS = ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k"]
TWO_LEVEL = [*K_QUANTS, "nvfp4", "vsq4", "int4-g32-sym-uint8/128", "int8-g16-sym-bf16-int8/channel"]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.05


def error(y: Tensor, x: Tensor) -> float:
    return float((y.double() - x.double()).square().sum())


@pytest.mark.parametrize("solver", ["rtn", "mse"])
@pytest.mark.parametrize("name", K_QUANTS)
def test_blocks_decode_in_gguf_to_the_same_bits(level: str, name: str, solver: str) -> None:
    gguf = pytest.importorskip("gguf")
    w = random(8, 1024)
    w[3] *= 1e-3
    w[4] = w[4].abs()
    w[5, :256] = 0
    qt = pq.quantize_tensor(w, name, solver=solver)
    stored = kquants.blocks(qt, name)
    kind = gguf.GGMLQuantizationType[name.upper()]
    assert stored.shape[1] == gguf.GGML_QUANT_SIZES[kind][1]
    assert 8 * stored.shape[1] / 256 == pq.spec(name).bits_per_weight((8, 1024))
    np.testing.assert_array_equal(gguf.quants.dequantize(stored, kind).reshape(8, 1024), qt.dequantize().numpy())


def test_q4_k_is_its_formula(level: str) -> None:
    """Super-block scale, block codes, then the codes of the values: each rounded before the next is chosen."""
    w = random(2, 512, seed=3).numpy()
    qt = pq.quantize_tensor(torch.from_numpy(w), "q4_k")
    blocks = w.reshape(4, 8, 32)
    low = np.minimum(blocks.min(2), 0)
    f32 = np.float32

    def codes_of(ideal: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        d = (ideal.max(1, keepdims=True) / f32(63)).astype(np.float16).astype(f32)
        return np.clip(np.rint(ideal * (f32(1) / d)), 0, 63), d

    m, dmin = codes_of(-low)
    minimum = -(dmin * m)
    sc, d = codes_of(np.maximum((blocks.max(2) - minimum) / f32(15), 0))
    scale = d * sc
    q = np.clip(np.rint((blocks - minimum[..., None]) * (f32(1) / scale[..., None])), 0, 15)
    y = scale[..., None] * q + minimum[..., None]
    np.testing.assert_array_equal(qt.minimums.numpy().reshape(4, 8), m)
    np.testing.assert_array_equal(qt.scales.numpy().reshape(4, 8), sc)
    np.testing.assert_array_equal(qt.super_scales.float().numpy().reshape(4, 1), d)
    np.testing.assert_array_equal(qt.codes.numpy().reshape(4, 8, 32), q)
    np.testing.assert_array_equal(qt.dequantize().numpy().reshape(4, 8, 32), y)


def test_nvfp4_is_its_formula(level: str) -> None:
    w = random(4, 64, seed=1).numpy()
    qt = pq.quantize_tensor(torch.from_numpy(w), "nvfp4")
    blocks = w.reshape(-1, 16)
    ideal = np.abs(blocks).max(1) / np.float32(6)
    d = ideal.max() / np.float32(448)
    s = (ideal * (np.float32(1) / d)).astype(ml_dtypes.float8_e4m3fn)
    assert qt.super_scales.item() == d
    np.testing.assert_array_equal(qt.scales.view(torch.uint8).numpy().ravel(), s.view(np.uint8))
    scale = d * s.astype(np.float32)
    q = (blocks * (np.float32(1) / scale)[:, None]).astype(ml_dtypes.float4_e2m1fn)
    np.testing.assert_array_equal(qt.codes.numpy().reshape(-1, 16), q.view(np.uint8) & 15)
    np.testing.assert_array_equal(qt.dequantize().numpy().reshape(-1, 16), scale[:, None] * q.astype(np.float32))


def test_nvfp4_decodes_in_mlx(level: str) -> None:
    mx = pytest.importorskip("mlx.core")
    qt = pq.quantize_tensor(random(8, 64), "nvfp4")
    words = pq.ops.pack_bits(qt.codes, 4).view(torch.int32).reshape(8, -1).numpy().view(np.uint32)
    scales = qt.scales.view(torch.uint8).numpy()
    without = np.array(
        mx.dequantize(mx.array(words), mx.array(scales), group_size=16, bits=4, mode="nvfp4", dtype=mx.float32)
    )
    expected = without.astype(np.float64) * qt.super_scales.double().numpy()
    np.testing.assert_allclose(qt.dequantize().double().numpy(), expected, rtol=2e-7)


def test_vsq_is_its_formula(level: str) -> None:
    w = random(4, 64, seed=2).numpy()
    qt = pq.quantize_tensor(torch.from_numpy(w), "vsq4")
    ideal = np.abs(w.reshape(4, 4, 16)).max(2) / np.float32(7)
    d = (ideal.max(1, keepdims=True) / np.float32(15)).astype(np.float16).astype(np.float32)
    s = np.clip(np.rint(ideal * (1 / d)), 0, 15)
    np.testing.assert_array_equal(qt.scales.numpy(), s)
    np.testing.assert_array_equal(qt.super_scales.float().numpy(), d)


@pytest.mark.parametrize("name", TWO_LEVEL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fake_quantize_is_the_decode_of_the_codes(level: str, name: str, dtype: torch.dtype) -> None:
    x = random(4, 512).to(dtype)
    qt = pq.quantize_tensor(x, name)
    y = pq.fake_quantize(x, name)
    assert y.dtype == dtype
    assert torch.equal(y, qt.dequantize(dtype))
    out = torch.empty_like(x)
    assert pq.fake_quantize(x, name, out=out) is out
    assert torch.equal(out, y)
    if dtype == torch.float32:
        crossed = x.t().contiguous().t()
        assert torch.equal(pq.fake_quantize(crossed, name), y)


def test_all_cpu_levels_choose_the_same() -> None:
    x = random(8, 1024)
    x[0, 0], x[1] = 1e-30, 0.0
    before = _C.cpu_level()
    try:
        for name in TWO_LEVEL:
            for solver in ("rtn", "mse"):
                digests = set()
                for cpu_level in _C.build_info()["cpu_levels"]:
                    _C.set_cpu_level(cpu_level)
                    digests.add(tuple(pq.quantize_tensor(x, name, solver=solver).digests().values()))
                assert len(digests) == 1, (name, solver)
    finally:
        _C.set_cpu_level(before)


@pytest.mark.parametrize("name", TWO_LEVEL)
def test_mse_is_better_than_rtn(name: str) -> None:
    w = random(16, 1024)
    rtn, mse = (error(pq.quantize_tensor(w, name, solver=s).dequantize(), w) for s in ("rtn", "mse"))
    assert mse < rtn


def test_more_bits_are_better() -> None:
    w = random(16, 1024)
    errors = [error(pq.fake_quantize(w, name), w) for name in K_QUANTS]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("name", TWO_LEVEL)
def test_gradient_passes_where_the_code_was_not_clamped(name: str) -> None:
    x = random(2, 512).requires_grad_()
    pq.fake_quantize(x, name).backward(torch.ones(2, 512))
    qt = pq.quantize_tensor(x.detach(), name)
    scale, _, minimum = qt.grid()
    assert x.grad is not None
    clean = x.detach().clone().requires_grad_()
    pq.ops.fake_quantize(
        clean, scale, None, minimum, **{k: v for k, v in pq.observers.range_arguments(pq.spec(name)).items()
                                        if k not in ("rule", "scale_dtype")}
    ).sum().backward()  # fmt: skip
    assert torch.equal(x.grad, clean.grad)
    assert set(x.grad.unique().tolist()) <= {0.0, 1.0}
    assert x.grad.mean() > 0.9


def test_trains_in_a_layer_and_converts() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(256, 8, bias=False))
    pq.prepare_qat(model, "q4_k")
    model(random(3, 256)).sum().backward()
    assert model[0].weight.grad is not None
    before = model(random(3, 256))
    pq.convert(model)
    assert torch.equal(model(random(3, 256)), before)
    copy = StoredCodes(pq.quantize_tensor(torch.zeros(8, 256), "q4_k"))
    copy.load_state_dict(model[0].weight_quantizer.state_dict())
    assert copy.quantized.digests() == model[0].quantized.digests()


def test_digests_cover_every_piece() -> None:
    qt = pq.quantize_tensor(random(2, 256), "q4_k")
    whole = qt.digests()["parameters"]
    assert list(qt.parameters) == ["scales", "minimums", "super_scales", "super_minimums"]
    for part in qt.parameters.values():
        kept = part.clone()
        part.reshape(-1)[0] += 1
        assert qt.digests()["parameters"] != whole
        part.copy_(kept)
        assert qt.digests()["parameters"] == whole


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(TWO_LEVEL),
    rows=st.integers(0, 3),
    scale=st.sampled_from([0.0, 1e-42, 1e-30, 1e-8, 1e-4, 1.0, 1e4, 1e30, 1e38]),
    seed=st.integers(0, 50),
)
def test_any_size_of_values_stays_finite(name: str, rows: int, scale: float, seed: int) -> None:
    x = random(rows, 512, seed=seed) * scale
    qt = pq.quantize_tensor(x, name)
    y = qt.dequantize()
    assert y.shape == x.shape
    assert torch.isfinite(y).all()
    assert torch.equal(pq.fake_quantize(x, name), y)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["q4_k", "nvfp4", "q6_k"])
def test_values_that_are_not_finite_are_named(name: str, bad: float) -> None:
    w = random(2, 256)
    w[1, 7] = bad
    with pytest.raises(pq.PhiquantError, match=r"w.*index \[1, 7\]"):
        pq.quantize_tensor(w, name, name="w")


@pytest.mark.parametrize("name", [*NAMED, *TWO_LEVEL])
def test_specs_are_read_back_from_their_text(name: str) -> None:
    spec = pq.spec(name)
    assert pq.spec(str(spec)) == spec


def test_effective_bits() -> None:
    figures = {name: pq.spec(name).bits_per_weight((4096, 4096)) for name in NAMED}
    assert figures["vsq4"] == 4.25 + 16 / 4096  # the course's 4.25, and an fp16 scale per channel
    k_quants = {"q2_k": 2.625, "q3_k": 3.4375, "q4_k": 4.5, "q5_k": 5.5, "q6_k": 6.5625}
    assert {name: figures[name] for name in k_quants} == k_quants
    assert figures["nvfp4"] == 4.5 + 32 / 4096**2
    assert (figures["mxfp4"], figures["mxfp8_e4m3"], figures["mxfp8_e5m2"]) == (4.25, 8.25, 8.25)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TwoLevel("uint9", 256), "uint2..uint8"),
        (lambda: TwoLevel("e5m2", 256), "uint2..uint8"),
        (lambda: TwoLevel("uint6", 0), "super-block"),
        (lambda: TwoLevel("uint6", "row"), "super-block"),  # type: ignore[arg-type]
        (lambda: QuantSpec(Int(4), PerGroup(32), two_level=TwoLevel("uint6", 48)), "whole number of groups"),
        (lambda: QuantSpec(Int(4), PerChannel(), two_level=TwoLevel("uint6", 256)), "for groups"),
        (lambda: QuantSpec(Int(4), PerGroup(32), "zero_point", two_level=TwoLevel("uint6", 256)), "for groups"),
        (
            lambda: QuantSpec(Int(4), PerGroup(32), anchor="signed_absmax", two_level=TwoLevel("uint6", 256)),
            "scales of both signs",
        ),
        (
            lambda: QuantSpec(Float("e2m1"), PerGroup(16), "none", "float8_e4m3fn", two_level=TwoLevel("uint6", 64)),
            "upper of two levels",
        ),
        (lambda: QuantSpec(Int(4), PerGroup(32), scale_dtype="float8_e5m2"), "scale_dtype is one of"),
        (lambda: QuantSpec(Int(4, False), PerGroup(32), "minimum", "float8_e8m0fnu"), "grid without offset"),
        (lambda: QuantSpec(Int(4), PerGroup(32), "none", "float8_e8m0fnu", "signed_absmax"), "power of two"),
        (lambda: pq.spec("q4_k").scale_shape((8, 320)), "super-block of 256 values does not divide"),
        (lambda: pq.FakeQuantize("q4_k", range="observer"), "use range='tensor'"),
        (lambda: pq.spec("int4-g32-sym-uint6/row"), "cannot read spec"),
    ],
)
def test_what_makes_no_grid_is_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_tensor_that_super_blocks_do_not_divide_is_named() -> None:
    with pytest.raises(pq.PhiquantError, match=r"w: a super-block of 256"):
        pq.quantize_tensor(random(4, 320), "q4_k", name="w")


def test_opcheck_and_errors_of_the_fused_op() -> None:
    op = torch.ops.phiquant.fake_quantize_two_level_out.default
    x, out = random(2, 512), torch.empty(2, 512)
    own = (32, 0, 15, ops_rule("minimum"), 0)
    torch.library.opcheck(op, (x, *own, 8, 0, 63, ops_rule("absmax"), 0, 2, None, out))
    for arguments, message in (
        ((x, *own, 7, 0, 63, 0, 0, 2, None, out), "are not super-blocks of 7"),
        ((x, *own, 8, 0, 63, 0, 0, 2, torch.ones(1), out), "without a minimum"),
        ((x, 32, -8, 7, 0, 0, 8, 0, 63, 0, 0, 2, torch.ones(2), out), "must be one value"),
        ((x, *own, 8, 0, 63, 0, 0, 2, None, out.half()), "out must have"),
    ):
        with pytest.raises(ValueError, match=message):
            op(*arguments)


def ops_rule(name: str) -> int:
    return pq.ops.RULES[name]


@pytest.mark.parametrize("name", TWO_LEVEL)
def test_one_pass_gives_what_the_separate_steps_give(level: str, name: str) -> None:
    """The fused kernel against the path that training takes, threads and odd sizes of batches included."""
    x = random(37, 1536, seed=9)
    x[5] *= 1e-4
    fused = pq.fake_quantize(x, name)
    apart = pq.fake_quantize(x.clone().requires_grad_(), name).detach()
    assert torch.equal(fused, apart)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(pq.fake_quantize(x, name), fused)
    finally:
        torch.set_num_threads(before)


def test_the_figures_of_the_docs() -> None:
    """docs/storage.md: relative errors on normal weights, and who is better at the same size."""
    w = torch.randn(256, 4096, generator=torch.Generator().manual_seed(0))

    def lost(name: str) -> float:
        return float((pq.fake_quantize(w, name) - w).norm() / w.norm())

    assert lost("mxfp4") == pytest.approx(0.115, abs=0.001)
    assert lost("nvfp4") == pytest.approx(0.095, abs=0.001)
    assert lost("q4_k") == pytest.approx(0.078, abs=0.001)
    assert lost("int4-g32-sym-f16") == pytest.approx(0.097, abs=0.001)
    sizes = {pq.spec(name).bits_per_weight((256, 4096)) for name in ("q4_k", "int4-g32-sym-f16")}
    assert sizes == {4.5}


def test_blocks_far_below_the_largest_become_zeros() -> None:
    """A code of n bits holds scales of a limited ratio: the reason to prefer e4m3 where blocks differ much."""
    w = torch.ones(1, 256)
    w[0, :32] = 1000.0
    assert not pq.fake_quantize(w, "int4-g32-sym-f16-uint6/256")[0, 32:].any()
    assert pq.fake_quantize(w, "int4-g32-sym-e4m3/tensor")[0, 32:].all()


def weighed_error(x: torch.Tensor, y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Of each super-block of 256, float64."""
    return ((y - x).double().square() * weights.double()).reshape(-1, 256).sum(1)


@pytest.mark.parametrize("text", ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_lower_the_weighed_error(text: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(16, 512, generator=generator).to(dtype)
    weights = torch.randn(512, generator=generator).square() + 0.01
    blind, found = (encode_two_level(x, spec(text), mse=True, weights=w) for w in (None, weights))
    before, after = (weighed_error(x.float(), q.dequantize(), weights) for q in (blind, found))
    assert after.sum() < 0.9 * before.sum()


@pytest.mark.parametrize(
    "text", ["q2_k", "q4_k", "q6_k", "nf4-g32-sym-f16-uint6/256", "fp4_e2m1-g32-sym-bf16-uint4/256"]
)
def test_refining_never_makes_a_super_block_worse(text: str) -> None:
    """From parameters that are not good, by one and two rounds, at every CPU level with the same bits."""
    generator = torch.Generator().manual_seed(2)
    x, weights = torch.randn(6, 512, generator=generator), torch.rand(512, generator=generator)
    wanted = spec(text)
    grid = range_arguments(wanted)
    known = {name: value for name, value in grid.items() if name not in ("rule", "scale_dtype")}
    start = two_level.choose(x, wanted, grid)

    def error(parameters: two_level.Parameters) -> torch.Tensor:
        scale, minimum = parameters.block_values()
        return weighed_error(x, ops.fake_quantize(x, scale, None, minimum, **known), weights)

    results = []
    for level in _C.build_info()["cpu_levels"]:
        before = _C.cpu_level()
        _C.set_cpu_level(level)
        try:
            results.append(two_level._refined(start, x, wanted, grid, weights))
        finally:
            _C.set_cpu_level(before)
    for one in results:
        pairs = zip(one, results[0], strict=True)
        assert all(torch.equal(a, b) for a, b in pairs if a is not None and b is not None)
    assert (error(results[0]) <= error(start) * (1 + 1e-5)).all()
    assert error(results[0]).sum() < error(start).sum()


def test_refining_finds_the_only_exact_parameters() -> None:
    """Values on a grid: from codes one off, the codes of that grid come back, with no error left."""
    generator = torch.Generator().manual_seed(3)
    codes, scales = (
        torch.randint(-4, 4, (1, 16, 16), generator=generator),
        torch.randint(5, 20, (1, 16), generator=generator),
    )
    codes[..., 0] = -4
    x = (codes * scales[..., None] * 0.125).reshape(1, 256)
    found, super_scales = (scales + 1).float(), torch.full((1, 1), 0.125)
    named = {"qmin": -4, "qmax": 3, "rule": "signed_absmax", "sub_qmin": -32, "sub_qmax": 31}
    ops.refine_two_level(x, torch.ones(256), found, super_scales, **named, scale_dtype=torch.float16)
    assert torch.equal(found, scales.float())
    assert super_scales.item() == 0.125


def test_refine_is_an_operation_as_torch_wants_it() -> None:
    x, scales, supers = torch.randn(2, 256), torch.full((2, 16), 3.0), torch.full((2, 1), 0.1)
    arguments = (x, torch.ones(256), 16, -4, 3, 1, 0, None, -32, 31, 1, 1, scales, supers, None, None)
    torch.library.opcheck(torch.ops.phiquant.refine_two_level.default, arguments)
    with pytest.raises(ValueError, match="whole super-blocks"):
        ops.refine_two_level(
            x, torch.ones(100), scales, supers, qmin=-4, qmax=3, rule="signed_absmax", sub_qmin=-32, sub_qmax=31,
            scale_dtype=torch.float16,
        )  # fmt: skip
