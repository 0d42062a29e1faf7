"""`phiquant inspect`: what is in a checkpoint, an exported file or folder, or a receipt."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ..checkpoint import read_header
from ..errors import PhiquantError
from ..formats import receipt
from ..formats.detect import Found, detect
from ..formats.gguf import reader as gguf_reader
from ..formats.registry import FORMATS
from ..formats.stored import StoredTensor
from ..runtimes.check import runtime_of
from ..spec import FLOAT_BITS, spec
from .arguments import checkpoint_folder
from .session import DebugFlag, JsonFlag, session, size, table

PathArg = Annotated[
    str,
    typer.Argument(
        metavar="PATH",
        help="A checkpoint's folder, a file or folder of any format, a receipt.json, or 'phi3-tiny'.",
        show_default=False,
    ),
]
_DTYPES = {"float32": "F32", "float16": "F16", "uint16": "BF16"}


@dataclass(frozen=True)
class Stored:
    """One tensor as a file stores it; bytes includes its scales. grid: its spec, or its dtype if it has no codes."""

    name: str
    stored_as: str
    shape: tuple[int, ...]
    bytes: int
    grid: str = ""

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / max(1, math.prod(self.shape))


def inspect(path: PathArg, json_: JsonFlag = False, debug: DebugFlag = False) -> None:
    """Show the tensors of a checkpoint, an exported file or folder of any format, or a receipt, and what each is."""
    with session(json_, debug) as ui:
        kind, tensors, facts = _look(path)
        report = summary(kind, tensors) | facts
        rows = table("tensor", "stored as", "grid", "shape", "bits per weight>", "size>")
        for t in tensors:
            rows.add_row(
                t.name, t.stored_as, t.grid, " x ".join(map(str, t.shape)), f"{t.bits_per_weight:.3f}", size(t.bytes)
            )
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
    if file.name == receipt.NAME and file.is_file():
        return "receipt", *receipt_tensors(file.parent)
    found = detect(file) if file.exists() else None
    if found is not None and not _is_checkpoint(found):
        tensors, facts = stored_tensors(found)
        exported = "exported " if found.receipt else ""
        method = f" ({found.quant_method})" if found.quant_method else ""
        return f"{exported}{found.format.name}{method}", tensors, facts
    if file.suffix == ".safetensors" and file.is_file():
        return "safetensors file", safetensors_tensors([file]), {}
    if file.is_file():
        raise PhiquantError(f"{file} is in none of the formats {', '.join(FORMATS)}, and no receipt.json")
    with checkpoint_folder(path) as folder:
        if shards := sorted(folder.glob("*.safetensors")):
            return "checkpoint", safetensors_tensors(shards), {}
        raise PhiquantError(f"{folder} has no weights in any of the formats {', '.join(FORMATS)}")


def _is_checkpoint(found: Found) -> bool:
    """A float checkpoint: its headers tell all, and a part of it may be looked at."""
    return found.format.name == "safetensors" and found.receipt is None and not found.quant_method


def stored_tensors(found: Found) -> tuple[list[Stored], dict[str, Any]]:
    """The tensors of an exported model as its reader finds them, and what its receipt and its file say."""
    tensors = [_stored(tensor) for tensor in found.read().values()]
    facts: dict[str, Any] = {"format": found.format.name, "runtime": runtime_of(found.format).NAME}
    if found.receipt is not None:
        facts["verified"] = bool(found.receipt.get("verified"))
    if found.format.name == "gguf":
        keys = gguf_reader.read_metadata(found.path)
        facts |= {key: keys[key] for key in ("general.name", "tokenizer.ggml.pre") if key in keys}
    return tensors, facts


def bits_of_layers(found: Found) -> float:
    """Stored bits per weight of the decoder's linear layers, scales included, counted in the file."""
    layers = [t for t in stored_tensors(found)[0] if len(t.shape) == 2 and ".layers." in t.name]
    total = sum(t.shape[0] * t.shape[1] for t in layers)
    return 8 * sum(t.bytes for t in layers) / total


def _stored(tensor: StoredTensor) -> Stored:
    """A file that stores a tensor under a name, not as a type, is told by the grid or the dtype."""
    grid, kind = str(tensor.spec), tensor.stored_as
    if tensor.spec is None:
        dtype = tensor.raw(slice(0, 1)).dtype.name
        grid = _DTYPES.get(dtype, dtype)
    if kind.startswith(tensor.name.removesuffix("weight")):
        kind = grid
    return Stored(tensor.name, kind, tensor.shape, tensor.nbytes, grid)


def safetensors_tensors(files: Iterable[Path]) -> list[Stored]:
    """The tensors of safetensors files, as their headers have them."""
    headers = (item for file in files for item in read_header(file).items())
    return [Stored(name, found.dtype, found.shape, found.nbytes, found.dtype) for name, found in headers]


def receipt_tensors(folder: Path) -> tuple[list[Stored], dict[str, Any]]:
    """What the receipt of an exported folder says about each tensor."""
    data = receipt.read(folder)
    tensors = []
    for entry in data["tensors"]:
        shape = tuple(entry["shape"])
        bits = spec(entry["spec"]).bits_per_weight(shape) if "spec" in entry else FLOAT_BITS.get(entry.get("dtype"), 0)
        grid = entry.get("spec") or str(entry.get("dtype"))
        tensors.append(Stored(entry["name"], entry["stored_as"], shape, math.ceil(bits * math.prod(shape) / 8), grid))
    return tensors, {"format": data["format"], "verified": bool(data.get("verified"))}
