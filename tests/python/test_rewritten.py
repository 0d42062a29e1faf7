"""Transforms of a checkpoint on disk: the codes of a model in memory, in any number of files, and after a kill."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import phiquant as pq
import pytest
import torch
from phiquant import PhiquantError, Recipe, rewritten, stream
from phiquant.checkpoint import Checkpoint
from phiquant.ranks import Ranks
from phiquant.rewritten import mapped, rewrite
from phiquant.testing import random_phi3


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(0, 4096, (14, 40), generator=torch.Generator().manual_seed(0))


def save(folder: Path, tokenizer: Any, size: str = "1MB", **config: Any) -> Path:
    random_phi3(**config).bfloat16().save_pretrained(folder, max_shard_size=size)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, _phi3_tiny: tuple[Any, Any]) -> Path:
    """Sharded, bf16, of 2 layers with grouped queries."""
    folder = tmp_path_factory.mktemp("checkpoint")
    return save(folder, _phi3_tiny[1], num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory, _phi3_tiny: tuple[Any, Any]) -> Path:
    folder = tmp_path_factory.mktemp("tied")
    return save(folder, _phi3_tiny[1], "1GB", num_hidden_layers=1, tie_word_embeddings=True)


@pytest.mark.parametrize(
    ("solver", "transforms"),
    [("awq", []), ("gptq", ["fold", "smooth:alpha=0.6"]), ("gptq", ["rotate"]), ("gptq_mse", ["awq"])],
)
def test_the_codes_are_those_of_a_model_in_memory(
    checkpoint: Path, ids: torch.Tensor, tmp_path: Path, solver: str, transforms: list[str]
) -> None:
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    options = {"solver": solver, "transforms": transforms, "calibration": ids}
    streamed = stream.quantize_checkpoint(checkpoint, "gguf:Q4_0", tmp_path / "a", **options)
    model, tokenizer = pq.load(checkpoint, torch.bfloat16)
    pq.quantize(model, "gguf:Q4_0", **options)
    assert streamed["tensors"] == pq.export(model, tokenizer, tmp_path / "b", format="gguf")["tensors"]
    assert '"transforms": [{' in json.dumps(streamed["tensors"])
    assert streamed["verified"]
    assert not (tmp_path / "a" / "calibration").exists()
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before


@pytest.mark.parametrize("solver", ["awq", "gptq"])
def test_slices_with_grids_of_their_own(checkpoint: Path, ids: torch.Tensor, tmp_path: Path, solver: str) -> None:
    recipe = Recipe({"*.v_proj": "gguf:Q8_0", "*.0.*o_proj": "float", "lm_head": "gguf:Q8_0"}, "gguf:Q4_0")
    options = {"solver": solver, "transforms": ["smooth"], "calibration": ids}
    streamed = stream.quantize_checkpoint(checkpoint, "gguf:Q4_0", tmp_path / "a", recipe=recipe, **options)
    model, tokenizer = pq.load(checkpoint, torch.bfloat16)
    pq.quantize(model, recipe, **options)
    assert streamed["tensors"] == pq.export(model, tokenizer, tmp_path / "b", format="gguf")["tensors"]


def test_without_data(checkpoint: Path, tmp_path: Path) -> None:
    streamed = stream.quantize_checkpoint(checkpoint, "mlx:4bit-g64", tmp_path / "a", transforms=["rotate:seed=3"])
    model, tokenizer = pq.load(checkpoint, torch.bfloat16)
    pq.quantize(model, "mlx:4bit-g64", transforms=["rotate:seed=3"])
    assert streamed["tensors"] == pq.export(model, tokenizer, tmp_path / "b", format="mlx")["tensors"]


@pytest.mark.parametrize("shards", ["1GB", "300KB"])
def test_an_untied_head_is_a_tensor_more(tmp_path: Path, phi3_tiny: tuple[Any, Any], shards: str) -> None:
    folder = save(tmp_path / "tied", phi3_tiny[1], shards, num_hidden_layers=1, tie_word_embeddings=True)
    rewrite(folder, tmp_path / "out", ["rotate:untie=true"], {}, None)
    model, _ = pq.load(folder, torch.bfloat16)
    pq.transform(model, ["rotate:untie=true"])
    written = Checkpoint(tmp_path / "out")
    assert written.config["tie_word_embeddings"] is False
    wanted = model.state_dict()
    assert set(written.tensors) == set(wanted)
    for name, value in wanted.items():
        assert torch.equal(written.read(name), value), name


def test_changes_of_a_mapped_model_are_those_of_its_files(tied: Path, tmp_path: Path) -> None:
    rewrite(tied, tmp_path / "out", [], {}, None)
    with mapped(tmp_path / "out") as model:
        assert model.lm_head.weight is model.model.embed_tokens.weight
        model.model.embed_tokens.weight.data[3, 5] = 42.0
    assert Checkpoint(tmp_path / "out").read("model.embed_tokens.weight")[3, 5] == 42.0
    assert Checkpoint(tied).read("model.embed_tokens.weight")[3, 5] != 42.0


def test_what_is_finished_is_taken_again_and_nothing_else(
    checkpoint: Path, ids: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, calls = tmp_path / "out", []
    real = rewritten.transform

    def counted(*arguments: Any, **named: Any) -> Any:
        calls.append(arguments[1])
        if arguments[1] == ["fold"]:
            raise KeyboardInterrupt
        return real(*arguments, **named)

    monkeypatch.setattr("phiquant.rewritten.transform", counted)
    with pytest.raises(KeyboardInterrupt):
        rewrite(checkpoint, out, ["fold"], {}, None)
    first = rewrite(checkpoint, out, ["smooth"], {}, ids)
    assert rewrite(checkpoint, out, ["smooth"], {}, ids) == first
    assert calls == [["fold"], ["smooth"]]
    rewrite(checkpoint, out, ["smooth"], {}, ids[:7])
    assert len(calls) == 3


def test_a_tensor_inside_an_item_is_refused(tied: Path, tmp_path: Path) -> None:
    rewrite(tied, tmp_path / "out", [], {}, None)
    path = tmp_path / "out" / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    path.write_bytes((length + 1).to_bytes(8, "little") + data[8 : 8 + length] + b" " + data[8 + length :])
    with pytest.raises(PhiquantError, match="starts inside an item"), mapped(tmp_path / "out"):
        pass


def test_several_processes_are_refused(checkpoint: Path, ids: torch.Tensor, tmp_path: Path) -> None:
    options = {"solver": "gptq", "transforms": ["smooth"], "calibration": ids, "ranks": Ranks(0, 2)}
    with pytest.raises(PhiquantError, match="smooth has nothing that 2 processes could share"):
        stream.quantize_checkpoint(checkpoint, "gguf:Q4_0", tmp_path / "a", **options)
    assert not (tmp_path / "a").exists()
