"""llm-compressor: GPTQ with its observers, AWQ, AutoRound's modifier left to auto-round itself."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

PACKAGE = "llmcompressor"


def _scheme(bits: int, group: int, symmetric: bool, observer: str) -> Any:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    arguments = {"num_bits": bits, "type": "int", "strategy": "group", "group_size": group}
    return QuantizationScheme(
        targets=["Linear"], weights=QuantizationArgs(**arguments, symmetric=symmetric, observer=observer)
    )


def _quantize(
    model: Any, ids: torch.Tensor, tokenizer: Any, method: str, bits: int, group: int, symmetric: bool, observer: str
) -> tuple[Any, float]:
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.awq import AWQModifier
    from llmcompressor.modifiers.quantization import GPTQModifier

    groups = {"group_0": _scheme(bits, group, symmetric, observer)}
    modifier = {"gptq": GPTQModifier, "awq": AWQModifier}[method](config_groups=groups, ignore=["lm_head"])
    data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    oneshot(
        model=model, tokenizer=tokenizer, dataset=data, recipe=modifier, num_calibration_samples=len(ids),
        max_seq_length=ids.shape[1], shuffle_calibration_samples=False,
    )  # fmt: skip
    return model, bits + (16 + (0 if symmetric else bits)) / group


METHODS = {
    f"gptq {observer} w{bits}g{group} asym": partial(
        _quantize, method="gptq", bits=bits, group=group, symmetric=False, observer=observer
    )
    for bits in (4, 3, 2)
    for group, observer in ((32, "minmax"), (32, "mse"), (64, "mse"))
} | {
    f"awq w{bits}g32 asym": partial(_quantize, method="awq", bits=bits, group=32, symmetric=False, observer="minmax")
    for bits in (4, 3, 2)
}
