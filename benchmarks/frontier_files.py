"""The frontier in whole files: ours and llama.cpp's own codes of one type, of one grid, both run by llama.cpp.

    python benchmarks/frontier_files.py [--windows 24] [--models phi3-tiny,twin] [--types Q4_K,..] [--solver ...]

Both are exported GGUF files; in one the linears of the decoder layers have ours, in the other the blocks that
llama.cpp's quantizer makes of the float weights, with an importance matrix of the same calibration windows. Logits
are llama.cpp's of both (it rounds activations to 8 bits), compared with the float model's in torch on held-out text.
ahead: NLL per token of theirs minus ours, paired, with its standard error. Bar: our KL is <= 0.85x of theirs.
"""

from __future__ import annotations

import argparse
import copy
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import phiquant as pq
from common import machine
from frontier import SAME_GRID, own_blocks
from phiquant.calibrate import token_windows
from phiquant.formats.gguf.guard import read_header
from phiquant.formats.gguf.hf_names import hf_name
from phiquant.runtimes import llamacpp

TYPES = ("Q4_K", "IQ4_XS", "Q3_K", "Q2_K")


def with_blocks(plain: Path, theirs: Path, kind: str, blocks: dict[str, np.ndarray]) -> None:
    """A copy of a file whose tensors of that type hold `blocks`."""
    shutil.copy(plain, theirs)
    places = {
        hf_name(place.name).removesuffix(".weight"): place for place in read_header(plain).tensors if place.kind == kind
    }
    assert places.keys() == blocks.keys(), "the exported file has other tensors of that type"
    with open(theirs, "r+b") as file:
        for name, place in places.items():
            assert place.bytes == blocks[name].nbytes
            file.seek(place.start)
            file.write(blocks[name].tobytes())


def exported(reference: Any, tokenizer: Any, kind: str, folder: Path, solver: str = "rtn", **options: Any) -> Path:
    made = pq.quantize(copy.deepcopy(reference), f"gguf:{kind}", solver, **options)
    pq.export(made, tokenizer, folder, format="gguf")
    return next(folder.glob("*.gguf"))


def compare(
    label: str, reference: Any, tokenizer: Any, kind: str, solver: str, known: Any, options: Any, rows: Any, logits: Any
) -> bool:
    with tempfile.TemporaryDirectory(prefix="phiquant-") as folder:
        place = Path(folder)
        ours = exported(reference, tokenizer, kind, place / "ours", solver, **options)
        plain, theirs = exported(reference, tokenizer, kind, place / "plain"), place / "theirs.gguf"
        with_blocks(plain, theirs, kind, own_blocks(reference, known, kind))
        one, other = (llamacpp.logits(path, rows) for path in (ours, theirs))
    a, b = (pq.evaluate.compare_logits(rows, run, logits) for run in (one, other))
    ahead, ok = pq.evaluate.compare_logits(rows, other, one), a.kl <= SAME_GRID * b.kl
    method = "+".join([*options["transforms"], solver])
    print(
        f"{label:9} {kind:6} {method:16} KL {a.kl:.5f}, theirs {b.kl:.5f}: {a.kl / b.kl:.3f}  "
        f"loss {a.nll_diff:.4f}, theirs {b.nll_diff:.4f}, ahead {ahead.nll_diff:.4f} +- {ahead.nll_diff_se:.4f}  "
        f"{'ok' if ok else 'MISSED'}",
        flush=True,
    )
    return ok


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=24, help="held-out windows of 512 tokens")
    parser.add_argument("--models", default="phi3-tiny,twin")
    parser.add_argument("--types", default=",".join(TYPES))
    parser.add_argument("--solver", default="gptq_refine")
    parser.add_argument("--transforms", default="", help="of ours, joined by '+': fold")
    args = parser.parse_args()
    model, tokenizer = pq.load("phi3-tiny")
    rows = pq.evaluate.windows(tokenizer, pq.testing.heldout_text(), limit=args.windows)
    print(f"{machine()}, xllamacpp {pq.formats.receipt.version('xllamacpp')}")
    ids, ok = token_windows(None, tokenizer), True
    options = {"calibration": ids, "transforms": args.transforms.split("+") if args.transforms else []}
    for label in args.models.split(","):
        reference = pq.testing.outlier_twin(model) if label == "twin" else model
        logits = list(pq.evaluate.model_logits(reference, rows))
        known = pq.imatrix.collect(reference, ids)
        for kind in args.types.split(","):
            ok &= compare(label, reference, tokenizer, kind, args.solver, known, options, rows, logits)
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main()
