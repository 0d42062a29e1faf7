"""export(): write the codes of a model in a format. verify(): read them back and compare every one."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .errors import PhiquantError
from .formats import receipt as receipts
from .formats.detect import locate
from .formats.registry import FORMATS, find
from .formats.source import Progress
from .input_quantizers import ask_writer, input_grid
from .model_source import ModelSource
from .models import phi
from .runtimes import check
from .runtimes import long as gate
from .runtimes.check import RuntimeResult
from .runtimes.long import LongResult
from .spec import FloatName
from .spec import spec as read_spec

_READERS = min(4, os.cpu_count() or 1)  # tensors that are compared at a time: each takes some pieces of memory
_WEIGHTS = tuple(dict.fromkeys(pattern for one in FORMATS.values() for pattern in one.weights))


@dataclass(frozen=True)
class TensorResult:
    """error: what differs from the receipt, or None."""

    name: str
    ok: bool
    error: str | None = None


@dataclass(frozen=True)
class Report:
    """What verify() found. ok: nothing differs. files: what is wrong with the files beside the tensors."""

    format: str
    ok: bool
    tensors: list[TensorResult]
    files: list[str] = field(default_factory=list)
    runtime: RuntimeResult | None = None
    long: LongResult | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        bad = [t for t in self.tensors if not t.ok]
        lines = [f"{len(self.tensors) - len(bad)} of {len(self.tensors)} tensors are exactly what the receipt says"]
        lines += self.files + [f"{t.name}: {t.error}" for t in bad]
        if self.runtime is not None:
            lines.append(f"{self.runtime.name}: relative error of the logits {self.runtime.relative_error:.2e}")
            lines += [f"{self.runtime.deviation}; so did torch"] if self.runtime.deviation else []
        if self.long is not None:
            lines.append(str(self.long))
        return "\n".join(lines)


def export(
    model: Any,
    tokenizer: Any,
    out: str | Path,
    format: str = "gguf",
    *,
    float_dtype: FloatName | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Write the model's codes into the folder `out`, with its tokenizer; read them back; return the receipt.

    format: one of formats.registry.FORMATS. options: of its writer.
    float_dtype: of the tensors without codes; None: the narrowest that holds their values exactly.
    PhiquantError, before anything is written, if the format cannot hold a grid exactly, of weights or, where
    linears round what they read, of inputs.
    """
    out = Path(out)
    writer = find(format).writer()
    options = ask_writer(format, input_grid(model), options)
    source = ModelSource(model, tokenizer, float_dtype)
    claim_folder(out, format)
    writer.write(source, out, progress=progress, **options)
    return sign(out, source.config)


def verify(
    out: str | Path,
    run: bool = False,
    text: str | None = None,
    reference: Any = None,
    *,
    long: bool = False,
    windows: int = 4,
    decode: bool = True,
) -> Report:
    """Read an export with an independent reader and compare every code and parameter with its receipt.

    run: also run it in its runtime, on `windows` windows of `text` (None: held-out standard library
        modules), against `reference` or, without one, the model decoded from the file.
    long: also compare at lengths on both sides of the original context and the sliding window, against the model
        that was exported, as its receipt describes it (an older receipt: as the file does).
    decode: also let the format's own library decode every value, and compare.
    PhiquantError if there is no receipt, or it cannot be trusted.
    """
    out = Path(out)
    receipt = receipts.read(out)
    reader = find(receipt["format"]).reader_module()
    files = list(_file_problems(out, receipt))
    tensors = list(_tensor_results(out, receipt, reader, decode))
    ok = not files and all(t.ok for t in tensors)
    runtime, lengths = None, None
    if run and ok:
        runtime = check.run(find(receipt["format"]), locate(out, receipt), text, reference, windows)
    if long and ok:
        config = receipt.get("model") or reader.read_config(locate(out, receipt))
        lengths = gate.run(find(receipt["format"]), locate(out, receipt), config, text)
    ok = ok and all(result is None or result.ok for result in (runtime, lengths))
    return Report(receipt["format"], ok, tensors, files, runtime, lengths)


