"""Files that anyone may have made: each fault that the fuzzers found, by name."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import phiquant as pq
import pytest
from phiquant import PhiquantError, UnsupportedModelError, testing
from phiquant.checkpoint import Checkpoint
from phiquant.compression import read_compressed
from phiquant.formats.registry import FORMATS, find
from phiquant.formats.safetensors import reader as safetensors_reader
from phiquant.models import phi
from phiquant.untrusted import naming, read_json

CONFIG = {
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "vocab_size": 64,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (b"[1]", "must hold a JSON object, not a list"),
        (b'{"a": 1, "b": 2, "a": 3}', "the key 'a' occurs twice"),
        (b'{"a": "\xff"}', "not valid JSON"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "not valid JSON"),
        (b"", "not valid JSON"),
    ],
)
def test_json_that_is_refused(tmp_path: Path, text: bytes, error: str) -> None:
    (tmp_path / "x.json").write_bytes(text)
    with pytest.raises(PhiquantError, match=error) as caught:
        read_json(tmp_path / "x.json")
    assert str(tmp_path / "x.json") in str(caught.value)


def test_json_of_a_pipe_a_device_or_a_giant_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    with (tmp_path / "giant").open("wb") as file:
        file.truncate(1 << 40)
    for name, error in (("pipe", "no such file"), ("device", "no such file"), ("giant", "above the")):
        with pytest.raises(PhiquantError, match=error):
            read_json(tmp_path / name)


def test_naming_keeps_a_message_that_names_the_file_and_the_kind_of_error() -> None:
    with pytest.raises(PhiquantError, match=r"^x\.gguf: row 3$"), naming("x.gguf"):
        raise PhiquantError("x.gguf: row 3")
    with pytest.raises(UnsupportedModelError, match=r"^x\.gguf: a Phi-2$"), naming("x.gguf"):
        raise UnsupportedModelError("a Phi-2")
    with pytest.raises(PhiquantError, match=r"x\.gguf is damaged.*'scale' is missing"), naming("x.gguf"):
        raise KeyError("scale")


def test_half_a_surrogate_pair_in_a_message_can_be_printed() -> None:
    assert str(PhiquantError("name \ud800")) == "name \\ud800"


@pytest.mark.parametrize(
    "change",
    [
        {"architectures": [7]},
        {"architectures": [{}]},
        {"architectures": "Phi3ForCausalLM"},
        {"model_type": ["phi3"]},
        {"quantization_config": "int4"},
    ],
    ids=str,
)
def test_a_config_with_values_of_another_type_is_an_unsupported_model(tmp_path: Path, change: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, **change}))
    with pytest.raises(UnsupportedModelError, match=r"config\.json"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    "change",
    [{"num_hidden_layers": 2**40}, {"hidden_size": 2**63}, {"vocab_size": True}, {"num_key_value_heads": -1},
     {"num_key_value_heads": "2"}, {"num_attention_heads": 0}],
    ids=str,
)  # fmt: skip
def test_sizes_that_no_model_has_are_refused_at_once(change: dict[str, Any]) -> None:
    with pytest.raises(PhiquantError, match=f"{next(iter(change))} must be a positive integer"):
        list(phi.tensors({**CONFIG, **change}))


def test_a_compressed_file_that_is_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.phiq")
    with pytest.raises(PhiquantError, match="no such file"):
        read_compressed(tmp_path / "model.phiq")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = pq.testing.random_phi3(num_hidden_layers=1)
    pq.quantize(model, "safetensors:int4-g32")
    out = tmp_path_factory.mktemp("export") / "safetensors"
    pq.export(model, pq.load("phi3-tiny")[1], out, format="safetensors")
    return out


@pytest.mark.parametrize(
    "damage",
    [
        {"config_groups": 3},
        {"config_groups": {"group_0": 3}},
        {"config_groups": {"group_0": {"targets": 7, "weights": {}}}},
        {"config_groups": {"group_0": {"targets": ["Linear"], "weights": 7}}},
        {"config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": "x", "strategy": []}}}},
        {"config_groups": {"group_0": {"targets": ["Linear"],
         "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 2**64 - 1}}}},
    ],
    ids=str,
)  # fmt: skip
def test_a_scheme_of_compressed_tensors_that_makes_no_sense_is_refused(
    folder: Path, tmp_path: Path, damage: dict[str, Any]
) -> None:
    copied = Path(shutil.copytree(folder, tmp_path / "copy"))
    config = json.loads((copied / "config.json").read_text())
    config["quantization_config"] |= damage
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(PhiquantError, match=str(copied)):
        _read_all(copied)


def _read_all(folder: Path) -> None:
    for tensor in safetensors_reader.read(folder).values():
        tensor.digests(tensor.spec)


def test_a_receipt_of_a_format_that_there_is_not(tmp_path: Path) -> None:
    (tmp_path / "receipt.json").write_text('{"format": "gguff", "files": {}, "tensors": []}')
    with pytest.raises(PhiquantError, match=rf"{tmp_path}/receipt\.json .*unknown format 'gguff'"):
        pq.verify(tmp_path)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda r: r["tensors"][0].update(file=["model.gguf"]), "is in none of its files"),
        (lambda r: r["files"]["model.gguf"]["header"].update(bytes=1 << 50), "a header of 1125899906842624"),
        (lambda r: r["files"].update({"x" * 300: r["files"]["model.gguf"]}), "not the name of a file"),
    ],
)
def test_a_receipt_with_values_that_cannot_be(change: Any, error: str, tmp_path: Path) -> None:
    model = testing.random_phi3()
    _, tokenizer = pq.load("phi3-tiny")
    pq.export(model, tokenizer, tmp_path, format="gguf")
    receipt = json.loads((tmp_path / "receipt.json").read_text())
    change(receipt)
    (tmp_path / "receipt.json").write_text(json.dumps(receipt))
    with pytest.raises(PhiquantError, match=error):
        pq.verify(tmp_path)


def test_an_openvino_graph_that_is_a_pipe_or_a_device(tmp_path: Path) -> None:
    (tmp_path / "openvino_model.bin").write_bytes(b"0")
    os.mkfifo(tmp_path / "openvino_model.xml")
    with pytest.raises(PhiquantError, match=r"openvino_model\.xml is no plain file"):
        find("openvino").reader_module().read(tmp_path)
    (tmp_path / "openvino_model.xml").unlink()
    (tmp_path / "openvino_model.xml").symlink_to("/dev/zero")
    with pytest.raises(PhiquantError, match=r"openvino_model\.xml is no plain file"):
        find("openvino").reader_module().read(tmp_path)


def test_a_shard_with_a_name_that_no_file_can_have(tmp_path: Path) -> None:
    testing.random_phi3().save_pretrained(tmp_path, max_shard_size="500KB")
    index = tmp_path / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"] = dict.fromkeys(data["weight_map"], "m" * 300 + ".safetensors")
    index.write_text(json.dumps(data))
    with pytest.raises(PhiquantError, match="not the name of a file beside it"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("name", FORMATS)
def test_every_reader_names_the_file(name: str, tmp_path: Path) -> None:
    """A truncated data file of QNN was numpy's error, its config.json a device's endless text."""
    reader = FORMATS[name].reader_module()
    for read in (reader.read, reader.read_config):
        assert hasattr(read, "__wrapped__"), f"{read.__name__} of {name} lacks @untrusted.reader"
        with pytest.raises(PhiquantError, match=str(tmp_path)):
            read(tmp_path / "missing")
