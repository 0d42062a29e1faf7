"""`phiquant targets`: every grid that a deployment format holds, and what it takes to run it."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.markup import escape

from ..extras import missing
from ..formats.registry import FORMATS, Format
from ..quant_spec import QuantSpec
from ..runtimes.check import runtime_of
from ..spec import FLOAT_BITS, Codebook, FixedPoint
from ..targets import TARGETS, Target
from .session import DebugFlag, JsonFlag, session, table

FormatOption = Annotated[
    str | None, typer.Option("--format", "-f", help="The targets of this format only.", show_default=False)
]
_SHAPE = (4096, 4096)  # the weight whose bits are counted
_DECODE = {"none": "s q", "zero_point": "s (q - z)", "minimum": "s q + m"}


def targets(format_: FormatOption = None, json_: JsonFlag = False, debug: DebugFlag = False) -> None:
    """Print the registry of targets: grid, stored parameters, bits per weight, limits, and what runs them."""
    with session(json_, debug) as ui:
        if format_ is not None and format_ not in FORMATS:
            known = ", ".join(FORMATS)
            raise typer.BadParameter(f"{format_!r} is not one of {known}", param_hint="--format")
        shown = [t for t in TARGETS.values() if t.format in FORMATS and format_ in (None, t.format)]
        formats = {name: _about(FORMATS[name]) for name in dict.fromkeys(t.format for t in shown)}
        records = [facts(target) | {"runtime": formats[target.format]["runtime"]} for target in shown]
        rows = table("target", "grid", "decode", "codes", "parameters", "bits per\nweight>", "note")
        for one in records:
            bits = "" if one["bits_per_weight"] is None else f"{one['bits_per_weight']:.4g}"
            rows.add_row(one["target"], one["grid"], one["decode"], one["codes"], one["parameters"], bits, one["note"])
        runtimes = table("format", "runs in", "needs", "installed")
        for name, about in formats.items():
            lacks = f"no: {', '.join(about['missing'])}" if about["missing"] else "yes"
            runtimes.add_row(name, about["runtime"], escape(about["needs"]), lacks)
        ui.result({"targets": records, "formats": formats}, rows, runtimes)


def facts(target: Target) -> dict[str, Any]:
    """What a target holds, exactly: in words and figures, fit for JSON."""
    spec, name = target.spec, target.name
    if target.mixture is not None:
        held = {"grid": "by layer", "decode": "", "codes": "", "parameters": ""}
        return {"target": name, **held, "bits_per_weight": None, "note": target.note}
    if spec is None:
        held = {"grid": "float", "decode": target.float_dtype, "codes": "", "parameters": ""}
        return {"target": name, **held, "bits_per_weight": FLOAT_BITS[target.float_dtype], "note": target.note}
    codes = str(spec.element) if spec.element.levels is None else f"{spec.element.qmin}..{spec.element.qmax}"
    held = {"grid": str(spec), "decode": _DECODE[spec.offset], "codes": codes, "parameters": parameters(spec)}
    note = target.note
    if target.activations is not None:
        note = f"activations {target.activations}{'; ' if note else ''}{note}"
    return {"target": name, **held, "bits_per_weight": target.bits or spec.bits_per_weight(_SHAPE), "note": note}


def parameters(spec: QuantSpec) -> str:
    """What is stored beside the codes, and for how many of them."""
    share = str(spec.granularity)
    if isinstance(spec.element, FixedPoint):
        return "none"
    if isinstance(spec.element, Codebook):
        return f"{spec.element.size} levels {spec.scale_dtype} per {share}"
    stored: str = spec.scale_dtype
    if spec.two_level is not None:
        stored = f"{spec.two_level.sub} times {spec.scale_dtype} per {spec.two_level.super_block}"
    names = {"none": "s", "zero_point": f"s, z ({spec.element})", "minimum": "s, m"}[spec.offset]
    return f"{names}: {stored} per {share}"


def _about(format: Format) -> dict[str, Any]:
    return {
        "runtime": runtime_of(format).NAME,
        "needs": f"phiquant[{format.extra}]",
        "missing": missing(format.extra),
        "reader": format.reader,
    }
