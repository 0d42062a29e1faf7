"""quantize(): float model to codes at once. prepare_qat() and convert(): by way of training."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from .auto import Candidate, auto, is_auto
from .calibrate import Calibration, calibrate, token_windows, told
from .calibration_layers import ModelLayers
from .errors import PhiquantError
from .input_quantizers import input_quantizer, round_inputs
from .modules import (
    QAT_CLASS,
    Origin,
    QATEmbedding,
    QATLinear,
    QuantizedEmbedding,
    QuantizedLinear,
    Quantizer,
    to_qat,
    to_quantized,
)
from .observers import Kind
from .ranks import ALONE, Ranks
from .recipe import Recipe, as_recipe
from .solvers import NEEDS_STATISTICS, quantize_tensor
from .spec import QuantSpec, Target
from .split_linear import projection_name, split
from .tensor import QuantizedTensor
from .transforms import WITH_TRANSFORMS, applied, transform
from .weight_quantizers import CONTINUED, Range, for_codes, for_weight

Model = TypeVar("Model", bound=nn.Module)
What = Recipe | QuantSpec | Target | str
Progress = Callable[[str, int, int], None]  # (name of the layer, layers done, layers in all)


@torch.no_grad()
def quantize(
    model: Model,
    what: What,
    solver: str = "rtn",
    progress: Progress | None = None,
    *,
    calibration: Calibration | None = None,
    tokenizer: Any = None,
    folder: str | Path | None = None,
    offload: bool = False,
    transforms: Sequence[str] = (),
    activations: str | QuantSpec | None = None,
    observer: Kind | None = None,
    ranks: Ranks = ALONE,
) -> Model:
    """Choose codes for the model's Linear (and, if the recipe names them, Embedding) weights, in place.

    what: a target ("gguf:Q4_0"), a spec ("int4-g32-sym") or a Recipe. With the first two, lm_head and
        the embedding stay in float.
        Where a recipe gives q, k, v or gate, up different specs, their fused linear becomes a SplitLinear.
    solver: "rtn" (range from the extremes), "mse" (the best of some ranges in squared error), "mse_exact" (of all);
        with calibration data "gptq" or "gptq_mse" (on the grid of rtn or mse), "adaround", "clip" (docs/methods.md),
        "awq" (the transform, then clip), "auto" (the best of all by measurement, "auto:gptq,awq+gptq" of these).
    calibration: texts (with `tokenizer`) or windows of token ids [n, T]; a Phi-3 model is then solved decoder layer
        by decoder layer. A solver that needs data and is given none takes testing.training_text().
    folder: where a calibrated run keeps its finished layers, so that the same call goes on after an interruption.
        offload: keep its activations there too, not in memory.
    transforms: rewrites that come first and leave the float function alone (see `transform`): ["fold"].
    activations: the grid that linears with codes round what they read to ("int8-token-sym"), by themselves or, per
        tensor, on ranges that an observer ("minmax", "ema", "percentile", "mse", "kl") finds on the calibration data.
    ranks: processes that all make this call and share the work of the calibration (docs/training-engines.md).
    Returns the model. On an error (a non-finite weight, a group size that does not divide) it is unchanged, but for
    its transforms.
    """
    specs = _specs(model, what)
    if activations is not None:
        input_quantizer(activations, observer)  # refuses before anything is done
    before, solver = WITH_TRANSFORMS.get(solver, ((), solver))
    if transforms := (*transforms, *before):
        transform(model, transforms, specs=specs, calibration=calibration, tokenizer=tokenizer)
    place = None if folder is None else Path(folder)
    if is_auto(solver):
        if ranks.world > 1:
            raise PhiquantError("auto compares whole models in one process; name a solver to share its work")

        def attempt(copied: Model, candidate: Candidate, ids: torch.Tensor, place: Path | None) -> Model:
            data = {"calibration": ids, "folder": place, "offload": offload} if candidate.data else {}
            return quantize(copied, what, candidate.solver, progress, transforms=candidate.transforms, **data)  # type: ignore[arg-type]

        grids = json.dumps({name: str(spec) for name, spec in specs.items()})
        auto(model, solver, grids, token_windows(calibration, tokenizer), attempt, place)
    else:
        _quantize(model, specs, solver, progress, calibration, tokenizer, place, offload, ranks)
    if activations is not None:
        round_inputs(model, activations, observer, calibration=calibration, tokenizer=tokenizer)
    return model


def _quantize(
    model: nn.Module,
    specs: dict[str, QuantSpec | None],
    solver: str,
    progress: Progress | None,
    calibration: Calibration | None,
    tokenizer: Any,
    place: Path | None,
    offload: bool,
    ranks: Ranks,
) -> None:
    """One solver for all layers."""
    with split(model, specs):
        groups = _groups(model, specs)
        if calibration is not None or solver in NEEDS_STATISTICS:
            ids = token_windows(calibration, tokenizer)
            grids = {names[0]: spec for names, _, spec in groups}
            found = calibrate(
                *(ModelLayers(model), grids, solver, ids),
                folder=place,
                offload=offload,
                progress=progress,
                ranks=ranks,
            )
            solved = [
                (modules, found.read(names[0]), told(names[0], spec, solver, ids, len(names) > 1))
                for names, modules, spec in groups
            ]
        else:
            chosen_by = {"solver": solver}
            solved = [(modules, quantized, chosen_by) for modules, quantized in _solve(groups, solver, progress)]
    rewritten = {"transforms": applied(model)} if applied(model) else {}
    for modules, quantized, origin in solved:
        _attach(modules, quantized, {**origin, **rewritten})
    if progress:
        progress("done", len(groups), len(groups))


def _solve(
    groups: list[tuple[list[str], list[nn.Module], QuantSpec]], solver: str, progress: Progress | None
) -> Iterator[tuple[list[nn.Module], QuantizedTensor]]:
    for done, (names, modules, spec) in enumerate(groups):
        if progress:
            progress(names[0], done, len(groups))
        weight: torch.Tensor = modules[0].get_parameter("weight").detach()
        yield modules, quantize_tensor(weight, spec, solver=solver, name=f"{names[0]}.weight")


def prepare_qat(
    model: Model,
    what: What | None = None,
    range: Range = "tensor",
    *,
    activations: str | QuantSpec | None = None,
    observer: Kind | None = None,
) -> Model:
    """Let the model train through its grids, in place: what trains is what convert() will store.

    what: a target, a spec or a Recipe. None: go on with a model that has codes (of load() or quantize()): its layers
        start from the decoded weights on the very grids they have, and convert() gives the same codes again where
        nothing was trained.
    range: where a grid's range comes from (docs/qat.md).
        "tensor": the weight as it is in each step. "observer": the extremes that the weight has had so far. "mse": what
        the mse solver finds for the weight as it is now, kept through training.
        "learned": starts there and is trained with the weights (LSQ; with an offset LSQ+; of a codebook its levels).
        "lsq", "lsq+": the same from the papers' starts. "clip": the share of the extremes that is used is trained.
        "ternary": TTQ, for the spec "codebook3-tensor". "scales": the codes stay, of the mse solver or those that the
        model has, and scales or levels alone are trained.
        Going on with codes, "learned", "lsq", "lsq+" and "scales" train their grid, the others keep it.
    What is trained beside the weights are new parameters under `weight_quantizer`, that an optimizer must be given:
    `learned_parameters(model)`.
    activations: as in quantize(); with an observer, it sees what linears read while the model is in training mode, and
        convert() fixes the range.
    The weights stay the same objects under the same names: optimizers made before keep working. (But where a recipe
    gives q, k, v or gate, up different specs, the fused linear becomes a SplitLinear of new ones.)
    Returns the model. On an error it is unchanged.
    """
    if activations is not None:
        input_quantizer(activations, observer)  # refuses before anything is done
    if what is None:
        _continue(model, range)
        return model if activations is None else round_inputs(model, activations, observer)
    specs = _specs(model, what)
    made = []
    with split(model, specs):
        for names, modules, spec in _groups(model, specs):
            weight = modules[0].get_parameter("weight")
            made.append((modules, for_weight(names[0], weight, spec, range)))
    for modules, quantizer in made:
        for module in modules:
            to_qat(module, quantizer, {"solver": "qat", "range": range})
    return model if activations is None else round_inputs(model, activations, observer)


def _continue(model: Model, range: Range) -> Model:
    """Let the layers that hold codes train on, each on its own grid."""
    quantizers: dict[int, Quantizer] = {}
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, QuantizedLinear | QuantizedEmbedding)]
    if not layers:
        raise PhiquantError(f"{type(model).__name__} has no codes to go on with; name a grid: prepare_qat(model, spec)")
    for name, module in layers:
        quantizers.setdefault(id(module.weight), for_codes(name, module.checked(name), range))
    for _, module in layers:
        told = range if range in CONTINUED else "stored"
        origin = {"solver": "qat", "range": told, "from": module.weight_quantizer.origin}
        to_qat(module, quantizers[id(module.weight)], origin)
    return model


@torch.no_grad()
def convert(model: Model, progress: Progress | None = None, *, trained: Mapping[str, Any] | None = None) -> Model:
    """Store the codes of a model trained after prepare_qat(), in place.

    The codes decode to exactly the weights that the last forward computed with. trained: what the receipt shall
    tell of the training, {"steps": 600, ...}. Returns the model.
    """
    groups: dict[int, list[tuple[str, QATLinear | QATEmbedding]]] = {}
    for name, module in model.named_modules():
        if isinstance(module, QATLinear | QATEmbedding):
            groups.setdefault(id(module.weight), []).append((name, module))
    if not groups:
        raise PhiquantError(f"{type(model).__name__} has no layer in training; call prepare_qat(model, spec) first")
    solved: list[tuple[list[nn.Module], QuantizedTensor, Origin]] = []
    for done, members in enumerate(groups.values()):
        name, first = members[0]
        if progress:
            progress(name, done, len(groups))
        if hasattr(first.weight, "full_tensor"):
            raise PhiquantError(
                f"{name}.weight is sharded; gather(model, whole) brings the weights together (docs/training-engines.md)"
            )
        if not torch.isfinite(first.weight).all():
            raise PhiquantError(f"{name}.weight is not finite after training; lower the learning rate")
        origin = {**first.origin, **(trained or {})}
        quantized = first.weight_quantizer.quantize(first.weight.detach())
        solved.append(([module for _, module in members], quantized, origin))
    for modules, quantized, origin in solved:
        _attach(modules, quantized, origin)
    if progress:
        progress("done", len(groups), len(groups))
    return model


def _attach(modules: list[nn.Module], quantized: QuantizedTensor, origin: Origin) -> None:
    dtype = modules[0].get_parameter("weight").dtype
    weight = nn.Parameter(quantized.dequantize(dtype), requires_grad=False)
    for module in modules:
        to_quantized(module, quantized, weight, origin)


def _specs(model: nn.Module, what: What) -> dict[str, QuantSpec | None]:
    """The spec of every weight, by the name that a recipe calls it."""
    _refuse_twice(model)
    layers = [projection_name(name) for name, module in model.named_modules() if type(module) in QAT_CLASS]
    if not layers:
        raise PhiquantError(f"{type(model).__name__} has no torch.nn.Linear or Embedding to quantize")
    return as_recipe(what, getattr(model, "config", None)).resolve(layers)


def _groups(
    model: nn.Module, by_name: dict[str, QuantSpec | None]
) -> list[tuple[list[str], list[nn.Module], QuantSpec]]:
    """(names, modules, spec) of every weight to quantize; more than one module where layers share a weight."""
    layers = {name: module for name, module in model.named_modules() if type(module) in QAT_CLASS}
    specs = {name: by_name[projection_name(name)] for name in layers}
    tied: dict[int, list[str]] = {}
    for name, module in layers.items():
        tied.setdefault(id(module.get_parameter("weight")), []).append(name)
    chosen = []
    for names in tied.values():
        if len({specs[name] for name in names}) > 1:
            choices = "; ".join(f"{name}: {specs[name] or 'float'}" for name in names)
            raise PhiquantError(f"these layers share one weight, so a recipe must give them the same spec: {choices}")
        spec = specs[names[0]]
        if spec is not None:
            chosen.append((names, [layers[name] for name in names], spec))
    return chosen


def _refuse_twice(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, QATLinear | QATEmbedding):
            raise PhiquantError(f"{name} is already prepared for QAT; convert(model) comes next")
        if isinstance(module, QuantizedLinear | QuantizedEmbedding):
            raise PhiquantError(
                f"{name} is already quantized to {module.quantized.spec}; codes are chosen once: load the float model "
                "to choose others, or go on with these by prepare_qat(model) without a grid"
            )
