"""A quantized model kept in a folder: every parameter and code, so that any format can be written from it later.

model.safetensors  the state dict: Hugging Face's names, and <module>.weight_quantizer.* for the codes
run.json           where the float model came from, the spec of each quantized module, what else the caller noted
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from .errors import PhiquantError
from .load import load
from .modules import QuantizedEmbedding, QuantizedLinear, to_quantized
from .spec import spec
from .split_linear import projection_name, split
from .tensor import PARAMETERS, QuantizedTensor

STATE, FACTS = "model.safetensors", "run.json"
_PARTS = ("codes", *PARAMETERS)


def save(model: Any, source: str, folder: Path, **facts: Any) -> None:
    """Write the converted `model` into `folder`. source: what load() made the float model from."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    quantized = {n: m.weight_quantizer for n, m in model.named_modules() if isinstance(m, _QUANTIZED)}
    specs = {name: str(stored.spec) for name, stored in quantized.items()}
    origins = {name: stored.origin for name, stored in quantized.items() if stored.origin}
    seen: dict[int, str] = {}
    state = {}
    for name, value in model.state_dict().items():
        if seen.setdefault(value.data_ptr(), name) == name:  # tied weights are stored once
            state[name] = value.contiguous()
    partial = folder / f"{STATE}.partial"
    save_file(state, partial)
    partial.replace(folder / STATE)
    partial = folder / f"{FACTS}.partial"
    partial.write_text(
        json.dumps({"source": source, "specs": specs, "origins": origins} | facts, indent=2) + "\n", encoding="utf-8"
    )
    partial.replace(folder / FACTS)


def read_facts(folder: Path) -> dict[str, Any]:
    """What run.json says. PhiquantError if it is missing or not ours."""
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PhiquantError(f"{folder} holds no finished run ({error}); run `phiquant qat` to its end") from error
    if not isinstance(facts, dict) or not isinstance(facts.get("specs"), dict) or "source" not in facts:
        raise PhiquantError(f"{folder / FACTS} is not the description of a run")
    return facts


def restore(folder: Path) -> tuple[Any, Any]:
    """(the quantized model, its tokenizer) of a folder that save() wrote. The float model must still be there."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    facts = read_facts(folder)
    model, tokenizer = load(facts["source"])
    try:
        state = load_file(folder / STATE)
    except (SafetensorError, OSError) as error:
        raise PhiquantError(f"{folder / STATE} is damaged or missing ({error}); run `phiquant qat` again") from error
    with split(model, map(projection_name, facts["specs"])):
        modules = dict(model.named_modules())
    for name, text in facts["specs"].items():
        parts: dict[str, Any] = {part: state.pop(f"{name}.weight_quantizer.{part}", None) for part in _PARTS}
        if name not in modules or parts["codes"] is None:
            raise PhiquantError(f"{folder}: the run lists {name}, which its model or its state does not have")
        quantized = QuantizedTensor(spec=spec(text), **parts)
        weight = torch.nn.Parameter(quantized.dequantize(modules[name].weight.dtype), requires_grad=False)
        to_quantized(modules[name], quantized, weight, facts.get("origins", {}).get(name))
        state.pop(f"{name}.weight", None)
    _load_floats(model, state, folder)
    return model, tokenizer


def _load_floats(model: Any, state: dict[str, torch.Tensor], folder: Path) -> None:
    parameters = dict(model.named_parameters())
    for name, value in state.items():
        if name not in parameters or parameters[name].shape != value.shape:
            raise PhiquantError(f"{folder / STATE}: {name} {list(value.shape)} does not belong to the run's model")
        parameters[name].data.copy_(value)


_QUANTIZED = (QuantizedLinear, QuantizedEmbedding)
