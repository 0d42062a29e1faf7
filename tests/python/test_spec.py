"""Specs and targets: what they say, what they refuse."""

from __future__ import annotations

import dataclasses

import pytest
from phiquant.spec import TARGETS, Int, PerChannel, PerGroup, PerTensor, QuantSpec, Target, spec, target, with_bits


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("int4-g32-sym", QuantSpec(Int(4), PerGroup(32))),
        ("uint4-g64-asym", QuantSpec(Int(4, signed=False), PerGroup(64), "zero_point")),
        ("int8-channel-sym", QuantSpec(Int(8), PerChannel(0))),
        ("int8-channel1-sym-bf16", QuantSpec(Int(8), PerChannel(1), scale_dtype="bfloat16")),
        ("uint4-g32-min-f16", QuantSpec(Int(4, signed=False), PerGroup(32), "minimum", "float16")),
        ("int3-tensor-signmax", QuantSpec(Int(3), PerTensor(), anchor="signed_absmax")),
        ("gguf:Q4_0", QuantSpec(Int(4), PerGroup(32), "none", "float16", "signed_absmax")),
    ],
)
def test_text_is_read_and_written(text: str, expected: QuantSpec) -> None:
    assert spec(text) == expected
    assert spec(str(expected)) == expected


def test_every_target_spec_survives_its_text() -> None:
    for named in TARGETS.values():
        if named.spec is not None:
            assert spec(str(named.spec)) == named.spec


def test_specs_are_values() -> None:
    assert {spec("int4-g32-sym"): 1}[spec("int4-g32-sym")] == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec("int4-g32-sym").offset = "minimum"


@pytest.mark.parametrize("bits", range(2, 9))
def test_code_ranges(bits: int) -> None:
    assert (Int(bits).qmin, Int(bits).qmax) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    assert (Int(bits, signed=False).qmin, Int(bits, signed=False).qmax) == (0, 2**bits - 1)


@pytest.mark.parametrize(
    ("text", "shape", "scales"),
    [
        ("int4-g32-sym", (6, 64), (6, 2)),
        ("int4-channel-sym", (6, 64), (6, 1)),
        ("int4-channel1-sym", (6, 64), (1, 64)),
        ("int4-tensor-sym", (6, 64), (1, 1)),
        ("int8-token-sym", (2, 3, 64), (2, 3, 1)),
        ("int4-g32-sym", (2, 3, 64), (2, 3, 2)),
    ],
)
def test_shape_of_scales(text: str, shape: tuple, scales: tuple) -> None:
    assert spec(text).scale_shape(shape) == scales


def test_bits_per_weight_count_every_stored_bit() -> None:
    shape = (64, 256)
    assert spec("gguf:Q4_0").bits_per_weight(shape) == 4.5
    assert spec("gguf:Q4_1").bits_per_weight(shape) == 5.0
    assert spec("gguf:Q8_0").bits_per_weight(shape) == 8.5
    assert spec("uint4-g32-asym-f16").bits_per_weight(shape) == 4 + (16 + 4) / 32
    assert spec("int8-channel-sym").bits_per_weight(shape) == 8 + 32 / 256


def test_a_target_names_its_format() -> None:
    assert target("gguf:Q4_0").format == "gguf"
    assert spec(target("gguf:Q4_0")) == spec("gguf:Q4_0")
    assert with_bits(spec("gguf:Q4_0"), 3).element == Int(3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: spec("int4"), "cannot read spec 'int4'"),
        (lambda: spec("gguf:Q9_9"), "unknown target 'gguf:Q9_9'; known: gguf:F32"),
        (lambda: spec("gguf:F16"), "stores floats"),
        (lambda: spec("int9-g32-sym"), "1 to 8 bits, not 9"),
        (lambda: spec("int4-g0-sym"), "at least one value"),
        (lambda: spec("uint4-g32-sym"), "without an offset holds no negative value"),
        (lambda: spec("int4-g32-min"), "codes are unsigned"),
        (lambda: QuantSpec(Int(4), PerGroup(32), "zero_point", anchor="signed_absmax"), "signed_absmax"),
        (lambda: QuantSpec(Int(4), PerGroup(32), scale_dtype="float8"), "scale_dtype is one of"),
        (lambda: spec("int4-g32-sym").scale_shape((4, 80)), r"32 does not divide the last dimension 80 .* 16"),
        (lambda: spec("int4-channel2-sym").scale_shape((4, 80)), "axis 2 is out of range"),
        (lambda: target("gguf:q4"), "unknown target"),
    ],
)
def test_errors_name_the_rule_and_the_way_out(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_targets_are_what_they_are_called() -> None:
    for name, named in TARGETS.items():
        assert isinstance(named, Target)
        assert named.name == name
