"""Which format a file or folder is in: by its receipt, or, of files that others made, by what lies there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import PhiquantError
from ..spec import QuantSpec
from ..spec import spec as read_spec
from ..untrusted import read_json
from . import receipt as receipts
from .registry import FORMATS, Format, find
from .stored import StoredTensor


@dataclass(frozen=True)
class Found:
    """A model in one of the formats. path: what its reader and its runtime open, the folder or the one weight file."""

    format: Format
    path: Path

    @property
    def folder(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent

    def read(self) -> Mapping[str, StoredTensor]:
        """Its tensors by their Hugging Face names, decoded on demand."""
        return self.format.reader_module().read(self.path)

    def config(self) -> dict[str, Any]:
        """The config.json that it stands for."""
        return dict(self.format.reader_module().read_config(self.path))

    @cached_property
    def receipt(self) -> dict[str, Any] | None:
        """The receipt beside it, if that is one of this format."""
        if not (self.folder / receipts.NAME).is_file():
            return None
        data = receipts.read(self.folder)
        return data if data["format"] == self.format.name else None

    @property
    def quant_method(self) -> str | None:
        """How config.json says weights are quantized: "compressed-tensors", "gptq", "awq" ...; None: it does not."""
        method = (_config(self.folder).get("quantization_config") or {}).get("quant_method")
        return method if isinstance(method, str) else None

    def record(self, name: str) -> dict[str, Any]:
        """What the receipt says of a tensor; {} where nothing is said."""
        return dict(self._records.get(name, {}))

    @cached_property
    def _records(self) -> dict[str, dict[str, Any]]:
        tensors = self.receipt["tensors"] if self.receipt else []
        return {one["name"]: one for one in reversed(tensors)}  # of a name said twice the first counts

    def words(self, stored: StoredTensor) -> QuantSpec | None:
        """The spec a tensor was quantized with, if the receipt tells (3 bits in Q4_0); else the file's own grid."""
        text = self.record(stored.name).get("spec") if stored.spec is not None else None
        return read_spec(text) if text else stored.spec


def detect(path: str | Path) -> Found | None:
    """The format of a file or folder; None if it is in none of them (a float checkpoint is: "safetensors").

    PhiquantError for a receipt that is broken, or a folder with several weight files where a format has one.
    """
    path = Path(path)
    if path.is_file():
        return _file(path)
    if not path.is_dir():
        return None
    if (path / receipts.NAME).is_file():
        data = receipts.read(path)
        return Found(find(data["format"]), locate(path, data))
    for format in FORMATS.values():
        files = [file for pattern in format.weights for file in sorted(path.glob(pattern))]
        if files and _is(format, path):
            if format.single_file and len(files) > 1:
                names = ", ".join(file.name for file in files)
                raise PhiquantError(f"{path} holds several models ({names}); give the path of one")
            return Found(format, files[0] if format.single_file else path)
    return None


def existing(path: str | Path) -> Found:
    """The model there. PhiquantError if there is none in any of the formats."""
    found = detect(path)
    if found is None:
        names = ", ".join(FORMATS)
        raise PhiquantError(f"{path} is no model in a format that phiquant reads ({names}); give its file or folder")
    return found


def locate(out: Path, receipt: Mapping[str, Any]) -> Path:
    """What a reader or a runtime opens: the folder, or the one weight file of a format that has but one."""
    format = find(receipt["format"])
    if not format.single_file:
        return out
    files = [name for name in receipt["files"] if any(fnmatch(name, pattern) for pattern in format.weights)]
    if len(files) != 1:
        raise PhiquantError(f"{out / receipts.NAME} names {len(files)} weight files instead of one; export again")
    return out / files[0]


def _file(path: Path) -> Found | None:
    with open(path, "rb") as file:
        if file.read(4) == b"GGUF":
            return Found(find("gguf"), path)
    for format in FORMATS.values():
        if any(path.match(pattern) for pattern in format.weights) and _is(format, path.parent):
            return Found(format, path if format.single_file else path.parent)
    return None


def _is(format: Format, folder: Path) -> bool:
    """Whether a folder with the weight files of `format` is in it: several formats store safetensors, or ONNX."""
    if format.name in ("safetensors", "mlx"):
        return ("quantization" in _config(folder)) == (format.name == "mlx")
    if format.name in ("onnx", "qnn"):  # QNN's graphs are static: one for prompts, one for a token
        return (folder / "decode.onnx").is_file() == (format.name == "qnn")
    return True


def _config(folder: Path) -> dict[str, Any]:
    try:
        return read_json(folder / "config.json")
    except PhiquantError:
        return {}
