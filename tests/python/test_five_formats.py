"""One QAT int4 model in every format: the same codes, every file what its receipt says, the same perplexity."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import phiquant as pq
import pytest
import torch
from phiquant import evaluate, qat
from phiquant.export import locate
from phiquant.extras import missing
from phiquant.formats import receipt
from phiquant.formats.registry import FORMATS
from phiquant.runtimes import check
from phiquant.same_codes import same_codes
from phiquant.testing import heldout_text, training_text

pytestmark = pytest.mark.slow
GRID = "gguf:Q4_0"
FIVE = ["gguf", "mlx", "onnx", "openvino", "safetensors"]
PERPLEXITY = {"gguf": 5e-3}  # llama.cpp rounds activations to 8 bits; the others: 1e-3
WINDOWS = 2


@pytest.fixture(scope="module")
def trained() -> tuple[Any, Any]:
    model, tokenizer = pq.load("phi3-tiny")
    teacher = copy.deepcopy(model)
    pq.prepare_qat(model, GRID, range="mse")
    ids = qat.encode(tokenizer, training_text(characters=200_000))
    qat.distill(model, teacher, ids, qat.Settings(steps=10, batch=4))
    return pq.convert(model.eval()), tokenizer


@pytest.fixture(scope="module")
def folders(trained: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("formats")
    for name in FIVE:
        if not missing(FORMATS[name].extra):
            pq.export(*trained, root / name, format=name)
    return {path.name: path for path in root.iterdir()}


@pytest.mark.parametrize("name", FIVE)
def test_every_file_verifies(folders: dict[str, Path], name: str) -> None:
    report = pq.verify(_there(folders, name))
    assert report.ok, str(report)


@pytest.mark.parametrize("name", FIVE[1:])
def test_the_codes_are_those_of_the_gguf_file(folders: dict[str, Path], name: str) -> None:
    compared = same_codes(_there(folders, "gguf"), _there(folders, name))
    assert compared.codes_ok, str(compared)


@pytest.mark.parametrize("name", FIVE)
def test_the_perplexity_in_the_exact_setting_is_that_of_torch(
    trained: tuple[Any, Any], folders: dict[str, Path], name: str
) -> None:
    model, tokenizer = trained
    ids = evaluate.windows(tokenizer, heldout_text(), 512, WINDOWS)
    expected = evaluate.perplexity_from_logits(ids, [v.float() for v in evaluate.model_logits(model, ids)]).perplexity
    folder = _there(folders, name)
    logits = check.runtime_of(FORMATS[name]).logits(locate(folder, receipt.read(folder)), ids, exact=True)
    got = evaluate.perplexity_from_logits(ids, [torch.tensor(values) for values in logits]).perplexity
    assert got == pytest.approx(expected, rel=PERPLEXITY.get(name, 1e-3))


def _there(folders: dict[str, Path], name: str) -> Path:
    if name not in folders:
        pytest.skip(f"{name}: {', '.join(missing(FORMATS[name].extra))} is not installed")
    return folders[name]
