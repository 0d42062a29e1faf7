"""The training loop: seconds, on a random miniature. The figures that count are in benchmarks/qat.py."""

import copy
import dataclasses
import math

import phiquant as pq
import pytest
import torch
from phiquant import qat
from phiquant.errors import PhiquantError
from phiquant.qat_settings import schedule

SETTINGS = qat.Settings(steps=12, batch=4, window=32, learning_rate=1e-3, seed=3, bfloat16=False)
TEXT_LENGTH = 20_000


@pytest.fixture(scope="module")
def text():
    return pq.testing.training_text(characters=TEXT_LENGTH)[:TEXT_LENGTH]


def values(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a, b):
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


def test_training_brings_the_model_closer_to_its_teacher(tiny_model, tokenizer, text):
    settings = dataclasses.replace(SETTINGS, steps=30)
    rounded = pq.quantize(copy.deepcopy(tiny_model), "int3-g32-sym")
    trained = copy.deepcopy(tiny_model)
    report = qat.train(trained, tokenizer, "int3-g32-sym", text=text, settings=settings, range="tensor")
    assert (report.steps, report.tokens) == (30, 30 * 4 * 32)
    assert [step for step, _ in report.curve] == [0, 10, 20]

    def kl(model):
        return pq.evaluate.compare(model, tiny_model, tokenizer, text[:3000], window=64).kl

    assert kl(trained) < 0.9 * kl(rounded)
    assert isinstance(trained.model.layers[0].mlp.down_proj, pq.QuantizedLinear)
    for name, parameter in tiny_model.named_parameters():  # what stays float is not touched
        if "layers" not in name or "norm" in name:
            assert torch.equal(trained.get_parameter(name), parameter), name
            assert trained.get_parameter(name).requires_grad


def test_the_same_seed_gives_the_same_model(tiny_model, tokenizer, text):
    results = []
    for seed in (0, 0, 1):
        model = copy.deepcopy(tiny_model)
        settings = dataclasses.replace(SETTINGS, steps=4, seed=seed)
        qat.train(model, tokenizer, "gguf:Q4_0", text=text, settings=settings)
        results.append(values(model))
    assert same(results[0], results[1])
    assert not same(results[0], results[2])


def test_an_interrupted_run_continues_to_the_same_model(tiny_model, tokenizer, text, tmp_path):
    settings = dataclasses.replace(SETTINGS, checkpoint_seconds=0.0)
    whole, broken = copy.deepcopy(tiny_model), copy.deepcopy(tiny_model)
    full = qat.train(whole, tokenizer, "int4-g32-sym", text=text, settings=settings, range="observer")

    def stop(done, report):
        if report.steps == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        qat.train(
            broken, tokenizer, "int4-g32-sym", text=text, settings=settings, range="observer",
            folder=tmp_path, progress=stop,
        )  # fmt: skip
    again = copy.deepcopy(tiny_model)
    steps = []
    report = qat.train(
        again, tokenizer, "int4-g32-sym", text=text, settings=settings, range="observer",
        folder=tmp_path, progress=lambda done, report: steps.append(report.steps),
    )  # fmt: skip
    assert steps[0] == 6  # step 6 was not saved, step 5 was
    assert report.steps == full.steps
    assert report.curve == full.curve
    assert same(values(again), values(whole))


def test_a_checkpoint_of_another_run_is_refused(tiny_model, tokenizer, text, tmp_path):
    settings = dataclasses.replace(SETTINGS, steps=2)
    qat.train(copy.deepcopy(tiny_model), tokenizer, "gguf:Q4_0", text=text, settings=settings, folder=tmp_path)
    for spec, changed in (("gguf:Q4_0", {"seed": 9}), ("gguf:Q4_1", {})):
        with pytest.raises(PhiquantError, match="belongs to a run with other settings, text or weights"):
            qat.train(
                copy.deepcopy(tiny_model), tokenizer, spec, text=text,
                settings=dataclasses.replace(settings, **changed), folder=tmp_path,
            )  # fmt: skip


def test_a_damaged_checkpoint_is_refused(tiny_model, tokenizer, text, tmp_path):
    (tmp_path / "qat-checkpoint.safetensors").write_bytes(b"not a safetensors file")
    with pytest.raises(PhiquantError, match="is damaged"):
        qat.train(tiny_model, tokenizer, "gguf:Q4_0", text=text, settings=SETTINGS, folder=tmp_path)


