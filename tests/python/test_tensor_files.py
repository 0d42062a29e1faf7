"""Folders of safetensors that are damaged or hostile: an error that names file, place and cause, in every reader."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import phiquant as pq
import pytest
from phiquant import PhiquantError
from phiquant.formats.mlx import reader as mlx_reader
from phiquant.formats.mlx import writer as mlx
from phiquant.formats.safetensors import reader as safetensors_reader
from phiquant.formats.safetensors import writer as safetensors
from phiquant.formats.tensor_files import TensorFiles, e2m1, e4m3, narrowed, stream, widened
from phiquant.model_source import ModelSource

READERS = {"safetensors": (safetensors, safetensors_reader), "mlx": (mlx, mlx_reader)}


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each format."""
    root = tmp_path_factory.mktemp("exports")
    (root / "tokenizer.json").write_text("{}")
    for name, grid in (("safetensors", "uint4-g32-asym-f16"), ("mlx", "mlx:3bit-g32")):
        model = pq.testing.random_phi3(
            num_hidden_layers=1, vocab_size=64, bos_token_id=0, eos_token_id=0, pad_token_id=0
        )
        source = ModelSource(pq.quantize(model, grid), None)
        source.tokenizer_dir = root
        READERS[name][0].write(source, root / name)
    return {name: root / name for name in READERS}


def copied(export: Path, folder: Path) -> Path:
    for path in export.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.fixture(params=READERS)
def reader(request: pytest.FixtureRequest) -> Any:
    return READERS[request.param][1]


@pytest.fixture
def folder(exports: dict[str, Path], reader: Any, tmp_path: Path) -> Path:
    return copied(exports["mlx" if reader is mlx_reader else "safetensors"], tmp_path)


def split(folder: Path) -> tuple[str, bytes]:
    """Header and data of the one file."""
    data = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    return data[8 : 8 + length].decode(), data[8 + length :]


def store(folder: Path, header: str, data: bytes, name: str = "model.safetensors") -> None:
    text = header.encode()
    (folder / name).write_bytes(len(text).to_bytes(8, "little") + text + data)


def edited(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    header, data = split(folder)
    table = json.loads(header)
    change(table)
    store(folder, json.dumps(table), data)


FIRST = "model.layers.0.self_attn.o_proj.weight"


def first_of(table: dict[str, Any]) -> dict[str, Any]:
    return next(value for name, value in table.items() if name.startswith(FIRST))


def grow(table: dict[str, Any]) -> None:
    first_of(table)["data_offsets"][1] += 16


def giant(table: dict[str, Any]) -> None:
    first_of(table)["shape"] = [1 << 62, 1 << 62]


def negative(table: dict[str, Any]) -> None:
    first_of(table)["data_offsets"] = [-16, 0]


def overlapping(table: dict[str, Any]) -> None:
    first, second = list(table)[1:3]
    shift = table[second]["data_offsets"]
    table[second] = {**table[second], "data_offsets": [shift[0] - 8, shift[1] - 8]}
    assert first


def unknown(table: dict[str, Any]) -> None:
    first_of(table)["dtype"] = "F7"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (grow, r"takes [\d,]+ bytes, its offsets say"),
        (giant, r"takes [\d,]+ bytes, its offsets say"),
        (negative, r"offsets \[-16, 0\]"),
        (overlapping, r"overlaps|leaves a gap"),
        (unknown, r"unknown dtype 'F7'"),
    ],
)
def test_a_table_that_does_not_fit(reader: Any, folder: Path, change: Any, message: str) -> None:
    edited(folder, change)
    with pytest.raises(PhiquantError, match=rf"model\.safetensors.*({message})"):
        reader.read(folder)


def test_a_name_that_occurs_twice(reader: Any, folder: Path) -> None:
    header, data = split(folder)
    table = json.loads(header)
    name = next(iter(table))
    store(folder, header.rstrip()[:-1] + f", {json.dumps(name)}: {json.dumps(table[name])}}}", data)
    with pytest.raises(PhiquantError, match=r"model\.safetensors is damaged: .*a name occurs twice"):
        reader.read(folder)


@pytest.mark.parametrize("size", [0, 7, 8, 100, 5000])
def test_a_truncated_file(reader: Any, folder: Path, size: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(PhiquantError, match=r"model\.safetensors is truncated"):
        reader.read(folder)


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "C:\\x.safetensors", "x.bin"]
)
def test_an_index_that_leads_out_of_the_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "compressed-tensors"}}))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a.weight": name}}))
    with pytest.raises(PhiquantError, match=r"index\.json: a\.weight is said to be in .*refused"):
        safetensors_reader.read(tmp_path)


