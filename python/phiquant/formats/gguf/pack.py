"""The bytes of a tensor in a GGUF type. Nothing is rounded here: codes and stored parameters are put in place.

N = rows, K = values of a row.
"""

from __future__ import annotations

import numpy as np
import torch

from ..._extension import load
from ...errors import PhiquantError
from ...tensor import QuantizedTensor
from ..floats import cast
from .types import FLOAT_TYPES, GGMLType

_C = load()
_LARGEST_E4M3 = 0x7E  # bits of 448; above it is NaN, which ggml reads as 0


def pack(name: str, piece: QuantizedTensor, kind: GGMLType) -> np.ndarray:
    """The bytes of some rows [N, K] of tensor `name` in `kind`: uint8 [N * K / kind.block * kind.block_bytes].

    PhiquantError for a scale that is not finite, or one that the type cannot store.
    """
    assert kind.grid is not None  # type_for() saw to it
    assert piece.scales is not None
    codes = piece.codes.contiguous().view(torch.uint8).numpy().reshape(-1)
    rows, columns = piece.shape
    group = kind.grid.block_size((1, kind.block))  # values that share a scale

    def bits(values: torch.Tensor | None, size: int) -> np.ndarray | None:
        """Parameters [N or 1, G] as bits, one per `size` values of a row."""
        if values is None:
            return None
        _check(name, values, kind)
        words = values.contiguous().view(torch.uint8 if values.element_size() == 1 else torch.int16)
        repeated = (
            words if words.shape[1] * size == columns else words.repeat_interleave(columns // size // words.shape[1], 1)
        )
        plain = repeated.expand(rows, -1).contiguous().numpy().reshape(-1)
        return plain if plain.dtype == np.uint8 else plain.view(np.uint16)

    if kind.grid.two_level is not None:
        return _C.pack_gguf(
            kind.name,
            codes,
            d=bits(piece.super_scales, kind.block),
            m=bits(piece.super_minimums, kind.block),
            scales=bits(piece.scales, group),
            minimums=bits(piece.minimums, group),
        )
    if kind.grid.scale_dtype != "float16":
        return _C.pack_gguf(kind.name, codes, scales=bits(piece.scales, group))
    return _C.pack_gguf(kind.name, codes, d=bits(piece.scales, group), m=bits(piece.minimums, group))


def _check(name: str, values: torch.Tensor, kind: GGMLType) -> None:
    """PhiquantError for parameters that cannot be stored: infinities and NaN; with e4m3 what is below 0."""
    if values.dtype in (torch.int8, torch.uint8):
        return
    if values.dtype == torch.float8_e4m3fn:
        bad = bool((values.view(torch.uint8) > _LARGEST_E4M3).any())
    elif values.dtype == torch.float8_e8m0fnu:
        bad = bool((values.view(torch.uint8) == 0xFF).any())
    else:  # float16: the sum cannot overflow
        bad = not bool(torch.isfinite(values.sum(dtype=torch.float32)))
    if bad:
        below = " or is below 0" if values.dtype == torch.float8_e4m3fn else ""
        raise PhiquantError(
            f"{name}: a scale or minimum is not finite{below}, which {kind.name} cannot store; quantize it again"
        )


def pack_float(name: str, values: torch.Tensor, kind: GGMLType, first_row: int) -> tuple[np.ndarray, bool]:
    """The bytes of some rows of a float tensor in `kind`, uint8, and whether the cast was exact.

    PhiquantError for values that are not finite, or too large for float16; `first_row` is for its index.
    """
    dtype = next(getattr(torch, text) for text, known in FLOAT_TYPES.items() if known is kind)
    stored, exact = cast(name, values, dtype, first_row, f"too large for {kind.name}; export as gguf:BF16")
    return stored.contiguous().reshape(-1).view(torch.uint8).numpy(), exact
