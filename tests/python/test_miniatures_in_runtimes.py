"""Every miniature in every format: codes by the format's reader, logits in its runtime; greedy text of phi3-tiny."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import phiquant as pq
import pytest
import torch
from phiquant import testing
from phiquant.export import locate
from phiquant.formats import receipt
from phiquant.formats.registry import FORMATS, find
from phiquant.miniatures import MINIATURES
from phiquant.model_source import ModelSource
from phiquant.runtimes import check
from phiquant.targets import TARGETS

pytest.importorskip("xllamacpp")
# QNN runs a static graph in an emulator whose wheel is not everywhere: test_qnn.py holds its bars.
RUNTIMES = [name for name in FORMATS if name != "qnn"]
# In the exact setting, on random weights, which are harder than phi3-tiny's: each runtime's own tests hold 2e-6 for ORT
# and OpenVINO, 2e-2 and 3e-2 for llama.cpp. Here torch in float32 is itself 1.2e-6 from torch in float64, ORT comes
# to 2.2e-6, OpenVINO to 2.4e-6, and llama.cpp's int8 activations to 2.4e-2 (Q4_0) and 3.4e-2 (Q4_K).
BARS = {"onnx": 2.5e-6, "openvino": 3e-6, "mlx": 1e-5, "safetensors": 1e-6}
RUN = {
    "gguf": ("gguf:F32", "gguf:Q4_0", "gguf:Q4_K"),
    "onnx": ("onnx:F32", "onnx:int4-g32"),
    "openvino": ("openvino:F32", "openvino:i4-g32"),
    "mlx": ("mlx:F32", "mlx:4bit-g32"),
    "safetensors": ("safetensors:F32", "safetensors:int4-g32"),
}
LLAMA_CPP = {"gguf:F32": 1e-3, "gguf:Q4_0": 2.5e-2, "gguf:Q4_K": 4e-2}
ROUNDS_NORMS = {"mlx", "safetensors"}  # the others keep norms in float32 beside half-precision weights


def holds_tables(target: str, tied: bool) -> bool:
    """Whether embedding and head may have codes: Transformers ties no packed weights and packs no fp4 embedding."""
    return not target.startswith("safetensors:") or not (tied or target.endswith("fp4"))


PROMPT = "def read(path):\n    "


def pick(target: str, name: str, fast: set[tuple[str, str]]) -> Any:
    return pytest.param(target, name, marks=[] if (target, name) in fast else pytest.mark.slow, id=f"{target}-{name}")


def quantized(name: str, target: str) -> tuple[Any, Any, str | None]:
    """A miniature with codes for every matrix that may have them, its tokenizer, the dtype of a float target."""
    model, tokenizer = testing.miniature(name)
    chosen = TARGETS[target]
    if chosen.spec is None and target.rpartition(":")[2] in ("F32", "F16", "BF16"):
        return model, tokenizer, chosen.float_dtype
    if chosen.spec is None or not holds_tables(target, model.config.tie_word_embeddings):
        return pq.quantize(model, target), tokenizer, None
    solver = "kmeans" if "codebook" in str(chosen.spec) else "rtn"
    recipe = pq.Recipe({"*embed_tokens": target, "*lm_head": target}, default=target)
    return pq.quantize(model, recipe, solver=solver), tokenizer, None


ALL = [
    pick(t, n, {("gguf:Q4_0", "phi-4-mini")}) for t in TARGETS for n in MINIATURES if t.partition(":")[0] in RUNTIMES
]


@pytest.mark.parametrize(("target", "name"), ALL)
def test_every_code_is_in_the_file(target: str, name: str, tmp_path: Path) -> None:
    model, tokenizer, float_dtype = quantized(name, target)
    pq.export(model, tokenizer, tmp_path, format=TARGETS[target].format, float_dtype=float_dtype)
    source = ModelSource(model, tokenizer, float_dtype)
    stored = find(TARGETS[target].format).reader_module().read(locate(tmp_path, receipt.read(tmp_path)))
    extra = set(stored) - {entry.name for entry in source.entries}
    assert all(name.startswith("rope_factors_") for name in extra), extra  # GGUF keeps LongRoPE's factors as tensors
    assert float_dtype or any(entry.spec for entry in source.entries)
    for entry in source.entries:
        value = source.read(entry)
        if entry.spec is not None:
            assert stored[entry.name].digests(entry.spec) == value.digests(), entry.name
        else:
            kept = torch.from_numpy(np.array(stored[entry.name].values()))
            rounds = float_dtype and (value.dim() == 2 or TARGETS[target].format in ROUNDS_NORMS)
            rounded = value.to(getattr(torch, float_dtype)) if rounds and float_dtype else value
            assert torch.equal(kept, rounded.float()), entry.name


@pytest.mark.parametrize(
    ("target", "name"),
    [pick(t, n, {("gguf:F32", "phi-3-mini")}) for f in RUNTIMES for t in RUN[f] for n in MINIATURES],
)
def test_logits(target: str, name: str, tmp_path: Path) -> None:
    """One window, no longer than the sliding window that llama.cpp and mlx-lm ignore (docs/long-context.md)."""
    model, tokenizer, float_dtype = quantized(name, target)
    format = TARGETS[target].format
    options = {"long_factors": "short"} if format == "mlx" and model.config.rope_parameters.get("long_factor") else {}
    pq.export(model, tokenizer, tmp_path, format=format, float_dtype=float_dtype, **options)
    path = locate(tmp_path, receipt.read(tmp_path))
    runtime = check.runtime_of(find(format))
    length = min(40, model.config.max_position_embeddings)
    row = torch.randint(3, 1000, (length,), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.no_grad():
        expected = model(torch.tensor([row])).logits[0]
    (got,) = runtime.logits(path, [row], exact=True)
    error = check.relative_error([torch.tensor(got)], [expected])
    assert error <= (LLAMA_CPP.get(target) or BARS[format])


@pytest.mark.parametrize("format", [pytest.param(f, marks=[] if f == "gguf" else pytest.mark.slow) for f in RUNTIMES])
def test_greedy_text(format: str, phi3_tiny: Any, tmp_path: Path) -> None:
    """64 tokens of the runtime's own generate: torch's, on the same values. llama.cpp has the float file."""
    model, tokenizer = phi3_tiny
    if format != "gguf":
        pq.quantize(model, RUN[format][-1])
    pq.export(model, tokenizer, tmp_path, format=format)
    ids = tokenizer(PROMPT)["input_ids"]
    with torch.no_grad():
        made = model.generate(torch.tensor([ids]), max_new_tokens=64, do_sample=False, pad_token_id=0)
    expected = made[0, len(ids) :].tolist()
    assert len(expected) == 64
    path = locate(tmp_path, receipt.read(tmp_path))
    for prompt in (PROMPT, ids):
        found = check.runtime_of(find(format)).generate(path, prompt, max_new_tokens=64, exact=True)
        assert found.prompt_tokens == ids
        assert found.tokens == expected
    assert found.text == tokenizer.decode(expected)
