"""The format of a file or folder is told by its receipt, else by what lies there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from phiquant import PhiquantError
from phiquant.formats.detect import detect, existing

CASES = [
    ("gguf", {"any.gguf": "GGUF"}, "any.gguf"),
    ("onnx", {"model.onnx": "", "model.onnx.data": ""}, ""),
    ("qnn", {"decode.onnx": "", "prefill.onnx": "", "model.onnx.data": ""}, ""),
    ("openvino", {"openvino_model.xml": "", "openvino_model.bin": ""}, ""),
    ("mlx", {"config.json": {"quantization": {"bits": 4}}, "model.safetensors": ""}, ""),
    ("safetensors", {"config.json": {"quantization_config": {"quant_method": "gptq"}}, "model.safetensors": ""}, ""),
    ("safetensors", {"config.json": {}, "model-00001-of-00002.safetensors": ""}, ""),
    ("safetensors", {"config.json": "not JSON", "model.safetensors": ""}, ""),
]


def write(folder: Path, files: dict[str, object]) -> None:
    for name, content in files.items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.mark.parametrize(("format", "files", "opened"), CASES)
def test_by_what_lies_there(tmp_path: Path, format: str, files: dict[str, object], opened: str) -> None:
    write(tmp_path, files)
    found = detect(tmp_path)
    assert found is not None
    assert (found.format.name, found.path, found.folder) == (format, tmp_path / opened, tmp_path)
    assert found.receipt is None
    weights = next(path for pattern in found.format.weights for path in tmp_path.glob(pattern))
    assert detect(weights) == found
    assert found.quant_method == ("gptq" if "gptq" in str(files) else None)


def test_a_gguf_file_of_another_name(tmp_path: Path) -> None:
    write(tmp_path, {"weights": "GGUF and more"})
    found = detect(tmp_path / "weights")
    assert found is not None
    assert found.format.name == "gguf"


def test_what_is_none_of_them(tmp_path: Path) -> None:
    write(tmp_path, {"config.json": {}, "notes.txt": "x"})
    for path in (tmp_path, tmp_path / "notes.txt", tmp_path / "nowhere"):
        assert detect(path) is None
        with pytest.raises(PhiquantError, match="is no model in a format that phiquant reads"):
            existing(path)


def test_a_receipt_that_cannot_be_trusted_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {"receipt.json": {"format": "../gguf", "files": {}, "tensors": []}})
    with pytest.raises(PhiquantError, match="unknown format"):
        detect(tmp_path)
    write(tmp_path, {"receipt.json": {"format": "gguf", "files": {}, "tensors": []}})
    with pytest.raises(PhiquantError, match="names 0 weight files instead of one"):
        detect(tmp_path)


def test_two_models_in_one_folder(tmp_path: Path) -> None:
    write(tmp_path, {"a.gguf": "GGUF", "b.gguf": "GGUF"})
    with pytest.raises(PhiquantError, match=r"holds several models \(a\.gguf, b\.gguf\)"):
        detect(tmp_path)
