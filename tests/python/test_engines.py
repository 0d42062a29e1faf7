"""QAT under DDP, FSDP2 and Accelerate: what an engine keeps, what a schedule adds, and whole weights at the end."""

import copy
import json

import phiquant as pq
import pytest
import torch
import torch.distributed as dist
import two_ranks
from phiquant.engines import QATSchedule, gather, unwrapped
from phiquant.errors import PhiquantError
from phiquant.testing import random_phi3
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

RANGES = ("tensor", "observer", "mse", "learned")
SPEC = "int4-g32-sym"
STEPS, BATCH, WINDOW = 3, 4, 32


def prepared(range, activations=None, observer=None, **config):
    model = random_phi3(**config).train()
    return pq.prepare_qat(model, SPEC, range=range, activations=activations, observer=observer)


def batches():
    return torch.randint(0, 4096, (STEPS, BATCH, WINDOW), generator=torch.Generator().manual_seed(1))


def optimizer_of(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=True)


def loss_of(model, rows):
    return model(rows, labels=rows, use_cache=False).loss


def train(model, parts=1, schedule=None, start=0, optimizer=None, stop=STEPS):
    """One process; the gradients of `parts` equal parts of each batch are added up, as ranks do."""
    optimizer = optimizer or optimizer_of(model)
    for rows in batches()[start:stop]:
        if schedule:
            schedule.step()
        for part in rows.chunk(parts):
            (loss_of(model, part) / parts).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return model


def codes(model):
    return {n: m.quantized.codes for n, m in model.named_modules() if isinstance(m, pq.QuantizedLinear)}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def one_rank():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def shard(model, **how):
    for layer in model.model.layers:
        fully_shard(layer, **how)
    return fully_shard(model, **how)


# Schedule


def test_frozen_ranges_stay_and_the_weights_go_on():
    model = prepared("tensor")
    schedule = QATSchedule(model, STEPS, freeze=0.5)  # 1.5 steps: before the third
    linear = model.model.layers[0].mlp.down_proj
    train(model, schedule=schedule, stop=2)
    assert not schedule.frozen
    before = linear.weight_quantizer.quantize(linear.weight)
    train(model, schedule=schedule, start=2)
    assert schedule.frozen
    after = linear.weight_quantizer.quantize(linear.weight)
    assert torch.equal(before.scales, after.scales)
    assert not torch.equal(before.codes, after.codes)
    unfrozen = train(prepared("tensor")).model.layers[0].mlp.down_proj
    assert not torch.equal(unfrozen.weight_quantizer.quantize(unfrozen.weight).scales, after.scales)


def test_frozen_ranges_of_inputs_stay(one_rank):
    model = prepared("mse", activations="uint8-tensor-asym", observer="minmax")
    schedule = QATSchedule(model, STEPS, freeze=0.5)
    train(model, schedule=schedule, stop=2)
    inputs = model.model.layers[1].mlp.down_proj.input_quantizer
    schedule.step()
    before = inputs.scale.clone()
    assert not inputs.observing
    inputs(torch.full((1, 256), 1e4))
    assert torch.equal(inputs.scale, before)
    assert torch.equal(before, inputs.observer.parameters_of_range()[0])


def test_finish_stores_the_codes_and_the_steps():
    model = prepared("observer")
    schedule = QATSchedule(model, STEPS, freeze=0.0)
    train(model, schedule=schedule)
    wanted = {n: m.weight_quantizer(m.weight).detach() for n, m in model.named_modules() if isinstance(m, pq.QATLinear)}
    assert schedule.finish() is model
    for name, weight in wanted.items():
        layer = model.get_submodule(name)
        assert torch.equal(layer.quantized.dequantize(), weight)
        assert layer.weight_quantizer.origin == {"solver": "qat", "range": "observer", "steps": STEPS}


def test_a_range_that_a_state_dict_holds_freezes_a_dynamic_quantizer():
    x, y = torch.randn(2, 4, 64, generator=torch.Generator().manual_seed(0))
    first, second = pq.FakeQuantize(SPEC), pq.FakeQuantize(SPEC)
    first.freeze(x)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(x), pq.fake_quantize(x, SPEC))
    assert torch.equal(second(y), first(y))
    assert not torch.equal(second(y), pq.fake_quantize(y, SPEC))


def test_a_schedule_refuses_what_it_cannot_do(tiny_model):
    with pytest.raises(PhiquantError, match="no layer in training"):
        QATSchedule(tiny_model, 10)
    with pytest.raises(PhiquantError, match="a share of them"):
        QATSchedule(prepared("tensor"), 10, freeze=2.0)
    with pytest.raises(PhiquantError, match=r"o_proj: a learned grid is trained to the end"):
        QATSchedule(prepared("learned"), 10, freeze=0.5)
    two_levels = pq.prepare_qat(random_phi3(hidden_size=256), "gguf:Q4_K")
    with pytest.raises(PhiquantError, match=r"two levels of scales.*range='mse'"):
        QATSchedule(two_levels, 10, freeze=0.5)


def test_a_checkpoint_of_other_grids_is_refused():
    state = json.loads(json.dumps(QATSchedule(prepared("mse"), STEPS).state_dict()))
    with pytest.raises(PhiquantError, match=r"layers\.0.*range=mse, this run prepared it for .*range=observer"):
        QATSchedule(prepared("observer"), STEPS).load_state_dict(state)
    QATSchedule(prepared("mse"), STEPS).load_state_dict(state)


