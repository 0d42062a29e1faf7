"""The bars of the runtimes, each row from the files themselves.

    python benchmarks/runtimes.py [--only targets files floats tokenizers] [--export FILE ...] [--json FILE]

targets     every target: codes and parameters by the independent reader; the format's own decode against ours
files       one QAT int4 model in every format: the same codes, perplexities, logits exact and by default, greedy text
floats      phi3-tiny as a float file in every format: logits, greedy text
tokenizers  ids of 200 texts against Hugging Face's, both kinds of vocabulary
--export    files that benchmarks/export.py wrote with --json: export time and memory

A format that is added to formats/registry.py appears by itself. The trained model is kept in --model (build/qat-int4).
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import phiquant as pq
import torch
from common import machine
from phiquant import evaluate, qat
from phiquant.export import locate
from phiquant.extras import missing
from phiquant.formats import receipt
from phiquant.formats.registry import FORMATS, Format
from phiquant.runtimes import check
from phiquant.same_codes import same_codes
from phiquant.testing import heldout_text, miniature, random_phi3, training_text

GRID = "gguf:Q4_0"  # int4, groups of 32: every format holds it
WINDOWS, WINDOW, NEW_TOKENS = 4, 512, 64
PROMPT = "def read_lines(path):\n"
PERPLEXITY, PERPLEXITY_LLAMA, DEFAULT = 1e-3, 5e-3, 3e-2
LOGITS = {"onnx": 2e-6, "openvino": 2e-6, "mlx": 1e-5, "safetensors": 1e-6}  # others: what verify --run allows
TEXTS = Path(__file__).parents[1] / "tests" / "data" / "tokenizer_texts.json"


@dataclass
class Row:
    """One figure. bar: the most it may be; None: told without a bar. note: what else there is to say."""

    section: str
    name: str
    figure: float | None
    bar: float | None = None
    note: str = ""

    @property
    def ok(self) -> bool:
        return self.figure is None or self.bar is None or self.figure <= self.bar

    def __str__(self) -> str:
        figure = "" if self.figure is None else f"{self.figure:.3g}"
        bar = "" if self.bar is None else f"{self.bar:.3g}"
        verdict = "" if self.bar is None or self.figure is None else "ok" if self.ok else "MISSED"
        return f"{self.section:10} {self.name:46} {figure:>10} {bar:>8} {verdict:6} {self.note}"


def ulps(a: np.ndarray, b: np.ndarray) -> int:
    """The most representable float32 values that lie between a and b."""
    order = [np.ascontiguousarray(x, np.float32).view(np.int32).astype(np.int64) for x in (a, b)]
    one, two = (np.where(x < 0, -(x & 0x7FFFFFFF), x) for x in order)
    return int(np.abs(one - two).max()) if one.size else 0


def targets(folder: Path, tokenizer: Any) -> Iterator[Row]:
    """Each target with a grid, on a random model of one layer, tied, so that the embedding is coded too."""
    for target in pq.TARGETS.values():
        format = FORMATS.get(target.format)
        if format is None or missing(format.extra):
            yield Row("targets", target.name, None, note="not run: its format or its runtime is not there")
            continue
        out = folder / target.name.replace(":", "-")
        try:
            model = random_phi3(hidden_size=256, intermediate_size=512, num_hidden_layers=1, tie_word_embeddings=True)
            if target.spec is not None:
                pq.quantize(model, target.name)
            dtype = None if target.spec else target.float_dtype
            pq.export(model, tokenizer, out, format=format.name, float_dtype=dtype)
            report = pq.verify(out)
            stored = format.reader_module().read(locate(out, receipt.read(out)))
            most = max(ulps(t.values(rows), t.reference(rows)) for t in stored.values() for rows in t.row_slices())
        except (pq.PhiquantError, ValueError, RuntimeError, ImportError) as error:
            yield Row("targets", target.name, None, note=f"not run: {str(error).splitlines()[0][:90]}")
            continue
        differing = sum(not tensor.ok for tensor in report.tensors) + len(report.files)
        yield Row("targets", target.name, differing, 0, f"of {len(report.tensors)} tensors differ; decode: {most} ulp")


def trained(folder: Path) -> tuple[Any, Any]:
    """phi3-tiny after a short QAT on GRID, and its tokenizer; kept as a folder that phiquant loads."""
    if (folder / receipt.NAME).is_file():
        return pq.load(folder)
    model, tokenizer = pq.load("phi3-tiny")
    teacher = copy.deepcopy(model)
    pq.prepare_qat(model, GRID, range="mse")
    ids = qat.encode(tokenizer, training_text(characters=400_000))
    qat.distill(model, teacher, ids, qat.Settings(steps=60, batch=4))
    model = pq.convert(model.eval())
    pq.export(model, tokenizer, folder, format="safetensors")
    return pq.load(folder)


class InTorch:
    """What torch computes with a model: logits of held-out windows, perplexity, greedy tokens."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.ids = evaluate.windows(tokenizer, heldout_text(), WINDOW, WINDOWS)
        self.logits = [values.float() for values in evaluate.model_logits(model, self.ids)]
        self.perplexity = evaluate.perplexity_from_logits(self.ids, self.logits).perplexity
        prompt = torch.tensor([tokenizer(PROMPT)["input_ids"]])
        made = model.generate(prompt, max_new_tokens=NEW_TOKENS, do_sample=False)[0, prompt.shape[1] :]
        self.tokens = made.tolist()


