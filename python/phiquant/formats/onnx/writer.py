"""A folder for ONNX Runtime and ONNX Runtime GenAI: model.onnx, model.onnx.data, genai_config.json, the tokenizer.

The graph is our own (graph.py), written from shapes and places; the codes stream into the data file
(weights.py), so memory is that of some rows and files above 2 GB are nothing special.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ...errors import PhiquantError
from ...models import phi
from ...models.rope import read_rope
from ...spec import QuantSpec
from ...spec import spec as read_spec
from ...targets import TARGETS
from .. import companions, receipt
from ..partial import write_atomically
from ..source import Entry, Progress, Source
from . import weights as onnx_weights
from .file import LINE, PAGE, DataFile, Placed
from .genai import genai_config, tokenizer_config
from .graph import Decoder
from .rotary import rotary_tables
from .weights import Weight, Writing

FILE, DATA, GENAI = "model.onnx", "model.onnx.data", "genai_config.json"
Form = Literal["genai", "qdq"]
FORMS = ("genai", "qdq")
DYNAMIC = read_spec("uint8-tensor-asym")  # how DynamicQuantizeLinear rounds activations
_TABLES = "rotary"  # the unit of the data file with the tables of cosines and sines


class _Plan:
    """Everything that is known before the first byte: places, graph, settings, companions."""

    def __init__(self, source: Source, form: str, accuracy_level: int, activations: QuantSpec | str | None) -> None:
        phi.check_architecture(source.config)
        phi.check_complete(source.config, {entry.name: entry.shape for entry in source.entries})
        if form not in FORMS:
            raise PhiquantError(f"form is one of {', '.join(FORMS)}, not {form!r}")
        if accuracy_level not in range(5):
            raise PhiquantError(f"accuracy_level is 0 to 4 (1: float activations, 4: int8), not {accuracy_level!r}")
        self.source, self.form, self.dynamic = source, form, activations is not None
        if activations is not None and read_spec(activations) != DYNAMIC:
            raise PhiquantError(f"ONNX's operators round activations to {DYNAMIC}, not to {activations}")
        self.companions = companions.companions(source.tokenizer_dir)
        self.rope = read_rope(source.config)
        self.data = DataFile(DATA)
        self.weights = {entry.name: self._place(entry) for entry in source.entries}
        if self.dynamic and not any(weight.layout.kind == "dynamic" for weight in self.weights.values()):
            raise PhiquantError("activations are rounded for grids like int8-channel-sym; no tensor has one")
        self.tables = rotary_tables(self.rope)
        places = {name: self.data.place(_TABLES, name, "float32", t.shape) for name, t in self.tables.items()}
        self.model = self._graph(places, accuracy_level)

    def _place(self, entry: Entry) -> Weight:
        tied = phi.sizes(self.source.config).tied
        table = entry.module == phi.EMBEDDING or (tied and entry.module == phi.HEAD)
        return onnx_weights.place(entry, onnx_weights.layout(entry, self.form, table, self.dynamic), self.data)

    def _graph(self, places: Mapping[str, Placed], accuracy_level: int) -> bytes:
        narrow = any(weight.layout.kind == "columns" and weight.layout.bits == 2 for weight in self.weights.values())
        opset, ir_version = (25, 13) if narrow else (21, 10)  # the first that have the types of the codes
        decoder = Decoder(self.source.config, self.rope, self.weights, places, self.data, accuracy_level)
        return decoder.build().serialize(opset, ir_version)

    def texts(self) -> dict[str, str]:
        """The JSON files that are made, not copied."""
        config = {key: value for key, value in self.source.config.items() if key not in ("auto_map", "_name_or_path")}
        folder = self.source.tokenizer_dir
        made = {"config.json": config, GENAI: genai_config(config, self.rope, folder, FILE)}
        if folder is not None and (adapted := tokenizer_config(folder)):
            made["tokenizer_config.json"] = adapted
        return {name: json.dumps(content, indent=2) + "\n" for name, content in made.items()}

    def copies(self) -> list[Path]:
        """The companions that are copied as they are."""
        return [path for path in self.companions if path.name not in self.texts()]

    def buffers(self, unit: str) -> tuple[Iterator[Any], Any]:
        """The bytes of a unit of the data file, and its record (or what makes it, once they have passed)."""
        if unit == _TABLES:
            contents = [[np.ascontiguousarray(table).data] for table in self.tables.values()]
            return self.data.buffers(unit, contents), {}
        writing = Writing(self.source, self.weights[unit], DATA)
        return self.data.buffers(unit, writing.contents()), writing.record


def write(
    source: Source,
    out: Path,
    *,
    progress: Progress | None = None,
    form: Form = "genai",
    accuracy_level: int = 4,
    activations: QuantSpec | str | None = None,
) -> dict[str, Any]:
    """Write the folder `out` and return its receipt. Everything is checked before the first byte.

    form: "genai", MatMulNBits, what ONNX Runtime computes fastest; "qdq", standard DequantizeLinear in front of MatMul.
    accuracy_level: of MatMulNBits; 4 rounds activations to int8 per block (fast), 1 leaves them in float.
    activations: "uint8-tensor-asym", linears on grids of 8 bits per row multiply integers (target onnx:int8-dynamic).
    A run that is interrupted continues with the next one, if the source has the same fingerprint.
    """
    plan = _Plan(source, form, accuracy_level, activations)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    receipt.remove(out)
    with plan.data.open(out, source.fingerprint) as file:
        for unit in file.remaining():
            buffers, record = plan.buffers(unit)
            file.append(unit, buffers, record)
            if progress is not None:
                progress(unit, file.written, file.size)
        file.commit(keep_journal=True)
        files = {DATA: receipt.file_record(out / DATA, 0)}
        for name in _write_small(out, plan):
            files[name] = receipt.file_record(out / name)
        records = [file.records[entry.name] for entry in source.entries]
        result = receipt.make("onnx", files, records, list(source.entries), ("onnx",))
        result["form"] = form
        result["targets"] = [t for t in result["targets"] if (TARGETS[t].activations is not None) == plan.dynamic]
        receipt.write(out, result)
        file.forget()
    return result


def check(entry: Entry, form: Form = "genai") -> None:
    """PhiquantError if ONNX cannot hold `entry` exactly: it names tensor, spec and the nearest target that can."""
    onnx_weights.layout(entry, form, entry.module == phi.EMBEDDING)


def sizes(
    source: Source, *, form: Form = "genai", accuracy_level: int = 4, activations: QuantSpec | str | None = None
) -> dict[str, int]:
    """Exact bytes of every file that write() makes with these options, the receipt excepted."""
    plan = _Plan(source, form, accuracy_level, activations)
    made = {DATA: plan.data.size, FILE: len(plan.model)}
    made |= {name: len(text.encode()) for name, text in plan.texts().items()}
    return made | {path.name: path.stat().st_size for path in plan.copies()}


def nbytes(entry: Entry, config: Mapping[str, Any]) -> int:
    """What the entry adds to the file of weights, with the gaps before large tensors."""
    table = entry.module == phi.EMBEDDING
    placed = onnx_weights.place(entry, onnx_weights.layout(entry, "genai", table), DataFile(DATA)).parts.values()
    return sum(part.nbytes + -part.nbytes % (PAGE if part.nbytes >= PAGE else LINE) for part in placed)


def encode(source: Source, entry: Entry, form: Form = "genai") -> Iterator[Any]:
    """The bytes of one entry, as write() stores them."""
    weight = onnx_weights.place(entry, onnx_weights.layout(entry, form, entry.module == phi.EMBEDDING), DataFile(DATA))
    for content in Writing(source, weight, DATA).contents():
        yield from content


def _write_small(out: Path, plan: _Plan) -> list[str]:
    """The graph, the settings and the companions, each of them whole or not at all; their names."""
    texts = plan.texts()
    write_atomically(out / FILE, plan.model)
    for name, text in texts.items():
        write_atomically(out / name, text)
    return [FILE, *texts, *companions.copy(plan.copies(), out)]


__all__ = ["DATA", "FILE", "GENAI", "check", "encode", "nbytes", "sizes", "write"]
