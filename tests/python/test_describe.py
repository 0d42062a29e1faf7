"""Descriptions: the course's figures, its errors put right, and the bits of single values."""

from __future__ import annotations

import json
import math

import phiquant as pq
import pytest
from phiquant.cli.app import app
from typer.testing import CliRunner


def test_limits_of_float32() -> None:
    facts = pq.describe("float32")
    assert facts["smallest normal"] == 2.0**-126
    assert facts["smallest subnormal"] == 2.0**-149
    assert facts["largest subnormal"] == 2.0**-126 - 2.0**-149
    assert facts["largest"] == (2 - 2.0**-23) * 2.0**127
    assert "= (2 - 2^-23) * 2^127" in str(facts)
    assert "= 2^-149" in str(facts)


def test_float16_has_10_fraction_bits_and_bfloat16_seven() -> None:
    assert pq.describe("fp16")["fields"] == "sign 1 | exponent 5 | fraction 10"
    assert pq.describe("bf16")["fields"] == "sign 1 | exponent 8 | fraction 7"


def test_tables_of_four_bits() -> None:
    positive = {name: pq.describe(name)["all values"][:8] for name in ("e1m2", "e2m1", "e3m0")}
    assert positive["e1m2"] == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5]
    assert positive["e2m1"] == [0, 0.5, 1, 1.5, 2, 3, 4, 6]  # 0111 is 6
    assert positive["e3m0"] == [0, 0.25, 0.5, 1, 2, 4, 8, 16]
    assert pq.describe("int4")["all values"] == [0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1]


@pytest.mark.parametrize("n", [2, 4, 8, 16])
def test_ranges_of_integers(n: int) -> None:
    assert pq.describe(f"uint{n}")["largest"] == 2**n - 1
    assert (pq.describe(f"int{n}")["lowest"], pq.describe(f"int{n}")["largest"]) == (-(2 ** (n - 1)), 2 ** (n - 1) - 1)
    assert pq.describe(f"int{n}")["lowest in sign-magnitude"] == -(2 ** (n - 1) - 1)


def test_e4m3fn() -> None:
    facts = pq.describe("e4m3fn")
    assert (facts["largest"], facts["smallest normal"], facts["smallest subnormal"]) == (448, 2**-6, 2**-9)
    assert (facts["bits per weight"], facts["step from 1 to 2"], facts["values"]) == (8, 0.125, 253)
    text = str(facts)
    for words in ("e4m3fn", "smallest subnormal", "0.001953125 = 2^-9", "NaN is all ones"):
        assert words in text


def test_every_element_of_a_spec_is_described() -> None:
    for name in ("int4-g32-sym", "uint4-g64-asym", "uint4-g32-min-f16", "fp8_e4m3-channel-sym", "nf4-g64-sym",
                 "binary-channel-sym", "ternary-channel-sym", "codebook16-row", "gguf:Q4_0"):  # fmt: skip
        found = pq.describe(name)
        assert found["bits per weight"] == pq.spec(name).bits_per_weight((4096, 4096))
        assert json.loads(json.dumps(found.as_dict(), allow_nan=False))["name"] == str(pq.spec(name))
    assert pq.describe("gguf:Q4_0")["bits per weight"] == 4.5
    assert pq.describe(pq.spec("int4-g32-sym"))["scale stored as"] == "float32"


def test_bits_of_a_float() -> None:
    found = pq.bits(0.3, "e4m3fn")
    assert (found.code, found.value) == (0x2A, 0.3125)
    assert [bits for _, bits, _ in found.fields] == ["0", "0101", "010"]
    assert "2^(5 - 7) = 0.25" in str(found)
    assert "1 + 2/8 = 1.25" in str(found)
    assert found.error == pytest.approx(0.0125)
    subnormal = pq.bits(-(2.0**-9), "e4m3fn")
    assert [meaning for _, _, meaning in subnormal.fields] == ["-", "2^(1 - 7) = 0.015625", "0 + 1/8 = 0.125"]


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16", "e4m3fn", "e5m2", "e2m1", "e1m2", "e3m0"])
@pytest.mark.parametrize("value", [1.0, -3.5, 0.3, 1e-3, 0.0, -0.0])
def test_the_meanings_multiply_to_the_value(name: str, value: float) -> None:
    found = pq.bits(value, name)
    meaning = {field: text for field, _, text in found.fields}
    exponent = float(meaning["exponent"].split("= ")[1])
    fraction = float(meaning["fraction"].split("= ")[1])
    product = exponent * fraction * (-1 if meaning["sign"] == "-" else 1)
    assert product == pytest.approx(found.value, rel=1e-5)


def test_bits_of_integers_and_fixed_point() -> None:
    found = pq.bits(-3.4, "int4")
    assert (found.code, found.value) == (0b1101, -3)
    assert found.views["sign-magnitude"] == "1011"
    assert "has no code for it" in str(pq.bits(-8, "int4"))
    fixed = pq.bits(-1.25, "q3.4")
    assert [bits for _, bits, _ in fixed.fields] == ["1", "110", "1100"]
    worth = [-8.0 if text == "-2^3" else float(text) for _, _, text in fixed.fields]
    assert sum(worth) == fixed.value == -1.25


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 1e30])
@pytest.mark.parametrize("name", ["float16", "e4m3fn", "e5m2", "e2m1", "e8m0", "int4", "uint8", "q3.4"])
def test_any_value_has_bits(name: str, value: float) -> None:
    found = pq.bits(value, name)
    assert 0 <= found.code < 2**found.width
    assert name in str(found)
    json.dumps(found.as_dict(), allow_nan=False)


def test_unknown_names_say_what_is_known() -> None:
    with pytest.raises(ValueError, match=r"unknown number format 'e9m9'.*and as a spec"):
        pq.describe("e9m9")
    with pytest.raises(ValueError, match="unknown number format"):
        pq.bits(1.0, "int4-g32-sym")


def test_command() -> None:
    def run(*arguments: str, code: int = 0) -> str:
        result = CliRunner().invoke(app, ["describe", *arguments])
        assert result.exit_code == code, result.output
        return result.stdout

    assert "448" in run("e4m3fn")
    assert json.loads(run("e4m3fn", "--json"))["smallest subnormal"] == 2**-9
    assert json.loads(run("int4", "--json", "--", "-3"))["views"]["sign-magnitude"] == "1011"
    assert json.loads(run("float16", "1e9", "--json"))["value"] == "inf"
    run("nothing", code=2)