def test_a_tensor_in_two_shards(reader: Any, folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for name in names:
        (folder / name).write_bytes(data)
    weight_map = {str(index): name for index, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(PhiquantError, match=r"model-00002-of-00002\.safetensors: .* is in model-00001-of-00002"):
        reader.read(folder)


def test_a_shard_that_is_missing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    index = {"weight_map": {"a.weight": "model-00001-of-00001.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(PhiquantError, match=r"no file model-00001-of-00001\.safetensors, which its index names"):
        safetensors_reader.read(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "[1]", "\xff", "[" * 100_000, '{"quantization_config": 3}', '{"quantization": [1]}']
)
def test_a_config_that_is_none(reader: Any, folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(PhiquantError, match=r"config\.json"):
        reader.read(folder)


def settings_of(config: dict[str, Any]) -> dict[str, Any]:
    return next(iter(config["quantization_config"]["config_groups"].values()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: settings_of(c).update(format="magic"), "gives it the format 'magic'"),
        (lambda c: settings_of(c).update(weights=None), "gives it the format"),
        (lambda c: settings_of(c)["weights"].update(num_bits=99), "is none that phiquant reads"),
        (lambda c: settings_of(c)["weights"].update(strategy="block"), "is none that phiquant reads"),
        (lambda c: settings_of(c)["weights"].update(group_size=-1), "is none that phiquant reads"),
        (lambda c: settings_of(c).update(targets=["re:(a+)+$"]), "too involved to be run on names"),
        (lambda c: settings_of(c).update(targets=["re:("]), "is no regular expression"),
        (lambda c: settings_of(c).update(targets=[]), "has no scheme for it"),
        (lambda c: c["quantization_config"].update(config_groups=[1]), "has no scheme for it"),
    ],
)
def test_a_scheme_that_cannot_be_read(exports: dict[str, Path], tmp_path: Path, change: Any, message: str) -> None:
    folder = copied(exports["safetensors"], tmp_path)
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(PhiquantError, match=message):
        safetensors_reader.read(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "mxfp9"}, "the mode 'mxfp9' is none of affine"),
        ({"bits": 4}, "words in a row"),
        ({"group_size": 0}, "groups of 0"),
        ({"group_size": "32"}, "groups of '32'"),
        ({"mode": "mxfp4"}, "words in a row"),
    ],
)
def test_an_mlx_packing_that_is_not_what_the_file_holds(
    exports: dict[str, Path], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    folder = copied(exports["mlx"], tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization"].update(change)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(PhiquantError, match=message):
        mlx_reader.read(folder)


def test_scales_that_are_missing_or_of_another_shape(reader: Any, folder: Path) -> None:
    scale = f"{FIRST}_scale" if reader is safetensors_reader else FIRST.replace(".weight", ".scales")

    def reshaped(table: dict[str, Any]) -> None:
        table[scale]["shape"] = list(reversed(table[scale]["shape"]))

    edited(folder, reshaped)
    with pytest.raises(PhiquantError, match=r"o_proj"):
        reader.read(folder)[FIRST].values()


def test_any_byte_may_be_wrong(reader: Any, folder: Path) -> None:
    """A fuzzer: whatever a flipped byte of header, index or config does, it is no crash and no other error."""
    generator = random.Random(0)
    header, _ = split(folder)
    refused = 0
    for name, size in (("model.safetensors", 8 + len(header)), ("config.json", 10**9)):
        whole = (folder / name).read_bytes()
        for _ in range(150):
            broken = bytearray(whole)
            for _ in range(generator.randint(1, 3)):
                broken[generator.randrange(min(size, len(whole)))] = generator.randrange(256)
            (folder / name).write_bytes(broken)
            try:
                for tensor in reader.read(folder).values():
                    tensor.digests(tensor.spec)
            except PhiquantError:
                refused += 1
        (folder / name).write_bytes(whole)
    assert refused > 100
    assert reader.read(folder)


def test_small_decodings_are_those_of_ml_dtypes() -> None:
    every = np.arange(256, dtype=np.uint8)
    assert np.array_equal(e4m3(every), every.view(ml_dtypes.float8_e4m3fn).astype(np.float32), equal_nan=True)
    nibbles = np.arange(16, dtype=np.uint8)
    assert np.array_equal(e2m1(nibbles), nibbles.view(ml_dtypes.float4_e2m1fn).astype(np.float32))
    exponents = every[:255]
    assert np.array_equal(widened(exponents, "U8"), exponents.view(ml_dtypes.float8_e8m0fnu).astype(np.float32))
    bits = np.random.default_rng(0).integers(0, 1 << 16, 1000).astype(np.uint16)
    values = bits.view(ml_dtypes.bfloat16).astype(np.float32)
    assert np.array_equal(widened(bits, "BF16"), values, equal_nan=True)
    back = narrowed(values, "bfloat16")
    assert back is not None
    assert np.array_equal(back, bits)
    assert narrowed(np.float32([1.0, 1.0 + 2**-20]), "float16") is None


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_stream_of_bits(bits: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (3, 64))
    rows = [sum(int(code) << (bits * i) for i, code in enumerate(row)).to_bytes(8 * bits, "little") for row in codes]
    words = np.frombuffer(b"".join(rows), np.uint32).reshape(3, -1)
    assert np.array_equal(stream(words, bits, 64), codes)
    with pytest.raises(PhiquantError, match="hold no 4096 codes"):
        stream(words, bits, 4096)


def test_slices_of_an_array(folder: Path) -> None:
    files = TensorFiles(folder)
    name = next(name for name in files.places if name.startswith(FIRST) and len(files.place(name).shape) == 2)
    whole = files.array(name)
    assert np.array_equal(files.array(name, (slice(3, 9), slice(1, 3))), whole[3:9, 1:3])
    with pytest.raises(PhiquantError, match="has no tensor none"):
        files.array("none")
