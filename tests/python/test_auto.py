"""auto: what it measures, what it chooses, that its codes are those of the chosen one, how it goes on after a kill."""

from __future__ import annotations

import copy
import logging
import math
from pathlib import Path
from typing import Any

import phiquant as pq
import pytest
import torch
from phiquant import PhiquantError
from phiquant.auto import CANDIDATES, candidates, divergence
from phiquant.modules import QuantizedLinear

SPEC = "int3-g32-sym"
FEW = "auto:rtn,gptq_mse,awq+clip"


@pytest.fixture
def model(make_phi3: Any) -> Any:
    return make_phi3(num_hidden_layers=1)


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 4096, (16, 40), generator=torch.Generator().manual_seed(0))


def digests(model: Any) -> dict[str, dict[str, str]]:
    return {n: m.quantized.digests() for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}


def told(model: Any) -> dict[str, Any]:
    return next(m for m in model.modules() if isinstance(m, QuantizedLinear)).weight_quantizer.origin["auto"]


def test_the_least_divergence_on_windows_that_were_set_aside(model: Any, ids: torch.Tensor) -> None:
    expected = {}
    for name, solver, options in (
        ("rtn", "rtn", {}),
        ("gptq_mse", "gptq_mse", {"calibration": ids[:12]}),
        ("awq+clip", "awq", {"calibration": ids[:12]}),
    ):
        one = pq.quantize(copy.deepcopy(model), SPEC, solver, **options)
        rows = [[*row, 0] for row in ids[12:].tolist()]  # the last position is not scored
        logits = (pq.evaluate.model_logits(m, rows) for m in (one, model))
        expected[name] = pq.evaluate.compare_logits(rows, *logits).kl
    best = min(expected, key=lambda name: expected[name])
    solver = {"awq+clip": "awq"}.get(best, best)
    single = pq.quantize(copy.deepcopy(model), SPEC, solver, **({} if best == "rtn" else {"calibration": ids}))
    pq.quantize(model, SPEC, FEW, calibration=ids)
    found = told(model)
    assert found["chosen"] == best
    assert found["held_tokens"] == 160
    assert found["kl"] == pytest.approx(expected, rel=1e-3)
    assert digests(model) == digests(single)


def test_divergence_is_that_of_the_distributions(model: Any, ids: torch.Tensor) -> None:
    other = pq.quantize(copy.deepcopy(model), SPEC)
    with torch.no_grad():
        q, p = (m(ids[:2]).logits.double().log_softmax(-1) for m in (other, model))
    expected = (p.exp() * (p - q)).sum(-1).flatten()
    torch.testing.assert_close(divergence(other, model, ids[:2]), expected, rtol=1e-3, atol=1e-6)


class _Interrupt(Exception):
    pass


def test_a_killed_run_goes_on_to_the_same_choice(model: Any, ids: torch.Tensor, tmp_path: Path) -> None:
    whole = pq.quantize(copy.deepcopy(model), SPEC, FEW, calibration=ids)
    calls: list[str] = []

    def stop(name: str, done: int, total: int) -> None:
        calls.append(name)
        if len(calls) == 8:  # after rtn's five, inside gptq_mse
            raise _Interrupt

    with pytest.raises(_Interrupt):
        pq.quantize(copy.deepcopy(model), SPEC, FEW, stop, calibration=ids, folder=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gptq_mse", "rtn.kl"]
    again = copy.deepcopy(model)
    steps: list[str] = []
    pq.quantize(again, SPEC, FEW, lambda name, *_: steps.append(name), calibration=ids, folder=tmp_path)
    assert steps.count("done") == 3  # rtn was not tried again; the chosen one was solved twice
    assert told(again) == told(whole)
    assert digests(again) == digests(whole)
    for spec, data in (("int4-g32-sym", ids), (SPEC, ids[:-1])):
        with pytest.raises(PhiquantError, match="belongs to a run with another text"):
            pq.quantize(copy.deepcopy(model), spec, FEW, calibration=data, folder=tmp_path)


def test_a_candidate_that_does_not_apply_is_left_out(
    model: Any, ids: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "phiquant"):
        pq.quantize(copy.deepcopy(model), SPEC, "auto:kmeans,rtn", calibration=ids)
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("auto: ")]
    assert lines[0].startswith("auto: kmeans does not apply: kmeans chooses codebooks")
    assert lines[1].startswith("auto: rtn has KL ")
    with pytest.raises(PhiquantError, match="found no candidate for this model; kmeans: kmeans chooses codebooks"):
        pq.quantize(copy.deepcopy(model), SPEC, "auto:kmeans", calibration=ids)
    pq.quantize(model, "codebook8-row", "auto:kmeans,rtn", calibration=ids)
    assert told(model)["chosen"] == "kmeans"


def test_candidates_and_errors(model: Any, ids: torch.Tensor) -> None:
    names = [candidate.name for candidate in CANDIDATES]
    assert len(set(names)) == len(names)
    assert {"rtn", "mse", "gptq", "adaround", "awq+gptq"} <= {candidate.name for candidate in candidates("auto", model)}
    large = torch.nn.Module()
    large.add_module("layers", torch.nn.ModuleList([torch.nn.Linear(8192, 8192, device="meta")]))
    large = torch.nn.Sequential(large)
    assert "adaround" not in {candidate.name for candidate in candidates("auto", large)}
    with pytest.raises(PhiquantError, match=r"knows no candidate 'awk'; it knows: rtn, "):
        pq.quantize(model, SPEC, "auto:awk", calibration=ids)
    with pytest.raises(PhiquantError, match="at least 2 windows"):
        pq.quantize(model, SPEC, "auto", calibration=ids[:1])
    assert not digests(model)
    assert math.isfinite(float(divergence(model, model, ids[:1]).sum()))
