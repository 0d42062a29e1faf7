"""OpenVINO folders in OpenVINO: logits, tokens and text against torch with the values that the file holds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import phiquant as pq
import pytest
import torch
from openvino_cases import Grids, matrices
from phiquant import PhiquantError
from phiquant.formats.openvino import writer
from phiquant.runtimes import check, openvino

EXACT, DEFAULT = 2e-6, 3e-2
KINDS = ["i4-g32", "u4-g64", "i8-channel", "u8-g32", "u2-g32", "nf4-g64", "mxfp4", "nvfp4", "fp8-channel", "codebook16"]


TEXTS = [
    "def f(x):\n\treturn x  # two  spaces", "हिन्दी में", "తెలుగు", "emoji 😀👩‍👩‍👧", "<|endoftext|>after", "  leading",
    "1234567 + 89", "a\u00a0b\u200bc", "\r\n\n\n", "ünïcödé, ﬁ, Å", " <|user|>\nhi<|end|>", "a", "trailing  ",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(path)
    return path


@torch.no_grad()
def torch_logits(model: Any, windows: Sequence[Sequence[int]]) -> list[np.ndarray]:
    return [model(torch.tensor([list(window)])).logits[0].numpy() for window in windows]


def worst(found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> float:
    pairs = zip(found, expected, strict=True)
    return max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs)


def ids(count: int) -> list[int]:
    return [(7 * i * i + 3) % 4000 for i in range(count)]


def exported(model: Any, folder: Path, out: Path, grid: str = "openvino:i4-g32", dtype: str = "float32") -> Any:
    """Write `model` with one grid for its layers; the model with the stored values."""
    names = matrices(model.config.num_hidden_layers, head=False)[:-1]
    source = Grids(model, folder, dict.fromkeys(names, grid) if grid else {}, dtype)
    writer.write(source, out)
    return source.model(model)


def test_every_kind_of_grid(make_phi3: Any, folder: Path, tmp_path: Path) -> None:
    """One model that has each of KINDS in it; also embedding and head."""
    model = make_phi3(num_hidden_layers=3)
    grids = dict(zip(matrices(3), [*(f"openvino:{kind}" for kind in KINDS), *["openvino:i4-g32"] * 4], strict=True))
    source = Grids(model, folder, grids)
    writer.write(source, tmp_path)
    windows = [ids(100), ids(1), ids(33)]
    expected = torch_logits(source.model(model), windows)
    assert worst(openvino.logits(tmp_path, windows), expected) <= EXACT
    assert worst(openvino.logits(tmp_path, windows, prefill=1), expected) <= EXACT
    assert worst(openvino.logits(tmp_path, windows, exact=False), expected) <= 2 * DEFAULT  # random weights


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_float_files(dtype: str, make_phi3: Any, folder: Path, tmp_path: Path) -> None:
    same = exported(make_phi3(num_hidden_layers=1), folder, tmp_path, "", dtype)
    windows = [ids(50)]
    assert worst(openvino.logits(tmp_path, windows), torch_logits(same, windows)) <= EXACT


ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}
LONGROPE = {
    **ROPE, "rope_type": "longrope", "attention_factor": None,
    "short_factor": [1.0 + 0.1 * i for i in range(12)], "long_factor": [2.0 + 0.5 * i for i in range(12)],
}  # fmt: skip
MODELS = {
    "tied": {"tie_word_embeddings": True},
    "heads of their own": {"num_key_value_heads": 4},
    "one shared head": {"num_key_value_heads": 1},
    "partial rotary": {"rope_parameters": ROPE},
    "sliding window": {"sliding_window": 16},
    "sliding window of 15": {"sliding_window": 15},
    "LongRoPE": {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32},
}


SLOW = ("heads of their own", "one shared head", "sliding window of 15")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in MODELS])
def test_models(name: str, make_phi3: Any, folder: Path, tmp_path: Path) -> None:
    """Lengths on both sides of the window and of LongRoPE's border: 31, 32, 33 and 80 tokens."""
    same = exported(make_phi3(num_hidden_layers=1, **MODELS[name]), folder, tmp_path)
    windows = [ids(31), ids(32), ids(33), ids(80)]
    expected = torch_logits(same, windows)
    assert worst(openvino.logits(tmp_path, windows), expected) <= EXACT
    short = windows[:2] if name == "LongRoPE" else windows  # beyond the border remembered keys keep short factors
    stepwise = openvino.logits(tmp_path, short, prefill=20)
    assert worst(stepwise, expected[: len(short)]) <= EXACT


@pytest.mark.slow
@pytest.mark.parametrize("name", ["phi-3-mini", "phi-3.5-mini", "phi-4-mini", "phi-4"])
def test_miniatures(name: str, tmp_path: Path) -> None:
    """Each real configuration made small: codes, logits at every border, tokens of texts in several scripts."""
    model, tokenizer = pq.testing.miniature(name)
    pq.quantize(model, "openvino:i4-g32")
    pq.export(model, tokenizer, tmp_path, "openvino")
    report = pq.verify(tmp_path, run=True, long=True, windows=1)
    assert report.ok, str(report)
    assert openvino.tokenize(tmp_path, TEXTS) == [tokenizer(text)["input_ids"] for text in TEXTS]


