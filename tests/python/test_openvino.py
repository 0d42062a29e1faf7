"""The OpenVINO writer: what its bytes and its graph stand for, by OpenVINO itself and by the independent reader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import phiquant as pq
import pytest
import torch
from openvino_cases import EXACT, Grids, folded, kept, matrices
from phiquant import PhiquantError
from phiquant.formats.openvino import reader
from phiquant.formats.openvino import writer as openvino
from phiquant.formats.openvino.nodes import frequencies
from phiquant.formats.source import Entry
from phiquant.miniatures import miniature_config
from phiquant.models.rope import read_rope
from phiquant.spec import spec as read_spec
from phiquant.targets import TARGETS

# Every grid that has a form of its own in the file, and the type in which the CPU plugin keeps it.
GRIDS = {
    "int4-g32-signmax-f16": "i4", "uint4-g64-asym-f16": "u4", "int8-channel-sym": "i8", "uint8-channel-asym": "u8",
    "int8-g32-sym-f16": "i8", "uint8-g64-asym-f16": "u8", "uint2-g32-asym-f16": "u2", "int2-g32-signmax-f16": "u2",
    "nf4-g64-sym-f16": "nf4", "mxfp4": "f4e2m1", "nvfp4": "f4e2m1", "mxint8": "i8",
    "int3-g32-sym-f16": "i4", "uint3-g32-asym": "u4", "int6-g32-asym-bf16": "i8", "int5-channel-sym-bf16": "i8",
    "int4-tensor-sym": "i4", "uint4-channel-asym-f16": "u4", "q3.4": "i8", "q1.2": "i4",
    "ternary-g64-sym-f16": "u2", "binary-channel-absmean": "u2", "vsq4": "i4", "int4-g16-signmax-f16-int8/64": "i4",
    "fp8_e4m3-channel-sym-f16": "f32", "mxfp8_e5m2": "f32", "fp4_e1m2-g32-sym-f16": "f32",
    "iq4nl-g32-sym-f16": "f32", "iq4nl-g16-signmax-f16-int6/64": "f32", "fp4_e3m0-channel-sym": "f32",
    "codebook16-tensor-f16": "f32", "codebook16-row": "f32", "codebook256-tensor": "f32", "codebook4-g64": "f32",
    "codebook16-rows8-bf16": "f32", "int2-g32-asym-f16": "u2", "int4-row-asym": "i4",
}  # fmt: skip
LAYERS = -(-len(GRIDS) // 4)


def small(**config: Any) -> Any:
    """A random model with a vocabulary of 544."""
    return pq.testing.random_phi3(vocab_size=544, bos_token_id=1, eos_token_id=2, pad_token_id=2, **config)


@pytest.fixture(scope="module")
def tokenizer_dir(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def every_grid(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Grids, Path]:
    """(model, source, folder) of one model in which every matrix of a layer has another grid."""
    model = small(num_hidden_layers=LAYERS)
    names = matrices(LAYERS, head=False)[:-1]
    grids = dict(zip(names, [*GRIDS, *GRIDS][: len(names)], strict=True))
    grids |= {"model.embed_tokens.weight": "uint4-g32-asym-f16", "lm_head.weight": "int4-g128-signmax-f16"}
    source = Grids(model, tokenizer_dir, grids)
    out = tmp_path_factory.mktemp("every")
    openvino.write(source, out)
    return model, source, out


def _names(source: Grids) -> dict[str, list[str]]:
    """The weights of each grid."""
    result: dict[str, list[str]] = {}
    for entry in source.entries:
        if entry.spec is not None:
            result.setdefault(str(entry.spec), []).append(entry.name)
    return result


def test_every_grid_is_verified(every_grid: tuple[Any, Grids, Path]) -> None:
    """Codes and parameters by the reader; its values against those that OpenVINO folds, in verify()."""
    _, source, out = every_grid
    report = pq.verify(out)
    assert report.ok, str(report)
    assert len(report.tensors) == len(source.entries)


def test_openvino_folds_to_our_values(every_grid: tuple[Any, Grids, Path]) -> None:
    """The nodes of the file's own graph, folded by OpenVINO, against dequantize(): the same bits."""
    _, source, out = every_grid
    seen = set()
    for name, _, values in folded(out):
        assert values.dtype == np.float32
        assert np.array_equal(values, source.decoded(name)), f"{name}: {values}"
        seen.add(name)
    assert seen == {entry.name for entry in source.entries if len(entry.shape) == 2}


