"""ONNX folders in ONNX Runtime and GenAI: logits and text against torch on the stored values."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import phiquant as pq
import pytest
import torch
from gguf_cases import Tensors, stored_model
from phiquant import PhiquantError, Recipe, testing
from phiquant.formats.onnx import reader, writer
from phiquant.formats.onnx.file import DataFile, Graph
from phiquant.formats.onnx.graph import Decoder
from phiquant.formats.registry import find
from phiquant.runtimes import check
from phiquant.runtimes import onnx as runtime

onnx, ort = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
pytest.importorskip("onnxruntime_genai")

PROMPT = "import os\n\n\ndef read_lines(path):\n"


@torch.no_grad()
def torch_logits(model: Any, window: list[int]) -> np.ndarray:
    return np.asarray(model(torch.tensor([window])).logits[0].numpy())


def error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def words(count: int, vocabulary: int) -> list[int]:
    return [(7 * i * i + 3) % vocabulary for i in range(count)]


# Of each form a symmetric and an asymmetric grid; every width; scales per row; a quantized table and head.
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "F32": (None, {}),
    "int4-g32": ("onnx:int4-g32", {}),
    "uint4-g64-qdq": ("onnx:uint4-g64", {"form": "qdq"}),
    "int2-g32-qdq": ("onnx:int2-g32", {"form": "qdq"}),
    "int8-channel-qdq": ("onnx:int8-channel", {"form": "qdq"}),
    "mixed": (
        Recipe(
            {
                "*.v_proj": "onnx:uint8-g32",
                "*layers.1.mlp.up_proj": "float",
                "*embed_tokens": "onnx:uint4-g16",
                "lm_head": "int3-g32-sym-bf16",
                "*down_proj": "onnx:int8-channel",
            },
            default="onnx:uint2-g64",
        ),
        {},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_are_torchs(case: str, phi3_tiny: Any, short_text: str, tmp_path: Path) -> None:
    """2e-6 with float activations, 3e-2 as the file says, and then the same word is likeliest almost always."""
    (model, tokenizer), (grid, options) = phi3_tiny, CASES[case]
    pq.export(pq.quantize(model, grid) if grid else model, tokenizer, tmp_path, format="onnx", **options)
    ids = tokenizer(short_text)["input_ids"]
    windows = [ids[:200], ids[200:201], ids[100:164]]
    expected = [torch_logits(model, window) for window in windows]
    exact = runtime.logits(tmp_path, windows)
    assert [a.shape for a in exact] == [(200, 4096), (1, 4096), (64, 4096)]
    assert max(map(error, exact, expected)) <= 2e-6
    fast = runtime.logits(tmp_path, windows, exact=False)
    errors = list(map(error, fast, expected))
    assert max(errors) <= 3e-2
    assert (errors[0] > 1e-4) == (grid is not None)  # it is another arithmetic
    assert (fast[0].argmax(-1) == expected[0].argmax(-1)).mean() > 0.93
    bars = [runtime.bar(reader.read(tmp_path), exact) for exact in (True, False)]
    assert bars == [4e-6, 3e-2 if grid else 4e-6]


def test_int8_dynamic(phi3_tiny: Any, short_text: str, tmp_path: Path) -> None:
    model, tokenizer = phi3_tiny
    pq.export(
        pq.quantize(model, "onnx:int8-dynamic"), tokenizer, tmp_path, format="onnx", activations="uint8-tensor-asym"
    )
    window = tokenizer(short_text)["input_ids"][:200]
    found = runtime.logits(tmp_path, [window])[0]
    assert 1e-4 < error(found, torch_logits(model, window)) <= 4e-2
    assert runtime.bar(reader.read(tmp_path), True) == 1e-1


def test_integers_are_multiplied_as_the_operators_say(tmp_path: Path) -> None:
    """One product of int8-dynamic against its formula in numpy, to the last bits."""
    model = testing.random_phi3(num_hidden_layers=1)
    source = Tensors(model, None, "int8-channel-sym")
    name = "model.layers.0.mlp.down_proj"
    entry = next(entry for entry in source.entries if entry.module == name)
    data = DataFile("model.onnx.data")
    weight = writer.onnx_weights.place(entry, writer.onnx_weights.layout(entry, dynamic=True), data)
    decoder = Decoder.__new__(Decoder)
    decoder.graph, decoder.data, decoder.weights = Graph(), data, {entry.name: weight}
    x = decoder.graph.input("x", "float32", ["rows", 256])
    decoder._linear(x, name, "y")
    decoder.graph.output("y", "float32", ["rows", 128])
    (tmp_path / "model.onnx").write_bytes(decoder.graph.serialize(21, 10))
    buffers = writer.onnx_weights.Writing(source, weight, "").contents()
    with open(tmp_path / "model.onnx.data", "wb") as file:
        file.writelines(data.buffers(entry.name, buffers))
    values = np.random.default_rng(0).normal(size=(5, 256)).astype(np.float32)
    session = ort.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    found = session.run(None, {"x": values})[0]
    scale = np.float32((max(values.max(), 0) - min(values.min(), 0)) / 255)
    point = np.clip(np.rint(-values.min() / scale), 0, 255)
    rounded = np.clip(np.rint(values / scale) + point, 0, 255) - point
    codes = source.tensors[entry.name]
    expected = rounded @ codes.codes.numpy().T.astype(np.float64) * scale * codes.scales.numpy()[:, 0]
    assert error(found, expected) <= 1e-6


def test_text_is_torchs(phi3_tiny: Any, tmp_path: Path) -> None:
    """64 words, chosen greedily by GenAI's own loop, in the exact setting; and the tokens of the prompt."""
    model, tokenizer = phi3_tiny
    pq.export(pq.quantize(model, "onnx:int4-g32"), tokenizer, tmp_path, format="onnx")
    found = runtime.generate(tmp_path, PROMPT)
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    expected = model.generate(ids, max_new_tokens=64, do_sample=False)[0, ids.shape[1] :].tolist()
    assert found.prompt_tokens == ids[0].tolist()
    assert found.tokens == expected
    assert len(expected) == 64
    assert found.text == tokenizer.decode(expected)
    fast = runtime.generate(tmp_path, found.prompt_tokens, exact=False, max_new_tokens=8)
    assert len(fast.tokens) == 8


