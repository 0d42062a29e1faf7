"""The processes that share a calibration: each computes some of the batches, all of them get every result in order.

Nothing is added up across processes: sums are made in the order in which one process makes them, on the rank that
owns that part of the sum. So results are those of one process, to the bit, whatever the number of ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import PhiquantError

Item = TypeVar("Item")
_DIMENSIONS = 7  # at most, of a tensor that is sent


@dataclass(frozen=True)
class Ranks:
    """This process alone, or `Ranks.of_group()`: those that torch.distributed has joined.

    rank: of this process, 0 to world - 1. group: torch.distributed's; None: all processes.
    """

    rank: int = 0
    world: int = 1
    group: Any = None

    @classmethod
    def of_group(cls, group: Any = None) -> Ranks:
        """The ranks of `group`. PhiquantError if torch.distributed has not been initialized."""
        if not (dist.is_available() and dist.is_initialized()):
            raise PhiquantError(
                "torch.distributed is not initialized; run under torchrun and call "
                "torch.distributed.init_process_group first"
            )
        return cls(dist.get_rank(group), dist.get_world_size(group), group)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def in_turn(
        self, items: Sequence[Item], compute: Callable[[Item], Tensor], device: torch.device | str = "cpu"
    ) -> Iterator[tuple[Item, Tensor]]:
        """(item, compute(item)) of all items, in their order, on every rank; each rank computes every world-th.

        The tensors are float32, on `device`, one that the group's backend can send from.
        """
        for start in range(0, len(items), self.world):
            some = items[start : start + self.world]
            mine = compute(some[self.rank]) if self.rank < len(some) else None
            for owner, item in enumerate(some):
                yield item, self._send(mine, owner, device)

    def _send(self, mine: Tensor | None, owner: int, device: torch.device | str) -> Tensor:
        if self.world == 1:
            assert mine is not None
            return mine
        sending = owner == self.rank and mine is not None
        sizes = torch.full((_DIMENSIONS,), -1, dtype=torch.int64, device=device)
        if sending and mine is not None:
            sizes[: mine.dim()] = torch.tensor(mine.shape)
        self.broadcast(sizes, owner)
        shape = [size for size in sizes.tolist() if size >= 0]
        values = mine.float().contiguous() if sending and mine is not None else torch.empty(shape, device=device)
        self.broadcast(values, owner)
        return values

    def broadcast(self, tensor: Tensor, owner: int) -> None:
        """Give every rank, in place, the contiguous tensor that rank `owner` has."""
        if self.world > 1:
            dist.broadcast(tensor, group=self.group, group_src=owner)

    def agree(self, text: str) -> bool:
        """Whether every rank has this text; on all ranks the same answer."""
        digest = torch.frombuffer(bytearray(hashlib.sha256(text.encode()).digest()), dtype=torch.uint8).clone()
        if self.world == 1:
            return True
        found = [torch.empty_like(digest) for _ in range(self.world)]
        dist.all_gather(found, digest, group=self.group)
        return all(torch.equal(found[0], other) for other in found)

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.world > 1:
            dist.barrier(self.group)


ALONE = Ranks()


@contextmanager
def torchrun() -> Iterator[Ranks]:
    """The processes that torchrun started, joined by gloo while the block runs; this one ALONE without torchrun."""
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        yield ALONE
        return
    dist.init_process_group("gloo")
    try:
        yield Ranks.of_group()
    finally:
        dist.destroy_process_group()
