"""Huffman coding of byte symbols: typed wrappers and meta kernels. The format is that of csrc/core/huffman.h.

The coder runs on the CPU; tensors of other devices are copied there, results stay there.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ops = torch.ops.phiquant


def huffman_lengths(counts: Tensor) -> Tensor:
    """Bits of each symbol's code, uint8 [256], for int64 counts [256]: the best with at most 12; 0 where none comes.

    A symbol that comes alone gets one bit, and so does a neighbour that never comes: the code stays complete.
    """
    return _ops.huffman_lengths.default(counts.cpu().contiguous())


def huffman_encode(symbols: Tensor) -> Tensor:
    """uint8 symbols of any shape, row-major, as a canonical Huffman stream with its table: uint8 [bytes]."""
    return _ops.huffman_encode.default(symbols.cpu().contiguous())


def huffman_decode(data: Tensor, count: int) -> Tensor:
    """The `count` symbols, uint8 [count], of what `huffman_encode` returned.

    ValueError if the data is damaged or holds another number of symbols. Whatever the bytes are, nothing
    outside them is read and no more than eight symbols per byte are made; a change that leaves every length
    consistent gives other symbols, so a file keeps a digest where that matters.
    """
    return _ops.huffman_decode.default(data.cpu().contiguous(), count)


@torch.library.register_fake("phiquant::huffman_lengths")
def _(counts: Tensor) -> Tensor:
    return counts.new_empty(256, dtype=torch.uint8)


@torch.library.register_fake("phiquant::huffman_encode")
def _(symbols: Tensor) -> Tensor:
    size = torch.library.get_ctx().new_dynamic_size()
    return symbols.new_empty(size, dtype=torch.uint8)


@torch.library.register_fake("phiquant::huffman_decode")
def _(data: Tensor, count: int) -> Tensor:
    return data.new_empty(count, dtype=torch.uint8)
