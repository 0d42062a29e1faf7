"""Words that stand for one grid have one canonical form; restating keeps every value and comes back byte for byte."""

from __future__ import annotations

import phiquant as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from phiquant import PhiquantError, QuantizedTensor
from phiquant.canonical import canonical, compare
from phiquant.restate import restate

SIGNMAX = "int4-g32-signmax-f16"


def random_weight(seed: int, columns: int = 128, zeros: bool = True) -> torch.Tensor:
    w = torch.randn(3, columns, generator=torch.Generator().manual_seed(seed))
    return w * (torch.arange(3)[:, None] > 0) if zeros else w  # a row of blocks of scale 0


def tensor(spec: str, codes: torch.Tensor, **parts: torch.Tensor) -> QuantizedTensor:
    empty = dict.fromkeys(("scales", "zero_points", "minimums"))
    return QuantizedTensor(codes=codes, spec=pq.spec(spec), **(empty | parts))


def exact_values(q: QuantizedTensor) -> torch.Tensor:
    """s (q - z) + m of every value in float64, which rounds none of them: the oracle, from the definition of a spec."""
    scale, zero, minimum = (
        None if part is None else part.double().repeat_interleave(q.shape[0] // part.shape[0], 0)
        .repeat_interleave(q.shape[1] // part.shape[1], 1) for part in q.grid()
    )  # fmt: skip
    element = q.spec.element
    codes = torch.tensor(element.levels, dtype=torch.float64)[q.codes.long() - element.qmin]
    codes = codes / getattr(element, "step", 1)
    return scale * (codes - (0 if zero is None else zero)) + (0 if minimum is None else minimum)


def same(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    return a.spec == b.spec and a.digests() == b.digests()


PAIRS = [
    (SIGNMAX, "uint4-g32-min-f16"),
    (SIGNMAX, "uint4-g32-asym-f16"),
    (SIGNMAX, "uint4-g32-asym-f32"),
    (SIGNMAX, "int8-g32-sym-f16"),
    (SIGNMAX, "int4-g16-sym-f16"),
    (SIGNMAX, "uint8-g32-min-f32"),
    ("int3-channel-sym", "int4-g32-sym"),
    ("int8-tensor-sym-bf16", "int8-channel-sym-f32"),
    ("uint4-g32-asym-f16", "int4-g32-asym-f16"),
    ("uint4-g64-min-f16", "uint5-g32-min-f32"),
    ("int4-g32-asym-bf16", "uint4-g32-min-f32"),
    ("q4_k", "uint4-g32-min-f32"),
    ("q6_k", "int6-g16-sym-f32"),
    ("mxfp4", "fp4_e2m1-g32-sym-f32"),
    ("fp4_e2m1-g16-sym-e4m3", "nvfp4"),
    ("ternary-channel-sym-f16", "int2-channel-sym-f16"),
    ("binary-row-sym-f16", "ternary-channel-sym-f16"),
    ("q1.2", "int4-tensor-sym"),
    ("nf4-g64-sym-f16", "nf4-g32-sym-bf16"),
    ("codebook16-row", "codebook16-row-f32"),
]


@pytest.mark.parametrize(("source", "words"), PAIRS)
@given(seed=st.integers(0, 2**20), power=st.integers(-6, 6))
@settings(max_examples=6, deadline=None)
def test_restating_keeps_every_value_and_comes_back_byte_for_byte(source: str, words: str, seed: int, power: int):
    columns = 256 if source in ("q4_k", "q6_k") else 128
    zero_points_survive = not ("asym" in source and "min" in words)
    weight = random_weight(seed, columns, zeros=zero_points_survive) * 2.0**power
    if "nf4" in source:
        weight = weight.sign() * 2.0**power  # scales that bfloat16 holds
    solver = "kmeans" if source.startswith("codebook") else "rtn"
    q = pq.quantize_tensor(weight, pq.spec(source), solver=solver)
    there = restate(q, pq.spec(words))
    assert there.spec == pq.spec(words)
    assert compare(canonical(q), canonical(there)) == "identical"
    if not source.startswith("codebook"):
        assert torch.equal(exact_values(there), exact_values(q))
    if pq.spec(source).two_level is None or pq.spec(source).two_level.is_float:
        assert same(restate(there, q.spec), q)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_identical_means_equal_steps_and_equal_values(data: st.DataObject):
    """Any two tensors on integer grids: "identical" exactly where every block has the same step and the same values."""
    made = []
    for _ in range(2):
        bits = data.draw(st.sampled_from([2, 3, 4, 8]))
        kind = data.draw(st.sampled_from(["sym", "asym", "min"]))
        signed = kind == "sym"
        low = -(1 << (bits - 1)) if signed else 0
        codes = data.draw(st.lists(st.integers(low, low + (1 << bits) - 1), min_size=4, max_size=4))
        scales = torch.tensor([[data.draw(st.sampled_from([0.0, 0.5, -0.5, 1.0]))]], dtype=torch.float16)
        parts = {"scales": scales}
        if kind == "asym":
            parts["zero_points"] = torch.tensor([[data.draw(st.integers(0, (1 << bits) - 1))]], dtype=torch.int32)
        if kind == "min":
            parts["minimums"] = torch.tensor([[data.draw(st.sampled_from([0.0, -0.0, -0.5, -1.0, -0.3]))]]).half()
        dtype = torch.int8 if signed else torch.uint8
        made.append(
            tensor(f"{'' if signed else 'u'}int{bits}-g4-{kind}-f16", torch.tensor([codes], dtype=dtype), **parts)
        )
    a, b = made
    equal = bool(a.scales == b.scales) and torch.equal(exact_values(a), exact_values(b))
    if equal and float(a.scales) and bool((exact_values(a) / a.scales).frac().any()):
        # Off the lattice, codes count from the minimum, which may differ by whole steps.
        equal = bool(a.minimums == b.minimums)
    assert (compare(canonical(a), canonical(b)) == "identical") == equal


def test_verdicts():
    q = pq.quantize_tensor(random_weight(0), pq.spec(SIGNMAX))
    other_codes = tensor(
        SIGNMAX, q.codes ^ ((torch.arange(128) == 77) & (torch.arange(3) == 2)[:, None]), scales=q.scales
    )
    other_scales = tensor(SIGNMAX, q.codes, scales=q.scales * 2)
    form = canonical(q)
    assert compare(form, canonical(other_scales)) == "same codes, other parameters"
    assert compare(form, canonical(other_codes)) == "different"
    assert compare(form, canonical(pq.quantize_tensor(random_weight(0), pq.spec("mxfp4")))) == "different"
    assert compare(form, canonical(pq.quantize_tensor(random_weight(0)[:2], pq.spec(SIGNMAX)))) == "different"


def test_another_minimum_is_another_parameter_and_the_same_codes():
    codes = torch.arange(8, dtype=torch.uint8)[None]
    one, two = (
        tensor("uint4-g8-min-f16", codes, scales=torch.tensor([[1.0]]).half(), minimums=torch.tensor([[m]]).half())
        for m in (-2.0, -3.0)
    )
    assert compare(canonical(one), canonical(two)) == "same codes, other parameters"


def test_a_block_of_scale_zero_is_the_same_whatever_its_codes():
    zero, codes = torch.zeros(1, 1).half(), torch.arange(8, dtype=torch.uint8)[None]
    one = tensor("uint4-g8-min-f16", codes, scales=zero, minimums=zero)
    two = tensor("int4-g8-sym-f16", torch.zeros(1, 8, dtype=torch.int8), scales=-zero)
    assert compare(canonical(one), canonical(two)) == "identical"


REFUSED = [
    ("int8-g32-sym-f16", "int4-g32-sym-f16", "range of codes"),
    ("int4-g32-sym", "int4-g32-sym-f16", "scale dtype"),
    ("int4-g32-sym", "int4-g32-sym-e8m0", "scale dtype"),
    ("int4-g32-sym", "int4-g64-sym", "granularity: scales differ"),
    ("int4-g32-sym", "int4-channel-sym", "granularity: scales differ"),
    ("int4-g64-sym", "int4-g32-sym-f16", "scale dtype"),
    ("uint4-g32-min-f16", "uint4-g32-asym-f16", "zero point: the minimum of row"),
    ("uint4-g32-min-f16", "int5-g32-sym-f16", "minimums: row"),
    ("uint4-g32-asym", "int4-g32-sym", "range of codes"),
    ("uint8-g32-asym-f32", "uint8-g32-min-f32", "minimums: zero point times scale of row 0, group 0, is no float32"),
    ("mxfp4", "int4-g32-sym", "its codes stand for fp4_e2m1"),
    ("nf4-g32-sym", "mxfp4", "its codes stand for nf4, not for fp4_e2m1"),
    ("uint4-g32-min-f16", "q4_k", "two levels"),
    ("int4-g32-sym", "q3.0", "scales"),
    ("codebook8-row", "codebook16-row", "codebook: it has 8 levels"),
]


@pytest.mark.parametrize(("source", "words", "reason"), REFUSED)
def test_what_would_have_to_change_is_named(source: str, words: str, reason: str):
    solver = "kmeans" if source.startswith("codebook") else "rtn"
    q = pq.quantize_tensor(torch.randn(4, 256, generator=torch.Generator().manual_seed(1)), pq.spec(source), solver)
    with pytest.raises(PhiquantError, match=rf"layer\.weight: .* is not a grid of .*: .*{reason}"):
        restate(q, pq.spec(words), "layer.weight")
