"""An exported file as a source of codes: what one format holds, for the writer of another."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .checkpoint import file_identity
from .errors import PhiquantError
from .formats.detect import Found
from .formats.gguf import reader as gguf_reader
from .formats.gguf.tokenizer_files import write_tokenizer
from .formats.receipt import version
from .formats.registry import Format
from .formats.source import Entry, row_slices
from .formats.stored import StoredTensor
from .models import phi
from .quant_spec import FloatName
from .restate import restate
from .targets import TARGETS, Target
from .tensor import QuantizedTensor

_FLOATS: dict[str, FloatName] = {"float32": "float32", "float16": "float16", "uint16": "bfloat16"}  # numpy's names
_TOKENIZERS = ("tokenizer.json", "tokenizer.model")


class ReaderSource:
    """The tensors of an exported model, in the words of the targets of another format.

    target: of `format`; None: each tensor keeps its own words where the format holds them, else gets the first of
        its targets that is the same grid. A float target is for files without codes.
    tokenizer: a folder; None: the files beside the model, or those that a GGUF file's vocabulary stands for.
    widened: tensors without codes that are given as float32, because the writer would store them in another
        16-bit type than the file's. All others get the narrowest type that holds their values exactly, as in export().
    PhiquantError, before anything is read by a writer, for a tensor that no target holds as it is: it says what would
    have to change.
    """

    def __init__(
        self,
        found: Found,
        format: Format,
        target: Target | None,
        tokenizer: Path | None = None,
        widened: Collection[str] = (),
    ) -> None:
        self.config: dict[str, Any] = found.config()
        self._found, self._format, self._target, self._widened = found, format, target, widened
        self._stored = found.read()
        self._temporary = tempfile.TemporaryDirectory(prefix="phiquant-")
        self.tokenizer_dir: Path | None = tokenizer or self._find_tokenizer()
        self.entries: Sequence[Entry] = [self._entry(stored) for stored in self._tensors()]
        self.fingerprint = self._fingerprint()

    def read(self, entry: Entry, rows: slice | None = None) -> QuantizedTensor | torch.Tensor:
        """See Source.read."""
        stored = self._stored[entry.name]
        if entry.spec is None:
            return _floats(stored, rows)
        return restate(stored.quantized(self._found.words(stored), rows), entry.spec, entry.name)

    def _tensors(self) -> Iterator[StoredTensor]:
        """In the order of the model; slices (q_proj, k_proj ...) in the place of what they are slices of."""
        phi.check_complete(self.config, {name: stored.shape for name, stored in self._stored.items()})
        for name, _ in phi.tensors(self.config):
            slices = [f"{part}.weight" for part in phi.slice_names(name.removesuffix(".weight"))]
            yield from (self._stored[one] for one in ([name] if name in self._stored else slices))

    def _entry(self, stored: StoredTensor) -> Entry:
        entry = Entry(stored.name, stored.shape, self._found.words(stored), origin=self._origin(stored.name))
        if entry.spec is None:
            return dataclasses.replace(entry, dtype=self._dtype(stored))
        reasons = []
        for candidate in self._candidates(entry):
            try:
                self._format.writer().check(candidate)
                for rows in row_slices(candidate) if candidate.spec != entry.spec else ():
                    self.read(candidate, rows)
                return candidate
            except PhiquantError as error:
                reasons.append(str(error))
        if self._target is not None:
            raise PhiquantError(
                f"{reasons[0]}. Nothing was written: convert moves codes, it never rounds again. If the model has "
                f"several grids, give {self._format.name!r} alone: each tensor then gets a target that holds it"
            )
        raise PhiquantError(
            f"{entry.name}: no target of {self._format.name} holds {entry.spec} as it is. "
            f"{_nearest_miss(reasons)}. Nothing was written: convert moves codes, it never rounds again"
        )

    def _candidates(self, entry: Entry) -> Iterator[Entry]:
        if self._target is not None:
            if self._target.spec is None:
                raise PhiquantError(
                    f"{entry.name} holds codes ({entry.spec}) and {self._target.name} stores floats; give a target "
                    f"with codes, or {self._format.name!r} alone"
                )
            yield dataclasses.replace(entry, spec=self._target.spec)
            return
        yield entry
        for target in TARGETS.values():
            if target.format == self._format.name and target.spec not in (None, entry.spec):
                yield dataclasses.replace(entry, spec=target.spec)

    def _dtype(self, stored: StoredTensor) -> FloatName:
        if stored.name in self._widened:
            return "float32"
        wanted = self._target.float_dtype if self._target is not None and self._target.spec is None else None
        own = _FLOATS.get(stored.raw(slice(0, 1)).dtype.name, "float32")
        order: tuple[FloatName, ...] = ("bfloat16", "float16") if own == "float32" else ()
        for dtype in (wanted,) if wanted else order:
            if all(_holds(dtype, _floats(stored, rows)) for rows in stored.row_slices()):
                return dtype
        if wanted and len(stored.shape) > 1:
            raise PhiquantError(f"{stored.name} has values that are no {wanted}; convert never rounds: choose {own}")
        return own

    def _origin(self, name: str) -> Mapping[str, Any] | None:
        return self._found.record(name).get("origin")

    def _find_tokenizer(self) -> Path | None:
        folder = self._found.folder
        if any((folder / name).is_file() for name in _TOKENIZERS):
            return folder
        if self._found.format.name != "gguf":
            return None
        made = Path(self._temporary.name)
        write_tokenizer(gguf_reader.read_metadata(self._found.path), self.config, made)
        return made

    def _fingerprint(self) -> str:
        files = sorted(path for path in self._found.folder.iterdir() if path.is_file())
        inputs = {
            "files": [file_identity(path) for path in files],
            "entries": [[e.name, e.shape, str(e.spec), e.dtype] for e in self.entries],
            "versions": [version("phiquant"), torch.__version__],
        }
        return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def _floats(stored: StoredTensor, rows: slice | None) -> torch.Tensor:
    """The values in the dtype that the file stores."""
    raw = torch.from_numpy(stored.raw(rows).copy())
    return raw.view(torch.bfloat16) if raw.dtype == torch.uint16 else raw


def _holds(dtype: str, values: torch.Tensor) -> bool:
    return torch.equal(values.to(getattr(torch, dtype)).float(), values.float())


def _nearest_miss(reasons: Sequence[str]) -> str:
    """Of many refusals the one that got furthest: where the grid is right and only a value or a type is not."""
    order = ("scale dtype", "granularity", "zero point", "minimum", "range of codes")
    return min(reasons, key=lambda text: next((i for i, word in enumerate(order) if word in text), len(order)))
