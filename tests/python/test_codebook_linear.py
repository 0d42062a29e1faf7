"""CodebookLinear: its gradients against autograd of codebook[codes], the worked example, optimizers, zero, vectors."""

from __future__ import annotations

import phiquant as pq
import pytest
import torch
import torch.nn.functional as F
from phiquant import CodebookLinear, PhiquantError
from torch import Tensor, nn

W = torch.tensor(
    [[2.09, -0.98, 1.48, 0.09], [0.05, -0.14, -1.08, 2.12], [-0.91, 1.92, 0, -1.03], [1.87, 0, 1.53, 1.49]]
)
GRADIENT = torch.tensor(
    [[-0.03, -0.01, 0.03, 0.02], [-0.01, 0.01, -0.02, 0.12], [-0.01, 0.02, 0.04, 0.01], [-0.07, -0.02, 0.01, -0.02]]
)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear(n: int = 12, k: int = 16, seed: int = 0) -> nn.Linear:
    layer = nn.Linear(k, n)
    with torch.no_grad():
        layer.weight.copy_(gaussian(n, k, seed=seed))
        layer.bias.copy_(gaussian(n, seed=seed + 1))
    return layer


def of_weight(w: Tensor, k: int, **options: object) -> CodebookLinear:
    layer = nn.Linear(w.shape[1], w.shape[0], bias=False)
    with torch.no_grad():
        layer.weight.copy_(w)
    return CodebookLinear.from_linear(layer, k, **options)


def rounded(values: Tensor) -> list[float]:
    return [round(v, 2) + 0.0 for v in values.flatten().tolist()]


def test_the_worked_example_sums_its_gradient_and_moves_its_levels() -> None:
    layer = of_weight(W, 4)
    assert rounded(layer.codebook) == [-1.0, 0.0, 1.5, 2.0]
    layer.weight.backward(GRADIENT)
    assert rounded(layer.codebook.grad) == [-0.03, 0.04, 0.02, 0.04]
    torch.optim.SGD(layer.parameters(), lr=1.0).step()
    assert rounded(layer.codebook) == [-0.97, -0.04, 1.48, 1.96]


def test_the_mean_divides_by_the_size_of_the_cluster() -> None:
    layer = of_weight(W, 4, reduction="mean")
    layer.weight.backward(GRADIENT)
    sizes = torch.bincount(layer.codes.flatten().int())
    torch.testing.assert_close(layer.codebook.grad[0] * sizes, torch.tensor([-0.03, 0.04, 0.02, 0.04]))


def test_a_step_by_the_mean_is_a_step_of_the_weights_and_the_means_of_its_clusters() -> None:
    layer = of_weight(gaussian(6, 20), 5, reduction="mean")
    before, grad = layer.weight.detach().clone(), gaussian(6, 20, seed=1)
    layer.weight.backward(grad)
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    moved = before - 0.1 * grad
    for c in range(5):
        torch.testing.assert_close(layer.codebook[0, c].detach(), moved[layer.codes == c].mean())


@pytest.mark.parametrize("rows", [None, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_is_that_of_autograd_through_the_lookup(rows: int | None, dtype: torch.dtype) -> None:
    layer = CodebookLinear.from_linear(linear(), 4, rows=rows).to(dtype)
    x = gaussian(7, 16, seed=2).to(dtype)
    levels = layer.codebook.detach().clone().requires_grad_()
    blocks = len(levels)
    weight = levels.gather(1, layer.codes.view(blocks, -1).long()).view(12, 16)
    expected = F.linear(x, weight, layer.bias.detach())
    found = layer(x)
    assert torch.equal(found, expected)
    assert layer.codes.dtype == torch.uint8
    expected.square().sum().backward()
    found.square().sum().backward()
    close = {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.05, "atol": 1.0}
    torch.testing.assert_close(layer.codebook.grad, levels.grad, **close)
    assert layer.bias.grad is not None


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_any_optimizer_lowers_the_loss_and_zero_stays_zero(name: str, reduction: str) -> None:
    source = linear()
    with torch.no_grad():
        source.weight[source.weight.abs() < 0.7] = 0
    layer = CodebookLinear.from_linear(source, 4, keep_zero=True, reduction=reduction)
    pruned = source.weight == 0
    assert (layer.weight[pruned] == 0).all()
    x, wanted = gaussian(64, 16, seed=3), gaussian(64, 12, seed=4)
    codes = layer.codes.clone()
    optimizer = OPTIMIZERS[name](layer.parameters())
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = F.mse_loss(layer(x), wanted)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    assert torch.equal(layer.codes, codes)
    assert (layer.weight[pruned] == 0).all()
    assert (layer.quantized.dequantize()[pruned] == 0).all()


def test_quantized_sorts_levels_that_crossed() -> None:
    for rows in (None, 4):
        layer = CodebookLinear.from_linear(linear(), 4, rows=rows)
        with torch.no_grad():
            layer.codebook.copy_(gaussian(*layer.codebook.shape, seed=5))
        quantized = layer.quantized
        assert (quantized.codebook.diff(dim=1) >= 0).all()
        assert torch.equal(quantized.dequantize(), layer.weight)
        again = CodebookLinear.from_quantized(quantized, layer.bias)
        assert torch.equal(again.weight, layer.weight)
        assert torch.equal(again.quantized.codes, quantized.codes)


def test_state_dict_round_trip() -> None:
    layer = CodebookLinear.from_linear(linear(), 4, keep_zero=True)
    other = CodebookLinear.from_linear(linear(seed=9), 4, keep_zero=True)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.weight, layer.weight)


@pytest.mark.parametrize("dim", [2, 4])
def test_codebooks_of_vectors_train(dim: int) -> None:
    layer = CodebookLinear.from_linear(linear(), 8, dim=dim)
    weight = layer.codebook[0][layer.codes.long()].reshape(12, 16)
    assert torch.equal(layer.weight, weight)
    grad = gaussian(12, 16, seed=6)
    (expected,) = torch.autograd.grad(weight, layer.codebook, grad)
    layer.weight.backward(grad)
    torch.testing.assert_close(layer.codebook.grad, expected)
    with pytest.raises(PhiquantError, match="vectors"):
        _ = layer.quantized


def test_compiles_whole() -> None:
    layer = CodebookLinear.from_linear(linear(), 4)
    x = gaussian(3, 16)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


def test_errors() -> None:
    with pytest.raises(ValueError, match="'sum' or 'mean'"):
        CodebookLinear.from_linear(linear(), 4, reduction="max")
    with pytest.raises(ValueError, match="per tensor"):
        CodebookLinear.from_linear(linear(), 4, dim=2, rows=1)
    with pytest.raises(PhiquantError, match="int4-g16-sym"):
        CodebookLinear.from_quantized(pq.quantize_tensor(gaussian(4, 16), "int4-g16-sym"))
