"""GGUF files: every bit against gguf-py, what is refused, damaged files, and an interrupted export."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_cases import Tensors
from phiquant.errors import PhiquantError, UnsupportedModelError
from phiquant.formats import receipt
from phiquant.formats.gguf import reader as gguf_reader
from phiquant.formats.gguf import writer as gguf
from phiquant.formats.gguf.hf_names import hf_name
from phiquant.formats.gguf.names import gguf_name
from phiquant.formats.gguf.tokenizer import model_name
from phiquant.formats.gguf.vocab import Vocabulary
from phiquant.formats.source import Entry
from phiquant.models import phi
from phiquant.models.rope import read_rope
from phiquant.spec import QuantSpec
from phiquant.spec import spec as read_spec
from phiquant.tensor import QuantizedTensor

gguf_py = pytest.importorskip("gguf")

# spec -> the type that holds it: exactly, by widening the codes and repeating the scales
EXACT = {
    "gguf:Q4_0": "Q4_0",
    "gguf:Q4_1": "Q4_1",
    "gguf:Q8_0": "Q8_0",
    "int3-g32-sym-f16": "Q4_0",
    "int3-g64-signmax-f16": "Q4_0",
    "int4-g128-sym-f16": "Q4_0",
    "int4-channel-sym-f16": "Q4_0",
    "int2-tensor-sym-f16": "Q4_0",
    "uint2-g32-min-f16": "Q4_1",
    "uint4-g64-min-f16": "Q4_1",
    "int5-g32-sym-f16": "Q5_0",
    "uint5-g32-min-f16": "Q5_1",
    "ternary-g32-sym-f16": "Q4_0",
    "iq4nl-g64-signmax-f16": "IQ4_NL",
    "fp4_e2m1-channel-sym-e8m0": "MXFP4",
    "fp4_e2m1-g64-sym-e4m3": "NVFP4",
    "int8-channel-sym-f16": "Q8_0",
    "int6-tensor-sym-f16": "Q8_0",
}


@pytest.fixture
def folder(tokenizer: Any, tmp_path: Path) -> Path:
    """The tokenizer's files."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.fixture
def small(make_phi3: Any) -> Any:
    """One layer, whose vocabulary is the tokenizer's."""
    return make_phi3(num_hidden_layers=1, hidden_size=128, intermediate_size=128)


@pytest.mark.parametrize(("text", "kind"), EXACT.items())
def test_codes_come_back(text: str, kind: str, small: Any, folder: Path, tmp_path: Path) -> None:
    """Codes and parameters by digest, values by gguf-py's decode: bit for bit."""
    source = Tensors(small, folder, layers=text)
    records = {r["name"]: r for r in gguf.write(source, tmp_path / "out")["tensors"]}
    stored = gguf_reader.read(tmp_path / "out" / gguf.FILE)
    assert set(records) == set(stored) == set(source.tensors)
    for name, value in source.tensors.items():
        spec = value.spec if isinstance(value, QuantizedTensor) else None
        assert stored[name].digests(spec).items() <= records[name].items()
        assert np.array_equal(stored[name].values(), stored[name].reference())
        if spec is None:
            continue
        assert records[name]["stored_as"] == stored[name].stored_as == kind
        assert np.array_equal(stored[name].reference(), value.dequantize().numpy())
        read = stored[name].quantized(spec)
        assert torch.equal(read.codes, value.codes)
        assert torch.equal(read.scales, value.scales)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_floats_come_back(dtype: str, small: Any, folder: Path, tmp_path: Path) -> None:
    source = Tensors(small, folder, dtype=dtype)
    records = {r["name"]: r for r in gguf.write(source, tmp_path / "out")["tensors"]}
    for name, stored in gguf_reader.read(tmp_path / "out" / gguf.FILE).items():
        value = source.tensors[name]
        kept = value if value.dim() == 1 else value.to(getattr(torch, dtype))
        assert np.array_equal(stored.reference(), kept.float().numpy())
        assert np.array_equal(stored.values(), kept.float().numpy())
        assert records[name]["exact"] == bool((kept == value).all())
        assert records[name]["dtype"] == ("float32" if value.dim() == 1 else dtype)
        assert stored.digests(None)["values"] == records[name]["values"]


def test_mixture_with_tables(small: Any, folder: Path, tmp_path: Path) -> None:
    """Embedding and head quantized in another type than the layers."""
    gguf.write(Tensors(small, folder, layers="gguf:Q4_1", tables="gguf:Q8_0"), tmp_path)
    kinds = {name: t.stored_as for name, t in gguf_reader.read(tmp_path / gguf.FILE).items()}
    assert kinds["model.embed_tokens.weight"] == kinds["lm_head.weight"] == "Q8_0"
    assert kinds["model.layers.0.mlp.down_proj.weight"] == "Q4_1"
    assert kinds["model.norm.weight"] == "F32"


