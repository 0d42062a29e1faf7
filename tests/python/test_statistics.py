"""Statistics of a layer's inputs against numpy; merged, and reduced over two processes."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from phiquant import PhiquantError
from phiquant.statistics import Statistics


def inputs(tokens: int, features: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(tokens, features, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("features", [3, 512, 700])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_to_numpy(features: int, dtype: torch.dtype) -> None:
    x = inputs(50, features)
    seen = Statistics(features, dtype)
    seen.update(x[:20].reshape(4, 5, features))
    seen.update(x[20:])
    seen.update(x[:0])
    wide = x.double().numpy()
    np.testing.assert_allclose(seen.hessian.numpy(), wide.T @ wide, rtol=1e-4, atol=1e-3)
    assert torch.equal(seen.hessian, seen.hessian.T) or torch.allclose(seen.hessian, seen.hessian.T, rtol=1e-6)
    np.testing.assert_allclose(seen.abs_mean.numpy(), np.abs(wide).mean(0), rtol=1e-6)
    assert torch.equal(seen.abs_max, x.abs().amax(0))
    assert seen.tokens == 50


def test_more_tokens_after_the_hessian_was_read() -> None:
    x = inputs(30, 700)
    seen, whole = Statistics(700), Statistics(700)
    seen.update(x[:10])
    _ = seen.hessian
    seen.update(x[10:])
    whole.update(x)
    torch.testing.assert_close(seen.hessian, whole.hessian, rtol=1e-4, atol=1e-4)


def test_float64_sums_hold_what_float32_loses() -> None:
    """Many equal tokens: the sum of 2^24 ones and another one is not a float32."""
    narrow, wide = Statistics(1), Statistics(1, torch.float64)
    for seen in (narrow, wide):
        seen.moments.fill_(2.0**24)
        seen.tokens = 1 << 24
        seen.update(torch.ones(1, 1))
    assert narrow.hessian.item() == 2.0**24
    assert wide.hessian.item() == 2.0**24 + 1


def test_16_bit_inputs_are_summed_in_float32() -> None:
    x = inputs(40, 8).bfloat16()
    seen = Statistics(8)
    seen.update(x)
    torch.testing.assert_close(seen.hessian, x.float().T @ x.float())


def test_merge() -> None:
    x = inputs(40, 16)
    parts = [Statistics(16), Statistics(16)]
    for part, rows in zip(parts, (x[:25], x[25:]), strict=True):
        part.update(rows)
    parts[0].merge(parts[1])
    whole = Statistics(16)
    whole.update(x)
    torch.testing.assert_close(parts[0].hessian, whole.hessian)
    torch.testing.assert_close(parts[0].abs_mean, whole.abs_mean)
    assert torch.equal(parts[0].abs_max, whole.abs_max)
    assert parts[0].tokens == 40


def test_drift_from_the_float_model() -> None:
    """Equal to numpy; merged; refused where one part knows it and the other does not."""
    x, exact = inputs(40, 16), inputs(40, 16, seed=1)
    parts = [Statistics(16), Statistics(16)]
    for part, rows in zip(parts, (slice(0, 25), slice(25, 40)), strict=True):
        part.update(x[rows], exact[rows])
    parts[0].merge(parts[1])
    expected = (exact - x).double().numpy().T @ x.double().numpy()
    assert parts[0].drift is not None
    assert np.abs(parts[0].drift.numpy() - expected).max() < 1e-4
    plain = Statistics(16)
    plain.update(x)
    assert plain.drift is None
    with pytest.raises(ValueError, match="the other does not"):
        parts[0].merge(plain)


def _rank(rank: int, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    seen = Statistics(16)
    seen.update(inputs(40, 16)[rank::2])
    seen.all_reduce()
    torch.save((seen.hessian, seen.abs_mean, seen.abs_max, seen.tokens), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_see_what_one_sees(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(_rank, (str(tmp_path),), nprocs=2, start_method="spawn")
    whole = Statistics(16)
    whole.update(inputs(40, 16))
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for hessian, abs_mean, abs_max, tokens in results:
        torch.testing.assert_close(hessian, whole.hessian)
        torch.testing.assert_close(abs_mean, whole.abs_mean)
        assert torch.equal(abs_max, whole.abs_max)
        assert tokens == 40
    assert torch.equal(results[0][0], results[1][0])


def test_errors() -> None:
    seen = Statistics(4)
    with pytest.raises(RuntimeError, match="seen no tokens"):
        _ = seen.hessian
    with pytest.raises(ValueError, match="of 4 inputs, the tensor has 5"):
        seen.update(inputs(2, 5))
    with pytest.raises(ValueError, match="of 5 inputs cannot be merged into those of 4"):
        seen.merge(Statistics(5))
    with pytest.raises(ValueError, match="float32 or float64"):
        Statistics(4, torch.float16)
    seen.update(torch.tensor([[1.0, float("inf"), 0.0, 0.0]]))
    with pytest.raises(PhiquantError, match="not finite"):
        _ = seen.hessian
