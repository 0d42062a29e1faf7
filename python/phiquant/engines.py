"""QAT under the training engines that exist: what an engine does not know of grids, in one object, and whole weights.

    pq.prepare_qat(model, "gguf:Q4_0", range="mse")
    schedule = QATSchedule(model, steps=1000, freeze=0.8)     # has state_dict(): give it to the engine's checkpoint
    for batch in batches:
        schedule.step()
        ...                                                   # DDP, FSDP2, Accelerate, a loop of one's own
    schedule.finish()                                         # or, where the weights are sharded: gather(model, whole)

docs/training-engines.md has a loop for each engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .errors import PhiquantError
from .fake_quant import FakeQuantize
from .modules import QATEmbedding, QATLinear
from .quantize import convert


class QATSchedule:
    """Counts the steps of a prepared model, freezes its ranges, and keeps what a checkpoint of weights does not tell.

    model: after prepare_qat; what an engine wraps around it does not matter. steps: of the whole run.
    freeze: share of the steps after which ranges that follow the weights (range="tensor", "observer") or the inputs (an
        observer for activations) stay, so that the last steps train for the very grid that is stored. None: never.
    """

    def __init__(self, model: nn.Module, steps: int, freeze: float | None = None) -> None:
        if steps < 1 or (freeze is not None and not 0 <= freeze <= 1):
            raise PhiquantError(f"steps is at least 1, freeze a share of them, 0 to 1; not {steps} and {freeze}")
        self.model, self.steps, self.freeze = model, steps, freeze
        self.done, self.frozen = 0, False
        self.grids = {name: _grid(module) for name, module in _prepared(model)}
        if not self.grids:
            raise PhiquantError(f"{type(model).__name__} has no layer in training; call prepare_qat(model, spec) first")
        if freeze is not None:
            _check_freezes(model)

    def step(self) -> None:
        """Call it before each step of the optimizer, on every rank: it freezes the ranges when their time has come."""
        if self.freeze is not None and not self.frozen and self.done >= self.freeze * self.steps:
            self._freeze()
        self.done += 1

    def finish(self) -> nn.Module:
        """convert() the model, in place; its codes tell the number of steps. Returns it without an engine's wrapper."""
        model = unwrapped(self.model)
        return convert(model, trained={"steps": self.done})

    def state_dict(self) -> dict[str, Any]:
        """Steps done, whether ranges are frozen, and the grid of each layer; fit for JSON."""
        return {"done": self.done, "frozen": self.frozen, "grids": self.grids}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`, after the weights and buffers have been loaded.

        PhiquantError, naming the layer, if the run that saved it trained through other grids.
        """
        saved: dict[str, str] = dict(state["grids"])
        for name in {**self.grids, **saved}:
            if self.grids.get(name) != saved.get(name):
                raise PhiquantError(
                    f"the checkpoint trained {name} through {saved.get(name, 'no grid')}, this run prepared it for "
                    f"{self.grids.get(name, 'no grid')}; prepare the model as that run did, or start anew"
                )
        self.done = int(state["done"])
        if state["frozen"]:
            self._freeze(restored=True)

    def _freeze(self, restored: bool = False) -> None:
        """The ranges stay as they are, those of inputs as all ranks have seen them; `restored`: as they were loaded."""
        for _, module in _prepared(self.model):
            quantizer = module.weight_quantizer
            if isinstance(quantizer, FakeQuantize):
                quantizer.freeze(_whole(module.weight))
                quantizer.to(module.weight.device)
            inputs = getattr(module, "input_quantizer", None)
            if isinstance(inputs, FakeQuantize) and inputs.observer is not None:
                inputs.observing = False
                if not restored:  # each rank has seen inputs of its own
                    inputs.observer.all_reduce()
                    inputs.set_range(*inputs.observer.parameters_of_range())
        self.frozen = True


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel and torch.compile; itself if it is neither."""
    while isinstance(inner := getattr(model, "_orig_mod", getattr(model, "module", None)), nn.Module):
        model = inner
    return model


@torch.no_grad()
def gather(model: nn.Module, whole: nn.Module | None) -> None:
    """Copy what a sharded model has trained into `whole`: parameters and buffers, one full tensor at a time.

    model: under `fully_shard`. Every rank must call it. whole: the same model prepared in the same way but not sharded,
        on the ranks that want it (rank 0, to convert and export); None on the others. It may lie on another device.
    PhiquantError if `whole` differs, or if FSDP casts parameters before they meet their grid.
    """
    _refuse_cast(model)
    state = unwrapped(model).state_dict()
    known = {} if whole is None else whole.state_dict()
    frozen = {}  # ranges that the whole model does not hold yet
    for name, value in state.items():
        full = _whole(value)  # a collective: on every rank, in the same order
        if name in known:
            if full.shape != known[name].shape:
                raise PhiquantError(f"{name} is {list(full.shape)}, in the whole model {list(known[name].shape)}")
            known[name].copy_(full)
        elif whole is not None:
            frozen[name] = full
    if whole is not None:
        strangers = {*whole.load_state_dict(frozen, strict=False).unexpected_keys, *(known.keys() - state.keys())}
        if strangers:
            raise PhiquantError(
                f"{min(strangers)} is in only one of the two models; prepare the whole one as the sharded one was, "
                "best by a copy made before fully_shard"
            )


def _prepared(model: nn.Module) -> Iterator[tuple[str, QATLinear | QATEmbedding]]:
    for name, module in unwrapped(model).named_modules():
        if isinstance(module, QATLinear | QATEmbedding):
            yield name, module


def _grid(module: QATLinear | QATEmbedding) -> str:
    return f"{module.weight_quantizer.spec}, range={module.origin.get('range', 'its own')}"


def _whole(tensor: Tensor) -> Tensor:
    """All of a DTensor, on every rank; another tensor as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _check_freezes(model: nn.Module) -> None:
    for name, module in _prepared(model):
        quantizer = module.weight_quantizer
        if isinstance(quantizer, FakeQuantize) and quantizer.range == "tensor" and quantizer.spec.two_level is not None:
            raise PhiquantError(
                f"{name}: {quantizer.spec} has two levels of scales, which are not frozen on the way; "
                "prepare_qat(..., range='mse') keeps them from the start"
            )
        if any(True for _ in quantizer.parameters()):
            raise PhiquantError(
                f"{name}: a learned grid is trained to the end; leave freeze out, or let its learning rate fall"
            )


def _refuse_cast(model: nn.Module) -> None:
    for name, module in model.named_modules():
        state = getattr(module, "_get_fsdp_state", None)
        policy = getattr(state() if state is not None else None, "_mp_policy", None)
        dtype = getattr(policy, "param_dtype", None)
        if dtype is not None and any(p.dtype != dtype for p in module.parameters()):
            raise PhiquantError(
                f"{name or 'the model'}: MixedPrecisionPolicy(param_dtype={dtype}) casts the weights before their grid "
                "sees them, so the codes of the weights kept are not those that were trained; use torch.autocast, "
                "which casts what comes from the grid"
            )
