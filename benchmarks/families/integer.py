"""Integer products against torch's: int8 x int8 with requantization, and fp32.

    python benchmarks/families/integer.py [--repeats 15] [--json]

512 x 3072 x 3072, 1 thread: at least as fast as torch._int_mm with the float requantization that a user would
write, and at least twice as fast as fp32 linear. 2 threads against 1: at least 1.5x.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import Row, interleave, main
from phiquant import integer, ops

M, K, N = 512, 3072, 3072


class Case:
    """u8 activations, s8 weights with a scale for each channel, a bias, u8 results: the same layer for all."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randint(0, 256, (M, K), dtype=torch.uint8, generator=generator)
        self.w = torch.randint(-127, 128, (N, K), dtype=torch.int8, generator=generator)
        self.bias = torch.randint(-20000, 20000, (N,), dtype=torch.int32, generator=generator)
        self.x_zero, self.y_zero = 117, 9
        real = torch.rand(N, generator=generator, dtype=torch.float64) * 1e-4 + 1e-4
        self.packed = ops.pack_weight(self.w)
        self.multiplier, self.shift = ops.quantize_multiplier(real)
        self.scale = real.float()
        # What torch._int_mm wants: int8 codes, the same ones 128 lower.
        self.x_signed = (self.x ^ 128).view(torch.int8)
        self.folded = self.bias - (self.x_zero - 128) * self.w.sum(1, dtype=torch.int32)
        self.x_float, self.w_float = torch.randn(M, K, generator=generator), torch.randn(N, K, generator=generator)
        self.x_scale, self.zeros = torch.rand(M, generator=generator), torch.zeros(N)

    def ours(self) -> torch.Tensor:
        grid = {"zero_point": self.y_zero, "qmin": 0, "qmax": 255}
        return ops.linear_codes(self.x, self.x_zero, self.packed, self.bias, self.multiplier, self.shift, **grid)

    def torch_codes(self) -> torch.Tensor:
        sums = torch._int_mm(self.x_signed, self.w.t()) + self.folded
        return (torch.round(sums * self.scale) + self.y_zero).clamp(0, 255).to(torch.uint8)

    def torch_codes_in_place(self) -> torch.Tensor:
        """The same by a careful user: one temporary, every other step in place."""
        sums = torch._int_mm(self.x_signed, self.w.t()).add_(self.folded)
        return sums.to(torch.float32).mul_(self.scale).round_().add_(self.y_zero).clamp_(0, 255).to(torch.uint8)

    def torch_product(self) -> torch.Tensor:
        return torch._int_mm(self.x_signed, self.w.t())

    def fp32(self) -> torch.Tensor:
        return F.linear(self.x_float, self.w_float)

    def per_token(self) -> torch.Tensor:
        """From floats to floats: ranges and codes of each row, product, scales."""
        return integer.linear_per_token(self.x_float, self.weight)

    @property
    def weight(self) -> integer.IntegerWeight:
        return integer.IntegerWeight(self.packed, self.scale.double(), torch.zeros(N), (), 1)


def with_threads(n: int, run: Callable[[], object]) -> Callable[[], None]:
    def timed() -> None:
        torch.set_num_threads(n)
        run()

    return timed


def rows(repeats: int) -> list[Row]:
    torch.set_num_threads(1)
    case = Case()
    close = bool((case.ours().int() - case.torch_codes().int()).abs().max() <= 1)
    runs = {
        "ours": case.ours,
        "torch": case.torch_codes,
        "torch in place": case.torch_codes_in_place,
        "product": case.torch_product,
        "fp32": case.fp32,
        "per token": case.per_token,
    }
    times = interleave(runs, repeats)
    threads = interleave({n: with_threads(n, case.ours) for n in (1, 2)}, repeats)
    torch.set_num_threads(1)
    shape = f"{M}x{K}x{N}"
    return [
        Row(f"{shape} u8 x s8 -> u8: _int_mm and float steps", times["torch"], times["ours"], 1.0, close),
        Row(f"{shape}: _int_mm and steps in place", times["torch in place"], times["ours"], 1.0, close),
        Row(f"{shape}: _int_mm alone", times["product"], times["ours"], None),
        Row(f"{shape}: fp32 linear", times["fp32"], times["ours"], 2.0),
        Row(f"{shape}: fp32 linear, ours per token from floats", times["fp32"], times["per token"], None),
        Row(f"{shape}: 2 threads against 1", threads[1], threads[2], 1.5),
    ]


if __name__ == "__main__":
    main(__doc__, rows)
