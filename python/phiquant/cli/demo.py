"""`phiquant demo`: the whole job on the embedded model, in one table."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import evaluate, testing
from ..export import export, verify
from ..formats.detect import existing
from ..load import EMBEDDED, load
from ..qat import Settings
from ..quantize import quantize
from ..runtimes import llamacpp
from ..spec import spec, with_bits
from . import demo_all
from .arguments import output_folder
from .inspect import bits_of_layers
from .qat import train
from .runners import Rows, in_runtime
from .session import DebugFlag, JsonFlag, Ui, session, size, table

PROMPT = "def read_lines(path):\n"
TEXT = 3_000_000  # characters, about a million tokens: more than a training of a few minutes sees
FLOAT, QAT = "float", "qat"


@dataclass(frozen=True)
class Case:
    """One model of the demo: how its codes are chosen, on which grid, and the targets its codes are written to."""

    method: str  # float, rtn, mse or qat
    bits: int
    targets: tuple[str, ...]

    @property
    def title(self) -> str:
        return FLOAT if self.method == FLOAT else f"{self.method.upper()}, {self.bits} bits"

    def folder(self, target: str) -> str:
        return f"{self.method}{self.bits}-{target.partition(':')[2]}"


@dataclass(frozen=True)
class Row:
    """One written file: what the table shows of it."""

    method: str
    file: str
    bytes: int
    bits_per_weight: float
    perplexity_torch: float
    perplexity_runtime: float
    runtime: str
    kl_to_float: float
    same_top_as_torch: float
    codes_verified: bool


CASES = (
    Case(FLOAT, 16, ("gguf:F16",)),
    Case("rtn", 8, ("gguf:Q8_0",)),
    Case("mse", 8, ("safetensors:int8-channel",)),
    Case("rtn", 4, ("gguf:Q4_0",)),
    Case("mse", 4, ("gguf:Q4_0", "safetensors:int4-g32")),
    Case("mse", 4, ("gguf:Q4_1",)),
    Case(QAT, 4, ("gguf:Q4_0", "safetensors:int4-g32")),
    Case("rtn", 3, ("gguf:Q4_0",)),
    Case("mse", 3, ("gguf:Q4_0",)),
    Case(QAT, 3, ("gguf:Q4_0",)),
)


ONE = Case(QAT, 4, ("gguf:Q4_0",))  # of `demo --all`


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the files.")] = Path("phiquant-demo"),
    seconds: Annotated[float, typer.Option(min=1, help="Training time of each QAT model.")] = 70,
    windows: Annotated[int, typer.Option(min=1, help="Windows of 512 held-out tokens to evaluate on.")] = 24,
    all_: Annotated[
        bool, typer.Option("--all", help="Instead: one set of codes in every format, each file in its runtime.")
    ] = False,
    json_: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Quantize phi3-tiny by RTN, MSE and QAT, export it, run every file in its own runtime, and print one table."""
    with session(json_, debug) as ui:
        began = time.monotonic()
        ui.log_to(output_folder(out) / "demo.log")
        if all_:
            _all(ui, out, seconds, windows)
            return
        rows, sample = run_cases(ui, CASES, out, seconds, windows)
        spent = time.monotonic() - began
        ok = all(row.codes_verified for row in rows)
        report = {"ok": ok, "rows": [asdict(row) for row in rows], "sample": sample, "seconds": spent}
        ui.result(report, show(rows), *legend(windows, spent), "", *sample_lines(sample))
        if not ok:
            raise typer.Exit(1)


def _all(ui: Ui, out: Path, seconds: float, windows: int) -> None:
    """One QAT model in every format."""
    began = time.monotonic()
    _, tokenizer = load(EMBEDDED)
    model = make_model(ui, ONE, tokenizer, out, seconds)
    measured = demo_all.in_torch(model, tokenizer, windows)
    rows = list(demo_all.rows(ui, model, tokenizer, out, measured))
    spent = time.monotonic() - began
    report = demo_all.report(rows, measured, spent)
    ui.result(report, *demo_all.show(rows, measured, spent))
    if not report["ok"]:
        raise typer.Exit(1)


