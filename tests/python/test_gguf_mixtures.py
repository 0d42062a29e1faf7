"""llama.cpp's mixtures: the types of each layer by its rules, the file type, and files that it runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import phiquant as pq
import pytest
import torch
from gguf_cases import Tensors, stored_model
from phiquant.errors import PhiquantError
from phiquant.formats.gguf import reader as gguf_reader
from phiquant.formats.gguf import writer as gguf
from phiquant.recipe import Recipe, as_recipe
from phiquant.runtimes import llamacpp
from phiquant.targets import target
from phiquant.targets.gguf_mixtures import MIXTURES, file_type, modules

PHI_3_5 = {
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "hidden_size": 3072,
    "intermediate_size": 8192, "vocab_size": 32064,
}  # fmt: skip
# The letters of the types of qkv, o, gate_up and down, layer by layer: worked out by hand from the rules of
# llama-quant.cpp for 32 layers. With 32, more(i): i < 4, i >= 28, or (i - 4) % 3 == 2, which is 6, 9, ... 27.
MORE = {0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31}
EXPECTED: dict[str, Callable[[int], str]] = {
    "Q2_K_M": lambda i: "3323",
    "Q3_K_S": lambda i: "3333",
    "Q3_K_M": lambda i: ("5" if i < 2 else "4") + "43" + ("5" if i < 2 else "4"),
    "Q3_K_L": lambda i: "5535",
    "Q4_K_S": lambda i: ("5" if i < 4 else "4") + "44" + ("5" if i < 4 else "4"),
    "Q4_K_M": lambda i: "6446" if i in MORE else "4444",
    "Q5_K_S": lambda i: "5555",
    "Q5_K_M": lambda i: "6556" if i in MORE else "5555",
}
FILE_TYPES = {
    "Q2_K_M": 10, "Q3_K_S": 11, "Q3_K_M": 12, "Q3_K_L": 13, "Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_S": 16, "Q5_K_M": 17,
}  # fmt: skip
PARTS = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")


@pytest.fixture
def folder(tokenizer: Any, tmp_path: Path) -> Path:
    """The tokenizer's files."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.mark.parametrize("name", MIXTURES)
def test_types_of_each_layer(name: str) -> None:
    found = modules(name, PHI_3_5)
    for index in range(32):
        kinds = [found[f"model.layers.{index}.{part}"] for part in PARTS]
        assert kinds == [pq.spec(f"gguf:Q{letter}_K") for letter in EXPECTED[name](index)], index
    assert found["lm_head"] == pq.spec("gguf:Q6_K")
    assert found["model.embed_tokens"] == pq.spec(f"gguf:{name[:4]}")
    assert modules(name, PHI_3_5 | {"tie_word_embeddings": True})["model.embed_tokens"] == pq.spec("gguf:Q6_K")


def test_sizes_count() -> None:
    """Grouped queries in Q2_K; rows that super-blocks do not divide; integer division of the layers."""
    grouped = modules("Q2_K_M", PHI_3_5 | {"num_key_value_heads": 8})
    assert grouped["model.layers.5.self_attn.qkv_proj"] == pq.spec("gguf:Q4_K")
    narrow = modules("Q4_K_M", PHI_3_5 | {"intermediate_size": 8192 + 32, "hidden_size": 3072})
    assert narrow["model.layers.0.mlp.down_proj"] == pq.spec("gguf:Q8_0")  # 6 bits of 256 -> 8 of 32
    assert narrow["model.layers.4.mlp.down_proj"] == pq.spec("gguf:Q5_0")
    assert narrow["model.layers.0.mlp.gate_up_proj"] == pq.spec("gguf:Q4_K")
    small = modules("Q4_K_M", PHI_3_5 | {"num_hidden_layers": 4})  # 4 / 8 = 0; 28 / 8 = 3; (i - 0) % 3 == 2
    more = [small[f"model.layers.{i}.mlp.down_proj"] == pq.spec("gguf:Q6_K") for i in range(4)]
    assert more == [False, False, True, True]


def test_a_mixture_is_known_by_its_types() -> None:
    for name, number in FILE_TYPES.items():
        specs: dict[str, Any] = modules(name, PHI_3_5)
        assert file_type(PHI_3_5, specs) == number
        assert file_type(PHI_3_5, specs | {"lm_head": None}) is None
    tied = PHI_3_5 | {"tie_word_embeddings": True}
    specs = {module: spec for module, spec in modules("Q4_K_M", tied).items() if module != "lm_head"}
    assert file_type(tied, specs) == 15


