"""Grids as text: "int4-g32-sym", "fp8_e4m3-channel-sym", and the names of the field's block formats."""

from __future__ import annotations

import re
from typing import Any

from .elements import Codebook, FixedPoint, read_element
from .granularity import Granularity, PerChannel, PerGroup, PerRows, PerTensor, PerToken
from .quant_spec import SCALE_TEXT, Anchor, Offset, QuantSpec
from .storage import read_two_level

_SPEC_TEXT = re.compile(
    r"(?P<element>[a-z0-9_.]+)(?:-(?P<grain>tensor|channel\d*|token|row|rows\d+|g\d+))?"
    r"(?:-(?P<kind>sym|signmax|asym|min|absmean))?(?:-(?P<scale>f32|f16|bf16|e8m0|e4m3))?"
    r"(?:-(?P<levels>(?:u?int[2-8]|e4m3)/(?:\d+|tensor|channel)))?"
)
_SCALE_DTYPE: dict[str | None, Any] = {None: "float32"} | {text: dtype for dtype, text in SCALE_TEXT.items()}
_OFFSET: dict[str | None, Offset] = {"asym": "zero_point", "min": "minimum"}
_ANCHOR: dict[str | None, Anchor] = {"signmax": "signed_absmax", "absmean": "absmean"}


# Block formats of the field by the names they go by: each is one line of the language of `spec`.
NAMED = {
    "mxfp4": "fp4_e2m1-g32-sym-e8m0",
    "mxfp8_e4m3": "fp8_e4m3-g32-sym-e8m0",
    "mxfp8_e5m2": "fp8_e5m2-g32-sym-e8m0",
    "mxint8": "int8-g32-sym-e8m0",
    "nvfp4": "fp4_e2m1-g16-sym-e4m3/tensor",
    "iq4_nl": "iq4nl-g32-signmax-f16",
    "iq4_xs": "iq4nl-g32-signmax-f16-int6/256",
    "vsq4": "int4-g16-sym-f16-uint4/channel",
    "q2_k": "uint2-g16-min-f16-uint4/256",
    "q3_k": "int3-g16-signmax-f16-int6/256",
    "q4_k": "uint4-g32-min-f16-uint6/256",
    "q5_k": "uint5-g32-min-f16-uint6/256",
    "q6_k": "int6-g16-signmax-f16-int8/256",
}


def read_grid(text: str) -> QuantSpec:
    """Read `<element>-<granularity>-<kind>[-<scale>][-<two levels>]`, or one of NAMED. Else ValueError.

    element: int1..int8, uint1..uint8, fp8_e4m3, fp8_e5m2, fp4_e2m1, fp4_e1m2, fp4_e3m0, nf4, iq4nl, binary,
    ternary, q<m>.<n> (fixed point), codebook2..codebook256; granularity: tensor, channel, channel1,
    token, row, rows8, g32 ...; kind: sym, signmax (symmetric, anchored on the signed extreme), asym
    (integer zero point), min (float minimum), absmean (of ternary), none for fixed point and
    codebooks; scale: f32 (default), f16, bf16, e8m0 (powers of two), e4m3; two levels: uint6/256, int8/256,
    e4m3/tensor, uint4/channel ... (storage.py). Names of such grids: NAMED. Examples: "int4-g32-sym", "uint4-g64-asym",
    "fp8_e4m3-channel-sym", "nf4-g64-sym", "binary-channel-sym", "codebook16-row", "q3.4".
    """
    if text in NAMED:
        return read_grid(NAMED[text])
    found = _SPEC_TEXT.fullmatch(text)
    if found is None:
        raise _unreadable(text)
    try:
        element = read_element(found["element"])
    except ValueError as error:
        raise _unreadable(text, str(error)) from error
    needs_kind = not isinstance(element, FixedPoint | Codebook)
    if needs_kind != bool(found["kind"]) or not (found["grain"] or isinstance(element, FixedPoint)):
        raise _unreadable(text)
    return QuantSpec(
        element=element,
        granularity=_granularity(found["grain"] or "tensor"),
        offset=_OFFSET.get(found["kind"], "none"),
        scale_dtype=_SCALE_DTYPE[found["scale"]],
        anchor=_ANCHOR.get(found["kind"], "absmax"),
        two_level=read_two_level(found["levels"]) if found["levels"] else None,
    )


def _granularity(text: str) -> Granularity:
    word = text.rstrip("0123456789")
    number = int(text[len(word) :] or -1)
    match word:
        case "tensor":
            return PerTensor()
        case "token":
            return PerToken()
        case "channel":
            return PerChannel(max(number, 0))
        case "g":
            return PerGroup(number)
    return PerRows(1 if word == "row" else number)


def _unreadable(text: str, reason: str = "") -> ValueError:
    return ValueError(
        f"cannot read spec {text!r}{': ' if reason else ''}{reason}; expected a target's name "
        "(`phiquant targets` lists them) or <element>-<tensor|channel|token|row|rows<n>|g<size>>-"
        "<sym|signmax|asym|min|absmean>[-<f32|f16|bf16|e8m0|e4m3>][-<two levels>], such as 'int4-g32-sym', "
        f"'fp8_e4m3-channel-sym', 'nf4-g64-sym', 'codebook16-row' or 'q3.4', or one of {', '.join(NAMED)}"
    )
