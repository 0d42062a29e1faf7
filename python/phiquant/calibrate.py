"""Data-driven solvers over a whole model: decoder layer by decoder layer, on the inputs of the quantized prefix.

Beside the model, memory holds one decoder layer in float32 and the activations between two layers, or with a
folder for them the pages of a file. B = windows at a time, T = tokens in a window, D = hidden size.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .calibration_state import CalibrationState
from .errors import PhiquantError
from .evaluate import windows
from .models import phi
from .solvers import quantize_tensor
from .spec import Codebook, QuantSpec
from .statistics import Statistics
from .tensor import QuantizedTensor
from .testing import training_text

Calibration = str | Sequence[str] | Sequence[Sequence[int]] | Tensor
Choice = tuple[str, nn.Module, QuantSpec]  # name of a layer, the layer, its grid
Progress = Callable[[str, int, int], None]  # (name of the layer, layers done, layers in all)

WINDOW, WINDOWS = 512, 64  # tokens in a window, windows taken from a text
_BATCH = 8  # windows in one forward
_ROWS = 1024  # rows, evenly spaced, that the reported output error is measured on

_log = logging.getLogger("phiquant")


def token_windows(calibration: Calibration | None, tokenizer: Any = None) -> Tensor:
    """Token ids [n, T], int64: given ones as they are, or the first windows of texts (joined by <|endoftext|>).

    calibration: a text, texts, lists of ids of one length, or None for testing.training_text(), source code that
        suits phi3-tiny. Texts need the tokenizer. PhiquantError for anything else.
    """
    if isinstance(calibration, Tensor) and calibration.dim() == 2 and not calibration.is_floating_point():
        return calibration.long().cpu()
    if calibration is None:
        calibration = training_text(WINDOW * WINDOWS * 8)
    texts = [calibration] if isinstance(calibration, str) else list(calibration)
    if texts and all(isinstance(text, str) for text in texts):
        if tokenizer is None:
            raise PhiquantError("calibration texts need the model's tokenizer: quantize(..., tokenizer=tokenizer)")
        return torch.tensor(windows(tokenizer, "<|endoftext|>".join(texts), WINDOW, WINDOWS))
    lengths = {len(row) for row in texts}
    if len(lengths) != 1 or not lengths.pop():
        raise PhiquantError("calibration data is text, a list of texts, or ids: windows of one length, [n, T]")
    return torch.tensor(texts)


@torch.no_grad()
def calibrate(
    model: nn.Module,
    chosen: Sequence[Choice],
    solver: str,
    ids: Tensor,
    *,
    folder: Path | None = None,
    offload: bool = False,
    progress: Progress | None = None,
) -> dict[str, QuantizedTensor]:
    """Codes for the `chosen` layers of a Phi-3 model, which stays as it is, by name.

    Each decoder layer sees what the quantized layers before it make of the windows `ids` [n, T], and inside a layer
    each linear what the quantized linears before it make. The embedding (also where lm_head shares it) gets the
    nearest codes: it has no inputs to weigh errors by.
    folder: where finished layers are kept, so that a killed run goes on with the same bytes (on the same machine,
        with as many threads). offload: keep the activations there as well, in a file, not in memory.
    """
    layers = _layers(model)
    if offload and folder is None:
        raise PhiquantError("offload keeps activations in the folder of the run; give folder=")
    state = CalibrationState(folder, solver, ids, chosen)
    run = _Run(solver, state, progress, len(chosen))
    solved = run.layer("embedding", [c for c in chosen if c[0] == phi.EMBEDDING], None)
    with _first_inputs(model, ids, state.activations(offload), solved.get(phi.EMBEDDING)) as activations:
        for index, layer in enumerate(layers):
            prefix = f"model.layers.{index}."
            inside = {name.removeprefix(prefix): (name, m, s) for name, m, s in chosen if name.startswith(prefix)}
            parts = [
                at for part in phi.LAYER_LINEARS for at in inside if f"{at}.".startswith(f"{part}.")
            ]  # as they compute
            work = copy.deepcopy(layer).float().eval()
            solved |= run.layer(f"layer-{index:04}", [inside[part] for part in parts], (work, prefix, activations))
            activations.advance(work)
        head = [c for c in chosen if c[0] == phi.HEAD]
        if head:
            norm = copy.deepcopy(model.get_submodule(phi.FINAL_NORM)).float()
            activations.arguments = {}
            work = nn.Sequential()
            work.add_module("norm", norm)
            work.add_module(phi.HEAD, copy.deepcopy(head[0][1]).float())
            solved |= run.layer("head", head, (work, "", activations))
    missing = [name for name, _, _ in chosen if name not in solved]
    if missing:
        raise PhiquantError(f"{missing[0]} is no layer of a {phi.ARCHITECTURE}; give it a data-free solver")
    return solved


def output_error(w: Tensor, quantized: QuantizedTensor, statistics: Statistics) -> float:
    """Relative squared error of the layer's output, |(W - Q) X|^2 / |W X|^2, on at most 1024 rows of W."""
    rows = torch.linspace(0, len(w) - 1, min(len(w), _ROWS)).long()
    whole = w[rows].float().cpu()
    wrong = whole - quantized.dequantize()[rows].cpu()
    hessian = statistics.hessian.to(whole)
    size = ((whole @ hessian) * whole).sum(dtype=torch.float64)
    return float(((wrong @ hessian) * wrong).sum(dtype=torch.float64) / size) if size else 0.0


