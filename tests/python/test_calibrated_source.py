"""Calibration of a checkpoint on disk: the codes of a model in memory, bounded memory, the same bytes after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import phiquant as pq
import pytest
import torch
from phiquant import PhiquantError, Recipe, stream
from phiquant import calibration_state as state
from phiquant.calibrated_source import CalibratedSource
from phiquant.split_linear import module_path
from phiquant.testing import generate_checkpoint, random_phi3

SLICED = {"*.v_proj": "gguf:Q8_0", "*o_proj": "float", "lm_head": "gguf:Q8_0"}


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(0, 4096, (14, 40), generator=torch.Generator().manual_seed(0))


def save(folder: Path, tokenizer: Any, **config: Any) -> Path:
    random_phi3(**config).bfloat16().save_pretrained(folder, max_shard_size="1MB")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, _phi3_tiny: tuple[Any, Any]) -> Path:
    """Sharded, bf16, of 3 layers."""
    return save(tmp_path_factory.mktemp("checkpoint"), _phi3_tiny[1], num_hidden_layers=3)


def in_memory(folder: Path, what: Any, solver: str, ids: torch.Tensor, target: str, out: Path) -> dict[str, Any]:
    model, tokenizer = pq.load(folder, torch.bfloat16)
    pq.quantize(model, what, solver, calibration=ids)
    return pq.export(model, tokenizer, out, format=target.partition(":")[0])


@pytest.mark.parametrize(
    ("target", "solver"),
    [
        ("gguf:Q4_0", "gptq"),
        ("safetensors:int4-g32", "adaround"),
        ("mlx:4bit-g64", "gptq_mse"),
        ("onnx:int4-g32", "gptq"),
        ("openvino:i4-g64", "mse"),
    ],
)
def test_the_codes_are_those_of_a_model_in_memory(
    checkpoint: Path, ids: torch.Tensor, tmp_path: Path, target: str, solver: str
) -> None:
    streamed = stream.quantize_checkpoint(checkpoint, target, tmp_path / "a", solver=solver, calibration=ids)
    assert streamed["tensors"] == in_memory(checkpoint, target, solver, ids, target, tmp_path / "b")["tensors"]
    assert streamed["verified"]
    assert not (tmp_path / "a" / "calibration").exists()


def test_slices_with_grids_of_their_own_in_pieces_of_rows(
    checkpoint: Path, ids: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "PIECE_BYTES", 1 << 20)  # the head: two pieces
    recipe = Recipe(SLICED, "gguf:Q4_0")
    seen: list[tuple[str, int, int]] = []
    streamed = stream.quantize_checkpoint(
        *(checkpoint, "gguf:Q4_0", tmp_path / "a"),
        solver="gptq",
        recipe=recipe,
        calibration=ids,
        progress=lambda *step: seen.append(step),
    )
    assert seen[2] == ("model.layers.0.self_attn.qkv_proj.v_proj", 2, 16)
    assert seen[15] == ("lm_head", 15, 16)
    memory = in_memory(checkpoint, recipe, "gptq", ids, "gguf:", tmp_path / "b")
    assert streamed["tensors"] == memory["tensors"]


def test_every_slice(checkpoint: Path, ids: torch.Tensor, tmp_path: Path) -> None:
    """All five projections, which no format but ours holds so."""
    recipe = Recipe({f"*.{p}_proj": f"int{b}-g32-sym" for b, p in enumerate(("q", "k", "v", "gate", "up"), 2)})
    source = CalibratedSource(checkpoint, recipe, "gptq", ids, tmp_path, offload=True)
    source.solve()
    model = pq.quantize(pq.load(checkpoint, torch.bfloat16)[0], recipe, "gptq", calibration=ids)
    entries = [entry for entry in source.entries if entry.spec is not None]
    assert len(entries) == 15
    for entry in entries:
        expected = model.get_submodule(module_path(entry.module)).quantized
        assert source.read(entry).digests() == expected.digests(), entry.name


def test_a_tied_table(ids: torch.Tensor, tokenizer: Any, tmp_path: Path) -> None:
    folder = save(tmp_path / "checkpoint", tokenizer, tie_word_embeddings=True)
    recipe = Recipe({"lm_head": "gguf:Q8_0", "*embed_tokens": "gguf:Q8_0"}, "gguf:Q4_0")
    streamed = stream.quantize_checkpoint(
        *(folder, "gguf:Q4_0", tmp_path / "a"), solver="gptq", recipe=recipe, calibration=ids
    )
    assert streamed["tensors"] == in_memory(folder, recipe, "gptq", ids, "gguf:", tmp_path / "b")["tensors"]


def test_a_recipe_that_does_not_fit_is_refused_before_anything_is_solved(
    checkpoint: Path, ids: torch.Tensor, tmp_path: Path
) -> None:
    with pytest.raises(PhiquantError, match="Nearest that can"):
        stream.quantize_checkpoint(
            *(checkpoint, "gguf:Q4_0", tmp_path), solver="gptq", recipe=Recipe({}, "nf4-g64-sym"), calibration=ids
        )
    assert not (tmp_path / "calibration").exists()


# Imports once, then a child for each run, which its progress or its second batch of a layer's outputs may kill.
CHILDREN = """
import json, os, signal, sys
from pathlib import Path
import torch, transformers.models.phi3.modeling_phi3
from phiquant import calibration_inputs, stream
checkpoint, windows, *runs = sys.argv[1:]
ids = torch.randint(0, 4096, (int(windows), 40), generator=torch.Generator().manual_seed(0))
def kill():
    os.kill(os.getpid(), signal.SIGKILL)
