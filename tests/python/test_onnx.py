"""ONNX folders: what is in the files, by the independent reader, the package onnx, and numpy."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import phiquant as pq
import pytest
import torch
from gguf_cases import Tensors
from phiquant import PhiquantError, Recipe
from phiquant.formats import receipt
from phiquant.formats.onnx import reader, writer
from phiquant.formats.source import Entry
from phiquant.model_source import ModelSource
from phiquant.spec import spec
from phiquant.targets import TARGETS
from phiquant.tensor import QuantizedTensor

onnx = pytest.importorskip("onnx")

# All widths and offsets, with scales of every dtype; several lie in wider types or repeat their scales.
GRIDS = [
    "onnx:int4-g32", "onnx:uint4-g64", "onnx:int8-g128", "onnx:uint8-g16", "onnx:int2-g32", "onnx:uint2-g128",
    "onnx:int4-channel", "onnx:uint8-channel", "int3-g32-sym-f16", "uint3-g16-asym-bf16", "int5-channel-sym",
    "uint6-g64-asym", "int7-tensor-sym-bf16", "int4-g32-asym-f16", "int8-g64-asym", "ternary-g32-sym-f16",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def small(make_phi3: Callable[..., Any]) -> Any:
    """One layer and few words."""
    return make_phi3(num_hidden_layers=1, vocab_size=96, bos_token_id=1, eos_token_id=1, pad_token_id=1)


@pytest.mark.parametrize("form", ["genai", "qdq"])
@pytest.mark.parametrize("grid", GRIDS)
def test_what_is_written_is_read_back(grid: str, form: str, small: Any, folder: Path, tmp_path: Path) -> None:
    source = Tensors(small, folder, grid, None if form == "qdq" else grid, dtype="bfloat16")
    writer.write(source, tmp_path, form=form)
    stored = reader.read(tmp_path)
    assert set(stored) == {entry.name for entry in source.entries}
    for entry in source.entries:
        value, found = source.tensors[entry.name], stored[entry.name]
        assert found.shape == entry.shape
        if isinstance(value, QuantizedTensor):
            assert found.digests(entry.spec) == value.digests()
            expected = value.dequantize().numpy()
            assert np.array_equal(found.values(slice(3, 70)), expected[3:70])
            own = found.quantized()
            assert np.array_equal(own.dequantize().numpy(), expected)
        else:
            expected = (value.bfloat16() if value.dim() == 2 else value).float().numpy()
        assert np.array_equal(found.values(), expected)
        assert np.array_equal(found.reference(), expected)
        assert np.array_equal(found.reference(slice(1, 2)), expected[1:2])


def test_bytes_are_those_of_the_operators(small: Any, folder: Path, tmp_path: Path) -> None:
    """Without the reader: low halves first, rows of zero points padded, code - 8 without zero points."""
    source = Tensors(small, folder, "uint4-g128-asym-f16", "int4-g32-signmax-f16")
    writer.write(source, tmp_path)
    tensors = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path / writer.FILE).graph.initializer}
    name = "model.layers.0.mlp.down_proj.weight"
    qt = source.tensors[name]
    packed, points = tensors[f"{name}.codes"], tensors[f"{name}.zero_points"]
    assert packed.shape == (128, 2, 64)
    codes = np.stack([packed & 15, packed >> 4], -1).reshape(128, 256)
    assert np.array_equal(codes, qt.codes.numpy())
    assert points.shape == (128, 1)
    assert np.array_equal(np.stack([points & 15, points >> 4], -1).reshape(128, 2), qt.zero_points.numpy())
    assert np.array_equal(tensors[f"{name}.scales"], qt.scales.float().numpy())
    head = tensors["lm_head.weight.codes"]
    codes = np.stack([head & 15, head >> 4], -1).reshape(96, 128).astype(int) - 8
    assert np.array_equal(codes, source.tensors["lm_head.weight"].codes.numpy())


def test_int8_dynamic(small: Any, folder: Path, tmp_path: Path) -> None:
    """Integers per row are multiplied as such; other grids stay what they are."""
    source = Tensors(small, folder, "int8-channel-sym", "uint4-g32-asym")
    writer.write(source, tmp_path, activations="uint8-tensor-asym")
    stored = reader.read(tmp_path)
    kinds = {name.rpartition(".")[0].rpartition(".")[2]: tensor.stored_as for name, tensor in stored.items()}
    assert kinds["qkv_proj"] == kinds["down_proj"] == "MatMulInteger"
    assert kinds["lm_head"] == kinds["embed_tokens"] == "MatMulNBits4"
    name = "model.layers.0.self_attn.qkv_proj.weight"
    assert str(stored[name].spec) == "int8-channel-sym"
    assert stored[name].digests(source.tensors[name].spec) == source.tensors[name].digests()
    assert np.array_equal(stored[name].reference(), source.tensors[name].dequantize().numpy())


@pytest.mark.parametrize("target", [t for t in TARGETS if t.startswith("onnx:")])
def test_every_target_fits(target: str) -> None:
    known = TARGETS[target]
    if known.spec is not None:
        writer.check(Entry("model.layers.0.mlp.down_proj.weight", (8, 512), known.spec))
        writer.check(Entry("model.layers.0.mlp.down_proj.weight", (8, 512), known.spec), form="qdq")


@pytest.mark.parametrize(
    ("grid", "shape", "reason", "nearest"),
    [
        ("gguf:Q4_1", (4, 64), "a float minimum is no whole number of steps", "onnx:uint4-g32"),
        ("gguf:Q4_K", (4, 256), "(?:float minimum|single floats)", "onnx:uint4-g32"),
        ("q6_k", (4, 256), "its scales are single floats", "onnx:int8-g16"),
        ("mxfp4", (4, 64), "its kernels read integers, not fp4_e2m1", "onnx:int4-g32"),
        ("int4-g8-sym-f16", (4, 64), "blocks have 16, 32, 64, 128, 256 values", "onnx:int4-g16"),
        ("int4-channel-sym-f16", (4, 24), "blocks have", "onnx:BF16"),
        ("int4-channel1-sym", (4, 64), "no scales per channel1", "onnx:int4-g32"),
        ("codebook16-row", (4, 64), "its kernels read integers", "onnx:int4-g32"),
    ],
)
def test_what_does_not_fit_is_refused(grid: str, shape: tuple[int, int], reason: str, nearest: str) -> None:
    if grid == "gguf:Q4_K" and grid not in TARGETS:
        grid = "q4_k"
    with pytest.raises(PhiquantError, match=rf"x\.weight: ONNX cannot hold .*{reason}.*Nearest.*'{nearest}'"):
        writer.check(Entry("x.weight", shape, spec(grid)))


def test_options_are_checked(small: Any, folder: Path, tmp_path: Path) -> None:
    source = Tensors(small, folder)
    with pytest.raises(PhiquantError, match="form is one of genai, qdq, not 'onnx'"):
        writer.write(source, tmp_path, form="onnx")  # type: ignore[arg-type]
    with pytest.raises(PhiquantError, match="accuracy_level is 0 to 4"):
        writer.write(source, tmp_path, accuracy_level=5)
    with pytest.raises(TypeError, match="level"):
        writer.write(source, tmp_path, level=1)  # type: ignore[call-arg]
    with pytest.raises(PhiquantError, match="no tokenizer was given"):
        writer.write(Tensors(small, None), tmp_path)
    with pytest.raises(PhiquantError, match="round activations to uint8-tensor-asym, not to int8-token-sym"):
        writer.write(source, tmp_path, activations="int8-token-sym")
    with pytest.raises(PhiquantError, match="rounded for grids like int8-channel-sym; no tensor has one"):
        writer.write(source, tmp_path, activations="uint8-tensor-asym")
    assert not list(tmp_path.iterdir())


def test_a_rotary_part_that_the_kernel_does_not_take(
    make_phi3: Callable[..., Any], folder: Path, tmp_path: Path
) -> None:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}
    model = make_phi3(num_hidden_layers=1, rope_parameters=rope)
    with pytest.raises(PhiquantError, match="has 24 values; ONNX Runtime's attention takes multiples of 16"):
        writer.write(Tensors(model, folder), tmp_path)


def test_sizes_and_the_receipt(tiny_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    source = ModelSource(pq.quantize(tiny_model, "onnx:uint4-g32"), tokenizer)
    result = writer.write(source, tmp_path)
    sizes = writer.sizes(source)
    assert {name: (tmp_path / name).stat().st_size for name in sizes} == sizes
    assert set(sizes) | {receipt.NAME} == {path.name for path in tmp_path.iterdir()}
    assert set(sizes) == set(result["files"])
    assert result["targets"] == ["onnx:uint4-g32"]
    assert result["form"] == "genai"
    entry = source.entries[1]
    encoded = sum(memoryview(buffer).nbytes for buffer in writer.encode(source, entry))
    assert encoded == entry.numel // 2 + entry.numel // 32 * 4.5


def test_float_types(small: Any, folder: Path, tmp_path: Path) -> None:
    """Matrices keep their type; norms are widened, which loses nothing."""
    for dtype in ("float32", "float16", "bfloat16"):
        source = Tensors(small, folder, dtype=dtype)
        result = writer.write(source, tmp_path / dtype)
        records = {record["name"]: record for record in result["tensors"]}
        assert records["lm_head.weight"]["dtype"] == dtype
        assert records["lm_head.weight"]["exact"] == (dtype == "float32")
        assert records["model.norm.weight"]["dtype"] == "float32"
        assert records["model.norm.weight"]["exact"]


def test_projections_with_grids_of_their_own(tiny_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    recipe = Recipe({"*.v_proj": "onnx:uint8-g32", "*layers.1.mlp.up_proj": "float"}, default="onnx:int4-g32")
    pq.export(pq.quantize(tiny_model, recipe), tokenizer, tmp_path, format="onnx")
    stored = reader.read(tmp_path)
    assert stored["model.layers.0.self_attn.v_proj.weight"].stored_as == "MatMulNBits8"
    assert stored["model.layers.0.self_attn.k_proj.weight"].stored_as == "MatMulNBits4"
    assert stored["model.layers.1.mlp.up_proj.weight"].spec is None
    assert "model.layers.0.mlp.gate_up_proj.weight" in stored
    assert pq.verify(tmp_path).ok


def test_a_tied_table_is_stored_once(make_phi3: Callable[..., Any], folder: Path, tmp_path: Path) -> None:
    model = make_phi3(num_hidden_layers=1, tie_word_embeddings=True)
    writer.write(Tensors(model, folder, "onnx:int4-g32", "onnx:uint4-g32"), tmp_path)
    graph = onnx.load(tmp_path / writer.FILE, load_external_data=False).graph
    name = "model.embed_tokens.weight.codes"
    assert [t.name for t in graph.initializer].count(name) == 1
    assert sorted(node.op_type for node in graph.node if name in node.input) == ["MatMulNBits", "Reshape"]
    assert not any("lm_head" in t.name for t in graph.initializer)


def test_settings(tiny_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    tiny_model.generation_config.eos_token_id = [4091, 7]
    pq.export(tiny_model, tokenizer, tmp_path, format="onnx")
    settings = json.loads((tmp_path / writer.GENAI).read_text())
    assert settings["model"]["eos_token_id"] == [4091, 7]
    assert settings["model"]["type"] == "phi3"
    assert settings["model"]["decoder"]["head_size"] == 32
    assert settings["search"]["max_length"] == settings["model"]["context_length"] == 512
    assert reader.read_config(tmp_path)["num_key_value_heads"] == 2
    copied = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert copied["tokenizer_class"] != "GemmaTokenizer"


def test_accuracy_level(small: Any, folder: Path, tmp_path: Path) -> None:
    for level in (4, 1):
        writer.write(Tensors(small, folder, "onnx:int4-g32"), tmp_path, accuracy_level=level)
        graph = onnx.load(tmp_path / writer.FILE, load_external_data=False).graph
        nodes = [node for node in graph.node if node.op_type == "MatMulNBits"]
        assert len(nodes) == 4
        assert {a.i for node in nodes for a in node.attribute if a.name == "accuracy_level"} == {level}


def test_a_killed_run_continues(small: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Tensors(small, folder, "onnx:uint4-g32")
    writer.write(source, tmp_path / "whole")
    read, asked = source.read, []

    def stop(entry: Entry, rows: slice | None = None) -> Any:
        asked.append(entry.name)
        if len(asked) == 4:
            raise KeyboardInterrupt
        return read(entry, rows)

    monkeypatch.setattr(source, "read", stop)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        writer.write(source, out)
    assert sorted(path.name for path in out.iterdir()) == ["model.onnx.data.partial", "model.onnx.data.partial.json"]
    before = len(asked)
    writer.write(source, out)
    assert len(asked) - before == len(source.entries) - 3
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (out / path.name).read_bytes()
    assert {path.name for path in out.iterdir()} == {path.name for path in (tmp_path / "whole").iterdir()}


def test_the_source_is_not_trusted_blindly(small: Any, folder: Path, tmp_path: Path) -> None:
    source = Tensors(small, folder, "onnx:uint4-g32")
    name = "model.layers.0.mlp.down_proj.weight"
    good = source.tensors[name]
    scales, points = good.scales.clone(), good.zero_points.clone()
    scales[1, 1], points[2, 2] = torch.inf, 16
    source.tensors[name] = dataclasses.replace(good, scales=scales)
    with pytest.raises(PhiquantError, match=f"{name}: a scale is not finite"):
        writer.write(source, tmp_path)
    source.tensors[name] = dataclasses.replace(good, zero_points=points)
    with pytest.raises(PhiquantError, match=f"{name}: a zero point lies outside of uint4"):
        writer.write(source, tmp_path)
    source.tensors["model.embed_tokens.weight"][5, 6] = 1e30
    with pytest.raises(PhiquantError, match=r"embed_tokens.weight: the value at \[5, 6\] is .*too large for float16"):
        writer.write(source, tmp_path / "other")


def test_offsets_above_two_gigabytes() -> None:
    """A model of the size of Phi-4: its graph is small, and its places are where they should be."""
    from phiquant.formats.onnx.file import DataFile, Graph

    data, graph = DataFile("model.onnx.data"), Graph()
    places = [data.place(str(i), f"tensor{i}", "float32", (40_000, 5_120)) for i in range(20)]
    for place in places:
        graph.external(place, data)
    model = onnx.load_model_from_string(graph.serialize(21, 10))
    entries = [{e.key: e.value for e in t.external_data} for t in model.graph.initializer]
    assert [int(e["offset"]) for e in entries] == [i * 819_200_000 for i in range(20)]
    assert data.size == 20 * 819_200_000


@pytest.fixture
def export(small: Any, folder: Path, tmp_path: Path) -> Path:
    writer.write(Tensors(small, folder, "onnx:uint4-g32"), tmp_path / "out")
    return tmp_path / "out"


def damaged(out: Path, change: Callable[[Any], None]) -> None:
    model = onnx.load(out / writer.FILE, load_external_data=False)
    change(model.graph)
    (out / writer.FILE).write_bytes(model.SerializeToString())


def external(graph: Any, name: str, key: str, value: str) -> None:
    tensor = next(t for t in graph.initializer if t.name == name)
    next(e for e in tensor.external_data if e.key == key).value = value


CODES = "model.layers.0.mlp.down_proj.weight.codes"
HOSTILE: dict[str, tuple[str, Callable[[Any], None]]] = {
    "absolute": ("not the name of a file beside", lambda g: external(g, CODES, "location", "/etc/passwd")),
    "parent": ("not the name of a file beside", lambda g: external(g, CODES, "location", "../model.onnx.data")),
    "folder": ("not the name of a file beside", lambda g: external(g, CODES, "location", "a\\b")),
    "missing": ("no such file", lambda g: external(g, CODES, "location", "other.data")),
    "negative offset": ("lies at -4", lambda g: external(g, CODES, "offset", "-4")),
    "far offset": ("in model.onnx.data of", lambda g: external(g, CODES, "offset", "9" * 18)),
    "long offset": ("lies at 999", lambda g: external(g, CODES, "offset", "9" * 5000)),
    "wrong length": ("1 bytes, in model.onnx.data", lambda g: external(g, CODES, "length", "1")),
    "overlap": ("overlap in model.onnx.data at byte", lambda g: external(g, CODES, "offset", "64")),
    "giant shape": ("its shape", lambda g: tensor(g, CODES).dims.__setitem__(0, 1 << 62)),
    "negative shape": ("has the shape", lambda g: tensor(g, CODES).dims.__setitem__(0, -1)),
    "empty": ("has the shape", lambda g: tensor(g, CODES).dims.__setitem__(1, 0)),
    "unknown type": ("is of type", lambda g: setattr(tensor(g, CODES), "data_type", 9999)),
    "text": ("is of type string", lambda g: setattr(tensor(g, CODES), "data_type", 8)),
    "twice": ("occurs twice", lambda g: g.initializer.append(tensor(g, CODES))),
    "bits": ("do not fit the node MatMulNBits", lambda g: attribute(g, CODES, "bits", 3)),
    "block size": ("do not fit the node MatMulNBits", lambda g: attribute(g, CODES, "block_size", 0)),
    "giant block": ("do not fit the node MatMulNBits", lambda g: attribute(g, CODES, "block_size", 1 << 40)),
    "columns": ("do not fit the node MatMulNBits", lambda g: attribute(g, CODES, "K", 96)),
    "no reader": ("no node reads the codes", lambda g: user(g, CODES).input.__setitem__(1, "other")),
    "no scales": ("there are no scales", lambda g: setattr(tensor(g, CODES.replace("codes", "scales")), "name", "x")),
    "no names": ("has no weights under Hugging Face names", lambda g: g.ClearField("initializer")),
}  # fmt: skip


def tensor(graph: Any, name: str) -> Any:
    return next(t for t in graph.initializer if t.name == name)


def user(graph: Any, name: str) -> Any:
    return next(node for node in graph.node if name in node.input)


def attribute(graph: Any, name: str, key: str, value: int) -> None:
    next(a for a in user(graph, name).attribute if a.name == key).i = value


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_models_are_errors(case: str, export: Path) -> None:
    message, change = HOSTILE[case]
    damaged(export, change)
    with pytest.raises(PhiquantError, match=message) as caught:
        reader.read(export)
    assert str(export) in str(caught.value)


def test_damaged_files_are_errors(export: Path) -> None:
    model, data = (export / writer.FILE).read_bytes(), (export / writer.DATA).read_bytes()
    (export / writer.FILE).write_bytes(model[: len(model) // 2])
    with pytest.raises(PhiquantError, match=r"model\.onnx is not an ONNX model"):
        reader.read(export)
    (export / writer.FILE).write_bytes(model.replace(b"model.norm.weight", b"model.norm.\xff\xfe\xfd\xfc\xfb\xfa"))
    with pytest.raises(PhiquantError, match=r"model\.onnx: the name of tensor \d+, .* is not UTF-8"):
        reader.read(export)
    (export / writer.FILE).write_bytes(model)
    (export / writer.DATA).write_bytes(data[:-10])
    with pytest.raises(PhiquantError, match=f"of {len(data) - 10:,} bytes"):
        reader.read(export)
    (export / writer.DATA).write_bytes(b"")
    with pytest.raises(PhiquantError, match="of 0 bytes"):
        reader.read(export)
    shutil.rmtree(export)
    with pytest.raises(PhiquantError, match="no such file"):
        reader.read(export)


def test_grids_that_the_file_does_not_hold(export: Path) -> None:
    stored = reader.read(export)["model.layers.0.mlp.down_proj.weight"]
    for text, message in {
        "int4-g32-sym": "has zero points .*holds no int4-g32-sym",
        "uint4-g64-asym": "scales of one block differ",
        "uint3-g32-asym-f16": "codes .* do not fit uint3",
        "uint4-g32-asym-bf16": "is no bfloat16",
    }.items():
        with pytest.raises(PhiquantError, match=message):
            stored.digests(spec(text))
