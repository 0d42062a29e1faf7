"""Hadamard rotations: the wrapper of the op, the matrices of its small factors (csrc/core/hadamard.h)."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

_ops = torch.ops.phiquant
_LARGEST = 256  # rows of the small factor


def hadamard_rotate_(x: Tensor, signs: Tensor | None = None) -> Tensor:
    """Multiply the rows of x [N, n], in place, by diag(signs) H / sqrt(n), an orthogonal matrix; returns x.

    x: float32, contiguous. H = hadamard_base(n) kron S, S of a power of two in Sylvester's order. signs: [n], 1 and -1.
    ValueError for sizes that no known H has.
    """
    base = hadamard_base(x.shape[-1]).to(x.device)
    _ops.hadamard_out.default(x, base, None if signs is None else signs.float().contiguous(), x.shape[-1] ** -0.5)
    return x


@lru_cache(maxsize=32)
def hadamard_base(size: int) -> Tensor:
    """The small factor of a Hadamard matrix of that size: float32 [m, m] of 1 and -1, size = m * 2^k, m the least.

    Built after Paley (1933): with p a prime and Q the p x p matrix of quadratic residues, of order p + 1 where
    p = 3 mod 4 (12, 20, 140), of order 2 (p + 1) where p = 1 mod 4 (28, 36). ValueError if there is none up to 256.
    """
    odd = size & -size if size > 0 else 0
    m = size // odd if odd else 0
    while 0 < m <= min(size, _LARGEST):
        for build in (_one, _paley, _double_paley):
            found = build(m)
            if found is not None:
                return found
        m *= 2
    raise ValueError(
        f"no Hadamard matrix of size {size} can be built: it takes 2^k, or 2^k times p + 1 or 2 (p + 1) of a prime p, "
        f"up to {_LARGEST}"
    )


def _one(m: int) -> Tensor | None:
    return torch.ones(1, 1) if m == 1 else None


def _paley(m: int) -> Tensor | None:
    """I + S with S antisymmetric: 1 in the border's row, -1 in its column, Q inside."""
    if m % 4 or not _is_prime(m - 1):
        return None
    s = torch.zeros(m, m)
    s[0, 1:], s[1:, 0], s[1:, 1:] = 1, -1, _residues(m - 1)
    return s + torch.eye(m)


def _double_paley(m: int) -> Tensor | None:
    """Of the symmetric C with Q inside: each 0 becomes [[1, -1], [-1, -1]], each c becomes c [[1, 1], [1, -1]]."""
    p = m // 2 - 1
    if m % 4 or p % 4 != 1 or not _is_prime(p):
        return None
    c = torch.zeros(p + 1, p + 1)
    c[0, 1:], c[1:, 0], c[1:, 1:] = 1, 1, _residues(p)
    return torch.kron(c, torch.tensor([[1.0, 1], [1, -1]])) + torch.kron(
        torch.eye(p + 1), torch.tensor([[1.0, -1], [-1, -1]])
    )


def _residues(p: int) -> Tensor:
    """Q[i, j]: 1 where i - j is a square modulo p, -1 where it is not, 0 where it is 0."""
    squares = {i * i % p for i in range(1, p)}
    kinds = torch.tensor([0.0 if d == 0 else 1.0 if d in squares else -1.0 for d in range(p)])
    place = torch.arange(p)
    return kinds[(place[:, None] - place) % p]


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


def hadamard_out(x: Tensor, base: Tensor, signs: Tensor | None, scale: float) -> None:
    """The op written with torch's own, for devices without kernels of ours; sums in another order."""
    m = len(base)
    y = (x if signs is None else x * signs).reshape(len(x), m, -1)
    stride, power = 1, y.shape[-1]
    while stride < power:
        pairs = y.reshape(len(x), m, -1, 2, stride)
        y = torch.stack([pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]], -2)
        stride *= 2
    x.copy_((base.T @ y.reshape(len(x), m, power)).reshape(x.shape) * scale)


_library = torch.library.Library("phiquant", "IMPL")
_library.impl("hadamard_out", hadamard_out, "CompositeExplicitAutograd")


@torch.library.register_fake("phiquant::hadamard_out")
def _nothing(*_: Any) -> None:
    return None
