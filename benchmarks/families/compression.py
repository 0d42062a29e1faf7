"""Huffman coding of k-means codes: the rate of the decoder, the encoder, threads, and how small files become.

    python benchmarks/families/compression.py [--repeats 9] [--json]

Bar: decode at 300 MB of output a second or more on one thread, 1.5 times that on two. The peer is zlib from the
standard library on the same bytes: deflate with its matches, and with Huffman codes alone for the encoder.
"""

from __future__ import annotations

import sys
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

import phiquant as pq
import torch
from phiquant import ops

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import Row, interleave, main

N = 8_000_000
RATE = 300e6  # bytes of output a second


def codes(levels: int, zeros: float = 0.0) -> torch.Tensor:
    """Codes of N Gaussian weights on evenly spaced levels, uint8; a share of them pruned to the middle code."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(N, generator=generator) * levels / 6 + (levels - 1) / 2
    symbols = w.round().clamp(0, levels - 1)
    symbols[torch.rand(N, generator=generator) < zeros] = levels // 2
    return symbols.to(torch.uint8)


def coder(label: str, symbols: torch.Tensor, repeats: int) -> list[Row]:
    data = ops.huffman_encode(symbols)
    raw = symbols.numpy().tobytes()
    deflated = zlib.compress(raw, 1)
    bits = f"{8 * len(data) / N:.2f} bits ({8 * len(deflated) / N:.2f} zlib)"
    times = interleave(
        {
            "zlib": lambda: zlib.decompress(deflated),
            "decode": lambda: ops.huffman_decode(data, N),
            "encode": lambda: ops.huffman_encode(symbols),
            "zlib encode": lambda: deflate_without_matches(raw),
        },
        repeats,
    )
    same = torch.equal(ops.huffman_decode(data, N), symbols)
    return [
        Row(f"decode {label}, {bits}", times["zlib"], times["decode"], None, same, limit=N / RATE),
        Row(f"encode {label}", times["zlib encode"], times["encode"], None),
    ]


def deflate_without_matches(raw: bytes) -> bytes:
    stream = zlib.compressobj(1, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    return stream.compress(raw) + stream.flush()


def threads(repeats: int) -> list[Row]:
    symbols = codes(16)
    data = ops.huffman_encode(symbols)

    def on(n: int) -> Callable[[], object]:
        def run() -> object:
            torch.set_num_threads(n)
            return ops.huffman_decode(data, N)

        return run

    times = interleave({n: on(n) for n in (1, 2)}, repeats)
    torch.set_num_threads(1)
    return [Row("decode 4 bits: 2 threads against 1", times[1], times[2], 1.5)]


def files(repeats: int) -> list[Row]:
    """A pruned weight of a million values in 16 levels: write and read against torch.save and torch.load of it."""
    w = codes(15, zeros=0.9)[: 1 << 20].float().sub(7).view(1024, 1024)
    with tempfile.TemporaryDirectory() as folder:
        path, plain = Path(folder) / "w.phiq", Path(folder) / "w.pt"
        size = pq.compress({"w": w}, path)
        torch.save({"w": w}, plain)
        same = torch.equal(pq.decompress(path)["w"], w)
        times = interleave(
            {
                "load": lambda: torch.load(plain),
                "decompress": lambda: pq.decompress(path),
                "save": lambda: torch.save({"w": w}, plain),
                "compress": lambda: pq.compress({"w": w}, path),
            },
            repeats,
        )
    return [
        Row(f"read a file {size.ratio:.1f}x smaller than float32", times["load"], times["decompress"], None, same),
        Row("write it", times["save"], times["compress"], None),
    ]


def rows(repeats: int) -> list[Row]:
    torch.set_num_threads(1)
    found = coder("4 bits", codes(16), repeats) + coder("8 bits", codes(256), repeats)
    found += coder("2 bits", codes(4), repeats) + coder("4 bits, 90 % zeros", codes(16, zeros=0.9), repeats)
    return found + threads(repeats) + files(repeats)


if __name__ == "__main__":
    main(__doc__, rows)
