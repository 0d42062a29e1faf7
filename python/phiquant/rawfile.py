"""Bytes of a file into a tensor, read and not mapped: the pages of a mapped file count as this process' memory."""

from __future__ import annotations

from pathlib import Path

import torch

from .errors import PhiquantError


def read_into(result: torch.Tensor, path: Path, offset: int, name: str) -> torch.Tensor:
    """Fill `result`, contiguous and on the CPU, with the bytes from `offset` on; PhiquantError if they end too soon.

    name: what is read, for the error.
    """
    buffer = result.reshape(-1).view(torch.uint8).numpy().data
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        done = 0
        while done < len(buffer):
            count = file.readinto(buffer[done:])
            if not count:
                raise PhiquantError(f"{path} became shorter while {name} was read; copy it again")
            done += count
    return result
