"""Compressed files: every bit comes back, every byte is counted, and no damage or hostile file is believed."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import phiquant as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from phiquant import PhiquantError, digits
from phiquant.compression.reader import _places, digest
from phiquant.compression.writer import gaps
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8))


def sparse_of(w: Tensor, above: float) -> Tensor:
    """w with zeros (no -0) except where other noise is above a threshold."""
    return w.masked_fill(random(*w.shape, seed=1) <= above, 0.0)


def shared(w: Tensor, k: int) -> Tensor:
    """w with k different values, by rounding."""
    step = 2 * w.abs().max() / (k - 1)
    return (w / step).round() * step


SPECIAL = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-45, 3e38, 1.0])
FLOATS = {
    "float": random(7, 9),
    "pruned": sparse_of(random(100, 90), 1.5),
    "shared": shared(random(40, 50), 15),
    "pruned-shared": sparse_of(shared(random(100, 90), 15), 1.5),
    "256-values": torch.arange(256.0).repeat(20),
    "257-values": torch.arange(257.0).repeat(20),
    "bfloat16": shared(random(40, 50), 15).bfloat16(),
    "float16-pruned": sparse_of(random(60, 50), 1.5).half(),
    "special": SPECIAL.repeat(50),
    "special-sparse": torch.cat([torch.zeros(3000), SPECIAL, torch.zeros(300)]),
    "zeros": torch.zeros(300, 5),
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(0, 4),
    "one": torch.tensor([3.0]),
    "int64": torch.tensor([7]),
    "bool": random(20) > 0,
    "float64": random(6).double(),
    "transposed": shared(random(30, 50), 15).t(),
    "large": shared(random(300_000), 9),
}


@pytest.mark.parametrize("name", FLOATS)
def test_every_bit_of_a_tensor_comes_back(name: str, tmp_path: Path) -> None:
    size = pq.compress({name: FLOATS[name], "other": random(3)}, tmp_path / "a.phiq")
    assert size.total == (tmp_path / "a.phiq").stat().st_size
    found = pq.decompress(tmp_path / "a.phiq")
    assert set(found) == {name, "other"}
    assert same_bits(found[name], FLOATS[name])


FORMS = {
    "float": "float",
    "pruned": "gaps + values",
    "shared": "codes + levels",
    "pruned-shared": "codes + gaps + levels",
    "257-values": "float",
    "special": "codes + levels",
    "large": "codes + levels",
}


@pytest.mark.parametrize("name", FORMS)
def test_the_smallest_form_is_taken(name: str, tmp_path: Path) -> None:
    size = pq.compress({name: FLOATS[name]}, tmp_path / "a.phiq").tensors[0]
    assert size.form == FORMS[name]
    assert size.total <= FLOATS[name].numel() * 4


SPECS = ["int4-g32-sym", "int8-channel-sym", "uint4-g32-asym-f16", "uint3-g32-min-bf16", "gguf:Q4_0", "nf4-g64-sym-f16",
         "fp4_e2m1-g32-sym", "binary-channel-sym", "ternary-channel-sym", "q1.3", "nvfp4", "vsq4",
         "int4-g32-sym-uint8/128"]  # fmt: skip


@pytest.mark.parametrize("spec", SPECS)
def test_codes_are_kept(spec: str, tmp_path: Path) -> None:
    tensor = pq.quantize_tensor(random(24, 128) * 0.3, spec)
    size = pq.compress({"w": tensor}, tmp_path / "a.phiq")
    again = pq.read_compressed(tmp_path / "a.phiq")["w"]
    assert again.spec == tensor.spec
    assert again.digests() == tensor.digests()
    assert same_bits(pq.decompress(tmp_path / "a.phiq")["w"], tensor.dequantize())
    assert size.tensors[0].codes <= tensor.codes.numel() * tensor.spec.element.bits / 8 + 4  # Huffman never loses much


def codebook_tensor(codes: Tensor, codebook: Tensor, spec: str) -> pq.QuantizedTensor:
    return pq.QuantizedTensor(codes, None, None, None, pq.spec(spec), codebook)


@pytest.mark.parametrize("spec", ["codebook16-tensor", "codebook16-row", "codebook16-rows4-f16"])
def test_codebooks_are_kept_and_counted(spec: str, tmp_path: Path) -> None:
    blocks = {"codebook16-tensor": 1, "codebook16-row": 16, "codebook16-rows4-f16": 4}[spec]
    dtype = torch.float16 if spec.endswith("f16") else torch.float32
    codebook = random(blocks, 16).sort(1).values.to(dtype)
    codes = torch.randint(0, 16, (16, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    size = pq.compress({"w": codebook_tensor(codes, codebook, spec)}, tmp_path / "a.phiq").tensors[0]
    again = pq.read_compressed(tmp_path / "a.phiq")["w"]
    assert torch.equal(again.codes, codes)
    assert torch.equal(again.codebook, codebook)
    assert size.parameters == blocks * 16 * codebook.element_size()


def test_sizes_are_those_of_the_chapters_example(tmp_path: Path) -> None:
    """The 4 x 4 matrix of the chapter: 64 bytes in float32; 16 codes of 2 bits and 4 levels would be 20."""
    codes = torch.tensor([[3, 0, 2, 1], [1, 1, 0, 3], [0, 3, 1, 0], [3, 1, 2, 2]], dtype=torch.uint8)
    levels = torch.tensor([[-1.0, 0.0, 1.5, 2.0]])
    size = pq.compress({"w": codebook_tensor(codes, levels, "codebook4-tensor")}, tmp_path / "a.phiq")
    row = size.tensors[0]
    # 4, 5, 3, 4 of the codes: Huffman cannot do better than 2 bits here either. Its table is 12 + 2 + 4 bytes.
    assert (row.codes, row.parameters, row.table, row.index) == (4, 16, 18, 0)
    assert size.float32 == 64
    assert "w" in str(size)


def test_a_model_in_every_state(tmp_path: Path) -> None:
    model = digits.lenet()
    path = tmp_path / "a.phiq"
    pq.compress(model, path)
    assert all(same_bits(v, model.state_dict()[n]) for n, v in pq.decompress(path).items())
    names = list(model.state_dict())
    pq.prune(model, 0.9)
    small = pq.compress(model, path)
    found = pq.decompress(path)
    assert sorted(found) == sorted(names)
    pq.finalize_pruning(model)
    digits.lenet().load_state_dict(found)
    assert all(same_bits(v, model.state_dict()[n]) for n, v in found.items())
    assert small.ratio > 5


def test_a_quantized_model(tiny_model: Any, tmp_path: Path) -> None:
    pq.quantize(tiny_model, "gguf:Q4_0")
    size = pq.compress(tiny_model, tmp_path / "a.phiq")
    found = pq.read_compressed(tmp_path / "a.phiq")
    name = "model.layers.0.mlp.down_proj"
    assert found[f"{name}.weight"].digests() == tiny_model.get_submodule(name).quantized.digests()
    assert not any("weight_quantizer" in n for n in found)
    decoded = pq.decompress(tmp_path / "a.phiq")
    assert all(same_bits(decoded[n], p.detach()) for n, p in tiny_model.named_parameters())
    assert size.tensors[-1].bits_per_value < 5
    tiny_model.get_submodule(name).weight.data[0, 0] += 1
    with pytest.raises(PhiquantError, match=f"{name}.weight was changed after it was quantized"):
        pq.compress(tiny_model, tmp_path / "a.phiq")


def test_tied_weights_are_stored_once(make_phi3: Callable[..., Any], tmp_path: Path) -> None:
    model = make_phi3(tie_word_embeddings=True)
    size = pq.compress(model, tmp_path / "a.phiq")
    found = pq.decompress(tmp_path / "a.phiq")
    assert torch.equal(found["lm_head.weight"], model.lm_head.weight)
    rows = {row.name: row for row in size.tensors}
    assert min(rows["lm_head.weight"].total, rows["model.embed_tokens.weight"].total) == 0
    assert size.float32 == 4 * sum(p.numel() for p in model.parameters())


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 1200), max_size=30), st.integers(0, 1200))
def test_gaps_lead_back_to_the_places(steps: list[int], tail: int) -> None:
    places = torch.tensor(steps).add(1).cumsum(0) - 1 if steps else torch.empty(0, dtype=torch.int64)
    count = (int(places[-1]) + 1 if steps else 0) + tail
    stored = torch.zeros(count, dtype=torch.bool)
    stored[places] = True
    data = pq.ops.huffman_encode(gaps(stored))
    assert torch.equal(_places(data, count, len(steps)), places)
    with pytest.raises(ValueError, match="its gaps place"):
        _places(data, count + 255, len(steps))
    with pytest.raises(ValueError, match="its gaps place"):
        _places(data, count, len(steps) + 1)


# --- damage -----------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.phiq"
    tensor = pq.quantize_tensor(random(4, 32), "int4-g32-sym-f16")
    pq.compress({"w": tensor, "shared": shared(random(16, 10), 5), "b": random(5)}, path)
    return path


@pytest.fixture
def sparse(tmp_path: Path) -> Path:
    """A file with a tensor in each form."""
    path = tmp_path / "sparse.phiq"
    tensor = pq.quantize_tensor(random(4, 32), "int4-g32-sym-f16")
    shared_sparse = sparse_of(shared(random(80, 80), 7), 1.8)
    pruned = sparse_of(random(3000), 1.2)
    size = pq.compress({"w": tensor, "sparse": shared_sparse, "pruned": pruned, "b": random(5)}, path)
    assert [row.form for row in size.tensors][1:] == ["codes + scales", "codes + gaps + levels", "gaps + values"]
    return path


def test_every_damaged_byte_is_an_error(small: Path, tmp_path: Path) -> None:
    data = small.read_bytes()
    other = tmp_path / "other.phiq"
    for i in range(len(data)):
        other.write_bytes(data[:i] + bytes([data[i] ^ (1 << i % 8)]) + data[i + 1 :])
        with pytest.raises(PhiquantError, match=r"other\.phiq"):
            pq.decompress(other)


def test_every_truncation_is_an_error(small: Path, tmp_path: Path) -> None:
    data = small.read_bytes()
    other = tmp_path / "other.phiq"
    for size in range(0, len(data), 7):
        other.write_bytes(data[:size])
        with pytest.raises(PhiquantError, match="cannot be read as a compressed file"):
            pq.decompress(other)


def rewritten(path: Path, out: Path, change: Callable[[dict, dict], None]) -> Path:
    """The file with parts and descriptions changed, and a digest that fits: what a hostile writer makes."""
    with safe_open(path, "pt") as file:
        parts = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        described = json.loads(file.metadata()["tensors"])
    change(parts, described)
    text = json.dumps(described)
    save_file(parts, out, {"phiquant": "1", "tensors": text, "sha256": digest(text, parts)})
    return out


HOSTILE: dict[str, tuple[Callable[[dict, dict], Any], str]] = {
    "other shape": (lambda p, d: d["w"].update(shape=[4, 33]), "tensor w .* holds 128 symbols, expected 132"),
    "giant shape": (lambda p, d: d["w"].update(shape=[1 << 60, 1 << 60]), "tensor w cannot be decoded"),
    "giant sparse shape": (lambda p, d: d["sparse"].update(shape=[1 << 62, 9]), "tensor sparse .* its gaps place"),
    "negative shape": (lambda p, d: d["w"].update(shape=[-4, -32]), "tensor w .* its shape is"),
    "shape of words": (lambda p, d: d["w"].update(shape="432"), "tensor w .* its shape is"),
    "no shape": (lambda p, d: d["w"].pop("shape"), "tensor w .* 'shape' is missing"),
    "unknown spec": (lambda p, d: d["w"].update(spec="int44"), "tensor w .* cannot read spec"),
    "narrower spec": (lambda p, d: d["w"].update(spec="int3-g32-sym-f16"), "tensor w .* is none of int3"),
    "spec of another grid": (lambda p, d: d["w"].update(spec="int4-g32-sym"), "tensor w .* scales of"),
    "spec of no text": (lambda p, d: d["w"].update(spec=[4]), "tensor w cannot be decoded"),
    "no codes": (lambda p, d: p.pop("w:codes"), "tensor w .* 'codes' is missing"),
    "no gaps": (lambda p, d: p.pop("sparse:gaps"), "tensor sparse .* 'gaps' is missing"),
    "no scales": (lambda p, d: p.pop("w:scales"), "tensor w .* scales must be given"),
    "too few levels": (lambda p, d: p.update({"sparse:levels": torch.zeros(2)}), "sparse .* no level among 2"),
    "levels of another type": (lambda p, d: p.update({"sparse:levels": torch.zeros(9).half()}), "its levels are"),
    "too few values": (lambda p, d: p.update({"pruned:values": torch.zeros(3)}), "tensor pruned .* its gaps place"),
    "values of another type": (lambda p, d: p.update({"pruned:values": p["pruned:values"].half()}), "its values are"),
    "common code": (lambda p, d: d["sparse"].update(common=256), "its common code is 256"),
    "codes of floats": (lambda p, d: p.update({"w:codes": torch.zeros(9)}), "Huffman data is uint8"),
    "no Huffman data": (lambda p, d: p.update({"w:codes": torch.zeros(9, dtype=torch.uint8)}), "not hold its header"),
    "a part too many": (lambda p, d: p.update({"w:values": torch.zeros(9)}), "tensor w cannot be decoded"),
    "a stranger": (lambda p, d: p.update({"x:codes": torch.zeros(9)}), "part x:codes belongs to no tensor"),
    "no object": (lambda p, d: d.update(w=7), "not an object of objects"),
    "another that is not there": (lambda p, d: d.update(y={"same": "x"}), "tensor y is said to be 'x'"),
    "another that is a list": (lambda p, d: d.update(y={"same": ["x"]}), "tensor y is said to be"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(name: str, sparse: Path, tmp_path: Path) -> None:
    change, message = HOSTILE[name]
    path = rewritten(sparse, tmp_path / "hostile.phiq", change)
    with pytest.raises(PhiquantError, match=rf"(?s)hostile\.phiq.*{message}"):
        pq.decompress(path)


def test_damage_with_a_digest_that_fits_is_an_error_or_keeps_the_shapes(sparse: Path, tmp_path: Path) -> None:
    shapes = {name: tensor.shape for name, tensor in pq.decompress(sparse).items()}
    for word in ("w:codes", "sparse:codes", "sparse:gaps", "pruned:gaps"):
        with safe_open(sparse, "pt") as file:
            size = len(file.get_tensor(word))
        for i in {*range(40), *range(40, size, 11)}:

            def flip(parts: dict, described: dict, word: str = word, i: int = i) -> None:
                parts[word][i] ^= 1 << i % 8

            path = rewritten(sparse, tmp_path / "damaged.phiq", flip)
            with contextlib.suppress(PhiquantError):
                assert {name: tensor.shape for name, tensor in pq.decompress(path).items()} == shapes


def test_other_files_are_refused(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(3)}, tmp_path / "plain.safetensors")
    with pytest.raises(PhiquantError, match="not a compressed file of version 1"):
        pq.decompress(tmp_path / "plain.safetensors")
    with pytest.raises(PhiquantError, match=r"missing\.phiq: no such file"):
        pq.decompress(tmp_path / "missing.phiq")
    with pytest.raises(PhiquantError, match="holds no colon"):
        pq.compress({"a:b": torch.zeros(3)}, tmp_path / "a.phiq")
    assert not (tmp_path / "a.phiq").exists()


def test_a_file_appears_complete(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.phiq"
    pq.compress({"w": random(3)}, path)
    pq.compress(nn.Linear(3, 3), path)
    assert [p.name for p in path.parent.iterdir()] == ["a.phiq"]
    assert set(pq.decompress(path)) == {"weight", "bias"}
