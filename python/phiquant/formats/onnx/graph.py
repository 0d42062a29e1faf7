"""The graph of a Phi-3 decoder for ONNX Runtime: what reads which weight. It computes in float32.

Inputs: input_ids [batch, sequence], attention_mask [batch, total], past_key_values.<i>.key and .value
[batch, kv heads, past, head size]; outputs: logits [batch, sequence, vocabulary] and present.<i>.key, .value.
Names and operators are those that ONNX Runtime GenAI knows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...models import phi
from ...models.rope import Rope
from .file import MICROSOFT, DataFile, Graph, Placed
from .weights import Weight


class Decoder:
    """Builds the graph. weights: by Hugging Face name; caches: the tables of onnx_rotary, by name."""

    def __init__(
        self,
        config: Mapping[str, Any],
        rope: Rope,
        weights: Mapping[str, Weight],
        caches: Mapping[str, Placed],
        data: DataFile,
        accuracy_level: int,
    ) -> None:
        self.sizes = phi.sizes(config)
        self.epsilon = float(config.get("rms_norm_eps", 1e-5))
        self.window = int(config.get("sliding_window") or -1)
        self.rope, self.weights, self.caches, self.data = rope, weights, caches, data
        self.accuracy_level = accuracy_level
        self.graph = Graph("phi3")

    def build(self) -> Graph:
        """The whole graph."""
        g, n = self.graph, self.sizes
        ids = g.input("input_ids", "int64", ["batch", "sequence"])
        mask = g.input("attention_mask", "int64", ["batch", "total"])
        self.total = g.node("Gather", [g.node("Shape", [mask]), g.constant(1)], axis=0)
        lengths = g.node("Sub", [g.node("ReduceSum", [mask, g.constant([1])], keepdims=0), g.constant(1)])
        self.lengths = g.node("Cast", [lengths], to=_INT32)
        self.total32 = g.node("Cast", [self.total], to=_INT32)
        self.cos, self.sin = self._rotary()
        stream, x = self._embed(ids), ""
        for index in range(n.layers):
            layer = f"model.layers.{index}"
            stream, normed = self._norm(stream, x, f"{layer}.input_layernorm")
            x = self._attention(normed, index, f"{layer}.self_attn")
            stream, normed = self._norm(stream, x, f"{layer}.post_attention_layernorm")
            x = self._mlp(normed, f"{layer}.mlp")
        _, normed = self._norm(stream, x, phi.FINAL_NORM)
        self._linear(normed, phi.EMBEDDING if n.tied else phi.HEAD, "logits")
        g.output("logits", "float32", ["batch", "sequence", n.vocab])
        for index in range(n.layers):
            for part in ("key", "value"):
                g.output(f"present.{index}.{part}", "float32", ["batch", n.kv_heads, "total", n.head_dim])
        return g

    def _part(self, name: str, part: str) -> str:
        """The name of the tensor that holds `part` of a weight, as an input of a node."""
        return self.graph.external(self.weights[f"{name}.weight"].parts[part], self.data)

    def _rotary(self) -> tuple[str, str]:
        """Tables of cosines and sines; LongRoPE takes the long ones as soon as a text is longer than the original."""
        g = self.graph
        tables = {name: g.external(placed, self.data) for name, placed in self.caches.items()}
        if self.rope.long is None:
            return tables["cos"], tables["sin"]
        longer = g.node("Greater", [self.total, g.constant(self.rope.original_context)])
        branches = {}
        for kind in ("long", "short"):
            branch = Graph(kind)
            for axis in ("cos", "sin"):
                # Only the rows that are needed: a branch hands over copies.
                ends = [g.constant([0]), g.node("Unsqueeze", [self.total, g.constant([0])]), g.constant([0])]
                branch.node("Slice", [tables[f"{axis}_{kind}"], *ends], [f"{kind}_{axis}"])
                branch.output(f"{kind}_{axis}", "float32", ["rows", self.rope.dimensions // 2])
            branches[kind] = branch.proto()
        g.node("If", [longer], ["cos", "sin"], then_branch=branches["long"], else_branch=branches["short"])
        return "cos", "sin"

    def _embed(self, ids: str) -> str:
        g, how = self.graph, self.weights[f"{phi.EMBEDDING}.weight"].layout
        if how.kind == "plain":
            return self._float32(g.node("Gather", [self._part(phi.EMBEDDING, "values"), ids], axis=0), how.dtype)
        codes = g.node("Reshape", [self._part(phi.EMBEDDING, "codes"), g.constant([self.sizes.vocab, -1])])
        inputs = [codes, ids, self._part(phi.EMBEDDING, "scales")]
        if how.zero_points:
            inputs.append(self._part(phi.EMBEDDING, "zero_points"))
        return g.node(
            "GatherBlockQuantized", inputs, domain=MICROSOFT, bits=how.bits, block_size=how.block, gather_axis=0,
            quantize_axis=1,
        )  # fmt: skip

    def _norm(self, stream: str, x: str, name: str) -> tuple[str, str]:
        """(stream + x, its norm); the first layer has nothing to add."""
        g, gamma = self.graph, self._part(name, "values")
        if not x:
            normed = g.node(
                "SimplifiedLayerNormalization", [stream, gamma], axis=-1, epsilon=self.epsilon, stash_type=1
            )
            return stream, normed
        outputs = [f"{name}/output", "", "", f"{name}/sum"]
        inputs = [stream, x, gamma]
        g.node("SkipSimplifiedLayerNormalization", inputs, outputs, domain=MICROSOFT, epsilon=self.epsilon)
        return outputs[3], outputs[0]

    def _attention(self, x: str, index: int, name: str) -> str:
        g, n = self.graph, self.sizes
        if f"{name}.qkv_proj.weight" in self.weights:
            qkv = [self._linear(x, f"{name}.qkv_proj"), "", ""]
        else:
            qkv = [self._linear(x, f"{name}.{part}_proj") for part in "qkv"]
        shape: list[int | str | None] = ["batch", n.kv_heads, "past", n.head_dim]
        past = [g.input(f"past_key_values.{index}.{part}", "float32", shape) for part in ("key", "value")]
        outputs = [f"{name}/output", f"present.{index}.key", f"present.{index}.value"]
        g.node(
            "GroupQueryAttention", [*qkv, *past, self.lengths, self.total32, self.cos, self.sin], outputs,
            domain=MICROSOFT, num_heads=n.heads, kv_num_heads=n.kv_heads, scale=n.head_dim**-0.5,
            do_rotary=1, rotary_interleaved=0, local_window_size=self.window,
        )  # fmt: skip
        return self._linear(outputs[0], f"{name}.o_proj")

    def _mlp(self, x: str, name: str) -> str:
        g = self.graph
        if f"{name}.gate_up_proj.weight" in self.weights:
            halves = [f"{name}/gate", f"{name}/up"]
            g.node("Split", [self._linear(x, f"{name}.gate_up_proj")], halves, axis=-1, num_outputs=2)
        else:
            halves = [self._linear(x, f"{name}.{part}_proj") for part in ("gate", "up")]
        gate, up = halves
        silu = g.node("Mul", [gate, g.node("Sigmoid", [gate])])
        return self._linear(g.node("Mul", [silu, up]), f"{name}.down_proj")

    def _linear(self, x: str, name: str, output: str | None = None) -> str:
        """x times the transposed weight of module `name`."""
        kinds = {"blocks": self._blocks, "columns": self._columns, "dynamic": self._dynamic, "plain": self._plain}
        weight = self.weights[f"{name}.weight"]
        return kinds[weight.layout.kind](x, name, weight, [output or f"{name}/output"])

    def _blocks(self, x: str, name: str, weight: Weight, output: list[str]) -> str:
        (rows, columns), how = weight.entry.shape, weight.layout
        inputs = [x, *(self._part(name, part) for part in weight.parts)]
        return self.graph.node(
            "MatMulNBits", inputs, output, domain=MICROSOFT, N=rows, K=columns, bits=how.bits,
            block_size=how.block, accuracy_level=self.accuracy_level,
        )  # fmt: skip

    def _columns(self, x: str, name: str, weight: Weight, output: list[str]) -> str:
        g, inputs = self.graph, [self._part(name, part) for part in weight.parts]
        values = g.node("DequantizeLinear", inputs, axis=0, block_size=weight.layout.block)
        return g.node("MatMul", [x, values], output)

    def _dynamic(self, x: str, name: str, weight: Weight, output: list[str]) -> str:
        """Activations rounded to uint8 per tensor as they come; integers multiplied by integers."""
        g, rounded = self.graph, [f"{name}/uint8", f"{name}/scale", f"{name}/zero_point"]
        g.node("DynamicQuantizeLinear", [x], rounded)
        sums = g.node("MatMulInteger", [rounded[0], self._part(name, "codes"), rounded[2]])
        scale = g.node("Mul", [rounded[1], self._part(name, "scales")])
        return g.node("Mul", [self._float32(sums, "int32"), scale], output)

    def _plain(self, x: str, name: str, weight: Weight, output: list[str]) -> str:
        g = self.graph
        values = self._float32(self._part(name, "values"), weight.layout.dtype)
        return g.node("MatMul", [x, g.node("Transpose", [values], perm=[1, 0])], output)

    def _float32(self, value: str, dtype: str) -> str:
        return value if dtype == "float32" else self.graph.node("Cast", [value], to=_FLOAT)


_FLOAT, _INT32 = 1, 6  # of TensorProto.DataType
