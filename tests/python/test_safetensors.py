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
from phiquant.formats.safetensors import folder as safetensors_folder
from phiquant.formats.safetensors import reader as safetensors_reader
from phiquant.formats.safetensors import writer as safetensors
from phiquant.formats.safetensors.folder import ITEM_BYTES, cut, header
from phiquant.formats.safetensors.layout import CompressedTensors, check
from phiquant.formats.source import Entry
from phiquant.model_source import ModelSource
from phiquant.runtimes import transformers as runtime
from phiquant.spec import TARGETS, spec

IDS = torch.arange(48)[None] * 83 % 4096
MIXED = Recipe({"*.down_proj": "int8-channel-sym", "lm_head": "int8-g64-sym-f16"}, "int3-g64-sym-f16")
EMBEDDED = Recipe({"*embed_tokens": "int8-channel-sym"}, "safetensors:int4-g64")
MIXED_ASYM = Recipe(
    {"*.down_proj": "fp8_e4m3-channel-sym-bf16", "*.o_proj": "uint8-channel-asym"}, "uint4-g32-asym-f16"
)
GRIDS: dict[str, Any] = {
    **{
        name: name
        for name, one in TARGETS.items()
        if name.startswith("safetensors:") and one.spec and "w8a8" not in name
    },
    "int3-g32": "int3-g32-sym-f16",
    "int2-channel-bf16": "int2-channel-sym-bf16",
    "int6-g32": "int6-g32-sym-f16",
    "uint3-channel": "uint3-channel-asym-bf16",
    "uint7-g32": "uint7-g32-asym",
    "int4-asym": "int4-g32-asym-f16",
    "uint8-tensor": "uint8-tensor-asym",
    "ternary": "ternary-g32-sym-f16",
    "mixed": MIXED,
    "mixed-asym": MIXED_ASYM,
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
            assert np.array_equal(tensor.parts(entry.spec, slice(2, 5))["codes"], value.codes[2:5].numpy())
            again = tensor.quantized(entry.spec)
            assert all(torch.equal(again.parameters[k].float(), v.float()) for k, v in value.parameters.items())


@pytest.mark.parametrize("bits", [4, 8])
def test_words_are_packed_as_compressed_tensors_packs_them(bits: int) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    generator = torch.Generator().manual_seed(0)
    low, high = -(1 << (bits - 1)), 1 << (bits - 1)
    codes = torch.randint(low, high, (18, 40), dtype=torch.int8, generator=generator)
    entry = Entry("model.layers.0.mlp.down_proj.weight", (18, 40), spec(f"uint{bits}-g8-asym-f16"))
    layout = CompressedTensors(random_config(), [entry])
    assert bytes(layout.codes(entry, (codes.short() - low).to(torch.uint8))) == bytes(
        pack_to_int32(codes, bits).numpy().data
    )
    zero = torch.randint(low, high, (18, 5), dtype=torch.int8, generator=generator)
    part = next(part for part in layout.parts(entry) if part.holds == "zero_points")
    packed = layout.parameter(entry, part, {"zero_points": zero.int() - low, "scales": torch.ones(18, 5)})
    assert bytes(packed) == bytes(pack_to_int32(zero, bits, packed_dim=0).contiguous().numpy().data)


def random_config(**options: Any) -> dict[str, Any]:
    config = pq.testing.random_phi3(num_hidden_layers=1, **options).config
    return {**json.loads(config.to_json_string()), "architectures": ["Phi3ForCausalLM"]}


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
    monkeypatch.setattr(safetensors_folder, "SHARD_BYTES", 1_100_000)
    source = written(tiny_model, tokenizer, tmp_path, "safetensors:int4-g32")
    names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert names == [f"model-{i:05}-of-00003.safetensors" for i in range(1, 4)]
    assert {name: (tmp_path / name).stat().st_size for name in safetensors.sizes(source)} == safetensors.sizes(source)
    assert relative_error(loaded(tmp_path), tiny_model) <= 1e-6


def test_config_names_what_is_quantized(tiny_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    written(tiny_model, tokenizer, tmp_path, MIXED)
    settings = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert settings["quant_method"] == "compressed-tensors"
    assert settings["format"] == "pack-quantized"
    assert settings["ignore"] == []
    by_target = {t: g for g in settings["config_groups"].values() for t in g["targets"]}
    assert by_target["model.layers.1.mlp.down_proj"]["format"] == "pack-quantized"
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
        ((64, 128), "uint4-g32-min-f16", "no float minimums", "safetensors:uint4-g32"),
        ((64, 64), "uint4-g128-min-f16", "no float minimums", "safetensors:uint4-g64"),
        ((64, 128), "int4-channel1-sym", "no scales per channel1", "safetensors:int4-g128"),
        ((64, 12), "int4-g12-sym", "rows have 12 values", "safetensors:int4-channel"),
        ((64, 128), "fp8_e5m2-channel-sym", "not fp8_e5m2", "safetensors:fp8-channel"),
        ((64, 128), "fp4_e2m1-g16-sym-e4m3/tensor", "no scales of two levels", "safetensors:nvfp4"),
        ((64, 128), "nf4-g64-sym", "not nf4", "safetensors:int4-g64"),
        ((64, 128), "int4-g32-sym-e4m3", "no float8_e4m3fn scales", "safetensors:int4-g32"),
        ((64,), "int8-tensor-sym", r"this one has shape \[64\]", "safetensors:BF16"),
    ],
)
def test_a_grid_that_does_not_fit_is_refused_with_the_nearest_that_does(
    shape: tuple[int, ...], text: str, reason: str, nearest: str
) -> None:
    with pytest.raises(PhiquantError, match=rf"a\.weight: .*{text}.*{reason}.*Nearest that can: '{nearest}'"):
        check(Entry("a.weight", shape, spec(text)))


