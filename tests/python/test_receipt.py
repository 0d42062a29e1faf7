"""Receipts are written whole, and read as files that anyone may have changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from phiquant import PhiquantError, quantize_tensor
from phiquant.formats import receipt
from phiquant.formats.source import Entry
from phiquant.spec import spec

SHA = "0" * 64


def good() -> dict[str, Any]:
    return {
        "format": "gguf",
        "files": {"model.gguf": {"bytes": 1, "sha256": SHA}},
        "tensors": [
            {"name": "w", "stored_as": "F16", "shape": [2], "file": "model.gguf", "dtype": "float16", "values": SHA},
            {
                "name": "q", "stored_as": "Q4_0", "shape": [1, 32], "file": "model.gguf", "spec": "int4-g32-sym",
                "codes": SHA, "parameters": SHA,
            },
        ],
    }  # fmt: skip


def read(folder: Path, data: Any) -> dict[str, Any]:
    (folder / "model.gguf").write_bytes(b"x")
    (folder / receipt.NAME).write_text(data if isinstance(data, str) else json.dumps(data))
    return receipt.read(folder)


def test_a_good_receipt_is_read_as_it_is(tmp_path: Path) -> None:
    assert read(tmp_path, good()) == good()


def changed(path: list[Any], value: Any) -> dict[str, Any]:
    data = place = good()
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return data


ESCAPES = ["../model.gguf", "/etc/passwd", "sub/model.gguf", "..", ".", "", "a\\b", "c:model", "a\0b", "a\nb"]


@pytest.mark.parametrize("name", ESCAPES)
def test_a_file_outside_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(PhiquantError, match="is not the name of a file in its folder"):
        read(tmp_path, changed(["files"], {name: {"bytes": 1, "sha256": SHA}}))


@pytest.mark.parametrize(
    "data",
    [
        "", "[", "[]", "1", '"x"', "[" * 100_000, "{}", '{"format": "gguf"}',
        changed(["format"], 3), changed(["files"], []), changed(["tensors"], {}), changed(["tensors", 0], 1),
        changed(["tensors", 0, "name"], None), changed(["tensors", 0, "name"], "q"),
        changed(["tensors", 0, "shape"], "2"), changed(["tensors", 0, "shape"], [-1]),
        changed(["tensors", 0, "file"], "other.gguf"), changed(["tensors", 0, "values"], "0"),
        changed(["tensors", 1, "codes"], None), changed(["tensors", 1, "spec"], 4),
        changed(["files", "model.gguf"], None), changed(["files", "model.gguf", "bytes"], "1"),
        changed(["files", "model.gguf", "sha256"], SHA[1:]),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_not_a_receipt_is_refused(tmp_path: Path, data: Any) -> None:
    with pytest.raises(PhiquantError, match="export again"):
        read(tmp_path, data)


def test_a_missing_receipt_file_or_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(PhiquantError, match=r"has no receipt\.json: it was not written by phiquant"):
        receipt.read(tmp_path)
    with pytest.raises(PhiquantError, match="is not a folder"):
        receipt.read(tmp_path / "none")
    (tmp_path / receipt.NAME).write_text(json.dumps(good()))
    with pytest.raises(PhiquantError, match=r"names the file model\.gguf, which is missing"):
        receipt.read(tmp_path)


def test_write_leaves_nothing_beside_it(tmp_path: Path) -> None:
    receipt.write(tmp_path, {"format": "gguf"})
    assert [p.name for p in tmp_path.iterdir()] == [receipt.NAME]


@pytest.mark.parametrize("text", ["int4-g32-sym-f16", "uint4-g32-min-f16", "uint4-g32-asym", "int8-channel-sym"])
def test_digests_of_pieces_are_those_of_the_whole(text: str) -> None:
    w = torch.randn(12, 64, generator=torch.Generator().manual_seed(0))
    digest = receipt.TensorDigest()
    for start in (0, 5, 6):
        stop = {0: 5, 5: 6, 6: 12}[start]
        digest.add_codes(quantize_tensor(w[start:stop], text))
    assert digest.codes() == quantize_tensor(w, text).digests()


def test_records_say_what_was_stored() -> None:
    coded = receipt.tensor_record(Entry("a.weight", (2, 32), spec("gguf:Q4_0")), "Q4_0", "f", {"codes": SHA})
    assert coded["spec"] == "int4-g32-signmax-f16"
    plain = receipt.tensor_record(Entry("b.weight", (2,), None, "bfloat16"), "F32", "f", {}, dtype="float32")
    assert plain["dtype"] == "float32"
    assert plain["exact"]
