"""Read a Hugging Face checkpoint folder tensor by tensor, trusting none of its files.

Bytes are read into buffers, not mapped: the pages of a mapped file count as this process' memory.
"""

from __future__ import annotations

import fnmatch
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .errors import PhiquantError
from .formats.receipt import is_plain_name
from .load import read_config
from .models import phi
from .spec import FloatName

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = ("pytorch_model*.bin", "consolidated*.pth", "*.pt", "*.ckpt", "*.pkl")
_HEADER_LIMIT = 100_000_000  # the limit of the safetensors library itself
_FLOATS: dict[str, FloatName] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_ITEM_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64,
}  # fmt: skip
_NOT_PARAMETERS = ("*.rotary_emb.inv_freq",)  # older checkpoints stored this table; models compute it


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: `nbytes` from `offset` of `file`. dtype: safetensors' name of it, such as "BF16"."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class Checkpoint:
    """The float tensors of a Phi-3 checkpoint folder: model.safetensors, or shards and their index.

    Opening reads config.json and the headers only, and checks all of it: PhiquantError for another
    architecture, pickled weights, a missing or truncated shard, a damaged header, a tensor that is
    missing or has another shape than config.json says.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise PhiquantError(f"{self.folder} is not a folder; give the folder of a Hugging Face checkpoint")
        self.config: dict[str, Any] = read_config(self.folder)
        self.shapes: dict[str, tuple[int, ...]] = dict(phi.tensors(self.config))
        self.files, found = _find(self.folder)
        self.tensors = {name: self._checked(name, shape, found) for name, shape in self.shapes.items()}
        _refuse_strangers(found, self.shapes, phi.sizes(self.config).tied)

    def dtype(self, name: str) -> FloatName:
        return _FLOATS[self.tensors[name].dtype]

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """The tensor of that name, or some of its rows, in the dtype of the file."""
        stored = self.tensors[name]
        length = stored.shape[0] if stored.shape else 1
        start, stop, _ = (rows or slice(None)).indices(length)
        row_bytes = stored.nbytes // length if length else 0
        result = torch.empty((stop - start, *stored.shape[1:]), dtype=getattr(torch, self.dtype(name)))
        buffer = result.reshape(-1).view(torch.uint8).numpy().data
        with open(stored.file, "rb", buffering=0) as file:
            file.seek(stored.offset + start * row_bytes)
            done = 0
            while done < len(buffer):
                count = file.readinto(buffer[done:])
                if not count:
                    raise PhiquantError(f"{stored.file} became shorter while {name} was read; copy it again")
                done += count
        return result

    def _checked(self, name: str, shape: tuple[int, ...], found: Mapping[str, StoredTensor]) -> StoredTensor:
        stored = found.get(name)
        if stored is None:
            raise PhiquantError(
                f"{self.folder} has no tensor {name}, which its config.json calls for; "
                "the checkpoint is incomplete, or config.json is of another model"
            )
        if stored.shape != shape:
            raise PhiquantError(
                f"{stored.file.name}: {name} has shape {list(stored.shape)}, config.json makes it {list(shape)}; "
                "the two are of different models"
            )
        if stored.dtype not in _FLOATS:
            raise PhiquantError(
                f"{stored.file.name}: {name} is {stored.dtype}; a float checkpoint holds {', '.join(_FLOATS)}. "
                "Start from the checkpoint before it was converted"
            )
        return stored


def read_header(path: Path) -> dict[str, StoredTensor]:
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


def _pickled_files(folder: Path) -> list[str]:
    return sorted({path.name for pattern in PICKLED for path in folder.glob(pattern)})


def _find(folder: Path) -> tuple[list[Path], dict[str, StoredTensor]]:
    """The files of the checkpoint and every tensor in them."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE], read_header(folder / SINGLE)
    if not (folder / INDEX).is_file():
        raise _no_weights(folder)
    weight_map = _read_index(folder / INDEX)
    shards = sorted(set(weight_map.values()))
    if missing := [name for name in shards if not (folder / name).is_file()]:
        raise PhiquantError(
            f"{folder} lacks {len(missing)} of {len(shards)} shards, first {missing[0]}; download the missing files"
        )
    headers = {name: read_header(folder / name) for name in shards}
    for name, shard in weight_map.items():
        if name not in headers[shard]:
            raise PhiquantError(
                f"{folder / INDEX} says {name} is in {shard}, which does not hold it; download both again"
            )
    return [folder / name for name in shards], {name: headers[shard][name] for name, shard in weight_map.items()}


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
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


def _no_weights(folder: Path) -> PhiquantError:
    advice = "save the model again with save_pretrained, which writes safetensors"
    if pickled := _pickled_files(folder):
        return PhiquantError(
            f"{folder} holds only pickled weights ({', '.join(pickled[:3])}); a pickle can run any code when it "
            f"is opened, so phiquant does not open it: {advice}"
        )
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    hint = f" (but {', '.join(others[:3])}, without an index)" if others else ""
    return PhiquantError(f"{folder} has neither {SINGLE} nor {INDEX}{hint}; {advice}")


def _entry(path: Path, name: str, value: Any, data: int) -> StoredTensor:
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
    return StoredTensor(path, dtype, tuple(shape), data + begin, expected)


def _check_layout(path: Path, tensors: Mapping[str, StoredTensor], data: int, size: int) -> None:
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


def _refuse_strangers(found: Mapping[str, Any], expected: Mapping[str, Any], tied: bool) -> None:
    """Tensors that config.json does not call for: a bias or an adapter would be lost silently."""
    ignored = (*_NOT_PARAMETERS, f"{phi.HEAD}.weight") if tied else _NOT_PARAMETERS
    strangers = [n for n in found if n not in expected and not any(fnmatch.fnmatchcase(n, p) for p in ignored)]
    if strangers:
        raise PhiquantError(
            f"the checkpoint holds {len(strangers)} tensors that {phi.ARCHITECTURE} does not have, "
            f"first {sorted(strangers)[0]}; merge adapters and remove what is not part of the model"
        )


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _damaged(path: Path, what: str) -> PhiquantError:
    return PhiquantError(f"{path} is damaged: {what}; download it again")


def file_identity(path: Path) -> list[Any]:
    """What changes when a file does: name, size and time of the last change."""
    status = os.stat(path)
    return [path.name, status.st_size, status.st_mtime_ns]
