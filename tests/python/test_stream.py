"""Disk to disk: the same bytes as in memory, after a kill as without one, and as large as plan() says."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import phiquant as pq
import pytest
from phiquant import PhiquantError, Recipe, stream
from phiquant.formats.gguf.reader import read_metadata
from phiquant.testing import random_phi3

TARGETS = ["gguf:Q4_0", "gguf:Q4_1", "gguf:Q8_0", "gguf:F16", "gguf:BF16", "safetensors:int4-g32"]
TARGETS += ["safetensors:int8-channel", "safetensors:BF16"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, _phi3_tiny: tuple[Any, Any]) -> Path:
    """A sharded bf16 checkpoint with a tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint")
    random_phi3().bfloat16().save_pretrained(folder, max_shard_size="1MB")
    _phi3_tiny[1].save_pretrained(folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("target", TARGETS)
def test_the_plan_names_every_file_and_its_exact_size(checkpoint: Path, tmp_path: Path, target: str) -> None:
    plan = stream.plan(checkpoint, target)
    receipt = stream.quantize_checkpoint(checkpoint, target, tmp_path)
    written = {name: len(data) for name, data in contents(tmp_path).items() if name != "receipt.json"}
    assert plan.files == written
    assert plan.bytes == sum(written.values())
    assert receipt["verified"]["tensors"] == 15
    assert plan.peak_memory > 50e6
    assert 0 < plan.seconds < 60
    assert plan.to_dict()["target"] == target


@pytest.mark.parametrize("target", ["gguf:Q4_0", "safetensors:int8-channel"])
@pytest.mark.parametrize("solver", ["rtn", "mse"])
def test_the_codes_are_those_of_quantize_in_memory(checkpoint: Path, tmp_path: Path, target: str, solver: str) -> None:
    streamed = stream.quantize_checkpoint(checkpoint, target, tmp_path / "a", solver=solver)
    model, tokenizer = pq.load(checkpoint)
    pq.quantize(model, target, solver=solver)
    in_memory = pq.export(model, tokenizer, tmp_path / "b", format=target.partition(":")[0])
    assert streamed["tensors"] == in_memory["tensors"]


def test_a_recipe_decides_what_the_target_leaves_open(checkpoint: Path, tmp_path: Path) -> None:
    recipe = Recipe({"*.down_proj": "gguf:Q8_0", "*.o_proj": "float"}, "gguf:Q4_0")
    receipt = stream.quantize_checkpoint(checkpoint, "gguf:Q4_0", tmp_path, recipe=recipe)
    stored = {t["name"]: t["stored_as"] for t in receipt["tensors"]}
    assert stored["model.layers.0.mlp.down_proj.weight"] == "Q8_0"
    assert stored["model.layers.0.self_attn.o_proj.weight"] == "BF16"
    assert stored["model.layers.0.self_attn.qkv_proj.weight"] == "Q4_0"


def test_progress_tells_tensor_and_bytes(checkpoint: Path, tmp_path: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    stream.quantize_checkpoint(checkpoint, "gguf:Q4_0", tmp_path, progress=lambda *step: steps.append(step))
    assert len({name for name, _, _ in steps}) == 15
    done = [step[1] for step in steps]
    assert done == sorted(done)
    assert done[-1] == steps[-1][2] == (tmp_path / "model.gguf").stat().st_size


CHILD = """
import os, resource, signal, sys
from pathlib import Path
from phiquant import stream
from phiquant.formats import partial, source
from phiquant.formats.safetensors import folder as safetensors_folder
how, folder, target, out = sys.argv[1:]
partial.SYNC_BYTES, source.CHUNK_BYTES, safetensors_folder.SHARD_BYTES = 1, 100_000, 1_500_000
if how == "limit":
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_200_000, 1_200_000))
count = 0
def progress(name, done, total):
    global count
    count += 1
    if how.isdigit() and count == int(how):
        os.kill(os.getpid(), signal.SIGKILL)
stream.quantize_checkpoint(folder, target, out, progress=progress)
print(count)
"""


def child(how: str | int, checkpoint: Path, target: str, out: Path) -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, "-c", CHILD, str(how), str(checkpoint), target, str(out)]
    return subprocess.run(arguments, capture_output=True, text=True, timeout=300)


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("target", ["gguf:Q4_0", "safetensors:int4-g32"])
def test_a_killed_run_continues_to_the_same_bytes(checkpoint: Path, tmp_path: Path, target: str) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert child("", checkpoint, target, whole).stdout == "15\n"
    for kill_after in (5, 4):  # the second kill hits the continued run
        assert child(kill_after, checkpoint, target, out).returncode == -signal.SIGKILL
        complete = [path.name for path in out.iterdir() if ".partial" not in path.name]
        assert complete == []  # nothing appears before all of it is complete
    ended = child("", checkpoint, target, out)
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) <= 15 - 5
    assert contents(out) == contents(whole)
    assert pq.verify(out).ok


