"""The examples do what they say, at a size for tests: train, stop, go on, export with a receipt."""

import json
import os
import subprocess
import sys
from pathlib import Path

import phiquant as pq
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def launch(*command):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_qat_trainer(tmp_path):
    small = ["--steps", "4", "--save-steps", "2", "--batch", "2", "--window", "64", "--windows", "1"]
    said = launch(EXAMPLES / "qat_trainer.py", "--out", tmp_path, *small)
    assert "rounded: KL to float" in said
    assert "trained: KL to float" in said
    assert pq.verify(tmp_path).ok
    tensors = json.loads((tmp_path / "receipt.json").read_text())["tensors"]
    assert {"solver": "qat", "range": "mse", "steps": 4} in [tensor.get("origin") for tensor in tensors]


@pytest.mark.slow
def test_qat_fsdp(tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", EXAMPLES / "qat_fsdp.py"]
    small = ["--steps", "4", "--save-steps", "2", "--batch", "4", "--window", "64"]
    launch(*torchrun, *small, "--out", tmp_path / "whole")
    launch(*torchrun, *small, "--out", tmp_path / "broken", "--stop", "2")
    assert not (tmp_path / "broken/receipt.json").exists()
    launch(*torchrun, *small, "--out", tmp_path / "broken")
    assert pq.verify(tmp_path / "broken").ok
    whole, broken = (next((tmp_path / name).glob("*.gguf")).read_bytes() for name in ("whole", "broken"))
    assert whole == broken
