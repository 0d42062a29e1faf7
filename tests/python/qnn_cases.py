"""Small models and exports that the tests of QNN share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import phiquant as pq
import torch
from phiquant import testing

PREFILL, CONTEXT = 8, 32
HEAD = {"lm_head": "int8-channel-sym", "model.embed_tokens": "int8-channel-sym"}


def windows(count: int = 4, tokens: int = CONTEXT, seed: int = 0) -> torch.Tensor:
    """Random token ids [n, T]."""
    return torch.randint(0, 4000, (count, tokens), generator=torch.Generator().manual_seed(seed))


def quantized(target: str = "qnn:a16w8", head: bool = False, **config: Any) -> Any:
    """A random model of one layer on the grids of a target; head: lm_head and the embedding too."""
    model = testing.random_phi3(**{"num_hidden_layers": 1, **config})
    pq.quantize(model, pq.Recipe(HEAD if head else {}, default=target))
    return model


def export(model: Any, tokenizer: Any, out: Path, **options: Any) -> dict[str, Any]:
    """A QNN export with small stages, calibrated on random windows."""
    sizes = {"calibration": windows(8), "prefill": PREFILL, "context": CONTEXT}
    return pq.export(model, tokenizer, out, format="qnn", **{**sizes, **options})


@torch.no_grad()
def expected(model: Any, rows: list[list[int]]) -> list[np.ndarray]:
    """Logits of torch."""
    return [model(torch.tensor([row]), use_cache=False).logits[0].numpy() for row in rows]


def error(found: list[np.ndarray], wanted: list[np.ndarray]) -> float:
    """Relative 2-norm of the difference."""
    wrong = sum(float(np.square(a - b).sum()) for a, b in zip(found, wanted, strict=True))
    return (wrong / sum(float(np.square(b).sum()) for b in wanted)) ** 0.5
