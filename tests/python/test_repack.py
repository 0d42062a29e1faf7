"""Codes move between formats and back byte for byte; what would have to change is refused and named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import phiquant as pq
import pytest
import torch
from phiquant import PhiquantError
from phiquant.formats.detect import detect
from phiquant.formats.registry import FORMATS
from phiquant.reader_source import ReaderSource

DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def model(tiny_model: Any) -> Any:
    """In bfloat16 values, norms that are not all ones, a row of zeros."""
    with torch.no_grad():
        for parameter in tiny_model.parameters():
            parameter += 0.01 * torch.arange(parameter.numel()).reshape(parameter.shape).sin()
            parameter.copy_(parameter.bfloat16())
        tiny_model.get_parameter(DOWN)[3] = 0
    return tiny_model


def export(model: Any, tokenizer: Any, grid: Any, out: Path, format: str) -> Path:
    pq.quantize(model, grid, solver="mse")
    pq.export(model, tokenizer, out, format=format)
    return out


def weights(out: Path) -> dict[str, bytes]:
    found = detect(out)
    assert found is not None
    return {path.name: path.read_bytes() for pattern in found.format.weights for path in out.glob(pattern)}


TRIPS = [
    ("gguf:Q4_0", "safetensors:int4-g32"),
    ("gguf:Q4_0", "gguf:Q4_1"),
    ("gguf:Q4_0", "gguf:Q8_0"),
    ("gguf:Q4_0", "safetensors"),
    ("safetensors:int4-g32", "gguf:Q4_0"),
    ("safetensors:int4-g64", "gguf:Q4_0"),
    ("int3-g32-signmax-f16", "safetensors:int4-g32"),
    ("gguf:F16", "safetensors:F16"),
    ("gguf:BF16", "safetensors"),
    ("gguf:Q4_0", "onnx:int4-g32"),
    ("gguf:Q4_0", "openvino:i4-g32"),
    ("gguf:Q4_0", "mlx:4bit-g32"),
    ("gguf:MXFP4", "mlx:mxfp4"),
    ("onnx:uint4-g32", "openvino:u4-g32"),
    ("mlx:4bit-g32", "gguf:Q4_1"),
]


@pytest.mark.parametrize(("source", "target"), TRIPS)
def test_there_and_back_is_byte_for_byte(model: Any, tokenizer: Any, tmp_path: Path, source: str, target: str) -> None:
    format = source.partition(":")[0] if ":" in source else "gguf"
    if source.endswith("F16"):
        options = {"float_dtype": "float16"} if source == "gguf:F16" else {}
        pq.export(model.half().float() if options else model, tokenizer, tmp_path / "a", format=format, **options)
        a = tmp_path / "a"
    else:
        a = export(model, tokenizer, source, tmp_path / "a", format)
    receipt = pq.repack(a, target, tmp_path / "b")
    assert receipt["verified"]["tensors"] == 15
    assert pq.verify(tmp_path / "b").ok
    compared = pq.same_codes(a, tmp_path / "b")
    assert compared.ok, compared
    assert len(compared.tensors) == 21  # q, k, v, gate and up by themselves
    pq.repack(tmp_path / "b", source if ":" in source else "gguf:Q4_0", tmp_path / "c")
    assert weights(tmp_path / "c") == weights(a)


def test_a_format_alone_suits_each_tensor(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    recipe = pq.Recipe({"*lm_head": "gguf:Q8_0", "*.0.mlp.down_proj": "float"}, default="gguf:Q4_0")
    a = export(model, tokenizer, recipe, tmp_path / "a", "gguf")
    with pytest.raises(PhiquantError, match=r"lm_head\.weight: .*range of codes.*give 'gguf' alone"):
        pq.repack(a, "gguf:Q4_1", tmp_path / "b")
    assert not (tmp_path / "b").exists()
    pq.repack(a, "gguf", tmp_path / "b")
    assert weights(tmp_path / "b") == weights(a)


def test_the_receipt_keeps_how_codes_were_stated(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    a = export(model, tokenizer, "int3-g32-signmax-f16", tmp_path / "a", "gguf")
    assert pq.repack(a, "safetensors", tmp_path / "b")["specs"] == ["int3-g32-signmax-f16"]
    assert pq.repack(a, "safetensors:int4-g32", tmp_path / "c")["specs"] == ["int4-g32-signmax-f16"]
    (a / "receipt.json").unlink()  # then the file alone speaks
    assert pq.repack(a / "model.gguf", "safetensors", tmp_path / "d")["specs"] == ["int4-g32-signmax-f16"]


REFUSED = [
    ("gguf:Q4_0", "safetensors:int4-g64", "granularity: scales differ"),
    ("gguf:Q8_0", "safetensors:int4-g32", "range of codes"),
    ("gguf:Q4_1", "safetensors:int4-g32", "minimums"),
    ("gguf:Q4_1", "safetensors", "no target of safetensors holds uint4-g32-min-f16 as it is"),
    ("gguf:Q4_0", "safetensors:BF16", "stores floats; give a target with codes"),
    ("safetensors:int8-channel", "gguf:Q8_0", "scale dtype: one of its scales, .* is no float16"),
]


@pytest.mark.parametrize(("source", "target", "reason"), REFUSED)
def test_what_would_have_to_change_is_named(
    model: Any, tokenizer: Any, tmp_path: Path, source: str, target: str, reason: str
) -> None:
    a = export(model, tokenizer, source, tmp_path / "a", source.partition(":")[0])
    with pytest.raises(PhiquantError, match=rf"layers\.0\.self_attn\..*{reason}"):
        pq.repack(a, target, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_writer_that_would_round_floats_gets_them_wider(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    """MLX stores 16-bit floats in the type of the scales, float16, which holds no small bfloat16."""
    model.lm_head.weight.data[0] = 2.0**-40
    a = export(model, tokenizer, "gguf:Q4_0", tmp_path / "a", "gguf")
    receipt = pq.repack(a, "mlx:4bit-g32", tmp_path / "b")
    dtypes = {record["name"]: record["dtype"] for record in receipt["tensors"] if "dtype" in record}
    assert dtypes["lm_head.weight"] == "float32"
    assert dtypes["model.norm.weight"] == "float16"
    assert pq.same_codes(a, tmp_path / "b").ok


def test_floats_are_never_rounded(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    pq.export(model, tokenizer, tmp_path / "a", format="safetensors")
    with pytest.raises(PhiquantError, match="has values that are no float16; convert never rounds: choose bfloat16"):
        pq.repack(tmp_path / "a", "gguf:F16", tmp_path / "b")


def test_other_refusals(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    a = export(model, tokenizer, "gguf:Q4_0", tmp_path / "a", "gguf")
    with pytest.raises(PhiquantError, match="is the model itself"):
        pq.repack(a, "gguf:Q4_0", a)
    with pytest.raises(PhiquantError, match="is no model in a format that phiquant reads"):
        pq.repack(tmp_path, "gguf:Q4_0", tmp_path / "b")
    with pytest.raises(ValueError, match="unknown target 'gguf:Q9'"):
        pq.repack(a, "gguf:Q9", tmp_path / "b")
    with pytest.raises(PhiquantError, match="gguf:Q4_K_M chooses a grid for each layer, and the codes have theirs"):
        pq.repack(a, "gguf:Q4_K_M", tmp_path / "b")
    with pytest.raises(PhiquantError, match="unknown format 'pdf'"):
        pq.repack(a, "pdf", tmp_path / "b")
    (tmp_path / "two").mkdir()
    for name in "xy":
        (tmp_path / "two" / f"{name}.gguf").write_bytes((a / "model.gguf").read_bytes())
    with pytest.raises(PhiquantError, match=r"holds several models \(x\.gguf, y\.gguf\)"):
        pq.repack(tmp_path / "two", "safetensors", tmp_path / "b")


def test_a_vocabulary_that_does_not_say_all_is_asked_for(
    model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = export(model, tokenizer, "gguf:Q4_0", tmp_path / "a", "gguf")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    from phiquant.formats.gguf import tokenizer_files as gguf_tokenizer_files

    monkeypatch.setattr(gguf_tokenizer_files, "PATTERNS", {})
    with pytest.raises(PhiquantError, match="--tokenizer DIR"):
        pq.repack(a, "safetensors", tmp_path / "b")
    pq.repack(a, "safetensors", tmp_path / "b", tokenizer=tmp_path / "tokenizer")
    copied = json.loads((tmp_path / "b" / "tokenizer.json").read_text())
    assert copied == json.loads((tmp_path / "tokenizer" / "tokenizer.json").read_text())


def test_memory_is_that_of_some_rows(model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """A large tensor comes in pieces; pieces and the whole hold the same codes."""
    from phiquant.formats import source as sources

    a = export(model, tokenizer, "gguf:Q4_0", tmp_path / "a", "gguf")
    monkeypatch.setattr(sources, "CHUNK_BYTES", 1 << 14)
    found = detect(a)
    assert found is not None
    source = ReaderSource(found, FORMATS["safetensors"], None)
    entry = next(entry for entry in source.entries if entry.name == DOWN)
    pieces = [source.read(entry, rows) for rows in sources.row_slices(entry)]
    assert len(pieces) > 4
    assert torch.equal(torch.cat([p.codes for p in pieces]), source.read(entry).codes)
