"""What flows from one decoder layer to the next, in memory or in a file, and the statistics of what linears get.

n = windows, B = of these at a time, T = tokens in a window, D = hidden size.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .calibration_layers import Stop
from .ranks import ALONE, Ranks
from .rawfile import read_into
from .statistics import Statistics

_BATCH = 8  # windows in one forward


class Activations:
    """Hidden states [n, T, D], float32, that decoder layer `at` takes next; -1: there are none yet.

    folder: keep them there, a file for each layer's, `label`-0003.bin, which is there whole or not at all: a killed
        run finds the last and goes on from it. None: keep them in memory.
    arguments: what layers are called with besides.
    ranks: processes that share the forwards; each holds all activations, or finds them in the folder, which rank 0
        writes.
    """

    def __init__(
        self, shape: tuple[int, int, int], folder: Path | None, label: str, device: torch.device, ranks: Ranks = ALONE
    ) -> None:
        self.shape, self.folder, self.label, self.device, self.ranks = shape, folder, label, device, ranks
        self.arguments: dict[str, Any] = {}
        self.at = max((index for index, path in self._files() if path.stat().st_size == self.nbytes), default=-1)
        self._memory = torch.empty(shape if folder is None else 0)
        self.ranks.wait()  # all have looked, before the first writes

    @property
    def nbytes(self) -> int:
        return 4 * self.shape[0] * self.shape[1] * self.shape[2]

    def read(self, batch: slice) -> Tensor:
        """The windows `batch`, [B, T, D]; of a file, read when asked for."""
        if self.folder is None:
            return self._memory[batch].to(self.device)
        start, stop, _ = batch.indices(self.shape[0])
        values = torch.empty(stop - start, *self.shape[1:])
        return read_into(values, self._path(self.at), start * self.nbytes // self.shape[0], "its activations").to(
            self.device
        )

    def replace(self, compute: Callable[[slice], Tensor]) -> None:
        """Let compute(batch) give what the next layer takes, a batch after the other."""
        results = self.ranks.in_turn(self._batches(), compute, self.device)
        if self.folder is None:
            for batch, values in results:
                self._memory[batch] = values.cpu()
        elif self.ranks.first:
            self._write(self.folder, (values for _, values in results))
        else:
            for _ in results:
                pass
        self.ranks.wait()
        self.at += 1

    def _write(self, folder: Path, results: Iterable[Tensor]) -> None:
        """Keep them as the inputs of the next layer, in place of this one's."""
        partial = folder / f"{self.label}.partial"
        with open(partial, "wb") as file:
            for values in results:
                file.write(values.cpu().contiguous().numpy().data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self._path(self.at + 1))
        for index, path in self._files():
            if index != self.at + 1:
                path.unlink()

    def advance(self, layer: nn.Module) -> None:
        """Replace the activations by the layer's output."""
        self.replace(lambda batch: self.call(layer, self.read(batch)))

    def call(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        result = layer(hidden, **self.arguments)
        return result[0] if isinstance(result, tuple) else result

    def statistics(self, layer: nn.Module, linear: nn.Module, features: int) -> Statistics:
        """Statistics of the input that `linear`, inside `layer` or the layer itself, gets from these windows."""
        seen = Statistics(features, device=self.device, ranks=self.ranks)
        caught: list[Tensor] = []

        def catch(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            caught.append(arguments[0])
            raise Stop

        def inputs(batch: slice) -> Tensor:
            with suppress(Stop):
                layer(self.read(batch), **self.arguments)
            return caught.pop()

        hook = linear.register_forward_pre_hook(catch)
        try:
            for _, x in self.ranks.in_turn(self._batches(), inputs, self.device):
                seen.update(x)
        finally:
            hook.remove()
        seen.complete()
        return seen

    def forget(self) -> None:
        """Start anew: no layer has its inputs."""
        self.at = -1
        for _, path in self._files() if self.ranks.first else ():
            path.unlink()

    def _batches(self) -> list[slice]:
        return [slice(start, start + _BATCH) for start in range(0, self.shape[0], _BATCH)]

    def _path(self, index: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{self.label}-{index:04}.bin"

    def _files(self) -> list[tuple[int, Path]]:
        if self.folder is None:
            return []
        return [(int(path.stem[-4:]), path) for path in self.folder.glob(f"{self.label}-[0-9][0-9][0-9][0-9].bin")]
