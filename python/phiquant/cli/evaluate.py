"""`phiquant eval`: perplexity, and the distance from a reference, of a checkpoint or an exported file."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .. import evaluate as measure
from .. import protocols, testing
from .arguments import LimitOption, TextOption, read_text
from .runners import in_torch, runner
from .session import DebugFlag, JsonFlag, session, table

ModelArg = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A checkpoint (run in torch), an exported file or folder of any format (its runtime), or 'phi3-tiny'.",
        show_default=False,
    ),
]
ReferenceOption = Annotated[
    str | None, typer.Option(help="Compare with this one, usually the float model: KL divergence, same top token.")
]
CacheOption = Annotated[
    str | None,
    typer.Option(
        metavar="GRID",
        help="Run in torch, keys and values stored on this grid of 8 bits, such as int8-token-sym-f16.",
        show_default="as they are",
    ),
]
_NAMES = {
    "perplexity": "perplexity per token",
    "word_perplexity": "perplexity per word",
    "byte_perplexity": "perplexity per byte",
    "bits_per_byte": "bits per byte",
    "reference_perplexity": "perplexity of the reference",
    "nll": "nats per token",
    "kl": "mean KL(reference || model), nats",
    "same_top": "same top token",
    "nll_diff": "nats per token more than the reference",
    "nll_diff_se": "standard error of that",
    "tokens": "tokens scored",
    "protocol": "protocol",
}


def evaluate(
    model: ModelArg,
    reference: ReferenceOption = None,
    text: TextOption = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 512,
    limit: LimitOption = None,
    protocol: Annotated[
        str,
        typer.Option(help="What is scored: 'window', 'llama.cpp' (the second half of each) or 'words' (as lm-eval)."),
    ] = "window",
    stride: Annotated[
        int | None, typer.Option(min=1, help="Tokens between two windows, of 'window'.", show_default="no overlap")
    ] = None,
    fast: Annotated[
        bool,
        typer.Option("--fast", help="In the runtime's default setting; without: in that which computes as torch."),
    ] = False,
    cache: CacheOption = None,
    json_: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Measure perplexity on a text, in the runtime that the file is made for."""
    with session(json_, debug) as ui:
        words = read_text(text) or testing.heldout_text()
        ours = runner(model, exact=not fast) if cache is None else in_torch(model, cache)
        rows = protocols.protocol(protocol, ours.tokenizer, words, window, stride, limit)
        ui.note(f"{len(rows.windows)} windows of up to {window} tokens in {ours.runtime}")
        result: Any
        if reference is None:
            result = measure.perplexity_from_logits(rows, ours.logits(rows.rows))
        else:
            theirs = runner(reference)
            if protocols.protocol(protocol, theirs.tokenizer, words, window, stride, limit).windows != rows.windows:
                raise ValueError(f"{model} and {reference} tokenize the text differently; they cannot be compared")
            result = measure.compare_logits(rows, ours.logits(rows.rows), theirs.logits(rows.rows))
        data = {"model": model, "runtime": ours.runtime, "reference": reference, **result.to_dict()}
        rows_out = table("what", "value>")
        for key, name in _NAMES.items():
            if key in data:
                value = data[key]
                rows_out.add_row(name, f"{value:.6g}" if isinstance(value, float) else str(value))
        ui.result(data, rows_out)