def test_float_layers_train_when_asked(tiny_model, tokenizer, text):
    before = tiny_model.lm_head.weight.clone()
    settings = dataclasses.replace(SETTINGS, steps=2, train_float=True)
    qat.train(tiny_model, tokenizer, "gguf:Q4_0", text=text, settings=settings)
    assert not torch.equal(tiny_model.lm_head.weight, before)


def test_a_float_control_trains_without_a_grid(tiny_model, tokenizer, text):
    before = values(tiny_model)
    settings = dataclasses.replace(SETTINGS, steps=3, language_model=1.0)
    qat.train(tiny_model, tokenizer, pq.Recipe(default="float"), text=text, settings=settings)
    assert set(values(tiny_model)) == set(before)
    assert not same(values(tiny_model), before)


def test_time_ends_the_run(tiny_model, tokenizer, text):
    settings = dataclasses.replace(SETTINGS, steps=100_000, seconds=1.0)
    shares = []
    report = qat.train(
        tiny_model, tokenizer, "gguf:Q4_0", text=text, settings=settings, progress=lambda d, r: shares.append(d)
    )
    assert 1.0 <= report.seconds < 20
    assert report.steps < 100_000
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_the_loss_is_the_kl_divergence():
    generator = torch.Generator().manual_seed(0)
    logits, expected = torch.randn(2, 3, 7, 11, generator=generator)
    logits.requires_grad_()
    loss = qat.distillation_loss(logits, expected, temperature=2.0)
    p, q = (expected.double() / 2).softmax(-1), (logits.double() / 2).softmax(-1)
    assert loss.item() == pytest.approx(4 * (p * (p / q).log()).sum(-1).mean().item(), rel=1e-5)
    loss.backward()
    assert torch.allclose(logits.grad, (2 * (q - p) / 21).float(), atol=1e-7)


def test_the_text_is_seen_once_an_epoch_and_in_another_order():
    ids = torch.arange(32 * 40, dtype=torch.int32)
    settings = dataclasses.replace(SETTINGS, batch=8)
    epochs = [torch.cat([qat._batch(ids, settings, 5 * epoch + i) for i in range(5)]) for epoch in range(2)]
    for rows in epochs:
        assert rows.shape == (40, 32)
        assert (rows - rows[:, :1] == torch.arange(32)).all()
        assert len(set(rows[:, 0].tolist())) == 40
    assert epochs[0][:, 0].tolist() != epochs[1][:, 0].tolist()
    assert torch.equal(qat._batch(ids, settings, 7), qat._batch(ids, settings, 7))


def test_the_learning_rate_rises_and_falls():
    rates = [schedule(i / 100, warmup=0.05) for i in range(101)]
    assert max(rates) == pytest.approx(1.0)
    assert rates.index(max(rates)) == 5
    assert 0 < rates[0] < 0.2
    assert rates[-1] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"window": 1},
        {"learning_rate": 0.0},
        {"temperature": -1.0},
        {"language_model": 2.0},
        {"seconds": 0},
    ],
)
def test_settings_that_make_no_sense(wrong):
    with pytest.raises(PhiquantError):
        dataclasses.replace(SETTINGS, **wrong)


def test_a_text_that_is_too_short(tiny_model, tokenizer):
    with pytest.raises(PhiquantError, match="a window of 32 needs more"):
        qat.train(tiny_model, tokenizer, "gguf:Q4_0", text="import os", settings=SETTINGS)
    assert not any(isinstance(module, pq.QATLinear) for module in tiny_model.modules())


def test_half_precision_masters_are_refused(tiny_model, tokenizer, text):
    with pytest.raises(PhiquantError, match=r"is torch\.bfloat16.*dtype=torch\.float32"):
        qat.train(tiny_model.to(torch.bfloat16), tokenizer, "gguf:Q4_0", text=text, settings=SETTINGS)


def test_a_diverging_run_says_so(tiny_model, tokenizer, text):
    with torch.no_grad():
        tiny_model.model.norm.weight[0] = math.inf
    with pytest.raises(PhiquantError, match="not finite"):
        qat.train(tiny_model, tokenizer, "gguf:Q4_0", text=text, settings=SETTINGS)
