"""receipt.json: what was stored, beside what was written. It is written last; verify reads it first.

{"phiquant": version, "format": "gguf", "targets": [...], "versions": {...},
 "files": {name: {"bytes", "sha256"} or {"bytes", "header": {"bytes", "sha256"}}},
 "tensors": [{"name", "stored_as", "shape", "file", "spec", "target", "codes", "parameters", "exact", "origin"}
             or {"name", "stored_as", "shape", "file", "dtype", "values", "exact"}],
 "verified": {...} or null, "model": {field of config.json: value}}

"origin" says how the codes were chosen: solver, and the data or the training it took. docs/receipt.md has it all.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from ..errors import PhiquantError
from ..spec import TARGETS
from ..tensor import PARAMETERS, QuantizedTensor
from ..untrusted import read_json
from .partial import write_atomically
from .registry import FORMATS
from .source import Entry

NAME = "receipt.json"
_HASHING = ThreadPoolExecutor(1, "phiquant-digest")  # one: pieces are digested in their order
_SHA256 = re.compile(r"[0-9a-f]{64}")


class TensorDigest:
    """The digests of one tensor, gathered while its pieces (rows, in order) pass by.

    Those of QuantizedTensor.digests() for codes; "values", the SHA-256 of the bytes as stored, for floats.
    """

    def __init__(self) -> None:
        self._codes, self._values = hashlib.sha256(), hashlib.sha256()
        self._parameters: list[list[torch.Tensor]] = [[] for _ in PARAMETERS]
        self._pending: list[Future[None]] = []

    def add_codes(self, piece: QuantizedTensor) -> None:
        """Digested in a thread of its own, a piece behind: the codes must stay as they are."""
        self._wait(1)
        self._pending.append(_HASHING.submit(self._codes.update, raw(piece.codes)))
        for kept, name in zip(self._parameters, PARAMETERS, strict=True):
            if name in piece.parameters:
                kept.append(piece.parameters[name])

    def add_values(self, stored: bytes | bytearray | memoryview) -> None:
        self._values.update(stored)

    def _wait(self, left: int) -> None:
        """Until at most `left` pieces are pending: they hold memory."""
        while len(self._pending) > left:
            self._pending.pop(0).result()

    def codes(self) -> dict[str, str]:
        self._wait(0)
        parameters = hashlib.sha256()
        for kept in self._parameters:
            for piece in kept:
                parameters.update(raw(piece))
        return {"codes": self._codes.hexdigest(), "parameters": parameters.hexdigest()}

    def values(self) -> dict[str, str]:
        return {"values": self._values.hexdigest()}


def raw(t: torch.Tensor) -> memoryview:
    """The bytes of a tensor, row-major, little endian on every machine that torch supports."""
    return t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def tensor_record(
    entry: Entry, stored_as: str, file: str, digests: Mapping[str, str], *, dtype: str | None = None, exact: bool = True
) -> dict[str, Any]:
    """What a receipt says of one tensor. dtype: of a float tensor, as stored; exact: no value was rounded."""
    kind = {"dtype": dtype or entry.dtype} if entry.spec is None else {"spec": str(entry.spec)}
    return {
        "name": entry.name,
        "stored_as": stored_as,
        "shape": list(entry.shape),
        "file": file,
        **kind,
        **digests,
        "exact": exact,
        **({} if entry.origin is None else {"origin": dict(entry.origin)}),
    }


def file_record(path: Path, header: int | None = None) -> dict[str, Any]:
    """Size of a file and its SHA-256; of a large file of tensors, only that of its first `header` bytes."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        digest = hashlib.sha256(file.read(size if header is None else min(size, header))).hexdigest()
    if header is None:
        return {"bytes": size, "sha256": digest}
    return {"bytes": size, "header": {"bytes": header, "sha256": digest}}


def make(
    format_name: str,
    files: Mapping[str, Mapping[str, Any]],
    tensors: Sequence[Mapping[str, Any]],
    entries: Sequence[Entry],
    packages: Sequence[str] = (),
) -> dict[str, Any]:
    """A receipt. packages: those whose versions had a part in the bytes, besides torch and numpy."""
    specs = {entry.spec for entry in entries if entry.spec is not None}
    names = {str(t.spec): t.name for t in reversed(TARGETS.values()) if t.format == format_name and t.spec}
    targets = [t.name for t in TARGETS.values() if t.format == format_name and t.spec in specs and t.spec]
    return {
        "phiquant": version("phiquant"),
        "format": format_name,
        "targets": targets,
        "specs": sorted(map(str, specs)),
        "versions": {"python": platform.python_version(), **{p: version(p) for p in ("torch", "numpy", *packages)}},
        "files": {name: dict(record) for name, record in files.items()},
        "tensors": [_with_target(record, names) for record in tensors],
        "verified": None,
    }


