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
    exact: with `beside_float`, the same of the float model.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        folder: Path | None,
        label: str,
        device: torch.device,
        ranks: Ranks = ALONE,
        *,
        beside_float: bool = False,
    ) -> None:
        self.shape, self.folder, self.label, self.device, self.ranks = shape, folder, label, device, ranks
        self.arguments: dict[str, Any] = {}
        self.at = max((index for index, path in self._files() if path.stat().st_size == self.nbytes), default=-1)
        self._memory = torch.empty(shape if folder is None else 0)
        self.exact = Activations(shape, folder, f"beside-{label}", device, ranks) if beside_float else None
        self.ranks.wait()  # all have looked, before the first writes
        if self.exact is not None and self.exact.at != self.at:  # killed between the two
            self.forget()

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

    def advance(self, layer: nn.Module, exact_layer: nn.Module | None = None) -> None:
        """Replace the activations by the layer's output, those of the float model by that of its layer."""
        self.replace(lambda batch: self.call(layer, self.read(batch)))
        if (exact := self.exact) is not None and exact_layer is not None:
            exact.replace(lambda batch: self.call(exact_layer, exact.read(batch)))

    def call(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        result = layer(hidden, **self.arguments)
        return result[0] if isinstance(result, tuple) else result

    def statistics(
        self, layer: nn.Module, linear: nn.Module, features: int, exact: tuple[nn.Module, nn.Module] | None = None
    ) -> Statistics:
        """Statistics of the input that `linear`, inside `layer` or the layer itself, gets from these windows.

        exact: (layer, linear) of the float model, whose inputs are then compared.
        """
        seen = Statistics(features, device=self.device, ranks=self.ranks)

        def inputs(batch: slice) -> Tensor:
            x = self._input(layer, linear, self.read(batch))
            if self.exact is None or exact is None:
                return x[None]
            return torch.stack([x, self._input(*exact, self.exact.read(batch))])

        for _, both in self.ranks.in_turn(self._batches(), inputs, self.device):
            seen.update(*both)
        seen.complete()
        return seen

    def _input(self, layer: nn.Module, linear: nn.Module, hidden: Tensor) -> Tensor:
        """What `linear` gets where `layer` takes `hidden`."""
        caught: list[Tensor] = []

        def catch(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            caught.append(arguments[0])
            raise Stop

        hook = linear.register_forward_pre_hook(catch)
        try:
            with suppress(Stop):
                layer(hidden, **self.arguments)
        finally:
            hook.remove()
        return caught[0]

    def forget(self) -> None:
        """Start anew: no layer has its inputs."""
        self.at = -1
        for _, path in self._files() if self.ranks.first else ():
            path.unlink()
        if self.exact is not None:
            self.exact.forget()

    def _batches(self) -> list[slice]:
        return [slice(start, start + _BATCH) for start in range(0, self.shape[0], _BATCH)]

    def _path(self, index: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{self.label}-{index:04}.bin"

    def _files(self) -> list[tuple[int, Path]]:
        if self.folder is None:
            return []
        return [(int(path.stem[-4:]), path) for path in self.folder.glob(f"{self.label}-[0-9][0-9][0-9][0-9].bin")]
