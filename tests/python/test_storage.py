"""Scales of eight bits against microxcaling's rule in numpy, ml_dtypes, and the decoders of MLX and gguf-py."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import phiquant as pq
import phiquant.ops as ops
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

# element format: its largest exponent, its type, its largest value
ELEMENTS = {
    "mxfp4": (2, ml_dtypes.float4_e2m1fn, 6.0),
    "mxfp8_e4m3": (8, ml_dtypes.float8_e4m3fn, 448.0),
    "mxfp8_e5m2": (15, ml_dtypes.float8_e5m2, 57344.0),
}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.05


def wide(rows: int, block: int, seed: int = 0) -> Tensor:
    """Rows from 2^-140 to 2^120, with values near the powers of two where an exponent changes."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.linspace(-140, 120, rows).round().reshape(-1, 1)
    x = torch.randn(rows, block, generator=generator) * torch.exp2(exponents)
    x[:, 0] = torch.exp2(exponents[:, 0]) * torch.tensor([1.0, 1.5, 1.75, 1.9999])[torch.arange(rows) % 4]
    return x


def microxcaling(x: np.ndarray, emax: int) -> np.ndarray:
    """Codes of the shared exponents of rows, as mx/mx_ops.py finds them: floor(log2 max|x|) - emax, clamped."""
    largest = np.abs(x).max(1).astype(np.float64)
    largest += np.finfo(np.float32).tiny * (largest == 0)
    shared = np.floor(np.log2(largest)) - emax
    assert (shared <= 127).all()
    return (np.maximum(shared, -127) + 127).astype(np.uint8)


@pytest.mark.parametrize("name", ELEMENTS)
def test_mx_is_microxcaling(level: str, name: str) -> None:
    emax, dtype, largest = ELEMENTS[name]
    x = torch.cat([random(16, 32), wide(64, 32), torch.zeros(1, 32)])
    qt = pq.quantize_tensor(x, name)
    stored = qt.scales.view(torch.uint8).numpy().ravel()
    np.testing.assert_array_equal(stored, microxcaling(x.numpy(), emax))
    normal = stored > 0  # 2^-127 is a float32 subnormal; values of such a block become 0
    scale = np.exp2(stored.astype(np.float64) - 127)[:, None]
    q = np.clip(x.double().numpy() / scale, -largest, largest).astype(dtype)
    mask = (1 << pq.spec(name).element.bits) - 1
    np.testing.assert_array_equal(qt.codes.numpy()[normal], (q.view(np.uint8) & mask)[normal])
    np.testing.assert_array_equal(qt.dequantize().double().numpy()[normal], (scale * q.astype(np.float64))[normal])
    assert not qt.dequantize()[~normal].any()


def test_absmax_between_six_and_eight_is_clipped(level: str) -> None:
    """The price of the floor rule, which MX formats pay: 7.9 becomes 6."""
    x = torch.zeros(1, 32)
    x[0, :3] = torch.tensor([7.9, 6.0, 1.0])
    y = pq.fake_quantize(x.requires_grad_(), "mxfp4")
    assert y[0, :3].tolist() == [6.0, 6.0, 1.0]
    y.sum().backward()
    assert x.grad[0, :3].tolist() == [0.0, 1.0, 1.0]


@pytest.mark.parametrize(("name", "mode"), [("mxfp4", "mxfp4"), ("mxfp8_e4m3", "mxfp8")])
def test_mx_decodes_in_mlx(level: str, name: str, mode: str) -> None:
    mx = pytest.importorskip("mlx.core")
    qt = pq.quantize_tensor(random(8, 128), name)
    bits = qt.spec.element.bits
    words = ops.pack_bits(qt.codes, bits).view(torch.int32).reshape(8, -1).numpy().view(np.uint32)
    scales = qt.scales.view(torch.uint8).numpy()
    how = {"group_size": 32, "bits": bits, "mode": mode, "dtype": mx.float32}
    found = np.array(mx.dequantize(mx.array(words), mx.array(scales), **how))
    np.testing.assert_array_equal(qt.dequantize().numpy(), found)


def test_mxfp4_is_gguf(level: str) -> None:
    gguf = pytest.importorskip("gguf")
    x = random(8, 128)
    qt = pq.quantize_tensor(x, "mxfp4")
    codes = qt.codes.numpy().reshape(-1, 2, 16)
    blocks = np.concatenate(
        [qt.scales.view(torch.uint8).numpy().reshape(-1, 1), codes[:, 0] | codes[:, 1] << 4], axis=1
    )
    kind = gguf.GGMLQuantizationType.MXFP4
    np.testing.assert_array_equal(gguf.quants.dequantize(blocks, kind).reshape(8, 128), qt.dequantize().numpy())
    theirs = gguf.quants.quantize(x.numpy(), kind).reshape(-1, 17)
    np.testing.assert_array_equal(theirs[:, 0], blocks[:, 0])  # the shared exponents are the same