def run_cases(
    ui: Ui, cases: Sequence[Case], out: Path, seconds: float, windows: int
) -> tuple[list[Row], dict[str, str]]:
    """The rows of all cases, and the continuation of PROMPT by the last GGUF file of each method."""
    reference, tokenizer = load(EMBEDDED)
    ids = evaluate.windows(tokenizer, testing.heldout_text(), 512, windows)
    float_logits = list(evaluate.model_logits(reference, ids))
    rows: list[Row] = []
    sample: dict[str, str] = {}
    for case in cases:
        ui.note(f"{case.title}: {', '.join(case.targets)}")
        model = make_model(ui, case, tokenizer, out, seconds)
        logits = list(evaluate.model_logits(model, ids))
        distance = evaluate.compare_logits(ids, logits, float_logits)
        for target in case.targets:
            folder = out / case.folder(target)
            receipt = export(model, tokenizer, folder, format=target.partition(":")[0])
            rows.append(run_file(case, folder, receipt, ids, logits, distance.kl))
        if case.method in (FLOAT, QAT):
            sample[case.title] = _generate(out / case.folder(case.targets[0]))
    return rows, sample


def make_model(ui: Ui, case: Case, tokenizer: Any, out: Path, seconds: float) -> Any:
    """A fresh phi3-tiny with the codes of `case`."""
    model, _ = load(EMBEDDED)
    if case.method == FLOAT:
        return model
    grid = spec(case.targets[0])
    if case.bits != grid.element.bits:
        grid = with_bits(grid, case.bits)
    if case.method == QAT:
        text = testing.training_text(characters=TEXT)
        train(ui, model, tokenizer, grid, text, Settings(steps=100_000, seconds=seconds), None)
    else:
        quantize(model, grid, solver=case.method)
    return model


def run_file(
    case: Case, folder: Path, receipt: dict[str, Any], ids: Rows, logits: Sequence[Any], kl_to_float: float
) -> Row:
    """Check the export in `folder` against its receipt, run it where it belongs, compare with torch's `logits`."""
    path = max((folder / name for name in receipt["files"]), key=lambda file: file.stat().st_size)
    found = existing(folder)
    run = in_runtime(found)
    same = evaluate.compare_logits(ids, run.logits(ids), logits)
    return Row(
        method=case.title,
        file=str(path.relative_to(folder.parent)),
        bytes=path.stat().st_size,
        bits_per_weight=bits_of_layers(found),
        perplexity_torch=same.reference_perplexity,
        perplexity_runtime=same.perplexity,
        runtime=run.runtime,
        kl_to_float=kl_to_float,
        same_top_as_torch=same.same_top,
        codes_verified=verify(folder).ok,
    )


def _generate(folder: Path) -> str:
    return llamacpp.generate(next(folder.glob("*.gguf")), PROMPT, max_new_tokens=48).text


def show(rows: Sequence[Row]) -> Any:
    """The table."""
    made = table(
        "method", "file", "size>", "bits per\nweight>", "perplexity\nin torch>", "perplexity in\nits runtime>",
        "KL to\nfloat>", "same top token\nas torch>", "codes\nverified",
    )  # fmt: skip
    for row in rows:
        made.add_row(
            row.method,
            row.file,
            size(row.bytes),
            f"{row.bits_per_weight:.2f}",
            f"{row.perplexity_torch:.3f}",
            f"{row.perplexity_runtime:.3f}",
            f"{row.kl_to_float:.4f}",
            f"{100 * row.same_top_as_torch:.2f} %",
            "yes" if row.codes_verified else "NO",
        )
    return made


def legend(windows: int, seconds: float) -> list[str]:
    """What the columns mean."""
    return [
        f"{windows} windows of 512 tokens that the model never saw. GGUF files ran in llama.cpp, which rounds",
        "activations to 8 bits on its own; safetensors folders in transformers. Bits per weight: of the decoder's",
        "linear layers, scales included; 3-bit codes lie in a 4-bit container. Embedding and head stay float.",
        f"Took {seconds / 60:.1f} minutes.",
    ]


def sample_lines(sample: dict[str, str]) -> list[str]:
    """The generated code, one piece for each method."""
    lines = []
    for title, text in sample.items():
        lines += [f"--- {title}, in llama.cpp:", PROMPT + text.rstrip(), ""]
    return lines
