"""A Phi-3 decoder as an OpenVINO graph: stateful, with the inputs that openvino_genai gives.

Inputs: input_ids, attention_mask, position_ids, int64 [B, S] ([B, T] the mask), and beam_idx, int32 [B]. Output:
logits, float32 [B, S, V]. Keys and values of earlier tokens are variables of the model. B = batch, S = new tokens,
T = all tokens, V = vocabulary, D = values of a head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...models import phi
from ...models.rope import read_rope
from ..source import Entry
from .decode import decode
from .ir import name_nodes
from .layout import Part
from .nodes import Nodes, attention_mask, rotate, rotation


def build(config: Mapping[str, Any], entries: Sequence[Entry]) -> Any:
    """The graph as an openvino.Model. Each constant of a weight is a Parameter with the name of its Part."""
    decoder = _Decoder(config, entries)
    logits = decoder.logits()
    logits.output(0).set_names({"logits"})
    inputs = [*decoder.inputs, *decoder.constants.values()]
    model = decoder.ov.Model([decoder.op.result(logits)], decoder.sinks, inputs, "phi3")
    name_nodes(model)
    return model


class _Decoder(Nodes):
    """The nodes of one model. x: a node with activations, float32 [B, S, ...]; module: a name in the checkpoint."""

    def __init__(self, config: Mapping[str, Any], entries: Sequence[Entry]) -> None:
        super().__init__()
        self.n, self.rope = phi.sizes(config), read_rope(config)
        self.window = config.get("sliding_window")
        self.epsilon = float(config.get("rms_norm_eps", 1e-5))
        self.entries = {entry.name: entry for entry in entries}
        self.constants: dict[str, Any] = {}
        self.sinks: list[Any] = []
        self.ids, self.mask, self.positions = self.inputs = [
            self.input(name, "i64", [-1, -1]) for name in ("input_ids", "attention_mask", "position_ids")
        ]
        self.beams = self.input("beam_idx", "i32", [-1])
        self.inputs = [*self.inputs, self.beams]

    def logits(self) -> Any:
        x = self.op.gather(self.weight(phi.EMBEDDING), self.op.convert(self.ids, "i32"), self.integer(0))
        self.batch = self.size(self.ids, 0)
        self.cos, self.sin = rotation(self, self.rope, self.positions)
        self.visible = attention_mask(self, self.ids, self.mask, self.window)
        for index in range(self.n.layers):
            layer = f"model.layers.{index}"
            x = self.op.add(x, self.attention(self.norm(x, f"{layer}.input_layernorm"), f"{layer}.self_attn", index))
            x = self.op.add(x, self.mlp(self.norm(x, f"{layer}.post_attention_layernorm"), f"{layer}.mlp"))
        return self.linear(self.norm(x, phi.FINAL_NORM), phi.EMBEDDING if self.n.tied else phi.HEAD)

    def norm(self, x: Any, module: str) -> Any:
        """RMSNorm, in the form that is fused to one operation."""
        op = self.op
        square = op.reduce_mean(op.power(x, self.float(2.0)), self.integer(-1), keep_dims=True)
        inverse = op.divide(self.float(1.0), op.sqrt(op.add(square, self.float(self.epsilon))))
        return op.multiply(self.weight(module), op.multiply(x, inverse))

    def linear(self, x: Any, module: str) -> Any:
        return self.op.matmul(x, self.weight(module), transpose_a=False, transpose_b=True)

    def slices(self, x: Any, module: str, rows: Sequence[int]) -> list[Any]:
        """The outputs of a fused linear, or of the linears that stand in its place."""
        if f"{module}.weight" not in self.entries:
            return [self.linear(x, name) for name in phi.slice_names(module)]
        return list(self.op.variadic_split(self.linear(x, module), self.integer(-1), self.integers(*rows)).outputs())

    def mlp(self, x: Any, module: str) -> Any:
        gate, up = self.slices(x, f"{module}.gate_up_proj", (self.n.intermediate, self.n.intermediate))
        return self.linear(self.op.multiply(up, self.op.swish(gate)), f"{module}.down_proj")

    def attention(self, x: Any, module: str, index: int) -> Any:
        op, n = self.op, self.n
        q, k, v = self.slices(x, f"{module}.qkv_proj", (n.hidden, n.kv_dim, n.kv_dim))
        q, k, v = self.heads(q, n.heads), self.heads(k, n.kv_heads), self.heads(v, n.kv_heads)
        q, k = (rotate(self, one, self.cos, self.sin, self.rope.dimensions, n.head_dim) for one in (q, k))
        k, v = self.remember(k, index, "key"), self.remember(v, index, "value")
        scale = self.float(n.head_dim**-0.5)
        y = op.scaled_dot_product_attention(q, self.shared(k), self.shared(v), self.visible, scale, causal=False)
        y = op.reshape(op.transpose(y, self.integers(0, 2, 1, 3)), self.integers(0, 0, n.hidden), special_zero=True)
        return self.linear(y, f"{module}.o_proj")

    def heads(self, x: Any, count: int) -> Any:
        """[B, S, count * D] -> [B, count, S, D]."""
        shape = self.integers(0, 0, count, self.n.head_dim)
        return self.op.transpose(self.op.reshape(x, shape, special_zero=True), self.integers(0, 2, 1, 3))

    def shared(self, x: Any) -> Any:
        """Keys or values [B, kv_heads, T, D], each head repeated for the query heads that share it."""
        op, n = self.op, self.n
        if n.heads == n.kv_heads:
            return x
        shape = self.shape(self.batch, n.kv_heads, n.heads // n.kv_heads, 1, n.head_dim)
        x = op.broadcast(self.unsqueezed(x, 2), shape, broadcast_spec="BIDIRECTIONAL")
        return op.reshape(x, self.integers(0, n.heads, -1, n.head_dim), special_zero=True)

    def remember(self, new: Any, index: int, what: str) -> Any:
        """Keys or values of all tokens so far, [B, kv_heads, T, D]. beam_idx picks the rows to go on with."""
        op, n = self.op, self.n
        variable = f"past_key_values.{index}.{what}present.{index}.{what}"  # the name that openvino_genai looks for
        start = op.broadcast(self.float(0.0), self.shape(self.batch, n.kv_heads, 0, n.head_dim))
        shape = self.ov.PartialShape([-1, n.kv_heads, -1, n.head_dim])
        before = op.gather(self.op6.read_value(start, variable, self.ov.Type.f32, shape), self.beams, self.integer(0))
        whole = op.concat([before, new], 2)
        self.sinks.append(self.op6.assign(whole, variable))
        return whole

    def weight(self, module: str) -> Any:
        return decode(self.entries[f"{module}.weight"], self.constant)

    def constant(self, part: Part) -> Any:
        """The stand-in of a constant: one for all that use it, so that a tied embedding is stored once."""
        if part.name not in self.constants:
            self.constants[part.name] = self.op.parameter(list(part.shape), getattr(self.ov.Type, part.type))
            self.constants[part.name].set_friendly_name(part.name)
        return self.constants[part.name]