def test_container(small: Any, folder: Path, tmp_path: Path) -> None:
    """Types of the keys (llama.cpp checks them), order and places of the tensors, padding."""
    gguf.write(Tensors(small, folder, layers="gguf:Q4_0"), tmp_path)
    reader = gguf_py.GGUFReader(tmp_path / gguf.FILE)
    kinds = gguf_py.GGUFValueType
    expected = {
        "general.architecture": (kinds.STRING, "phi3"),
        "general.file_type": (kinds.UINT32, 2),
        "phi3.context_length": (kinds.UINT32, 512),
        "phi3.embedding_length": (kinds.UINT32, 128),
        "phi3.block_count": (kinds.UINT32, 1),
        "phi3.feed_forward_length": (kinds.UINT32, 128),
        "phi3.attention.head_count": (kinds.UINT32, 4),
        "phi3.attention.head_count_kv": (kinds.UINT32, 2),
        "phi3.attention.layer_norm_rms_epsilon": (kinds.FLOAT32, np.float32(1e-5)),
        "phi3.rope.dimension_count": (kinds.UINT32, 32),
        "phi3.rope.freq_base": (kinds.FLOAT32, 10000.0),
        "tokenizer.ggml.model": (kinds.STRING, "gpt2"),
        "tokenizer.ggml.pre": (kinds.STRING, "granite-embed-multi-97m"),
        "tokenizer.ggml.eos_token_id": (kinds.UINT32, 4091),
        "tokenizer.ggml.eot_token_id": (kinds.UINT32, 4095),
        "tokenizer.ggml.add_bos_token": (kinds.BOOL, False),
    }
    for key, (kind, value) in expected.items():
        assert reader.fields[key].types == [kind], key
        assert reader.fields[key].contents() == value, key
    assert len(reader.fields["tokenizer.ggml.tokens"].contents()) == 4096
    assert "tokenizer.chat_template" in reader.fields
    assert "phi3.rope.scaling.attn_factor" not in reader.fields
    end = reader.data_offset
    for tensor in reader.tensors:
        assert tensor.data_offset == end
        end += -(-tensor.n_bytes // 32) * 32
    assert (tmp_path / gguf.FILE).stat().st_size == end


def test_metadata_reads_back(small: Any, folder: Path, tmp_path: Path) -> None:
    gguf.write(Tensors(small, folder), tmp_path)
    metadata = gguf_reader.read_metadata(tmp_path / gguf.FILE)
    assert metadata["general.architecture"] == "phi3"
    assert metadata["tokenizer.ggml.tokens"][4095] == "<|end|>"


def test_tied_embeddings_have_no_head(make_phi3: Any, folder: Path, tmp_path: Path) -> None:
    model = make_phi3(num_hidden_layers=1, tie_word_embeddings=True)
    gguf.write(Tensors(model, folder, tables="gguf:Q4_0"), tmp_path)
    stored = gguf_reader.read(tmp_path / gguf.FILE)
    assert "lm_head.weight" not in stored
    assert stored["model.embed_tokens.weight"].stored_as == "Q4_0"


def test_names_are_each_others_inverse(small: Any) -> None:
    for name, _ in phi.tensors(small.config.to_dict()):
        assert hf_name(gguf_name(name)) == name
    with pytest.raises(PhiquantError, match=r"self_attn\.qkv_proj\.lora_A"):
        gguf_name("model.layers.0.self_attn.qkv_proj.lora_A.weight")


LONG = {"short_factor": [1.0] * 16, "long_factor": [2.0] * 16}


def _config(**changes: Any) -> dict[str, Any]:
    base = {
        "model_type": "phi3", "vocab_size": 4096, "hidden_size": 128, "intermediate_size": 256,
        "num_hidden_layers": 1, "num_attention_heads": 4, "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
    }  # fmt: skip
    return {**base, **changes}


def test_rope_has_two_spellings() -> None:
    old = read_rope(_config(rope_theta=5e5, rope_scaling={"type": "longrope", **LONG}))
    parameters = {"rope_type": "longrope", "rope_theta": 5e5, "original_max_position_embeddings": 4096, **LONG}
    new = read_rope(_config(original_max_position_embeddings=None, rope_parameters=parameters))
    assert old == new
    assert old.attention_factor == pytest.approx(1.190238, abs=1e-6)
    assert (old.theta, old.dimensions, old.original_context) == (5e5, 32, 4096)
    partial = read_rope(_config(partial_rotary_factor=0.75))
    assert (partial.dimensions, partial.long) == (24, None)


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"type": "linear", "factor": 4.0}, "RoPE of type 'linear'"),
        ({"type": "longrope", "long_factor": [1.0] * 16}, "short_factor must be a list of 16"),
        ({"type": "longrope", "long_factor": [1.0] * 3, "short_factor": [1.0] * 16}, "long_factor must be"),
    ],
)
def test_unknown_rope_is_refused(scaling: dict[str, Any], message: str) -> None:
    with pytest.raises(PhiquantError, match=message):
        read_rope(_config(rope_scaling=scaling))


