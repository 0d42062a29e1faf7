"""Every type on every miniature: exported, verified by the independent reader, decoded by gguf-py."""

from __future__ import annotations

from pathlib import Path

import phiquant as pq
import pytest
from phiquant import testing
from phiquant.formats.gguf.types import QUANTIZED
from phiquant.models import phi
from phiquant.recipe import Recipe

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ["phi-3-mini", "phi-3.5-mini", "phi-4-mini", "phi-4"])
def test_codes_and_parameters_are_those_of_the_model(name: str, tmp_path: Path) -> None:
    """The types go round the matrices, head and embedding among them; two files hold all sixteen."""
    for turn in range(2):
        model, tokenizer = testing.miniature(name)
        config = model.config.to_dict()
        modules = [tensor.removesuffix(".weight") for tensor, _ in phi.tensors(config)]
        matrices = [module for module in modules if phi.is_matrix(module)]
        kinds = {module: QUANTIZED[(8 * turn + i) % 16].name for i, module in enumerate(matrices)}
        if config["tie_word_embeddings"]:
            kinds[phi.HEAD] = kinds[phi.EMBEDDING]
        pq.quantize(model, Recipe({module: f"gguf:{kind}" for module, kind in kinds.items()}))
        receipt = pq.export(model, tokenizer, tmp_path / str(turn), format="gguf")
        stored = {record["name"].removesuffix(".weight"): record["stored_as"] for record in receipt["tensors"]}
        assert {m: kind.replace("TQ1", "TQ2") for m, kind in kinds.items() if m in stored} == {
            module: stored[module] for module in kinds if module in stored
        }
        report = pq.verify(tmp_path / str(turn))
        assert report.ok, str(report)
