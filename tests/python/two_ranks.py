"""Run a function in two processes that torch.distributed joins by gloo: for what is told to work under torchrun."""

import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist


def run(function: Callable[..., None], *arguments: object) -> None:
    """`function(rank, *arguments)` in each; an exception in one of them is raised here."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_enter, (Path(folder) / "store", function, arguments), nprocs=2)


def _enter(rank: int, store: Path, function: Callable[..., None], arguments: tuple[object, ...]) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    wait = timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=wait)
    try:
        function(rank, *arguments)
    finally:
        dist.destroy_process_group()