@pytest.mark.skipif(os.name != "posix", reason="limits of POSIX")
def test_a_full_disk_leaves_what_the_next_run_continues(checkpoint: Path, tmp_path: Path) -> None:
    ended = child("limit", checkpoint, "gguf:Q4_0", tmp_path)
    assert "the limit on the size of a file is reached" in ended.stderr
    assert "run the same command again" in ended.stderr
    assert not (tmp_path / "model.gguf").exists()
    ended = child("", checkpoint, "gguf:Q4_0", tmp_path)
    assert int(ended.stdout) < 15
    assert pq.verify(tmp_path).ok
    assert not list(tmp_path.glob("*.partial*"))


def test_a_changed_checkpoint_is_not_mixed_with_the_old_one(checkpoint: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    if os.name == "posix":
        child(5, copy, "gguf:Q4_0", tmp_path / "out")
    random_phi3(seed=1).bfloat16().save_pretrained(copy, max_shard_size="1MB")
    receipt = stream.quantize_checkpoint(copy, "gguf:Q4_0", tmp_path / "out")
    assert receipt["tensors"] == stream.quantize_checkpoint(copy, "gguf:Q4_0", tmp_path / "fresh")["tensors"]


@pytest.mark.parametrize("target", ["gguf:Q4_0", "safetensors:int4-g32"])
def test_the_checkpoint_itself_is_never_the_output(checkpoint: Path, target: str) -> None:
    before = contents(checkpoint)
    with pytest.raises(PhiquantError, match="is the checkpoint itself"):
        stream.quantize_checkpoint(checkpoint, target, checkpoint)
    assert contents(checkpoint) == before


@pytest.mark.parametrize("target", ["gguf:Q4_0", "safetensors:int4-g32"])
def test_a_tokenizer_that_is_missing(checkpoint: Path, tmp_path: Path, target: str) -> None:
    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    (copy / "tokenizer.json").unlink()
    for call in (lambda: stream.plan(copy, target), lambda: stream.quantize_checkpoint(copy, target, tmp_path / "out")):
        with pytest.raises(PhiquantError, match=r"tokenizer\.json"):
            call()
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("call", [stream.plan, lambda *a: stream.quantize_checkpoint(*a, "unused")])
def test_wrong_arguments(checkpoint: Path, call: Any) -> None:
    with pytest.raises(ValueError, match="unknown target 'gguf:Q5_X'"):
        call(checkpoint, "gguf:Q5_X")
    with pytest.raises(PhiquantError, match="is not a folder"):
        call(checkpoint / "none", "gguf:Q4_0")


@pytest.mark.parametrize("solver", ["auto", "auto:rtn,mse"])
def test_what_needs_the_model_whole_says_so(checkpoint: Path, tmp_path: Path, solver: str) -> None:
    with pytest.raises(PhiquantError, match=f"{solver} measures whole models.*hold the model in memory"):
        stream.quantize_checkpoint(checkpoint, "gguf:Q4_0", tmp_path / "out", solver=solver)
    assert not (tmp_path / "out").exists()


def test_a_grid_of_another_format_is_refused_by_the_plan_too(checkpoint: Path) -> None:
    with pytest.raises(PhiquantError, match="Nearest that can"):
        stream.plan(checkpoint, "gguf:Q4_0", recipe=Recipe({}, "safetensors:int8-channel"))


def test_the_metadata_are_those_of_the_config(checkpoint: Path, tmp_path: Path) -> None:
    stream.quantize_checkpoint(checkpoint, "gguf:Q8_0", tmp_path)
    metadata = read_metadata(tmp_path / "model.gguf")
    assert metadata["general.architecture"] == "phi3"
    assert metadata["phi3.block_count"] == 2
