"""Folders that the package compressed-tensors itself compressed, with the targets and schemes of other tools."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import phiquant as pq
import pytest
import torch
from phiquant.formats.safetensors import reader as safetensors_reader
from safetensors.torch import save_file

SCHEMES: dict[str, tuple[str, dict[str, Any], str]] = {
    "w3": ("pack-quantized", {"num_bits": 3, "strategy": "group", "group_size": 32}, "int3-g32-signmax-f32"),
    "w4": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 64}, "int4-g64-signmax-f32"),
    "w4-asym": (
        "pack-quantized",
        {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False},
        "uint4-g32-asym-f32",
    ),
    "w6-channel": ("pack-quantized", {"num_bits": 6, "strategy": "channel"}, "int6-channel-sym-f32"),
    "w8-asym": ("int-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": False}, "uint8-channel-asym-f32"),
    "fp8": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}, "fp8_e4m3-tensor-sym-f32"),
}


@pytest.mark.parametrize("kind", SCHEMES)
def test_a_folder_of_the_package_is_read(tmp_path: Path, kind: str) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    form, weights, grid = SCHEMES[kind]
    scheme = QuantizationScheme(targets=["re:.*proj$"], weights=weights, format=form)
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    size = weights.get("group_size") or (128 if weights["strategy"] == "channel" else weight.numel())
    blocks = weight.reshape(-1, size)
    scale, zero = calculate_qparams(blocks.amin(1), blocks.amax(1), scheme.weights)
    shape = (1,) if weights["strategy"] == "tensor" else (64, -1)
    state = {"weight": weight, "weight_scale": scale.reshape(shape), "weight_zero_point": zero.reshape(shape)}
    compressor = BaseCompressor.get_value_from_registry(form)
    made = compressor.compress(state, scheme)
    name = "model.layers.0.mlp.down_proj"
    save_file({f"{name}.{part}": tensor.contiguous() for part, tensor in made.items()}, tmp_path / "model.safetensors")
    group = json.loads(scheme.model_dump_json())
    settings = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, "ignore": ["re:.*lm_head"]}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": settings}))
    tensor = safetensors_reader.read(tmp_path)[f"{name}.weight"]
    expected = compressor.decompress(made, scheme)["weight"].numpy()
    assert np.array_equal(tensor.values(), expected)
    assert np.array_equal(tensor.reference(), expected)
    assert tensor.spec == pq.spec(grid)
    assert np.array_equal(tensor.quantized().dequantize().numpy(), expected)
    assert np.array_equal(tensor.values(slice(5, 9)), expected[5:9])
