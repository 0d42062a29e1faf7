"""A model, layer by layer, computes what it computes as a whole: in memory and from its checkpoint."""

from __future__ import annotations

import phiquant as pq
import pytest
import torch
from phiquant import PhiquantError
from phiquant.layerwise import Layerwise
from phiquant.models import phi


@pytest.fixture(scope="module", params=["phi-3-mini", "phi-4-mini"])
def both(request, tmp_path_factory):
    """(model, folder of its checkpoint): a sliding window; GQA, LongRoPE, partial rotary, tied embeddings."""
    model, tokenizer = pq.testing.miniature(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.eval(), folder


@pytest.mark.parametrize("tokens", [40, 90])
@torch.no_grad()
def test_the_layers_one_after_the_other_are_the_model(both, tokens):
    model, folder = both
    ids = torch.randint(0, 1000, (2, tokens), generator=torch.Generator().manual_seed(0))
    expected = model(ids, use_cache=False).logits
    for source in (model, folder):
        walk = Layerwise(source)
        hidden, arguments = walk.embed(ids), walk.arguments(tokens)
        for index in range(len(walk)):
            result = walk.layer(index)(hidden, **arguments)
            hidden = result[0] if isinstance(result, tuple) else result
        logits = walk.normed(hidden) @ walk.weight(phi.HEAD).float().T
        assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_layers_are_copies_in_float32(tiny_model):
    before = tiny_model.model.layers[0].mlp.down_proj.weight.detach().clone()
    layer = Layerwise(tiny_model.to(torch.bfloat16)).layer(0)
    assert layer.mlp.down_proj.weight.dtype == torch.float32
    assert not layer.mlp.down_proj.weight.requires_grad
    layer.mlp.down_proj.weight.zero_()
    assert torch.equal(tiny_model.model.layers[0].mlp.down_proj.weight.detach(), before.bfloat16())


def test_another_model_is_refused():
    with pytest.raises(PhiquantError, match=r"no model\.layers"):
        Layerwise(torch.nn.Linear(2, 2))