def test_wrappers_are_taken_off(one_rank):
    model = prepared("mse")
    assert unwrapped(model) is model
    assert unwrapped(DistributedDataParallel(model)) is model
    assert QATSchedule(DistributedDataParallel(model), 1).grids == QATSchedule(model, 1).grids


# FSDP2, one rank: what is the same on every number of them


@pytest.mark.parametrize("tied", [False, True])
def test_a_sharded_model_gathers_into_a_whole_one(one_rank, tied):
    config = {"tie_word_embeddings": tied, "num_key_value_heads": 2}
    model = prepared("learned", **config)
    whole = copy.deepcopy(model)
    optimizer = optimizer_of(shard(model))
    train(model, optimizer=optimizer)
    gather(model, whole)
    alone = train(prepared("learned", **config))
    assert same(dict(whole.named_parameters()), dict(alone.named_parameters()))
    assert same(codes(pq.convert(whole)), codes(pq.convert(alone)))


def test_a_sharded_model_is_not_converted_in_place(one_rank):
    model = shard(prepared("mse"))
    with pytest.raises(PhiquantError, match=r"o_proj\.weight is sharded; gather\(model, whole\)"):
        pq.convert(model)


def test_what_gather_refuses(one_rank):
    model = shard(prepared("mse"))
    with pytest.raises(PhiquantError, match=r"weight_quantizer\.\S+ is in only one of the two models"):
        gather(model, random_phi3())
    with pytest.raises(PhiquantError, match="in the whole model"):
        gather(model, prepared("mse", intermediate_size=160))
    with pytest.raises(PhiquantError, match=r"casts the weights before their grid.*torch\.autocast"):
        gather(shard(prepared("mse"), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16)), prepared("mse"))


def test_weights_cast_before_their_grid_get_other_codes():
    """Why FSDP's param_dtype is refused: near the middle between two levels bfloat16 decides otherwise."""
    layer = prepared("mse").model.layers[0].mlp.down_proj
    kept = layer.weight_quantizer.quantize(layer.weight).codes
    cast = layer.weight_quantizer.quantize(layer.weight.bfloat16().float()).codes
    assert 0 < (kept != cast).float().mean() < 0.05


# Two ranks


def _two_ranks(rank, folder):
    for range in RANGES:
        for engine in ("ddp", "fsdp2"):
            model = prepared(range)
            whole = copy.deepcopy(model) if rank == 0 else None
            wrapped = DistributedDataParallel(model) if engine == "ddp" else shard(model)
            optimizer = optimizer_of(wrapped)
            schedule = QATSchedule(wrapped, STEPS, None if range == "learned" else 0.5)
            for rows in batches():
                schedule.step()
                loss_of(wrapped, rows.chunk(2)[rank]).backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            gather(wrapped, whole)
            if whole is not None:
                torch.save(whole.state_dict(), folder / f"{engine}-{range}.pt")
    model = shard(prepared("mse", activations="uint8-tensor-asym", observer="minmax"))
    schedule = QATSchedule(model, STEPS, freeze=0.0)
    loss_of(model, batches()[0].chunk(2)[rank])  # each rank sees inputs of its own
    inputs = model.model.layers[1].mlp.down_proj.input_quantizer
    scales = [torch.empty(1) for _ in (0, 1)]
    for agree in (False, True):
        dist.all_gather(scales, inputs.scale.reshape(1))
        assert torch.equal(*scales) is agree
        schedule.step()


@pytest.mark.slow
def test_two_ranks_train_what_one_process_does(tmp_path):
    """To the bit where the process adds up the same two halves; else to the rounding of sums in another order."""
    two_ranks.run(_two_ranks, tmp_path)
    for range in RANGES:
        freeze = None if range == "learned" else 0.5
        halves, whole = prepared(range), prepared(range)
        train(halves, parts=2, schedule=QATSchedule(halves, STEPS, freeze))
        train(whole, schedule=QATSchedule(whole, STEPS, freeze))
        for engine in ("ddp", "fsdp2"):
            found = torch.load(tmp_path / f"{engine}-{range}.pt")
            assert same(found, halves.state_dict()), f"{engine} {range}"
            model = prepared(range)
            schedule = QATSchedule(model, STEPS, freeze)
            model.load_state_dict(found)
            schedule.load_state_dict({"done": STEPS, "frozen": freeze is not None, "grids": schedule.grids})
            mine, other = codes(schedule.finish()), codes(pq.convert(copy.deepcopy(whole)))
            agree = [(mine[name] == other[name]).float().mean().item() for name in other]
            assert min(agree) > 0.999, f"{engine} {range}: {agree}"


# Accelerate


def test_accelerate_resumes_to_the_same_codes(tmp_path):
    from accelerate import Accelerator

    def run(stop, resume=False):
        accelerator = Accelerator(cpu=True)
        model = prepared("tensor")
        schedule = QATSchedule(model, STEPS, freeze=0.3)
        model, optimizer = accelerator.prepare(model, optimizer_of(model))
        accelerator.register_for_checkpointing(schedule)
        if resume:
            accelerator.load_state(tmp_path)
        for rows in batches()[schedule.done : stop]:
            schedule.step()
            accelerator.backward(loss_of(model, rows))
            optimizer.step()
            optimizer.zero_grad()
        if stop < STEPS:
            accelerator.save_state(tmp_path)
            return None
        return codes(schedule.finish())

    whole = run(STEPS)
    run(2)
    assert same(run(STEPS, resume=True), whole)
