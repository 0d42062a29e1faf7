"""Read a compressed file and say what it takes, trusting none of its bytes. The layout is told in writer.py."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .. import ops
from ..errors import PhiquantError
from ..spec import spec as read_spec
from ..tensor import PARAMETERS, QuantizedTensor

VERSION = "1"
FILLER = 255
_WORDS = ("codes", "gaps", "levels", "values", *PARAMETERS)
_DTYPES = {
    "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16,
    "uint8": torch.uint8, "int8": torch.int8,
}  # fmt: skip
Value = Tensor | QuantizedTensor


def decompress(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a compressed file by name, decoded: what `load_state_dict` takes.

    Codes are decoded in float32. PhiquantError, with the file, the tensor and the cause, for anything but a
    whole and sound file; see `read_compressed`.
    """
    tensors = read_compressed(path)
    return {n: t.dequantize() if isinstance(t, QuantizedTensor) else t for n, t in tensors.items()}


def read_compressed(path: str | Path) -> dict[str, Value]:
    """The tensors of a compressed file by name, as they were given: those with codes as QuantizedTensor.

    A few bytes may stand for many values, but never more than 2048 for each.
    """
    path = Path(path)
    parts, described = _open(path)
    found: dict[str, Value] = {}
    for name, part in parts.items():
        if ":" not in name:
            found[name] = part
    for name, description in described.items():
        if "same" in description:
            continue
        own = {word: parts[f"{name}:{word}"] for word in _WORDS if f"{name}:{word}" in parts}
        try:
            found[name] = _tensor(description, own)
        except (ValueError, KeyError, TypeError, RuntimeError, OverflowError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise PhiquantError(f"{path}: tensor {name} cannot be decoded: {reason}") from error
    for name, description in described.items():
        if "same" in description:
            other = description["same"]
            if not isinstance(other, str) or other not in found:
                raise PhiquantError(f"{path}: tensor {name} is said to be {other!r}, which is not there")
            found[name] = found[other]
    return found


def digest(text: str, parts: dict[str, Tensor]) -> str:
    """SHA-256 of the description and of every part: its name, dtype, shape and bytes."""
    total = hashlib.sha256(text.encode())
    for name, part in sorted(parts.items()):
        total.update(json.dumps([name, str(part.dtype), list(part.shape)]).encode())
        total.update(part.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _open(path: Path) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """The parts of the file and the descriptions of its tensors, which fit together, and the digest both."""
    if not path.is_file():  # a pipe would never end
        raise PhiquantError(f"{path}: no such file")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            parts = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise PhiquantError(f"{path} cannot be read as a compressed file: {error}") from error
    if metadata.get("phiquant") != VERSION:
        raise PhiquantError(
            f"{path} is a safetensors file, but not a compressed file of version {VERSION} (pq.compress writes those)"
        )
    try:
        described = json.loads(metadata["tensors"])
    except (KeyError, ValueError, RecursionError) as error:
        raise PhiquantError(f"{path}: the description of its tensors is damaged: {error}") from error
    if metadata.get("sha256") != digest(metadata["tensors"], parts):
        raise PhiquantError(f"{path} is damaged: its bytes are not those that were written; copy it again")
    if not isinstance(described, dict) or not all(isinstance(d, dict) for d in described.values()):
        raise PhiquantError(f"{path}: the description of its tensors is not an object of objects")
    for name in parts:
        tensor, colon, word = name.rpartition(":")
        if (colon and (tensor not in described or word not in _WORDS)) or name in described:
            raise PhiquantError(f"{path}: part {name} belongs to no tensor that is described")
    return parts, described


def _tensor(description: dict[str, Any], parts: dict[str, Tensor]) -> Value:
    shape = description["shape"]
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"its shape is {shape!r}")
    count = math.prod(shape)
    if "values" in parts:
        values = parts.pop("values")
        where = _places(parts.pop("gaps"), count, len(values.reshape(-1)))
        _expect(parts, ())
        dtype = _DTYPES[description["dtype"]]
        if values.dtype != dtype:
            raise ValueError(f"its values are {values.dtype}, not {dtype}")
        dense = torch.zeros(count, dtype=dtype)
        dense[where] = values.reshape(-1)
        return dense.reshape(shape)
    symbols = _symbols(description, parts, count).reshape(shape)
    if "spec" not in description:
        levels = parts.pop("levels").reshape(-1)
        _expect(parts, ())
        if levels.dtype != _DTYPES[description["dtype"]]:
            raise ValueError(f"its levels are {levels.dtype}, not {description['dtype']}")
        if count and int(symbols.max()) >= len(levels):
            raise ValueError(f"code {int(symbols.max())} has no level among {len(levels)}")
        return levels[symbols.int()]
    spec = read_spec(description["spec"])
    element = spec.element
    if count and int(symbols.max()) > element.qmax - element.qmin:
        raise ValueError(f"code {int(symbols.max())} is none of {element}")
    codes = (symbols.to(torch.int16) + element.qmin).to(torch.int8 if element.signed else torch.uint8)
    _expect(parts, PARAMETERS)
    return QuantizedTensor(codes=codes, spec=spec, **{word: parts.get(word) for word in PARAMETERS})


def _symbols(description: dict[str, Any], parts: dict[str, Tensor], count: int) -> Tensor:
    """Codes less the smallest one of their element, uint8 [count]."""
    codes = _bytes(parts.pop("codes"))
    if "common" not in description:
        return ops.huffman_decode(codes, count)
    common = description["common"]
    if type(common) is not int or not 0 <= common <= 255:
        raise ValueError(f"its common code is {common!r}")
    stored = _symbols_in(codes)
    where = _places(parts.pop("gaps"), count, stored)
    symbols = torch.full((count,), common, dtype=torch.uint8)
    symbols[where] = ops.huffman_decode(codes, stored)
    return symbols


def _places(gaps: Tensor, count: int, stored: int) -> Tensor:
    """Flat indices of the `stored` values among `count`: the opposite of compress.gaps, int64."""
    gaps = _bytes(gaps)
    symbols = ops.huffman_decode(gaps, _symbols_in(gaps))
    is_stored = symbols != FILLER
    ends = (symbols.long() + is_stored).cumsum(0)
    covered = int(ends[-1]) if len(ends) else 0
    if not 0 <= count - covered < FILLER or int(is_stored.sum()) != stored:
        raise ValueError(f"its gaps place {int(is_stored.sum())} values among {covered}, not {stored} among {count}")
    return ends[is_stored] - 1


def _bytes(part: Tensor) -> Tensor:
    if part.dtype != torch.uint8 or part.ndim != 1:
        raise ValueError(f"Huffman data is uint8 [bytes], not {part.dtype} {list(part.shape)}")
    return part


def _symbols_in(data: Tensor) -> int:
    """The number of symbols that Huffman data says it holds: its first eight bytes. The decoder checks it."""
    return int.from_bytes(bytes(data[:8].tolist()), "little")


def _expect(parts: dict[str, Tensor], words: tuple[str, ...]) -> None:
    if strangers := set(parts) - set(words):
        raise ValueError(f"it has a part {min(strangers)!r}, which this form has not")


@dataclass(frozen=True)
class TensorSize:
    """What one tensor takes, in bytes. values: how many it has; form: the parts it is stored in.

    codes and index are the streams alone; table is what their decoders need: header, code lengths, sizes;
    parameters are codebooks and scales. A tensor that is another's counts no values and takes nothing.
    """

    name: str
    values: int
    form: str
    codes: int = 0
    index: int = 0
    table: int = 0
    parameters: int = 0
    floats: int = 0

    @property
    def total(self) -> int:
        return self.codes + self.index + self.table + self.parameters + self.floats

    @property
    def bits_per_value(self) -> float:
        return 8 * self.total / self.values if self.values else 0.0


@dataclass(frozen=True)
class CompressedSize:
    """What a compressed file takes: its tensors, and the container (names, shapes, places, the digest), in bytes."""

    tensors: tuple[TensorSize, ...]
    container: int

    @property
    def total(self) -> int:
        """The size of the file."""
        return self.container + sum(tensor.total for tensor in self.tensors)

    @property
    def float32(self) -> int:
        """What the values take as float32."""
        return 4 * sum(tensor.values for tensor in self.tensors)

    @property
    def ratio(self) -> float:
        """How many times smaller the file is than the values in float32."""
        return self.float32 / self.total

    def __str__(self) -> str:
        columns = ("codes", "index", "table", "parameters", "floats", "total")
        width = max([9, *(len(t.name) for t in self.tensors)])
        lines = [f"{'bytes':{width}}" + "".join(f"{c:>12}" for c in ("values", *columns, "bits each"))]
        for t in self.tensors:
            cells = "".join(f"{getattr(t, c):12,}" for c in ("values", *columns))
            lines.append(f"{t.name:{width}}{cells}{t.bits_per_value:12.2f}")
        lines.append(f"{'container':{width}}{'':72}{self.container:12,}")
        lines.append(f"{'file':{width}}{'':72}{self.total:12,}, {self.ratio:.1f} times smaller than float32")
        return "\n".join(lines)


def compressed_size(path: str | Path) -> CompressedSize:
    """What each tensor of a compressed file takes. Codebooks and tables are counted; `total` is the file's size."""
    path = Path(path)
    parts, described = _open(path)
    names = dict.fromkeys([*(name for name in parts if ":" not in name), *described])
    rows = tuple(_size(name, parts, described.get(name, {})) for name in names)
    return CompressedSize(rows, path.stat().st_size - sum(row.total for row in rows))


def _size(name: str, parts: dict[str, Tensor], description: dict[str, Any]) -> TensorSize:
    if "same" in description:
        return TensorSize(name, 0, f"= {description['same']}")
    if name in parts:
        return TensorSize(name, parts[name].numel(), "float", floats=_nbytes(parts[name]))
    own = {word: parts[f"{name}:{word}"] for word in _WORDS if f"{name}:{word}" in parts}
    streams = {word: _nbytes(part) - _table_bytes(part) for word, part in own.items() if word in ("codes", "gaps")}
    return TensorSize(
        name,
        math.prod(description["shape"]),
        " + ".join(own),
        codes=streams.get("codes", 0),
        index=streams.get("gaps", 0),
        table=sum(_table_bytes(own[word]) for word in streams),
        parameters=sum(_nbytes(part) for word, part in own.items() if word not in ("codes", "gaps", "values")),
        floats=_nbytes(own["values"]) if "values" in own else 0,
    )


def _nbytes(part: Tensor) -> int:
    return part.numel() * part.element_size()


def _table_bytes(data: Tensor) -> int:
    """Header, code lengths and stream sizes of Huffman data: all but its streams (csrc/core/huffman.h)."""
    count = _symbols_in(data)
    if count == 0:
        return len(data)
    first, last, streams = (int(n) for n in data[8:11])
    return 12 + (last - first + 2) // 2 + 4 * streams * -(-count // (1 << 17))
