"""Reads a GGUF file back, for verify: the container by gguf-py, the bits by numpy. No code of the writer.

What comes back is in the words of the tensor's spec: codes in its range, one scale per its group.
N = rows, K = values of a row.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import PhiquantError
from ..extras import need
from ..models import phi
from ..spec import QuantSpec, spec
from . import gguf_guard
from .stored import Parts, StoredTensor, once

BLOCK = 32
_BYTES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}
_SPECS = {kind: spec(f"gguf:{kind}") for kind in _BYTES}
_WHOLE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}
_SPECIAL = {"bos": "bos", "eos": "eos", "pad": "padding"}  # config.json's name -> GGUF's
_BLK = re.compile(r"blk\.(\d+)\.(\w+)\.weight")


@dataclass(frozen=True, eq=False)
class GGUFTensor(StoredTensor):
    """A tensor of a GGUF file. LongRoPE's factors keep their GGUF name.

    data: as gguf-py maps it: the values of F32 and F16, the bytes [N, bytes of a row] of others.
    """

    data: np.ndarray

    @property
    def spec(self) -> QuantSpec | None:
        return _SPECS.get(self.stored_as)

    def parts(self, spec: QuantSpec, rows: slice | None = None) -> Parts:
        """See StoredTensor.parts."""
        codes, scales, minimums = self._unpack(rows)
        if (minimums is None) != (spec.offset == "none") or codes.dtype != (
            np.int8 if spec.element.signed else np.uint8
        ):
            raise PhiquantError(f"{self.name}: the file has {self.stored_as}, which does not hold {spec}")
        shape = spec.scale_shape((codes.shape[0], self.shape[1]))
        stored = {"scales": scales} | ({} if minimums is None else {"minimums": minimums})
        return {"codes": codes} | {key: once(self.name, value, shape) for key, value in stored.items()}

    def raw(self, rows: slice | None = None) -> np.ndarray:
        """See StoredTensor.raw."""
        data = np.ascontiguousarray(self._rows(rows))
        return data.view("<u2") if self.stored_as == "BF16" else data

    def values(self, rows: slice | None = None) -> np.ndarray:
        """The real values, float32, by the formulas of the format."""
        if self.stored_as == "BF16":
            bits = np.ascontiguousarray(self._rows(rows)).view("<u2").astype(np.uint32) << 16
            return bits.view(np.float32)
        if self.spec is None:
            return np.asarray(self._rows(rows), np.float32)
        codes, scales, minimums = self._unpack(rows)
        blocks = codes.reshape(len(codes), -1, BLOCK) * scales.astype(np.float32)[..., None]
        if minimums is not None:
            blocks = blocks + minimums.astype(np.float32)[..., None]
        return blocks.reshape(codes.shape)

    def reference(self, rows: slice | None = None) -> np.ndarray:
        """The real values as gguf-py decodes them, float32."""
        quants = need("gguf.quants", extra="gguf")
        kind = need("gguf", extra="gguf").GGMLQuantizationType[self.stored_as]
        return np.asarray(quants.dequantize(np.ascontiguousarray(self._rows(rows)), kind), np.float32)

    def release(self) -> None:
        """Give back the pages that were read: those of a mapped file count as this process' memory."""
        mapped: Any = self.data
        while isinstance(mapped, np.ndarray) and not isinstance(mapped.base, mmap.mmap):
            mapped = mapped.base
        if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
            mapped.base.madvise(mmap.MADV_DONTNEED)

    def _rows(self, rows: slice | None) -> np.ndarray:
        return self.data if rows is None else self.data[rows]

    def _unpack(self, rows: slice | None) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """codes [N, K], scales [N, K/32] float16, minimums likewise or None."""
        data = np.ascontiguousarray(self._rows(rows))
        blocks = data.reshape(len(data), -1, _BYTES[self.stored_as])
        scales = np.ascontiguousarray(blocks[..., :2]).view("<f2")[..., 0]
        shape = (len(data), -1)
        if self.stored_as == "Q8_0":
            return np.ascontiguousarray(blocks[..., 2:]).view(np.int8).reshape(shape), scales, None
        nibbles = blocks[..., 4 if self.stored_as == "Q4_1" else 2 :]
        codes = np.concatenate([nibbles & 15, nibbles >> 4], axis=-1).reshape(shape)
        if self.stored_as == "Q4_0":
            return codes.astype(np.int8) - np.int8(8), scales, None
        return codes, scales, np.ascontiguousarray(blocks[..., 2:4]).view("<f2")[..., 0]