# Lengths on both sides of the sliding window 47, of the original context 512, and of nothing.
SLOW = ("phi-3.5-mini", "phi-4")  # what they have, the other two have as well
LENGTHS = {"phi-3-mini": (40, 48, 100), "phi-3.5-mini": (512, 513), "phi-4-mini": (512, 513), "phi-4": (60,)}
# Rounding in float32 grows with the size of the rows: torch itself is 1.3e-6 away from float64 at 768.
BARS = {"phi-3-mini": 2e-6, "phi-3.5-mini": 3e-6, "phi-4-mini": 3e-6, "phi-4": 2e-6}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else []) for name in LENGTHS]
)
def test_miniatures(name: str, tmp_path: Path) -> None:
    """The sliding window, LongRoPE, a rotary part of the head, grouped queries, a tied table; then GenAI's text."""
    model, tokenizer = testing.miniature(name)
    tables = {"*embed_tokens": "onnx:uint8-g32"} | ({"lm_head": "onnx:uint8-g32"} if name == "phi-4-mini" else {})
    model = pq.quantize(model, Recipe(tables, default="onnx:int4-g32"))
    pq.export(model, tokenizer, tmp_path, format="onnx")
    windows = [words(length, model.config.vocab_size) for length in LENGTHS[name]]
    found = runtime.logits(tmp_path, windows)
    assert max(error(a, torch_logits(model, w)) for a, w in zip(found, windows, strict=True)) <= BARS[name]
    prompt = windows[0][:30]
    text = runtime.generate(tmp_path, prompt, max_new_tokens=24).tokens
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False, use_cache=True)[0, 30:]
    assert text == expected.tolist()


def test_wrong_factors_and_windows_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison of test_miniatures can fail: one row of the window, one position of the original context."""
    model, tokenizer = testing.miniature("phi-3-mini")
    kept = Decoder.build

    def wrong(self: Decoder) -> Graph:
        self.window += 1
        return kept(self)

    monkeypatch.setattr(Decoder, "build", wrong)
    pq.export(model, tokenizer, tmp_path, format="onnx")
    windows = [words(length, model.config.vocab_size) for length in (47, 60)]
    short, long = map(error, runtime.logits(tmp_path, windows), [torch_logits(model, w) for w in windows])
    assert short <= 2e-6
    assert long > 1e-3


def test_floats_are_computed_in_float32(make_phi3: Any, tokenizer: Any, tmp_path: Path) -> None:
    """float16 and bfloat16 tensors are cast when the model is loaded: the values are the stored ones."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    for dtype, tied in (("float16", False), ("bfloat16", True)):
        model = make_phi3(num_hidden_layers=1, tie_word_embeddings=tied)
        source = Tensors(model, tmp_path / "tokenizer", dtype=dtype)
        writer.write(source, tmp_path / dtype)
        window = words(50, 4096)
        found = runtime.logits(tmp_path / dtype, [window])[0]
        assert error(found, torch_logits(stored_model(model, source), window)) <= 2e-6


