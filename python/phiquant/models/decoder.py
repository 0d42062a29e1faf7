"""The decoder of a Phi-3 model as one program of tensor operations, without saying how they are computed.

An interpreter gives the operations their meaning. `activations.Observed` computes them in torch and notes the range
of every result; `formats.qnn.graph.Graph` writes them as nodes of a static graph. Both read the program below, so
the points where ranges are observed are the points where the graph rounds.

S = tokens that a stage takes at once, C = its context: the tokens it sees, those from the cache and its own S.
H = hidden, D = values of a head, G = key-value heads, R = query heads for each of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from . import phi
from .rope import Rope

Value = Any  # whatever an interpreter computes with

# How far a score that is masked lies below the least that is not: exp(-20) is nothing on a grid of 16 bits.
MARGIN = 20.0


class Operations(Protocol):
    """What an interpreter offers. `point`: the name under which the range of a result is kept; operations without
    one move values and keep their range. Shapes are those of the results."""

    def linear(self, x: Value, module: str) -> Value:
        """x [S, K] times the transposed weight of `module` [N, K]; the point is the module's name."""

    def norm(self, x: Value, module: str) -> Value:
        """RMSNorm over the last axis, with the weight of `module`; the point is the module's name."""

    def add(self, a: Value, b: Value, point: str) -> Value:
        """a + b, broadcast."""

    def mul(self, a: Value, b: Value, point: str) -> Value:
        """a * b, broadcast."""

    def matmul(self, a: Value, b: Value, point: str) -> Value:
        """Batched matrix product."""

    def sigmoid(self, x: Value, point: str) -> Value:
        """1 / (1 + exp(-x))."""

    def masked(self, scores: Value, point: str) -> Value:
        """The scores [G, R, S, C] where a token may look, and far below them elsewhere."""

    def softmax(self, x: Value, point: str) -> Value:
        """Softmax over the last axis."""

    def rotation(self, kind: str) -> tuple[Value, Value]:
        """cos and sin [1, 1, S, D] for the positions of the tokens; kind: "query" (times D^-1/2) or "key"."""

    def centred(self, keys: Value, point: str) -> Value:
        """Keys [G, 1, S, D] less a constant [G, 1, 1, D]. All scores of a query move by as much, which softmax does
        not see; but they become smaller, and so do the errors of rounding them."""

    def cached(self, x: Value, layer: int, kind: str, point: str) -> Value:
        """x, "key" [G, 1, D, S] or "value" [G, 1, S, D], behind what the cache holds: C tokens."""

    def reshape(self, x: Value, shape: tuple[int, ...]) -> Value:
        """The same values in another shape; one size may be -1."""

    def transpose(self, x: Value, axes: tuple[int, ...]) -> Value:
        """Axes in another order."""

    def cut(self, x: Value, start: int, stop: int) -> Value:
        """A slice of the last axis."""

    def join(self, parts: Sequence[Value]) -> Value:
        """Parts of one value, side by side on the last axis."""


