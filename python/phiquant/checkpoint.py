"""Read a Hugging Face checkpoint folder tensor by tensor, trusting none of its files.

Bytes are read into buffers, not mapped: the pages of a mapped file count as this process' memory.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .errors import PhiquantError
from .formats.safetensors.header import INDEX, SINGLE, Place, read_header, read_index
from .load import read_config
from .models import phi
from .rawfile import read_into
from .spec import FloatName

PICKLED = ("pytorch_model*.bin", "consolidated*.pth", "*.pt", "*.ckpt", "*.pkl")
_FLOATS: dict[str, FloatName] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_NOT_PARAMETERS = ("*.rotary_emb.inv_freq",)  # older checkpoints stored this table; models compute it


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
        return read_into(result, stored.file, stored.offset + start * row_bytes, name)

    def _checked(self, name: str, shape: tuple[int, ...], found: Mapping[str, Place]) -> Place:
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


def _pickled_files(folder: Path) -> list[str]:
    return sorted({path.name for pattern in PICKLED for path in folder.glob(pattern)})


def _find(folder: Path) -> tuple[list[Path], dict[str, Place]]:
    """The files of the checkpoint and every tensor in them."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE], read_header(folder / SINGLE)
    if not (folder / INDEX).is_file():
        raise _no_weights(folder)
    weight_map = read_index(folder / INDEX)
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


def _refuse_strangers(found: Mapping[str, Any], expected: Mapping[str, Any], tied: bool) -> None:
    """Tensors that config.json does not call for: a bias or an adapter would be lost silently."""
    ignored = (*_NOT_PARAMETERS, f"{phi.HEAD}.weight") if tied else _NOT_PARAMETERS
    strangers = [n for n in found if n not in expected and not any(fnmatch.fnmatchcase(n, p) for p in ignored)]
    if strangers:
        raise PhiquantError(
            f"the checkpoint holds {len(strangers)} tensors that {phi.ARCHITECTURE} does not have, "
            f"first {sorted(strangers)[0]}; merge adapters and remove what is not part of the model"
        )


def file_identity(path: Path) -> list[Any]:
    """What changes when a file does: name, size and time of the last change."""
    status = os.stat(path)
    return [path.name, status.st_size, status.st_mtime_ns]
