"""fake_quantize and FakeQuantize: range modes, gradients, the same codes as quantize()."""

from __future__ import annotations

import pytest
import torch
from phiquant import EmaObserver, FakeQuantize, fake_quantize, quantize_tensor, spec

SPECS = ["int4-g32-sym", "int3-g32-signmax-f16", "uint4-g32-min-f16", "uint4-channel-asym", "int8-tensor-sym-bf16"]


def weight() -> torch.Tensor:
    return torch.randn(8, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("text", SPECS)
def test_range_from_the_tensor_equals_rtn(text: str) -> None:
    w = weight()
    qt = quantize_tensor(w, text)
    assert torch.equal(fake_quantize(w, text), qt.dequantize())
    module = FakeQuantize(text)
    assert torch.equal(module(w), qt.dequantize())
    codes = module.quantize(w)
    assert torch.equal(codes.codes, qt.codes)
    assert codes.digests() == qt.digests()


@pytest.mark.parametrize("text", SPECS)
def test_given_range_is_used(text: str) -> None:
    w = weight()
    qt = quantize_tensor(w, text, solver="mse")
    y = fake_quantize(w, text, scale=qt.scales, zero_point=qt.zero_points, minimum=qt.minimums)
    assert torch.equal(y, qt.dequantize())


@pytest.mark.parametrize("text", SPECS)
def test_observed_range_is_kept_and_saved(text: str) -> None:
    w = weight()
    module = FakeQuantize(text, range="observer")
    module(w)
    module.eval()
    wider = module(2 * w)
    assert torch.equal(wider, module.quantize(2 * w).dequantize())
    assert torch.equal(module(w), quantize_tensor(w, text).dequantize())
    other = FakeQuantize(text, range="observer")
    other.load_state_dict(module.state_dict())
    other.eval()
    assert torch.equal(other(2 * w), wider)


def test_observing_can_be_switched_off() -> None:
    module = FakeQuantize("int8-tensor-sym", range="observer", observer=EmaObserver("int8-tensor-sym"))
    with pytest.raises(RuntimeError, match="no range has been observed"):
        module.eval()(weight())
    module.train()
    module(weight())
    before = module.scale.clone()
    module.observing = False
    module(weight() * 10)
    assert torch.equal(module.scale, before)


def test_gradient_flows_and_out_is_written() -> None:
    w = weight().requires_grad_()
    fake_quantize(w, "int4-g32-sym").sum().backward()
    assert torch.equal(w.grad, torch.ones_like(w))
    out = torch.empty_like(w)
    with torch.no_grad():
        assert fake_quantize(w, "int4-g32-sym", out=out) is out
    assert torch.equal(out, fake_quantize(w.detach(), "int4-g32-sym"))


def test_wrong_use_is_refused() -> None:
    with pytest.raises(ValueError, match="need a scale"):
        fake_quantize(weight(), "uint4-g32-asym", zero_point=torch.zeros(8, 2))
    with pytest.raises(ValueError, match="range is 'tensor' or 'observer'"):
        FakeQuantize("int4-g32-sym", range="batch")
    with pytest.raises(ValueError, match="observer is used with"):
        FakeQuantize("int4-g32-sym", observer=EmaObserver("int4-g32-sym"))
    with pytest.raises(ValueError, match="keeps no range"):
        FakeQuantize("int4-g32-sym").set_range(torch.ones(1), None, None)
    with pytest.raises(ValueError, match="does not divide"):
        fake_quantize(torch.randn(4, 33), spec("int4-g32-sym"))
