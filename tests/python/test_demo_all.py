"""`demo --all`: a row for each format, figures that hang together, reasons where there are none."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import phiquant as pq
import pytest
from phiquant import PhiquantError
from phiquant.cli import demo_all
from phiquant.cli.session import Ui
from phiquant.formats.registry import FORMATS


@pytest.fixture
def ui() -> Ui:
    return Ui(json_output=True, debug=False)


def only(monkeypatch: pytest.MonkeyPatch, formats: Mapping[str, Any]) -> None:
    monkeypatch.setattr(demo_all, "FORMATS", formats)


def test_one_set_of_codes_in_two_formats(
    phi3_tiny: tuple[Any, Any], tmp_path: Path, ui: Ui, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = phi3_tiny
    pq.quantize(model, "gguf:Q4_0", solver="mse")
    only(monkeypatch, {name: FORMATS[name] for name in ("gguf", "safetensors")})
    measured = demo_all.in_torch(model, tokenizer, 1)
    rows = list(demo_all.rows(ui, model, tokenizer, tmp_path, measured))
    assert [row.reason for row in rows] == ["", ""]
    assert all(row.verified and row.same_codes and row.same_floats for row in rows)
    assert [row.bits_per_weight for row in rows] == [4.5, 4.5]
    for row, error in zip(rows, (2e-2, 1e-6), strict=True):
        assert row.relative_error <= error
        assert row.perplexity == pytest.approx(measured.perplexity, rel=5e-3)
    assert rows[1].same_tokens
    assert abs(rows[1].perplexity_change_default) < 1e-5
    assert rows[1].same_top == 1
    report = demo_all.report(rows, measured, 1.0)
    assert json.loads(json.dumps(report))["ok"] is True
    table, *lines = demo_all.show(rows, measured, 1.0)
    assert table.row_count == 2
    assert f"{measured.perplexity:.4f}" in lines[0]


def test_what_is_missing_or_fails_is_told(
    phi3_tiny: tuple[Any, Any], tmp_path: Path, ui: Ui, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = phi3_tiny
    measured = demo_all.Measured([[1, 2]], [], 1.0, [])

    def refuse(*_: Any, **__: Any) -> None:
        raise PhiquantError("it does not hold this grid\nsecond line")

    only(monkeypatch, {name: FORMATS[name] for name in ("gguf", "safetensors")})
    monkeypatch.setattr(demo_all, "missing", lambda extra: ["gguf", "xllamacpp"] if extra == "gguf" else [])
    monkeypatch.setattr(demo_all, "export", refuse)
    rows = list(demo_all.rows(ui, model, tokenizer, tmp_path, measured))
    assert [row.reason for row in rows] == [
        "gguf, xllamacpp not installed: pip install 'phiquant[gguf]'",
        "it does not hold this grid",
    ]
    _, *lines = demo_all.show(rows, measured, 1.0)
    assert lines[0] == r"gguf: gguf, xllamacpp not installed: pip install 'phiquant\[gguf]'"


def test_another_codes_are_no_success() -> None:
    row = demo_all.Row("gguf", "llama.cpp", verified=True, same_codes=False)
    assert demo_all.report([row], demo_all.Measured([], [], 1.0, []), 1.0)["ok"] is False
