"""AutoRound: rounding and ranges of each decoder layer trained by signed gradients, 200 steps a layer."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

PACKAGE = "auto-round"


def _quantize(
    model: Any, ids: torch.Tensor, tokenizer: Any, bits: int, group: int, symmetric: bool, steps: int = 200
) -> tuple[Any, float]:
    from auto_round import AutoRound

    loader = torch.utils.data.DataLoader([{"input_ids": row} for row in ids], batch_size=1)
    worker = AutoRound(
        model, tokenizer, bits=bits, group_size=group, sym=symmetric, iters=steps, dataset=loader,
        seqlen=ids.shape[1], nsamples=len(ids), seed=0, device_map="cpu", enable_torch_compile=False,
        low_gpu_mem_usage=False,
    )  # fmt: skip
    made, _ = worker.quantize()
    return made, bits + (16 + (0 if symmetric else bits)) / group


METHODS = {
    f"w{bits}g{group} {'sym' if symmetric else 'asym'}": partial(_quantize, bits=bits, group=group, symmetric=symmetric)
    for bits in (4, 3, 2)
    for group, symmetric in ((32, False), (64, False))
    if group == 32 or bits == 2
}
