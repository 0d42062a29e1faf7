"""Reads a GGUF file back, for verify: the container by gguf-py, the bits by numpy. No code of the writer.

What comes back is in the words of the tensor's spec: codes in its range, one scale per its group.
N = rows, K = values of a row.
"""

from __future__ import annotations

import hashlib
import mmap
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import PhiquantError
from ..extras import need
from ..spec import PerGroup, QuantSpec
from . import gguf_guard

BLOCK = 32
_BYTES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}
_CHUNK = 1 << 23  # values unpacked at once
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
_BLK = re.compile(r"blk\.(\d+)\.(\w+)\.weight")


@dataclass(frozen=True)
class Decoded:
    """A quantized tensor: codes [N, K] int8 or uint8; scales and minimums float16 as the spec shapes them."""

    codes: np.ndarray
    scales: np.ndarray
    minimums: np.ndarray | None


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor of a GGUF file, decoded on demand.

    name: the Hugging Face name (LongRoPE's factors keep their GGUF name). stored_as: "Q4_0", "F16" ...
    data: as gguf-py maps it: the values of F32 and F16, the bytes [N, bytes of a row] of others.
    """

    name: str
    stored_as: str
    shape: tuple[int, ...]
    data: np.ndarray

    @property
    def quantized(self) -> bool:
        return self.stored_as in _BYTES

    def decoded(self, spec: QuantSpec, rows: slice | None = None) -> Decoded:
        """Codes and parameters of some rows in the words of `spec`: repeated scales are one again.

        PhiquantError if the file's type holds no such spec, if scales that must be equal differ, or if a code is
        outside the spec's range.
        """
        codes, scales, minimums = self._unpack(rows)
        element = spec.element
        if (minimums is None) != (spec.offset == "none") or codes.dtype != (np.int8 if element.signed else np.uint8):
            raise PhiquantError(f"{self.name}: the file has {self.stored_as}, which does not hold {spec}")
        if codes.size and not element.qmin <= codes.min() <= codes.max() <= element.qmax:
            raise PhiquantError(
                f"{self.name}: codes {codes.min()}..{codes.max()} in the file, {element.qmin}..{element.qmax} in {spec}"
            )
        shape = (codes.shape[0], self.shape[1])
        collapsed = [m if m is None else self._collapse(m, spec, shape) for m in (scales, minimums)]
        assert collapsed[0] is not None
        return Decoded(codes, collapsed[0], collapsed[1])

    def values(self, rows: slice | None = None) -> np.ndarray:
        """The real values, float32, by the formulas of the format."""
        if self.stored_as == "BF16":
            bits = np.ascontiguousarray(self._rows(rows)).view("<u2").astype(np.uint32) << 16
            return bits.view(np.float32)
        if not self.quantized:
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

    def digests(self, spec: QuantSpec | None) -> dict[str, str]:
        """What the receipt lists: SHA-256 of codes and parameters in the words of `spec`, or of the float bytes."""
        if spec is None:
            values = hashlib.sha256()
            for rows in self.row_slices():
                values.update(np.ascontiguousarray(self._rows(rows)).view(np.uint8).data)
            return {"values": values.hexdigest()}
        if not self.quantized:
            raise PhiquantError(f"{self.name}: the file has {self.stored_as}, the receipt says {spec}")
        codes = hashlib.sha256()
        scales, minimums = [], []
        for rows in self.row_slices():
            part = self.decoded(spec, rows)
            codes.update(np.ascontiguousarray(part.codes).data)
            scales.append(part.scales)
            minimums += [] if part.minimums is None else [part.minimums]
        parameters = hashlib.sha256()
        for parts in (scales, minimums):
            for kept in self._joined(parts, spec):
                parameters.update(np.ascontiguousarray(kept).data)
        return {"codes": codes.hexdigest(), "parameters": parameters.hexdigest()}

    def row_slices(self) -> Iterator[slice]:
        """Slices of the rows, so that a large tensor is never decoded at once."""
        step = max(1, _CHUNK // max(1, self.shape[-1])) if len(self.shape) == 2 else _CHUNK
        for start in range(0, self.shape[0], step):
            yield slice(start, min(start + step, self.shape[0]))
            self._release()

    def _release(self) -> None:
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
        if not self.quantized:
            raise PhiquantError(f"{self.name}: the file has {self.stored_as}, which has no codes")
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

    def _collapse(self, stored: np.ndarray, spec: QuantSpec, shape: tuple[int, int]) -> np.ndarray:
        """[N, K/32] -> spec.scale_shape(shape). The bits of repeated parameters must agree."""
        wanted = spec.scale_shape(shape)
        repeats = shape[1] // BLOCK // wanted[1] if isinstance(spec.granularity, PerGroup) else shape[1] // BLOCK
        bits = np.ascontiguousarray(stored).view(np.uint16).reshape(shape[0], -1, repeats)
        first = bits[:1, :, :1] if wanted[0] == 1 else bits[..., :1]
        if not (bits == first).all():
            row, group, _ = (int(i) for i in np.argwhere(bits != first)[0])
            raise PhiquantError(
                f"{self.name}: row {row}, group {group}: scales of one {spec.granularity} differ; the file is damaged"
            )
        return first[..., 0].view(np.float16)

    def _joined(self, parts: list[np.ndarray], spec: QuantSpec) -> list[np.ndarray]:
        """Parameters of consecutive rows; those of a whole tensor must be the same in each part."""
        if not parts or spec.scale_shape(self.shape)[0] == self.shape[0]:
            return parts
        if any(part.tobytes() != parts[0].tobytes() for part in parts):
            raise PhiquantError(f"{self.name}: the scale of the whole tensor differs between rows; the file is damaged")
        return parts[:1]


def read(path: str | Path) -> dict[str, StoredTensor]:
    """Every tensor by its Hugging Face name. PhiquantError for a file that is damaged or not a Phi-3's."""
    tensors = (
        StoredTensor(_hf_name(t.name), t.tensor_type.name, tuple(int(n) for n in reversed(t.shape)), t.data)
        for t in _open(path).tensors
    )
    return {t.name: t for t in tensors}


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The key-value pairs: str, int, float, bool, or lists of them."""
    return gguf_guard.read_metadata(Path(path))


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
