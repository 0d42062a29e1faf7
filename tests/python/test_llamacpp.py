"""GGUF files in llama.cpp: logits against torch on the stored values, text, and files that make it fail."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_cases import Tensors, stored_model
from phiquant.errors import PhiquantError
from phiquant.formats.gguf import reader as gguf_reader
from phiquant.formats.gguf import writer as gguf
from phiquant.formats.gguf.types import F16
from phiquant.formats.source import Entry
from phiquant.runtimes import llamacpp

pytest.importorskip("xllamacpp")

# Bars on |llama.cpp - torch| / |torch| over all logits. With float weights, llama.cpp rounds activations to the
# weights' type (float16: 11 bits, bfloat16: 8); with quantized ones it rounds them to int8, in blocks of 32 or 256.
_BLOCKS = dict.fromkeys(["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "MXFP4", "NVFP4"], 2e-2)
_SUPER = dict.fromkeys(["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "TQ2_0", "TQ1_0"], 3e-2)
BARS = {"F32": 1e-5, "F16": 1e-3, "BF16": 5e-3} | _BLOCKS | _SUPER
USUAL = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_K", "Q6_K", "TQ1_0", "NVFP4")  # the others are slow tests
FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@pytest.fixture(scope="module")
def folder(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def file(make_phi3: Any, folder: Path, tmp_path: Path) -> Path:
    """A file of one random layer, Q4_0."""
    gguf.write(Tensors(make_phi3(num_hidden_layers=1), folder, layers="gguf:Q4_0"), tmp_path)
    return tmp_path / gguf.FILE


@torch.no_grad()
def _torch_logits(model: Any, windows: Sequence[Sequence[int]]) -> list[np.ndarray]:
    return [model(torch.tensor([list(window)])).logits[0].numpy() for window in windows]


def _worst(found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> float:
    pairs = zip(found, expected, strict=True)
    return max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs)


@pytest.mark.parametrize(
    "kind", [kind if kind in USUAL else pytest.param(kind, marks=pytest.mark.slow) for kind in BARS]
)
def test_logits(kind: str, phi3_tiny: Any, folder: Path, short_text: str, tmp_path: Path) -> None:
    """phi3-tiny on held-out text, in windows of different lengths."""
    model, tokenizer = phi3_tiny
    source = Tensors(model, folder, None if kind in FLOATS else f"gguf:{kind}", dtype=FLOATS.get(kind, "float16"))
    gguf.write(source, tmp_path, ternary="TQ1_0" if kind == "TQ1_0" else "TQ2_0")
    ids = tokenizer(short_text)["input_ids"]
    windows = [ids[:200], ids[200:201], ids[100:164]]
    stored = gguf_reader.read(tmp_path / gguf.FILE)
    assert kind in {tensor.stored_as for tensor in stored.values()}
    assert kind in FLOATS or llamacpp.bar(stored, exact=True) == BARS[kind]
    found = llamacpp.logits(tmp_path / gguf.FILE, windows)
    assert [a.shape for a in found] == [(200, 4096), (1, 4096), (64, 4096)]
    assert all(a.dtype == np.float32 for a in found)
    assert _worst(found, _torch_logits(stored_model(model, source), windows)) <= BARS[kind]


def test_long_windows_are_decoded_in_parts(make_phi3: Any, folder: Path, tmp_path: Path) -> None:
    model = make_phi3(num_hidden_layers=1, max_position_embeddings=1024, original_max_position_embeddings=1024)
    source = Tensors(model, folder, dtype="float32")
    gguf.write(source, tmp_path)
    windows = [[(7 * i * i + 3) % 4000 for i in range(700)]]
    found = llamacpp.logits(tmp_path / gguf.FILE, windows, threads=1)
    assert _worst(found, _torch_logits(model, windows)) <= 1e-5


def test_what_llama_cpp_does_by_default(make_phi3: Any, folder: Path, tmp_path: Path) -> None:
    """Flash attention and a float16 cache: another arithmetic, the same model."""
    model = make_phi3(num_hidden_layers=1)
    source = Tensors(model, folder, dtype="float32")
    gguf.write(source, tmp_path)
    windows = [list(range(100, 150))]
    exact = llamacpp.logits(tmp_path / gguf.FILE, windows)
    usual = llamacpp.logits(tmp_path / gguf.FILE, windows, exact=False)
    assert 1e-6 < _worst(usual, exact) < 5e-3


def test_tied_quantized_embedding(make_phi3: Any, folder: Path, tmp_path: Path) -> None:
    """The embedding is the head as well: its codes are used twice. 2e-2 holds for the int8 activations."""
    model = make_phi3(num_hidden_layers=1, tie_word_embeddings=True)
    source = Tensors(model, folder, tables="int8-channel-sym-f16", dtype="float32")
    gguf.write(source, tmp_path)
    windows = [list(range(1000, 1050))]
    found = llamacpp.logits(tmp_path / gguf.FILE, windows)
    assert _worst(found, _torch_logits(stored_model(model, source), windows)) <= 2e-2


def test_longrope(make_phi3: Any, folder: Path, tmp_path: Path) -> None:
    """Short and long factors, chosen by the length of the text as in Transformers; a part of the head rotates."""
    factors = {"short_factor": [1 + i / 50 for i in range(12)], "long_factor": [1 + i / 2 for i in range(12)]}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75, **factors}
    rope["original_max_position_embeddings"] = 512
    model = make_phi3(
        num_hidden_layers=1, max_position_embeddings=2048, original_max_position_embeddings=512, rope_parameters=rope
    )
    source = Tensors(model, folder, dtype="float32")
    result = gguf.write(source, tmp_path)
    assert "LongRoPE" in result["warnings"][0]
    windows = [[(11 * i + 5) % 4000 for i in range(n)] for n in (60, 600)]
    expected = _torch_logits(model, windows)
    assert _worst(llamacpp.logits(tmp_path / gguf.FILE, windows), expected) <= 1e-5
    other = llamacpp.logits(tmp_path / gguf.FILE, windows[:1], context=1024)
    assert _worst(other, expected[:1]) > 1e-2  # the long factors, on a text that is short


def test_greedy_text_is_torchs(phi3_tiny: Any, folder: Path, tmp_path: Path) -> None:
    model, tokenizer = phi3_tiny
    gguf.write(Tensors(model, folder, dtype="float32"), tmp_path)
    prompt = "import os\n\n\ndef read_lines(path):\n"
    found = llamacpp.generate(tmp_path / gguf.FILE, prompt, max_new_tokens=64)
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    expected = model.generate(ids, max_new_tokens=64, do_sample=False)[0, ids.shape[1] :].tolist()
    assert found.prompt_tokens == ids[0].tolist()
    assert found.tokens == expected[: len(found.tokens)]
    assert len(found.tokens) == 64 or expected[len(found.tokens)] == tokenizer.eos_token_id
    assert found.text == tokenizer.decode(found.tokens)
    again = llamacpp.generate(tmp_path / gguf.FILE, found.prompt_tokens, max_new_tokens=4)
    assert again.tokens == found.tokens[:4]


def test_a_crash_is_an_error(make_phi3: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms written as F16, which llama.cpp cannot multiply by: it aborts."""
    kept = gguf.storage_type

    def in_half(entry: Entry, *rest: Any) -> Any:
        return F16 if entry.name.endswith("norm.weight") else kept(entry, *rest)

    monkeypatch.setattr(gguf, "storage_type", in_half)
    gguf.write(Tensors(make_phi3(num_hidden_layers=1), folder), tmp_path)
    with pytest.raises(PhiquantError, match=rf"crashed \({signal.SIGABRT.name}\).*model\.gguf") as caught:
        llamacpp.logits(tmp_path / gguf.FILE, [[1, 2, 3]])
    assert "GGML_ASSERT" in str(caught.value) or "binary-ops" in str(caught.value)


