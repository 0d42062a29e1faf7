"""What feeds what inside a Phi-3 model: where channels may change their size without changing the function."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..models import phi

_VALUES = 1 << 22  # in a piece


@dataclass(frozen=True)
class Pair:
    """The `producer` (a norm, or a linear) makes the input of the `consumer`, channel by channel.

    producer, consumer: names of modules. rows: those of the producer's weight that feed the consumer.
    heads: (key-value heads, query heads that read each): attention gives the consumer each value head as often.
    """

    producer: str
    rows: slice
    consumer: str
    heads: tuple[int, int] = (1, 1)

    def columns(self, channels: Tensor) -> Tensor:
        """What each input of the consumer gets of `channels` [rows]: [K]."""
        count, readers = self.heads
        return channels.reshape(count, 1, -1).expand(-1, readers, -1).reshape(-1)

    def channels(self, columns: Tensor) -> Tensor:
        """`columns` [K] by producer: [inputs of the consumer that read one channel, rows]."""
        count, readers = self.heads
        return columns.reshape(count, readers, -1).transpose(0, 1).reshape(readers, -1)


def pairs(model: Any) -> Iterator[Pair]:
    """Every pair of a Phi-3 model, in the order in which it computes. A tied head is in none: embeddings share it."""
    config = model.config.to_dict()
    n = phi.sizes(config)
    whole = slice(0, n.hidden)
    for index in range(n.layers):
        layer = f"model.layers.{index}"
        qkv, gate_up = f"{layer}.self_attn.qkv_proj", f"{layer}.mlp.gate_up_proj"
        v, up = (list(phi.fused_rows(config, name).values())[-1] for name in (qkv, gate_up))
        yield Pair(f"{layer}.input_layernorm", whole, qkv)
        yield Pair(qkv, v, f"{layer}.self_attn.o_proj", (n.kv_heads, n.heads // n.kv_heads))
        yield Pair(f"{layer}.post_attention_layernorm", whole, gate_up)
        yield Pair(gate_up, up, f"{layer}.mlp.down_proj")
    if not n.tied:
        yield Pair(phi.FINAL_NORM, whole, phi.HEAD)


@torch.no_grad()
def rescale(model: nn.Module, pair: Pair, s: Tensor) -> None:
    """Divide the channels that the producer makes by `s` [rows], multiply the consumer's columns by it, in place.

    Computed in float32 and rounded to the dtype of the weights. s: positive, finite.
    """
    if not bool((s.isfinite() & (s > 0)).all()):
        raise ValueError(f"the factors of {pair.producer} and {pair.consumer} must be positive and finite")
    made = model.get_submodule(pair.producer).get_parameter("weight").data[pair.rows]
    read = model.get_submodule(pair.consumer).get_parameter("weight").data
    s = s.to(made.device, torch.float32)
    divisors = s.view(-1, *[1] * (made.dim() - 1)).expand_as(made)
    for piece, divisor in zip(pieces(made), pieces(divisors), strict=True):
        piece.copy_(piece.float() / divisor)
    multiply_columns(read, pair.columns(s))


def multiply_columns(weight: Tensor, factors: Tensor) -> None:
    """W -> W diag(factors) in place, in float32, rounded to its dtype."""
    for piece in pieces(weight):
        piece.copy_(piece.float() * factors)


def pieces(weight: Tensor, dim: int = 0) -> Iterator[Tensor]:
    """Views of some rows (or columns) of a tensor, so that float32 copies of a large one stay small."""
    yield from weight.split(max(1, _VALUES // max(1, weight[0].numel() if dim == 0 else len(weight))), dim)
