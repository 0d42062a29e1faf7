"""QuantizedTensor: what it checks, decodes and digests."""

from __future__ import annotations

import hashlib

import pytest
import torch
from phiquant import QuantizedTensor, quantize_tensor, spec


def test_dequantize_is_the_formula() -> None:
    for text in ("int4-g32-sym-f16", "uint4-g32-asym", "uint4-g32-min-f16", "int8-channel-sym", "int4-channel1-sym"):
        qt = quantize_tensor(torch.randn(32, 64, generator=torch.Generator().manual_seed(0)), text)
        repeat = [n // s for n, s in zip(qt.shape, qt.scales.shape, strict=True)]

        def spread(t: torch.Tensor, repeat: list[int] = repeat) -> torch.Tensor:
            return t.float().repeat_interleave(repeat[0], 0).repeat_interleave(repeat[1], 1)

        q = qt.codes.float()
        if qt.minimums is not None:
            expected = q * spread(qt.scales) + spread(qt.minimums)
        else:
            expected = (q - (0 if qt.zero_points is None else spread(qt.zero_points))) * spread(qt.scales)
        assert torch.equal(qt.dequantize(), expected)
        assert torch.equal(qt.dequantize(torch.bfloat16), expected.bfloat16())


def test_digests_are_of_the_bytes_as_stored() -> None:
    qt = quantize_tensor(torch.randn(4, 64), "uint4-g32-min-f16")
    codes = hashlib.sha256(qt.codes.numpy().tobytes()).hexdigest()
    parameters = hashlib.sha256(qt.scales.numpy().tobytes() + qt.minimums.numpy().tobytes()).hexdigest()
    assert qt.digests() == {"codes": codes, "parameters": parameters}


def test_digests_of_bfloat16_parameters() -> None:
    qt = quantize_tensor(torch.randn(4, 64), "int4-g32-sym-bf16")
    expected = hashlib.sha256(qt.scales.view(torch.int16).numpy().tobytes()).hexdigest()
    assert qt.digests()["parameters"] == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": torch.zeros(4, 64, dtype=torch.uint8)}, "codes of .* are torch.int8"),
        ({"scales": torch.ones(4, 3)}, r"scales of .* are torch.float32 \[4, 2\]"),
        ({"scales": torch.ones(4, 2, dtype=torch.float16)}, "got torch.float16"),
        ({"zero_points": torch.zeros(4, 2, dtype=torch.int32)}, "zero_points must not be given"),
        ({"minimums": torch.zeros(4, 2)}, "minimums must not be given"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change: dict, message: str) -> None:
    parts = {
        "codes": torch.zeros(4, 64, dtype=torch.int8),
        "scales": torch.ones(4, 2),
        "zero_points": None,
        "minimums": None,
        "spec": spec("int4-g32-sym"),
    }
    with pytest.raises(ValueError, match=message):
        QuantizedTensor(**{**parts, **change})