def test_damaged_files_are_errors(file: Path) -> None:
    whole = file.read_bytes()
    at = whole.index(b"granite-embed")
    cases = {
        "not within the file bounds": whole[: len(whole) // 2],
        "failed to read key-value pairs": whole[:100],
        "invalid magic": b"XXXX" + whole[4:],
        "unknown pre-tokenizer type: 'xranite": whole[:at] + b"x" + whole[at + 1 :],
    }
    for message, data in cases.items():
        file.write_bytes(data)
        with pytest.raises(PhiquantError, match=r"(?s)llama\.cpp failed on .*could not load the file") as caught:
            llamacpp.tokenize(file, ["x"])
        assert message in str(caught.value)


def test_wrong_requests_are_errors(file: Path, tmp_path: Path) -> None:
    with pytest.raises(PhiquantError, match="no such file"):
        llamacpp.logits(tmp_path / "absent.gguf", [[1]])
    with pytest.raises(PhiquantError, match="token 5000 is not in the vocabulary of 4096"):
        llamacpp.logits(file, [[1, 5000]])
    with pytest.raises(ValueError, match="window 1 has no tokens"):
        llamacpp.logits(file, [[1], []])
    with pytest.raises(ValueError, match="more than the context of 256"):
        llamacpp.logits(file, [[1] * 257], context=256)
    with pytest.raises(PhiquantError, match="the prompt is empty"):
        llamacpp.generate(file, [])


def test_it_does_not_wait_for_ever(file: Path) -> None:
    began = time.monotonic()
    with pytest.raises(PhiquantError, match=r"did not finish with .* in 0\.02 s"):
        llamacpp.logits(file, [[1] * 500] * 200, timeout=0.02)
    assert time.monotonic() - began < 30


def test_nothing_is_left_behind(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The arrays stay readable after their folder is gone."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    found = llamacpp.logits(file, [[1, 2, 3]])
    assert not list((tmp_path / "temporary").iterdir())
    assert np.isfinite(found[0]).all()


def test_without_the_package(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(ImportError, match=r"phiquant\[gguf\]"):
        llamacpp.logits(file, [[1]])
