"""`phiquant inspect`: what is in a checkpoint, an exported file or folder, or a receipt."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from safetensors import safe_open

from ..checkpoint import read_header
from ..errors import PhiquantError
from ..formats import gguf_reader, receipt
from ..spec import FLOAT_BITS, spec
from .arguments import checkpoint_folder
from .session import DebugFlag, JsonFlag, session, size, table

PathArg = Annotated[
    str,
    typer.Argument(
        metavar="PATH",
        help="A checkpoint's folder, a .gguf or .safetensors file, an exported folder, a receipt.json, or 'phi3-tiny'.",
        show_default=False,
    ),
]
# What compressed-tensors stores beside (or instead of) X.weight, counted as part of X.weight.
_PARTS = (".weight_packed", ".weight_scale", ".weight_zero_point", ".weight_shape", ".weight_g_idx")


@dataclass(frozen=True)
class Stored:
    """One tensor as a file stores it; bytes includes its scales."""

    name: str
    stored_as: str
    shape: tuple[int, ...]
    bytes: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / max(1, math.prod(self.shape))


def inspect(path: PathArg, json_: JsonFlag = False, debug: DebugFlag = False) -> None:
    """Show the tensors of a checkpoint, GGUF, safetensors file or folder, or receipt: type, shape, bits per weight."""
    with session(json_, debug) as ui:
        kind, tensors, facts = _look(path)
        report = summary(kind, tensors) | facts
        rows = table("tensor", "stored as", "shape", "bits per weight>", "size>")
        for t in tensors:
            rows.add_row(t.name, t.stored_as, " x ".join(map(str, t.shape)), f"{t.bits_per_weight:.3f}", size(t.bytes))
        types = table("stored as", "tensors>", "values>", "bits per weight>", "size>")
        for name, entry in report["types"].items():
            values = f"{entry['values']:,}"
            types.add_row(name, str(entry["tensors"]), values, f"{entry['bits_per_weight']:.3f}", size(entry["bytes"]))
        head = (
            f"{path}: {kind}, {report['values']:,} values, {report['bits_per_weight']:.3f} bits per weight, "
            f"{size(report['bytes'])}"
        )
        lines = [f"{key}: {value}" for key, value in facts.items() if not isinstance(value, dict | list)]
        ui.result(report, rows, types, head, *lines)


def summary(kind: str, tensors: list[Stored]) -> dict[str, Any]:
    """The tensors and their sums, in all and by storage type, as the JSON output has them."""
    types: dict[str, dict[str, Any]] = {}
    for name in sorted({t.stored_as for t in tensors}):
        types[name] = _sums([t for t in tensors if t.stored_as == name])
    rows = [asdict(t) | {"bits_per_weight": t.bits_per_weight} for t in tensors]
    return {"kind": kind, "tensors": rows, "types": types} | {k: v for k, v in _sums(tensors).items() if k != "tensors"}


def _sums(tensors: list[Stored]) -> dict[str, Any]:
    values, stored = sum(math.prod(t.shape) for t in tensors), sum(t.bytes for t in tensors)
    return {"tensors": len(tensors), "values": values, "bytes": stored, "bits_per_weight": 8 * stored / max(1, values)}


def _look(path: str) -> tuple[str, list[Stored], dict[str, Any]]:
    """(what it is, its tensors, what else is worth saying)."""
    file = Path(path)
    if file.suffix == ".gguf" and file.is_file():
        return "GGUF", *gguf_tensors(file)
    if file.suffix == ".safetensors" and file.is_file():
        return "safetensors file", safetensors_tensors([file]), {}
    if file.name == "receipt.json" and file.is_file():
        return "receipt", *receipt_tensors(file.parent)
    if file.is_file():
        raise PhiquantError(f"{file} is none of .gguf, .safetensors, receipt.json; phiquant opens no other files")
    with checkpoint_folder(path) as folder:
        return _look_into(folder)


def _look_into(folder: Path) -> tuple[str, list[Stored], dict[str, Any]]:
    if ggufs := sorted(folder.glob("*.gguf")):
        tensors, facts = gguf_tensors(ggufs[0])
        return "exported GGUF folder", tensors, facts | _verified(folder)
    if shards := sorted(folder.glob("*.safetensors")):
        exported = (folder / "receipt.json").is_file()
        kind = "exported safetensors folder" if exported else "checkpoint"
        return kind, safetensors_tensors(shards), _verified(folder) if exported else {}
    raise PhiquantError(f"{folder} has no .safetensors and no .gguf file")


def safetensors_tensors(files: Iterable[Path]) -> list[Stored]:
    """The tensors of safetensors files; a packed weight and its scales count as one."""
    raw: dict[str, tuple[str, tuple[int, ...], int]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        for name, stored in read_header(file).items():
            raw[name] = (stored.dtype, stored.shape, stored.nbytes)
            if name.endswith(".weight_shape"):
                shapes[name.removesuffix("_shape")] = _true_shape(file, name)
    return _merge(raw, shapes)


def _true_shape(file: Path, name: str) -> tuple[int, ...]:
    with safe_open(file, framework="pt") as opened:
        return tuple(int(n) for n in opened.get_tensor(name).flatten())


def _merge(raw: dict[str, tuple[str, tuple[int, ...], int]], shapes: dict[str, tuple[int, ...]]) -> list[Stored]:
    found: dict[str, Stored] = {}
    for name, (dtype, shape, stored) in raw.items():
        part = next((p for p in _PARTS if name.endswith(p)), None)
        if part is None:
            beside = raw.get(f"{name}_scale")
            kind = f"{dtype} codes" if beside else dtype
            found[name] = Stored(name, kind, shape, stored + (beside[2] if beside else 0))
        elif part == ".weight_packed":
            weight = name.removesuffix("_packed")
            total = sum(raw[weight + p.removeprefix(".weight")][2] for p in _PARTS if weight + p[7:] in raw)
            true_shape = shapes.get(weight, shape)
            bits = round(8 * stored / max(1, math.prod(true_shape)))
            found[weight] = Stored(weight, f"int{bits} packed", true_shape, total)
    return list(found.values())


def gguf_tensors(file: Path) -> tuple[list[Stored], dict[str, Any]]:
    """The tensors of a GGUF file under their Hugging Face names, and a few of its keys."""
    found = gguf_reader.read(file).values()
    keys = gguf_reader.read_metadata(file)
    facts: dict[str, Any] = {key: keys[key] for key in ("general.name", "tokenizer.ggml.pre") if key in keys}
    return [Stored(t.name, t.stored_as, t.shape, int(t.data.nbytes)) for t in found], facts


def receipt_tensors(folder: Path) -> tuple[list[Stored], dict[str, Any]]:
    """What the receipt of an exported folder says about each tensor."""
    data = receipt.read(folder)
    tensors = []
    for entry in data["tensors"]:
        shape = tuple(entry["shape"])
        bits = spec(entry["spec"]).bits_per_weight(shape) if "spec" in entry else FLOAT_BITS.get(entry.get("dtype"), 0)
        tensors.append(Stored(entry["name"], entry["stored_as"], shape, math.ceil(bits * math.prod(shape) / 8)))
    return tensors, {"format": data["format"], "verified": bool(data.get("verified"))}


def _verified(folder: Path) -> dict[str, Any]:
    return receipt_tensors(folder)[1] if (folder / "receipt.json").is_file() else {}