class _Stop(Exception):
    """The layer asked for has got its input; what comes after it is of no use yet."""


class _Activations:
    """What flows from one decoder layer to the next: hidden [n, T, D], and the arguments that come with it."""

    def __init__(self, hidden: Tensor, arguments: dict[str, Any]) -> None:
        self.hidden, self.arguments = hidden, arguments

    def _batches(self) -> Iterator[slice]:
        for start in range(0, len(self.hidden), _BATCH):
            yield slice(start, start + _BATCH)

    def advance(self, layer: nn.Module) -> None:
        """Replace the activations by the layer's output."""
        for batch in self._batches():
            result = layer(self.hidden[batch], **self.arguments)
            self.hidden[batch] = result[0] if isinstance(result, tuple) else result

    def statistics(self, layer: nn.Module, linear: nn.Module, features: int) -> Statistics:
        """Statistics of the input that `linear`, inside `layer`, gets."""
        seen = Statistics(features)

        def see(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            seen.update(arguments[0])
            raise _Stop

        hook = linear.register_forward_pre_hook(see)
        try:
            for batch in self._batches():
                with suppress(_Stop):
                    layer(self.hidden[batch], **self.arguments)
        finally:
            hook.remove()
        return seen


class _Run:
    """Solves or restores one group of layers after the other."""

    def __init__(self, solver: str, state: CalibrationState, progress: Progress | None, total: int) -> None:
        self.solver, self.state, self.progress, self.total = solver, state, progress, total
        self.done = 0

    def layer(
        self, key: str, chosen: Sequence[Choice], inputs: tuple[nn.Module, str, _Activations] | None
    ) -> dict[str, QuantizedTensor]:
        """Codes of these layers; inside the module of `inputs` their weights become the values of the codes."""
        if not chosen:
            return {}
        solved = self.state.read(key, {name: spec for name, _, spec in chosen})
        restored = solved is not None
        solved = solved or {}
        for name, module, spec in chosen:
            if self.progress:
                self.progress(name, self.done, self.total)
            weight = module.get_parameter("weight").detach()
            if inputs is None:
                solved.setdefault(name, quantize_tensor(weight, spec, nearest(spec), f"{name}.weight"))
            else:
                work, prefix, activations = inputs
                linear = work.get_submodule(name.removeprefix(prefix))
                if not restored:
                    statistics = activations.statistics(work, linear, weight.shape[1])
                    solved[name] = self._solve(name, weight, spec, statistics)
                linear.get_parameter("weight").data = solved[name].dequantize()
            self.done += 1
        if not restored:
            self.state.write(key, solved)
        return solved

    def _solve(self, name: str, weight: Tensor, spec: QuantSpec, statistics: Statistics) -> QuantizedTensor:
        began = time.monotonic()
        solved = quantize_tensor(weight, spec, self.solver, f"{name}.weight", statistics=statistics)
        before, after = (
            output_error(weight, quantized, statistics)
            for quantized in (quantize_tensor(weight, spec, nearest(spec), f"{name}.weight"), solved)
        )
        _log.info(
            "%s: output error %.2e nearest, %.2e %s; %s, %d tokens, %.1f s",
            *(name, before, after, self.solver, spec, statistics.tokens, time.monotonic() - began),
        )
        return solved


def nearest(spec: QuantSpec) -> str:
    """The solver of the layers without inputs to weigh errors by."""
    return "kmeans" if isinstance(spec.element, Codebook) else "rtn"


def _layers(model: nn.Module) -> nn.ModuleList:
    layers = getattr(getattr(model, "model", None), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise PhiquantError(f"calibration follows a {phi.ARCHITECTURE}; {type(model).__name__} has no model.layers")
    return layers


@contextmanager
def _first_inputs(
    model: nn.Module, ids: Tensor, file: Path | None, embedding: QuantizedTensor | None
) -> Iterator[_Activations]:
    """The activations before the first decoder layer, and the arguments with which the model calls its layers."""
    table = model.get_submodule(phi.EMBEDDING).get_parameter("weight").detach()
    if embedding is not None:
        table = embedding.dequantize()
    shape = (*ids.shape, table.shape[1])
    if file is None:
        hidden = torch.empty(shape)
    else:
        hidden = torch.from_file(str(file), shared=True, size=shape[0] * shape[1] * shape[2]).view(shape)
    for start in range(0, len(ids), _BATCH):
        batch = slice(start, start + _BATCH)
        hidden[batch] = F.embedding(ids[batch].to(table.device), table).float().cpu()
    caught: dict[str, Any] = {}

    def catch(_: nn.Module, arguments: tuple, named: dict[str, Any]) -> None:
        caught.update(named)
        raise _Stop

    first = _layers(model)[0]
    hooks = [
        first.register_forward_pre_hook(catch, with_kwargs=True),
        model.get_submodule(phi.EMBEDDING).register_forward_hook(lambda m, a, out: out.float()),
    ]
    try:
        with suppress(_Stop):
            model.get_submodule("model")(input_ids=ids[:1].to(table.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    caught.pop("hidden_states", None)
    try:
        yield _Activations(hidden, caught)
    finally:
        if file is not None:
            file.unlink(missing_ok=True)