def test_a_fault_is_seen(make_phi3: Any, folder: Path, tmp_path: Path) -> None:
    """The bars above are no formality: a window that is one token wider, or long factors too late, miss them by far."""
    model = make_phi3(num_hidden_layers=1, **MODELS["LongRoPE"], sliding_window=16)
    same = exported(model, folder, tmp_path)
    expected = torch_logits(same, [ids(33)])
    model.config.sliding_window = 17
    exported(model, folder, tmp_path / "wider")
    assert worst(openvino.logits(tmp_path / "wider", [ids(33)]), expected) > 1000 * EXACT
    model.config.sliding_window = 16
    model.config.original_max_position_embeddings = 33
    model.config.rope_parameters["original_max_position_embeddings"] = 33
    exported(model, folder, tmp_path / "later")
    assert worst(openvino.logits(tmp_path / "later", [ids(33)]), expected) > 1000 * EXACT


@torch.no_grad()
def greedy(model: Any, prompt: Sequence[int], count: int) -> list[int]:
    given = torch.tensor([list(prompt)])
    made = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=count, do_sample=False)
    return made[0, len(prompt) :].tolist()


@pytest.mark.parametrize("attention", ["PA", "SDPA"])
def test_text_of_phi3_tiny(attention: Any, phi3_tiny: Any, tmp_path: Path) -> None:
    """LLMPipeline's greedy 64 tokens in the exact setting are torch's; the text too."""
    model, tokenizer = phi3_tiny
    pq.quantize(model, "openvino:i4-g32")
    pq.export(model, tokenizer, tmp_path, "openvino")
    prompt = "def fibonacci(n):\n    "
    made = openvino.generate(tmp_path, prompt, attention=attention)
    assert made.prompt_tokens == tokenizer(prompt)["input_ids"]
    assert made.tokens == greedy(model, made.prompt_tokens, 64)
    assert made.text == tokenizer.decode(made.tokens, skip_special_tokens=True)
    assert len(made.tokens) == 64


@pytest.mark.parametrize("attention", ["PA", "SDPA"])
def test_generation_with_a_window(attention: Any, make_phi3: Any, folder: Path, tmp_path: Path) -> None:
    """A prompt longer than the window; a pipeline that loses the window says something else."""
    model = make_phi3(sliding_window=16, eos_token_id=None, pad_token_id=0)
    same = exported(model, folder, tmp_path)
    same.config.eos_token_id = same.generation_config.eos_token_id = None
    expected = greedy(same, ids(40), 24)
    assert openvino.generate(tmp_path, ids(40), attention=attention, max_new_tokens=24).tokens == expected
    same.config.sliding_window = None
    assert greedy(same, ids(40), 24) != expected


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["PA", "SDPA"])
@pytest.mark.parametrize("length", [8, 40])
def test_generation_with_longrope(attention: Any, length: int, make_phi3: Any, folder: Path, tmp_path: Path) -> None:
    """On either side of the border at 32 tokens; across it, keys that were made with short factors stay so."""
    model = make_phi3(**MODELS["LongRoPE"], eos_token_id=None, pad_token_id=0)
    same = exported(model, folder, tmp_path)
    made = openvino.generate(tmp_path, ids(length), attention=attention, max_new_tokens=16)
    assert made.tokens == greedy(same, ids(length), 16)


def test_the_default_setting_on_phi3_tiny(phi3_tiny: Any, short_text: str, tmp_path: Path) -> None:
    model, tokenizer = phi3_tiny
    pq.quantize(model, "openvino:i4-g32")
    pq.export(model, tokenizer, tmp_path, "openvino")
    format = pq.formats.registry.find("openvino")
    exact = check.run(format, tmp_path, short_text, windows=1)
    default = check.run(format, tmp_path, short_text, windows=1, exact=False)
    assert exact.ok, exact
    assert exact.same_top == 1.0
    assert default.ok, default
    assert default.relative_error > EXACT
    assert default.same_top > 0.97, default


def test_tokenizer(tokenizer: Any, make_phi3: Any, folder: Path, tmp_path: Path) -> None:
    exported(make_phi3(num_hidden_layers=1), folder, tmp_path)
    assert openvino.tokenize(tmp_path, TEXTS) == [tokenizer(text)["input_ids"] for text in TEXTS]


def test_a_damaged_file_is_an_error(make_phi3: Any, folder: Path, tmp_path: Path) -> None:
    exported(make_phi3(num_hidden_layers=1), folder, tmp_path)
    (tmp_path / "openvino_model.bin").write_bytes(b"short")
    with pytest.raises(PhiquantError, match=r"OpenVINO (failed|crashed)"):
        openvino.logits(tmp_path, [ids(4)])
    with pytest.raises(PhiquantError, match="has no openvino_model"):
        openvino.logits(folder, [ids(4)])
