"""Observers against numpy and torch.ao; merging, state, ranks and awkward input."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable

import numpy as np
import phiquant as pq
import pytest
import torch
from phiquant import (
    EmaObserver,
    FakeQuantize,
    HistogramObserver,
    KLObserver,
    MinMaxObserver,
    PercentileObserver,
    TorchHistogramObserver,
    ops,
)
from phiquant.observers import Observer

SPECS = ["int8-tensor-sym", "uint8-channel-asym", "int4-g32-sym"]


EVERY: dict[str, Callable[[str], Observer]] = {
    "min-max": MinMaxObserver,
    "ema": lambda spec: EmaObserver(spec, momentum=0.1),
    "histogram": HistogramObserver,
    "percentile": lambda spec: PercentileObserver(spec, 99.0),
    "kl": KLObserver,
    "kl-notebook": lambda spec: KLObserver(spec, form="notebook"),
}
WITH_TORCH = EVERY | {"torch": TorchHistogramObserver}
every = pytest.mark.parametrize("make", EVERY.values(), ids=EVERY.keys())
every_with_torch = pytest.mark.parametrize("make", WITH_TORCH.values(), ids=WITH_TORCH.keys())


def state(observer: Observer) -> dict[str, torch.Tensor]:
    return dict(observer.named_buffers())


def same(a: Observer, b: Observer) -> bool:
    return all(torch.equal(value, state(b)[name]) for name, value in state(a).items())


def same_values(a: Observer, b: Observer) -> bool:
    """`same`, the number of axes left aside."""
    return all(torch.equal(value.flatten(), state(b)[name].flatten()) for name, value in state(a).items())


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(8, 64, generator=generator) * (i + 1) for i in range(4)]


@pytest.mark.parametrize("text", SPECS)
def test_min_max_over_all_batches(text: str) -> None:
    observer = MinMaxObserver(text)
    for x in batches():
        assert observer(x) is x
    blocks = {"int8-tensor-sym": 1, "uint8-channel-asym": 8, "int4-g32-sym": 16}[text]
    everything = torch.stack(batches()).reshape(4, blocks, -1)
    assert torch.equal(observer.lo.flatten(), everything.amin((0, 2)))
    assert torch.equal(observer.hi.flatten(), everything.amax((0, 2)))


@every
@pytest.mark.parametrize("text", SPECS)
def test_two_halves_merged_give_what_one_pass_gives(text: str, make: Callable) -> None:
    whole, first, second = (make(text) for _ in range(3))
    for x in batches():
        whole(x)
    for x in batches()[:2]:
        first(x)
    for x in batches()[2:]:
        second(x)
    first.merge(second)
    if make is EVERY["ema"]:  # the formula of the merge rounds in another order
        for name, value in state(first).items():
            torch.testing.assert_close(value, state(whole)[name], rtol=1e-6, atol=1e-6)
    else:
        assert same(first, whole)
    before = copy.deepcopy(first)
    first.merge(make(text))  # of one that saw nothing
    assert same(first, before)
    fresh = make(text)
    fresh.merge(first)  # into one that saw nothing
    assert same(fresh, first)


@pytest.mark.parametrize("name", ["min-max", "histogram", "percentile", "kl"])
def test_order_and_cut_of_batches_do_not_matter(name: str) -> None:
    one, other = EVERY[name]("int8-tensor-sym"), EVERY[name]("int8-tensor-sym")
    everything = torch.stack(batches())
    one(everything)
    for x in reversed(everything.flatten().split(77)):
        other(x)
    assert same_values(one, other)
    for a, b in zip(one.range(), other.range(), strict=True):
        assert torch.equal(a.flatten(), b.flatten())


def test_ema_follows_the_formula() -> None:
    observer = EmaObserver("int8-tensor-sym", momentum=0.1)
    expected = None
    for x in batches():
        observer(x)
        expected = x.amax() if expected is None else expected + 0.1 * (x.amax() - expected)
    assert torch.allclose(observer.hi.flatten(), expected.reshape(1))


@every_with_torch
@pytest.mark.parametrize("text", ["int8-tensor-sym", "int4-g32-sym"])
def test_state_survives_and_continues(text: str, make: Callable) -> None:
    if make is TorchHistogramObserver:
        text = "int8-tensor-sym"
    first, second, unbroken = make(text), make(text), make(text)
    for x in batches()[:2]:
        first(x)
        unbroken(x)
    second.load_state_dict(first.state_dict())
    for x in batches()[2:]:
        second(x)
        unbroken(x)
    assert same(second, unbroken)
    assert all(map(torch.equal, second.range(), unbroken.range()))


@every_with_torch
def test_empty_and_nan_batches_change_nothing(make: Callable) -> None:
    observer = make("int8-tensor-sym")
    for x in (torch.empty(0, 64), torch.full((1, 2), float("nan"))):
        assert observer(x) is x
        assert not observer.seen
        with pytest.raises(RuntimeError, match="seen no values"):
            observer.parameters_of_range()
    observer(torch.tensor([[1.0, -2.0]]))
    before = copy.deepcopy(observer)
    observer(torch.empty(0, 64))
    observer(torch.full((1, 2), float("nan")))
    assert same(observer, before)
    assert observer.lo.item() == -2.0
    assert observer.hi.item() == 1.0


@pytest.mark.parametrize("name", ["histogram", "percentile", "kl", "torch"])
def test_infinities_are_passed_over(name: str) -> None:
    clean, strewn = WITH_TORCH[name]("int8-tensor-sym"), WITH_TORCH[name]("int8-tensor-sym")
    strewn(torch.tensor([math.inf, -math.inf]))
    assert not strewn.seen
    for x in batches():
        clean(x)
        strewn(torch.cat([x.flatten(), torch.tensor([math.inf, float("nan"), -math.inf])]))
    assert same_values(clean, strewn)


@every_with_torch
def test_model_half_keeps_the_state_and_16_bits_are_read(make: Callable) -> None:
    observer, exact = make("int8-tensor-sym"), make("int8-tensor-sym")
    for x in batches():
        observer.half()(x.bfloat16())
        exact(x.bfloat16().float())
    assert same(observer, exact)
    assert all(value.dtype in (torch.float32, torch.int64) for value in state(observer).values())


@every_with_torch
@pytest.mark.parametrize("text", ["int8-tensor-sym", "uint8-tensor-asym", "int4-tensor-sym"])
def test_the_range_lies_within_what_was_seen_and_drives_fake_quantize(text: str, make: Callable) -> None:
    x = torch.cat(batches())
    module = FakeQuantize(text, range="observer", observer=make(text))
    y = module(x)
    lo, hi = module.observer.range()
    assert x.min() <= lo <= 0 <= hi <= x.max() + 1e-5
    scale, zero_point, minimum = module.observer.parameters_of_range()
    assert torch.equal(y, pq.fake_quantize(x, text, scale=scale, zero_point=zero_point, minimum=minimum))
    # batches of other ranks (number of axes) are fine per tensor
    module(x.reshape(4, 2, -1))


def test_percentiles_are_within_a_bin_of_the_exact_ones() -> None:
    x = torch.cat(batches())
    for p in (90.0, 99.0, 99.9, 100.0):
        symmetric, two_sided = PercentileObserver("int8-tensor-sym", p), PercentileObserver("uint8-tensor-asym", p)
        symmetric(x)
        two_sided(x)
        width = symmetric.width.item()
        assert width < x.abs().max() / 1024 + 1e-12
        lo, hi = symmetric.range()
        assert max(-lo, hi).item() == pytest.approx(np.percentile(x.abs().double(), p), abs=1.01 * width)
        assert two_sided.range()[0].item() == pytest.approx(np.percentile(x.double(), 100 - p), abs=1.01 * width)
        assert two_sided.range()[1].item() == pytest.approx(np.percentile(x.double(), p), abs=1.01 * width)
    assert two_sided.range()[1] == x.max()


def test_percentile_per_channel() -> None:
    x = torch.stack([batches()[0].flatten() * 10**i for i in range(-3, 3)])
    observer = PercentileObserver("int8-channel-sym", 99.0)
    observer(x)
    expected = np.percentile(x.abs().double(), 99.0, axis=1)
    np.testing.assert_allclose(
        observer.range()[1].flatten().numpy(), expected, atol=1.01 * observer.width.numpy().max()
    )
    np.testing.assert_allclose(observer.range()[1].flatten().numpy(), expected, rtol=1e-3)


def streams() -> list[list[torch.Tensor]]:
    """Batches whose range grows or not, skewed, one-sided, constant, with infinities."""
    result = []
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        stream = [torch.randn(2000 * (b + 1), generator=generator) * (1 + b * (seed % 3)) for b in range(4)]
        stream = [[x, x**3, x.relu() * 3, x + 5][seed % 4] for x in stream]
        if seed % 5 == 3:
            stream[1][7] = math.inf
        if seed == 4:
            stream[0] = torch.full((100,), 3.0)
        result.append(stream)
    return result


def test_torch_observer_equals_torch_ao() -> None:
    from torch.ao.quantization import HistogramObserver as TorchAo

    for stream in streams():
        theirs, ours = TorchAo(), TorchHistogramObserver("uint8-tensor-asym")
        for x in stream:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                theirs(x)
            ours(x)
            assert torch.equal(theirs.histogram, ours.counts)
            lo, hi = theirs._non_linear_param_search()
            assert ours.range() == (lo, hi)


def squared_error(x: torch.Tensor, observer: Observer) -> float:
    observer(x)
    scale, zero_point, minimum = observer.parameters_of_range()
    y = pq.fake_quantize(x, observer.spec, scale=scale, zero_point=zero_point, minimum=minimum)
    return (y - x).double().square().mean().item()


@pytest.mark.parametrize("text", ["uint8-tensor-asym", "uint4-tensor-asym"])
def test_histogram_observers_lose_about_the_same(text: str) -> None:
    """Other bins and another local minimum, hardly another error; both gain on min-max for a bell at 4 bits."""
    for seed in range(4):
        x = torch.randn(100_000, generator=torch.Generator().manual_seed(seed))
        plain, theirs, ours = (
            squared_error(x, make(text)) for make in (MinMaxObserver, TorchHistogramObserver, HistogramObserver)
        )
        assert ours == pytest.approx(theirs, rel=0.08)
        if "4" in text:
            assert ours < 0.75 * plain


def test_kl_gains_at_4_bits_and_loses_with_outliers_at_8() -> None:
    """Never "KL is better with outliers": at 8 bits it gives up the outliers, and they carry the squared error."""
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    assert squared_error(x, KLObserver("int4-tensor-sym")) < 0.75 * squared_error(x, MinMaxObserver("int4-tensor-sym"))
    x[:10] = 30.0
    assert squared_error(x, KLObserver("int8-tensor-sym")) > 5 * squared_error(x, MinMaxObserver("int8-tensor-sym"))
    assert squared_error(x, KLObserver("int4-tensor-sym")) < squared_error(x, MinMaxObserver("int4-tensor-sym"))


def test_kl_is_not_drawn_in_by_the_zeros_of_a_relu() -> None:
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0)).relu()
    observer = KLObserver("uint8-tensor-asym")
    assert squared_error(x, observer) < 1.5 * squared_error(x, MinMaxObserver("uint8-tensor-asym"))
    assert observer.range()[1] > 0.6 * x.max()


def test_kl_observer_is_the_search_on_its_histogram() -> None:
    x = torch.randn(50_000, generator=torch.Generator().manual_seed(0)).abs()
    observer = KLObserver("int8-tensor-sym")
    observer(x)
    width = 2.0 ** math.floor(math.log2(x.max().item())) / 1024
    assert observer.width.item() == width
    counts = torch.histc(x, 2048, 0, 2048 * width)
    counts[0] = counts[1]
    threshold = ops.kl_threshold(counts, 128).item() * width
    assert observer.range()[1].item() == pytest.approx(min(threshold, x.max().item()))
    asymmetric = KLObserver("uint8-tensor-asym", levels=128)
    asymmetric(x)
    assert asymmetric.range()[1] == observer.range()[1]
    assert asymmetric.range()[0] == x.min()


def ranks(rank: int, folder: str, results: torch.multiprocessing.Queue) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    for name, make in WITH_TORCH.items():
        observer = make("int8-tensor-sym")
        for x in batches()[rank::2]:
            observer(x)
        observer.all_reduce()
        results.put((name, rank, {key: value.numpy() for key, value in state(observer).items()}))
    unequal = MinMaxObserver("int8-channel-sym")
    if rank == 1:  # the other rank has seen nothing
        unequal(batches()[0])
    unequal.all_reduce()
    results.put(("unequal", rank, {key: value.numpy() for key, value in state(unequal).items()}))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_all_reduce_over_two_ranks(tmp_path) -> None:
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = [context.Process(target=ranks, args=(rank, str(tmp_path), results)) for rank in range(2)]
    for worker in workers:
        worker.start()
    found = {}
    for _ in range(2 * (len(WITH_TORCH) + 1)):
        name, rank, buffers = results.get(timeout=120)
        found[name, rank] = buffers
    for worker in workers:
        worker.join(timeout=60)
        assert worker.exitcode == 0
    for name, make in WITH_TORCH.items():
        for key, value in found[name, 0].items():
            np.testing.assert_array_equal(value, found[name, 1][key])
        parts = [make("int8-tensor-sym"), make("int8-tensor-sym")]
        for i, x in enumerate(batches()):
            parts[i % 2](x)
        if name == "ema":
            expected = torch.stack([part.hi for part in parts]).mean(0)
        else:
            parts[0].merge(parts[1])
            expected = parts[0].hi
            if name != "torch":  # whose merge is as approximate as its streaming
                whole = make("int8-tensor-sym")
                whole(torch.stack(batches()))
                assert same_values(parts[0], whole)
            for key, value in state(parts[0]).items():
                np.testing.assert_array_equal(found[name, 0][key], value.numpy())
        np.testing.assert_allclose(found[name, 0]["hi"], expected.numpy(), rtol=1e-6)
    for rank in range(2):
        np.testing.assert_array_equal(found["unequal", rank]["hi"], batches()[0].amax(1, keepdim=True).numpy())


def test_all_reduce_without_ranks_does_nothing() -> None:
    observer = HistogramObserver("int8-tensor-sym")
    observer(batches()[0])
    before = copy.deepcopy(observer)
    observer.all_reduce()
    assert same(observer, before)


@pytest.mark.parametrize("solver", ["percentile", "kl", "histogram"])
@pytest.mark.parametrize("text", ["int8-tensor-sym", "uint8-channel-asym", "uint4-tensor-min", "int4-channel-signmax"])
def test_solvers_give_the_codes_of_their_range(solver: str, text: str) -> None:
    w = torch.cat(batches())
    qt = pq.quantize_tensor(w, text, solver=solver)
    rtn = pq.quantize_tensor(w, text)
    assert qt.codes.shape == w.shape
    assert (qt.scales.abs() <= rtn.scales.abs() * (1 + 1e-6)).all()  # a range inside min-max
    if solver == "percentile":
        assert (qt.scales.abs() < rtn.scales.abs()).all()
    w[0, 0] = math.nan
    with pytest.raises(pq.PhiquantError, match=r"not finite.*index \[0, 0\]"):
        pq.quantize_tensor(w, text, solver=solver)


@pytest.mark.parametrize("text", ["int4-g32-sym", "uint4-g32-asym", "uint3-g32-min", "int4-channel-sym"])
def test_kl_shares_a_threshold_among_small_blocks(text: str) -> None:
    """A histogram of 32 values would cut nearly all of them off."""
    w = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.01, 1, 64)[:, None]
    error = {s: (pq.quantize_tensor(w, text, s).dequantize() - w).square().mean() for s in ("kl", "rtn", "mse_exact")}
    assert error["mse_exact"] <= error["kl"] < 2 * error["rtn"]
    kl, rtn = (pq.quantize_tensor(w, text, s).scales for s in ("kl", "rtn"))
    assert (kl.abs() <= rtn.abs() * (1 + 1e-6)).all()
    w[3, 5] = math.inf
    with pytest.raises(pq.PhiquantError, match=r"not finite.*index \[3, 5\]"):
        pq.quantize_tensor(w, text, "kl")


def test_parameters_are_those_of_the_range() -> None:
    observer = MinMaxObserver("uint8-tensor-asym")
    with pytest.raises(RuntimeError, match="seen no values"):
        observer.parameters_of_range()
    observer(torch.tensor([[-1.0, 4.1]]))
    scale, zero_point, minimum = observer.parameters_of_range()
    assert scale.item() == pytest.approx(5.1 / 255)
    assert zero_point.item() == 50
    assert minimum is None


def test_a_tensor_of_another_shape_is_refused() -> None:
    observer = MinMaxObserver("int8-channel-sym")
    observer(torch.randn(4, 8))
    with pytest.raises(ValueError, match=r"ranges of shape \[4, 1\], this tensor needs \[5, 1\]"):
        observer(torch.randn(5, 8))


def test_momentum_is_checked() -> None:
    with pytest.raises(ValueError, match=r"momentum must be in \(0, 1\], got 0"):
        EmaObserver("int8-tensor-sym", momentum=0)


def test_wrong_use_is_refused() -> None:
    with pytest.raises(ValueError, match="power of two"):
        HistogramObserver("int8-tensor-sym", bins=1000)
    with pytest.raises(ValueError, match=r"percentile must be in \(50, 100\]"):
        PercentileObserver("int8-tensor-sym", 0.999)
    with pytest.raises(ValueError, match="form is"):
        KLObserver("int8-tensor-sym", form="course")
    with pytest.raises(ValueError, match="evenly spaced"):
        KLObserver("fp8_e4m3-tensor-sym")
    with pytest.raises(ValueError, match="per tensor"):
        TorchHistogramObserver("int8-channel-sym")
    with pytest.raises(ValueError, match="one kind and spec"):
        MinMaxObserver("int8-tensor-sym").merge(MinMaxObserver("int4-tensor-sym"))
    few, many = (HistogramObserver("int8-tensor-sym", bins=bins) for bins in (64, 128))
    few(torch.ones(3))
    many(torch.ones(3))
    with pytest.raises(ValueError, match="bins do not merge"):
        few.merge(many)
    with pytest.raises(ValueError, match="would take 3200 MiB"):
        HistogramObserver("int8-channel-sym", bins=16384)(torch.ones(12800, 1))