def test_codes_come_back(every_grid: tuple[Any, Grids, Path]) -> None:
    """On the spec they were written with, and on the file's own, which stands for the same values."""
    _, source, out = every_grid
    for name, stored in reader.read(out).items():
        if stored.spec is None:
            continue
        written = source.tensors[name]
        assert stored.quantized(written.spec).digests() == written.digests(), name
        assert np.array_equal(stored.quantized().dequantize().numpy(), source.decoded(name)), name


def test_the_cpu_plugin_keeps_the_codes(every_grid: tuple[Any, Grids, Path]) -> None:
    """The compiled model multiplies with weights of the file's types; what cannot be kept is expanded."""
    _, source, out = every_grid
    found = kept(out, EXACT)
    grids = {read_spec(text): kind for text, kind in GRIDS.items()} | {read_spec("int4-g128-signmax-f16"): "i4"}
    for entry in source.entries:
        if entry.spec is not None and entry.name in found:
            assert found[entry.name] == grids[entry.spec], f"{entry.name}: {entry.spec}"
    assert len(found) == 4 * LAYERS + 1


def test_two_runs_write_the_same_bytes(every_grid: tuple[Any, Grids, Path], tmp_path: Path) -> None:
    """Also the names of nodes, which OpenVINO counts through a process: this is the second export of this one."""
    _, source, out = every_grid
    openvino.write(source, tmp_path)
    for path in out.iterdir():
        if path.name != "receipt.json":
            assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


def test_sizes(every_grid: tuple[Any, Grids, Path]) -> None:
    _, source, out = every_grid
    found = {path.name: path.stat().st_size for path in out.iterdir() if path.name != "receipt.json"}
    assert openvino.sizes(source) == found


