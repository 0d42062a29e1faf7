"""Every block type of GGUF: bits against llama.cpp's own dequantizers, both ways, and the grids each type holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ggml
import numpy as np
import phiquant as pq
import pytest
import torch
from gguf_cases import Tensors
from phiquant import stream
from phiquant.errors import PhiquantError
from phiquant.formats.gguf import reader as gguf_reader
from phiquant.formats.gguf import writer as gguf
from phiquant.formats.gguf.blocks import LAYOUTS, decode
from phiquant.formats.gguf.names import gguf_name
from phiquant.formats.gguf.pack import pack
from phiquant.formats.gguf.types import QUANTIZED, TYPES, GGMLType, misfit
from phiquant.formats.source import Entry
from phiquant.spec import spec as read_spec
from phiquant.statistics import Statistics
from phiquant.targets import TARGETS
from phiquant.tensor import QuantizedTensor

pytest.importorskip("xllamacpp")

ROWS, COLUMNS = 24, 512
NAMES = [kind.name for kind in QUANTIZED]


@pytest.fixture
def folder(tokenizer: Any, tmp_path: Path) -> Path:
    """The tokenizer's files."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def _weights(seed: int = 0) -> torch.Tensor:
    """Rows of usual weights, of large, tiny and one-sided ones, of zeros, and of one outlier."""
    w = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed)) * 0.02
    w[1] *= 1e4
    w[2] *= 1e-6
    w[3], w[4], w[5], w[6, ::32] = w[3].abs(), -w[4].abs(), 0, 0
    w[7, 11] = 30.0
    w[8, :256] = 0
    return w


def _blocks(kind: GGMLType, seed: int = 1) -> np.ndarray:
    """Random bytes: every bit pattern of codes and sub-scales, fp16 scales of all sizes; all zeros, all ones."""
    blocks = np.random.default_rng(seed).integers(0, 256, (3000, kind.block_bytes), dtype=np.uint8)
    blocks[0], blocks[1] = 0, 255
    return blocks


def _identical(a: np.ndarray, b: np.ndarray) -> bool:
    """Same values, NaN in the same places; the sign of zero counts."""
    same = (a == b) & (np.signbit(a) == np.signbit(b)) | np.isnan(a) & np.isnan(b)
    return bool(same.all())


def _solve(w: torch.Tensor, text: str, solver: str) -> QuantizedTensor:
    statistics = Statistics(COLUMNS)
    statistics.update(torch.randn(2048, COLUMNS, generator=torch.Generator().manual_seed(3)))
    return pq.quantize_tensor(w, text, solver=solver, statistics=statistics)


def _text(name: str) -> str:
    return str(TYPES[name].grid)


@pytest.mark.parametrize("solver", ["rtn", "mse", "gptq"])
def test_llama_cpp_decodes_what_we_do(solver: str) -> None:
    """Codes of every solver on every type's grid: packed, then decoded by llama.cpp, to the bit."""
    found = {name: _solve(_weights(), _text(name), solver) for name in NAMES}
    decoded = ggml.decode([(name, pack("w", qt, TYPES[name])) for name, qt in found.items()])
    for (name, qt), values in zip(found.items(), decoded, strict=True):
        assert np.array_equal(values.reshape(ROWS, COLUMNS), qt.dequantize().numpy()), name
        distance = (qt.dequantize() - _weights()).norm() / _weights().norm()
        assert distance < (0.6 if qt.spec.element.bits <= 2 else 0.2), name


def test_the_reader_decodes_every_bit_pattern_as_llama_cpp_does() -> None:
    blocks = [(kind.name, _blocks(kind)) for kind in QUANTIZED]
    with np.errstate(all="ignore"):
        for (name, data), theirs in zip(blocks, ggml.decode(blocks), strict=True):
            assert _identical(decode(name, data), theirs), name


def test_packing_is_the_inverse_of_reading() -> None:
    """Every bit of every block survives: read by numpy, packed again in C++."""
    for kind in QUANTIZED:
        layout, data = LAYOUTS[kind.name], _blocks(kind)
        if kind.name == "TQ1_0":  # many bytes stand for the same trits: as packing writes them
            codes = np.random.default_rng(2).integers(-1, 2, len(data) * 256).astype(np.int8).view(np.uint8)
            data = pq._C.pack_gguf("TQ1_0", codes, d=np.arange(len(data), dtype=np.uint16)).reshape(data.shape)
        block = layout.read(data)
        named = {"d": block.d, "m": block.m}
        words = {
            key: None if v is None else np.ascontiguousarray(v).view(np.uint16).ravel() for key, v in named.items()
        }
        named = {"scales": block.scales, "minimums": block.minimums}
        words |= {
            key: None if v is None else np.ascontiguousarray(v).view(np.uint8).ravel() for key, v in named.items()
        }
        codes = np.ascontiguousarray(block.codes).view(np.uint8).ravel()
        assert np.array_equal(pq._C.pack_gguf(kind.name, codes, **words).reshape(data.shape), data), kind.name


