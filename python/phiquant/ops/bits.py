"""Codes as dense bytes: a stream of 1 to 8 bits a code, or five ternary codes to a byte."""

from __future__ import annotations

import torch
from torch import Tensor

_ops = torch.ops.phiquant


def pack_bits(codes: Tensor, bits: int, low: int = 0) -> Tensor:
    """Codes, int8 or uint8 of any shape, as uint8 [ceil(codes * bits / 8)].

    Code i, in row-major order, takes bits [i * bits, (i + 1) * bits) of the stream, the lowest bit of a
    byte first; what is stored is code - low, 0 to 2^bits - 1. ValueError if a code does not fit.
    """
    if bits < 1:
        raise ValueError(f"bits must be 1 to 8, not {bits}")
    return _ops.pack_codes.default(codes.contiguous(), bits, low)


def unpack_bits(packed: Tensor, count: int, bits: int, low: int = 0) -> Tensor:
    """The `count` codes of a stream: [count], int8 if low < 0, else uint8. ValueError if the size is not theirs."""
    if bits < 1:
        raise ValueError(f"bits must be 1 to 8, not {bits}")
    return _ops.unpack_codes.default(packed.contiguous(), count, bits, low)


def pack_trits(codes: Tensor, low: int = -1) -> Tensor:
    """Ternary codes low, low + 1, low + 2 as uint8 [ceil(codes / 5)]: t0 + 3 t1 + 9 t2 + 27 t3 + 81 t4."""
    return _ops.pack_codes.default(codes.contiguous(), 0, low)


def unpack_trits(packed: Tensor, count: int, low: int = -1) -> Tensor:
    """The `count` codes that `pack_trits` packed. ValueError for a wrong size or a byte above 242."""
    return _ops.unpack_codes.default(packed.contiguous(), count, 0, low)


@torch.library.register_fake("phiquant::pack_codes")
def _(codes: Tensor, bits: int, low: int) -> Tensor:
    size = (codes.numel() * bits + 7) // 8 if bits else (codes.numel() + 4) // 5
    return codes.new_empty(size, dtype=torch.uint8)


@torch.library.register_fake("phiquant::unpack_codes")
def _(packed: Tensor, count: int, bits: int, low: int) -> Tensor:
    return packed.new_empty(count, dtype=torch.int8 if low < 0 else torch.uint8)


_library = torch.library.Library("phiquant", "IMPL")


def _on_the_cpu(name: str) -> None:
    # Packing is done once, on the way to a file: elsewhere the codes go to the CPU and back.
    op = getattr(_ops, name).default

    def run(tensor: Tensor, *arguments: int) -> Tensor:
        return op(tensor.cpu(), *arguments).to(tensor.device)

    _library.impl(name, run, "CompositeExplicitAutograd")


for _name in ("pack_codes", "unpack_codes"):
    _on_the_cpu(_name)
