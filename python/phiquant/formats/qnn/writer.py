"""QNN: static QDQ ONNX models for Qualcomm's processors, as a pipeline of stages over one file of weights.

  embeddings.onnx      token ids to hidden states; runs on the CPU
  prefill.onnx         `prefill` tokens of a prompt through all layers; decode.onnx: one token
  head_prefill.onnx, head_decode.onnx    hidden states to logits; on the CPU where lm_head is float

The weights keep their codes. Activations are rounded to grids that `activations.observe` found; keys and values
are kept in two times 8 bits, for QNN multiplies by no more than 8. genai_config.json names the stages for ORT-GenAI.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ...activations import Kind, Ranges, observe
from ...calibrate import Calibration, token_windows
from ...errors import PhiquantError
from ...extras import need
from ...models import decoder, phi
from ...models.rope import Rope, read_rope
from ...spec import QuantSpec
from ...spec import spec as read_spec
from ...targets import TARGETS
from .. import receipt
from ..companions import companions, copy
from ..onnx import file as onnx_file
from ..partial import write_atomically
from ..source import Entry, Progress, Source
from . import genai as qnn_genai
from .graph import FLOAT, IR_VERSION, OPSET, Graph, Grid
from .layout import DATA, Layout, Writing, check, norm_grids, refuse_mixtures

RANGES = "activations.json"
# Room for values beyond those of the calibration: what is cut off costs more than a coarser step. The products of HTP
# are as exact as about 12 bits of their range, so that of those is kept tight.
HEADROOM, PRODUCT_HEADROOM = 2.0, 1.15
_PRODUCTS = ("_proj", ".scores", ".context", phi.HEAD)
_TOKENS = 8192  # of the calibration, at most


@dataclass(frozen=True)
class Stages:
    """The static sizes. prefill: tokens taken at once; context: tokens seen at once, at least twice as many."""

    prefill: int
    context: int

    def __post_init__(self) -> None:
        if self.prefill < 2 or self.context < 2 * self.prefill:
            raise PhiquantError(
                f"prefill={self.prefill}, context={self.context}: the prefill stage takes 2 tokens or more, and the "
                "context is at least twice that"
            )


def write(
    source: Source,
    out: Path,
    *,
    progress: Progress | None = None,
    calibration: Calibration | None = None,
    prefill: int = 64,
    context: int = 256,
    activations: QuantSpec | str = "uint16-tensor-asym",
    cache: int = 16,
    observer: Kind = "minmax",
) -> dict[str, Any]:
    """Write the folder `out` and return its receipt. Everything that can be refused is refused before the first byte.

    calibration: text, texts or windows of token ids for the ranges; None: testing.training_text().
    activations: the grid of what linears take and give, "uint16-tensor-asym" or "uint8-tensor-asym"; the rest has 16
        bits.
    cache: bits of keys and values, 16 (as two times 8: QNN multiplies by no more) or 8.
    observer: see observe(). A model without codes gives float graphs, which need no calibration.
    """
    bits = _bits(activations)
    if cache not in (8, 16):
        raise PhiquantError(f"keys and values have 16 or 8 bits, not {cache}")
    phi.check_architecture(source.config)
    for entry in source.entries:
        check(entry)
    stages, rope = Stages(prefill, context), read_rope(source.config)
    phi.check_complete(source.config, {entry.name: entry.shape for entry in source.entries})
    rounds = refuse_mixtures(source.entries)
    beside = companions(source.tokenizer_dir)
    ranges = _ranges(source, calibration, context, observer) if rounds else None
    layout = Layout(source, norm_grids(source) if rounds else {})
    points = grids(ranges, bits, cache) if ranges else {}
    centres = {point: np.array(centre, np.float32) for point, centre in ranges.centres.items()} if ranges else {}
    models = _models(layout, stages, rope, points, centres, cache == 16)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    receipt.remove(out)
    with layout.open(out) as file:
        for name in file.remaining():
            writing = Writing(layout, layout.entries[name])
            file.append(name, layout.buffers(writing), writing.record)
            if progress is not None:
                progress(name, file.written, file.size)
        file.commit(keep_journal=True)
        files = {DATA: receipt.file_record(out / DATA, header=0)}
        for name in [*_write_small(out, source.config, models, stages, ranges), *copy(beside, out)]:
            files[name] = receipt.file_record(out / name)
        result = receipt.make("qnn", files, list(file.records.values()), list(source.entries), ("onnx",))
        result["targets"] = [name for name in result["targets"] if TARGETS[name].activations == read_spec(activations)]
        result["warnings"] = _warnings(rope, stages)
        receipt.write(out, result)
        file.forget()
    return result


def _bits(activations: QuantSpec | str) -> int:
    spec = read_spec(activations)
    for bits in (16, 8):
        if spec == read_spec(f"uint{bits}-tensor-asym"):
            return bits
    raise PhiquantError(f"QNN rounds activations to uint16-tensor-asym or uint8-tensor-asym, not to {activations}")


def sizes(source: Source, **_: Any) -> dict[str, int]:
    """Bytes of the data file that write() makes; the graphs beside it take a few hundred kB for each layer."""
    rounds = refuse_mixtures(source.entries)
    names = [entry.name for entry in source.entries if len(entry.shape) == 1]
    return {DATA: Layout(source, dict.fromkeys(names, Grid(0.0, 1.0, 16)) if rounds else {}).data.size}


def encode(source: Source, entry: Entry) -> Iterator[memoryview]:
    """The bytes of one entry, as write() stores them."""
    return Writing(Layout(source, {}), entry).values()


def grids(ranges: Ranges, bits: int, cache: int) -> dict[str, Grid]:
    """A grid for every point of the decoder. bits: of what linears give, and so of what they take."""
    found = {}
    for point, (lo, hi) in ranges.points.items():
        if point.endswith((".key_centred", ".value")):
            room = HEADROOM if cache == 16 else PRODUCT_HEADROOM
            found[f"{point}.8"] = Grid(lo * room, hi * room, 8)
        narrow = bits == 8 and (point.endswith("_proj") or point == phi.HEAD)
        room = 1.0 if narrow else PRODUCT_HEADROOM if point.endswith(_PRODUCTS) else HEADROOM
        margin = decoder.MARGIN if point.endswith(".masked") else 0.0
        found[point] = Grid(lo * room - margin, hi * room, 8 if narrow else 16)
    return found


def _ranges(source: Source, calibration: Calibration | None, context: int, kind: Kind) -> Ranges:
    tokenizer = None
    if not isinstance(calibration, Tensor):
        tokenizer = need("transformers", extra="hf").AutoTokenizer.from_pretrained(
            source.tokenizer_dir, local_files_only=True
        )
    ids = token_windows(calibration, tokenizer)
    ids = ids[:, :context]
    return observe(source, ids[: max(1, _TOKENS // ids.shape[1])], kind)


def _models(
    layout: Layout,
    stages: Stages,
    rope: Rope,
    points: Mapping[str, Grid],
    centres: Mapping[str, np.ndarray],
    low_cache: bool,
) -> dict[str, bytes]:
    """The bytes of every graph, by file."""
    return {
        "embeddings.onnx": _embeddings(layout, points.get("embedding")),
        "prefill.onnx": _decoder(layout, stages.prefill, stages.context, rope, points, centres, low_cache),
        "decode.onnx": _decoder(layout, 1, stages.context, rope, points, centres, low_cache),
        "head_prefill.onnx": _head(layout, stages.prefill, points),
        "head_decode.onnx": _head(layout, 1, points),
    }


def _decoder(
    layout: Layout,
    tokens: int,
    context: int,
    rope: Rope,
    points: Mapping[str, Grid],
    centres: Mapping[str, np.ndarray],
    low_cache: bool,
) -> bytes:
    """hidden states [1, S, H] and a cache to hidden states behind the final norm, and what the cache gets."""
    config = layout.source.config
    n, hidden = decoder.Sizes.of(config, rope), phi.sizes(config).hidden
    tables = decoder.rotation_tables(rope, n.head, context, long=_long(rope, context))
    graph = Graph(
        layout.data, "decoder", tokens, context, points, centres, layout.weights(), tables, **_facts(config, low_cache)
    )
    x = graph.reshape(graph.input("inputs_embeds", points.get("embedding"), (1, tokens, hidden)), (tokens, hidden))
    for index in range(phi.sizes(config).layers):
        x = decoder.layer(graph, n, index, x)
    graph.output(graph.norm(x, phi.FINAL_NORM), "hidden_states", (1, tokens, hidden), codes=True)
    return graph.serialize()


def _head(layout: Layout, tokens: int, points: Mapping[str, Grid]) -> bytes:
    """hidden states [1, S, H] to logits [1, S, V]; rounded only where lm_head has codes."""
    config, weights = layout.source.config, layout.weights()
    n = phi.sizes(config)
    rounded = points if weights[phi.HEAD].scale is not None else {}
    none = np.zeros((0, n.head_dim))
    graph = Graph(layout.data, "lm_head", tokens, 0, rounded, {}, weights, (none, none), **_facts(config, False))
    x = graph.input("hidden_states", points.get(phi.FINAL_NORM), (1, tokens, n.hidden))
    x = graph.linear(graph.reshape(x, (tokens, n.hidden)), phi.HEAD)
    graph.output(x, "logits", (1, tokens, n.vocab), codes=False)
    return graph.serialize()


def _embeddings(layout: Layout, grid: Grid | None) -> bytes:
    """Token ids int32 [1, S] to hidden states [1, S, H], for any S: codes on `grid`, or floats."""
    weight, graph = layout.stored[f"{phi.EMBEDDING}.weight"], onnx_file.Graph("embeddings")
    ids = graph.input("input_ids", "int32", (1, "tokens"))
    rows = graph.node("Gather", [graph.external(weight.values, layout.data), ids], axis=0)
    values = graph.node("Cast", [rows], to=FLOAT)
    if weight.scale is not None:
        scales = graph.node("Gather", [graph.external(weight.scale, layout.data), ids], axis=0)
        values = graph.node("Mul", [values, graph.node("Unsqueeze", [scales, graph.constant([2])])])
    if grid is None:
        graph.node("Identity", [values], ["inputs_embeds"])
    else:
        parameters = [graph.constant(grid.scale, "float32"), graph.constant(grid.zero_point, "uint16")]
        graph.node("QuantizeLinear", [values, *parameters], ["inputs_embeds"])
    graph.output("inputs_embeds", "uint16" if grid else "float32", (1, "tokens", weight.values.shape[1]))
    return graph.serialize(OPSET, IR_VERSION)


def _facts(config: Mapping[str, Any], low_cache: bool) -> dict[str, Any]:
    eps, window = float(config.get("rms_norm_eps", 1e-5)), config.get("sliding_window")
    return {"eps": eps, "window": window, "layers": phi.sizes(config).layers, "low_cache": low_cache}


def _long(rope: Rope, context: int) -> bool:
    return rope.long is not None and context > rope.original_context


def _warnings(rope: Rope, stages: Stages) -> list[str]:
    if not _long(rope, stages.context):
        return []
    return [
        f"a static graph has one table of positions: with a context of {stages.context} tokens that of LongRoPE's long "
        f"factors, also for texts within the original {rope.original_context}, where Transformers takes the short ones"
    ]


def _write_small(
    out: Path, config: Mapping[str, Any], models: Mapping[str, bytes], stages: Stages, ranges: Ranges | None
) -> list[str]:
    """The graphs and the settings, each file whole or not at all; their names."""
    settings = {
        "config.json": dict(config),
        qnn_genai.FILE: qnn_genai.config(config, models, stages.prefill, stages.context),
    }
    if ranges is not None:
        settings[RANGES] = asdict(ranges)
    files = {name: (json.dumps(value, indent=1) + "\n").encode() for name, value in settings.items()} | dict(models)
    for name, content in files.items():
        write_atomically(out / name, content)
    return list(files)


__all__ = ["check", "encode", "grids", "sizes", "write"]
