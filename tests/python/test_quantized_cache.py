"""Keys and values in 8 bits: what is stored, what attention reads, generation, memory, refusals."""

from __future__ import annotations

import json
from typing import Any

import phiquant as pq
import pytest
import torch
from phiquant import PhiquantError
from phiquant.miniatures import miniature
from phiquant.quantized_cache import INT8, check, quantized_cache

transformers = pytest.importorskip("transformers")


def ids(length: int = 24) -> torch.Tensor:
    return torch.randint(1, 1000, (2, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("text", [INT8, "int8-g16-sym-f16", "fp8_e4m3-token-sym"])
def test_a_layer_holds_codes_and_gives_what_they_decode_to(text: str, tiny_model: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    cache = quantized_cache(tiny_model, text)
    parts = [torch.randn(2, 2, 2, length, 32, generator=generator) for length in (5, 1, 3)]
    for keys, values in parts:
        found = cache.update(keys, values, 0)
    for found_one, whole in zip(found, torch.cat(parts, 3), strict=True):
        blocks = whole.reshape(2, 2, 9, -1, 16 if "g16" in text else 32)
        scale = blocks.abs().amax(-1, keepdim=True) / (127 if "int8" in text else 448)
        scale = scale.half().float() if "f16" in text else scale
        scaled = blocks / scale
        rounded = scaled.round() if "int8" in text else scaled.to(torch.float8_e4m3fn).float()
        assert torch.allclose(found_one, (rounded * scale).reshape(whole.shape), rtol=1e-5, atol=1e-6)
    layer = cache.layers[0]
    assert layer.keys.dtype in (torch.int8, torch.uint8)
    assert cache.get_seq_length() == 9
    assert cache.nbytes == 2 * 2 * 2 * 9 * (32 + layer.key_scales.shape[-1] * layer.key_scales.itemsize)


@pytest.mark.parametrize("name", ["phi-3-mini", "phi-3.5-mini", "phi-4-mini"])
def test_one_token_at_a_time_gives_the_same_logits(name: str) -> None:
    """With sliding windows, LongRoPE, grouped queries: what is stored does not depend on how it came."""
    model, _ = miniature(name)
    rows = ids(60)
    with torch.no_grad():
        whole = model(rows, past_key_values=quantized_cache(model), use_cache=True).logits
        plain = model(rows, use_cache=False).logits
        cache = quantized_cache(model)
        pieces = [
            model(part, past_key_values=cache, use_cache=True).logits
            for part in (rows[:, :50], *rows[:, 50:].split(1, 1))
        ]
    assert torch.allclose(torch.cat(pieces, 1), whole, atol=2e-2)
    assert 0 < (whole - plain).square().mean() < 1e-3 * plain.square().mean()


def test_generation(tiny_model: Any) -> None:
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cache = quantized_cache(tiny_model)
    found = tiny_model.generate(ids(), past_key_values=cache, **options)
    rows = ids()
    for _ in range(6):
        with torch.no_grad():
            logits = tiny_model(rows, past_key_values=quantized_cache(tiny_model), use_cache=True).logits
        rows = torch.cat([rows, logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, rows)
    assert cache.get_seq_length() == 29
    beams = tiny_model.generate(ids(), past_key_values=quantized_cache(tiny_model), num_beams=3, **options)
    assert beams.shape == (2, 30)


def test_a_cache_can_be_cropped_and_emptied(tiny_model: Any) -> None:
    cache = quantized_cache(tiny_model)
    with torch.no_grad():
        tiny_model(ids(), past_key_values=cache, use_cache=True)
        cache.crop(-4)
        assert cache.get_seq_length() == 20
        again = tiny_model(ids()[:, 20:], past_key_values=cache, use_cache=True).logits
        whole = tiny_model(ids(), past_key_values=quantized_cache(tiny_model), use_cache=True).logits
    assert torch.allclose(again, whole[:, 20:], atol=1e-3)
    cache.batch_repeat_interleave(3)
    cache.batch_select_indices(torch.tensor([0, 5]))
    assert cache.layers[1].key_scales.shape[0] == 2
    cache.reset()
    assert cache.nbytes == 0


def test_memory_and_loss(phi3_tiny: Any) -> None:
    model, tokenizer = phi3_tiny
    text = pq.testing.heldout_text()
    found = pq.evaluate.compare(model, model, tokenizer, text, window=128, limit=2, cache=INT8)
    assert 0 < found.kl < 1e-3
    assert (
        found.perplexity == pq.evaluate.perplexity(model, tokenizer, text, window=128, limit=2, cache=INT8).perplexity
    )
    cache, plain = quantized_cache(model), transformers.DynamicCache(config=model.config)
    for one in (cache, plain):
        with torch.no_grad():
            model(ids(64), past_key_values=one, use_cache=True)
    of_float16 = sum(layer.keys.numel() + layer.values.numel() for layer in plain.layers) * 2
    assert cache.nbytes / of_float16 == pytest.approx((64 + 2) / 128)  # heads of 64 values and a scale of 2 bytes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int8-g64-sym", "groups of 64 do not divide the 96 values of a head; these would: 8, 16, 32, 48, 96"),
        ("int4-token-sym", "stored in 8 bits"),
        ("uint8-token-asym", "symmetric"),
        ("int8-tensor-sym", "per token or group"),
        ("nf4-g32-sym", "stored in 8 bits"),
    ],
)
def test_refusals(text: str, message: str) -> None:
    with pytest.raises(PhiquantError, match=message):
        check(text, 96)


def test_eval_takes_a_grid_for_keys_and_values(tmp_path: Any) -> None:
    testing = pytest.importorskip("typer.testing")
    from phiquant.cli.app import app

    text = tmp_path / "text.txt"
    text.write_text(pq.testing.heldout_text()[:1500])
    arguments = ["eval", "phi3-tiny", "--text", str(text), "--window", "64", "--limit", "2", "--json"]
    plain, rounded = (
        json.loads(testing.CliRunner().invoke(app, arguments + more).output.splitlines()[-1])["perplexity"]
        for more in ([], ["--cache", INT8])
    )
    assert plain != rounded
    assert plain == pytest.approx(rounded, rel=1e-2)
    refused = testing.CliRunner().invoke(app, [*arguments, "--cache", "int8-g48-sym"])
    assert refused.exit_code == 1
    assert "groups of 48 do not divide" in refused.output
