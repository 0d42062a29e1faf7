"""What is fuzzed: each reader, and the small valid folders that its damaged ones are made from."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import phiquant as pq
import torch
from mutate import Files
from phiquant.checkpoint import Checkpoint
from phiquant.compression import compressed_size, read_compressed
from phiquant.formats.registry import FORMATS
from phiquant.testing import random_phi3

_LEFT_OUT = (
    "tokenizer",
    "special_tokens",
    "chat_template",
    "generation_config",
    "receipt",
    "vocab",
    "merges",
    "openvino_tok",
    "openvino_detok",
)
# The grids of a format's seeds; of the others, its first two and its first float target.
_GRIDS = {
    "gguf": ("gguf:Q4_0", "gguf:Q4_1", "gguf:Q4_K", "gguf:IQ4_XS", "gguf:TQ2_0", "gguf:NVFP4", "gguf:F16"),
    "safetensors": ("safetensors:int4-g32", "safetensors:BF16"),
}


@dataclass(frozen=True)
class Subject:
    """A reader. seeds: valid folders; read: opens such a folder and looks at all that it holds."""

    seeds: Callable[[], list[Files]]
    read: Callable[[Path], Any]


def subjects() -> dict[str, Subject]:
    """Every reader by its name: those of the formats, and of what is not an export."""
    formats = {name: Subject(lambda name=name: _exports(name), lambda f, name=name: _read(name, f)) for name in FORMATS}
    return {
        **formats,
        "imatrix": Subject(_imatrices, lambda folder: pq.imatrix.read(folder / "imatrix")),
        "checkpoint": Subject(_checkpoints, _read_checkpoint),
        "receipt": Subject(_receipts, lambda folder: pq.verify(folder, decode=False)),
        "compressed": Subject(_compressed, _read_compressed),
    }


def _read(name: str, folder: Path) -> None:
    format = FORMATS[name]
    reader = format.reader_module()
    path = folder / "model.gguf" if format.single_file else folder
    stored = reader.read(path)
    reader.read_config(path)
    for tensor in stored.values():
        rows = slice(0, min(3, tensor.shape[0] if tensor.shape else 1))
        tensor.values(rows)
        if tensor.spec is None:
            tensor.raw(rows)
        else:
            tensor.parts(tensor.spec, rows)
            tensor.quantized()
        tensor.digests(tensor.spec)


def _exports(name: str) -> list[Files]:
    known = [t for t in pq.TARGETS.values() if t.format == name]
    grids = [t.name for t in known if t.spec][:2] + [t.name for t in known if not t.spec][:1]
    return [_export(target) for target in _GRIDS.get(name, grids)]


def _export(target: str, left_out: tuple[str, ...] = _LEFT_OUT) -> Files:
    """The files of an export, without those that readers of weights do not open."""
    named = pq.target(target)
    _, tokenizer = pq.load("phi3-tiny")
    model = random_phi3(hidden_size=256, intermediate_size=256, num_hidden_layers=1, tie_word_embeddings=True)
    if named.spec is not None:
        pq.quantize(model, target)
    with _folder() as folder:
        pq.export(model, tokenizer, folder, format=named.format, float_dtype=None if named.spec else named.float_dtype)
        files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
        return {name: path.read_bytes() for name, path in files.items() if not name.startswith(left_out)}


def _imatrices() -> list[Files]:
    """Both forms of an importance matrix."""
    seeds: list[Files] = []
    matrices = {f"model.layers.{i}.mlp.down_proj": pq.imatrix.Importance(np.ones(64, np.float32), 900) for i in (0, 1)}
    for legacy in (False, True):
        with _folder() as folder:
            pq.imatrix.write(folder / "imatrix", matrices, legacy=legacy, datasets=["text"])
            seeds.append({"imatrix": (folder / "imatrix").read_bytes()})
    return seeds


def _receipts() -> list[Files]:
    return [_export(target, left_out=("\0",)) for target in ("gguf:Q4_0", "safetensors:int8-channel")]


def _checkpoints() -> list[Files]:
    model = random_phi3(hidden_size=64, intermediate_size=96, num_hidden_layers=1).bfloat16()
    found = []
    for size in ("1GB", "200KB"):
        with _folder() as folder:
            model.save_pretrained(folder, max_shard_size=size)
            found.append({p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith(_LEFT_OUT)})
    return found


def _read_checkpoint(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    for name in checkpoint.tensors:
        checkpoint.dtype(name)
        checkpoint.read(name)


def _compressed() -> list[Files]:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(16, 64, generator=generator)
    tensors: dict[str, Any] = {
        "w.weight": pq.quantize_tensor(w, "int4-g32-sym"),
        "sparse.weight": w * (torch.rand(w.shape, generator=generator) < 0.1),
        "norm.weight": w[0],
    }
    with _folder() as folder:
        pq.compress(tensors, folder / "model.phiq")
        return [{"model.phiq": (folder / "model.phiq").read_bytes()}]


def _read_compressed(folder: Path) -> None:
    if (folder / "model.phiq").is_file():
        _sign(folder / "model.phiq")
    read_compressed(folder / "model.phiq")
    compressed_size(folder / "model.phiq")


def _sign(path: Path) -> None:
    """Make the digest fit the damage, where there is still a file to sign: what comes after it is to be tried too."""
    from phiquant.compression.reader import digest
    from safetensors import safe_open
    from safetensors.torch import save_file

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            parts = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if "tensors" in metadata and len(metadata.get("sha256", "")) % 2 == 0:
            save_file(parts, path, {**metadata, "sha256": digest(metadata["tensors"], parts)})
    except Exception:
        return


class _folder:
    """A temporary folder, as a Path."""

    def __enter__(self) -> Path:
        self._path = Path(tempfile.mkdtemp(prefix="phiquant-seeds-"))
        return self._path

    def __exit__(self, *error: object) -> None:
        shutil.rmtree(self._path, ignore_errors=True)
