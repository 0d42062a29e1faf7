"""Calibrated runs over a model: what each solver saw, resumption, activations on disk, tied weights, errors."""

from __future__ import annotations

import copy
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import phiquant as pq
import pytest
import torch
from phiquant import PhiquantError
from phiquant.calibrate import token_windows
from phiquant.modules import QuantizedEmbedding, QuantizedLinear
from phiquant.statistics import Statistics

SPEC = "int3-g32-sym"


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 4096, (14, 40), generator=torch.Generator().manual_seed(0))


def digests(model: Any) -> dict[str, str]:
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear | QuantizedEmbedding)}
    return {name: layer.quantized.digests()["codes"] for name, layer in layers.items()}


@torch.no_grad()
def distance(model: Any, reference: Any, ids: torch.Tensor) -> float:
    return (model(ids).logits - reference(ids).logits).square().mean().item()


def test_output_of_the_model_is_nearer_than_with_rtn(tiny_model: Any, ids: torch.Tensor) -> None:
    rtn, gptq = (
        pq.quantize(copy.deepcopy(tiny_model), SPEC, solver, **data)
        for solver, data in (("rtn", {}), ("gptq", {"calibration": ids}))
    )
    assert distance(gptq, tiny_model, ids) < 0.8 * distance(rtn, tiny_model, ids)
    assert set(digests(gptq)) == set(digests(rtn))