def read(path: str | Path) -> dict[str, GGUFTensor]:
    """Every tensor by its Hugging Face name. PhiquantError for a file that is damaged or not a Phi-3's."""
    tensors = (
        GGUFTensor(_hf_name(t.name), t.tensor_type.name, tuple(int(n) for n in reversed(t.shape)), t.data)
        for t in _open(path).tensors
    )
    return {t.name: t for t in tensors}


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The key-value pairs: str, int, float, bool, or lists of them."""
    return gguf_guard.read_metadata(Path(path))


def read_config(path: str | Path) -> dict[str, Any]:
    """The config.json that the file's metadata stands for."""
    metadata, stored = read_metadata(path), read(path)
    try:
        return _config({k.removeprefix("phi3."): v for k, v in metadata.items()}, stored)
    except KeyError as error:
        raise PhiquantError(f"{path} lacks the key phi3.{error.args[0]}; export again") from error


def _config(keys: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, Any]:
    heads, hidden = int(keys["attention.head_count"]), int(keys["embedding_length"])
    original = int(keys.get("rope.scaling.original_context_length", keys["context_length"]))
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": _decimal(keys.get("rope.freq_base", 10000.0))}
    rope["partial_rotary_factor"] = int(keys.get("rope.dimension_count", hidden // heads)) / (hidden // heads)
    if "rope_factors_long.weight" in stored:
        factors = {f"{k}_factor": stored[f"rope_factors_{k}.weight"].values().tolist() for k in ("long", "short")}
        rope |= {"rope_type": "longrope", "attention_factor": keys.get("rope.scaling.attn_factor"), **factors}
        rope["original_max_position_embeddings"] = original
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
        **{f"{ours}_token_id": keys.get(f"tokenizer.ggml.{theirs}_token_id") for ours, theirs in _SPECIAL.items()},
    }


def _decimal(value: float) -> float:
    """The shortest decimal number that is this float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _open(path: str | Path) -> Any:
    path = Path(path)
    gguf_guard.read_metadata(path)
    try:
        return _container_reader()(path)
    except (ValueError, KeyError, IndexError, TypeError, OverflowError) as error:
        raise PhiquantError(f"{path} is not a whole GGUF file: {error}; export it or fetch it again") from error


def _container_reader() -> Any:
    """gguf-py's GGUFReader, which passes over the arrays of the metadata (see gguf_guard)."""
    gguf = need("gguf", extra="gguf")

    class Reader(gguf.GGUFReader):  # type: ignore[name-defined]
        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            if raw_type != gguf.GGUFValueType.ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            walk = gguf_guard.Walk(memoryview(self.data), int(orig_offs))
            walk.value(int(raw_type))
            return walk.at - orig_offs, [self.data[orig_offs : walk.at]], [0], [gguf.GGUFValueType.ARRAY]

    return Reader


def _hf_name(name: str) -> str:
    if name in _WHOLE or name.startswith("rope_factors_"):
        return _WHOLE.get(name, name)
    found = _BLK.fullmatch(name)
    if found is None or found[2] not in _LAYER:
        raise PhiquantError(f"the GGUF file has a tensor {name!r}, which no Phi-3 model has")
    return f"model.layers.{found[1]}.{_LAYER[found[2]]}.weight"
