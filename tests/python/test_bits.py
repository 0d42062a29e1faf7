"""Packed codes against numpy's bit packing, MLX and compressed-tensors; sizes and codes that do not fit."""

from __future__ import annotations

import numpy as np
import phiquant.ops as ops
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

BITS = range(1, 9)


def random_codes(n: int, low: int, values: int, seed: int = 0) -> Tensor:
    dtype = torch.int8 if low < 0 else torch.uint8
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, low + values, (n,), generator=generator, dtype=torch.int32).to(dtype)


def numpy_stream(codes: np.ndarray, bits: int) -> np.ndarray:
    each = np.unpackbits(codes[:, None], axis=1, bitorder="little")[:, :bits]
    return np.packbits(each.reshape(-1), bitorder="little")


@pytest.mark.parametrize("bits", BITS)
def test_every_code_comes_back(level: str, bits: int) -> None:
    for low in (0, -(1 << (bits - 1))):
        codes = torch.arange(low, low + (1 << bits)).to(torch.int8 if low < 0 else torch.uint8)
        packed = ops.pack_bits(codes, bits, low)
        assert packed.dtype == torch.uint8
        assert packed.numel() == (codes.numel() * bits + 7) // 8
        np.testing.assert_array_equal(packed.numpy(), numpy_stream((codes.int() - low).numpy().astype(np.uint8), bits))
        back = ops.unpack_bits(packed, codes.numel(), bits, low)
        assert back.dtype == codes.dtype
        assert torch.equal(back, codes)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(0, 700), bits=st.integers(1, 8), signed=st.booleans(), seed=st.integers(0, 99))
def test_any_length_equals_numpy(n: int, bits: int, signed: bool, seed: int) -> None:
    low = -(1 << (bits - 1)) if signed else 0
    codes = random_codes(n, low, 1 << bits, seed)
    packed = ops.pack_bits(codes, bits, low)
    np.testing.assert_array_equal(packed.numpy(), numpy_stream((codes.int() - low).numpy().astype(np.uint8), bits))
    assert torch.equal(ops.unpack_bits(packed, n, bits, low), codes)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(0, 300), low=st.sampled_from([0, -1]), seed=st.integers(0, 99))
def test_trits_are_digits_of_base_three(n: int, low: int, seed: int) -> None:
    codes = random_codes(n, low, 3, seed)
    digits = np.zeros((n + 4) // 5 * 5, np.int64)
    digits[:n] = codes.numpy().astype(np.int64) - low
    packed = ops.pack_trits(codes, low)
    np.testing.assert_array_equal(packed.numpy(), (digits.reshape(-1, 5) * 3 ** np.arange(5)).sum(1))
    assert torch.equal(ops.unpack_trits(packed, n, low), codes)


def test_ternary_takes_1_6_bits() -> None:
    assert 8 * ops.pack_trits(random_codes(1000, -1, 3)).numel() == 1600


def test_two_threads_pack_the_same(level: str) -> None:
    codes = random_codes(1 << 20, 0, 8)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = ops.pack_bits(codes, 3)
        torch.set_num_threads(2)
        assert torch.equal(ops.pack_bits(codes, 3), one)
        assert torch.equal(ops.unpack_bits(one, codes.numel(), 3), codes)
        trits = random_codes(1 << 20, -1, 3)
        assert torch.equal(ops.unpack_trits(ops.pack_trits(trits), trits.numel()), trits)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_the_stream_is_mlx(bits: int) -> None:
    mx = pytest.importorskip("mlx.core")
    w = torch.randn(4, 128, generator=torch.Generator().manual_seed(bits))
    words, scales, biases = mx.quantize(mx.array(w.numpy()), group_size=32, bits=bits)
    stream = torch.from_numpy(np.array(words).view(np.uint8).reshape(-1).copy())
    codes = ops.unpack_bits(stream, w.numel(), bits).reshape(4, 4, 32).numpy()
    decoded = codes * np.array(scales)[..., None] + np.array(biases)[..., None]
    expected = np.array(mx.dequantize(words, scales, biases, group_size=32, bits=bits))
    np.testing.assert_allclose(decoded.reshape(4, 128), expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(ops.pack_bits(torch.from_numpy(codes), bits), stream)


def test_the_stream_is_compressed_tensors() -> None:
    packing = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = random_codes(8 * 64, -8, 16).reshape(8, 64)
    words = packing.pack_to_int32(codes, 4)
    assert torch.equal(ops.pack_bits(codes, 4, -8), words.contiguous().view(torch.uint8).reshape(-1))


def test_not_contiguous_codes_are_packed_in_row_major_order() -> None:
    codes = random_codes(12 * 20, 0, 8).reshape(12, 20).t()
    assert torch.equal(ops.pack_bits(codes, 3), ops.pack_bits(codes.contiguous(), 3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.pack_bits(torch.tensor([8], dtype=torch.uint8), 3), r"outside 0 \.\. 7"),
        (lambda: ops.pack_bits(torch.tensor([-9], dtype=torch.int8), 4, -8), r"outside -8 \.\. 7"),
        (lambda: ops.pack_trits(torch.tensor([2], dtype=torch.int8)), r"outside -1 \.\. 1"),
        (lambda: ops.pack_bits(torch.zeros(3), 4), "int8 or uint8"),
        (lambda: ops.pack_bits(torch.zeros(3, dtype=torch.uint8), 9), "bits must be 1 to 8"),
        (lambda: ops.pack_bits(torch.zeros(3, dtype=torch.uint8), 0), "bits must be 1 to 8"),
        (lambda: ops.unpack_bits(torch.zeros(3, dtype=torch.uint8), 9, 3), "take 4 bytes, but packed has 3"),
        (lambda: ops.unpack_bits(torch.zeros(3, dtype=torch.uint8), 5, 3), "take 2 bytes, but packed has 3"),
        (lambda: ops.unpack_bits(torch.zeros(3, dtype=torch.uint8), -1, 3), "count must be"),
        (lambda: ops.unpack_bits(torch.zeros(3, dtype=torch.uint8), 2**62, 8), "count must be"),
        (lambda: ops.unpack_bits(torch.zeros(3), 3, 8), "must be uint8"),
        (lambda: ops.unpack_trits(torch.tensor([243], dtype=torch.uint8), 5), "above 242"),
        (lambda: ops.unpack_trits(torch.zeros(2, dtype=torch.uint8), 11), "take 3 bytes"),
        (lambda: ops.pack_bits(torch.zeros(3, dtype=torch.uint8), 3, 200), "low must be"),
    ],
)
def test_what_does_not_fit_is_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_opcheck() -> None:
    codes = random_codes(37, -1, 3)
    for bits, n in ((3, 14), (0, 8)):
        torch.library.opcheck(torch.ops.phiquant.pack_codes.default, (codes, bits, -1))
        packed = torch.zeros(n, dtype=torch.uint8)
        torch.library.opcheck(torch.ops.phiquant.unpack_codes.default, (packed, 37, bits, -1))
