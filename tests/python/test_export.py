"""export() and verify(): the codes of the model are in the file, and a changed byte is found and named."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import phiquant as pq
import pytest
import torch
from phiquant import PhiquantError
from phiquant.formats.registry import find
from phiquant.formats.safetensors import folder as safetensors_folder
from phiquant.model_source import ModelSource

TARGETS = {"gguf": "gguf:Q4_0", "safetensors": "safetensors:int4-g32"}
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(params=TARGETS)
def format_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def exported(tiny_model: Any, tokenizer: Any, tmp_path: Path, format_name: str) -> Path:
    pq.quantize(tiny_model, TARGETS[format_name])
    pq.export(tiny_model, tokenizer, tmp_path / "out", format=format_name)
    return tmp_path / "out"


def weights(out: Path) -> Path:
    return max(out.iterdir(), key=lambda path: path.stat().st_size)


def flip(path: Path, at: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def regions(out: Path) -> dict[str, int]:
    """A byte in the middle of every tensor, by the name that the receipt knows it by."""
    path = weights(out)
    if path.suffix == ".gguf":
        import gguf
        from phiquant.formats.gguf.hf_names import hf_name

        return {hf_name(t.name): int(t.data_offset + t.n_bytes // 2) for t in gguf.GGUFReader(path).tensors}
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    table = json.loads(raw[8 : 8 + length])
    table.pop("__metadata__")
    offsets = {name: 8 + length + sum(v["data_offsets"]) // 2 for name, v in table.items()}
    return {name.removesuffix("_packed"): at for name, at in offsets.items() if not name.endswith(("_scale", "_shape"))}


def test_an_export_is_verified_and_leaves_nothing_beside_it(exported: Path, format_name: str) -> None:
    report = pq.verify(exported)
    assert report.ok
    assert report.format == format_name
    assert all(t.ok for t in report.tensors)
    receipt = json.loads((exported / "receipt.json").read_text())
    assert receipt["verified"]["tensors"] == len(report.tensors) == 15
    assert set(receipt["files"]) == {path.name for path in exported.iterdir()} - {"receipt.json"}
    assert TARGETS[format_name] in receipt["targets"]
    assert report.to_dict()["ok"] is True


def test_a_changed_byte_is_found_and_its_tensor_named(exported: Path) -> None:
    for name, at in regions(exported).items():
        flip(weights(exported), at)
        report = pq.verify(exported)
        assert not report.ok
        assert [t.name for t in report.tensors if not t.ok] == [name]
        assert name in str(report)
        flip(weights(exported), at)
    assert pq.verify(exported).ok


def test_a_changed_header_or_small_file_is_found(exported: Path, format_name: str) -> None:
    at = weights(exported).read_bytes().find(b"Phi3" if format_name == "gguf" else b'"pt"') + 1
    at = at or weights(exported).read_bytes().find(b"general.name") + 20
    flip(weights(exported), at)
    assert f"{weights(exported).name}: its header is not what the receipt says" in pq.verify(exported).files
    flip(weights(exported), at)
    if format_name == "safetensors":
        (exported / "generation_config.json").write_text("{}")
        assert pq.verify(exported).files == ["generation_config.json: its size is not what the receipt says"]


def test_a_truncated_file_is_a_report_and_no_crash(exported: Path) -> None:
    path = weights(exported)
    path.write_bytes(path.read_bytes()[:-5000])
    report = pq.verify(exported)
    assert not report.ok
    assert not any(t.ok for t in report.tensors)


def test_a_receipt_that_was_changed_is_found(exported: Path) -> None:
    path = exported / "receipt.json"
    receipt = json.loads(path.read_text())
    record = next(t for t in receipt["tensors"] if t["name"] == DOWN)
    for key, value in (("codes", "0" * 64), ("parameters", "0" * 64), ("spec", "int3-g32-sym"), ("spec", "nonsense")):
        saved, record[key] = record[key], value
        path.write_text(json.dumps(receipt))
        bad = [t for t in pq.verify(exported).tensors if not t.ok]
        assert [t.name for t in bad] == [DOWN], key
        record[key] = saved
    receipt["tensors"].remove(record)
    path.write_text(json.dumps(receipt))
    assert [(t.name, t.error) for t in pq.verify(exported).tensors if not t.ok] == [
        (DOWN, "is in the file, but not in the receipt")
    ]


def test_an_unknown_format_in_a_receipt_is_refused(exported: Path) -> None:
    path = exported / "receipt.json"
    path.write_text(path.read_text().replace('"format": "', '"format": "../', 1))
    with pytest.raises(PhiquantError, match="unknown format"):
        pq.verify(exported)


def test_a_missing_receipt(exported: Path) -> None:
    (exported / "receipt.json").unlink()
    with pytest.raises(PhiquantError, match=r"has no receipt\.json"):
        pq.verify(exported)


def test_an_export_may_replace_its_like_only(exported: Path, tiny_model: Any, tokenizer: Any, format_name: str) -> None:
    pq.export(tiny_model, tokenizer, exported, format=format_name)
    assert pq.verify(exported).ok
    other = "gguf" if format_name == "safetensors" else "safetensors"
    with pytest.raises(PhiquantError, match=f"holds an export in the format {format_name}; choose another folder"):
        pq.export(tiny_model, tokenizer, exported, format=other)
    (exported / "receipt.json").unlink()
    with pytest.raises(PhiquantError, match=r"holds model\..*, which no receipt\.json there tells of"):
        pq.export(tiny_model, tokenizer, exported, format=format_name)


def test_files_of_the_replaced_export_do_not_stay(
    tiny_model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pq.export(tiny_model, tokenizer, tmp_path, format="safetensors")
    monkeypatch.setattr(safetensors_folder, "SHARD_BYTES", 1_500_000)
    pq.export(tiny_model, tokenizer, tmp_path, format="safetensors")
    assert not (tmp_path / "model.safetensors").exists()
    monkeypatch.undo()
    pq.export(tiny_model, tokenizer, tmp_path, format="safetensors")
    assert [path.name for path in tmp_path.glob("model*")] == ["model.safetensors"]
    assert pq.verify(tmp_path).ok


def test_what_cannot_be_exported(tiny_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(PhiquantError, match="unknown format 'onx'; known formats: gguf, "):
        pq.export(tiny_model, tokenizer, tmp_path, format="onx")
    with pytest.raises(PhiquantError, match="has no transformers config"):
        pq.export(torch.nn.Linear(2, 2), tokenizer, tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(PhiquantError, match="is a file; give a folder"):
        pq.export(tiny_model, tokenizer, tmp_path / "file")
    pq.prepare_qat(tiny_model, "gguf:Q4_0")
    with pytest.raises(PhiquantError, match=r"is prepared for QAT and has no codes yet; call convert\(model\) first"):
        pq.export(tiny_model, tokenizer, tmp_path)


def test_a_weight_that_was_edited_after_quantization_is_refused(
    tiny_model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    pq.quantize(tiny_model, "gguf:Q4_0")
    with torch.no_grad():
        tiny_model.get_parameter(DOWN)[0, 0] += 1
    with pytest.raises(PhiquantError, match=r"model\.layers\.1\.mlp\.down_proj"):
        pq.export(tiny_model, tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_extra_parameters_are_refused(tiny_model: Any, tokenizer: Any) -> None:
    tiny_model.model.layers[0].mlp.down_proj.bias = torch.nn.Parameter(torch.zeros(128))
    with pytest.raises(PhiquantError, match=r"does not have, first model.layers.0.mlp.down_proj.bias"):
        ModelSource(tiny_model, tokenizer)


def test_float_tensors_get_the_narrowest_type_that_holds_them(tiny_model: Any, tokenizer: Any) -> None:
    with torch.no_grad():
        tiny_model.model.norm.weight.copy_(torch.linspace(0.5, 1.5, 128).half())
        tiny_model.lm_head.weight.copy_(tiny_model.lm_head.weight.bfloat16())
    dtypes = {entry.name: entry.dtype for entry in ModelSource(tiny_model, tokenizer).entries}
    assert dtypes["model.norm.weight"] == "float16"
    assert dtypes["lm_head.weight"] == "bfloat16"
    assert dtypes["model.embed_tokens.weight"] == "float32"


@pytest.mark.parametrize("grid", ["gguf:Q4_0", "int3-g32-signmax-f16"])
def test_a_qat_model_ships_the_weights_it_trained_with(
    tiny_model: Any, tokenizer: Any, tmp_path: Path, grid: str
) -> None:
    """Largest difference 0: trained weights, dequantize(), our readers, gguf-py's and compressed-tensors' decode."""
    pq.prepare_qat(tiny_model, grid)
    optimizer = torch.optim.SGD(tiny_model.parameters(), lr=1e-2)
    ids = torch.arange(32)[None]
    tiny_model(ids, labels=ids).loss.backward()
    optimizer.step()
    layers = {n: m for n, m in tiny_model.named_modules() if isinstance(m, pq.QATLinear)}
    trained = {f"{n}.weight": m.weight_quantizer(m.weight).detach().clone() for n, m in layers.items()}
    assert DOWN in trained
    pq.convert(tiny_model)
    for name, layer in layers.items():  # the same modules, now of another class
        assert torch.equal(layer.quantized.dequantize(), trained[f"{name}.weight"])
    for format_name in TARGETS:
        out = tmp_path / format_name
        pq.export(tiny_model, tokenizer, out, format=format_name)
        stored = find(format_name).reader_module().read(out / "model.gguf" if format_name == "gguf" else out)
        for name, weight in trained.items():
            assert torch.equal(torch.from_numpy(stored[name].values().copy()), weight)
            assert torch.equal(torch.from_numpy(stored[name].reference().copy()), weight)


@pytest.mark.parametrize("name", TARGETS)
def test_the_runtime_computes_what_we_do(
    phi3_tiny: tuple[Any, Any], tmp_path: Path, name: str, short_text: str
) -> None:
    model, tokenizer = phi3_tiny
    pq.quantize(model, TARGETS[name])
    pq.export(model, tokenizer, tmp_path, format=name)
    report = pq.verify(tmp_path, run=True, text=short_text, windows=1)
    assert report.ok, report
    assert report.runtime is not None
    assert report.runtime.relative_error <= (1e-6 if name == "safetensors" else 2e-2)
    assert report.runtime.tokens > 100
    assert f"{report.runtime.name}: relative error" in str(report)


def test_plain_transformers_runs_the_folder_without_phiquant(phi3_tiny: tuple[Any, Any], tmp_path: Path) -> None:
    from phiquant.runtimes import transformers

    model, tokenizer = phi3_tiny
    pq.quantize(model, "safetensors:int8-channel")
    pq.export(model, tokenizer, tmp_path, format="safetensors")
    ids = tokenizer("def main():")["input_ids"]
    made = transformers.generate(tmp_path, ids, max_new_tokens=4)
    expected = model.generate(torch.tensor([ids]), max_new_tokens=4, do_sample=False)[0, len(ids) :]
    assert made.prompt_tokens == ids
    assert made.tokens == expected.tolist()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(PhiquantError, match=r"transformers failed on .* last messages:"):
        transformers.logits(tmp_path, [ids])
