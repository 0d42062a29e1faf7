"""Processes that share a calibration: the same Hessians and the same codes as one process, to the bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import phiquant as pq
import pytest
import torch
import two_ranks
from phiquant.errors import PhiquantError
from phiquant.ranks import ALONE, Ranks
from phiquant.statistics import Statistics
from phiquant.stream import quantize_checkpoint
from phiquant.testing import random_phi3

SPEC = "int3-g32-sym"
FEATURES = 1100  # three strips of moments, the last not whole
NAMES = ("moments", "abs_sum", "abs_max", "tokens")


def tokens():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, FEATURES, generator=generator) for n in (96, 96, 96, 96, 33)]


def windows():
    return torch.randint(0, 4096, (21, 40), generator=torch.Generator().manual_seed(0))  # three batches


def seen(ranks):
    statistics = Statistics(FEATURES, ranks=ranks)
    for index, x in ranks.in_turn(range(5), lambda index: tokens()[index]):
        assert len(x) == (33 if index == 4 else 96)
        statistics.update(x)
    statistics.complete()
    return statistics


def recipe():
    grids = dict.fromkeys(("lm_head", "model.embed_tokens"), "int8-channel-sym")
    return pq.Recipe({**grids, "model.layers.1.mlp.up_proj": "int4-g32-sym"}, SPEC)


def codes(model):
    kinds = pq.QuantizedLinear | pq.QuantizedEmbedding
    return {name: m.quantized.digests() for name, m in model.named_modules() if isinstance(m, kinds)}


def quantized(ranks, folder=None, offload=False):
    model = random_phi3()
    return codes(
        pq.quantize(model, recipe(), "gptq", calibration=windows(), folder=folder, offload=offload, ranks=ranks)
    )


def test_alone_every_item_is_computed_here():
    assert [(item, float(x)) for item, x in ALONE.in_turn([3, 1], lambda item: torch.tensor(2.0 * item))] == [
        (3, 6.0),
        (1, 2.0),
    ]
    assert ALONE.first
    assert ALONE.agree("this")


def test_without_a_group_there_are_no_ranks():
    with pytest.raises(PhiquantError, match=r"torch\.distributed is not initialized"):
        Ranks.of_group()


def test_a_rank_sums_its_strips_alone():
    """What each of two ranks leaves for the other: the strips 1, and 0 and 2."""
    whole = Statistics(FEATURES)
    parts = [Statistics(FEATURES, ranks=Ranks(rank, 2)) for rank in (0, 1)]
    for x in tokens():
        for statistics in (whole, *parts):
            statistics.update(x)
    for statistics in parts:
        assert torch.equal(statistics.abs_sum, whole.abs_sum)
        assert statistics.tokens == whole.tokens
    assert torch.equal(parts[0].moments + parts[1].moments, whole.moments)
    assert not parts[0].moments[512:1024].any()
    assert not parts[1].moments[:512].any()


def test_ranks_need_something_to_share(tmp_path):
    with pytest.raises(PhiquantError, match="rtn without calibration has nothing that 2 processes could share"):
        quantize_checkpoint(tmp_path, "gguf:Q4_0", tmp_path / "out", ranks=Ranks(0, 2))


def _two_ranks(rank, folder):
    ranks = Ranks.of_group()
    assert (ranks.rank, ranks.world, ranks.first) == (rank, 2, rank == 0)
    assert ranks.agree("this")
    assert not ranks.agree(f"rank {rank}")
    statistics = seen(ranks)
    torch.save({name: getattr(statistics, name) for name in NAMES}, folder / f"statistics-{rank}.pt")
    found = {
        "memory": quantized(ranks),
        "disk": quantized(ranks, folder / "run", offload=True),
        "again": quantized(ranks, folder / "run", offload=True),  # all is there
    }
    (folder / f"codes-{rank}.json").write_text(json.dumps(found))


@pytest.mark.slow
def test_two_ranks_find_the_hessians_and_the_codes_of_one_process(tmp_path):
    two_ranks.run(_two_ranks, tmp_path)
    whole, expected = seen(ALONE), quantized(ALONE)
    for rank in (0, 1):
        statistics = torch.load(tmp_path / f"statistics-{rank}.pt")
        for name in NAMES[:3]:
            assert torch.equal(statistics[name], getattr(whole, name)), name
        assert statistics["tokens"] == whole.tokens
        found = json.loads((tmp_path / f"codes-{rank}.json").read_text())
        assert found == dict.fromkeys(("memory", "disk", "again"), expected)
    assert quantized(ALONE, tmp_path / "run", offload=True) == expected  # and one process goes on from two


@pytest.mark.slow
def test_the_command_under_torchrun_writes_the_file_of_one_process(tmp_path, tokenizer):
    checkpoint = tmp_path / "checkpoint"
    random_phi3().save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)
    text = tmp_path / "text.txt"
    text.write_text(pq.testing.heldout_text()[:40_000], encoding="utf-8")
    command = [str(checkpoint), "--target", "gguf:Q4_0", "--solver", "gptq", "--calibration", str(text), "--out"]
    torchrun = ["torch.distributed.run", "--nproc-per-node", "2", "--module"]
    for name, launch in (("one", []), ("two", torchrun)):
        subprocess.run(
            [sys.executable, "-m", *launch, "phiquant", "quantize", *command, str(tmp_path / name)],
            check=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    one, two = (next(Path(tmp_path / name).glob("*.gguf")).read_bytes() for name in ("one", "two"))
    assert one == two
    assert pq.verify(tmp_path / "two").ok
