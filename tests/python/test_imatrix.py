"""Importance matrices: what is collected, both forms of file, foreign and damaged ones."""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from phiquant import imatrix
from phiquant.errors import PhiquantError
from phiquant.imatrix import Importance
from phiquant.statistics import Statistics

MODULES = ("model.layers.1.mlp.down_proj", "model.layers.0.self_attn.qkv_proj", "lm_head")


@pytest.fixture
def made() -> dict[str, Importance]:
    numbers = np.random.default_rng(0)
    return {name: Importance(numbers.random(96, np.float32) * 1000, 1300 + i) for i, name in enumerate(MODULES)}


def test_collected_sums_are_those_of_the_inputs(tiny_model: Any) -> None:
    """Of every linear, over all tokens: against a Statistics that one hook fills, and torch's own second moments."""
    ids = torch.randint(0, 4096, (5, 16), generator=torch.Generator().manual_seed(0))
    found = imatrix.collect(tiny_model, ids, batch=2)
    assert len(found) == 2 * 4 + 1
    name = "model.layers.1.mlp.down_proj"
    seen: list[torch.Tensor] = []
    hook = tiny_model.get_submodule(name).register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        tiny_model(ids)
    hook.remove()
    rows = seen[0].flatten(0, -2)
    assert found[name].count == len(rows) == 80
    np.testing.assert_allclose(found[name].weights, rows.square().mean(0).numpy(), rtol=1e-5)
    statistics = Statistics(rows.shape[1])
    statistics.update(rows)
    same = imatrix.from_statistics({name: statistics})[name]
    np.testing.assert_allclose(same.sums, found[name].sums, rtol=1e-4)
    assert same.count == 80
    assert not tiny_model.get_submodule(name)._forward_pre_hooks


def test_the_gguf_form_round_trips(made: dict[str, Importance], tmp_path: Path) -> None:
    imatrix.write(tmp_path / "a.gguf", made, datasets=["text.txt"])
    found = imatrix.read(tmp_path / "a.gguf")
    assert set(found) == set(made)
    for name, one in made.items():
        assert np.array_equal(found[name].sums, one.sums)
        assert found[name].count == one.count
        assert np.array_equal(found[name].weights, one.weights)


def test_gguf_py_reads_it(made: dict[str, Importance], tmp_path: Path) -> None:
    """Names, shapes and keys as llama.cpp's tools/imatrix writes them, in its order."""
    gguf = pytest.importorskip("gguf")
    imatrix.write(tmp_path / "a.gguf", made, datasets=["one.txt", "two.txt"], chunk=256)
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    tensors = {t.name: t for t in reader.tensors}
    assert [name for name in tensors if name.endswith("sum2")] == [
        "blk.0.attn_qkv.weight.in_sum2", "blk.1.ffn_down.weight.in_sum2", "output.weight.in_sum2",
    ]  # fmt: skip
    assert tensors["output.weight.in_sum2"].shape.tolist() == [96, 1]
    assert tensors["output.weight.counts"].shape.tolist() == [1, 1]
    assert tensors["output.weight.counts"].data.item() == 1302.0
    assert np.array_equal(tensors["output.weight.in_sum2"].data.reshape(-1), made["lm_head"].sums)
    contents = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert contents == {
        "general.type": "imatrix",
        "imatrix.datasets": ["one.txt", "two.txt"],
        "imatrix.chunk_count": 5,
        "imatrix.chunk_size": 256,
    }


def test_the_dat_form(made: dict[str, Importance], tmp_path: Path) -> None:
    """Byte by byte as llama.cpp reads it; it keeps means, so weights come back and counts are of chunks."""
    imatrix.write(tmp_path / "a.dat", made, legacy=True, datasets=["text.txt"])
    found = imatrix.read(tmp_path / "a.dat")
    assert set(found) == set(made)
    for name, one in made.items():
        np.testing.assert_allclose(found[name].weights, one.weights, rtol=3e-7)
        assert found[name].count == 3  # 1300 tokens, 512 at a time
    data = (tmp_path / "a.dat").read_bytes()
    name = b"blk.0.attn_qkv.weight"
    start = struct.pack("<ii", 3, len(name)) + name + struct.pack("<ii", 3, 96)
    assert data.startswith(start)
    assert np.frombuffer(data, "<f4", 96, len(start)) == pytest.approx(made[MODULES[1]].weights * 3, rel=1e-6)
    assert data.endswith(struct.pack("<ii", 3, 8) + b"text.txt")


def test_a_dat_without_its_end_is_read(made: dict[str, Importance], tmp_path: Path) -> None:
    """Releases of early 2024 wrote no data set, and none before them the number of chunks."""
    imatrix.write(tmp_path / "a.dat", made, legacy=True)
    (tmp_path / "b.dat").write_bytes((tmp_path / "a.dat").read_bytes()[:-8])
    assert set(imatrix.read(tmp_path / "b.dat")) == set(made)


def test_nothing_seen_weighs_one() -> None:
    assert np.array_equal(Importance(np.zeros(3, np.float32), 0).weights, np.ones(3))


def test_wrong_contents_are_refused(made: dict[str, Importance], tmp_path: Path, small_gguf: Path) -> None:
    with pytest.raises(PhiquantError, match="of no matrices"):
        imatrix.write(tmp_path / "a", {})
    with pytest.raises(PhiquantError, match=r"ffn_down\.weight are not finite"):
        imatrix.write(tmp_path / "a", {MODULES[0]: Importance(np.float32([1, np.inf]), 4)})  # type: ignore[arg-type]
    with pytest.raises(PhiquantError, match="no place in a GGUF file"):
        imatrix.write(tmp_path / "a", {"model.layers.0.mlp.experts": Importance(np.ones(2, np.float32), 4)})
    with pytest.raises(PhiquantError, match="no such file"):
        imatrix.read(tmp_path / "a")
    with pytest.raises(PhiquantError, match="is a GGUF file, but no importance matrix"):
        imatrix.read(small_gguf)


@pytest.fixture
def small_gguf(tmp_path: Path) -> Path:
    from phiquant.formats.gguf.container import Metadata, header

    metadata = Metadata()
    metadata.string("general.type", "model")
    (tmp_path / "model.gguf").write_bytes(header(metadata, []))
    return tmp_path / "model.gguf"


@pytest.mark.parametrize("legacy", [False, True])
def test_damaged_files_are_refused(legacy: bool, made: dict[str, Importance], tmp_path: Path) -> None:
    """Cut anywhere, or with bytes changed: an error that names the file, or values; never anything else."""
    path = tmp_path / "a"
    imatrix.write(path, made, legacy=legacy, datasets=["x"])
    whole = path.read_bytes()
    numbers = random.Random(0)
    for length in (0, 3, 4, 7, 30, 100, len(whole) // 2, len(whole) * 9 // 10):
        path.write_bytes(whole[:length])
        with pytest.raises(PhiquantError, match=str(path)):
            imatrix.read(path)
    for _ in range(200):
        damaged = bytearray(whole)
        for at in range(place := numbers.randrange(min(len(whole), 700) - 8), place + 8):
            damaged[at] = numbers.randrange(256)
        path.write_bytes(damaged)
        try:
            found = imatrix.read(path)
        except PhiquantError:
            continue
        assert all(np.isfinite(one.sums).all() for one in found.values())