def test_e4m3_scales_are_rounded_as_ml_dtypes_rounds(level: str) -> None:
    """Every e4m3 value, the ties between neighbours, and values around them."""
    positive = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    between = (positive[1:] + positive[:-1]) / 2
    near = np.concatenate([np.nextafter(between, f) for f in (np.float32(0), np.float32(1e9))])
    scales = np.concatenate([positive, between, near, np.float32([449, 464, 1e9, 2**-10, 2**-11])])
    lo = torch.zeros(len(scales))
    found, _, _ = ops.range_from_min_max(
        lo, torch.from_numpy(scales), qmin=-1, qmax=1, rule="absmax", scale_dtype=torch.float8_e4m3fn
    )
    expected = np.minimum(scales, np.float32(448)).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(found.view(torch.uint8).numpy(), expected.view(np.uint8))


@pytest.mark.parametrize("dtype", [torch.float8_e8m0fnu, torch.float8_e4m3fn])
def test_the_composition_stores_the_same(level: str, dtype: torch.dtype) -> None:
    from phiquant.ops import composition

    x = wide(97, 16, seed=4)
    lo, hi = x.amin(1), x.amax(1)
    for qmin, qmax, format in ((-8, 7, 0), (-128, 127, 0), (0, 15, 3), (0, 255, 1)):
        arguments = (lo, hi, qmin, qmax, composition.ABSMAX, composition.STORAGE.index(dtype), format)
        kernel, _ = torch.ops.phiquant.range_from_min_max.default(*arguments)
        composed, _ = composition.range_from_min_max(*arguments)
        assert torch.equal(kernel, composed)


NAMES = ["mxfp4", "mxfp8_e4m3", "mxfp8_e5m2", "mxint8", "int4-g32-sym-e4m3", "nf4-g64-sym-e8m0"]


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    scale=st.sampled_from([0.0, 1e-45, 1e-38, 1e-30, 1e-3, 1.0, 1e5, 1e30, 1e37]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 50),
)
def test_codes_decode_to_what_fake_quantize_gives(name: str, scale: float, dtype: torch.dtype, seed: int) -> None:
    x = (random(3, 128, seed=seed) * scale).to(dtype)
    qt = pq.quantize_tensor(x, name)
    y = pq.fake_quantize(x, name)
    assert torch.isfinite(y).all()
    assert torch.equal(y, qt.dequantize(dtype))
    assert torch.equal(pq.fake_quantize(x, name, scale=qt.scales), y)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_known_scales(name: str) -> None:
    x = random(4, 128).requires_grad_()
    pq.fake_quantize(x, name).sum().backward()
    known = x.detach().clone().requires_grad_()
    pq.fake_quantize(known, name, scale=pq.quantize_tensor(x.detach(), name).scales).sum().backward()
    assert torch.equal(x.grad, known.grad)


def test_the_search_finds_the_power_of_two_above(level: str) -> None:
    """Floor clips 127 * 2^-6 .. 128 * 2^-6; where many values lie there, the next power loses less."""
    x = torch.full((1, 32), 1.999)
    rtn, mse = (pq.quantize_tensor(x, "int4-g32-sym-e8m0", solver=s) for s in ("rtn", "mse"))
    assert (rtn.scales.float().item(), mse.scales.float().item()) == (0.25, 0.5)
    assert (mse.dequantize() - x).abs().max() < (rtn.dequantize() - x).abs().max()


def test_digests_and_state_hold_the_stored_bytes() -> None:
    from phiquant.modules import StoredCodes

    qt = pq.quantize_tensor(random(4, 64), "mxfp4")
    other = pq.quantize_tensor(random(4, 64) * 2, "mxfp4")
    assert qt.digests()["codes"] == other.digests()["codes"]
    assert qt.digests()["parameters"] != other.digests()["parameters"]
    copy = StoredCodes(other)
    copy.load_state_dict(StoredCodes(qt).state_dict())
    assert copy.half().quantized.digests() == qt.digests()


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_values_that_are_not_finite_are_named(name: str) -> None:
    w = random(2, 64)
    w[1, 40] = float("inf")
    with pytest.raises(pq.PhiquantError, match=r"index \[1, 40\]"):
        pq.quantize_tensor(w, name)