def test_every_target(tokenizer_dir: Path, tmp_path: Path) -> None:
    """Each target of the registry on some matrix; float targets on all."""
    targets = [target for target in TARGETS.values() if target.format == "openvino"]
    assert len(targets) >= 27
    coded = [target.name for target in targets if target.spec is not None]
    layers = -(-len(coded) // 4)
    model = small(num_hidden_layers=layers)
    grids = dict(zip(matrices(layers), coded, strict=False))
    openvino.write(Grids(model, tokenizer_dir, grids), tmp_path)
    report = pq.verify(tmp_path)
    assert report.ok, str(report)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_float_files(dtype: str, tokenizer_dir: Path, tmp_path: Path) -> None:
    source = Grids(small(num_hidden_layers=1), tokenizer_dir, {}, dtype)
    record = openvino.write(source, tmp_path)
    assert pq.verify(tmp_path).ok
    for name, _, values in folded(tmp_path):
        assert np.array_equal(values, source.decoded(name)), name
    kinds = {t["name"]: (t["dtype"], t["exact"]) for t in record["tensors"]}
    assert kinds["lm_head.weight"] == (dtype, dtype == "float32")
    assert kinds["model.norm.weight"] == ("float32", True)


def test_a_tied_embedding_is_stored_once(tokenizer_dir: Path, tmp_path: Path) -> None:
    model = small(num_hidden_layers=1, tie_word_embeddings=True)
    source = Grids(model, tokenizer_dir, {"model.embed_tokens.weight": "openvino:i4-g32"})
    openvino.write(source, tmp_path)
    uses = [kind for name, kind, _ in folded(tmp_path) if name == "model.embed_tokens.weight"]
    assert sorted(uses) == ["Gather", "MatMul"]
    assert (tmp_path / "openvino_model.bin").stat().st_size < 4 * sum(e.numel for e in source.entries[1:]) + 544 * 128
    assert kept(tmp_path, EXACT)["model.embed_tokens.weight"] == "i4"
    assert pq.verify(tmp_path).ok


def test_projections_with_grids_of_their_own(tokenizer: Any, tmp_path: Path) -> None:
    """q, k, v, gate and up as linears of their own in the graph."""
    model = pq.testing.random_phi3(num_hidden_layers=1)
    rules = {"*.v_proj": "openvino:i8-channel", "*.up_proj": "openvino:u4-g64"}
    pq.quantize(model, pq.Recipe(rules, default="openvino:i4-g32"))
    pq.export(model, tokenizer, tmp_path, "openvino")
    found = {name.rpartition("0.")[2]: kind for name, kind in kept(tmp_path, EXACT).items()}
    assert found["self_attn.q_proj.weight"] == found["mlp.gate_proj.weight"] == "i4"
    assert (found["self_attn.v_proj.weight"], found["mlp.up_proj.weight"]) == ("i8", "u4")
    result = pq.verify(tmp_path, run=True, windows=1).runtime
    assert result is not None
    assert result.ok, result


@pytest.mark.parametrize("name", ["phi-3-mini", "phi-3.5-mini", "phi-4-mini", "phi-4"])
def test_frequencies_are_those_of_transformers(name: str) -> None:
    """To the last bit: it counts in a long text."""
    from transformers import Phi3Config
    from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

    config = miniature_config(name)
    rope = read_rope(config)
    theirs = Phi3RotaryEmbedding(Phi3Config.from_dict(config)).inv_freq.numpy()
    assert np.array_equal(frequencies(rope, rope.short).reshape(-1), theirs)


@pytest.mark.parametrize(
    ("spec", "shape", "says"),
    [
        ("uint4-g32-min-f16", (64, 64), "a minimum in float is no zero point of OpenVINO; choose asym"),
        ("int4-channel1-sym", (64, 64), "no scale per channel1; choose groups or channel"),
        ("int4-rows8-sym", (64, 64), "no scale per rows8"),
        ("int4-channel-sym", (64, 63), "a row of 63 codes of i4 does not end with a byte; choose 8 bits"),
        ("int8-tensor-sym", (64,), "OpenVINO holds codes of matrices"),
    ],
)
def test_what_does_not_fit_is_refused(spec: str, shape: tuple[int, ...], says: str) -> None:
    with pytest.raises(PhiquantError, match=f"layer.weight: {spec} cannot be stored: .*{says}"):
        openvino.check(Entry("layer.weight", shape, read_spec(spec)))


def test_values_that_are_not_finite_are_refused(tokenizer_dir: Path, tmp_path: Path) -> None:
    model = small(num_hidden_layers=1)
    model.lm_head.weight.data[7, 3] = 1e30
    with pytest.raises(PhiquantError, match=r"lm_head.weight: the value at \[7, 3\] is 1.*too large for float16"):
        openvino.write(Grids(model, tokenizer_dir, {}, "float16"), tmp_path)
    assert not (tmp_path / "receipt.json").exists()
    assert not (tmp_path / "openvino_model.bin").exists()


def test_a_model_needs_its_tokenizer(tmp_path: Path) -> None:
    model = small(num_hidden_layers=1)
    with pytest.raises(PhiquantError, match="no tokenizer was given"):
        openvino.write(Grids(model, None, {}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


class _Killed(Exception):
    pass


class _Dying(Grids):
    """Dies when `at` is read; counts what was read before."""

    at: str | None = None

    def read(self, entry: Entry, rows: slice | None = None) -> Any:
        if entry.name == self.at:
            raise _Killed
        self.reads = [*getattr(self, "reads", []), entry.name]
        return super().read(entry, rows)


def test_a_killed_run_continues(tokenizer_dir: Path, tmp_path: Path) -> None:
    model = small(num_hidden_layers=2)
    grids = dict.fromkeys(matrices(2), "openvino:u4-g32")
    whole, out = tmp_path / "whole", tmp_path / "out"
    openvino.write(Grids(model, tokenizer_dir, grids), whole)
    source = _Dying(model, tokenizer_dir, grids)
    source.at = "model.layers.1.mlp.down_proj.weight"
    with pytest.raises(_Killed):
        openvino.write(source, out)
    assert {path.name for path in out.iterdir()} == {"openvino_model.bin.partial", "openvino_model.bin.partial.json"}
    source.at, source.reads = None, []
    openvino.write(source, out)
    assert source.reads[0] == "model.layers.1.mlp.down_proj.weight"
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {p.name: p.read_bytes() for p in whole.iterdir()}


@torch.no_grad()
def test_pieces_of_a_large_tensor(tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor that passes in many pieces has the bytes of one that passes whole; so has what the reader reads."""
    import phiquant.formats.source as sources
    import phiquant.formats.stored as stored

    model = small(num_hidden_layers=LAYERS)
    source = Grids(model, tokenizer_dir, dict(zip(matrices(LAYERS), GRIDS, strict=False)))
    openvino.write(source, tmp_path / "whole")
    monkeypatch.setattr(sources, "CHUNK_BYTES", 3 * 128 * 4)
    openvino.write(source, tmp_path / "pieces")
    assert (tmp_path / "whole/openvino_model.bin").read_bytes() == (tmp_path / "pieces/openvino_model.bin").read_bytes()
    monkeypatch.setattr(stored, "_CHUNK", 37 * 128)
    report = pq.verify(tmp_path / "pieces")
    assert report.ok, str(report)