def _with_target(record: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    target = names.get(str(record.get("spec")))
    return dict(record) | ({"target": target} if target else {})


def version(package: str) -> str:
    """Version of an installed package, or "unknown"."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


def write(out: Path, receipt: Mapping[str, Any]) -> None:
    """Write out/receipt.json: the last act of an export."""
    write_atomically(out / NAME, json.dumps(receipt, indent=1) + "\n")


def remove(out: Path) -> None:
    """Remove the receipt of an earlier export: the first act of one that replaces its files."""
    (out / NAME).unlink(missing_ok=True)


def read(out: Path) -> dict[str, Any]:
    """The receipt of a folder. It is untrusted: PhiquantError for anything that is not a receipt.

    Every file it names lies in the folder itself and exists.
    """
    path = out / NAME
    if not out.is_dir():
        raise PhiquantError(f"{out} is not a folder; give the folder that an export wrote")
    if not path.is_file():
        raise PhiquantError(f"{out} has no {NAME}: it was not written by phiquant, or its export did not finish")
    data = read_json(path)
    problem = _problem(data)
    if problem:
        raise PhiquantError(f"{path} is not a receipt: {problem}; export again")
    for name in data["files"]:
        if not (out / name).is_file():
            raise PhiquantError(f"{path} names the file {name}, which is missing; export again")
    return dict(data)


def is_plain_name(name: object) -> bool:
    """Whether it is the name of a file in the folder itself: no path, no "..", no separator."""
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and not set(name) & set('/\\:\0*?"<>|')
        and PurePosixPath(name).name == name
        and name.isprintable()
        and len(name.encode()) <= 255  # what file systems hold
    )


def _problem(data: Any) -> str | None:
    if not isinstance(data, dict) or not isinstance(data.get("format"), str):
        return "it is not an object with a format"
    if data["format"] not in FORMATS:
        return f"unknown format {data['format']!r}; known formats: {', '.join(FORMATS)}"
    files, tensors = data.get("files"), data.get("tensors")
    if not isinstance(files, dict) or not isinstance(tensors, list):
        return "it has no files or no tensors"
    for name, record in files.items():
        if not is_plain_name(name):
            return f"{name!r} is not the name of a file in its folder"
        if not isinstance(record, dict) or not isinstance(record.get("bytes"), int):
            return f"file {name!r} has no size"
        header = record.get("header", record)
        if not isinstance(header, dict) or not isinstance(header.get("bytes"), int) or not _is_sha(header):
            return f"file {name!r} has no digest"
        if not 0 <= header["bytes"] <= record["bytes"]:
            return f"file {name!r} has {record['bytes']} bytes and a header of {header['bytes']}"
    seen: set[str] = set()
    for record in tensors:
        problem = _tensor_problem(record, files, seen)
        if problem:
            return problem
    return None


def _tensor_problem(record: Any, files: Mapping[str, Any], seen: set[str]) -> str | None:
    if not isinstance(record, dict) or not isinstance(record.get("name"), str):
        return "a tensor has no name"
    name = record["name"]
    if name in seen:
        return f"tensor {name!r} occurs twice"
    seen.add(name)
    shape = record.get("shape")
    if not isinstance(shape, list) or not all(isinstance(n, int) and n >= 0 for n in shape):
        return f"tensor {name!r} has no shape"
    if (
        not isinstance(record.get("file"), str)
        or record["file"] not in files
        or not isinstance(record.get("stored_as"), str)
    ):
        return f"tensor {name!r} is in none of its files"
    keys = ("codes", "parameters") if isinstance(record.get("spec"), str) else ("values",)
    if not all(_is_sha(record, key) for key in keys):
        return f"tensor {name!r} has no digest"
    return None


def _is_sha(record: Mapping[str, Any], key: str = "sha256") -> bool:
    return isinstance(record.get(key), str) and _SHA256.fullmatch(record[key]) is not None
