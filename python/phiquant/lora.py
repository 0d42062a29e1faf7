"""LoRA-QAT: adapters inside the grid, W_q = grid(W + s B A). Merging them rounds nothing a second time.

Adapters that are added to the output of a quantized layer must be rounded once more when they are merged, which undoes
part of what they learned. Here the sum passes through the grid in every forward: what trains is what convert() stores.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import PhiquantError
from .modules import QATEmbedding, QATLinear, Quantizer
from .spec import QuantSpec
from .tensor import QuantizedTensor

STATE, FACTS = "adapter_model.safetensors", "adapter_config.json"  # the names and keys of the package peft
_PREFIX = "base_model.model."


class AdaptedWeight(nn.Module):
    """A weight's quantizer, with an adapter added before it: W [N, K] -> grid(W + s B A), s = alpha / rank.

    lora_A: Parameter float32 [rank, K], Kaiming-uniform; lora_B: float32 [N, rank], zero: at first W is as it was.
    Their gradients are those of the sum, which the straight-through estimator gives.
    """

    def __init__(self, grid: Quantizer, shape: tuple[int, int], rank: int, alpha: float, seed: int = 0) -> None:
        super().__init__()
        self.grid, self.rank, self.alpha = grid, rank, alpha
        generator = torch.Generator().manual_seed(seed)
        bound = math.sqrt(1.0 / shape[1])
        self.lora_A = nn.Parameter(bound * (2 * torch.rand(rank, shape[1], generator=generator) - 1))
        self.lora_B = nn.Parameter(torch.zeros(shape[0], rank))

    @property
    def spec(self) -> QuantSpec:
        return self.grid.spec

    def merged(self, weight: Tensor) -> Tensor:
        """W + s B A, float32; never under autocast, so that it is the same sum wherever it is computed."""
        with torch.autocast(weight.device.type, enabled=False):
            return weight.float() + (self.alpha / self.rank) * (self.lora_B.float() @ self.lora_A.float())

    def forward(self, weight: Tensor) -> Tensor:
        result: Tensor = self.grid(self.merged(weight))
        return result.to(weight.dtype)

    @torch.no_grad()
    def quantize(self, weight: Tensor) -> QuantizedTensor:
        """The codes that `forward(weight)` decodes."""
        return self.grid.quantize(self.merged(weight))

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha}"


def add_adapters(model: nn.Module, rank: int, alpha: float | None = None, seed: int = 0) -> list[nn.Parameter]:
    """Train adapters in the place of the weights of a model after prepare_qat(), in place.

    alpha: the adapters' sum is multiplied with alpha / rank; default 2 rank. The weights no longer receive gradients;
    what the grids learn (range="learned") still does. Returns the adapters' parameters, r (N + K) values a layer.
    PhiquantError for a model that is not prepared, has adapters, or keeps its codes.
    """
    if rank < 1:
        raise PhiquantError(f"an adapter has a rank of at least 1, not {rank}")
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QATLinear)}
    if not layers:
        raise PhiquantError(f"{type(model).__name__} has no linear in training; call prepare_qat(model, spec) first")
    tables = {id(m.weight) for m in model.modules() if isinstance(m, QATEmbedding)}
    made: list[nn.Parameter] = []
    for index, (name, layer) in enumerate(layers.items()):
        if isinstance(layer.weight_quantizer, AdaptedWeight):
            raise PhiquantError(f"{name} has an adapter already")
        if not layer.weight.requires_grad or id(layer.weight) in tables:
            why = "shares its weight with an embedding" if id(layer.weight) in tables else "keeps its codes"
            raise PhiquantError(f"{name} {why}, which an adapter cannot change; leave adapters out (rank 0)")
        shape, twice = (layer.out_features, layer.in_features), 2.0 * rank
        adapted = AdaptedWeight(layer.weight_quantizer, shape, rank, twice if alpha is None else alpha, seed + index)
        layer.weight_quantizer = adapted.to(layer.weight.device)  # type: ignore[assignment]
        layer.weight.requires_grad_(False)
        layer.origin = {**layer.origin, "adapter_rank": rank}
        made += [adapted.lora_A, adapted.lora_B]
    return made


def save_adapters(model: nn.Module, folder: Path) -> None:
    """Write the adapters as peft does: adapter_model.safetensors and adapter_config.json."""
    from safetensors.torch import save_file

    adapters = _adapters(model)
    first = next(iter(adapters.values()))
    tensors = {}
    for name, adapter in adapters.items():
        for part in ("lora_A", "lora_B"):
            tensors[f"{_PREFIX}{name}.{part}.weight"] = getattr(adapter, part).detach().contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / STATE)
    facts: dict[str, Any] = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": first.rank, "lora_alpha": first.alpha}
    facts["target_modules"] = sorted({name.rpartition(".")[2] for name in adapters})
    (folder / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def load_adapters(model: nn.Module, folder: Path) -> None:
    """Take the values of adapters that save_adapters() or peft wrote; those of `model` must have the same shapes."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(folder / STATE)
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        rank, alpha = int(facts["r"]), float(facts["lora_alpha"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise PhiquantError(f"{folder} holds no readable adapters ({error})") from error
    for name, adapter in _adapters(model).items():
        for part in ("lora_A", "lora_B"):
            value, own = state.get(f"{_PREFIX}{name}.{part}.weight"), getattr(adapter, part)
            if value is None or value.shape != own.shape:
                found = "none" if value is None else list(value.shape)
                raise PhiquantError(f"{folder / STATE}: {name}.{part} is {list(own.shape)} here, {found} there")
            own.data.copy_(value)
        adapter.rank, adapter.alpha = rank, alpha


def _adapters(model: nn.Module) -> dict[str, AdaptedWeight]:
    quantizers: dict[str, Any] = {n: m.weight_quantizer for n, m in model.named_modules() if isinstance(m, QATLinear)}
    found: dict[str, AdaptedWeight] = {n: q for n, q in quantizers.items() if isinstance(q, AdaptedWeight)}
    if not found:
        raise PhiquantError(f"{type(model).__name__} has no adapters; call add_adapters(model, rank) first")
    return found