def test_sliding_window_is_written_with_a_warning(make_phi3: Any, folder: Path, tmp_path: Path) -> None:
    model = make_phi3(num_hidden_layers=1, sliding_window=200)
    result = gguf.write(Tensors(model, folder), tmp_path)
    assert "ignores the sliding window of 200" in result["warnings"][0]
    assert gguf_reader.read_metadata(tmp_path / gguf.FILE)["phi3.attention.sliding_window"] == 200


@pytest.mark.parametrize(
    ("text", "shape", "message"),
    [
        ("int4-g32-sym", (64, 64), r"the scales are float32, and Q4_0 stores float16.*'int4-g32-sym-f16'.*Q4_0"),
        ("int8-channel-sym-bf16", (64, 64), r"bfloat16, and Q8_0 stores float16.*'int8-channel-sym-f16'"),
        ("int4-g32-signmax", (64, 64), r"Nearest that can: 'gguf:Q4_0'"),
        ("uint4-g32-asym-f16", (64, 64), r"no integer zero points.*'gguf:Q4_1'"),
        ("uint8-g32-min-f16", (64, 64), r"has codes of int8, not of uint8.*'gguf:Q8_0'"),
        ("int4-g16-sym-f16", (64, 64), r"one scale per 32 values of a row, which g16.*'int4-g32-sym-f16'"),
        ("int4-channel1-sym-f16", (64, 64), r"which channel1 does not follow"),
        ("int4-g24-sym-f16", (64, 48), r"rows are made of blocks of 32.*gguf:BF16"),
    ],
)
def test_a_spec_gguf_cannot_hold_is_refused(text: str, shape: tuple[int, int], message: str) -> None:
    entry = Entry("model.layers.0.mlp.down_proj.weight", shape, read_spec(text))
    with pytest.raises(PhiquantError, match=message) as caught:
        gguf.check(entry)
    assert entry.name in str(caught.value)
    assert str(entry.spec) in str(caught.value)


def test_every_nearest_spec_can_be_held() -> None:
    for text in ("uint3-g32-asym", "uint6-channel-asym", "int4-g48-sym", "int7-token-sym", "int2-tensor-sym-bf16"):
        entry = Entry("lm_head.weight", (96, 96), read_spec(text))
        with pytest.raises(PhiquantError, match="Nearest that can") as caught:
            gguf.check(entry)
        nearest = str(caught.value).split("Nearest that can: '")[1].split("'")[0]
        gguf.check(dataclasses.replace(entry, spec=read_spec(nearest)))


def _refused(source: Tensors, out: Path, message: str, kind: type[Exception] = PhiquantError) -> None:
    """Writing `source` fails with `message` and leaves nothing that looks finished."""
    with pytest.raises(kind, match=message):
        gguf.write(source, out)
    assert not (out / gguf.FILE).exists()
    assert not (out / receipt.NAME).exists()


def test_bad_models_are_refused(small: Any, folder: Path, tmp_path: Path) -> None:
    good = Tensors(small, folder)
    _refused(Tensors(small, None), tmp_path, "came without one")
    _refused(Tensors(small, tmp_path / "nowhere"), tmp_path, r"no tokenizer\.json")

    other = Tensors(small, folder)
    other.config = {**good.config, "model_type": "phi", "architectures": ["PhiForCausalLM"]}
    _refused(other, tmp_path, "PhiForCausalLM is not supported", UnsupportedModelError)

    missing = Tensors(small, folder)
    missing.entries = missing.entries[:-1]
    _refused(missing, tmp_path, r"no tensor lm_head\.weight")

    other.config = {**good.config, "intermediate_size": 256}
    _refused(other, tmp_path, r"o_proj|gate_up_proj\.weight has the shape")


@pytest.mark.parametrize(("value", "message"), [(float("nan"), "repair"), (1e6, "too large for F16")])
def test_bad_values_are_refused(value: float, message: str, small: Any, folder: Path, tmp_path: Path) -> None:
    with torch.no_grad():
        small.lm_head.weight[7, 3] = value
    _refused(Tensors(small, folder), tmp_path, rf"lm_head\.weight: the value at \[7, 3\] is .*{message}")


def test_scales_that_are_not_finite_are_refused(small: Any, folder: Path, tmp_path: Path) -> None:
    source = Tensors(small, folder, layers="gguf:Q8_0")
    source.tensors["model.layers.0.mlp.down_proj.weight"].scales[3, 1] = float("inf")
    _refused(source, tmp_path, "down_proj.weight: a scale or minimum is not finite")


