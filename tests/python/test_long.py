"""The RoPE and window gate passes files as they are, and fails each of the faults that users of other tools met.

Each fault is put into a file that was written without it. References: the issues named in FAULTS.
"""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import phiquant as pq
import pytest
from phiquant import testing
from phiquant.errors import PhiquantError
from phiquant.export import locate
from phiquant.formats import receipt
from phiquant.formats.gguf import writer as gguf
from phiquant.formats.registry import FORMATS, find
from phiquant.miniatures import miniature_config
from phiquant.models.rope import read_rope
from phiquant.runtimes import long

pytest.importorskip("xllamacpp")
FAULTS = {
    "factors swapped": "llama.cpp 24823, exllamav2 741: the wrong set of LongRoPE factors",
    "attention factor missing": "executorch PR 19235: repetitions on Phi-4-mini",
    "partial rotary ignored": "llama.cpp 12091: the whole head rotated on Phi-4-mini",
    "window off by one": "onnxruntime-genai 552, 954: nonsense past the window of Phi-3-mini",
    "original context wrong": "unsloth 1854, llama.cpp 8241: factors switched at the wrong length",
    "theta wrong": "the default of another model",
}
HALF = 24  # of the 48 rotated values of a head of 64
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.01 * i for i in range(HALF)],
    "long_factor": [1.0 + 0.3 * i for i in range(HALF)],
    "partial_rotary_factor": 0.75,
    "original_max_position_embeddings": 512,
}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}


def model_for(fault: str) -> Any:
    """A small model that has what the fault breaks."""
    sizes = {"hidden_size": 256, "max_position_embeddings": 1024, "num_hidden_layers": 1}
    if fault == "partial rotary ignored":
        return testing.random_phi3(**sizes, rope_parameters=dict(PLAIN))
    window = 40 if fault == "window off by one" else None
    return testing.random_phi3(**sizes, rope_parameters=dict(LONGROPE), sliding_window=window)


def break_gguf(path: Path, fault: str) -> None:
    """Change one value of the metadata, or exchange the two tensors of factors."""
    data = bytearray(path.read_bytes())
    if fault == "factors swapped":
        import gguf as package

        tensors = {t.name: t for t in package.GGUFReader(path).tensors}
        a, b = (tensors[f"rope_factors_{kind}.weight"] for kind in ("long", "short"))
        for place, source in ((a, b), (b, a)):
            data[place.data_offset : place.data_offset + place.n_bytes] = source.data.tobytes()
    else:
        key, kind, value = {
            "attention factor missing": ("rope.scaling.attn_factor", "f", 1.0),
            "partial rotary ignored": ("rope.dimension_count", "I", 64),
            "window off by one": ("attention.sliding_window", "I", 39),
            "original context wrong": ("rope.scaling.original_context_length", "I", 1024),
            "theta wrong": ("rope.freq_base", "f", 500000.0),
        }[fault]
        at = data.index(f"phi3.{key}".encode()) + len(f"phi3.{key}") + 4  # behind the key and its type
        data[at : at + 4] = struct.pack(f"<{kind}", value)
    path.write_bytes(data)