def test_tables_of_types_agree() -> None:
    """The writer's, the reader's, the guard's and gguf-py's."""
    constants = pytest.importorskip("gguf.constants")
    for kind in (*QUANTIZED, *TYPES.values()):
        number = constants.GGMLQuantizationType[kind.name]
        assert (number.value, constants.GGML_QUANT_SIZES[number]) == (kind.id, (kind.block, kind.block_bytes))
        assert gguf_reader.gguf_guard.BLOCKS[kind.id] == (kind.name, kind.block, kind.block_bytes)
        if kind.grid is not None:
            assert LAYOUTS[kind.name].spec == kind.grid == TARGETS[f"gguf:{kind.name}"].spec
    sizes = constants.GGML_QUANT_SIZES.items()  # of Q8_1, never in a file, gguf-py has the size of an older ggml
    known = {number.value: (number.name, *size) for number, size in sizes if number.name != "Q8_1"}
    assert all(gguf_reader.gguf_guard.BLOCKS[number] == row for number, row in known.items())


@pytest.fixture
def model(make_phi3: Callable[..., Any]) -> Any:
    """Five layers of four matrices, enough for every type."""
    return make_phi3(num_hidden_layers=5, hidden_size=256, intermediate_size=256)


def _matrices(model: Any) -> list[str]:
    return [name for name, value in model.state_dict().items() if value.dim() == 2 and ".layers." in name]


def test_every_type_in_one_file(model: Any, folder: Path, tmp_path: Path) -> None:
    """Digests by the independent reader, values by llama.cpp and by gguf-py, the tensors themselves."""
    names = dict(zip(_matrices(model), NAMES, strict=False))
    chosen = {name: _text(kind) for name, kind in names.items()}
    source = Tensors(model, folder, chosen)
    records = {r["name"]: r for r in gguf.write(source, tmp_path / "out")["tensors"]}
    stored = gguf_reader.read(tmp_path / "out" / gguf.FILE)
    decoded = ggml.decode([(stored[name].stored_as, stored[name].data) for name in names])
    for (name, kind), theirs in zip(names.items(), decoded, strict=True):
        value, tensor = source.tensors[name], stored[name]
        assert records[name]["stored_as"] == tensor.stored_as == ("TQ2_0" if kind == "TQ1_0" else kind)
        assert tensor.digests(value.spec).items() <= records[name].items()
        expected = value.dequantize().numpy()
        assert np.array_equal(theirs.reshape(expected.shape), expected), kind
        assert np.array_equal(tensor.values(), expected), kind
        assert np.array_equal(tensor.reference(), expected), kind
        back = tensor.quantized(value.spec)
        assert back.digests() == value.digests()
        assert torch.equal(tensor.quantized().dequantize(), value.dequantize())


def test_ternary_codes_have_two_types(model: Any, folder: Path, tmp_path: Path) -> None:
    source = Tensors(model, folder, "gguf:TQ1_0")
    name = "model.layers.0.mlp.down_proj.weight"
    for kind in ("TQ1_0", "TQ2_0"):
        out = tmp_path / kind
        assert gguf.sizes(source, ternary=kind) == {
            gguf.FILE: gguf.write(source, out, ternary=kind)["files"][gguf.FILE]["bytes"]
        }
        stored = gguf_reader.read(out / gguf.FILE)[name]
        assert stored.stored_as == kind
        assert stored.quantized(source.tensors[name].spec).digests() == source.tensors[name].digests()
    with pytest.raises(PhiquantError, match="ternary is one of TQ2_0, TQ1_0, not 'TQ3'"):
        gguf.write(source, tmp_path / "none", ternary="TQ3")  # type: ignore[arg-type]


