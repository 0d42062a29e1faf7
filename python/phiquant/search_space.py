"""What search() may choose in a format: grids for each slice, what each takes there, and the files' exact bytes."""

from __future__ import annotations

import fnmatch
import itertools
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import model_source
from .checkpoint import Checkpoint
from .checkpoint_source import entries
from .errors import PhiquantError
from .formats.registry import FORMATS, find
from .formats.source import Entry
from .models import phi
from .recipe import Recipe
from .slices import Slice, slices
from .spec import FLOAT_BITS, FloatName, QuantSpec, Target
from .spec import spec as read_spec

STORED = "stored"  # no format: the bits that codes and parameters have, for models that stay in torch
CANDIDATES: dict[str, tuple[str, ...]] = {
    "gguf": ("gguf:Q2_K", "gguf:Q3_K", "gguf:Q4_K", "gguf:Q5_K", "gguf:Q6_K", "gguf:Q8_0"),
    "onnx": ("onnx:uint2-g32", "onnx:uint4-g32", "onnx:uint8-g32"),
    "openvino": ("openvino:u2-g32", "openvino:u4-g32", "openvino:u8-g32"),
    "mlx": tuple(f"mlx:{bits}bit-g64" for bits in (2, 3, 4, 5, 6, 8)),
    "safetensors": ("safetensors:int4-g32", "safetensors:int8-g32"),
    STORED: tuple(f"int{bits}-g32-sym-f16" for bits in (2, 3, 4, 5, 6, 8)),
}
_FILES = "no file but the codes"

Grids = dict[str, QuantSpec | None]  # by the name of a slice; None: float


