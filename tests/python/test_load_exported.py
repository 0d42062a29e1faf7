"""Exported files come back as models with the same codes: to evaluate, to export again, to train on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import phiquant as pq
import pytest
import torch
from phiquant import PhiquantError, QuantizedEmbedding, QuantizedLinear

IDS = torch.arange(40)[None]
GRIDS = {
    "gguf": ["gguf:Q4_0", "gguf:Q4_1", "gguf:Q8_0", "int3-g32-signmax-f16"],
    "safetensors": ["safetensors:int4-g64", "safetensors:int8-channel"],
}
CASES = [(format, grid) for format, grids in GRIDS.items() for grid in grids]


def layers(model: Any) -> dict[str, Any]:
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear | QuantizedEmbedding)}


def same_codes(a: Any, b: Any) -> bool:
    ours, theirs = layers(a), layers(b)
    return list(ours) == list(theirs) and all(
        ours[name].quantized.spec == theirs[name].quantized.spec
        and ours[name].quantized.digests() == theirs[name].quantized.digests()
        for name in ours
    )


@pytest.mark.parametrize(("format", "grid"), CASES)
def test_the_loaded_model_is_the_exported_one(
    tiny_model: Any, tokenizer: Any, tmp_path: Path, format: str, grid: str
) -> None:
    recipe = pq.Recipe({"*embed_tokens": grid}, default=grid)
    pq.quantize(tiny_model, recipe, solver="mse")
    pq.export(tiny_model, tokenizer, tmp_path / "out", format=format)
    model, loaded = pq.load(tmp_path / "out")
    assert not model.training
    assert len(layers(model)) == 9
    assert same_codes(model, tiny_model)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, tiny_model(IDS).logits)
    assert loaded("def f():")["input_ids"] == tokenizer("def f():")["input_ids"]
    origins = {str(module.weight_quantizer.origin) for module in layers(model).values()}
    assert origins == {"{'solver': 'mse'}"}
    pq.export(model, loaded, tmp_path / "again", format=format)
    assert pq.same_codes(tmp_path / "out", tmp_path / "again").ok


def test_tied_embeddings_stay_tied(make_phi3: Any, tokenizer: Any, tmp_path: Path) -> None:
    tied = make_phi3(tie_word_embeddings=True)
    pq.quantize(tied, pq.Recipe({"*embed_tokens": "gguf:Q8_0", "*lm_head": "gguf:Q8_0"}, default="gguf:Q4_0"))
    pq.export(tied, tokenizer, tmp_path / "out")
    model, _ = pq.load(tmp_path / "out" / "model.gguf", dtype=torch.bfloat16)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert same_codes(model, tied)


def test_slices_with_grids_of_their_own(tiny_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    pq.quantize(tiny_model, pq.Recipe({"*.0.*.v_proj": "gguf:Q8_0"}, default="gguf:Q4_0"))
    pq.export(tiny_model, tokenizer, tmp_path / "out")
    model, _ = pq.load(tmp_path / "out")
    assert same_codes(model, tiny_model)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, tiny_model(IDS).logits)


def test_a_file_alone_speaks_its_own_words(tiny_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    pq.quantize(tiny_model, "int3-g32-signmax-f16")
    pq.export(tiny_model, tokenizer, tmp_path)
    (tmp_path / "receipt.json").unlink()
    model, _ = pq.load(tmp_path / "model.gguf")
    assert str(model.lm_head) == str(tiny_model.lm_head)
    assert str(model.model.layers[0].mlp.down_proj.quantized.spec) == "int4-g32-signmax-f16"


def test_a_float_file(tiny_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    pq.export(tiny_model, tokenizer, tmp_path)
    model, _ = pq.load(tmp_path)
    assert layers(model) == {}
    for name, value in tiny_model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


@pytest.mark.parametrize(("format", "grid"), CASES)
def test_training_goes_on_from_the_codes(
    tiny_model: Any, tokenizer: Any, tmp_path: Path, format: str, grid: str
) -> None:
    pq.quantize(tiny_model, grid, solver="mse")
    pq.export(tiny_model, tokenizer, tmp_path, format=format)
    model, _ = pq.load(tmp_path)
    pq.prepare_qat(model)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, tiny_model(IDS).logits)
    pq.convert(model)
    assert same_codes(model, tiny_model)  # nothing was trained: the same codes
    pq.prepare_qat(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    trained = model.model.layers[1].mlp.down_proj
    weight = trained.weight_quantizer(trained.weight).detach().clone()
    pq.convert(model, trained={"steps": 1})
    assert torch.equal(trained.quantized.dequantize(), weight)
    assert not same_codes(model, tiny_model)
    origin = trained.weight_quantizer.origin
    assert (origin["solver"], origin["range"], origin["steps"]) == ("qat", "stored", 1)
    assert origin["from"]["from"] == {"solver": "mse"}


@pytest.mark.parametrize(
    "grid", ["q4_k", "nvfp4", "mxfp4", "nf4-g64-sym", "codebook16-row", "uint4-g32-asym", "ternary-channel-sym"]
)
def test_every_grid_can_go_on(make_phi3: Any, grid: str) -> None:
    model = make_phi3(hidden_size=256, intermediate_size=256, num_hidden_layers=1)
    pq.quantize(model, grid, solver="kmeans" if "codebook" in grid else "rtn")
    before = {name: module.quantized for name, module in layers(model).items()}
    pq.prepare_qat(model)
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    assert all(m.weight.grad is not None for n, m in model.named_modules() if n in before)
    pq.convert(model)
    assert {name: module.quantized.digests() for name, module in layers(model).items()} == {
        name: quantized.digests() for name, quantized in before.items()
    }


def test_what_cannot_go_on(tiny_model: Any) -> None:
    with pytest.raises(PhiquantError, match="has no codes to go on with"):
        pq.prepare_qat(tiny_model)
    pq.quantize(tiny_model, "gguf:Q4_0")
    with pytest.raises(PhiquantError, match=r"or go on with these by prepare_qat\(model\) without a grid"):
        pq.prepare_qat(tiny_model, "gguf:Q8_0")


def test_a_tokenizer_that_has_to_be_given(
    tiny_model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pq.export(tiny_model, tokenizer, tmp_path / "out")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    from phiquant.formats.gguf import tokenizer_files as gguf_tokenizer_files

    monkeypatch.setattr(gguf_tokenizer_files, "PATTERNS", {})
    with pytest.raises(PhiquantError, match="--tokenizer DIR"):
        pq.load(tmp_path / "out")
    _, loaded = pq.load(tmp_path / "out", tokenizer=tmp_path / "tokenizer")
    assert loaded("x")["input_ids"] == tokenizer("x")["input_ids"]


def test_receipts_tell_how_codes_were_chosen(tiny_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    ids = torch.arange(128).reshape(2, 64)
    pq.quantize(tiny_model, pq.Recipe({"*embed_tokens": "gguf:Q8_0"}, default="gguf:Q4_0"), "gptq", calibration=ids)
    pq.export(tiny_model, tokenizer, tmp_path)
    receipt = json.loads((tmp_path / "receipt.json").read_text())
    records = {record["name"]: record for record in receipt["tensors"]}
    origin = records["model.layers.1.mlp.down_proj.weight"]["origin"]
    assert origin["solver"] == "gptq"
    assert origin["statistics"]["tokens"] == 128
    assert len(origin["statistics"]["digest"]) == 64
    assert records["model.embed_tokens.weight"]["origin"] == {"solver": "rtn"}
    assert records["model.embed_tokens.weight"]["target"] == "gguf:Q8_0"
    assert "origin" not in records["model.norm.weight"]
    assert {"python", "torch", "numpy", "gguf"} <= set(receipt["versions"])


def test_the_receipt_of_a_trained_model_tells_its_steps(phi3_tiny: Any, tmp_path: Path) -> None:
    model, tokenizer = phi3_tiny
    settings = pq.qat.Settings(steps=2, batch=1, window=16)
    pq.qat.train(model, tokenizer, "gguf:Q4_0", text="x = 1\n" * 200, settings=settings)
    receipt = pq.export(model, tokenizer, tmp_path)
    assert next(record["origin"] for record in receipt["tensors"] if "origin" in record) == {
        "solver": "qat", "range": "mse", "steps": 2, "tokens": 32,
    }  # fmt: skip


def test_an_old_receipt_still_verifies(tiny_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    pq.quantize(tiny_model, "gguf:Q4_0")
    pq.export(tiny_model, tokenizer, tmp_path)
    path = tmp_path / "receipt.json"
    receipt = json.loads(path.read_text())
    for record in receipt["tensors"]:
        record.pop("origin", None)
        record.pop("target", None)
    path.write_text(json.dumps(receipt))
    assert pq.verify(tmp_path).ok
    model, _ = pq.load(tmp_path)
    assert model.model.layers[0].mlp.down_proj.weight_quantizer.origin == {}
