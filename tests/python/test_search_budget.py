"""Recipes for a budget: exact bytes, the best of all, what is refused, and the command."""

from __future__ import annotations

import itertools
import json
import shutil

import phiquant as pq
import pytest
import torch
from phiquant import PhiquantError
from phiquant.cli.search import read_bytes
from phiquant.models import phi
from phiquant.search import joint_kl, search
from phiquant.search_space import STORED, Space, recipe_of
from test_cli import run, run_json

GGUF = ("gguf:Q2_K", "gguf:Q4_K", "gguf:Q8_0")


@pytest.fixture(scope="module")
def small():
    """A miniature whose q, k, v differ in size; its tokenizer; a window of ids."""
    model, tokenizer = pq.testing.miniature("phi-4")
    return model.eval(), tokenizer, torch.randint(0, 1000, (1, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def tied():
    model, tokenizer = pq.testing.miniature("phi-4-mini")
    return model.eval(), tokenizer, torch.randint(0, 1000, (1, 16), generator=torch.Generator().manual_seed(0))


def least_of(format, model, tokenizer):
    """What the smallest file takes, as the error says."""
    with pytest.raises(PhiquantError, match="smallest possible file takes") as refused:
        search(model, format, 1, calibration=torch.zeros(1, 2, dtype=torch.long), tokenizer=tokenizer)
    return int(str(refused.value).rpartition("takes ")[2].partition(".")[0].replace(",", ""))


@pytest.mark.parametrize("format", ["gguf", "onnx", pytest.param("openvino", marks=pytest.mark.slow), "mlx"])
def test_the_bytes_are_those_of_the_files(format, tied, tmp_path):
    model, tokenizer, ids = tied
    least = least_of(format, model, tokenizer)
    budget = int(1.5 * least)
    found = search(model, format, budget, calibration=ids, tokenizer=tokenizer, method="proxy")
    assert found.bytes <= budget
    assert found.bytes > 0.98 * budget
    assert found.bound <= found.loss <= 1.05 * found.bound
    quantized = pq.quantize(pq.testing.miniature("phi-4-mini")[0], found.recipe)
    receipt = pq.export(quantized, tokenizer, tmp_path, format=format)
    assert sum(file["bytes"] for file in receipt["files"].values()) == found.bytes
    assert len(set(found.chosen.values())) > 1
    apart = {name.rpartition(".")[2] for name in found.chosen}
    assert ("q_proj" in apart) == (format != "mlx")
    assert ("gate_proj" in apart) == (format in ("onnx", "openvino"))


def test_a_layout_that_cannot_tie_leaves_the_table_in_float(tied, tmp_path):
    model, tokenizer, ids = tied
    least = least_of("safetensors", model, tokenizer)
    found = search(model, "safetensors", int(1.2 * least), calibration=ids, tokenizer=tokenizer, method="proxy")
    assert found.chosen[phi.EMBEDDING] == "float"
    assert set(found.chosen.values()) == {"float", "safetensors:int4-g32", "safetensors:int8-g32"}
    quantized = pq.quantize(pq.testing.miniature("phi-4-mini")[0], found.recipe)
    receipt = pq.export(quantized, tokenizer, tmp_path, format="safetensors")
    assert sum(file["bytes"] for file in receipt["files"].values()) == found.bytes <= int(1.2 * least)


@pytest.mark.parametrize("share", [0.1, 0.45, 0.8])
def test_no_other_recipe_that_fits_loses_less(small, share):
    """Every recipe of q, k, v, o and down of one layer, by its file's own bytes."""
    model, tokenizer, ids = small
    keep = ("model.layers.1.*", "*.gate_up_proj", phi.EMBEDDING, phi.HEAD)
    arguments = {"candidates": GGUF[:2], "keep": keep, "calibration": ids, "tokenizer": tokenizer}
    space = Space(model, tokenizer, "gguf", GGUF[:2], keep)
    names = [one.name for one in space.slices if space.grids[one]]
    assert len(names) == 5
    specs = [pq.spec(name) for name in GGUF[:2]]
    fixed = {one.name: None for one in space.slices if not space.grids[one]}
    every = [dict(zip(names, grids, strict=True)) for grids in itertools.product(specs, repeat=len(names))]
    bytes_of = [sum(space.files(fixed | grids).values()) for grids in every]
    budget = int(min(bytes_of) + share * (max(bytes_of) - min(bytes_of)))
    found = search(model, "gguf", budget, **arguments)
    losses = [sum(found.losses[name][str(spec)] for name, spec in grids.items()) for grids in every]
    fitting = [loss for loss, size in zip(losses, bytes_of, strict=True) if size <= budget]
    assert found.loss == pytest.approx(min(fitting), rel=1e-9)
    assert found.bytes <= budget
    assert found.measured == min(measured for _, _, measured in found.tried)


def test_the_frontier_goes_from_the_smallest_to_the_best(small):
    model, _, ids = small
    found = search(model, STORED, 10**9, calibration=ids, method="proxy")
    assert all(a.bytes < b.bytes and a.loss >= b.loss for a, b in itertools.pairwise(found.frontier))
    assert found.frontier[-1].loss == pytest.approx(found.loss)
    assert found.chosen[phi.HEAD] == "float"  # there is room for all
    uniform = {point.name: point for point in found.uniform}
    best = min(uniform.values(), key=lambda point: point.bytes)
    assert best.bytes == found.frontier[0].bytes
    again = search(model, STORED, uniform["int4-g32-sym-f16"].bytes, calibration=ids, method="proxy")
    assert again.loss <= uniform["int4-g32-sym-f16"].loss


def test_the_choice_that_measures_best_is_taken(small):
    model, _, ids = small
    found = search(model, STORED, 3_000_000, calibration=ids, method="proxy", refine=True)
    assert found.measured == pytest.approx(joint_kl(model, found.recipe, ids), rel=1e-6)
    assert found.measured == min(measured for _, _, measured in found.tried)
    assert found.tried[0][0] == 1.0


def test_a_tied_head_goes_with_the_embedding(tied):
    model, _, _ = tied
    recipe = recipe_of({phi.EMBEDDING: pq.spec("gguf:Q8_0")}, model.config.to_dict())
    assert recipe.spec_for(phi.HEAD) == recipe.spec_for(phi.EMBEDDING) == pq.spec("gguf:Q8_0")


def test_what_cannot_be_is_refused_by_name(small, tiny_model):
    model, tokenizer, ids = small
    with pytest.raises(PhiquantError, match=r"1,000 bytes; the smallest possible file takes [\d,]+\. Give more"):
        search(model, "gguf", 1000, calibration=ids, tokenizer=tokenizer, method="proxy")
    with pytest.raises(PhiquantError, match="no search for qnn; for gguf, onnx"):
        search(model, "qnn", 10**7, calibration=ids, tokenizer=tokenizer)
    with pytest.raises(PhiquantError, match=r"no candidate fits model\.layers\.0\.self_attn.*super-block of 256"):
        search(tiny_model, "gguf", 10**7, candidates=["gguf:Q2_K"], calibration=ids, tokenizer=tokenizer)
    with pytest.raises(PhiquantError, match="unknown format 'gguff'"):
        search(model, "gguff", 10**7, calibration=ids, tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("text", "count"),
    [("2.1GB", 2_100_000_000), ("1900 MiB", 1900 << 20), ("750000", 750_000), ("3kB", 3000), (".5mb", 500_000)],
)
def test_sizes_in_words(text, count):
    assert read_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GB", "2.1.1GB", "-3MB", "2 bits", "."])
def test_what_is_no_size(text):
    import typer

    with pytest.raises(typer.BadParameter, match="is no size"):
        read_bytes(text)


def test_the_command_finds_a_recipe_that_quantize_takes(tmp_path):
    out, picture = tmp_path / "recipe.json", tmp_path / "plots/size.png"
    arguments = ("search", "phi3-tiny", "--format", "gguf", "--windows", 1, "--proxy", "--out", out)
    found = run_json(*arguments, "--budget", "2.9MB", "--plot", picture)
    assert found["bytes"] <= 2_900_000
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "recipe.losses/model.layers.0.mlp.down_proj.json").exists()
    run("quantize", "phi3-tiny", "--target", "gguf:Q4_K", "--recipe", out, "--out", tmp_path / "made")
    assert (tmp_path / "made/model.gguf").stat().st_size == found["bytes"]
    shown = run(*arguments, "--budget", "3MB")  # the losses are there
    assert "all gguf:Q4_K, predicted" in shown
    assert "q_proj" in shown
    assert "smallest possible file takes" in json.loads(run(*arguments, "--budget", "1MB", "--json", code=1))["error"]
    run(*arguments, "--budget", "much", code=2)
    shutil.rmtree(tmp_path / "recipe.losses")


def test_the_command_asks_for_a_text(tmp_path, small):
    model, tokenizer, _ = small
    model.save_pretrained(tmp_path / "checkpoint")
    tokenizer.save_pretrained(tmp_path / "checkpoint")
    options = ("--format", "gguf", "--budget", "9MB", "--out", tmp_path / "r.json")
    run("search", tmp_path / "checkpoint", *options, code=2)
    run("search", "phi3-tiny", "--format", "gguff", "--budget", "9MB", "--out", tmp_path / "r.json", code=2)


@pytest.mark.slow
def test_three_and_a_half_bits_beat_the_simple_rules(phi3_tiny):
    """docs/mixed-precision.md has more rules and more text."""
    model, tokenizer = phi3_tiny
    ids = torch.tensor(pq.evaluate.windows(tokenizer, pq.testing.training_text(100_000), 512, 4))
    rows = pq.evaluate.windows(tokenizer, pq.testing.heldout_text(), 512, 10)
    grids = {bits: f"int{bits}-g32-sym-f16" for bits in (2, 3, 4, 5, 6)}
    halves = [(0, 1), (2, 3), (0, 2), (1, 3)]
    rules = [pq.Recipe({f"model.layers.{i}.*": grids[3] for i in low}, default=grids[4]) for low in halves]
    options = {"candidates": list(grids.values()), "keep": (phi.EMBEDDING, phi.HEAD), "calibration": ids}
    space = Space(model, None, STORED, options["candidates"], options["keep"])
    budget = sum(space.files({one.name: rules[0].spec_for(one.name) for one in space.slices}).values())
    found = search(model, STORED, budget, **options, method="proxy")

    def logits(recipe):
        return list(pq.evaluate.model_logits(pq.quantize(pq.load("phi3-tiny")[0], recipe), rows))

    ours = logits(found.recipe)
    for rule in rules:
        behind = pq.evaluate.compare_logits(rows, logits(rule), ours)
        assert behind.nll_diff > 2 * behind.nll_diff_se
