"""Fake quantization against torch's own: speed of forward and backward, and equality of every bit.

    python benchmarks/fake_quant.py [--repeats 15] [--json]

Bars (ratio to torch in the same process, interleaved, median): range + fake-quantize int4 g32, 3072 x
8192 fp32, 1 thread: fresh >= 2.5x, out= >= 6x. Per tensor and per channel with ranges given: fresh >=
2.5x, out= >= 8x. Backward >= 3x. 128 x 512: not slower. 2 threads against 1, out=: >= 1.5x.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from common import Row, interleave, main
from phiquant import ops

INT4 = {"qmin": -8, "qmax": 7}


class Case:
    """One granularity on one shape: the same work by torch and by us."""

    def __init__(self, rows: int, cols: int, grain: str) -> None:
        self.x = torch.randn(rows, cols, generator=torch.Generator().manual_seed(0))
        self.out = torch.empty_like(self.x)
        self.grad = torch.ones_like(self.x)
        self.shape = {"g32": (rows, cols // 32), "channel": (rows, 1), "tensor": (1, 1)}[grain]
        self.grain = grain
        self.scale, _, _ = ops.choose_range(self.x, self.shape, **INT4, rule="absmax")
        self.flat = self.scale.flatten()
        self.zero = torch.zeros(len(self.flat), dtype=torch.int32)

    def torch_forward(self, x: torch.Tensor | None = None) -> torch.Tensor:
        x = self.x if x is None else x
        if self.grain == "tensor":
            return torch.fake_quantize_per_tensor_affine(x, float(self.flat), 0, -8, 7)
        blocks = x.view(len(self.flat), -1)
        return torch.fake_quantize_per_channel_affine(blocks, self.flat, self.zero, 0, -8, 7).view_as(x)

    def ours(self, out: torch.Tensor | None = None, x: torch.Tensor | None = None) -> torch.Tensor:
        """Range and fake-quantize for groups (torch is given the ranges), ranges given otherwise."""
        x = self.x if x is None else x
        if self.grain == "g32":
            return ops.fake_quantize_dynamic(x, self.shape, **INT4, rule="absmax", out=out)
        return ops.fake_quantize(x, self.scale, **INT4, out=out)

    def backward(self, forward: Callable[..., torch.Tensor]) -> Callable[[], torch.Tensor]:
        """The backward pass alone: the graph is kept and its gradient asked for again and again."""
        x = self.x.clone().requires_grad_()
        y = forward(x=x)
        return lambda: torch.autograd.grad(y, x, self.grad, retain_graph=True)[0]


def compare(case: Case, label: str, repeats: int, fresh_bar: float, out_bar: float | None) -> list[Row]:
    runs = {"torch": case.torch_forward, "fresh": case.ours, "copy": lambda: case.out.copy_(case.x)}
    if out_bar is not None:
        runs["out"] = lambda: case.ours(out=case.out)
    runs |= {"torch back": case.backward(case.torch_forward), "back": case.backward(case.ours)}
    times = interleave(runs, repeats)
    equal = torch.equal(case.torch_forward(), case.ours())
    same_gradient = torch.equal(runs["torch back"](), runs["back"]())
    rows = [
        Row(f"{label}: forward, fresh", times["torch"], times["fresh"], fresh_bar, equal),
        Row(f"{label}: backward", times["torch back"], times["back"], 3.0 if out_bar else 1.0, same_gradient),
    ]
    if out_bar is not None:
        rows.insert(1, Row(f"{label}: forward, out=", times["torch"], times["out"], out_bar, equal))
        rows.append(Row(f"{label}: copy_ (the limit)", times["torch"], times["copy"], None))
    return rows


def deployed_grid(repeats: int) -> list[Row]:
    """Q4_0's rule as trained: signed anchor, fp16 scales, and a gradient whose mask is found again from x."""
    case = Case(3072, 8192, "g32")
    x = case.x.clone().requires_grad_()
    y = ops.fake_quantize_dynamic(x, case.shape, **INT4, rule="signed_absmax", scale_dtype=torch.float16)
    times = interleave(
        {
            "torch": case.backward(case.torch_forward),
            "ours": lambda: torch.autograd.grad(y, x, case.grad, retain_graph=True)[0],
        },
        repeats,
    )
    return [Row("3072x8192 Q4_0: backward, range and mask", times["torch"], times["ours"], None)]


def threads(repeats: int) -> list[Row]:
    case = Case(3072, 8192, "g32")
    given = Case(3072, 8192, "channel")

    def with_threads(n: int, run: Callable[[], object]) -> Callable[[], None]:
        def timed() -> None:
            torch.set_num_threads(n)
            run()

        return timed

    rows = []
    for label, c in (("g32 with range", case), ("per channel", given)):
        times = interleave({n: with_threads(n, lambda c=c: c.ours(out=c.out)) for n in (1, 2)}, repeats)
        rows.append(Row(f"{label}, out=: 2 threads against 1", times[1], times[2], 1.5))
    torch.set_num_threads(1)
    return rows


def run(repeats: int) -> list[Row]:
    torch.set_num_threads(1)
    rows = compare(Case(3072, 8192, "g32"), "3072x8192 int4 g32, with range", repeats, 2.5, 6.0)
    rows += compare(Case(3072, 8192, "tensor"), "3072x8192 int4 per tensor", repeats, 2.5, 8.0)
    rows += compare(Case(3072, 8192, "channel"), "3072x8192 int4 per channel", repeats, 2.5, 8.0)
    rows += deployed_grid(repeats)
    for grain in ("g32", "tensor", "channel"):
        rows += compare(Case(128, 512, grain), f"128x512 int4 {grain}", 20 * repeats, 1.0, None)
    return rows + threads(repeats)


if __name__ == "__main__":
    main(__doc__, run)
