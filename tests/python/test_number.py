"""Number formats against ml_dtypes, numpy and torch, on every code and on values around every one."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from phiquant.elements import Float
from phiquant.number import FloatNumber, IntNumber, number

FLOATS = {
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "e4m3fn": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e2m1": ml_dtypes.float4_e2m1fn,
}


def float_number(name: str) -> FloatNumber:
    found = number(name)
    assert isinstance(found, FloatNumber)
    return found


@pytest.mark.parametrize("name", FLOATS)
def test_every_code_has_ml_dtypes_value(name: str) -> None:
    kind = float_number(name)
    raw = np.arange(1 << kind.bits, dtype=np.uint16 if kind.bits == 16 else np.uint8)
    with np.errstate(invalid="ignore"):
        expected = raw.view(FLOATS[name]).astype(np.float64)
    np.testing.assert_array_equal([kind.value(int(code)) for code in raw], expected)
    info = ml_dtypes.finfo(FLOATS[name])
    assert kind.largest == float(info.max)
    assert kind.smallest_normal == float(info.smallest_normal)
    assert kind.smallest_subnormal == float(info.smallest_subnormal)
    assert kind.epsilon == float(info.eps)


@pytest.mark.parametrize("name", FLOATS)
def test_nearest_code_is_ml_dtypes_code(name: str) -> None:
    kind = float_number(name)
    codes = range(0, kind.largest_code, 37 if kind.bits == 16 else 1)
    values = np.array([kind.value(code) for code in codes])
    above = np.array([kind.value(code + 1) for code in codes])
    ties = (values + above) / 2
    tested = np.concatenate([values, ties, values + (above - values) * 0.49, values + (above - values) * 0.51])
    tested = np.concatenate([tested, -tested])
    dtype = FLOATS[name]
    expected = tested.astype(dtype).view(np.uint16 if kind.bits == 16 else np.uint8)
    np.testing.assert_array_equal([kind.encode(float(v)) for v in tested], expected & (1 << kind.bits) - 1)


def test_float32_is_numpy() -> None:
    kind = float_number("float32")
    raw = np.concatenate(
        [np.random.default_rng(0).integers(0, 2**32, 4000), [0, 1, 0x7FFFFF, 0x800000, 0x7F7FFFFF, 0x7F800000]]
    ).astype(np.uint32)
    with np.errstate(invalid="ignore"):
        values = raw.view(np.float32).astype(np.float64)
    np.testing.assert_array_equal([kind.value(int(c)) for c in raw], values)
    finite = ~np.isnan(values)
    np.testing.assert_array_equal([kind.encode(float(v)) for v in values[finite]], raw[finite])


@settings(max_examples=200, deadline=None)
@given(st.floats(allow_nan=False))
def test_any_value_rounds_as_numpy_rounds(value: float) -> None:
    with np.errstate(over="ignore"):
        for name, dtype, raw in (("float32", np.float32, np.uint32), ("float16", np.float16, np.uint16)):
            assert float_number(name).encode(value) == int(np.array([value], dtype).view(raw)[0])


@pytest.mark.parametrize("name", ["e4m3fn", "e5m2", "e2m1", "e1m2", "e3m0"])
def test_the_elements_have_the_same_values(name: str) -> None:
    kind, element = float_number(name), Float(name)  # type: ignore[arg-type]
    np.testing.assert_array_equal([kind.value(code) for code in range(1 << kind.bits)], element.levels)
    assert kind.largest == element.largest


def test_too_large_and_not_a_number() -> None:
    assert number("e4m3fn").value(number("e4m3fn").encode(math.inf)) == 448.0
    assert number("e5m2").value(number("e5m2").encode(1e9)) == 57344.0
    assert number("float16").value(number("float16").encode(1e9)) == math.inf
    assert math.isnan(number("e4m3fn").value(number("e4m3fn").encode(math.nan)))
    assert number("e2m1").value(number("e2m1").encode(math.nan)) == -6.0


def test_e8m0_is_ml_dtypes() -> None:
    kind = number("e8m0")
    raw = np.arange(256, dtype=np.uint8)
    values = raw.view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    np.testing.assert_array_equal([kind.value(int(c)) for c in raw], values)
    assert [kind.encode(v) for v in values[:255]] == list(range(255))
    assert kind.value(kind.encode(1.99)) == 1.0  # down, as MX scales are chosen
    assert kind.encode(math.nan) == 255
    assert kind.encode(0.0) == 0


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("signed", [True, False])
def test_integers_come_back(bits: int, signed: bool) -> None:
    kind = IntNumber(bits, signed)
    assert (kind.lowest, kind.largest) == ((-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1))
    for whole in {kind.lowest, kind.largest, 0, kind.largest // 2}:
        assert kind.value(kind.encode(whole)) == whole
    assert kind.value(kind.encode(1e9)) == kind.largest
    assert kind.value(kind.encode(-1e9)) == kind.lowest
    assert kind.value(kind.encode(math.nan)) == kind.lowest
    if kind.largest >= 2:
        assert [kind.value(kind.encode(v)) for v in (0.5, 1.5, 1.2)] == [0, 2, 1]  # ties to even


def test_views_of_integers() -> None:
    kind = IntNumber(4)
    assert kind.views(kind.encode(-3)) == {
        "two's complement": "1101",
        "sign-magnitude": "1011",
        "ones' complement": "1100",
        "offset binary": "0101",
        "unsigned": "",
    }
    lowest = kind.views(kind.encode(-8))
    assert (lowest["two's complement"], lowest["offset binary"]) == ("1000", "0000")
    assert lowest["sign-magnitude"] == lowest["ones' complement"] == ""
    assert IntNumber(4, signed=False).views(15)["unsigned"] == "1111"
    assert IntNumber(4, signed=False).views(15)["two's complement"] == ""


def test_fixed_point() -> None:
    kind = number("q3.4")
    assert (kind.bits, kind.lowest, kind.largest) == (8, -8.0, 7.9375)
    assert kind.value(kind.encode(1.03)) == 1.0
    assert kind.value(kind.encode(1.04)) == 1.0625
    assert kind.encode(-0.0625) == 0xFF


@pytest.mark.parametrize("name", ["e9m9", "int0", "int33", "q40.1", "q0.0", "float", ""])
def test_unknown_formats_are_named(name: str) -> None:
    with pytest.raises(ValueError, match="unknown number format"):
        number(name)