def in_runtime(
    section: str, format: Format, out: Path, torch_: InTorch, *, text: bool, perplexity: bool
) -> Iterator[Row]:
    runtime, path = check.runtime_of(format), locate(out, receipt.read(out))
    stored = format.reader_module().read(path)
    for exact in (True, False):
        got = [torch.tensor(values) for values in runtime.logits(path, torch_.ids, exact=exact)]
        compared = evaluate.compare_logits(torch_.ids, got, torch_.logits)
        setting = "exact" if exact else "default"
        bar = LOGITS.get(format.name, runtime.bar(stored, True)) if exact else DEFAULT
        error = check.relative_error(got, torch_.logits)
        name = f"{format.name}, {runtime.NAME}, {setting}"
        yield Row(section, f"{name}: logits", error, bar, f"same top token {100 * compared.same_top:.2f} %")
        if exact and perplexity:
            wanted = PERPLEXITY_LLAMA if format.name == "gguf" else PERPLEXITY
            off = abs(compared.perplexity / torch_.perplexity - 1)
            yield Row(section, f"{name}: perplexity", off, wanted, f"{compared.perplexity:.4f}")
    made = runtime.generate(path, PROMPT, max_new_tokens=NEW_TOKENS).tokens
    same = next((i for i, (a, b) in enumerate(zip(made, torch_.tokens, strict=False)) if a != b), len(torch_.tokens))
    missed = len(torch_.tokens) - same
    yield Row(section, f"{format.name}: greedy tokens unlike torch's", missed, 0 if text else None, f"of {NEW_TOKENS}")


def files(folder: Path, trained_in: Path) -> Iterator[Row]:
    model, tokenizer = trained(trained_in)
    torch_ = InTorch(model, tokenizer)
    yield Row("files", "torch: perplexity", torch_.perplexity)
    for format in FORMATS.values():
        out = folder / format.name
        try:
            pq.export(model, tokenizer, out, format=format.name)
            compared = same_codes(trained_in, out)
            yield Row("files", f"{format.name}: other codes than the model's", 0 if compared.codes_ok else 1, 0)
            yield from in_runtime("files", format, out, torch_, text=format.name != "gguf", perplexity=True)
        except (pq.PhiquantError, ImportError, RuntimeError) as error:
            yield Row("files", format.name, None, note=f"not run: {str(error).splitlines()[0][:90]}")


def floats(folder: Path) -> Iterator[Row]:
    model, tokenizer = pq.load("phi3-tiny")
    torch_ = InTorch(model, tokenizer)
    for format in FORMATS.values():
        out = folder / f"{format.name}-float"
        try:
            pq.export(model, tokenizer, out, format=format.name, float_dtype="float32")
            yield from in_runtime("floats", format, out, torch_, text=True, perplexity=False)
        except (pq.PhiquantError, ImportError, RuntimeError) as error:
            yield Row("floats", format.name, None, note=f"not run: {str(error).splitlines()[0][:90]}")


def tokenizers(folder: Path) -> Iterator[Row]:
    texts = json.loads(TEXTS.read_text(encoding="utf-8"))
    for vocabulary in ("phi-3-mini", "phi-4-mini"):
        model, tokenizer = miniature(vocabulary)
        expected = [tokenizer(text)["input_ids"] for text in texts]
        for format in FORMATS.values():
            out = folder / f"{format.name}-{vocabulary}"
            try:
                pq.export(model, tokenizer, out, format=format.name)
                got = check.runtime_of(format).tokenize(locate(out, receipt.read(out)), texts)
            except (pq.PhiquantError, ImportError, RuntimeError, AttributeError) as error:
                yield Row("tokenizers", f"{format.name}, {vocabulary}", None, note=f"not run: {str(error)[:90]}")
                continue
            other = sum(a != b for a, b in zip(got, expected, strict=True))
            note = f"of {len(texts)} texts differ; docs/runtimes/tokenizers.md names them"
            yield Row("tokenizers", f"{format.name}, {vocabulary}", other, 0, note)


def exports(paths: list[Path]) -> Iterator[Row]:
    """Times as ours / theirs, so that less is better like everywhere here: the bar of 3 is 0.333."""
    for path in paths:
        for found in json.loads(path.read_text(encoding="utf-8"))["results"]:
            ours, theirs = (
                np.median([run["seconds"] for run in found[side]] or [np.nan]) for side in ("ours", "theirs")
            )
            if found["theirs"]:
                note = f"{ours:.1f} s against {theirs:.1f} s: {theirs / ours:.1f}x"
                yield Row("export", f"{found['target']} / {found['peer']}: time", ours / theirs, 1 / 3, note)
            yield Row("export", f"{found['target']}: peak memory, GiB", found["peak"] / 2**30, 1.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sections = ("targets", "files", "floats", "tokenizers")
    parser.add_argument("--only", nargs="+", choices=sections, default=sections)
    parser.add_argument("--export", nargs="+", type=Path, default=[], metavar="FILE")
    parser.add_argument("--model", type=Path, default=Path("build/qat-int4"))
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    print(machine())
    made: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="phiquant-runtimes-") as place:
        folder = Path(place)
        runs: dict[str, Callable[[], Iterator[Row]]] = {
            "targets": lambda: targets(folder, pq.load("phi3-tiny")[1]),
            "files": lambda: files(folder, arguments.model),
            "floats": lambda: floats(folder),
            "tokenizers": lambda: tokenizers(folder),
        }
        for section in arguments.only:
            for row in runs[section]():
                made.append(row)
                print(row, flush=True)
        for row in exports(arguments.export):
            made.append(row)
            print(row)
    if arguments.json:
        rows = [{**asdict(row), "ok": row.ok} for row in made]
        arguments.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=2) + "\n")
    sys.exit(0 if all(row.ok for row in made) else 1)


if __name__ == "__main__":
    main()
