"""Hostile GGUF headers: each refused with the file, the place and the cause; types that phiquant does not decode."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from phiquant.errors import PhiquantError
from phiquant.formats.gguf import guard as gguf_guard
from phiquant.formats.gguf import reader as gguf_reader


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str | bytes, value: str | bytes) -> bytes:
    return text(key) + struct.pack("<I", 8) + text(value)


def line(name: str, dims: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def build(path: Path, pairs: list[bytes], lines: list[bytes], data: int = 4096, **counts: int) -> Path:
    head = struct.pack("<IIQQ", 0x46554747, 3, counts.get("n_tensors", len(lines)), counts.get("n_pairs", len(pairs)))
    raw = b"".join([head, *pairs, *lines])
    path.write_bytes(raw + bytes(-len(raw) % 32) + bytes(data))
    return path


A, B = line("output_norm.weight"), line("blk.0.attn_norm.weight", offset=128)
ARCHITECTURE = pair("general.architecture", "phi3")


def test_a_good_one_is_read(tmp_path: Path) -> None:
    header = gguf_guard.read_header(build(tmp_path / "x.gguf", [ARCHITECTURE], [A, B]))
    assert header.metadata == {"general.architecture": "phi3"}
    assert [(t.name, t.shape, t.kind, t.bytes) for t in header.tensors] == [
        ("output_norm.weight", (32,), "F32", 128), ("blk.0.attn_norm.weight", (32,), "F32", 128),
    ]  # fmt: skip
    assert header.tensors[1].start - header.tensors[0].start == 128


BAD: dict[str, tuple[list[bytes], list[bytes], str]] = {
    "keys twice": (
        [ARCHITECTURE, ARCHITECTURE],
        [A],
        r"at byte 68 it has the key 'general.architecture' a second time",
    ),
    "names twice": ([], [A, line("output_norm.weight", offset=128)], "two tensors named 'output_norm.weight'"),
    "overlap": ([], [A, line("b", offset=96)], r"'output_norm.weight' and 'b' overlap at byte"),
    "the same place": ([], [A, line("b")], "overlap at byte"),
    "unaligned": ([], [line("b", offset=16)], r"'b' begins at byte \d+, which is no multiple of 32"),
    "beyond the end": ([], [line("b", (1 << 20,))], r"'b' ends at byte [\d,]+ and the file at"),
    "far beyond": ([], [line("b", (1 << 40, 1 << 40))], "ends at byte"),
    "offset wraps": ([], [line("b", offset=(1 << 64) - 32)], "ends at byte"),
    "no whole blocks": ([], [line("b", (48,), 12)], "rows of 48 values, not whole blocks of 256"),
    "unknown type": ([], [line("b", (32,), 99)], "is of ggml type 99, which phiquant does not know"),
    "no dimension": ([], [line("b", ())], "has 0 dimensions"),
    "bad key": (
        [pair(b"a\xff\xfeb", "x")],
        [A],
        r"the string at byte 32 is not UTF-8 \(invalid start byte at byte 33\)",
    ),
    "bad value": ([pair("key", b"\xc3")], [A], r"is not UTF-8 \(unexpected end of data at byte 47\)"),
    "bad name": ([], [text(b"\x80") + B[30:]], "is not UTF-8"),
    "strange value": ([text("key") + struct.pack("<I", 77)], [A], "value of type 77"),
    "array of arrays": ([text("key") + struct.pack("<IIQ", 9, 9, 1)], [A], "array of type 9"),
    "giant array": ([text("key") + struct.pack("<IIQ", 9, 4, 1 << 60)], [A], "no model has so many"),
    "long array": ([text("key") + struct.pack("<IIQ", 9, 4, 1 << 20)], [A], r"names [\d,]+ bytes, [\d,]+ are left"),
    "alignment": ([text("general.alignment") + struct.pack("<II", 4, 48)], [A], "alignment 48 is not a power of two"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_hostile_header_is_refused(case: str, tmp_path: Path) -> None:
    pairs, lines, message = BAD[case]
    path = build(tmp_path / "x.gguf", pairs, lines)
    with pytest.raises(PhiquantError, match=rf"x\.gguf is not a whole GGUF file: .*{message}"):
        gguf_reader.read(path)


@pytest.mark.parametrize(
    "counts", [{"n_tensors": 1 << 60}, {"n_pairs": 1 << 60}, {"n_tensors": 1 << 20}, {"n_pairs": 1 << 20}]
)
def test_giant_counts_end(counts: dict[str, int], tmp_path: Path) -> None:
    with pytest.raises(PhiquantError, match="is not a whole GGUF file"):
        gguf_reader.read(build(tmp_path / "x.gguf", [ARCHITECTURE], [A], **counts))


def test_other_versions_and_files(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    for data, message in ((b"", "empty"), (b"GGML" + bytes(20), "does not start with GGUF"),
                          (struct.pack("<IIQQ", 0x46554747, 2, 0, 0), "version is 2")):  # fmt: skip
        path.write_bytes(data)
        with pytest.raises(PhiquantError, match=message):
            gguf_reader.read(path)


@pytest.mark.parametrize(
    ("kind", "name", "size"), [(16, "IQ2_XXS", 66), (19, "IQ1_S", 50), (42, "Q2_0", 72), (41, "Q1_0", 36)]
)
def test_types_that_are_listed_and_not_decoded(kind: int, name: str, size: int, tmp_path: Path) -> None:
    """A file that mixes them with others opens; the others can be read."""
    lines = [line("blk.0.ffn_down.weight", (256, 4), kind), line("output_norm.weight", offset=320)]
    stored = gguf_reader.read(build(tmp_path / "x.gguf", [], lines))
    tensor = stored["model.layers.0.mlp.down_proj.weight"]
    assert (tensor.stored_as, tensor.shape, tensor.data.shape) == (name, (4, 256), (4, size))
    calls: list[Any] = [tensor.quantized, tensor.values, lambda: tensor.spec]
    for call in calls:
        with pytest.raises(PhiquantError, match=rf"down_proj\.weight: the file has it as {name}, whose codes phiquant"):
            call()
    assert np.array_equal(stored["model.norm.weight"].values(), np.zeros(32))


def test_a_name_that_no_phi_has(tmp_path: Path) -> None:
    with pytest.raises(
        PhiquantError, match=r"x\.gguf has a tensor 'blk\.0\.ffn_gate\.weight', which no Phi-3 model has"
    ):
        gguf_reader.read(build(tmp_path / "x.gguf", [], [line("blk.0.ffn_gate.weight")]))


def test_a_config_of_another_architecture(tmp_path: Path) -> None:
    with pytest.raises(PhiquantError, match=r"of the architecture 'llama', not phi3"):
        gguf_reader.read_config(build(tmp_path / "x.gguf", [pair("general.architecture", "llama")], [A]))
    with pytest.raises(PhiquantError, match=r"lacks the key phi3\.attention\.head_count"):
        gguf_reader.read_config(build(tmp_path / "x.gguf", [ARCHITECTURE], [A]))


def test_a_second_scale_must_be_one_float(tmp_path: Path) -> None:
    lines = [line("blk.0.attn_output.weight", (64, 2), 40), line("blk.0.attn_output.scale", (2,), 0, 96)]
    with pytest.raises(PhiquantError, match=r"the scale of blk\.0\.attn_output\.weight is not one float32 value"):
        gguf_reader.read(build(tmp_path / "x.gguf", [], lines))
