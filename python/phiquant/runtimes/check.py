"""Run an exported file in its own runtime and compare its logits with torch's, on the same codes."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import evaluate, testing
from ..errors import PhiquantError
from ..extras import need
from ..formats.registry import Format
from ..models import phi
from . import deviations
from .tokenizer import RuntimeTokenizer

WINDOW = 256
_CHARACTERS = 12  # of source code per token, at most on average
# Ids that the config does not name are not the defaults of Phi3Config, which may lie outside the vocabulary.
_NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


@dataclass(frozen=True)
class RuntimeResult:
    """A file in its own runtime against the model decoded from it, in torch, float32.

    ok: the relative error is within `bar`. relative_error: |difference of the logits| / |logits|,
    2-norms over all tokens. kl: mean KL(torch || runtime) in nats; same_top: share of positions with
    the same most likely token. deviation: what the runtime is known to do otherwise than the model says with texts
    of this length; torch then did the same.
    """

    name: str
    ok: bool
    relative_error: float
    bar: float
    kl: float
    same_top: float
    perplexity: float
    reference_perplexity: float
    tokens: int
    deviation: str | None = None


def runtime_of(format: Format) -> Any:
    """The module that runs files of this format."""
    return importlib.import_module(f".{format.runtime}", __package__)


def run(
    format: Format, path: Path, text: str | None = None, reference: Any = None, windows: int = 4, exact: bool = True
) -> RuntimeResult:
    """The export at `path` in its runtime, on `windows` windows of `text` by the runtime's own tokenizer.

    reference: a model in torch, or None for the one decoded from the file. exact: in the runtime's setting that
    computes what torch does; False: in its default one.
    """
    reader, runtime = format.reader_module(), runtime_of(format)

    text = testing.heldout_text() if text is None else text
    tokenizer = RuntimeTokenizer(runtime, path)
    rows = evaluate.windows(tokenizer, text[: windows * WINDOW * _CHARACTERS], WINDOW, windows)
    stored, deviation = reader.read(path), None
    if reference is None:
        config = reader.read_config(path)
        known = deviations.find(format, config, config, WINDOW)
        config, deviation = known or (config, None)
        reference = decoded_model(config, stored)
    got = runtime.logits(path, rows, exact=exact)
    result = compare(runtime, rows, got, reference, runtime.bar(stored, exact))
    return dataclasses.replace(result, deviation=deviation)


def decoded_model(config: Mapping[str, Any], stored: Mapping[str, Any]) -> Any:
    """A Phi3ForCausalLM in float32 with the values that the readers decode: the whole model in memory."""
    transformers = need("transformers", extra="hf")
    plain = {key: value for key, value in config.items() if key not in ("quantization_config", "dtype", "auto_map")}
    settings = transformers.Phi3Config.from_dict({**_NO_TOKENS, **plain})
    model = transformers.Phi3ForCausalLM(settings).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            slices = [f"{part}.weight" for part in phi.slice_names(name.removesuffix(".weight"))]
            parts = slices if slices and slices[0] in stored else [name]
            if missing := [part for part in parts if part not in stored]:
                raise PhiquantError(f"the file has no tensor {missing[0]}; export again")
            parameter.copy_(torch.from_numpy(np.concatenate([stored[part].values() for part in parts])))
    return model


def compare(runtime: Any, rows: list[list[int]], logits: list[np.ndarray], reference: Any, bar: float) -> RuntimeResult:
    """What a runtime computed for `rows` beside what the model `reference` does."""
    expected = [values.float().cpu() for values in evaluate.model_logits(reference, rows)]
    got = [torch.tensor(values) for values in logits]
    error = relative_error(got, expected)
    compared = evaluate.compare_logits(rows, got, expected)
    return RuntimeResult(
        name=runtime.NAME,
        ok=error <= bar,
        relative_error=error,
        bar=bar,
        kl=compared.kl,
        same_top=compared.same_top,
        perplexity=compared.perplexity,
        reference_perplexity=compared.reference_perplexity,
        tokens=compared.tokens,
    )


def relative_error(got: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """|got - expected| / |expected|, 2-norms over all values."""
    difference = sum(float((a - b).square().sum()) for a, b in zip(got, expected, strict=True))
    return float((difference / sum(float(values.square().sum()) for values in expected)) ** 0.5)
