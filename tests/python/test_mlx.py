"""The MLX folder holds exactly our codes: by mx.dequantize, by mlx-lm's own model, by our reader."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import phiquant as pq
import pytest
import torch
from phiquant import PhiquantError, Recipe
from phiquant.formats.mlx import reader as mlx_reader
from phiquant.formats.mlx import writer as mlx
from phiquant.formats.mlx.layout import MLX, check
from phiquant.formats.safetensors import reader as safetensors_reader
from phiquant.formats.source import Entry
from phiquant.model_source import ModelSource
from phiquant.models.rope import read_rope
from phiquant.runtimes import mlx as runtime
from phiquant.spec import TARGETS, spec

mx = pytest.importorskip("mlx.core", reason="mlx has wheels for Linux and macOS alone")
pytest.importorskip("mlx_lm", reason="mlx-lm needs Python 3.11")

IDS = list(range(5, 3000, 73))
GRIDS = [
    *(name for name, one in TARGETS.items() if name.startswith("mlx:") and one.spec),
    "uint4-g64-min-bf16", "uint5-g32-min-f32", "uint7-g64-min-f16", "int3-g32-sym-bf16", "int6-channel-sym-f16",
    "int8-tensor-sym-f16", "int4-row-sym-f16", "int4-g128-sym-bf16", "uint4-g64-asym-f16", "uint3-channel-asym-bf16",
    "int4-g32-asym-f16", "ternary-g64-sym-f16",
]  # fmt: skip
EVERYTHING = {"*embed_tokens": "mlx:8bit-g64", "*lm_head": "mlx:6bit-g64"}


def written(model: Any, tokenizer: Any, out: Path, what: Any = None, **options: Any) -> ModelSource:
    source = ModelSource(model if what is None else pq.quantize(model, what), tokenizer)
    mlx.write(source, out, **options)
    return source


def relative_error(folder: Path, reference: Any, ids: list[int] = IDS) -> float:
    """Of mlx-lm's logits in float32, in this process: a worker of its own is tested apart."""
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    model.set_dtype(mx.float32)
    with torch.no_grad():
        expected = reference(torch.tensor([ids])).logits[0].numpy()
    return float(np.linalg.norm(np.array(model(mx.array([ids]))[0]) - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("grid", GRIDS)
def test_mlx_and_our_reader_decode_our_values(tiny_model: Any, tokenizer: Any, tmp_path: Path, grid: str) -> None:
    source = written(tiny_model, tokenizer, tmp_path, grid)
    stored = mlx_reader.read(tmp_path)
    assert set(stored) == {entry.name for entry in source.entries}
    for entry in source.entries:
        value, tensor = source.read(entry), stored[entry.name]
        assert tensor.shape == entry.shape
        if isinstance(value, torch.Tensor):
            assert np.array_equal(tensor.values(), value.float().numpy())
            continue
        expected = value.dequantize().numpy()
        assert np.array_equal(tensor.values(), expected)
        assert np.array_equal(tensor.reference(), expected)
        assert tensor.digests(entry.spec) == value.digests()
        assert torch.equal(tensor.quantized().dequantize(), value.dequantize())  # in the file's own words
    assert relative_error(tmp_path, tiny_model) <= 1e-5


@pytest.mark.parametrize(("mode", "bits", "size"), [("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)])
def test_every_pattern_of_scale_and_small_float_decodes_as_mlx_decodes_it(mode: str, bits: int, size: int) -> None:
    generator = np.random.default_rng(0)
    codes = generator.integers(0, 1 << bits, (255, 4 * size), dtype=np.uint8)
    codes[:, : 1 << bits] = np.arange(min(1 << bits, 4 * size), dtype=np.uint8)
    scales = np.repeat(np.arange(255, dtype=np.uint8)[:, None], 4, axis=1)
    words = pq.ops.pack_bits(torch.from_numpy(codes), bits).numpy().view(np.uint32).reshape(255, -1)
    options = {"group_size": size, "bits": bits, "mode": mode, "dtype": mx.float32}
    expected = np.array(mx.dequantize(mx.array(words), mx.array(scales), **options))
    grid = TARGETS[f"mlx:{mode}"].spec
    assert grid is not None
    ours = pq.QuantizedTensor(
        torch.from_numpy(codes), torch.from_numpy(scales).view(getattr(torch, grid.scale_dtype)), None, None, grid
    )
    assert np.array_equal(ours.dequantize().numpy(), expected, equal_nan=True)


def test_words_are_those_of_mlx(tmp_path: Path) -> None:
    for bits in (2, 3, 4, 5, 6, 8):
        weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(bits))
        words, scales, biases = mx.quantize(mx.array(weight.numpy()), group_size=64, bits=bits)
        codes = torch.tensor(
            np.rint((weight.numpy().reshape(8, 2, 64) - np.array(biases)[..., None]) / np.array(scales)[..., None])
        )
        codes = codes.clamp(0, (1 << bits) - 1).to(torch.uint8).reshape(8, 128)
        entry = Entry("lm_head.weight", (8, 128), spec(f"uint{bits}-g64-min-f16"))
        layout = MLX(random_config(), [entry])
        assert bytes(layout.codes(entry, codes)) == np.array(words).tobytes()


def random_config(**options: Any) -> dict[str, Any]:
    config = pq.testing.random_phi3(num_hidden_layers=1, **options).config
    return {**json.loads(config.to_json_string()), "architectures": ["Phi3ForCausalLM"]}


@pytest.mark.parametrize(
    "what", [None, "mlx:4bit-g64", Recipe({"*embed_tokens": "mlx:6bit-g64", "*lm_head": "mlx:6bit-g64"}, "mlx:mxfp4")]
)
def test_a_tied_embedding_is_stored_once(
    make_phi3: Callable[..., Any], tokenizer: Any, tmp_path: Path, what: Any
) -> None:
    model = make_phi3(tie_word_embeddings=True)
    written(model, tokenizer, tmp_path, what)
    assert "lm_head.weight" not in mlx_reader.read(tmp_path)
    assert relative_error(tmp_path, model) <= 1e-5


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_float_folders_hold_every_value(tiny_model: Any, tokenizer: Any, tmp_path: Path, name: str) -> None:
    dtype = TARGETS[f"mlx:{name}"].float_dtype
    model = rounded(tiny_model, dtype)
    source = ModelSource(model, tokenizer, dtype)
    mlx.write(source, tmp_path)
    assert {tensor.stored_as for tensor in mlx_reader.read(tmp_path).values()} == {name}
    assert relative_error(tmp_path, model) <= 1e-5


@pytest.mark.parametrize(
    "options", [{"partial_rotary_factor": 0.5}, {"num_key_value_heads": 4}, {"num_key_value_heads": 1}]
)
def test_partial_rotary_and_grouped_queries(
    make_phi3: Callable[..., Any], tokenizer: Any, tmp_path: Path, options: dict[str, Any]
) -> None:
    model = make_phi3(**options)
    written(model, tokenizer, tmp_path, "mlx:4bit-g32")
    assert relative_error(tmp_path, model) <= 1e-5


def rounded(model: Any, dtype: str) -> Any:
    """The model with parameters that `dtype` holds. (model.to(dtype) would round RoPE's frequencies too.)"""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(getattr(torch, dtype)))
    return model


def long_rope(make_phi3: Callable[..., Any]) -> Any:
    short, long = [1.0 + 0.02 * i for i in range(12)], [1.5 + 0.4 * i for i in range(12)]
    parameters = {
        "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75, "short_factor": short,
        "long_factor": long, "original_max_position_embeddings": 64,
    }  # fmt: skip
    return make_phi3(
        max_position_embeddings=1024, original_max_position_embeddings=64, rope_parameters=parameters,
        partial_rotary_factor=0.75,
    )  # fmt: skip


@pytest.mark.parametrize("factors", ["long", "short"])
def test_long_rope_is_right_on_the_side_that_was_chosen(
    make_phi3: Callable[..., Any], tokenizer: Any, tmp_path: Path, factors: str
) -> None:
    model = long_rope(make_phi3)
    source = ModelSource(model, tokenizer)
    receipt = mlx.write(source, tmp_path, long_factors=factors)
    assert any(
        "mlx-lm uses LongRoPE's long" in w if factors == "long" else "short factors stand in" in w
        for w in receipt["warnings"]
    )
    within, beyond = IDS, (IDS * 4)[:120]
    good, bad = (beyond, within) if factors == "long" else (within, beyond)
    assert relative_error(tmp_path, model, good) <= 1e-5
    assert relative_error(tmp_path, model, bad) > 1e-2
    assert read_rope(mlx_reader.read_config(tmp_path)) == read_rope(source.config)  # the model's own, either way


def test_an_attention_factor_of_its_own_is_refused(
    make_phi3: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    config = json.loads(long_rope(make_phi3).config.to_json_string())
    config["rope_parameters"]["attention_factor"] = 1.5
    with pytest.raises(PhiquantError, match=r"attention factor 1\.29\d* .* the model's is 1\.5"):
        MLX(config, [])
    with pytest.raises(PhiquantError, match="long_factors is 'long' or 'short', not 'both'"):
        MLX(config, [], "both")


def test_a_sliding_window_is_warned_of(make_phi3: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> None:
    model = make_phi3(sliding_window=16)
    source = ModelSource(model, tokenizer)
    assert "mlx-lm ignores sliding_window 16" in mlx.write(source, tmp_path)["warnings"][0]
    assert relative_error(tmp_path, model, IDS[:16]) <= 1e-5
    assert relative_error(tmp_path, model) > 1e-3


def test_every_exception_is_listed(tiny_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    recipe = Recipe(
        {
            "*layers.0.mlp.down_proj": "mlx:8bit-g32",
            "*o_proj": "mlx:nvfp4",
            "*layers.1.mlp.down_proj": "float",
            **EVERYTHING,
        },
        "mlx:4bit-g64",
    )
    written(tiny_model, tokenizer, tmp_path, recipe)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization"] == config["quantization_config"]
    assert config["quantization"] == {
        "group_size": 64, "bits": 4, "mode": "affine",
        "model.embed_tokens": {"group_size": 64, "bits": 8, "mode": "affine"},
        "model.layers.0.self_attn.o_proj": {"group_size": 16, "bits": 4, "mode": "nvfp4"},
        "model.layers.0.mlp.down_proj": {"group_size": 32, "bits": 8, "mode": "affine"},
        "model.layers.1.self_attn.o_proj": {"group_size": 16, "bits": 4, "mode": "nvfp4"},
        "model.layers.1.mlp.down_proj": False,
        "lm_head": {"group_size": 64, "bits": 6, "mode": "affine"},
    }  # fmt: skip
    assert relative_error(tmp_path, tiny_model) <= 1e-5


def test_floats_take_the_dtype_of_the_scales(tiny_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    model = rounded(tiny_model, "bfloat16")  # exported as that, were it not for the scales
    mixed = pq.quantize(copy.deepcopy(model), Recipe({"*o_proj": "uint4-g64-min-bf16"}, "mlx:4bit-g64"))
    receipt = pq.export(pq.quantize(model, "mlx:4bit-g64"), tokenizer, tmp_path, "mlx")
    kinds = {tensor.stored_as for tensor in mlx_reader.read(tmp_path).values()}
    assert kinds == {"affine 4-bit g64", "F16"}
    assert receipt["warnings"] == []
    assert all(mx_dtype in (mx.uint32, mx.float16) for mx_dtype in dtypes(tmp_path))
    assert "MLX computes in float32" in pq.export(mixed, tokenizer, tmp_path, "mlx")["warnings"][0]


def dtypes(folder: Path) -> set[Any]:
    return {array.dtype for array in mx.load(str(folder / "model.safetensors")).values()}


@pytest.mark.parametrize(
    ("shape", "text", "reason", "nearest"),
    [
        ((64, 128), "int4-g16-sym-f16", "groups have 32, 64 or 128", "mlx:int4-g32"),
        ((64, 128), "int4-g32-sym", "rounds twice", "mlx:int4-g32"),
        ((64, 96), "uint4-g48-min-f16", "do not divide 48", "mlx:4bit-g32"),
        ((64, 128), "q4_k", "its scales have one level", "mlx:4bit-g32"),
        ((64, 128), "nf4-g64-sym", "not nf4", "mlx:int4-g64"),
        ((64, 128), "fp8_e4m3-channel-sym", "of small floats it holds mxfp4", "mlx:mxfp8"),
        ((64, 128), "int8-channel1-sym-f16", "no scales per channel1", "mlx:int8-g128"),
    ],
)  # fmt: skip
def test_a_grid_that_does_not_fit_is_refused_with_the_nearest_that_does(
    shape: tuple[int, int], text: str, reason: str, nearest: str
) -> None:
    if text == "q4_k":
        shape = (64, 256)
    with pytest.raises(PhiquantError, match=rf"a\.weight: mlx cannot hold .*{reason}.*Nearest that can: '{nearest}'"):
        check(Entry("a.weight", shape, spec(text)))


def test_a_bias_beyond_float16_is_refused(tiny_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    with torch.no_grad():
        tiny_model.model.layers[0].mlp.down_proj.weight[3, 4] = 60000.0
    source = ModelSource(pq.quantize(tiny_model, "int4-g32-sym-f16"), tokenizer)
    with pytest.raises(PhiquantError, match=r"down_proj\.weight: 8 times a scale passes 65504"):
        mlx.write(source, tmp_path)


@pytest.mark.parametrize("mode", ["affine", "mxfp4", "mxfp8", "nvfp4", "mixed"])
def test_folders_of_mlx_lm_convert_are_read(
    tiny_model: Any, tokenizer: Any, tmp_path: Path, mode: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlx_lm import convert

    tiny_model.save_pretrained(tmp_path / "hf")
    tokenizer.save_pretrained(tmp_path / "hf")
    edit_config(tmp_path / "hf")
    size, bits = {"mxfp4": (32, 4), "mxfp8": (32, 8), "nvfp4": (16, 4)}.get(mode, (64, 4))
    options = {"quant_predicate": "mixed_3_6"} if mode == "mixed" else {"q_mode": mode}
    convert(str(tmp_path / "hf"), str(tmp_path / "mlx"), quantize=True, q_group_size=size, q_bits=bits, **options)
    stored = mlx_reader.read(tmp_path / "mlx")
    assert set(stored) == {name for name, _ in tiny_model.named_parameters()}
    assert set(safetensors_reader.read(tmp_path / "mlx")) == set(stored)  # told by config.json
    for name, tensor in stored.items():
        expected = tensor.reference()
        assert np.array_equal(tensor.values(), expected)
        if tensor.spec is not None:
            assert np.array_equal(tensor.quantized().dequantize().numpy(), expected)
            original = dict(tiny_model.named_parameters())[name].detach().numpy()
            assert np.linalg.norm(expected - original) < 0.3 * np.linalg.norm(original)
    capsys.readouterr()


def edit_config(folder: Path) -> None:
    """mlx-lm reads RoPE in the spelling of Transformers 4 alone."""
    config = json.loads((folder / "config.json").read_text())
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def tiny_export(_phi3_tiny: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    """phi3-tiny in 4 bits: the model, its tokenizer, its folder."""
    model, tokenizer = copy.deepcopy(_phi3_tiny[0]), _phi3_tiny[1]
    folder = tmp_path_factory.mktemp("phi3-tiny")
    pq.export(pq.quantize(model, "mlx:4bit-g64"), tokenizer, folder, "mlx")
    return model, tokenizer, folder


def test_its_own_generation_says_what_torch_says(tiny_export: tuple[Any, Any, Path]) -> None:
    model, tokenizer, folder = tiny_export
    prompt = tokenizer("def main(")["input_ids"]
    made = model.generate(torch.tensor([prompt]), max_new_tokens=64, do_sample=False)[0, len(prompt) :].tolist()
    assert runtime.generate(folder, prompt).tokens == made


def test_logits_in_a_process_of_its_own(tiny_export: tuple[Any, Any, Path]) -> None:
    model, _, folder = tiny_export
    windows = [IDS, IDS[:3]]
    for window, logits in zip(windows, runtime.logits(folder, windows), strict=True):
        expected = model(torch.tensor([window])).logits[0].detach().numpy()
        assert np.linalg.norm(logits - expected) <= 1e-5 * np.linalg.norm(expected)


@pytest.mark.slow
def test_verify_runs_mlx_lm_with_its_own_tokenizer(tiny_export: tuple[Any, Any, Path]) -> None:
    _, tokenizer, folder = tiny_export
    report = pq.verify(folder, run=True, windows=1)
    assert report.ok, str(report)
    texts = ["def main(", "नमस्ते 🙂", "<|endoftext|> తెలుగు\n\n  x"]
    assert runtime.tokenize(folder, texts) == [tokenizer(text)["input_ids"] for text in texts]


@pytest.mark.slow  # float16 on a CPU is many times slower than float32 in MLX
def test_the_default_setting_is_near(tiny_export: tuple[Any, Any, Path]) -> None:
    from phiquant.formats.registry import find
    from phiquant.runtimes.check import run

    result = run(find("mlx"), tiny_export[2], windows=1, exact=False)
    assert result.ok
    assert result.same_top > 0.95
    print(result)


def test_a_folder_that_mlx_lm_cannot_load(tiny_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    written(tiny_model, tokenizer, tmp_path, "mlx:4bit-g64")
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(PhiquantError, match="mlx-lm failed on"):
        runtime.logits(tmp_path, [[1, 2]])
    with pytest.raises(PhiquantError, match=r"has no config\.json; give the folder of an MLX export"):
        runtime.logits(tmp_path / "none", [[1, 2]])