class Space:
    """What can be chosen in a format, and what it takes there."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        format: str,
        candidates: Sequence[str | QuantSpec | Target] | None,
        keep: Sequence[str],
    ) -> None:
        if format != STORED and not hasattr(find(format).writer(), "nbytes"):
            known = [name for name in FORMATS if name in CANDIDATES]
            raise PhiquantError(f"there is no search for {format}; for {', '.join(known)} and {STORED!r} there is")
        self.format, self.words = format, {}
        for word in candidates or CANDIDATES[format]:
            spec = read_spec(word)
            self.words[spec] = word.name if isinstance(word, Target) else str(word)
        self._model(model, tokenizer)
        self._sizes: dict[tuple[str, QuantSpec | None], int] = {}
        self._why: PhiquantError | None = None
        self.slices = slices(self.config, self._splits)
        self.grids: dict[Slice, list[QuantSpec]] = {}
        for one in self.slices:
            kept = any(fnmatch.fnmatchcase(one.name, pattern) for pattern in keep)
            fitting = [spec for spec in self.words if self.nbytes(one.name, one.shape, spec) is not None]
            self.grids[one] = [] if kept else fitting
            if not fitting and not kept and one.layer is not None:
                raise PhiquantError(f"no candidate fits {one.name} {list(one.shape)}: {self._why}")

    def nbytes(self, module: str, shape: tuple[int, ...], spec: QuantSpec | None) -> int | None:
        """What that weight takes on that grid; None if the format cannot hold it."""
        key = (module, spec)
        if key not in self._sizes:
            entry = Entry(f"{module}.weight", shape, spec, self._dtype(f"{phi.fused_name(module)}.weight"))
            try:
                if spec is not None:
                    spec.scale_shape(shape)
                self._sizes[key] = self._bytes(entry)
            except (PhiquantError, ValueError) as error:
                self._why = error if isinstance(error, PhiquantError) else PhiquantError(str(error))
                self._sizes[key] = -1
        return None if self._sizes[key] < 0 else self._sizes[key]

    def groups(self) -> Iterator[list[tuple[int, Grids]]]:
        """For each weight of the model what can be done with it: the bytes, and the grids of its slices."""
        for module, parts in itertools.groupby(self.slices, lambda one: one.module):
            inside = list(parts)
            if len(inside) > 1:
                yield list(self._combinations(module, inside))
                continue
            (one,) = inside
            free: list[QuantSpec | None] = [None] if one.layer is None or not self.grids[one] else []
            yield [
                (size, {one.name: spec})
                for spec in [*self.grids[one], *free]
                if (size := self.nbytes(one.name, one.shape, spec)) is not None
            ]

    def files(self, grids: Grids) -> dict[str, int]:
        """Exact bytes of every file of a model with these grids."""
        specs = recipe_of(grids, self.config).resolve(self._matrices())
        made = [entry for _, _, entry in entries(self.config, specs, self._dtype)]
        if self.format == STORED:
            return {_FILES: sum(self._bytes(entry) for entry in made)}
        return find(self.format).writer().sizes(_Blank(made, dict(self.config), self._tokenizer))

    def _combinations(self, module: str, inside: Sequence[Slice]) -> Iterator[tuple[int, Grids]]:
        shape = (sum(one.shape[0] for one in inside), inside[0].shape[1])
        offers: list[Sequence[QuantSpec | None]] = [self.grids[one] or [None] for one in inside]
        for specs in itertools.product(*offers):
            grids: Grids = {one.name: spec for one, spec in zip(inside, specs, strict=True)}
            if len(set(specs)) == 1:
                size = self.nbytes(module, shape, specs[0])  # one tensor
            else:
                size = sum(self.nbytes(one.name, one.shape, grids[one.name]) or 0 for one in inside)
            if size is not None:
                yield size, grids

    def _splits(self, module: str) -> bool:
        rows = phi.fused_rows(self.config, module)
        columns = dict(phi.tensors(self.config))[f"{module}.weight"][1]
        shapes = {name: (at.stop - at.start, columns) for name, at in rows.items()}
        return any(
            all(self.nbytes(name, shape, spec) is not None for name, shape in shapes.items()) for spec in self.words
        )

    def _bytes(self, entry: Entry) -> int:
        if self.format != STORED:
            return int(find(self.format).writer().nbytes(entry, self.config))
        bits = FLOAT_BITS[entry.dtype] if entry.spec is None else entry.spec.bits_per_weight(entry.shape)
        return math.ceil(entry.numel * bits / 8)

    def _matrices(self) -> list[str]:
        names = [name.removesuffix(".weight") for name, _ in phi.tensors(self.config)]
        tied = [phi.HEAD] if phi.sizes(self.config).tied else []
        return [name for name in names if phi.is_matrix(name)] + tied

    def _model(self, model: Any, tokenizer: Any) -> None:
        if isinstance(model, str | Path):
            checkpoint = Checkpoint(model)
            self.config: Mapping[str, Any] = checkpoint.config
            self._tokenizer: Path | None = checkpoint.folder
            self._dtype: Callable[[str], FloatName] = checkpoint.dtype
            return
        self.config = model_source.config_of(model)
        narrow = {name: model_source.narrowest(value.detach()) for name, value in model.named_parameters()}
        dtypes: dict[str, FloatName] = {name: narrow[name] for name, _ in phi.tensors(self.config)}
        self._dtype = dtypes.__getitem__
        self._kept = tempfile.TemporaryDirectory(prefix="phiquant-")
        self._tokenizer = model_source.save_companions(model, tokenizer, Path(self._kept.name))


@dataclass(frozen=True)
class _Blank:
    """A source of sizes, not of values."""

    entries: Sequence[Entry]
    config: dict[str, Any]
    tokenizer_dir: Path | None
    fingerprint: str = ""

    def read(self, entry: Entry, rows: slice | None = None) -> Any:
        raise NotImplementedError


def recipe_of(grids: Grids, config: Mapping[str, Any]) -> Recipe:
    """A rule for each slice by name; a tied head goes with the embedding."""
    rules: Grids = dict(grids)
    if phi.sizes(config).tied:
        rules[phi.HEAD] = rules[phi.EMBEDDING]
    return Recipe({name: "float" if spec is None else spec for name, spec in rules.items()})
