"""Huffman ops against heapq's textbook algorithm, hypothesis round trips, damage, opcheck."""

from __future__ import annotations

import heapq

import phiquant.ops as ops
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor


def skewed(n: int, alphabet: int, seed: int = 0) -> Tensor:
    """n symbols of a discretised bell, uint8."""
    values = torch.randn(n, generator=torch.Generator().manual_seed(seed)) * alphabet / 6 + alphabet / 2
    return values.round().clamp(0, alphabet - 1).to(torch.uint8)


def huffman_cost(counts: list[int]) -> int:
    """Bits of the best prefix code without a limit: the sum of all merges (Huffman 1952)."""
    heap = [n for n in counts if n]
    if len(heap) == 1:
        return heap[0]
    heapq.heapify(heap)
    total = 0
    while len(heap) > 1:
        merged = heapq.heappop(heap) + heapq.heappop(heap)
        total += merged
        heapq.heappush(heap, merged)
    return total


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 200), min_size=256, max_size=256), st.integers(1, 256))
def test_lengths_cost_what_huffmans_algorithm_costs(counts: list[int], alphabet: int) -> None:
    counts = counts[:alphabet] + [0] * (256 - alphabet)
    lengths = ops.huffman_lengths(torch.tensor(counts)).tolist()
    if max(counts) == 0:
        assert not any(lengths)
        return
    assert sum(2.0**-n for n in lengths if n) == 1.0
    if max(lengths) < 12:  # the limit does not bind
        assert sum(n * c for n, c in zip(lengths, counts, strict=True)) == huffman_cost(counts)
    if sum(map(bool, counts)) > 1:
        assert [n > 0 for n in lengths] == [c > 0 for c in counts]


def test_lengths_are_limited() -> None:
    counts = torch.zeros(256, dtype=torch.int64)
    counts[:40] = 2 ** torch.arange(40)
    lengths = ops.huffman_lengths(counts)
    assert lengths.max() == 12
    assert (0.5 ** lengths[:40].double()).sum() == 1.0
    assert torch.equal(lengths[:40], lengths[:40].sort(descending=True).values)


@settings(max_examples=80, deadline=None)
@given(st.binary(max_size=3000), st.integers(1, 60))
@example(b"", 1)
@example(b"a", 1)
@example(b"\xff", 60)
def test_round_trip(data: bytes, repeats: int) -> None:
    symbols = torch.tensor(list(data * repeats), dtype=torch.uint8)
    assert torch.equal(ops.huffman_decode(ops.huffman_encode(symbols), len(symbols)), symbols)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("n", [4095, 4096, 131_072, 131_073, 400_001])
def test_round_trip_of_many_chunks_is_the_same_on_any_number_of_threads(n: int, threads: int) -> None:
    symbols = skewed(n, 16)
    alone = ops.huffman_encode(symbols)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        data = ops.huffman_encode(symbols)
        assert torch.equal(data, alone)
        assert torch.equal(ops.huffman_decode(data, n), symbols)
    finally:
        torch.set_num_threads(before)


def test_size_is_near_the_entropy() -> None:
    symbols = skewed(200_000, 16)
    p = symbols.bincount().double() / len(symbols)
    entropy = -(p * p.clamp(min=1e-30).log2()).sum()
    bits = 8 * len(ops.huffman_encode(symbols)) / len(symbols)
    assert entropy <= bits <= entropy + 0.05


def test_any_shape_and_stride() -> None:
    symbols = skewed(60, 16).view(6, 10)
    assert torch.equal(ops.huffman_encode(symbols.t()), ops.huffman_encode(symbols.t().contiguous().flatten()))
    spread = torch.zeros(2 * len(ops.huffman_encode(symbols)), dtype=torch.uint8)
    spread[::2] = ops.huffman_encode(symbols)
    assert torch.equal(ops.huffman_decode(spread[::2], 60), symbols.flatten())


def test_every_damaged_byte_is_an_error_or_gives_as_many_symbols() -> None:
    symbols = skewed(300, 16)
    data = ops.huffman_encode(symbols)
    refused = 0
    for i in range(len(data)):
        for flip in (1, 0x80, 0xFF):
            damaged = data.clone()
            damaged[i] ^= flip
            try:
                assert len(ops.huffman_decode(damaged, 300)) == 300
            except ValueError:
                refused += 1
    assert refused > 3 * 12


def test_errors_say_what_is_wrong() -> None:
    data = ops.huffman_encode(skewed(300, 16))
    with pytest.raises(ValueError, match="holds 300 symbols, expected 301"):
        ops.huffman_decode(data, 301)
    with pytest.raises(ValueError, match="5 bytes do not hold its header"):
        ops.huffman_decode(data[:5], 300)
    with pytest.raises(ValueError, match="cut off"):
        ops.huffman_decode(data[:-1], 300)
    with pytest.raises(ValueError, match="1 bytes follow its streams"):
        ops.huffman_decode(torch.cat([data, data[:1]]), 300)
    with pytest.raises(ValueError, match="too short for its 72057594037927936 symbols"):
        ops.huffman_decode(torch.tensor([0] * 7 + [1, 0, 1, 1, 0, 17, 0], dtype=torch.uint8), 1 << 56)
    with pytest.raises(ValueError, match="symbols must be uint8"):
        ops.huffman_encode(torch.zeros(3))
    with pytest.raises(ValueError, match=r"counts must be int64 \[256\]"):
        ops.huffman_lengths(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="from 0 to"):
        ops.huffman_lengths(torch.full((256,), -1))


def test_opcheck() -> None:
    symbols = skewed(5000, 16)
    data = ops.huffman_encode(symbols)
    torch.library.opcheck(torch.ops.phiquant.huffman_lengths.default, (symbols.bincount(minlength=256),))
    torch.library.opcheck(torch.ops.phiquant.huffman_encode.default, (symbols,))
    torch.library.opcheck(torch.ops.phiquant.huffman_decode.default, (data, 5000))
