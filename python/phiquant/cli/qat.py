"""`phiquant qat`: train through the grid, keep the codes, export them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from .. import runs
from ..export import export as write
from ..load import EMBEDDED, load
from ..qat import Report, Settings
from ..qat import train as run_training
from ..spec import Target, with_bits
from ..weight_quantizers import Range
from .arguments import (
    CheckpointArg,
    OptionsOption,
    RecipeOption,
    TargetOption,
    argument,
    check_solver,
    output_folder,
    read_options,
    read_recipe,
    read_target,
    read_text,
)
from .session import DebugFlag, JsonFlag, Ui, files_table, session

OutOption = Annotated[Path, typer.Option("--out", "-o", help="Folder for the files, the run and the log.")]
TrainText = Annotated[
    Path | None,
    typer.Option(
        "--text", help=f"A UTF-8 text to train on. {EMBEDDED} alone has one of its own: the standard library."
    ),
]


def qat(
    checkpoint: CheckpointArg,
    target: TargetOption,
    out: OutOption,
    bits: Annotated[
        int | None, typer.Option(min=2, max=8, help="Codes of fewer bits on the target's grid, such as 3.")
    ] = None,
    recipe: RecipeOption = None,
    text: TrainText = None,
    steps: Annotated[int, typer.Option(min=0, help="Training steps at most.")] = Settings.steps,
    minutes: Annotated[float | None, typer.Option(min=0.01, help="Stop by time as well.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Windows in a step.")] = Settings.batch,
    window: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = Settings.window,
    range_: Annotated[
        str, typer.Option("--range", help=f"Where a grid's range comes from: {', '.join(get_args(Range))}.")
    ] = "mse",
    start: Annotated[
        str | None, typer.Option(help="A solver whose codes training starts from, calibrated on the text: gptq_mse.")
    ] = None,
    blocks: Annotated[
        int, typer.Option(min=0, help="Steps for each decoder layer alone first, which needs little memory.")
    ] = 0,
    end_to_end: Annotated[
        str, typer.Option(help="What is trained after blocks: scales (the codes stay) or all; --steps 0: nothing.")
    ] = Settings.end_to_end,
    rank: Annotated[
        int, typer.Option(min=0, help="Train adapters of this rank (LoRA), merged into the grid; 0: the weights.")
    ] = 0,
    activations: Annotated[
        str | None, typer.Option(help="A grid that linears round what they read to as well, such as int8-token-sym.")
    ] = None,
    observer: Annotated[
        str | None, typer.Option(help="What finds the range of activations per tensor: ema, minmax, percentile ...")
    ] = None,
    freeze: Annotated[
        float, typer.Option(min=0, max=1, help="From this share of the steps on, observers keep their ranges.")
    ] = Settings.freeze,
    learning_rate: Annotated[float, typer.Option(help="AdamW's for weights, at its peak.")] = Settings.learning_rate,
    scale_learning_rate: Annotated[
        float, typer.Option(help="That of learned scales and levels, as a share of their mean size.")
    ] = Settings.scale_learning_rate,
    language_model: Annotated[
        float,
        typer.Option(min=0, max=1, help="Share of the plain language-model loss; 0 distils from the float model."),
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the order of the windows.")] = 0,
    option: OptionsOption = None,
    json_: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Train CHECKPOINT through the target's grid, distilled from its float self; convert and export the codes.

    The run is kept in OUT/run: the same command continues after an interruption, and `phiquant export OUT`
    writes the same codes in another format.
    """
    with session(json_, debug) as ui:
        chosen, base = read_target(target), read_recipe(recipe)
        if base and bits:
            raise typer.BadParameter("a recipe says the bits itself; leave one of the two out", param_hint="--bits")
        what = base or _with_bits(chosen, bits)
        options = chosen.options | read_options(option, chosen.format)
        if range_ not in get_args(Range):
            raise typer.BadParameter(f"{range_!r} is not one of {', '.join(get_args(Range))}", param_hint="--range")
        if start is not None:
            check_solver(start)
        with argument("--learning-rate"):
            settings = Settings(
                steps=steps,
                seconds=60 * minutes if minutes else None,
                batch=batch,
                window=window,
                learning_rate=learning_rate,
                scale_learning_rate=scale_learning_rate,
                freeze=freeze,
                block_steps=blocks,
                end_to_end=end_to_end,  # type: ignore[arg-type]
                language_model=language_model,
                seed=seed,
            )
        words = read_text(text)
        if words is None and checkpoint != EMBEDDED:
            raise typer.BadParameter(f"{checkpoint} needs a text to train on", param_hint="--text")
        ui.log_to(output_folder(out) / "phiquant.log")
        model, tokenizer = load(checkpoint)
        how = {"range": range_, "start": start, "rank": rank, "activations": activations, "observer": observer}
        report = train(ui, model, tokenizer, what, words, settings, out / "run", **how)
        runs.save(model, checkpoint, out / "run", training=report)
        with ui.progress("writing") as step:
            receipt = write(model, tokenizer, out, format=chosen.format, progress=step, **options)
        show(ui, out, receipt, report)


def train(
    ui: Ui,
    model: Any,
    tokenizer: Any,
    what: Any,
    text: str | None,
    settings: Settings,
    folder: Path | None,
    **how: Any,
) -> dict[str, Any]:
    """qat.train with a bar; returns what a result says of the run. how: its options, such as range."""
    with ui.progress("training") as step:

        def progress(share: float, report: Report) -> None:
            at = report.curve[-1] if report.curve else (0, float("nan"))  # layers of a run before: none trained
            step(f"step {at[0]}, loss {at[1]:.4f}", int(100 * share), 100)

        done = run_training(
            model, tokenizer, what, text=text, settings=settings, folder=folder, progress=progress, **how
        )
    return done.to_dict()


def show(ui: Ui, out: Path, receipt: dict[str, Any], report: dict[str, Any]) -> None:
    """The result of the command: what was trained, what was written."""
    curve = report["curve"]
    line = f"{report['steps']} steps, {report['tokens']:,} tokens, {report['seconds']:.0f} s"
    if curve:
        line += f"; loss {curve[0][1]:.4f} at first, {curve[-1][1]:.4f} at the end"
    ui.result({"ok": True, "out": str(out), "training": report, "files": receipt["files"]}, line, files_table(receipt))


def _with_bits(target: Target, bits: int | None) -> Any:
    if target.mixture is not None and bits is None:
        return target
    if target.spec is None:
        raise typer.BadParameter(f"{target.name} stores floats; there is no grid to train on", param_hint="--target")
    if bits is None:
        return target
    if bits > target.spec.element.bits:
        raise typer.BadParameter(
            f"{target.name} holds {target.spec.element.bits}-bit codes, not {bits}", param_hint="--bits"
        )
    return with_bits(target.spec, bits)