def test_an_embedding_of_packed_floats_is_refused() -> None:
    message = r"embed_tokens\.weight: .* asks the embedding for its weight.*Nearest that can: 'safetensors:BF16'"
    with pytest.raises(PhiquantError, match=message):
        check(Entry("model.embed_tokens.weight", (64, 128), spec("safetensors:mxfp4")))


def test_slices_of_a_fused_linear_are_refused() -> None:
    with pytest.raises(PhiquantError, match=r"q_proj\.weight: .* the slices of a fused linear share one scheme"):
        check(Entry("model.layers.0.self_attn.q_proj.weight", (64, 128), spec("int4-g32-sym-f16")))


def test_every_item_is_aligned_whatever_the_shapes() -> None:
    sizes = [(6, 8), (10, 24), (2, 8), (14, 32), (2, 64)]
    entries = [Entry(f"{i}.weight", shape, spec("int4-g8-sym-f16")) for i, shape in enumerate(sizes)]
    entries += [Entry("f", (3,), None, "bfloat16"), Entry("g.weight", (6, 8), spec("fp8_e4m3-channel-sym"))]
    layout, found = CompressedTensors(random_config(), entries), []
    for shard in cut(entries, layout, 1 << 20):
        parts = [part for entry in shard for part in layout.parts(entry)]
        head = header(parts, layout.metadata)
        assert len(head) % 8 == 0
        table = json.loads(head[8:])
        for part in parts:
            begin, end = table[part.name]["data_offsets"]
            assert begin % ITEM_BYTES[part.dtype] == 0
            assert end - begin == part.nbytes
        found += [entry.name for entry in shard]
    assert found == [entry.name for entry in entries]


def rounded_per_token(x: torch.Tensor, kind: str) -> torch.Tensor:
    """Inputs as compressed-tensors rounds them: a scale per token, the range's half of the absolute largest."""
    half = 127.5 if kind == "int8" else 448.0
    scale = x.abs().amax(-1, keepdim=True) / half
    if kind == "int8":
        return (x / scale).round().clamp(-128, 127) * scale
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@torch.no_grad()
def test_w8a8_rounds_inputs_per_token_and_is_exact_without(
    tiny_model: Any, tokenizer: Any, tmp_path: Path, kind: str
) -> None:
    target = TARGETS[f"safetensors:w8a8-{kind}"]
    source = ModelSource(pq.quantize(tiny_model, target.spec), tokenizer)
    safetensors.write(source, tmp_path, activations=target.activations)
    plain, default = tiny_model(IDS).logits, loaded(tmp_path)(IDS).logits
    if kind == "int8":
        exact = torch.tensor(runtime.logits(tmp_path, [IDS[0].tolist()])[0])
        assert float((exact - plain[0]).norm() / plain.norm()) <= 1e-6
    for name, module in tiny_model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(lambda _, args: (rounded_per_token(args[0], kind),))
    expected = tiny_model(IDS).logits
    assert float((default - expected).norm() / expected.norm()) <= 1e-6
    assert 1e-3 < float((default - plain).norm() / plain.norm()) < runtime.bar(safetensors_reader.read(tmp_path), False)


@pytest.mark.parametrize(
    ("what", "activations", "message"),
    [
        ("int4-g32-sym-f16", "int8-token-sym", "need weights of 8 bits of the same kind.*pack-quantized"),
        ("fp8_e4m3-channel-sym", "int8-token-sym", "need weights of 8 bits of the same kind.*float-quantized"),
        ("int8-channel-sym", "int8-tensor-sym", "rounds activations to int8-token-sym or fp8_e4m3-token-sym"),
        ("int8-channel-sym", "int4-token-sym", "rounds activations to int8-token-sym or fp8_e4m3-token-sym"),
    ],
)
def test_activations_that_do_not_go_with_the_weights(what: str, activations: str, message: str) -> None:
    entry = Entry("model.layers.0.mlp.down_proj.weight", (128, 128), spec(what))
    with pytest.raises(PhiquantError, match=message):
        CompressedTensors(random_config(), [entry], spec(activations))


def test_a_mixture_with_small_floats_runs_in_bfloat16_and_exactly_where_asked(
    tiny_model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    recipe = Recipe({"*.down_proj": "mxfp4", "*.o_proj": "int8-channel-sym"}, "int4-g32-sym-f16")
    receipt = safetensors.write(ModelSource(pq.quantize(tiny_model, recipe), tokenizer), tmp_path)
    assert "computes this mixture in bfloat16" in receipt["warnings"][0]
    assert relative_error(loaded(tmp_path), tiny_model) < 3e-2
    exact = torch.tensor(runtime.logits(tmp_path, [IDS[0].tolist()])[0])
    expected = tiny_model(IDS).logits[0]
    assert float((exact - expected).norm() / expected.norm()) <= 1e-6


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
