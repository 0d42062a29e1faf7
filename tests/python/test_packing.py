"""pack and unpack: every element's codes as dense bytes, with numpy's bits as the oracle."""

from __future__ import annotations

import math

import numpy as np
import phiquant as pq
import pytest
import torch

SPECS = (
    *(f"int{bits}-g32-sym" for bits in range(2, 9)),
    *(f"uint{bits}-g32-asym" for bits in range(1, 9)),
    "q1.2", "fp8_e4m3-tensor-sym", "fp8_e5m2-g32-sym", "fp4_e2m1-g32-sym", "nf4-g32-sym", "binary-channel-sym",
    "ternary-channel-sym", "mxfp4", "q4_k", "codebook5-tensor", "codebook256-tensor",
)  # fmt: skip


def quantized(spec: str) -> pq.QuantizedTensor:
    w = torch.randn(6, 256, generator=torch.Generator().manual_seed(0))
    return pq.quantize_tensor(w, spec, solver="kmeans" if spec.startswith("codebook") else "rtn")


@pytest.mark.parametrize("spec", SPECS)
def test_codes_come_back(spec):
    qt = quantized(spec)
    packed = pq.pack(qt)
    per_code = 8 / 5 if spec.startswith("ternary") else qt.spec.element.bits
    assert packed.dtype == torch.uint8
    assert packed.numel() == math.ceil(qt.codes.numel() * per_code / 8)
    codes = pq.unpack(packed, qt.shape, qt.spec)
    assert codes.dtype == qt.codes.dtype
    assert torch.equal(codes, qt.codes)


def test_bits_are_numpys():
    qt = quantized("int3-g32-sym")
    stored = (qt.codes.numpy().astype(np.int64) + 4).reshape(-1)
    bits = (stored[:, None] >> np.arange(3)) & 1
    assert np.array_equal(pq.pack(qt).numpy(), np.packbits(bits.reshape(-1).astype(np.uint8), bitorder="little"))


def test_a_code_outside_the_codebook_is_refused():
    with pytest.raises(ValueError, match="a code of 7 is none of codebook5"):
        pq.unpack(torch.tensor([0b00111000], dtype=torch.uint8), (2,), "codebook5-tensor")


def test_a_wrong_size_is_refused():
    with pytest.raises(ValueError, match="4 codes"):
        pq.unpack(torch.zeros(9, dtype=torch.uint8), (4,), "int4-tensor-sym")
