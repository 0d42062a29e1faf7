"""Learned scales (LSQ): forward and backward against torch's learnable fake quantization, 25 M values.

    python benchmarks/families/learned.py [--repeats 9] [--json]

Bar, 1 thread, 3072 x 8192 fp32 per channel: >= 4x, gradients equal to float64 autograd of the formula to
1e-5 ("equal" stands for that). 2 threads >= 1.5x.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import Row, interleave, main
from phiquant import ops

ROWS, COLS = 3072, 8192
Step = Callable[[], tuple[torch.Tensor, torch.Tensor]]


def ours(x: torch.Tensor, scale: torch.Tensor, g: torch.Tensor) -> Step:
    def step() -> tuple[torch.Tensor, torch.Tensor]:
        leaf, s = x.detach().requires_grad_(), scale.clone().requires_grad_()
        y = ops.learned_fake_quantize(leaf, s, qmin=-8, qmax=7)
        return torch.autograd.grad(y, (leaf, s), g)

    return step


def theirs(x: torch.Tensor, scale: torch.Tensor, g: torch.Tensor) -> Step:
    zero = torch.zeros(scale.numel())

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        leaf, s = x.detach().requires_grad_(), scale.flatten().clone().requires_grad_()
        if s.numel() == 1:
            y = torch._fake_quantize_learnable_per_tensor_affine(leaf, s, zero, -8, 7, 1.0)
        else:
            y = torch._fake_quantize_learnable_per_channel_affine(leaf, s, zero, 0, -8, 7, 1.0)
        return torch.autograd.grad(y, (leaf, s), g)

    return step


def equal_to_float64(x: torch.Tensor, scale: torch.Tensor, g: torch.Tensor) -> bool:
    """Some rows, values next to ties (which the two precisions round to different codes) left out of g."""
    x, scale, g = x[:64].double(), scale[:64].double(), g[:64].clone()
    v = x / scale
    g[(v - v.floor() - 0.5).abs() < 1e-4] = 0
    q = v.round().clamp(-8, 7)
    expected = (g.double() * torch.where(q == v.round(), q - v, q)).sum(1)
    _, found = ours(x.float(), scale.float(), g)()
    return bool((found.flatten().double() - expected).norm() < 1e-5 * expected.norm())


def rows(repeats: int) -> list[Row]:
    x = torch.randn(ROWS, COLS, generator=torch.Generator().manual_seed(0))
    g = torch.randn(ROWS, COLS, generator=torch.Generator().manual_seed(1))
    channel, tensor = torch.full((ROWS, 1), 0.35), torch.full((1, 1), 0.35)
    group = torch.full((ROWS, COLS // 32), 0.35)
    repeats = max(3, repeats // 2)
    times = interleave(
        {
            "torch": theirs(x, channel, g),
            "ours": ours(x, channel, g),
            "torch tensor": theirs(x, tensor, g),
            "tensor": ours(x, tensor, g),
            "group": ours(x, group, g),
            "bf16": ours(x.bfloat16(), channel, g.bfloat16()),
        },
        repeats,
    )
    equal = equal_to_float64(x, channel, g)
    table = [
        Row("LSQ 3072x8192 per channel, forward + backward", times["torch"], times["ours"], 4.0, equal),
        Row("LSQ per tensor", times["torch tensor"], times["tensor"], None),
        Row("LSQ g32 (torch has none: its per channel)", times["torch"], times["group"], None),
        Row("LSQ per channel, bf16 (torch: fp32)", times["torch"], times["bf16"], None),
    ]

    def with_threads(n: int) -> Step:
        def step() -> tuple[torch.Tensor, torch.Tensor]:
            torch.set_num_threads(n)
            return ours(x, channel, g)()

        return step

    both = interleave({n: with_threads(n) for n in (1, 2)}, repeats)
    torch.set_num_threads(1)
    return [*table, Row("LSQ per channel, 2 threads / 1", both[1], both[2], 1.5)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(__doc__, rows)