def sign(out: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Read a fresh export back, compare every code, note it in the receipt, and what `config` says the model computes.

    PhiquantError if a tensor differs.
    """
    _remove_stale(out, receipts.read(out)["files"])
    report = verify(out, decode=False)
    if not report.ok:
        receipts.remove(out)
        raise PhiquantError(f"{out} does not hold what was written; the disk may be failing: {report}")
    receipt = receipts.read(out)
    package = find(report.format).reader
    receipt["versions"][package] = receipts.version(package)
    receipt["model"] = {key: config[key] for key in phi.COMPUTED if config.get(key) is not None}
    receipt["verified"] = {"tensors": len(report.tensors), "reader": f"{package} {receipts.version(package)}"}
    receipts.write(out, receipt)
    return receipt


def claim_folder(out: Path, format: str) -> None:
    """Refuse to write where that would overwrite a model that phiquant did not write, or mix two formats.

    A finished export of the same format, and an unfinished one, may be replaced.
    """
    if out.exists() and not out.is_dir():
        raise PhiquantError(f"{out} is a file; give a folder")
    if not out.is_dir():
        return
    if (out / receipts.NAME).is_file():
        previous = receipts.read(out)
        if previous["format"] != format:
            raise PhiquantError(f"{out} holds an export in the format {previous['format']}; choose another folder")
        known = set(previous["files"])
    else:
        known = {path.name.partition(".partial")[0] for path in out.glob("*.partial*")}
    weights = {path.name for pattern in _WEIGHTS for path in out.glob(pattern)}
    if foreign := sorted(weights - known):
        raise PhiquantError(
            f"{out} holds {foreign[0]}, which no receipt.json there tells of; choose an empty folder, so that no "
            "model is overwritten"
        )


def _remove_stale(out: Path, files: Mapping[str, Any]) -> None:
    """Weights of the export that this one replaced, and pieces of runs that were given up: claim_folder() knew them."""
    for pattern in (*_WEIGHTS, "*.partial", "*.partial.json"):
        for path in out.glob(pattern):
            if path.name not in files:
                path.unlink()


def _file_problems(out: Path, receipt: Mapping[str, Any]) -> Iterator[str]:
    """Files whose size or digest is not that of the receipt; of weights, the header counts here."""
    for name, record in receipt["files"].items():
        header = record.get("header")
        found = receipts.file_record(out / name, header["bytes"] if header else None)
        if found != record:
            what = "size" if found["bytes"] != record["bytes"] else "header" if header else "content"
            yield f"{name}: its {what} is not what the receipt says"


def _tensor_results(out: Path, receipt: Mapping[str, Any], reader: Any, decode: bool) -> list[TensorResult]:
    names = [record["name"] for record in receipt["tensors"]]
    try:
        stored = reader.read(locate(out, receipt))
    except (PhiquantError, OSError) as error:
        return [TensorResult(name, False, str(error)) for name in names]
    with ThreadPoolExecutor(_READERS) as pool:  # numpy and hashlib let go of the interpreter's lock
        found = (stored.get(name) for name in names)
        results = list(pool.map(lambda record, tensor: _compare(record, tensor, decode), receipt["tensors"], found))
    strangers = sorted(set(stored) - set(names))
    return results + [TensorResult(name, False, "is in the file, but not in the receipt") for name in strangers]


def _compare(record: Mapping[str, Any], stored: Any, decode: bool) -> TensorResult:
    name = record["name"]
    try:
        return TensorResult(name, *_difference(record, stored, decode))
    except (ValueError, OSError, IndexError, KeyError, TypeError) as error:
        return TensorResult(name, False, str(error))


def _difference(record: Mapping[str, Any], stored: Any, decode: bool) -> tuple[bool, str | None]:
    if stored is None:
        return False, "is not in the file"
    if list(stored.shape) != record["shape"]:
        return False, f"has shape {list(stored.shape)}, the receipt says {record['shape']}"
    spec = read_spec(record["spec"]) if "spec" in record else None
    for kind, digest in stored.digests(spec).items():
        if record[kind] != digest:
            return False, f"its {kind} are not those of the receipt"
    if spec is not None and decode:
        for rows in stored.row_slices():
            if not np.array_equal(stored.values(rows), stored.reference(rows), equal_nan=True):
                return False, "the format's own library decodes other values than the codes and scales stand for"
    return True, None