def break_config(folder: Path, fault: str) -> None:
    """Change config.json, where safetensors and MLX have these settings."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    beside = rope if "rope_parameters" in config else config  # MLX has the simple ones beside rope_scaling
    if fault == "factors swapped":
        rope["short_factor"], rope["long_factor"] = rope["long_factor"], rope["short_factor"]
    elif fault == "attention factor missing" and beside is rope:
        rope["attention_factor"] = 1.0
    elif fault == "attention factor missing":
        config["max_position_embeddings"] = config["original_max_position_embeddings"]  # MLX computes it from these
    elif fault == "partial rotary ignored":
        beside["partial_rotary_factor"] = 1.0
    elif fault == "window off by one":
        config["sliding_window"] -= 1
    elif fault == "original context wrong":
        rope["original_max_position_embeddings"] = config["original_max_position_embeddings"] = 1024
    else:
        beside["rope_theta"] = 500000.0
    path.write_text(json.dumps(config))


def break_graph(folder: Path, fault: str) -> None:
    """Write the weights again in a graph made of other settings; what config.json says stays right."""
    written, said = receipt.read(folder), (folder / "config.json")
    kept = said.read_bytes() if said.is_file() else None
    model = model_for(fault)
    rope = dict(model.config.rope_parameters)
    factor = read_rope(model.config.to_dict()).attention_factor
    if fault == "factors swapped":
        rope |= {"short_factor": rope["long_factor"], "long_factor": rope["short_factor"]}
    elif fault == "window off by one":
        model.config.sliding_window -= 1
    elif fault == "original context wrong":
        rope |= {"original_max_position_embeddings": 1024, "attention_factor": factor}
        model.config.original_max_position_embeddings = 1024
    else:
        rope |= {
            "attention factor missing": {"attention_factor": 1.0},
            "partial rotary ignored": {"partial_rotary_factor": 1.0},
            "theta wrong": {"rope_theta": 500000.0},
        }[fault]
    model.config.rope_parameters = rope
    pq.export(model, pq.load("phi3-tiny")[1], folder, format=written["format"])
    if kept is not None:
        said.write_bytes(kept)
    receipt.write(folder, {**receipt.read(folder), "model": written["model"]})


BREAK: dict[str, Callable[[Path, str], None]] = {
    "gguf": break_gguf,
    "safetensors": break_config,
    "mlx": break_config,
    "onnx": break_graph,
    "openvino": break_graph,
}
# The runtime does not heed the setting, so only the settings of the file tell.
UNHEEDED = {("gguf", "window off by one"), ("mlx", "window off by one")}
FAST = {("gguf", "factors swapped"), ("gguf", "attention factor missing")}
CASES = [
    pytest.param(format, fault, marks=[] if (format, fault) in FAST else pytest.mark.slow, id=f"{format}: {fault}")
    for format in BREAK
    if format in FORMATS
    for fault in FAULTS
]


def gate(out: Path) -> long.LongResult:
    written = receipt.read(out)
    return long.run(find(written["format"]), locate(out, written), written["model"])


@pytest.mark.parametrize(("format", "fault"), CASES)
def test_a_fault_in_the_file_is_caught(format: str, fault: str, tokenizer: Any, tmp_path: Path) -> None:
    pq.export(model_for(fault), tokenizer, tmp_path, format=format)
    good = gate(tmp_path)
    assert good.ok, good
    assert all(one.relative_error <= one.bar for one in good.lengths if one.deviation is None)
    BREAK[format](locate(tmp_path, receipt.read(tmp_path)), fault)
    bad = gate(tmp_path)
    assert not bad.ok
    computed = [one.tokens for one in bad.lengths if not one.ok]
    assert bool(computed) != ((format, fault) in UNHEEDED)
    assert computed or bad.differences
    if fault == "original context wrong" and BREAK[format] is not break_config:  # there the factor follows from it
        assert min(computed) == 513  # the first length behind the border


def test_what_the_writer_gets_wrong_is_caught(tokenizer: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """All digests agree then: verify() alone is satisfied, the gate is not."""

    def forgetful(config: Any) -> Any:
        return dataclasses.replace(read_rope(config), attention_factor=1.0)

    monkeypatch.setattr(gguf, "read_rope", forgetful)
    pq.export(model_for("attention factor missing"), tokenizer, tmp_path)
    monkeypatch.undo()
    assert pq.verify(tmp_path, run=True).ok
    report = pq.verify(tmp_path, long=True)
    assert not report.ok
    assert report.to_dict()["long"]["differences"] == [
        "RoPE: attention factor is 1 in the file, 1.05409255 in the model"
    ]
    assert "above the bar" in str(report)


def test_lengths_lie_on_both_sides_of_every_border() -> None:
    assert long.lengths(miniature_config("phi-3-mini")) == [47, 48, 64, 70]
    assert long.lengths(miniature_config("phi-3.5-mini")) == [64, 512, 513, 768]
    assert long.lengths(miniature_config("phi-4")) == [64, 256]
    both = {**miniature_config("phi-4-mini"), "sliding_window": 600, "max_position_embeddings": 700}
    assert long.lengths(both) == [64, 512, 513, 600, 601, 700]


def test_a_known_deviation_is_named_and_checked(tokenizer: Any, tmp_path: Path) -> None:
    model = testing.random_phi3(sliding_window=40, num_hidden_layers=1)
    pq.export(model, tokenizer, tmp_path)
    report = pq.verify(tmp_path, long=True)
    assert report.ok
    within, behind = report.long.lengths[0], report.long.lengths[-1]
    assert (within.tokens, within.deviation, behind.tokens) == (40, None, 64)
    assert behind.deviation == "llama.cpp ignores the sliding window of 40 tokens"
    assert behind.deviation_error < 1e-3 < 0.05 < behind.relative_error
    assert "against torch doing the same" in str(report)


def test_short_texts_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    pq.export(testing.random_phi3(num_hidden_layers=1), tokenizer, tmp_path)
    with pytest.raises(PhiquantError, match="takes 256"):
        pq.verify(tmp_path, long=True, text="def f(): pass")


def test_what_a_runtime_is_known_to_do_otherwise_is_named_and_torch_does_it_too(tmp_path: Path) -> None:
    """The window of this miniature is shorter than the texts that verify() takes, and llama.cpp ignores it."""
    model, tokenizer = testing.miniature("phi-3-mini")
    pq.export(model, tokenizer, tmp_path, format="gguf", float_dtype="float32")
    report = pq.verify(tmp_path, run=True, windows=1)
    assert report.ok
    assert "ignores the sliding window of 47" in str(report.runtime.deviation)
    assert "so did torch" in str(report)
    against_itself = pq.verify(tmp_path, run=True, reference=model, windows=1)
    assert not against_itself.ok  # a model that is given is taken as it is
    assert against_itself.runtime.deviation is None