def test_scale_of_the_whole_tensor(model: Any, folder: Path, tmp_path: Path) -> None:
    """NVFP4's second level: a tensor beside the matrix, a part of it when read. Not where llama.cpp ignores it."""
    source = Tensors(model, folder, {name: "nvfp4" for name in _matrices(model) if "self_attn" in name})
    receipt = gguf.write(source, tmp_path / "out")
    stored = gguf_reader.read(tmp_path / "out" / gguf.FILE)
    assert set(stored) == {r["name"] for r in receipt["tensors"]} == set(source.tensors)
    for record in receipt["tensors"]:
        value = source.tensors[record["name"]]
        if isinstance(value, QuantizedTensor):
            assert stored[record["name"]].digests(value.spec).items() <= record.items()
            assert stored[record["name"]].quantized().digests() == value.digests()
            np.testing.assert_array_max_ulp(stored[record["name"]].values(), value.dequantize().numpy(), 1)
    for name in ("model.embed_tokens", "model.layers.0.mlp.down_proj", "model.layers.0.mlp.gate_up_proj"):
        with pytest.raises(PhiquantError, match=r"llama\.cpp does not apply to the embedding, nor to a Phi-3's mlp"):
            gguf.check(Entry(f"{name}.weight", (4096, 256), read_spec("nvfp4")))


FINER = {
    "int2-g16-signmax-f16-int6/256": "Q3_K",
    "int3-g32-signmax-f16-int4/512": "Q3_K",
    "int4-g16-signmax-f16-int8/256": "Q6_K",
    "uint3-g32-min-f16-uint4/256": "Q4_K",
    "uint4-g64-min-f16-uint6/512": "Q4_K",
    "uint4-g32-min-f16-uint6/channel": "Q4_K",
    "uint1-g16-min-f16-uint3/256": "Q2_K",
    "iq4nl-g64-signmax-f16-int5/256": "IQ4_XS",
    "ternary-channel-sym-f16": "TQ2_0",
    "ternary-g512-absmean-f16": "TQ2_0",
    "ternary-g64-sym-f16": "Q4_0",
    "fp4_e2m1-g32-sym-e4m3": "NVFP4",
    "fp4_e2m1-g32-sym-e4m3/tensor": "NVFP4",
}


def test_what_a_type_holds_beside_its_own_grid(make_phi3: Any, folder: Path, tmp_path: Path) -> None:
    """Narrower codes and sub-scales, groups of several blocks: the same numbers, and the same digests."""
    model = make_phi3(num_hidden_layers=4, hidden_size=512, intermediate_size=512)
    attention, mlp = (sorted(n for n in _matrices(model) if part in n) for part in ("self_attn", "mlp"))
    chosen = dict(zip([*mlp, *attention], FINER, strict=False))
    source = Tensors(model, folder, chosen)
    records = {r["name"]: r for r in gguf.write(source, tmp_path / "out")["tensors"]}
    stored = gguf_reader.read(tmp_path / "out" / gguf.FILE)
    for name, text in chosen.items():
        value = source.tensors[name]
        assert stored[name].stored_as == FINER[text], text
        assert stored[name].digests(value.spec).items() <= records[name].items(), text
        if "tensor" not in text:
            assert np.array_equal(stored[name].reference(), value.dequantize().numpy()), text


@pytest.mark.parametrize(
    ("text", "columns", "message"),
    [
        ("uint4-g16-min-f16-uint6/256", 256, r"one scale per 32 values of a row, which g16.*'gguf:Q4_K'"),
        ("int4-g16-signmax-f16-int6/128", 256, r"super-blocks of 256 values, not of 128.*'gguf:Q6_K'"),
        ("uint2-g16-min-f16-uint6/256", 256, r"inner scales as uint4, not as uint6.*'gguf:Q2_K'"),
        ("q4_k", 256, ""),
        ("vsq4", 64, r"one level of scales.*'int4-g32-sym-f16'"),
        ("nf4-g64-sym-f16", 64, r"codes of int4, not of nf4.*'int4-g64-sym-f16'"),
        ("binary-channel-sym-f16", 64, r"codes of int4, not of binary"),
        ("fp4_e2m1-g16-sym-f16", 64, r"scales are float16, and MXFP4 stores float8_e8m0fnu.*'gguf:MXFP4'"),
        ("mxfp8_e4m3", 64, r"codes of int8, not of fp8_e4m3.*'gguf:Q8_0'"),
        ("fp4_e2m1-g16-sym-e4m3", 96, r"'gguf:MXFP4', stored as MXFP4"),
        ("ternary-g32-sym", 64, r"float32, and Q4_0 stores float16"),
    ],
)
def test_refusals_name_the_nearest_grid(text: str, columns: int, message: str) -> None:
    entry = Entry("model.layers.0.mlp.down_proj.weight", (64, columns), read_spec(text))
    if not message:
        return gguf.check(entry)
    with pytest.raises(PhiquantError, match=message) as caught:
        gguf.check(entry)
    nearest = str(caught.value).split("Nearest that can: '")[1].split("'")[0]
    gguf.check(dataclasses.replace(entry, spec=read_spec(nearest)))