def run(out, at):
    def progress(name, done, total):
        if name == at:
            kill()
    advance, left = calibration_inputs.Activations.advance, [int(at.split()[1]) if at.startswith("advance") else -1]
    def counted(self, layer, *exact):
        batches = []
        def second(*_):
            batches.append(1)
            if len(batches) == 2:
                kill()
        if not left[0]:
            layer.register_forward_pre_hook(second)
        left[0] -= 1
        advance(self, layer, *exact)
    calibration_inputs.Activations.advance = counted
    stream.quantize_checkpoint(
        checkpoint, "gguf:Q4_0", out, solver="gptq", calibration=ids, offload=True, progress=progress
    )
    print(stream.peak_memory_here())
for one in runs:
    out, at = one.split(":")
    sys.stdout.flush()
    child = os.fork()
    if not child:
        run(out, at)
        sys.stdout.flush()
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps([status, [int(path.stem[-4:]) for path in Path(out, "calibration").glob("activations-*.bin")]]))
"""


def children(checkpoint: Path, runs: list[tuple[Path, str]], windows: int = 14) -> list[Any]:
    """What each run printed: [exit code, whose inputs it left], and before it the peak memory if it came to its end."""
    arguments = [sys.executable, "-c", CHILDREN, str(checkpoint), str(windows), *(f"{out}:{at}" for out, at in runs)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_a_run_killed_anywhere_ends_with_the_same_bytes(checkpoint: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    kills = {
        "model.layers.0.self_attn.qkv_proj": [0],  # the first layer's inputs are there
        "advance 0": [0],  # in the middle of the first layer's outputs
        "advance 1": [1],  # of the second's: that of the first is behind
        "model.layers.2.mlp.down_proj": [2],
        "model.layers.1.input_layernorm.weight": [],  # while the file is written
    }
    told = children(checkpoint, [(out, at) for at in kills] + [(out, ""), (whole, "")])
    assert told[:5] == [[-signal.SIGKILL, inputs] for inputs in kills.values()]
    assert [line for line in told[5:] if isinstance(line, list)] == [[0, []]] * 2
    assert files(out) == files(whole)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_layers(tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 8}
    sizes |= {"rope_scaling": None, "sliding_window": None}
    peaks = []
    for layers in (2, 10):
        folder = tmp_path / str(layers)
        generate_checkpoint("phi-3.5-mini", folder, num_hidden_layers=layers, **sizes)
        peaks.append(children(folder, [(tmp_path / f"out-{layers}", "")], windows=8)[0])
    assert peaks[1] - peaks[0] < 20e6  # 8 layers more hold 67 MB in bf16


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_a_killed_command_continues(checkpoint: Path, tmp_path: Path) -> None:
    """Killed as soon as the second layer's first matrix is there; the same command then makes what one run makes."""
    text = tmp_path / "text.py"
    text.write_text("def add(a, b):\n    return a + b\n\n\n" * 400)

    def command(out: Path) -> list[str]:
        options = ["--target", "gguf:Q4_0", "--solver", "gptq", "--calibration", str(text), "--out", str(out)]
        return [sys.executable, "-m", "phiquant", "quantize", str(checkpoint), *options]

    run = tmp_path / "out" / "calibration"
    with subprocess.Popen(command(tmp_path / "out"), stderr=subprocess.DEVNULL) as process:
        while not (run / "model.layers.1.self_attn.qkv_proj.safetensors").exists():
            assert process.poll() is None
            time.sleep(0.002)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert run.is_dir()
    for out in (tmp_path / "out", tmp_path / "whole"):
        subprocess.run(command(out), check=True, capture_output=True)
    assert not run.exists()
    assert (tmp_path / "out" / "model.gguf").read_bytes() == (tmp_path / "whole" / "model.gguf").read_bytes()
