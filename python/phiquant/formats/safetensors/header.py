"""The headers of safetensors files and their index, trusting nothing: names, counts and offsets are all checked."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import PhiquantError
from ..receipt import is_plain_name

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_HEADER_LIMIT = 100_000_000  # the limit of the safetensors library itself
_ITEM_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64,
}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: `nbytes` from `offset` of `file`. dtype: safetensors' name of it, such as "BF16"."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_header(path: Path) -> dict[str, Place]:
    """The tensors of a safetensors file. PhiquantError unless header and length fit together exactly."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 10 or length > size - 8:
            raise PhiquantError(
                f"{path} is truncated or not a safetensors file: {size:,} bytes, of which its header "
                f"alone would take {8 + length:,}; download it again"
            )
        if length > _HEADER_LIMIT:
            raise PhiquantError(f"{path}: a header of {length:,} bytes is over the limit of {_HEADER_LIMIT:,}")
        text = file.read(length)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is not valid JSON ({error})") from error
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object")
    header.pop("__metadata__", None)
    tensors = {name: _entry(path, name, value, 8 + length) for name, value in header.items()}
    _check_layout(path, tensors, 8 + length, size)
    return tensors


def read_index(path: Path) -> dict[str, str]:
    """Name of a tensor -> name of its shard, a plain file name. PhiquantError for anything else."""
    if path.stat().st_size > _HEADER_LIMIT:
        raise PhiquantError(f"{path}: an index of {path.stat().st_size:,} bytes is over the limit of {_HEADER_LIMIT:,}")
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_no_duplicates)["weight_map"]
        items = dict(weight_map.items())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(path, f"it has no weight_map ({error})") from error
    for name, shard in items.items():
        if not is_plain_name(shard):
            raise PhiquantError(
                f"{path}: {name} is said to be in {shard!r}, which is not the name of a file beside it; refused"
            )
        if not shard.endswith(".safetensors"):
            raise PhiquantError(f"{path}: {name} is said to be in {shard!r}, which is not a .safetensors file; refused")
    return items


def _entry(path: Path, name: str, value: Any, data: int) -> Place:
    try:
        dtype, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
        numbers_fit = all(type(n) is int and n >= 0 for n in (begin, end, *shape))
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, f"its entry of {name} lacks dtype, shape or data_offsets") from error
    if not numbers_fit or not isinstance(shape, list) or len(shape) > 8:
        raise _damaged(path, f"{name} has shape {shape} and offsets {[begin, end]}")
    if not isinstance(dtype, str) or dtype not in _ITEM_BITS:
        raise _damaged(path, f"{name} has the unknown dtype {dtype!r}")
    expected = math.prod(shape) * _ITEM_BITS[dtype] // 8
    if end - begin != expected:
        raise _damaged(path, f"{name} ({dtype} {shape}) takes {expected:,} bytes, its offsets say {end - begin:,}")
    return Place(path, dtype, tuple(shape), data + begin, expected)


def _check_layout(path: Path, tensors: Mapping[str, Place], data: int, size: int) -> None:
    """Tensors follow each other without gaps or overlaps from the header to the end of the file."""
    position, previous = data, "the header"
    for name, stored in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if stored.offset != position:
            kind = "overlaps" if stored.offset < position else "leaves a gap after"
            raise _damaged(path, f"{name} {kind} {previous}")
        position, previous = stored.offset + stored.nbytes, name
    if position > size:
        raise PhiquantError(
            f"{path} is truncated: {size:,} bytes of {position:,}, so {previous} is incomplete; download it again"
        )
    if position < size:
        raise _damaged(path, f"{size - position:,} bytes follow the last tensor")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _damaged(path: Path, what: str) -> PhiquantError:
    return PhiquantError(f"{path} is damaged: {what}; download it again")
