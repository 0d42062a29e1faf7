"""The small files of an OpenVINO folder: settings, and the tokenizer as two more graphs.

openvino_tokenizer.xml turns text into ids and openvino_detokenizer.xml ids into text, so that a program needs no
Python tokenizer to run the model.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from ...errors import PhiquantError
from ...extras import need
from ..companions import companions
from ..source import Source
from .ir import name_nodes

_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def small_files(source: Source) -> dict[str, bytes]:
    """Name and content of every small file but the graph itself. PhiquantError without a tokenizer."""
    found = {path.name: path.read_bytes() for path in companions(source.tokenizer_dir)}
    assert source.tokenizer_dir is not None
    found.setdefault("generation_config.json", _json({k: source.config[k] for k in _TOKENS if k in source.config}))
    settings = {key: value for key, value in source.config.items() if key not in ("auto_map", "quantization_config")}
    return {"config.json": _json(settings), **found, **_tokenizer_graphs(source.tokenizer_dir)}


def write_small(path: Path, data: bytes) -> None:
    """Write a file so that its name never stands for half of it."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _tokenizer_graphs(folder: Path) -> dict[str, bytes]:
    ov = need("openvino", extra="openvino")
    convert = need("openvino_tokenizers", extra="openvino").convert_tokenizer
    transformers = need("transformers", extra="hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    try:
        graphs = convert(tokenizer, with_detokenizer=True, skip_special_tokens=True)
    except Exception as error:
        raise PhiquantError(f"openvino_tokenizers cannot convert the tokenizer in {folder}: {error}") from error
    result: dict[str, bytes] = {}
    with tempfile.TemporaryDirectory(prefix="phiquant-") as place:
        for name, graph in zip(("openvino_tokenizer", "openvino_detokenizer"), graphs, strict=True):
            name_nodes(graph, inputs=True)
            ov.serialize(graph, Path(place, f"{name}.xml"), Path(place, f"{name}.bin"))
            result |= {f"{name}.{kind}": Path(place, f"{name}.{kind}").read_bytes() for kind in ("xml", "bin")}
    return result


def _json(data: dict[str, Any]) -> bytes:
    return (json.dumps(data, indent=2) + "\n").encode()