@torch.no_grad()
def test_each_linear_was_solved_on_the_inputs_it_gets_in_the_quantized_model(
    tiny_model: Any, ids: torch.Tensor
) -> None:
    float_model = copy.deepcopy(tiny_model)
    model = pq.quantize(tiny_model, pq.Recipe({"lm_head": SPEC}, SPEC), "gptq", calibration=ids)
    seen = {n: Statistics(m.in_features) for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    assert len(seen) == 9
    for name, statistics in seen.items():
        model.get_submodule(name).register_forward_pre_hook(lambda m, x, s=statistics: s.update(x[0]))
    for start in range(0, 14, 8):
        model(ids[start : start + 8], use_cache=False)
    for name, statistics in seen.items():
        weight = float_model.get_submodule(name).weight
        expected = pq.quantize_tensor(weight, SPEC, "gptq", statistics=statistics)
        codes = model.get_submodule(name).quantized.codes
        assert (codes != expected.codes).float().mean() < 0.002, name


def test_a_log_line_per_linear(tiny_model: Any, ids: torch.Tensor, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "phiquant"):
        pq.quantize(tiny_model, SPEC, "gptq", calibration=ids)
    said = [r.getMessage() for r in caplog.records if "output error" in r.getMessage()]
    whole = [line for line in said if "tokens" not in line]
    lines = [line for line in said if "tokens" in line]
    assert len(lines) == 8
    assert [line.split(":")[0] for line in whole] == ["model.layers.0", "model.layers.1"]
    assert said.index(whole[0]) == 4
    assert lines[3].startswith("model.layers.0.mlp.down_proj: output error")
    assert "560 tokens" in lines[3]
    for line in lines + whole:
        before, after = (float(part.split()[0]) for part in line.split("output error ")[1].split(", ")[:2])
        assert after < 0.9 * before  # the first layer's inputs, random embeddings, hardly correlate


class _Interrupt(Exception):
    pass


def stop_at(name: str) -> Callable[[str, int, int], None]:
    def progress(at: str, done: int, total: int) -> None:
        if at == name:
            raise _Interrupt

    return progress


def test_an_interrupted_run_goes_on_to_the_same_codes(tiny_model: Any, ids: torch.Tensor, tmp_path: Path) -> None:
    recipe = pq.Recipe({"lm_head": SPEC, "*embed_tokens": SPEC}, SPEC)
    before = copy.deepcopy(tiny_model.state_dict())
    whole = digests(pq.quantize(copy.deepcopy(tiny_model), recipe, "gptq", calibration=ids))
    for at in ("model.layers.0.self_attn.o_proj", "model.layers.1.mlp.down_proj", "lm_head"):
        with pytest.raises(_Interrupt):
            pq.quantize(tiny_model, recipe, "gptq", calibration=ids, folder=tmp_path, progress=stop_at(at))
        assert all(torch.equal(value, before[name]) for name, value in tiny_model.state_dict().items())
    solved = sorted(p.name.removesuffix(".safetensors") for p in tmp_path.iterdir())
    assert solved == sorted(set(whole) - {"lm_head"})
    steps = []
    pq.quantize(tiny_model, recipe, "gptq", calibration=ids, folder=tmp_path, progress=lambda *step: steps.append(step))
    assert digests(tiny_model) == whole
    assert len(whole) == 10
    assert steps[0] == ("model.embed_tokens", 0, 10)
    assert steps[-1] == ("done", 10, 10)


@pytest.mark.slow
def test_a_killed_process_leaves_what_a_second_one_needs(tiny_model: Any, ids: torch.Tensor, tmp_path: Path) -> None:
    """SIGKILL in the middle of layer 1; the codes are then those of a run without interruption."""
    program = (
        "import os, signal, sys, torch, phiquant as pq\n"
        "from phiquant.testing import random_phi3\n"
        "ids = torch.randint(0, 4096, (14, 40), generator=torch.Generator().manual_seed(0))\n"
        "def kill(name, done, total):\n"
        "    if name == 'model.layers.1.mlp.gate_up_proj': os.kill(os.getpid(), signal.SIGKILL)\n"
        f"pq.quantize(random_phi3(), {SPEC!r}, 'gptq', kill, calibration=ids, folder=sys.argv[1])\n"
    )
    result = subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    assert result.returncode == -9
    assert (tmp_path / "model.layers.1.self_attn.o_proj.safetensors").exists()
    whole = digests(pq.quantize(copy.deepcopy(tiny_model), SPEC, "gptq", calibration=ids))
    assert digests(pq.quantize(tiny_model, SPEC, "gptq", calibration=ids, folder=tmp_path)) == whole


def test_another_run_does_not_go_on_with_this_ones_layers(tiny_model: Any, ids: torch.Tensor, tmp_path: Path) -> None:
    pq.quantize(copy.deepcopy(tiny_model), SPEC, "gptq", calibration=ids, folder=tmp_path)
    for spec, solver, data in (("int4-g32-sym", "gptq", ids), (SPEC, "gptq_mse", ids), (SPEC, "gptq", ids[:-1])):
        with pytest.raises(PhiquantError, match="belongs to a run with another solver"):
            pq.quantize(tiny_model, spec, solver, calibration=data, folder=tmp_path)
    (tmp_path / "model.layers.0.mlp.down_proj.safetensors").write_bytes(b"damaged")
    with pytest.raises(PhiquantError, match="is damaged"):
        pq.quantize(tiny_model, SPEC, "gptq", calibration=ids, folder=tmp_path)


@pytest.mark.parametrize("text", ["uint4-g32-min-f16", "uint4-g32-asym", "nf4-g64-sym", "codebook16-tensor"])
def test_every_kind_of_parameter_is_kept(tiny_model: Any, ids: torch.Tensor, tmp_path: Path, text: str) -> None:
    first = pq.quantize(copy.deepcopy(tiny_model), text, "gptq", calibration=ids, folder=tmp_path)
    again = pq.quantize(tiny_model, text, "gptq", calibration=ids, folder=tmp_path)
    name = "model.layers.1.mlp.down_proj"
    assert first.get_submodule(name).quantized.digests() == again.get_submodule(name).quantized.digests()


def test_activations_on_disk_give_the_same_codes(tiny_model: Any, ids: torch.Tensor, tmp_path: Path) -> None:
    memory = pq.quantize(copy.deepcopy(tiny_model), SPEC, "gptq", calibration=ids)
    disk = pq.quantize(copy.deepcopy(tiny_model), SPEC, "gptq", calibration=ids, folder=tmp_path, offload=True)
    assert digests(memory) == digests(disk)
    assert not (tmp_path / "activations.bin").exists()
    with pytest.raises(PhiquantError, match="give folder="):
        pq.quantize(tiny_model, SPEC, "gptq", calibration=ids, offload=True)


def test_a_solver_that_follows_the_float_model_sees_both(
    tiny_model: Any, ids: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gptq_refine is told how inputs drifted from the float model's; stopped, with activations on disk: the same."""
    told: dict[str, Any] = {}

    def solve(w: torch.Tensor, spec: Any, solver: str, name: str, *rest: Any) -> Any:
        told.update({name: rest[-1]} if rest else {})
        return pq.quantize_tensor(w, spec, solver, name, *rest)

    recipe = pq.Recipe({"lm_head": SPEC, "*embed_tokens": SPEC}, SPEC)
    monkeypatch.setattr("phiquant.calibrate.quantize_tensor", solve)
    model = pq.quantize(copy.deepcopy(tiny_model), recipe, "gptq_refine", calibration=ids)
    whole, name = digests(model), "model.layers.1.mlp.down_proj"
    seen = told[f"{name}.weight"]
    caught: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    for which, one in ((True, tiny_model), (False, model)):
        one.get_submodule(name).register_forward_pre_hook(lambda _, x, at=which: caught[at].append(x[0].flatten(0, 1)))
        one(ids, use_cache=False)
    exact, x = (torch.cat(caught[which]).detach().double() for which in (True, False))
    drift = (exact - x).T @ x
    assert (seen.drift - drift).abs().max() < 1e-3 * drift.abs().max()
    assert told["lm_head.weight"].drift is not None
    with pytest.raises(_Interrupt):
        pq.quantize(tiny_model, recipe, "gptq_refine", stop_at(name), calibration=ids, folder=tmp_path, offload=True)
    assert len(list(tmp_path.glob("beside-*.bin"))) == 1
    pq.quantize(tiny_model, recipe, "gptq_refine", calibration=ids, folder=tmp_path, offload=True)
    assert digests(tiny_model) == whole
    assert not list(tmp_path.glob("*.bin"))


@torch.no_grad()
def test_a_tied_embedding_and_head_share_codes_weighed_by_the_heads_inputs(
    make_phi3: Callable[..., Any], ids: torch.Tensor
) -> None:
    model = make_phi3(tie_word_embeddings=True)
    seen = Statistics(128)
    hook = model.lm_head.register_forward_pre_hook(lambda m, x: seen.update(x[0]))
    for start in range(0, 14, 8):
        model(ids[start : start + 8])
    hook.remove()
    diagonal = seen.moments.diagonal()
    diagonal += 0.3 * diagonal.mean()  # its errors also go in, where all directions count alike
    expected = pq.quantize_tensor(model.lm_head.weight, SPEC, "gptq", statistics=seen)
    nearest = pq.quantize_tensor(model.lm_head.weight, SPEC)
    pq.quantize(model, pq.Recipe({"lm_head": SPEC, "*embed_tokens": SPEC}, SPEC), "gptq", calibration=ids)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    codes = model.lm_head.quantized.codes
    assert torch.equal(codes, model.model.embed_tokens.quantized.codes)
    assert (codes != expected.codes).float().mean() < 0.002 < (codes != nearest.codes).float().mean()


def test_a_bfloat16_model_and_codes_that_go_into_a_file(
    tiny_model: Any, ids: torch.Tensor, tokenizer: Any, tmp_path: Path
) -> None:
    model = pq.quantize(tiny_model.bfloat16(), "gguf:Q4_0", "gptq", calibration=ids)
    pq.export(model, tokenizer, tmp_path, format="gguf")
    assert pq.verify(tmp_path).ok
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_kmeans_weighs_values_by_the_inputs(tiny_model: Any, ids: torch.Tensor) -> None:
    plain = pq.quantize(copy.deepcopy(tiny_model), "codebook8-row", "kmeans")
    weighted = pq.quantize(copy.deepcopy(tiny_model), "codebook8-row", "kmeans", calibration=ids)
    assert digests(plain) != digests(weighted)
    assert distance(weighted, tiny_model, ids) < distance(plain, tiny_model, ids)


def test_token_windows(tokenizer: Any, short_text: str) -> None:
    windows = token_windows([short_text * 4, "x = 1\n"], tokenizer)
    assert windows.shape[1] == 512
    assert torch.equal(token_windows(windows), windows)
    assert torch.equal(token_windows(windows.tolist()), windows)
    assert torch.equal(token_windows(short_text * 4 + "<|endoftext|>" + "x = 1\n", tokenizer), windows)
    default = token_windows(None, tokenizer)
    assert default.shape == (64, 512)
    with pytest.raises(PhiquantError, match="need the model's tokenizer"):
        token_windows(short_text)
    for wrong in ([], [[1, 2], [3]], [[]]):
        with pytest.raises(PhiquantError, match="windows of one length"):
            token_windows(wrong)


def test_errors_leave_the_model_as_it_was(tiny_model: Any, ids: torch.Tensor) -> None:
    with pytest.raises(PhiquantError, match=r"Sequential has no model\.layers"):
        pq.quantize(torch.nn.Sequential(torch.nn.Linear(64, 64)), SPEC, "gptq", calibration=ids)
    tiny_model.model.layers[1].mlp.down_proj.weight.data[3, 5] = float("nan")
    with pytest.raises(PhiquantError, match=r"layers.1.mlp.down_proj.weight holds 1 value\(s\) .* \[3, 5\]"):
        pq.quantize(tiny_model, SPEC, "gptq", calibration=ids)
    assert not digests(tiny_model)
