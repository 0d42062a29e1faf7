"""repack(): an exported model in another format, code for code. Nothing is rounded; what does not fit is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .errors import PhiquantError
from .export import claim_folder, sign
from .formats import receipt as receipts
from .formats.detect import existing
from .formats.registry import find
from .formats.source import Progress
from .reader_source import ReaderSource
from .targets import target as find_target


def repack(
    path: str | Path,
    target: str,
    out: str | Path,
    *,
    tokenizer: str | Path | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Write the model at `path`, a file or folder of any format, for `target` into `out`; return the receipt.

    target: "mlx:4bit-g32", where all tensors with codes are on that grid; or a format, "mlx": each tensor then keeps
        its words or gets the first target that is the same grid. options: of the format's writer.
    tokenizer: a folder with the tokenizer's files, where they are not beside the model.
    Tensors stream one by one. PhiquantError, before anything is written, for the first tensor that would have to
    change, and how: scale dtype, granularity, zero point, codebook ... (restate.py).
    """
    found, out = existing(path), Path(out)
    named = find_target(target) if ":" in target else None
    format = find(target.partition(":")[0])
    if named is not None and named.mixture is not None:
        raise PhiquantError(f"{target} chooses a grid for each layer, and the codes have theirs; give {format.name!r}")
    if out.exists() and out.samefile(found.folder):
        raise PhiquantError(f"{out} is the model itself; choose another folder for the output")
    options = (named.options if named else {}) | options
    place = None if tokenizer is None else Path(tokenizer)
    source = ReaderSource(found, format, named, place)
    claim_folder(out, format.name)
    receipt = format.writer().write(source, out, progress=progress, **options)
    if rounded := [record["name"] for record in receipt["tensors"] if not record["exact"]]:
        source = ReaderSource(found, format, named, place, widened=rounded)
        receipt = format.writer().write(source, out, progress=progress, **options)
    if rounded := [record["name"] for record in receipt["tensors"] if not record["exact"]]:
        receipts.remove(out)
        raise PhiquantError(f"{rounded[0]}: {format.name} would round its floats; convert never rounds")
    return sign(out, source.config)
