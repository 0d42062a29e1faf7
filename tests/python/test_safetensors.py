"""The compressed-tensors folder holds exactly our codes: by its own package, by transformers, by our reader."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import phiquant as pq
import pytest
import torch
from phiquant import PhiquantError, Recipe
from phiquant.formats import safetensors, safetensors_reader
from phiquant.formats.safetensors_layout import ITEM_BYTES, check, header, parts, shards
from phiquant.formats.source import Entry
from phiquant.model_source import ModelSource
from phiquant.spec import spec

IDS = torch.arange(48)[None] * 83 % 4096
MIXED = Recipe({"*.down_proj": "int8-channel-sym", "lm_head": "int8-g64-sym-f16"}, "int3-g64-sym-f16")
EMBEDDED = Recipe({"*embed_tokens": "int8-channel-sym"}, "safetensors:int4-g64")
GRIDS = {
    "int4-g32": "safetensors:int4-g32",
    "int4-g128": "safetensors:int4-g128",
    "int8-channel": "safetensors:int8-channel",
    "int3-g32": "int3-g32-sym-f16",
    "int2-channel-bf16": "int2-channel-sym-bf16",
    "int8-tensor": "int8-tensor-sym",
    "int6-g32": "int6-g32-sym-f16",
    "mixed": MIXED,
    "embedding": EMBEDDED,
}


def written(model: Any, tokenizer: Any, out: Path, what: Any = None) -> ModelSource:
    source = ModelSource(model if what is None else pq.quantize(model, what), tokenizer)
    safetensors.write(source, out)
    return source


def loaded(folder: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


@torch.no_grad()
def relative_error(model: Any, reference: Any) -> float:
    expected = reference(IDS).logits
    return float((model(IDS).logits.float() - expected).norm() / expected.norm())


@pytest.mark.parametrize("grid", GRIDS)
def test_transformers_computes_with_our_values(tiny_model: Any, tokenizer: Any, tmp_path: Path, grid: str) -> None:
    written(tiny_model, tokenizer, tmp_path, GRIDS[grid])
    model = loaded(tmp_path)
    assert relative_error(model, tiny_model) <= 1e-6
    for name, value in tiny_model.named_parameters():
        assert torch.equal(model.get_parameter(name), value), name


@pytest.mark.parametrize("grid", GRIDS)
def test_our_reader_and_compressed_tensors_decode_the_same(
    tiny_model: Any, tokenizer: Any, tmp_path: Path, grid: str
) -> None:
    source = written(tiny_model, tokenizer, tmp_path, GRIDS[grid])
    stored = safetensors_reader.read(tmp_path)
    assert set(stored) == {entry.name for entry in source.entries}
    for entry in source.entries:
        value = source.read(entry)
        tensor = stored[entry.name]
        assert tensor.shape == entry.shape
        expected = value.float() if isinstance(value, torch.Tensor) else value.dequantize()
        assert np.array_equal(tensor.values(), expected.numpy())
        assert np.array_equal(tensor.reference(), expected.numpy())
        if not isinstance(value, torch.Tensor):
            assert tensor.digests(entry.spec) == value.digests()
            assert np.array_equal(tensor.codes(slice(2, 5)), value.codes[2:5].numpy())


def test_words_are_packed_as_compressed_tensors_packs_them() -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    codes = torch.randint(-8, 8, (7, 40), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    ours = np.frombuffer(safetensors._int32(codes), np.int32).reshape(7, 5)
    assert np.array_equal(ours, pack_to_int32(codes, 4).numpy())


def test_a_model_loaded_in_bfloat16_is_near_the_grid_but_not_on_it(
    tiny_model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    written(tiny_model, tokenizer, tmp_path, "safetensors:int4-g32")
    assert 1e-4 < relative_error(loaded(tmp_path, dtype=torch.bfloat16), tiny_model) < 3e-2


@pytest.mark.parametrize("tied", [False, True])
def test_float_folders_hold_every_value(
    make_phi3: Callable[..., Any], tokenizer: Any, tmp_path: Path, tied: bool
) -> None:
    model = make_phi3(tie_word_embeddings=tied).bfloat16()
    source = written(model.float(), tokenizer, tmp_path)
    assert {entry.dtype for entry in source.entries} == {"bfloat16"}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config
    again = loaded(tmp_path)
    for name, value in model.named_parameters():
        assert torch.equal(again.get_parameter(name).float(), value), name


def test_a_tied_embedding_may_stay_float_but_not_be_packed(
    make_phi3: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    model = make_phi3(tie_word_embeddings=True)
    written(model, tokenizer, tmp_path, "safetensors:int4-g32")
    assert relative_error(loaded(tmp_path), model) <= 1e-6
    packed = make_phi3(tie_word_embeddings=True)
    recipe = Recipe({"*embed_tokens": "int8-channel-sym", "lm_head": "int8-channel-sym"})
    with pytest.raises(PhiquantError, match="share one weight, and Transformers cannot tie packed weights"):
        written(packed, tokenizer, tmp_path / "packed", recipe)


def test_large_models_get_several_files_and_an_index(
    tiny_model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safetensors, "SHARD_BYTES", 1_100_000)
    source = written(tiny_model, tokenizer, tmp_path, "safetensors:int4-g32")
    names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert names == [f"model-{i:05}-of-00003.safetensors" for i in range(1, 4)]
    assert {name: (tmp_path / name).stat().st_size for name in safetensors.sizes(source)} == safetensors.sizes(source)
    assert relative_error(loaded(tmp_path), tiny_model) <= 1e-6


def test_config_names_what_is_quantized(tiny_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    written(tiny_model, tokenizer, tmp_path, MIXED)
    settings = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert settings["quant_method"] == "compressed-tensors"
    assert settings["format"] == "mixed-precision"
    assert settings["ignore"] == []
    by_target = {t: g for g in settings["config_groups"].values() for t in g["targets"]}
    assert by_target["model.layers.1.mlp.down_proj"]["format"] == "int-quantized"
    assert by_target["model.layers.0.self_attn.qkv_proj"]["weights"]["num_bits"] == 4  # int3 in the int4 container
    assert by_target["lm_head"]["weights"]["group_size"] == 64


def test_one_grid_is_written_as_the_target_linear(tiny_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    written(tiny_model, tokenizer, tmp_path, "safetensors:int8-channel")
    settings = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert settings["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert settings["ignore"] == ["lm_head"]


@pytest.mark.parametrize(
    ("shape", "text", "reason", "nearest"),
    [
        ((64, 128), "uint4-g32-min-f16", "no float minimums", "safetensors:int4-g32"),
        ((64, 128), "uint4-g128-asym", "without zero points", "safetensors:int4-g128"),
        ((64, 64), "uint4-g128-asym", "without zero points", "safetensors:int4-g64"),
        ((64, 128), "uint8-channel-asym", "without zero points", "safetensors:int8-channel"),
        ((64, 128), "int4-channel1-sym", "no scales per channel1", "safetensors:int4-g32"),
        ((64, 12), "int4-g12-sym", "rows have 12 values", "safetensors:int8-channel"),
        ((64,), "int8-tensor-sym", r"this one has shape \[64\]", "safetensors:BF16"),
    ],
)
def test_a_grid_that_does_not_fit_is_refused_with_the_nearest_that_does(
    shape: tuple[int, ...], text: str, reason: str, nearest: str
) -> None:
    with pytest.raises(PhiquantError, match=rf"a\.weight: .*{text}.*{reason}.*Nearest that can: '{nearest}'"):
        check(Entry("a.weight", shape, spec(text)))


def test_every_item_is_aligned_whatever_the_shapes() -> None:
    sizes = [(3, 8), (5, 24), (1, 8), (7, 32), (2, 64)]
    entries = [Entry(f"{i}.weight", shape, spec("int4-g8-sym-f16")) for i, shape in enumerate(sizes)]
    entries += [Entry("f", (3,), None, "bfloat16"), Entry("g.weight", (3, 3), spec("int8-channel-sym"))]
    found = []
    for shard in shards(entries, 1 << 20):
        head = header(shard)
        assert len(head) % 8 == 0
        table = json.loads(head[8:])
        for part in (part for entry in shard for part in parts(entry)):
            begin, end = table[part.name]["data_offsets"]
            assert begin % ITEM_BYTES[part.dtype] == 0
            assert end - begin == part.nbytes
        found += [entry.name for entry in shard]
    assert found == [entry.name for entry in entries]


def test_a_tokenizer_that_is_missing(tiny_model: Any, tmp_path: Path) -> None:
    with pytest.raises(PhiquantError, match="no tokenizer was given"):
        safetensors.write(ModelSource(tiny_model, None), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_float_value_that_cannot_be_stored_is_named(tiny_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    with torch.no_grad():
        tiny_model.model.embed_tokens.weight[5, 6] = 1e6
    with pytest.raises(PhiquantError, match=r"embed_tokens\.weight: the value at \[5, 6\] is 1000000.0: too large for"):
        safetensors.write(ModelSource(tiny_model, tokenizer, "float16"), tmp_path)
    with torch.no_grad():
        tiny_model.model.embed_tokens.weight[5, 6] = torch.inf
    with pytest.raises(PhiquantError, match=r"the value at \[5, 6\] is inf: repair the checkpoint"):
        safetensors.write(ModelSource(tiny_model, tokenizer, "float32"), tmp_path)
