"""Checkpoints of real or chosen size with random weights, written to disk tensor by tensor."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .errors import PhiquantError
from .miniature_tokenizers import tokenizer
from .miniatures import MINIATURES
from .models import phi
from .models.configs import CONFIGS, GENERATION_EOS

SHARD_BYTES = 1 << 29
_BLOCK = 1 << 22  # values made at once
_FAMILIES = {
    **{name: small.family for name, small in MINIATURES.items()},
    "phi-3-medium": MINIATURES["phi-3-mini"].family,
}


def generate_checkpoint(
    name: str, folder: str | Path, seed: int = 0, *, shard_bytes: int = SHARD_BYTES, **changes: Any
) -> int:
    """Write a random checkpoint of that Phi model into `folder`; returns the number of parameters.

    name: a key of phiquant.models.configs.CONFIGS. changes: fields of config.json, such as
        num_hidden_layers=2; the vocabulary stays, because the tokenizer is written too, in its full size.
    bfloat16 weights of std 0.02 and norms around 1, in shards of about `shard_bytes`. Memory: a few MB beside the
    tokenizer. PhiquantError if there is no such model, the sizes do not fit, or the folder holds weights already.
    """
    if name not in CONFIGS:
        raise PhiquantError(f"there is no model {name!r}; there are {', '.join(CONFIGS)}")
    config = {**CONFIGS[name], **changes}
    if config["vocab_size"] != CONFIGS[name]["vocab_size"]:
        raise PhiquantError(f"the vocabulary of {name} has {CONFIGS[name]['vocab_size']} tokens; it cannot be changed")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if found := sorted(folder.glob("*.safetensors*")):
        raise PhiquantError(f"{found[0]} is there already; choose an empty folder")
    family = _FAMILIES[name]
    tokenizer(family, family.size, config["max_position_embeddings"]).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    stops = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    stops["eos_token_id"] = GENERATION_EOS.get(name, stops["eos_token_id"])
    (folder / "generation_config.json").write_text(json.dumps(stops, indent=2))
    shards = list(_shards(config, shard_bytes))
    generator = torch.Generator().manual_seed(seed)
    weight_map: dict[str, str] = {}
    for index, shard in enumerate(shards):
        file = f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
        _write_shard(folder / file, shard, generator)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(torch.Size(shape).numel() for shard in shards for shape in shard.values())
    document = {"metadata": {"total_size": 2 * total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(document, indent=2))
    return total


def _shards(config: dict[str, Any], shard_bytes: int) -> Iterator[dict[str, tuple[int, ...]]]:
    """Names and shapes of each file."""
    shard: dict[str, tuple[int, ...]] = {}
    held = 0
    for name, shape in phi.tensors(config):
        size = 2 * torch.Size(shape).numel()
        if shard and held + size > shard_bytes:
            yield shard
            shard, held = {}, 0
        shard[name] = shape
        held += size
    yield shard


def _write_shard(path: Path, shard: dict[str, tuple[int, ...]], generator: torch.Generator) -> None:
    """A safetensors file: the length of the header, the header, then the tensors one after another."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shard.items():
        end = at + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for shape in shard.values():
            _write_values(file, shape, generator)


def _write_values(file: BinaryIO, shape: tuple[int, ...], generator: torch.Generator) -> None:
    mean, std = (1.0, 0.1) if len(shape) == 1 else (0.0, 0.02)
    left = torch.Size(shape).numel()
    while left:
        block = torch.empty(min(left, _BLOCK)).normal_(mean, std, generator=generator)
        file.write(block.bfloat16().view(torch.uint8).numpy().data)
        left -= block.numel()