def test_no_type_is_shadowed() -> None:
    """Each type's own grid goes to that type; only the two ternary ones share theirs."""
    for kind in QUANTIZED:
        assert kind.grid is not None
        holding = [other.name for other in QUANTIZED if not misfit(kind.grid, other, (1, 512))]
        assert holding[:2] == ["TQ2_0", "TQ1_0"] if kind.name.startswith("TQ") else holding[0] == kind.name


@pytest.mark.parametrize(
    ("name", "bits"), [("MXFP4", 0xFF), ("NVFP4", 0x7F), ("NVFP4", 0x81), ("Q6_K", 0x7C00), ("Q4_K", 0x7E00)]
)
def test_scales_that_are_no_numbers_are_refused(name: str, bits: int) -> None:
    qt = _solve(_weights(), _text(name), "rtn")
    values = qt.super_scales if qt.super_scales is not None else qt.scales
    assert values is not None
    values.view(torch.uint8 if values.element_size() == 1 else torch.int16)[3, 1] = bits
    with pytest.raises(PhiquantError, match=f"w: a scale or minimum is not finite.*{name} cannot store"):
        pack("w", qt, TYPES[name])


@pytest.mark.parametrize("name", NAMES)
def test_training_on_a_types_grid(name: str) -> None:
    """What training computes with is what is packed, and gradients reach the weights."""
    linear = torch.nn.Sequential(torch.nn.Linear(COLUMNS, ROWS, bias=False))
    with torch.no_grad():
        linear[0].weight.copy_(_weights())
    pq.prepare_qat(linear, f"gguf:{name}")
    x = torch.eye(COLUMNS)
    seen = linear(x)
    seen.sum().backward()
    assert (linear[0].weight.grad != 0).float().mean() > 0.5
    pq.convert(linear)
    qt = linear[0].quantized
    assert torch.equal(seen.detach().T, qt.dequantize())
    (decoded,) = ggml.decode([(name, pack("w", qt, TYPES[name]))])
    assert np.array_equal(decoded.reshape(ROWS, COLUMNS), qt.dequantize().numpy())


# llama.cpp can make these without statistics; NVFP4 and the ternary types ignore outliers in their own way.
def test_files_of_llama_cpps_quantizer_open(model: Any, folder: Path, tmp_path: Path) -> None:
    """Its codes in the file, ours out of it: as QuantizedTensors that decode as llama.cpp does."""
    gguf.write(Tensors(model, folder, {n: _text(k) for n, k in zip(_matrices(model), NAMES, strict=False)}), tmp_path)
    stored = gguf_reader.read(tmp_path / gguf.FILE)
    weights = {name: model.state_dict()[name].numpy() for name in _matrices(model)[: len(NAMES)]}
    jobs = [(stored[name].stored_as, w) for name, w in weights.items()]
    made = ggml.quantize(jobs)
    decoded = ggml.decode([(kind, data) for (kind, _), data in zip(jobs, made, strict=True)])
    places = {p.name: p for p in gguf_reader.gguf_guard.read_header(tmp_path / gguf.FILE).tensors}
    data = bytearray((tmp_path / gguf.FILE).read_bytes())
    for name, block in zip(weights, made, strict=True):
        place = places[gguf_name(name)]
        data[place.start : place.start + place.bytes] = block.tobytes()
    (tmp_path / "foreign.gguf").write_bytes(data)
    opened = gguf_reader.read(tmp_path / "foreign.gguf")
    for (name, w), theirs in zip(weights.items(), decoded, strict=True):
        qt = opened[name].quantized()
        assert np.array_equal(qt.dequantize().numpy(), theirs.reshape(w.shape)), opened[name].stored_as
        assert np.linalg.norm(qt.dequantize().numpy() - w) < 0.9 * np.linalg.norm(w)
        (again,) = [pack(name, qt, TYPES[opened[name].stored_as])]
        assert again.tobytes() == np.ascontiguousarray(opened[name].data).tobytes(), opened[name].stored_as


@pytest.mark.parametrize("kind", ["TQ1_0", "TQ2_0"])
def test_targets_of_one_grid_give_their_own_blocks(kind: str, tmp_path: Path) -> None:
    """Ternary codes have two containers; plan knows the size of the one that is asked for."""
    checkpoint = tmp_path / "checkpoint"
    model, tokenizer = pq.testing.miniature("phi-4")
    model.save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)
    receipt = stream.quantize_checkpoint(checkpoint, f"gguf:{kind}", tmp_path / "out")
    assert kind in {tensor["stored_as"] for tensor in receipt["tensors"]}
    assert stream.plan(checkpoint, f"gguf:{kind}").bytes == (tmp_path / "out" / "model.gguf").stat().st_size
