"""Where calibration gets a Phi-3 model from, decoder layer by decoder layer: a model in memory, or a checkpoint.

Modules go by the paths of a split model: "...qkv_proj.v_proj" where a projection has a grid of its own.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .checkpoint import Checkpoint, file_identity
from .errors import PhiquantError
from .extras import need
from .models import phi
from .split_linear import projection_name, split
from .tensor import sampled


class Layers(Protocol):
    """A Phi-3 model as calibration sees it.

    count: decoder layers. tied: whether embedding and head share a table. device: where they compute. identity: what
    a resumed run must find again.
    """

    count: int
    tied: bool
    device: torch.device

    @property
    def identity(self) -> str: ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the weight of that module. PhiquantError if there is no such module."""
        ...

    def weight(self, name: str, rows: slice = slice(None)) -> Tensor:
        """The float weight of that module, or some of its rows, in its own dtype."""
        ...

    def decoder(self, index: int) -> nn.Module:
        """A copy of that decoder layer, float32, in eval mode, that the caller may change."""
        ...

    def norm(self) -> nn.Module:
        """A copy of the norm after the last decoder layer, float32."""
        ...

    def arguments(self, hidden: Tensor) -> dict[str, Any]:
        """What the model calls its layers with, besides hidden [1, T, D]."""
        ...


class ModelLayers:
    """A model in memory, which stays as it is."""

    def __init__(self, model: nn.Module) -> None:
        layers = getattr(getattr(model, "model", None), "layers", None)
        if not isinstance(layers, nn.ModuleList):
            raise PhiquantError(f"calibration follows a {phi.ARCHITECTURE}; {type(model).__name__} has no model.layers")
        self.model, self.count = model, len(layers)
        self.device = next(model.parameters()).device
        self.tied = bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))

    @property
    def identity(self) -> str:
        digest = hashlib.sha256()
        for name, value in self.model.named_parameters():
            digest.update(f"{name} {list(value.shape)}".encode() + sampled(value))
        return digest.hexdigest()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.weight(name).shape)

    def weight(self, name: str, rows: slice = slice(None)) -> Tensor:
        return self.model.get_submodule(name).get_parameter("weight").detach()[rows]

    def decoder(self, index: int) -> nn.Module:
        return copy.deepcopy(self.model.get_submodule(f"model.layers.{index}")).float().eval()

    def norm(self) -> nn.Module:
        return copy.deepcopy(self.model.get_submodule(phi.FINAL_NORM)).float()

    def arguments(self, hidden: Tensor) -> dict[str, Any]:
        return _arguments(self.model, hidden)


class CheckpointLayers:
    """A checkpoint on disk: one decoder layer is in memory at a time.

    split_names: projections with grids of their own.
    """

    def __init__(self, checkpoint: Checkpoint, split_names: Iterable[str] = ()) -> None:
        self.checkpoint, self.device = checkpoint, torch.device("cpu")
        self.model = empty_model(checkpoint).float().eval()
        self.count, self.tied = len(self.model.model.layers), phi.sizes(checkpoint.config).tied
        with split(self.model, split_names):
            pass

    @property
    def identity(self) -> str:
        facts = [self.checkpoint.config, [file_identity(path) for path in self.checkpoint.files]]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.model.get_submodule(name).get_parameter("weight").shape)

    def weight(self, name: str, rows: slice = slice(None)) -> Tensor:
        module = projection_name(name)
        fused = phi.fused_name(module)
        if f"{module}.weight" in self.checkpoint.tensors:
            return self.checkpoint.read(f"{module}.weight", rows)
        inside = phi.fused_rows(self.checkpoint.config, fused)[module]
        start, stop, _ = rows.indices(inside.stop - inside.start)
        return self.checkpoint.read(f"{fused}.weight", slice(inside.start + start, inside.start + stop))

    def decoder(self, index: int) -> nn.Module:
        return self._filled(f"model.layers.{index}")

    def norm(self) -> nn.Module:
        return self._filled(phi.FINAL_NORM)

    def arguments(self, hidden: Tensor) -> dict[str, Any]:
        return _arguments(self.model, hidden)

    def _filled(self, path: str) -> nn.Module:
        module = copy.deepcopy(self.model.get_submodule(path)).to_empty(device="cpu")
        for name, parameter in module.named_parameters(prefix=path):
            parameter.data.copy_(self.weight(name.removesuffix(".weight")))
        return module


def empty_model(checkpoint: Checkpoint) -> Any:
    """The Phi3ForCausalLM of a checkpoint, its weights on the meta device; rotary tables are computed, not stored."""
    transformers = need("transformers", extra="hf")
    config = transformers.Phi3Config.from_pretrained(checkpoint.folder, local_files_only=True)
    with torch.device("meta"):
        model = transformers.Phi3ForCausalLM(config)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model


class Stop(Exception):
    """Raised by a hook: what comes after it is of no use."""


def _arguments(model: nn.Module, hidden: Tensor) -> dict[str, Any]:
    caught: dict[str, Any] = {}

    def catch(_: nn.Module, arguments: tuple, named: dict[str, Any]) -> None:
        caught.update(named)
        raise Stop

    hook = model.get_submodule("model.layers.0").register_forward_pre_hook(catch, with_kwargs=True)
    try:
        with suppress(Stop):
            model.get_submodule("model")(inputs_embeds=hidden, use_cache=False)
    finally:
        hook.remove()
    caught.pop("hidden_states", None)
    return caught
