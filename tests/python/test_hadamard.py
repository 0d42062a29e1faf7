"""Hadamard rotations: the matrices by their definition, the op against the dense product, its composition."""

from __future__ import annotations

import pytest
import torch
from phiquant import ops
from phiquant.models.configs import CONFIGS
from phiquant.ops import hadamard


def dense(size: int) -> torch.Tensor:
    """Of that size, float64: the small factor and Sylvester's."""
    base = ops.hadamard_base(size).double()
    while len(base) < size:
        base = base.repeat_interleave(2, 0).repeat_interleave(2, 1) * torch.tensor([[1.0, 1], [1, -1]]).repeat(
            len(base), len(base)
        )
    return base


@pytest.mark.parametrize("size", [1, 2, 12, 20, 24, 28, 36, 44, 60, 64, 76, 96, 128, 140, 252, 768])
def test_a_hadamard_matrix_is_one(size: int) -> None:
    matrix = dense(size)
    assert matrix.shape == (size, size)
    assert bool((matrix.abs() == 1).all())
    assert torch.equal(matrix @ matrix.T, size * torch.eye(size, dtype=torch.float64))


def test_every_size_of_every_phi_has_one() -> None:
    keys = ("hidden_size", "intermediate_size")
    sizes = {config[key] for config in CONFIGS.values() for key in keys}
    sizes |= {config["hidden_size"] // config["num_attention_heads"] for config in CONFIGS.values()}
    assert sizes >= {3072, 5120, 8192, 17920, 96, 128}
    found = {size: len(ops.hadamard_base(size)) for size in sizes}
    assert (found[3072], found[5120], found[17920], found[96]) == (12, 20, 140, 12)


@pytest.mark.parametrize("size", [0, 3, 5, 7 * 3, 2 * 3, 10])
def test_sizes_that_have_none(size: int) -> None:
    with pytest.raises(ValueError, match=f"no Hadamard matrix of size {size} can be built"):
        ops.hadamard_base(size)


@pytest.mark.parametrize("size", [1, 2, 12, 96, 128, 512, 768, 640, 1120])
def test_the_op_is_the_product(size: int, level: str) -> None:
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(5, size, generator=generator)
    signs = torch.randint(2, (size,), generator=generator) * 2.0 - 1
    expected = (x.double() * signs) @ dense(size) / size**0.5
    found = ops.hadamard_rotate_(x.clone(), signs)
    assert torch.allclose(found.double(), expected, atol=2e-6)
    assert torch.allclose(found.norm(dim=1), x.norm(dim=1), rtol=1e-6)
    composed = x.clone()
    hadamard.hadamard_out(composed, ops.hadamard_base(size), signs, size**-0.5)
    assert torch.allclose(composed, found, atol=2e-6)


def test_bad_arguments() -> None:
    x = torch.zeros(2, 24)
    with pytest.raises(ValueError, match="x must be float32"):
        ops.hadamard_rotate_(x.double())
    with pytest.raises(ValueError, match="contiguous"):
        ops.hadamard_rotate_(torch.zeros(24, 24).T)
    with pytest.raises(ValueError, match="signs must have as many values"):
        ops.hadamard_rotate_(x, torch.ones(12))