def test_verify_runs_it(tiny_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    pq.export(pq.quantize(tiny_model, "onnx:uint4-g32"), tokenizer, tmp_path, format="onnx")
    report = pq.verify(tmp_path, run=True, windows=1)
    assert report.ok
    assert report.runtime is not None
    assert report.runtime.name == "onnxruntime"
    assert report.runtime.same_top == 1.0
    assert check.runtime_of(find("onnx")) is runtime


def test_broken_folders_are_errors(tiny_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pq.export(tiny_model, tokenizer, out, format="onnx")
    with pytest.raises(PhiquantError, match=r"has no model\.onnx"):
        runtime.logits(tmp_path, [[1]])
    with pytest.raises(ValueError, match="window 0 has no tokens"):
        runtime.logits(out, [[]])
    with pytest.raises(PhiquantError, match="the prompt is empty"):
        runtime.generate(out, [])
    with pytest.raises(PhiquantError, match=r"(?s)onnxruntime failed on .*out of data bounds"):
        runtime.logits(out, [[5000]])
    (out / writer.DATA).write_bytes(b"")
    with pytest.raises(PhiquantError, match="onnxruntime failed on"):
        runtime.logits(out, [[1]])


@pytest.mark.slow
def test_float_graphs_compute_what_the_builders_do(make_phi3: Any, tokenizer: Any, tmp_path: Path) -> None:
    """ORT-GenAI's own model builder as oracle: its float32 graph and ours give the same logits."""
    pytest.importorskip("onnx_ir")
    # Its builder takes any linear whose rows are as many as the words for the head.
    model = make_phi3(vocab_size=4096 + 32)
    model.save_pretrained(tmp_path / "hf")
    tokenizer.save_pretrained(tmp_path / "hf")
    pq.export(model, tokenizer, tmp_path / "ours", format="onnx")
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(tmp_path / "hf")]
    command += ["-o", str(tmp_path / "theirs"), "-p", "fp32", "-e", "cpu", "-c", str(tmp_path / "cache")]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    windows = [words(n, 4096) for n in (10, 60)]
    ours, theirs = (runtime.logits(tmp_path / place, windows) for place in ("ours", "theirs"))
    assert max(map(error, ours, theirs)) <= 2e-6


LONG = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1 + i / 50 for i in range(16)],
    "long_factor": [1 + i / 2 for i in range(16)],
}  # fmt: skip


def crossing(make_phi3: Any, tokenizer: Any, out: Path, original: int) -> tuple[list[int], list[int]]:
    """24 words of GenAI that begin 12 before the end of the original context, and torch's, which computes all anew."""
    sizes = {"max_position_embeddings": 2 * original, "original_max_position_embeddings": original}
    model = make_phi3(
        num_hidden_layers=1, rope_parameters={**LONG, "original_max_position_embeddings": original}, **sizes
    )
    pq.export(model, tokenizer, out, format="onnx")
    tokens = words(original - 12, 4096)
    found = runtime.generate(out, tokens, max_new_tokens=24).tokens
    expected: list[int] = []
    for _ in range(24):
        expected.append(int(torch_logits(model, tokens + expected)[-1].argmax()))
    return found, expected


def test_text_that_grows_out_of_the_original_context(make_phi3: Any, tokenizer: Any, tmp_path: Path) -> None:
    """Cached keys keep the short factors: up to the border GenAI says what torch does, after it something else."""
    found, expected = crossing(make_phi3, tokenizer, tmp_path, 128)
    assert found[:13] == expected[:13]
    assert found != expected


@pytest.mark.slow
def test_the_border_at_4097(make_phi3: Any, tokenizer: Any, tmp_path: Path) -> None:
    """At 4097 tokens, Phi-3's original context and one more, GenAI begins anew with the long factors."""
    found, expected = crossing(make_phi3, tokenizer, tmp_path, 4096)
    assert found == expected