@dataclass(frozen=True)
class Sizes:
    """What the program needs to know of a model's shapes."""

    head: int
    kv_heads: int
    repeats: int
    rotary: int

    @classmethod
    def of(cls, config: Mapping[str, Any], rope: Rope) -> Sizes:
        n = phi.sizes(config)
        return cls(n.head_dim, n.kv_heads, n.heads // n.kv_heads, rope.dimensions)


def layer(ops: Operations, n: Sizes, index: int, hidden: Value) -> Value:
    """One decoder layer: hidden [S, H] to [S, H]."""
    at = f"model.layers.{index}"
    x = ops.norm(hidden, f"{at}.input_layernorm")
    x = ops.linear(_attention(ops, n, index, x), f"{at}.self_attn.o_proj")
    hidden = ops.add(hidden, x, f"{at}.attention_sum")
    x = ops.norm(hidden, f"{at}.post_attention_layernorm")
    gate, up = (ops.linear(x, f"{at}.mlp.{part}_proj") for part in ("gate", "up"))
    gate = ops.mul(gate, ops.sigmoid(gate, f"{at}.mlp.sigmoid"), f"{at}.mlp.silu")
    x = ops.linear(ops.mul(up, gate, f"{at}.mlp.product"), f"{at}.mlp.down_proj")
    return ops.add(hidden, x, f"{at}.mlp_sum")


def _attention(ops: Operations, n: Sizes, index: int, x: Value) -> Value:
    """[S, H] to [S, H]. The query heads of a key-value head stand below each other as rows of one matrix."""
    at = f"model.layers.{index}.self_attn"
    q, k, v = (ops.linear(x, f"{at}.{part}_proj") for part in "qkv")
    q = ops.transpose(ops.reshape(q, (-1, n.kv_heads, n.repeats, n.head)), (1, 2, 0, 3))
    k, v = (ops.transpose(ops.reshape(one, (-1, n.kv_heads, 1, n.head)), (1, 2, 0, 3)) for one in (k, v))
    q = ops.reshape(_rotate(ops, n, q, "query", at), (n.kv_heads, 1, -1, n.head))
    k = ops.transpose(ops.centred(_rotate(ops, n, k, "key", at), f"{at}.key_centred"), (0, 1, 3, 2))
    k, v = ops.cached(k, index, "key", f"{at}.key_centred"), ops.cached(v, index, "value", f"{at}.value")
    scores = ops.matmul(q, k, f"{at}.scores")
    scores = ops.reshape(scores, (n.kv_heads, n.repeats, -1, k.shape[-1]))
    weights = ops.softmax(ops.masked(scores, f"{at}.masked"), f"{at}.weights")
    context = ops.matmul(ops.reshape(weights, (n.kv_heads, 1, -1, k.shape[-1])), v, f"{at}.context")
    context = ops.transpose(ops.reshape(context, (n.kv_heads, n.repeats, -1, n.head)), (2, 0, 1, 3))
    return ops.reshape(context, (-1, n.kv_heads * n.repeats * n.head))


def _rotate(ops: Operations, n: Sizes, x: Value, kind: str, at: str) -> Value:
    """Rotary embedding: x cos + swapped(x) sin. The sign of the swapped halves is in sin, which is 0 for values
    that do not rotate."""
    cos, sin = ops.rotation(kind)
    half = n.rotary // 2
    parts = [ops.cut(x, half, n.rotary), ops.cut(x, 0, half)]
    parts += [ops.cut(x, n.rotary, n.head)] if n.rotary < n.head else []
    turned = ops.mul(ops.join(parts), sin, f"{at}.{kind}_sin")
    return ops.add(ops.mul(x, cos, f"{at}.{kind}_cos"), turned, f"{at}.{kind}")


def rotation_tables(rope: Rope, head: int, positions: int, long: bool) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin float32 [positions, head] as _rotate() takes them; `long`: by the long factors of LongRoPE."""
    half = rope.dimensions // 2
    factors = (rope.long if long else rope.short) or [1.0] * half
    exponent = np.arange(0, rope.dimensions, 2, dtype=np.float32) / np.float32(rope.dimensions)
    frequencies = 1.0 / (np.asarray(factors, np.float32) * np.float32(rope.theta) ** exponent)
    angles = np.arange(positions, dtype=np.float32)[:, None] * frequencies[None]
    cos, sin = np.ones((positions, head), np.float32), np.zeros((positions, head), np.float32)
    factor = np.float32(rope.attention_factor)
    cos[:, : 2 * half] = np.tile(np.cos(angles) * factor, 2)
    sin[:, : 2 * half] = np.concatenate([-np.sin(angles), np.sin(angles)], axis=1) * factor
    return cos, sin


def allowed(tokens: int, context: int, window: int | None) -> np.ndarray:
    """bool [S, C]: the places of the context, its own tokens last, that each token may look at."""
    query = np.arange(context - tokens, context)[:, None]
    key = np.arange(context)[None]
    near = key > query - window if window else True
    return (key <= query) & near


def linears(config: Mapping[str, Any], names: set[str]) -> dict[str, tuple[str, slice]]:
    """Where the weight of each linear of the program lies: module -> (tensor, rows of it).

    names: of the model's tensors. q, k, v, gate and up are rows of the fused tensors, or tensors of their own.
    """
    found: dict[str, tuple[str, slice]] = {}
    for name, shape in phi.tensors(config):
        module = name.removesuffix(".weight")
        parts = phi.fused_rows(config, module)
        for part, rows in parts.items():
            own = (f"{part}.weight", slice(0, rows.stop - rows.start))
            found[part] = own if own[0] in names else (name, rows)
        if not parts and len(shape) == 2 and module != phi.EMBEDDING:
            found[module] = (name, slice(0, shape[0]))
    found.setdefault(phi.HEAD, (f"{phi.EMBEDDING}.weight", slice(0, phi.sizes(config).vocab)))
    return found