def test_a_mixture_needs_a_model_and_is_no_rule() -> None:
    with pytest.raises(PhiquantError, match=r"gguf:Q4_K_M chooses grids by layer"):
        as_recipe("gguf:Q4_K_M")
    with pytest.raises(PhiquantError, match=r"gguf:Q4_K_M is a mixture for a whole model"):
        Recipe({"*down_proj": "gguf:Q4_K_M"})
    with pytest.raises(ValueError, match="has a grid for each layer"):
        pq.spec("gguf:Q4_K_M")
    with pytest.raises(PhiquantError, match="vocab_size must be a positive integer"):
        as_recipe("gguf:Q4_K_M", {"hidden_size": 256})


@pytest.mark.parametrize("tied", [False, True])
def test_a_mixture_in_llama_cpp(tied: bool, phi3_tiny: Any, make_phi3: Any, tmp_path: Path) -> None:
    """quantize() by its name, exported, with the file type of the mixture; logits of llama.cpp beside torch's."""
    pytest.importorskip("xllamacpp")
    model, tokenizer = phi3_tiny
    if tied:
        model = make_phi3(num_hidden_layers=1, hidden_size=256, intermediate_size=512, tie_word_embeddings=True)
    pq.quantize(model, "gguf:Q4_K_M")
    pq.export(model, tokenizer, tmp_path / "out", format="gguf")
    path = tmp_path / "out" / gguf.FILE
    assert gguf_reader.read_metadata(path)["general.file_type"] == 15
    kinds = {name: tensor.stored_as for name, tensor in gguf_reader.read(path).items()}
    wanted = {
        f"{module}.weight": spec for module, spec in target("gguf:Q4_K_M").mixture(model.config.to_dict()).items()
    }  # type: ignore[misc]
    assert all(pq.spec(f"gguf:{kinds[name]}") == spec for name, spec in wanted.items() if name in kinds)
    assert ("lm_head.weight" in kinds) != tied
    window = list(range(300, 360))
    with torch.no_grad():
        expected = model(torch.tensor([window])).logits[0].numpy()
    found = llamacpp.logits(path, [window])[0]
    assert np.linalg.norm(found - expected) <= 3e-2 * np.linalg.norm(expected)


def test_q_k_and_v_of_their_own(make_phi3: Any, folder: Path, tmp_path: Path) -> None:
    """Three tensors in place of the fused one, of three types; gate and up have no such form."""
    pytest.importorskip("xllamacpp")
    model = make_phi3(num_hidden_layers=2, hidden_size=256, intermediate_size=512)
    part = "model.layers.1.self_attn"
    rules = {f"{part}.q_proj": "gguf:Q4_K", f"{part}.k_proj": "gguf:Q6_K", f"{part}.v_proj": "gguf:Q8_0"}
    pq.quantize(model, Recipe(rules))
    tokenizer = pq.load("phi3-tiny")[1]
    pq.export(model, tokenizer, tmp_path / "out", format="gguf")
    stored = gguf_reader.read(tmp_path / "out" / gguf.FILE)
    assert [stored[f"{name}.weight"].stored_as for name in rules] == ["Q4_K", "Q6_K", "Q8_0"]
    window = list(range(300, 340))
    with torch.no_grad():
        expected = model(torch.tensor([window])).logits[0].numpy()
    found = llamacpp.logits(tmp_path / "out" / gguf.FILE, [window])[0]
    assert np.linalg.norm(found - expected) <= 3e-2 * np.linalg.norm(expected)

    split = make_phi3(num_hidden_layers=1, hidden_size=256, intermediate_size=512)
    pq.quantize(split, Recipe({"model.layers.0.mlp.gate_proj": "gguf:Q4_K", "model.layers.0.mlp.up_proj": "gguf:Q8_0"}))
    with pytest.raises(
        PhiquantError, match=r"gate_proj\.weight: llama\.cpp keeps gate and up of a Phi-3 in one tensor"
    ):
        pq.export(split, tokenizer, tmp_path / "no", format="gguf")


def test_second_scales_where_llama_cpp_applies_them(make_phi3: Any, folder: Path, tmp_path: Path) -> None:
    """NVFP4 with a scale of the whole tensor: attention and head. (It ignores those of the mlp: they are refused.)"""
    pytest.importorskip("xllamacpp")
    model = make_phi3(num_hidden_layers=2)
    names = [n for n in model.state_dict() if "self_attn" in n or "lm_head" in n]
    chosen = dict.fromkeys(names, "nvfp4")
    source = Tensors(model, folder, chosen, chosen, dtype="float32")  # type: ignore[arg-type]
    gguf.write(source, tmp_path)
    window = list(range(300, 340))
    with torch.no_grad():
        expected = stored_model(model, source)(torch.tensor([window])).logits[0].numpy()
    found = llamacpp.logits(tmp_path / gguf.FILE, [window])[0]
    assert np.linalg.norm(found - expected) <= 2e-2 * np.linalg.norm(expected)
