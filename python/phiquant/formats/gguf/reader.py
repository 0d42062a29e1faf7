"""Reads a GGUF file back, for verify and import: numpy over a mapped file. No code of the writer.

Files of phiquant, of llama.cpp's converter and of its quantizer. N = rows, K = values of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import PhiquantError
from ...extras import need
from ...models import phi
from ...spec import Int, QuantSpec, Ternary, spec
from ...untrusted import reader
from ..stored import Parts, StoredTensor, give_back, once
from . import guard as gguf_guard
from .blocks import LAYOUTS, Block, decode
from .hf_names import hf_name

_FLOATS = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F64": "<f8"}
_TENSOR_SCALE = spec("nvfp4")
_NAN_SCALES = {
    "MXFP4": (0xFF, 0xFF),
    "NVFP4": (0x7F, 0xFF),
}  # bits that e8m0, e4m3 have for NaN, or for what is below 0


@dataclass(frozen=True, eq=False)
class GGUFTensor(StoredTensor):
    """A tensor of a GGUF file. LongRoPE's factors keep their GGUF name.

    data: the values of floats (bfloat16: bits); else the bytes, uint8 [N, bytes of a row].
    scale: what multiplies the whole tensor: llama.cpp's tensor "<name>.scale"; 1 where there is none.
    """

    data: np.ndarray
    scale: np.ndarray | None = None

    @property
    def spec(self) -> QuantSpec | None:
        if self.stored_as in _FLOATS:
            return None
        if self.stored_as not in LAYOUTS:
            raise PhiquantError(
                f"{self.name}: the file has it as {self.stored_as}, whose codes phiquant does not read; it reads "
                f"{', '.join((*_FLOATS, *LAYOUTS))}"
            )
        if self.scale is None:
            return LAYOUTS[self.stored_as].spec
        if self.stored_as != "NVFP4":
            raise PhiquantError(f"{self.name}: a second scale beside {self.stored_as} is no grid of phiquant's")
        return _TENSOR_SCALE

    def parts(self, spec: QuantSpec, rows: slice | None = None) -> Parts:
        """See StoredTensor.parts."""
        own = self.spec
        if own is None or not _holds(own, spec):
            raise PhiquantError(f"{self.name}: the file has {self.stored_as}, which does not hold {spec}")
        data = self._rows(rows)
        layout = LAYOUTS[self.stored_as]
        block = layout.read(data.reshape(-1, layout.size))
        shape = (len(data), self.shape[1])
        found = {"codes": block.codes.reshape(shape)}
        for name, values in self._parameters(block).items():
            wanted = spec.super_shape(shape) if name.startswith("super") else spec.scale_shape(shape)
            found[name] = once(self.name, values.reshape(len(data), -1), wanted)
        if self.scale is not None:
            found["super_scales"] = self.scale.reshape(1, 1)
        return found

    def _parameters(self, block: Block) -> dict[str, np.ndarray]:
        """The parameters by the names of a QuantizedTensor: [B, S] of blocks, [B, 1] of super-blocks."""
        assert self.spec is not None
        if self.stored_as in _NAN_SCALES:
            assert block.scales is not None
            low, high = _NAN_SCALES[self.stored_as]
            if ((block.scales >= low) & (block.scales <= high)).any():
                raise PhiquantError(f"{self.name}: a scale of {self.stored_as} is no number, or below 0")
            return {"scales": block.scales}
        named: dict[str, np.ndarray | None] = {"scales": block.d, "minimums": block.m}
        if self.spec.two_level is not None:
            named = {"scales": block.scales, "minimums": block.minimums}
            named |= {"super_scales": block.d, "super_minimums": block.m}
        return {name: value for name, value in named.items() if value is not None}

    def raw(self, rows: slice | None = None) -> np.ndarray:
        """See StoredTensor.raw."""
        return np.ascontiguousarray(self._rows(rows))

    def values(self, rows: slice | None = None) -> np.ndarray:
        """The real values, float32, in the arithmetic of ggml."""
        data = self._rows(rows)
        if self.stored_as == "BF16":
            return (np.ascontiguousarray(data).astype(np.uint32) << 16).view(np.float32)
        if self.spec is None:
            return np.asarray(data, np.float32)
        found = decode(self.stored_as, data.reshape(-1, LAYOUTS[self.stored_as].size)).reshape(len(data), -1)
        return found if self.scale is None else found * self.scale

    def reference(self, rows: slice | None = None) -> np.ndarray:
        """The real values as gguf-py decodes them, float32."""
        quants = need("gguf.quants", extra="gguf")
        kind = need("gguf", extra="gguf").GGMLQuantizationType[self.stored_as]
        data = np.ascontiguousarray(self._rows(rows))
        found = np.asarray(
            quants.dequantize(data.view(np.uint8) if self.stored_as == "BF16" else data, kind), np.float32
        )
        return found if self.scale is None else found * self.scale

    def release(self) -> None:
        """Give back the pages of the file that were read."""
        give_back(self.data)

    def _rows(self, rows: slice | None) -> np.ndarray:
        return self.data if rows is None else self.data[rows]


def _holds(own: QuantSpec, spec: QuantSpec) -> bool:
    """Whether codes of `own` can be read in the words of `spec`. Ranges of codes are checked on the data."""
    counts = isinstance(own.element, Int) and isinstance(spec.element, Int | Ternary)
    if not (own.element.signed == spec.element.signed if counts else own.element == spec.element):
        return False
    levels = [None if s.two_level is None else (s.two_level.dtype, s.two_level.is_float) for s in (own, spec)]
    return levels[0] == levels[1] and (own.offset, own.scale_dtype) == (spec.offset, spec.scale_dtype)


@reader
def read(path: str | Path) -> dict[str, GGUFTensor]:
    """Every tensor by its Hugging Face name. PhiquantError for a file that is damaged or not a Phi-3's.

    Types that phiquant does not decode are there too; their `spec` and values raise.
    """
    path = Path(path)
    header = gguf_guard.read_header(path)
    _compare_with_gguf_py(path, header)
    data = np.memmap(path, np.uint8, mode="r")
    arrays = {place.name: _array(data, place) for place in header.tensors}
    found = {}
    for place in header.tensors:
        if place.name.endswith(".scale") and f"{place.name.removesuffix('.scale')}.weight" in arrays:
            continue
        scale = arrays.get(f"{place.name.removesuffix('.weight')}.scale")
        if scale is not None and (scale.shape != (1,) or scale.dtype != np.float32):
            raise PhiquantError(f"{path}: the scale of {place.name} is not one float32 value")
        tensor = GGUFTensor(hf_name(place.name, path), place.kind, place.shape, arrays[place.name], scale)
        found[tensor.name] = tensor
    return found


def _array(data: np.ndarray, place: gguf_guard.Place) -> np.ndarray:
    """Floats in the tensor's shape, else bytes [..., bytes of a row]."""
    part = data[place.start : place.start + place.bytes]
    if place.kind in _FLOATS:
        return part.view(_FLOATS[place.kind]).reshape(place.shape)
    rows = int(np.prod(place.shape[:-1]))
    return part.reshape(*place.shape[:-1], place.bytes // rows if rows else 0)


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The key-value pairs: str, int, float, bool, or lists of them."""
    return gguf_guard.read_metadata(Path(path))


@reader
def read_config(path: str | Path) -> dict[str, Any]:
    """The config.json that the file's metadata stands for."""
    metadata, stored = read_metadata(path), read(path)
    architecture = metadata.get("general.architecture")
    if architecture != "phi3":
        raise PhiquantError(f"{path} holds a model of the architecture {architecture!r}, not phi3")
    try:
        return _config({k.removeprefix("phi3."): v for k, v in metadata.items()}, stored)
    except KeyError as error:
        raise PhiquantError(f"{path} lacks the key phi3.{error.args[0]}; export again") from error
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise PhiquantError(f"{path}: its metadata is not that of a Phi-3 model: {error}") from error


def _config(keys: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, Any]:
    heads, hidden = int(keys["attention.head_count"]), int(keys["embedding_length"])
    original = int(keys.get("rope.scaling.original_context_length", keys["context_length"]))
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": _decimal(keys.get("rope.freq_base", 10000.0))}
    rope["partial_rotary_factor"] = int(keys.get("rope.dimension_count", hidden // heads)) / (hidden // heads)
    if "rope_factors_long.weight" in stored:
        factors = {f"{k}_factor": stored[f"rope_factors_{k}.weight"].values().tolist() for k in ("long", "short")}
        rope |= {"rope_type": "longrope", "attention_factor": keys.get("rope.scaling.attn_factor"), **factors}
        rope["original_max_position_embeddings"] = original
    tokens = {name: keys.get(f"tokenizer.ggml.{key}_token_id") for name, key in _TOKENS.items()}
    return {
        "architectures": [phi.ARCHITECTURE],
        "model_type": phi.MODEL_TYPE,
        "vocab_size": stored[f"{phi.EMBEDDING}.weight"].shape[0],
        "hidden_size": hidden,
        "intermediate_size": int(keys["feed_forward_length"]),
        "num_hidden_layers": int(keys["block_count"]),
        "num_attention_heads": heads,
        "num_key_value_heads": int(keys.get("attention.head_count_kv", heads)),
        "max_position_embeddings": int(keys["context_length"]),
        "original_max_position_embeddings": original,
        "rms_norm_eps": _decimal(keys["attention.layer_norm_rms_epsilon"]),
        "sliding_window": keys.get("attention.sliding_window") or None,
        "rope_parameters": rope,
        "tie_word_embeddings": f"{phi.HEAD}.weight" not in stored,
        **tokens,
    }


def _decimal(value: float) -> float:
    """The shortest decimal number that is this float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


_TOKENS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}


def _compare_with_gguf_py(path: Path, header: gguf_guard.Header) -> None:
    """PhiquantError unless gguf-py, where it is installed and knows the file's types, finds the same tensors."""
    try:
        gguf = need("gguf", extra="gguf")
    except ImportError:
        return
    if any(place.kind not in gguf.GGMLQuantizationType.__members__ for place in header.tensors):
        return

    class Reader(gguf.GGUFReader):  # type: ignore[name-defined]
        """Passes over the arrays of the metadata (see gguf_guard)."""

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            if raw_type != gguf.GGUFValueType.ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            walk = gguf_guard.Walk(memoryview(self.data), int(orig_offs))
            walk.value(int(raw_type))
            return walk.at - orig_offs, [self.data[orig_offs : walk.at]], [0], [gguf.GGUFValueType.ARRAY]

    try:
        theirs = [
            (t.name, t.tensor_type.name, int(t.data_offset), int(t.n_bytes), tuple(map(int, reversed(t.shape))))
            for t in Reader(path).tensors
        ]
    except (ValueError, KeyError, IndexError, TypeError, OverflowError) as error:
        raise PhiquantError(f"{path} is not a whole GGUF file: {error}; export it or fetch it again") from error
    if theirs != [(t.name, t.kind, t.start, t.bytes, t.shape) for t in header.tensors]:
        raise PhiquantError(f"{path}: gguf-py finds other tensors in it than phiquant; export it or fetch it again")
