"""transformers.Trainer trains through grids; a run that goes on from its checkpoint ends with the same codes."""

import copy
import json

import phiquant as pq
import pytest
import torch
from phiquant.errors import PhiquantError
from phiquant.testing import random_phi3

STEPS, SAVED = 6, 4
CASES = {
    "mse": {"range": "mse"},
    "frozen on the way": {"range": "tensor", "freeze": 0.5},  # before the checkpoint
    "frozen after": {"range": "observer", "freeze": 0.8},
    "learned": {"range": "learned"},
}


def windows():
    ids = torch.randint(0, 4096, (32, 32), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row} for row in ids]


def trainer(folder, callback, *more, model=None, **settings):
    from phiquant.trainer import DistillationTrainer
    from transformers import TrainingArguments

    arguments = {
        "max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "save_steps": 2, "report_to": [],
        "use_cpu": True, "disable_tqdm": True,
    }  # fmt: skip
    model = random_phi3() if model is None else model
    callbacks = [*([] if callback is None else [callback]), *more]
    args = TrainingArguments(str(folder), **{**arguments, **settings})
    return DistillationTrainer(model, args, train_dataset=windows(), callbacks=callbacks)


def stop_at(step):
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == step

    return Stop()


def values(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    "case",
    [pytest.param(name, marks=() if name == "frozen on the way" else pytest.mark.slow) for name in CASES],
)
def test_a_resumed_run_ends_with_the_same_codes(tmp_path, case):
    from phiquant.trainer import QATCallback

    how = {"what": "gguf:Q4_0", **CASES[case]}
    whole = trainer(tmp_path / "whole", QATCallback(**how))
    whole.train()
    trainer(tmp_path / "broken", QATCallback(**how, convert=False), stop_at(SAVED)).train()
    again = trainer(tmp_path / "broken", QATCallback(**how))
    again.train(resume_from_checkpoint=True)
    assert same(values(again.model), values(whole.model))
    layer = whole.model.model.layers[0].mlp.down_proj
    assert layer.weight_quantizer.origin == {"solver": "qat", "range": how["range"], "steps": STEPS}
    assert not torch.equal(
        layer.quantized.codes,
        pq.quantize_tensor(random_phi3().model.layers[0].mlp.down_proj.weight, "gguf:Q4_0", solver="mse").codes,
    )

    state = json.loads((tmp_path / f"broken/checkpoint-{SAVED}/trainer_state.json").read_text())
    kept = state["stateful_callbacks"]["QATCallback"]["attributes"]
    assert kept["done"] == SAVED
    assert kept["frozen"] is (how.get("freeze", 1) * STEPS < SAVED)
    if case == "frozen on the way":
        other = trainer(tmp_path / "broken", QATCallback("gguf:Q4_1", **CASES[case]))
        with pytest.raises(PhiquantError, match=r"trained model\.layers\.0.* through int4-g32-signmax-f16"):
            other.train(resume_from_checkpoint=True)


def test_a_checkpoint_without_grids_is_refused(tmp_path):
    from phiquant.trainer import QATCallback

    trainer(tmp_path, None, max_steps=2).train()
    with pytest.raises(PhiquantError, match="saved by a run without QATCallback"):
        trainer(tmp_path, QATCallback("gguf:Q4_0", train_float=True)).train(resume_from_checkpoint=True)


def test_the_loss_is_that_of_the_positions_shown(tmp_path):
    from phiquant.trainer import QATCallback

    teacher = random_phi3()
    run = trainer(tmp_path, QATCallback("int2-g32-sym"), model=copy.deepcopy(teacher))
    rows = torch.stack([window["input_ids"] for window in windows()[:3]])
    mask = torch.ones_like(rows)
    mask[1, 20:] = 0
    loss = run.compute_loss(run.model.eval(), {"input_ids": rows, "attention_mask": mask, "labels": rows})
    with torch.no_grad():
        p = teacher(rows, attention_mask=mask).logits.double().log_softmax(-1)
        q = run.model(rows, attention_mask=mask).logits.double().log_softmax(-1)
    wanted = (p.exp() * (p - q)).sum(-1)[mask.bool()].mean()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-4)
    assert not any(p.requires_grad for p in run.teacher.parameters())


def test_accumulated_batches_count_as_one(tmp_path):
    """Two batches of two give the step that one of four gives, but for the order of sums."""
    from phiquant.trainer import QATCallback

    models = []
    for size, parts in ((4, 1), (2, 2)):
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": parts, "max_steps": 1}
        run = trainer(tmp_path / str(parts), QATCallback("int4-g32-sym", convert=False), **settings)
        run.args.optim = "sgd"  # a step as long as the gradient, unlike Adam's
        run.train()
        models.append(run.model)
    start = dict(random_phi3().named_parameters())
    for name in start:
        one, two = (dict(model.named_parameters())[name] - start[name] for model in models)
        assert torch.allclose(one, two, rtol=1e-3, atol=1e-3 * one.abs().max().item()), name
    assert any(not torch.equal(p, start[n]) for n, p in models[0].named_parameters())


@pytest.mark.parametrize("train_float", [False, True])
def test_what_stays_in_float_stays_unless_it_is_to_train(tmp_path, train_float):
    from phiquant.trainer import QATCallback

    run = trainer(tmp_path, QATCallback("gguf:Q4_0", range="learned", train_float=train_float), max_steps=1)
    scale = run.model.get_submodule("model.layers.0.mlp.down_proj").weight_quantizer.scale.detach().clone()
    trained = run.model.get_submodule("model.layers.0.mlp.down_proj").weight_quantizer.scale
    run.train()
    assert not torch.equal(trained, scale)
    start = dict(random_phi3().named_parameters())
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        after = run.model.get_parameter(name)
        assert after.requires_grad
        assert torch.equal(after, start[name]) is not train_float, name


def test_nothing_to_finish():
    from phiquant.trainer import QATCallback

    with pytest.raises(PhiquantError, match="nothing was trained yet"):
        QATCallback("gguf:Q4_0").finish()
