"""same_codes(): from the files alone, across formats; a changed code, scale or float is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import phiquant as pq
import pytest
import torch
from phiquant import PhiquantError

DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture
def two(tiny_model: Any, tokenizer: Any, tmp_path: Path) -> tuple[Path, Path]:
    pq.quantize(tiny_model, "gguf:Q4_0", solver="mse")
    for format in ("gguf", "safetensors"):
        pq.export(tiny_model, tokenizer, tmp_path / format, format=format)
        (tmp_path / format / "receipt.json").unlink()
    return tmp_path / "gguf", tmp_path / "safetensors"


def changed(model: Any, tokenizer: Any, out: Path, **parts: Any) -> Path:
    module = model.get_submodule(DOWN)
    for name, change in parts.items():
        buffer = getattr(module.weight_quantizer, name)
        buffer[change[0]] = change[1](buffer[change[0]])
    module.weight.data.copy_(module.quantized.dequantize())
    pq.export(model, tokenizer, out, format="safetensors")
    return out


def test_two_formats_hold_the_same_codes(two: tuple[Path, Path]) -> None:
    for a, b in (two, two[::-1], (two[0], two[0])):
        found = pq.same_codes(a, b)
        assert found.ok
        assert {t.verdict for t in found.tensors} == {"identical"}
    assert found.to_dict()["ok"] is True
    assert "21 of 21 tensors are identical in gguf and gguf" in str(found)


@pytest.mark.parametrize(
    ("parts", "verdict"),
    [
        ({"codes": ((100, 7), lambda code: code ^ 1)}, "different"),
        ({"scales": ((100, 0), lambda scale: scale * 2)}, "same codes, other parameters"),
    ],
)
def test_a_changed_code_or_scale_is_named(
    two: tuple[Path, Path], tiny_model: Any, tokenizer: Any, tmp_path: Path, parts: Any, verdict: str
) -> None:
    pq.quantize(tiny_model, "gguf:Q4_0", solver="mse") if not hasattr(
        tiny_model.get_submodule(DOWN), "weight_quantizer"
    ) else None
    other = changed(tiny_model, tokenizer, tmp_path / "changed", **parts)
    found = pq.same_codes(two[0], other)
    assert [(t.name, t.verdict) for t in found.tensors if t.verdict != "identical"] == [(f"{DOWN}.weight", verdict)]
    assert f"{DOWN}.weight: {verdict} (Q4_0," in str(found)


def test_a_changed_float_is_named(two: tuple[Path, Path], tiny_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    with torch.no_grad():
        tiny_model.model.norm.weight[5] += 0.5
    pq.export(tiny_model, tokenizer, tmp_path / "changed", format="safetensors")
    bad = [t for t in pq.same_codes(two[0], tmp_path / "changed").tensors if t.verdict != "identical"]
    assert [(t.name, t.verdict, t.reason) for t in bad] == [("model.norm.weight", "different", "other values")]


def test_floats_are_not_codes(two: tuple[Path, Path], make_phi3: Any, tokenizer: Any, tmp_path: Path) -> None:
    pq.export(make_phi3(), tokenizer, tmp_path / "float", format="safetensors")
    bad = [t for t in pq.same_codes(two[0], tmp_path / "float").tensors if t.verdict != "identical"]
    assert len(bad) == 14  # all linears of the layers, fused ones by their parts
    assert {t.reason for t in bad} == {"one file has codes, the other floats"}


def test_another_model_differs_everywhere(
    two: tuple[Path, Path], make_phi3: Any, tokenizer: Any, tmp_path: Path
) -> None:
    pq.export(make_phi3(num_hidden_layers=1), tokenizer, tmp_path / "small", format="safetensors")
    found = pq.same_codes(two[0], tmp_path / "small")
    reasons = {t.name: t.reason for t in found.tensors}
    assert reasons["model.layers.1.mlp.down_proj.weight"] == "the second file does not have it"


def test_what_is_no_model(two: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(PhiquantError, match="is no model in a format that phiquant reads"):
        pq.same_codes(two[0], tmp_path)
