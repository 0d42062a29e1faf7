"""Block formats, K-quant grids and packing against copy_ of the same bytes.

    python benchmarks/families/storage.py [--repeats 9] [--json]

Bars, 3072 x 8192 into a reused buffer, 1 thread: float elements within 2.5x of copy_ (theirs = copy_, ratio at
least 1 / 2.5); two threads against one: >= 1.5x. The K-quants' two levels and packing have no bar; copy_ stands
beside them as what memory allows.
"""

from __future__ import annotations

import sys
from pathlib import Path

import phiquant as pq
import torch
from phiquant import ops

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import Row, interleave, main

FLOATS = ["mxfp4", "mxfp8_e4m3", "mxfp8_e5m2", "nvfp4"]
INTEGERS = ["vsq4", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k"]
BITS = [1, 2, 3, 4, 5, 6, 8]


def fake_quantize(dtype: torch.dtype, repeats: int) -> list[Row]:
    x = torch.randn(3072, 8192, generator=torch.Generator().manual_seed(0)).to(dtype)
    out = torch.empty_like(x)
    runs = {"copy_": lambda: out.copy_(x)}
    for name in [*FLOATS, *INTEGERS]:
        runs[name] = lambda name=name: pq.fake_quantize(x, name, out=out)
    times = interleave(runs, repeats)
    label = str(dtype).removeprefix("torch.")
    return [
        Row(f"{label} {name}: out= against copy_", times["copy_"], times[name], 1 / 2.5 if name in FLOATS else None)
        for name in [*FLOATS, *INTEGERS]
    ]


def threads(repeats: int) -> list[Row]:
    x = torch.randn(3072, 8192, generator=torch.Generator().manual_seed(0))
    out = torch.empty_like(x)

    def run(name: str, count: int) -> None:
        torch.set_num_threads(count)
        pq.fake_quantize(x, name, out=out)
        torch.set_num_threads(1)

    names = ["mxfp4", "nvfp4", "q4_k"]
    runs = {(name, n): lambda name=name, n=n: run(name, n) for name in names for n in (1, 2)}
    times = interleave(runs, repeats)
    return [Row(f"{name}: 2 threads against 1", times[name, 1], times[name, 2], 1.5) for name in names]


def packing(repeats: int) -> list[Row]:
    n = 16 << 20
    source, target = torch.zeros(n, dtype=torch.uint8), torch.empty(n, dtype=torch.uint8)
    runs = {"copy_": lambda: target.copy_(source)}
    generator = torch.Generator().manual_seed(0)
    equal = {}
    for bits in BITS:
        codes = torch.randint(0, 1 << bits, (n,), dtype=torch.uint8, generator=generator)
        packed = ops.pack_bits(codes, bits)
        equal[bits] = torch.equal(ops.unpack_bits(packed, n, bits), codes)
        runs[f"pack {bits} bits"] = lambda codes=codes, bits=bits: ops.pack_bits(codes, bits)
        runs[f"unpack {bits} bits"] = lambda packed=packed, bits=bits: ops.unpack_bits(packed, n, bits)
    trits = torch.randint(-1, 2, (n,), dtype=torch.int8, generator=generator)
    squeezed = ops.pack_trits(trits)
    runs["pack trits"] = lambda: ops.pack_trits(trits)
    runs["unpack trits"] = lambda: ops.unpack_trits(squeezed, n)
    times = interleave(runs, repeats)
    names = [name for name in runs if name != "copy_"]
    same = {name: equal.get(int(name.split()[1])) if name.endswith("bits") else None for name in names}
    return [Row(f"{name}, 16 M codes, against copy_", times["copy_"], times[name], None, same[name]) for name in names]


@torch.no_grad()
def rows(repeats: int) -> list[Row]:
    torch.set_num_threads(1)
    floats, halves = fake_quantize(torch.float32, repeats), fake_quantize(torch.bfloat16, repeats)
    return [*floats, *halves, *threads(repeats), *packing(repeats)]


if __name__ == "__main__":
    main(__doc__, rows)
