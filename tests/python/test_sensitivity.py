"""Losses of single slices: against models that are quantized in that slice alone, against the formula in float64."""

from __future__ import annotations

import copy
import json

import numpy as np
import phiquant as pq
import pytest
import torch
from phiquant import PhiquantError, sensitivity
from phiquant.models import phi
from phiquant.sensitivity import measure, slices

TWO, EIGHT = pq.spec("int2-g32-sym-f16"), pq.spec("int8-g32-sym-f16")
QUERY, VALUE, DOWN = (f"model.layers.{i}" for i in ("0.self_attn.q_proj", "1.self_attn.v_proj", "0.mlp.down_proj"))


def some(model, *names):
    by_name = {one.name: one for one in slices(model.config.to_dict())}
    return [by_name[name] for name in names]


def windows(seed=0, count=3, tokens=24):
    return torch.randint(0, 4000, (count, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def kl_of(model, recipe, ids, solver="rtn"):
    """In float64, of the model quantized by that recipe."""
    data = ids if solver == "gptq" else None
    quantized = pq.quantize(copy.deepcopy(model), recipe, solver, calibration=data)
    p, q = (m(ids, use_cache=False).logits.double().log_softmax(-1) for m in (model, quantized))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_slices_are_the_projections_in_the_order_of_the_model(make_phi3):
    tied = make_phi3(tie_word_embeddings=True)
    found = slices(tied.config.to_dict())
    names = [one.name.removeprefix("model.layers.") for one in found]
    parts = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    parts += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    assert names == [phi.EMBEDDING, *(f"{layer}.{part}" for layer in (0, 1) for part in parts)]
    fused = tied.model.layers[0].self_attn.qkv_proj.weight
    q, k, v = found[1:4]
    assert (q.rows, k.rows, v.rows) == (slice(0, 128), slice(128, 192), slice(192, 256))
    assert v.shape == fused[v.rows].shape
    whole = slices(make_phi3().config.to_dict(), lambda module: False)
    assert [one.name.rpartition(".")[2] for one in whole[1:5]] == ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    assert whole[-1].name == phi.HEAD


@pytest.mark.parametrize("tied", [False, True])
def test_kl_is_that_of_a_model_quantized_in_one_slice(make_phi3, tied):
    model, ids = make_phi3(tie_word_embeddings=tied).eval(), windows()
    names = [phi.EMBEDDING, QUERY, VALUE, DOWN, *([] if tied else [phi.HEAD])]
    found = measure(model, {one: [TWO, EIGHT] for one in some(model, *names)}, ids)
    for name in names:
        for spec in (TWO, EIGHT):
            rules = {name: spec} | ({phi.HEAD: spec} if tied and name == phi.EMBEDDING else {})
            expected = kl_of(model, pq.Recipe(rules), ids)
            assert found[name][str(spec)] == pytest.approx(expected, rel=2e-2, abs=3e-7), (name, spec)


def test_kl_with_a_solver_that_needs_data(tiny_model):
    ids = windows(count=40, tokens=32)
    found = measure(tiny_model.eval(), {one: [TWO] for one in some(tiny_model, QUERY, DOWN)}, ids, "gptq")
    for name in (QUERY, DOWN):
        assert found[name][str(TWO)] == pytest.approx(kl_of(tiny_model, pq.Recipe({name: TWO}), ids, "gptq"), rel=2e-2)


def test_proxy_is_the_second_order_term(tiny_model, monkeypatch):
    """1/2 sum_r E[g_r^2] (D H D^T)_rr, tokens weighed in H by their gradients, with g by autograd over all."""

    def second(p, count, generator=None):
        return p.argsort(-1, descending=True)[:, 1:2]

    monkeypatch.setattr(torch, "multinomial", second)  # the sample is no matter here, but it must be known
    ids, model = windows(), tiny_model.eval()
    found = measure(model, {one: [TWO] for one in some(model, phi.EMBEDDING, VALUE, DOWN)}, ids, method="proxy")

    kept = {}

    def keep(module, arguments, output):
        output.retain_grad()
        kept.setdefault(module, []).append((arguments[0].detach(), output))

    layers = model.model.layers
    linears = {
        VALUE: layers[1].self_attn.qkv_proj,
        DOWN: layers[0].mlp.down_proj,
        phi.EMBEDDING: model.model.embed_tokens,
    }
    hooks = [module.register_forward_hook(keep) for module in linears.values()]
    logits = model(ids, use_cache=False).logits
    targets = logits.detach().argsort(-1, descending=True)[..., 1:2]
    (-logits.log_softmax(-1).gather(-1, targets)).sum().backward()
    for hook in hooks:
        hook.remove()
    rows = {VALUE: slice(192, 256), DOWN: slice(None)}
    for name, at in rows.items():
        ((x, y),) = kept[linears[name]]
        g = y.grad.double().reshape(-1, y.shape[-1]).numpy()
        x = x.double().reshape(len(g), -1).numpy()
        w = linears[name].weight.detach()[at]
        d = (pq.quantize_tensor(w, TWO).dequantize() - w).double().numpy()
        weight = np.square(g).sum(1)
        h = (x * weight[:, None]).T @ x / weight.sum()
        expected = 0.5 * (np.square(g[:, at]).mean(0) * np.einsum("ri,ij,rj->r", d, h, d)).sum()
        assert found[name][str(TWO)] == pytest.approx(expected, rel=1e-4)
    ((_, y),) = kept[linears[phi.EMBEDDING]]
    table = model.model.embed_tokens.weight.detach()
    error = (pq.quantize_tensor(table, TWO).dequantize() - table)[ids].double()
    expected = 0.5 * (y.grad.double() * error).sum(-1).square().mean()
    assert found[phi.EMBEDDING][str(TWO)] == pytest.approx(float(expected), rel=1e-4)


def test_proxy_is_near_to_what_is_measured_on_a_trained_model(phi3_tiny):
    model, tokenizer = phi3_tiny
    ids = torch.tensor(pq.evaluate.windows(tokenizer, pq.testing.training_text(40_000), 128, 4))
    grids = {one: [pq.spec("int4-g32-sym-f16")] for one in slices(model.config.to_dict()) if one.layer in (1, 3)}
    measured, proxy = (measure(model, grids, ids, method=method) for method in ("kl", "proxy"))
    a, b = (np.log([one["int4-g32-sym-f16"] for one in found.values()]) for found in (measured, proxy))
    assert np.corrcoef(a, b)[0, 1] > 0.9
    assert np.abs(a - b).mean() < 0.5


def test_proxy_of_a_tied_table_counts_the_head(make_phi3):
    model, ids = make_phi3(tie_word_embeddings=True).eval(), windows()
    grids = {one: [EIGHT] for one in some(model, phi.EMBEDDING)}
    measured, proxy = (measure(model, grids, ids, method=m)[phi.EMBEDDING][str(EIGHT)] for m in ("kl", "proxy"))
    assert 0.7 < proxy / measured < 1.4


def test_proxy_from_a_checkpoint_is_that_of_the_model(tmp_path):
    model, tokenizer = pq.testing.miniature("phi-4-mini")
    model.save_pretrained(tmp_path / "checkpoint")
    tokenizer.save_pretrained(tmp_path / "checkpoint")
    ids = windows(tokens=20) % 1000
    grids = {one: [TWO] for one in slices(model.config.to_dict())}
    in_memory = measure(model, grids, ids, method="proxy")
    from_disk = measure(tmp_path / "checkpoint", grids, ids, method="proxy", folder=tmp_path / "state")
    assert in_memory == from_disk
    assert not (tmp_path / "state/states.bin").exists()


@pytest.mark.parametrize("method", ["kl", "proxy"])
def test_a_killed_measurement_goes_on_where_it_was(tiny_model, tmp_path, monkeypatch, method):
    grids = {one: [TWO] for one in some(tiny_model, QUERY, VALUE, DOWN)}
    whole = measure(tiny_model, grids, windows(), method=method)
    before = {name: value.clone() for name, value in tiny_model.state_dict().items()}

    def killed(name, done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(tiny_model, grids, windows(), method=method, folder=tmp_path, progress=killed)
    assert all(torch.equal(value, before[name]) for name, value in tiny_model.state_dict().items())
    done = {json.loads(path.read_text())["slice"] for path in tmp_path.glob("*.json")}
    assert len(done) == 2
    solved = []
    real = sensitivity.quantize_tensor
    monkeypatch.setattr(sensitivity, "quantize_tensor", lambda *a, **k: solved.append(a[3]) or real(*a, **k))
    assert measure(tiny_model, grids, windows(), method=method, folder=tmp_path) == whole
    assert set(solved) == {f"{one.name}.weight" for one in grids if one.name not in done}
    more = {one: [TWO, EIGHT] for one in some(tiny_model, QUERY)}
    solved.clear()
    found = measure(tiny_model, more, windows(), method=method, folder=tmp_path)
    assert found[QUERY][str(TWO)] == whole[QUERY][str(TWO)]
    assert len(solved) == 1  # the new grid alone


def test_another_measurement_is_refused_and_so_is_a_damaged_one(tiny_model, tmp_path):
    grids = {one: [TWO] for one in some(tiny_model, phi.HEAD)}
    measure(tiny_model, grids, windows(), folder=tmp_path)
    for changes in ({"solver": "mse"}, {"method": "proxy"}, {"ids": windows(1)}):
        arguments = {"ids": windows(), **changes}
        with pytest.raises(PhiquantError, match="another model, text, solver"):
            measure(tiny_model, grids, folder=tmp_path, **arguments)
    (tmp_path / f"{phi.HEAD}.json").write_text('{"losses": 3}')
    with pytest.raises(PhiquantError, match="damaged"):
        measure(tiny_model, grids, windows(), folder=tmp_path)


def test_an_unknown_method_is_refused(tiny_model):
    with pytest.raises(PhiquantError, match="'kl' or by 'proxy'"):
        measure(tiny_model, {}, windows(), method="guess")
