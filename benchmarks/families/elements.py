"""Fake quantization of every element against copy_: the time to read and write the same memory.

    python benchmarks/families/elements.py [--repeats 9] [--json]

3072 x 8192 float32, one thread, into a reused buffer. Bars: integers take at most 1.5 times as long as
copy_ (a ratio of 0.67), floats, tables and codebooks of up to 64 levels at most 2.5 times (0.40).
Codebooks of 256 levels are reported without a bar: they take 3 to 4 times as long. "with range": the scales
are found in the same call. Two threads against one: at least 1.5x. bfloat16 is compared with copy_ of
bfloat16, which moves half the bytes. Rows say whether the result is that of each level's nearest code.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path

import phiquant as pq
import torch
from phiquant.fake_quant import encode, encode_dynamic

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import Row, interleave, main

SHAPE = (3072, 8192)
INTEGER, OTHER, THREADS = 1 / 1.5, 1 / 2.5, 1.5
INTEGERS = ("int4-channel-sym", "int8-tensor-sym", "uint4-g64-asym", "ternary-channel-sym", "q3.4")
FLOATS = (
    *("fp8_e4m3-channel-sym", "fp8_e5m2-channel-sym", "fp4_e2m1-g32-sym", "fp4_e1m2-g32-sym", "fp4_e3m0-g32-sym"),
    *("nf4-g64-sym", "binary-channel-sym"),
)
CODEBOOKS = ("codebook16-tensor", "codebook16-row", "codebook64-tensor", "codebook256-tensor", "codebook256-row")


class Case:
    """One spec on one tensor, with the scales given (what is timed without them is the map alone)."""

    def __init__(self, text: str, x: torch.Tensor) -> None:
        self.x, self.out, self.spec = x, torch.empty_like(x), pq.spec(text)
        self.given: dict[str, torch.Tensor | None] = {}
        self.integer = text in INTEGERS
        if isinstance(self.spec.element, pq.Codebook):
            blocks = math.prod(self.spec.scale_shape(tuple(x.shape)))
            levels = torch.randn(blocks, self.spec.element.size, generator=torch.Generator().manual_seed(1))
            self.given = {"codebook": levels.sort(1).values}
        elif self.spec.has_scale:
            found = encode_dynamic(x, self.spec)
            self.given = {"scale": found.scales, "zero_point": found.zero_points}

    def run(self) -> torch.Tensor:
        return pq.fake_quantize(self.x, self.spec, **self.given, out=self.out)

    def run_with_range(self) -> torch.Tensor:
        return pq.fake_quantize(self.x, self.spec, out=self.out)

    def right(self) -> bool:
        """The result is the decode of the codes, and that of a strided tensor with the same values."""
        part = self.x[:64]
        rows = {name: v if v is None or len(v) < len(self.x) else v[:64] for name, v in self.given.items()}
        y = pq.fake_quantize(part, self.spec, **rows)
        strided = pq.fake_quantize(part.t().contiguous().t(), self.spec, **rows)
        scale, zero_point, book = (rows.get(name) for name in ("scale", "zero_point", "codebook"))
        decoded = encode(part, self.spec, scale, zero_point, None, book).dequantize(self.x.dtype)
        return torch.equal(y, decoded) and torch.equal(y, strided)


def against_copy(texts: tuple[str, ...], dtype: torch.dtype, repeats: int) -> list[Row]:
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype)
    cases = {text: Case(text, x) for text in texts}
    out = torch.empty_like(x)
    runs: dict[str, Callable[[], object]] = {"copy_": lambda: out.copy_(x)}
    for text, case in cases.items():
        runs[text] = case.run
        if "scale" in case.given and dtype == torch.float32:
            runs[f"{text}, with range"] = case.run_with_range
    times = interleave(runs, repeats)
    rows = []
    for name in list(runs)[1:]:
        case = cases[name.removesuffix(", with range")]
        bar = None if dtype != torch.float32 or "256" in name else INTEGER if case.integer else OTHER
        label = name if dtype == torch.float32 else f"{name}, bfloat16"
        rows.append(Row(f"{label} against copy_", times["copy_"], times[name], bar, case.right()))
    return rows


def threads(texts: tuple[str, ...], repeats: int) -> list[Row]:
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    rows = []
    for text in texts:
        case = Case(text, x)

        def timed(n: int, case: Case = case) -> None:
            torch.set_num_threads(n)
            case.run()

        times = interleave({n: (lambda n=n: timed(n)) for n in (1, 2)}, repeats)
        rows.append(Row(f"{text}: 2 threads against 1", times[1], times[2], THREADS))
    torch.set_num_threads(1)
    return rows


def rows(repeats: int) -> list[Row]:
    torch.set_num_threads(1)
    with torch.no_grad():
        found = against_copy((*INTEGERS, *FLOATS, *CODEBOOKS), torch.float32, repeats)
        found += against_copy(("int4-channel-sym", *FLOATS, "codebook16-row"), torch.bfloat16, repeats)
        return found + threads(("int4-channel-sym", "fp8_e4m3-channel-sym", "nf4-g64-sym", "codebook256-row"), repeats)


if __name__ == "__main__":
    main(__doc__, rows)
