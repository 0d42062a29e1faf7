"""Tables of cosines and sines, which GroupQueryAttention rotates queries and keys with."""

from __future__ import annotations

import numpy as np
import torch

from ...errors import PhiquantError
from ...models.rope import Rope


def rotary_tables(rope: Rope) -> dict[str, np.ndarray]:
    """float32 [positions, rotary part / 2] by name, as Transformers computes them: "cos" and "sin".

    LongRoPE has "cos_short" and "sin_short", as long as the original context, and "cos_long" and "sin_long".
    """
    if rope.dimensions % 16:
        raise PhiquantError(
            f"the rotary part of a head has {rope.dimensions} values; ONNX Runtime's attention takes multiples of 16"
        )
    kinds: dict[str, tuple[list[float] | None, int]] = {"": (None, rope.context)}
    if rope.long is not None:
        kinds = {"_short": (rope.short, rope.original_context), "_long": (rope.long, rope.context)}
    exponents = torch.arange(0, rope.dimensions, 2, dtype=torch.int64).float() / rope.dimensions
    tables = {}
    for kind, (factors, rows) in kinds.items():
        inverse = 1.0 / ((1.0 if factors is None else torch.tensor(factors)) * rope.theta**exponents)
        angles = torch.arange(rows).float()[:, None] * inverse[None]
        for axis, values in (("cos", angles.cos()), ("sin", angles.sin())):
            tables[axis + kind] = (values * rope.attention_factor).numpy()
    return tables
