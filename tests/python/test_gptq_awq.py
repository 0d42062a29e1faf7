"""GPTQ and AWQ checkpoints come back as our codes: against encoders written from the layouts' definitions."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import phiquant as pq
import pytest
import torch
from gptq_cases import AWQ_ORDER, awq_layer, awq_words, gptq_layer, write_folder
from phiquant import PhiquantError
from phiquant.formats.safetensors import awq_reader, gptq_reader
from phiquant.formats.safetensors import reader as safetensors_reader
from phiquant.models import phi

SIZE = 32


def config(**quantization: Any) -> dict[str, Any]:
    model = pq.testing.random_phi3(num_hidden_layers=1, vocab_size=64, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    plain = json.loads(model.config.to_json_string())
    return {**plain, "architectures": ["Phi3ForCausalLM"], "quantization_config": quantization}


def parts(
    shape: tuple[int, int], bits: int, symmetric: bool, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes [N, K], zero points and scales [N, G]; zero points span their whole range."""
    generator = np.random.default_rng(seed)
    rows, columns = shape
    codes = generator.integers(0, 1 << bits, (rows, columns))
    zeros = generator.integers(0, 1 << bits, (rows, columns // SIZE))
    zeros = np.full_like(zeros, 1 << (bits - 1)) if symmetric else zeros
    return codes, zeros, generator.uniform(0.01, 0.1, zeros.shape).astype(np.float16)


def decoded(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """s (q - z), float32."""
    groups = codes.reshape(*zeros.shape, -1) - zeros[..., None]
    return (groups.astype(np.float32) * scales.astype(np.float32)[..., None]).reshape(codes.shape)


def folder_of(
    folder: Path, settings: dict[str, Any], bits: int, symmetric: bool, fused: bool = True, version: int = 1
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A whole model in `folder`: its config and its values by our names."""
    whole = config(**settings)
    layers, floats, values = {}, {}, {}
    for seed, (name, shape) in enumerate(phi.tensors(whole)):
        module = name.removesuffix(".weight")
        if not phi.is_matrix(module) or module in (phi.EMBEDDING, phi.HEAD):
            floats[name] = values[name] = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
            continue
        made = parts(shape, bits, symmetric, seed)
        values[name] = decoded(*made)
        rows = {module: slice(0, shape[0])} if fused else phi.fused_rows(whole, module) or {module: slice(0, shape[0])}
        for part, at in rows.items():
            given = [array[at] for array in made]
            method = settings["quant_method"]
            layers[part] = awq_layer(*given) if method == "awq" else gptq_layer(*given, bits, version)
    write_folder(folder, whole, layers, floats)
    return whole, values


GPTQ = {"quant_method": "gptq", "group_size": SIZE, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": SIZE, "zero_point": True, "version": "gemm"}


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_layers_come_back(tmp_path: Path, bits: int, version: int, symmetric: bool) -> None:
    settings = {**GPTQ, "bits": bits, "checkpoint_format": "gptq" if version == 1 else "gptq_v2"}
    made = parts((64, 128), bits, symmetric)
    write_folder(tmp_path, config(**settings), {"model.layers.0.mlp.down_proj": gptq_layer(*made, bits, version)}, {})
    tensor = gptq_reader.read(tmp_path)["model.layers.0.mlp.down_proj.weight"]
    assert str(tensor.spec) == (f"int{bits}-g32-sym-f16" if symmetric else f"uint{bits}-g32-asym-f16")
    assert np.array_equal(tensor.values(), decoded(*made))
    assert np.array_equal(tensor.values(slice(5, 17)), decoded(*made)[5:17])
    assert np.array_equal(tensor.quantized().dequantize().numpy(), decoded(*made))
    if symmetric:  # and in words with zero points
        again = tensor.quantized(pq.spec(f"uint{bits}-g32-asym-f16"))
        assert np.array_equal(again.codes.numpy(), made[0])


def test_awq_layers_come_back(tmp_path: Path) -> None:
    made = parts((64, 128), 4, False)
    write_folder(tmp_path, config(**AWQ), {"model.layers.0.mlp.down_proj": awq_layer(*made)}, {})
    tensor = awq_reader.read(tmp_path)["model.layers.0.mlp.down_proj.weight"]
    assert str(tensor.spec) == "uint4-g32-asym-f16"
    assert np.array_equal(tensor.quantized().codes.numpy(), made[0])
    for rows in (slice(0, 64), slice(3, 13), slice(8, 16)):
        assert np.array_equal(tensor.values(rows), decoded(*made)[rows])


def test_awq_words_are_what_mlx_lm_unpacks() -> None:
    mlx_utils = pytest.importorskip("mlx_lm.utils", reason="mlx-lm needs Python 3.11")
    import mlx.core as mx

    values = np.random.default_rng(0).integers(0, 16, (5, 24))
    unpacked = np.array(mlx_utils._unpack_awq_weights(mx.array(awq_words(values).view(np.uint32))))
    assert np.array_equal(unpacked, values)
    assert sorted(AWQ_ORDER) == list(range(8))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_whole_checkpoints_open_by_their_config(tmp_path: Path, method: str, fused: bool) -> None:
    settings = {**GPTQ, "bits": 4} if method == "gptq" else AWQ
    whole, values = folder_of(tmp_path, settings, 4, method == "gptq", fused)
    stored = safetensors_reader.read(tmp_path)
    assert set(stored) == set(values)
    phi.check_complete(whole, {name: tensor.shape for name, tensor in stored.items()})
    for name, expected in values.items():
        tensor = stored[name]
        assert np.array_equal(tensor.values(), expected), name
        if tensor.spec is not None:
            assert np.array_equal(tensor.quantized().dequantize().numpy(), expected)
            middle = slice(tensor.shape[0] // 4, tensor.shape[0] // 4 * 3 + 1)  # across the borders of the slices
            assert np.array_equal(tensor.values(middle), expected[middle])
            assert tensor.digests(tensor.spec) == tensor.quantized().digests()
    assert "quantization_config" not in safetensors_reader.read_config(tmp_path)


def test_slices_of_different_grids_stay_slices(tmp_path: Path) -> None:
    whole = config(**GPTQ, bits=4)
    rows = phi.fused_rows(whole, "model.layers.0.self_attn.qkv_proj")
    layers = {
        name: gptq_layer(*parts((at.stop - at.start, 128), 4, symmetric=not name.endswith("v_proj")), 4)
        for name, at in rows.items()
    }
    write_folder(tmp_path, whole, layers, {})
    assert set(gptq_reader.read(tmp_path)) == {f"{name}.weight" for name in rows}


def test_a_checkpoint_moves_to_mlx_without_a_change(tmp_path: Path, tokenizer: Any) -> None:
    _, values = folder_of(tmp_path / "awq", AWQ, 4, False)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    pq.repack(tmp_path / "awq", "mlx", tmp_path / "mlx", tokenizer=tmp_path / "tokenizer")
    from phiquant.formats.mlx import reader as mlx_reader

    for name, tensor in mlx_reader.read(tmp_path / "mlx").items():
        assert np.array_equal(tensor.values(), values[name]), name


def test_act_order_is_refused_with_the_first_place(tmp_path: Path) -> None:
    made = parts((64, 128), 4, True)
    order = np.random.default_rng(0).permutation(np.repeat(np.arange(4), 32))
    layer = gptq_layer(*made, 4, g_idx=order)
    write_folder(tmp_path, config(**{**GPTQ, "desc_act": True}, bits=4), {"model.layers.0.mlp.down_proj": layer}, {})
    first = int(np.argmax(order != np.repeat(np.arange(4), 32)))
    with pytest.raises(PhiquantError, match=rf"down_proj: input channel {first} belongs to group .*activation order"):
        gptq_reader.read(tmp_path)


def test_static_groups_are_in_order_and_read(tmp_path: Path) -> None:
    layer = gptq_layer(*parts((64, 128), 4, True), 4)
    del layer["g_idx"]
    write_folder(tmp_path, config(**{**GPTQ, "desc_act": True}, bits=4), {"model.layers.0.mlp.down_proj": layer}, {})
    assert "model.layers.0.mlp.down_proj.weight" in gptq_reader.read(tmp_path)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("qzeros", lambda a: a[:, :-1], r"qzeros has the shape \[4, 7\]; 8 columns were due"),
        ("scales", lambda a: a[:3], r"scales and zero points have \[3, 4\] groups"),
        ("scales", lambda a: a.astype(np.int32), r"scales is I32, not F16"),
        ("qweight", lambda a: a.astype(np.int64), r"qweight is I64, not I32"),
        ("qweight", lambda a: a.reshape(-1), r"qweight has the shape \[1024\]"),
        ("qweight", lambda a: a[:3], r"4 groups do not divide 24|g_idx has 128 entries"),
        ("g_idx", lambda a: a[:5], r"g_idx has 5 entries for 128 input channels"),
        ("bias", lambda a: np.ones(64, np.float16), r"bias is not 0, and Phi-3's linears have no bias"),
        ("lora_a", lambda a: np.ones(64, np.float16), r"lora_a is no part of a quantized linear"),
    ],
)
def test_a_damaged_layer_is_named(tmp_path: Path, part: str, change: Any, message: str) -> None:
    layer = gptq_layer(*parts((64, 128), 4, True), 4)
    layer[part] = change(layer.get(part))
    write_folder(tmp_path, config(**GPTQ, bits=4), {"model.layers.0.mlp.down_proj": layer}, {})
    with pytest.raises(PhiquantError, match=rf"model\.layers\.0\.mlp\.down_proj.*({message})"):
        gptq_reader.read(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({**GPTQ, "bits": 5}, "GPTQ of 5 bits"),
        ({**GPTQ, "bits": 4, "checkpoint_format": "marlin"}, "in the form 'marlin' is none that phiquant reads"),
        ({**AWQ, "version": "gemv"}, "AWQ of 4 bits in the layout 'gemv'"),
        ({"quant_method": "bitsandbytes"}, "quant_method 'bitsandbytes' is none that phiquant reads"),
    ],
)
def test_another_layout_is_named(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    write_folder(tmp_path, config(**settings), {"a": gptq_layer(*parts((64, 128), 4, True), 4)}, {})
    with pytest.raises(PhiquantError, match=message):
        safetensors_reader.read(tmp_path)


def test_biases_of_zero_are_left_out(tmp_path: Path) -> None:
    layer = gptq_layer(*parts((64, 128), 4, True), 4) | {"bias": np.zeros(64, np.float16)}
    write_folder(tmp_path, config(**GPTQ, bits=4), {"model.layers.0.mlp.down_proj": layer}, {})
    assert set(gptq_reader.read(tmp_path)) == {"model.layers.0.mlp.down_proj.weight"}


def test_zero_points_of_version_one_wrap(tmp_path: Path) -> None:
    codes, zeros, scales = parts((64, 128), 4, True)
    zeros[:] = 0  # stored as 15
    write_folder(tmp_path, config(**GPTQ, bits=4), {"a": gptq_layer(codes, zeros, scales, 4)}, {})
    assert np.array_equal(gptq_reader.read(tmp_path)["a.weight"].values(), decoded(codes, zeros, scales))
    assert torch.equal(gptq_reader.read(tmp_path)["a.weight"].quantized().zero_points, torch.zeros(64, 4).int())


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_any_byte_may_be_wrong(tmp_path: Path, method: str) -> None:
    """A fuzzer over header and config: an error of ours, or a file that still reads."""
    generator, refused = random.Random(0), 0
    folder_of(tmp_path, {**GPTQ, "bits": 4} if method == "gptq" else AWQ, 4, method == "gptq")
    for name in ("model.safetensors", "config.json"):
        whole = (tmp_path / name).read_bytes()
        size = 8 + int.from_bytes(whole[:8], "little") if name.endswith("safetensors") else len(whole)
        for _ in range(100):
            broken = bytearray(whole)
            broken[generator.randrange(size)] = generator.randrange(256)
            (tmp_path / name).write_bytes(broken)
            try:
                for tensor in safetensors_reader.read(tmp_path).values():
                    tensor.digests(tensor.spec)
            except PhiquantError:
                refused += 1
        (tmp_path / name).write_bytes(whole)
    assert refused > 50
    assert safetensors_reader.read(tmp_path)
