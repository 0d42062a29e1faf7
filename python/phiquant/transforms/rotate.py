"""Hadamard rotation (QuaRot's folded part): the residual stream and the value heads in another orthonormal basis."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..errors import PhiquantError
from ..models import phi
from ..quant_spec import QuantSpec
from .fold import fold
from .pairs import pieces


@torch.no_grad()
def rotate(
    model: nn.Module,
    ids: Tensor | None,
    specs: Mapping[str, QuantSpec | None],
    seed: int = 0,
    parts: str = "all",
    untie: bool = False,
) -> dict[str, Any]:
    """Replace the hidden state x by x Q, Q = diag(signs) H / sqrt(D), and each value head v by v R of the same kind.

    (Ashkboos et al., arXiv 2404.00456.) Norms are folded first: with equal weights |x Q| = |x|, so they let Q pass.
    Then embedding E -> E Q, what reads the stream W -> W Q, what writes it W -> Q^T W. No operation is added.
    seed: of the signs. parts: "all", "residual" or "heads". untie: give tied embeddings a head of its own, which
        the folded final norm needs; without it they are refused.
    """
    if parts not in ("all", "residual", "heads"):
        raise PhiquantError(f"rotate: parts is 'all', 'residual' or 'heads', not {parts!r}")
    config: Any = model.config
    n = phi.sizes(config.to_dict())
    residual, heads = parts != "heads", parts != "residual"
    for size in (n.hidden,) * residual + (n.head_dim,) * heads:
        try:
            ops.hadamard_base(size)
        except ValueError as error:
            raise PhiquantError(f"rotate: {error}") from error
    if residual and n.tied:
        if not untie:
            raise PhiquantError(
                "rotate: lm_head shares its weight with the embedding, and the final norm between them must be folded "
                f"into lm_head alone; untie=true gives it a weight of its own ({n.vocab} x {n.hidden} more values), "
                "parts=heads rotates the value heads only"
            )
        _untie(model)
    generator = torch.Generator().manual_seed(seed)
    if residual:
        fold(model, ids, specs)
        _rotate_residual(model, n, _signs(n.hidden, generator))
    if heads:
        _rotate_heads(model, n, _signs(n.head_dim, generator))
    return {"seed": seed, "parts": parts, **({"untied": True} if residual and n.tied else {})}


def _signs(size: int, generator: torch.Generator) -> Tensor:
    return torch.randint(2, (size,), generator=generator).float() * 2 - 1


def _rotate_residual(model: nn.Module, n: phi.Sizes, signs: Tensor) -> None:
    for name in (phi.EMBEDDING, phi.HEAD):
        _columns(_weight(model, name), signs)
    for index in range(n.layers):
        layer = f"model.layers.{index}"
        for reader in ("self_attn.qkv_proj", "mlp.gate_up_proj"):
            _columns(_weight(model, f"{layer}.{reader}"), signs)
        for writer in ("self_attn.o_proj", "mlp.down_proj"):
            _rows(_weight(model, f"{layer}.{writer}"), signs)


def _rotate_heads(model: nn.Module, n: phi.Sizes, signs: Tensor) -> None:
    """One R for all heads: the query heads that read a value head find its values rotated."""
    for index in range(n.layers):
        attention = f"model.layers.{index}.self_attn"
        v = _weight(model, f"{attention}.qkv_proj")[-n.kv_dim :]
        for head in v.split(n.head_dim):
            _rows(head, signs)
        _columns(_weight(model, f"{attention}.o_proj").view(-1, n.head_dim), signs)


def _weight(model: nn.Module, name: str) -> Tensor:
    return model.get_submodule(name).get_parameter("weight").data


def _columns(weight: Tensor, signs: Tensor) -> None:
    """W -> W Q, in place, computed in float32."""
    for rows in pieces(weight):
        rows.copy_(ops.hadamard_rotate_(rows.to(torch.float32, copy=True), signs.to(weight.device)))


def _rows(weight: Tensor, signs: Tensor) -> None:
    """W -> Q^T W, in place, computed in float32."""
    for columns in pieces(weight, dim=1):
        columns.copy_(ops.hadamard_rotate_(columns.float().T.contiguous(), signs.to(weight.device)).T)


def _untie(model: Any) -> None:
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(model.get_input_embeddings().weight.detach().clone())
    model.all_tied_weights_keys = {}  # of transformers: what save_pretrained leaves out
