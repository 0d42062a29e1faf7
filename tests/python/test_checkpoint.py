"""Checkpoint folders are read without trusting them: every bad file gets an error that says what and where."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from phiquant import PhiquantError, Recipe, UnsupportedModelError, quantize_tensor
from phiquant.checkpoint import Checkpoint, read_header
from phiquant.checkpoint_source import CheckpointSource
from phiquant.formats import source as source_module
from phiquant.formats.source import row_slices
from phiquant.tensor import QuantizedTensor
from phiquant.testing import random_phi3

DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("checkpoint")
    model = random_phi3().bfloat16()
    model.save_pretrained(folder / "sharded", max_shard_size="1MB")
    model.save_pretrained(folder / "single")
    return folder, model


@pytest.fixture
def sharded(saved: tuple[Path, Any], tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved[0] / "sharded", tmp_path / "sharded"))


@pytest.fixture
def single(saved: tuple[Path, Any], tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved[0] / "single", tmp_path / "single"))


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    data = json.loads(path.read_text())
    path.write_text(json.dumps(change(data) or data))


def write_safetensors(path: Path, header: Any, data: bytes, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


@pytest.mark.parametrize("kind", ["sharded", "single"])
def test_every_tensor_is_what_wassaved(saved: tuple[Path, Any], kind: str) -> None:
    checkpoint = Checkpoint(saved[0] / kind)
    assert len(checkpoint.files) == (3 if kind == "sharded" else 1)
    for name, value in saved[1].named_parameters():
        assert torch.equal(checkpoint.read(name), value), name
    assert torch.equal(checkpoint.read(DOWN, slice(3, 9)), saved[1].get_parameter(DOWN)[3:9])
    assert checkpoint.dtype(DOWN) == "bfloat16"


def test_a_missing_shard(sharded: Path) -> None:
    (sharded / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(PhiquantError, match=r"lacks 1 of 3 shards, first model-00002-of-00003.safetensors"):
        Checkpoint(sharded)


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "a/x.safetensors", "..", "", 3, None])
def test_an_index_that_points_elsewhere(sharded: Path, name: Any) -> None:
    edit(sharded / "model.safetensors.index.json", lambda d: d["weight_map"].update({DOWN: name}))
    with pytest.raises(PhiquantError, match=rf"{DOWN} is said to be in .* not the name of a file beside it; refused"):
        Checkpoint(sharded)


def test_an_index_that_points_to_a_pickle(sharded: Path) -> None:
    edit(sharded / "model.safetensors.index.json", lambda d: d["weight_map"].update({DOWN: "x.bin"}))
    with pytest.raises(PhiquantError, match=r"not a .safetensors file; refused"):
        Checkpoint(sharded)


def test_an_index_that_names_the_wrong_shard(sharded: Path) -> None:
    first = "model-00001-of-00003.safetensors"
    edit(sharded / "model.safetensors.index.json", lambda d: d["weight_map"].update({"lm_head.weight": first}))
    with pytest.raises(PhiquantError, match=f"says lm_head.weight is in {first}, which does not hold it"):
        Checkpoint(sharded)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', "[" * 100_000], ids=range(5))
def test_an_index_that_is_none(sharded: Path, text: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(PhiquantError, match=r"index.json (is damaged: it has no weight_map|is not|must)"):
        Checkpoint(sharded)


@pytest.mark.parametrize("keep", [0, 7, 8, 5000, -1])
def test_a_truncated_file(single: Path, keep: int) -> None:
    path = single / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(PhiquantError, match="is truncated"):
        Checkpoint(single)


def test_bytes_after_the_last_tensor(single: Path) -> None:
    with open(single / "model.safetensors", "ab") as file:
        file.write(b"more")
    with pytest.raises(PhiquantError, match="4 bytes follow the last tensor"):
        Checkpoint(single)


def test_a_file_that_shrinks_while_it_is_read(single: Path) -> None:
    checkpoint = Checkpoint(single)
    with open(single / "model.safetensors", "r+b") as file:
        file.truncate(1000)
    with pytest.raises(PhiquantError, match="became shorter while"):
        checkpoint.read(DOWN)


W = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
BROKEN = {
    "not json": (b"{", 8, "not valid JSON"),
    "not utf-8": (b"\xff\xfe", 8, "not valid JSON"),
    "deep": (b"[" * 100_000, 8, "not valid JSON"),
    "list": (b"[]", 8, "not a JSON object"),
    "twice": (b'{"w": 1, "w": 2}', 8, "a name occurs twice"),
    "no dtype": ({"w": {"shape": [2], "data_offsets": [0, 8]}}, 8, "lacks dtype, shape or data_offsets"),
    "number": ({"w": 5}, 8, "lacks dtype, shape or data_offsets"),
    "unknown dtype": ({"w": W | {"dtype": "F33"}}, 8, "unknown dtype 'F33'"),
    "negative": ({"w": W | {"data_offsets": [-8, 0]}}, 8, "has shape"),
    "backwards": ({"w": W | {"data_offsets": [8, 0]}}, 8, "its offsets say -8"),
    "fraction": ({"w": W | {"shape": [2.0]}}, 8, "has shape"),
    "true": ({"w": W | {"shape": [True]}}, 8, "has shape"),
    "too large": ({"w": W | {"shape": [1 << 62, 1 << 62]}}, 8, "its offsets say 8"),
    "nine axes": ({"w": W | {"shape": [1] * 9}}, 8, "has shape"),
    "overlap": ({"a": W, "b": W | {"data_offsets": [4, 12]}}, 12, "b overlaps a"),
    "same place": ({"a": W, "b": W}, 8, "b overlaps a"),
    "gap": ({"a": W, "b": W | {"data_offsets": [12, 20]}}, 20, "b leaves a gap after a"),
    "beyond the end": ({"a": W, "b": W | {"data_offsets": [8, 16]}}, 8, "truncated.* b is incomplete"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_damaged_header(tmp_path: Path, case: str) -> None:
    header, size, message = BROKEN[case]
    with pytest.raises(PhiquantError, match=message):
        read_header(write_safetensors(tmp_path / "x.safetensors", header, bytes(size)))


@pytest.mark.parametrize("length", [1 << 63, (1 << 64) - 1, 10_000])
def test_a_header_longer_than_the_file(tmp_path: Path, length: int) -> None:
    with pytest.raises(PhiquantError, match="is truncated or not a safetensors file"):
        read_header(write_safetensors(tmp_path / "x.safetensors", {}, bytes(100), length))


def test_a_header_of_absurd_length_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", 200_000_000))
        file.truncate(300_000_000)  # sparse: takes no disk
    with pytest.raises(PhiquantError, match="over the limit of 100,000,000"):
        read_header(path)


def test_pickled_weights_are_refused_with_the_reason(single: Path) -> None:
    (single / "model.safetensors").rename(single / "pytorch_model.bin")
    with pytest.raises(PhiquantError, match=r"only pickled weights \(pytorch_model.bin\); a pickle can run any code"):
        Checkpoint(single)


def test_no_weights_at_all(single: Path) -> None:
    (single / "model.safetensors").rename(single / "weights.safetensors")
    with pytest.raises(PhiquantError, match=r"neither model.safetensors .*but weights.safetensors, without an index"):
        Checkpoint(single)


def test_another_architecture_is_named(single: Path) -> None:
    edit(single / "config.json", lambda d: d.update(architectures=["PhimoeForCausalLM"], model_type="phimoe"))
    with pytest.raises(UnsupportedModelError, match="PhimoeForCausalLM"):
        Checkpoint(single)


def test_a_config_of_another_size(single: Path) -> None:
    edit(single / "config.json", lambda d: d.update(intermediate_size=512))
    with pytest.raises(PhiquantError, match=r"gate_up_proj.weight has shape \[512, 128\], config.json makes it \[1024"):
        Checkpoint(single)
    edit(single / "config.json", lambda d: d.update(intermediate_size=256, num_hidden_layers=3))
    with pytest.raises(PhiquantError, match=r"has no tensor model.layers.2"):
        Checkpoint(single)
    edit(single / "config.json", lambda d: d.update(num_hidden_layers=1))
    with pytest.raises(PhiquantError, match=r"tensors that Phi3ForCausalLM does not have, first model.layers.1"):
        Checkpoint(single)


def test_a_checkpoint_that_is_not_float(single: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(single / "model.safetensors")
    tensors[DOWN] = tensors[DOWN].to(torch.int8)
    save_file(tensors, single / "model.safetensors")
    with pytest.raises(PhiquantError, match=rf"{DOWN} is I8; a float checkpoint holds F32, F16, BF16"):
        Checkpoint(single)


def test_a_missing_folder_or_config(tmp_path: Path) -> None:
    with pytest.raises(PhiquantError, match="is not a folder"):
        Checkpoint(tmp_path / "none")
    with pytest.raises(PhiquantError, match=r"has no config\.json"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("solver", ["rtn", "mse"])
def test_pieces_give_the_codes_of_the_whole(
    single: Path, monkeypatch: pytest.MonkeyPatch, solver: str, saved: tuple[Path, Any]
) -> None:
    monkeypatch.setattr(source_module, "CHUNK_BYTES", 4 * 128 * 10)  # ten rows of 128 values
    source = CheckpointSource(single, Recipe({"*.down_proj": "uint4-g64-min-f16"}, "gguf:Q4_0"), solver)
    for entry in source.entries:
        value = saved[1].get_parameter(entry.name)
        read = source.read(entry)
        if entry.spec is None:
            assert torch.equal(read, value)
        else:
            assert len(list(row_slices(entry))) > 5
            assert isinstance(read, QuantizedTensor)
            assert read.digests() == quantize_tensor(value, entry.spec, solver).digests()


def test_a_grid_of_the_whole_tensor_is_read_at_once(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_module, "CHUNK_BYTES", 1000)
    source = CheckpointSource(single, "int8-tensor-sym")
    assert all(len(list(row_slices(entry))) == 1 for entry in source.entries if entry.spec)


def test_a_value_that_is_not_finite_is_named_with_its_index(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import load_file, save_file

    monkeypatch.setattr(source_module, "CHUNK_BYTES", 4 * 256 * 10)
    tensors = load_file(single / "model.safetensors")
    tensors[DOWN][101, 7] = float("nan")
    save_file(tensors, single / "model.safetensors")
    source = CheckpointSource(single, "gguf:Q4_0")
    entry = next(entry for entry in source.entries if entry.name == DOWN)
    with pytest.raises(PhiquantError, match=rf"{DOWN} .*not finite, the first is nan at index \[101, 7\]"):
        source.read(entry)


def test_a_group_size_that_does_not_divide_is_refused_when_opening(single: Path) -> None:
    with pytest.raises(PhiquantError, match=r"weight: group size 96 does not divide the last dimension 128"):
        CheckpointSource(single, "int4-g96-sym")


def test_the_fingerprint_tells_inputs_apart(single: Path) -> None:
    base = CheckpointSource(single, "gguf:Q4_0").fingerprint
    assert CheckpointSource(single, "gguf:Q4_0").fingerprint == base
    assert CheckpointSource(single, "gguf:Q4_0", "mse").fingerprint != base
    assert CheckpointSource(single, "gguf:Q8_0").fingerprint != base
    (single / "model.safetensors").touch()
    assert CheckpointSource(single, "gguf:Q4_0").fingerprint != base


def test_tied_layers_must_agree(tmp_path: Path) -> None:
    random_phi3(tie_word_embeddings=True).save_pretrained(tmp_path)
    with pytest.raises(PhiquantError, match=r"lm_head and model.embed_tokens share one weight"):
        CheckpointSource(tmp_path, Recipe({"lm_head": "gguf:Q8_0"}, "gguf:Q4_0"))
    names = [entry.name for entry in CheckpointSource(tmp_path, "gguf:Q4_0").entries]
    assert "lm_head.weight" not in names