class Stops(Tensors):
    """Fails at its fifth tensor, once."""

    left = 4

    def read(self, entry: Entry, rows: slice | None = None) -> Any:
        self.left -= 1
        if self.left == -1:
            raise KeyboardInterrupt
        return super().read(entry, rows)


def test_an_interrupted_export_continues(small: Any, folder: Path, tmp_path: Path) -> None:
    whole = gguf.write(Tensors(small, folder, layers="gguf:Q4_0"), tmp_path / "whole")
    source = Stops(small, folder, layers="gguf:Q4_0")
    with pytest.raises(KeyboardInterrupt):
        gguf.write(source, tmp_path / "out")
    assert not (tmp_path / "out" / gguf.FILE).exists()
    seen: list[str] = []
    resumed = gguf.write(source, tmp_path / "out", progress=lambda name, done, total: seen.append(name))
    assert len(seen) == len(source.entries) - 4
    assert resumed == whole == receipt.read(tmp_path / "out")
    assert (tmp_path / "out" / gguf.FILE).read_bytes() == (tmp_path / "whole" / gguf.FILE).read_bytes()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [gguf.FILE, receipt.NAME]


def test_damaged_scales_are_found(small: Any, folder: Path, tmp_path: Path) -> None:
    """A scale that is stored many times must be the same everywhere."""
    text = "int8-channel-sym-f16"
    gguf.write(Tensors(small, folder, layers=text), tmp_path)
    path, name = tmp_path / gguf.FILE, "model.layers.0.self_attn.o_proj.weight"
    reader = gguf_py.GGUFReader(path, "r+")
    tensor = next(t for t in reader.tensors if t.name == gguf_name(name))
    tensor.data[5, 34] ^= 1  # second block of row 5: the first byte of its scale
    reader.data.flush()
    with pytest.raises(PhiquantError, match="row 5, group 0: scales of one block differ"):
        gguf_reader.read(path)[name].quantized(read_spec(text))


def test_a_tensor_is_not_read_as_another_spec(small: Any, folder: Path, tmp_path: Path) -> None:
    gguf.write(Tensors(small, folder, layers="gguf:Q4_0"), tmp_path)
    stored = gguf_reader.read(tmp_path / gguf.FILE)["model.layers.0.mlp.down_proj.weight"]
    for text, message in (("gguf:Q4_1", "does not hold"), ("int3-g32-sym-f16", r"codes -8\.\.")):
        with pytest.raises(PhiquantError, match=message):
            stored.digests(read_spec(text))


def test_truncated_and_damaged_files_are_refused(small: Any, folder: Path, tmp_path: Path) -> None:
    """Never a crash, a hang or another kind of error: the file is refused, or read."""
    gguf.write(Tensors(small, folder, layers="gguf:Q4_0"), tmp_path)
    whole = (tmp_path / gguf.FILE).read_bytes()
    bad = tmp_path / "bad.gguf"
    for length in (0, 3, 8, 23, 24, 60, 1000, 200_000, len(whole) - 40_000):
        bad.write_bytes(whole[:length])
        with pytest.raises(PhiquantError, match="not a whole GGUF file"):
            gguf_reader.read(bad)
    numbers = random.Random(0)
    table = whole.index(b"token_embd.weight")
    for _ in range(60):
        damaged = bytearray(whole)
        start = numbers.choice([8, 24, 24, table])  # counts, keys, tensor table
        for at in range(place := start + numbers.randrange(400), place + 8):
            damaged[at] = numbers.randrange(256)
        bad.write_bytes(damaged)
        try:
            gguf_reader.read(bad)
        except PhiquantError:
            continue


def test_the_name_follows_the_tokenizer() -> None:
    """llama.cpp strips the space after special tokens if the name holds "phi-3" or "phi3"."""
    plain = Vocabulary("gpt2", "gpt-4o", [], [])
    strips = Vocabulary("llama", "default", [], [], strips_after_special=True)
    assert model_name("phi3-tiny", plain) == "phi-tiny"
    assert model_name("My-Phi-3-and-PHI3-merge", plain) == "My-Phi-and-PHI-merge"
    assert model_name("", plain) == "Phi"
    assert model_name("Phi-3.5-mini-instruct", strips) == "Phi-3.5-mini-instruct"
    assert model_name("my-model", strips) == "my-model (Phi-3)"


def test_widening_keeps_the_spec(small: Any) -> None:
    """type_for depends on nothing but spec and shape, so a plan made beforehand is what is written."""
    for text, kind in EXACT.items():
        spec: QuantSpec = read_spec(text)
        assert gguf.storage_type(Entry("lm_head.weight", (4096, 128), spec)).name == kind
