"""A checkpoint rewritten by transforms: a copy on disk whose files are mapped into a model and changed in place.

Only what a transform touches at the moment must be in memory; the system writes mapped pages back when it wants room.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from .calibration_layers import empty_model
from .checkpoint import Checkpoint, file_identity
from .errors import PhiquantError
from .formats import companions
from .formats.partial import write_atomically
from .formats.safetensors.header import INDEX, SINGLE
from .models import phi
from .quant_spec import QuantSpec
from .tensor import ids_digest
from .transforms import applied, transform

DONE = "transforms.json"
_OTHERS, _ADDED = "all-but-the-head.safetensors", "head.safetensors"


def rewrite(
    folder: str | Path,
    out: Path,
    names: Sequence[str],
    specs: Mapping[str, QuantSpec | None],
    ids: Tensor | None,
) -> list[dict[str, Any]]:
    """Write the checkpoint `folder`, rewritten by these transforms, to the folder `out`; what receipts tell of them.

    specs, ids: as `specs` and `calibration` of transforms.transform. It takes as much room on the disk as the
    checkpoint. `out` is taken as it is if a call with the same arguments has finished it, else made anew.
    """
    checkpoint = Checkpoint(folder)
    data = None if ids is None else ids_digest(ids)
    files = [file_identity(path) for path in checkpoint.files]
    done, asked = out / DONE, [list(names), {name: str(spec) for name, spec in specs.items()}, data, files]
    if done.exists():
        kept = json.loads(done.read_text())
        if kept["asked"] == asked:
            return list(kept["transforms"])
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    beside = [path for name in ("config.json", INDEX) if (path := checkpoint.folder / name).is_file()]
    companions.copy((*beside, *companions.companions(checkpoint.folder), *checkpoint.files), out)
    with mapped(out) as model:
        transform(model, names, specs=specs, calibration=ids)
        told, head = applied(model), _new_head(model, checkpoint)
    if head is not None:
        _add(out, head)
    write_atomically(done, json.dumps({"asked": asked, "transforms": told}))
    return told


@contextmanager
def mapped(folder: Path) -> Iterator[Any]:
    """A Phi3ForCausalLM on the CPU whose weights lie in the files of a checkpoint folder, which change with them.

    PhiquantError for a file whose tensors do not start at multiples of their items' size.
    """
    checkpoint = Checkpoint(folder)
    files: dict[Path, mmap.mmap] = {}
    for path in checkpoint.files:
        with open(path, "r+b") as file:
            files[path] = mmap.mmap(file.fileno(), 0)
    weights: dict[str, Tensor] = {}
    for name, place in checkpoint.tensors.items():
        dtype = getattr(torch, checkpoint.dtype(name))
        if place.offset % dtype.itemsize:
            raise PhiquantError(f"{place.file}: {name} starts inside an item; save it again by the safetensors library")
        count = math.prod(place.shape)
        flat = torch.frombuffer(files[place.file], dtype=dtype, count=count, offset=place.offset)
        weights[name] = flat.view(place.shape)
    model = empty_model(checkpoint)
    if phi.sizes(checkpoint.config).tied:
        weights[f"{phi.HEAD}.weight"] = weights[f"{phi.EMBEDDING}.weight"]
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    yield model.eval().requires_grad_(False)
    for mapping in files.values():
        mapping.flush()


def _new_head(model: Any, checkpoint: Checkpoint) -> Tensor | None:
    """The weight of a head that a transform has untied from the embedding."""
    if not phi.sizes(checkpoint.config).tied or model.config.tie_word_embeddings:
        return None
    return model.lm_head.weight.data


def _add(out: Path, head: Tensor) -> None:
    """To a tied checkpoint, in a file of its own."""
    checkpoint, name = Checkpoint(out), f"{phi.HEAD}.weight"
    save_file({name: head}, out / _ADDED, {"format": "pt"})
    places = {one: place.file.name for one, place in checkpoint.tensors.items()}
    if (out / SINGLE).is_file():  # found before any index
        os.replace(out / SINGLE, out / _OTHERS)
        places = dict.fromkeys(places, _OTHERS)
    (out / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places | {name: _ADDED}}))
    (out / "config.json").write_text(json.dumps(checkpoint.config | {"tie_word_embeddings": False}))
