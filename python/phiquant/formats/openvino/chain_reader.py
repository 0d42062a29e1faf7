"""The operations between the constant of a weight and the operation that uses the weight, as a file has them.

constant [-> Convert] [-> Gather of levels] [-> Subtract zero point] [-> Multiply scale] [-> Reshape]
-> MatMul of a linear, Gather of an embedding or Multiply of a norm
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from .xml_reader import Constant, Graph, Layer

_LONGEST = 12  # operations of a chain
_CODES = ("u2", "u4", "i4", "u8", "i8", "nf4", "f4e2m1", "f8e4m3", "f8e5m2")
_FLOATS = ("f32", "f16", "bf16")


@dataclass(frozen=True)
class Chain:
    """What stands between codes and weight. shape: of the weight; steps: the names of the operations, in order."""

    codes: Constant
    shape: tuple[int, ...]
    steps: tuple[str, ...] = ()
    zero_point: Constant | None = None
    scale: Constant | None = None
    super_scale: Constant | None = None
    codebook: Constant | None = None

    @property
    def coded(self) -> bool:
        return self.codes.type not in _FLOATS


def find_chain(graph: Graph, layer: Layer) -> Chain:
    """The chain after a constant. All its users, of a tied weight for instance, must have the same one."""
    assert layer.constant is not None
    if layer.constant.type not in (*_CODES, *_FLOATS) or 0 in layer.constant.shape or not layer.constant.shape:
        graph.fail(layer, f"is {layer.constant.type} {list(layer.constant.shape)}, which is no weight")
    if not layer.consumers:
        graph.fail(layer, "is used by no operation")
    chains = [_follow(graph, layer, *user) for user in layer.consumers]
    if any(chain != chains[0] for chain in chains):
        graph.fail(layer, "is decoded in two ways")
    return _checked(graph, chains[0])


def _follow(graph: Graph, layer: Layer, user: Layer, port: int) -> Chain:
    assert layer.constant is not None
    chain, before = Chain(layer.constant, layer.constant.shape), layer
    for _ in range(_LONGEST):
        found = _step(graph, chain, user, port, before)
        if found is None:
            _check_user(graph, layer, chain, user, port)
            return chain
        if len(user.consumers) != 1:
            graph.fail(user, f"is used {len(user.consumers)} times, one is what a weight has")
        chain, before = found, user
        user, port = user.consumers[0]
    graph.fail(layer, f"has more than {_LONGEST} operations after it")


def _step(graph: Graph, chain: Chain, user: Layer, port: int, before: Layer) -> Chain | None:
    """The chain with the operation `user` added, or None if that uses the weight."""
    if user.type == "Convert":
        if chain.codes.type[0] == "u" and user.data.get("destination_type") == "i32" and not chain.steps:
            return chain  # codes that become indices
        if user.data.get("destination_type") != "f32":
            graph.fail(user, f"computes a weight in {user.data.get('destination_type')!r:.20}; phiquant reads float32")
        return replace(chain, steps=(*chain.steps, "Convert"))
    other = user.inputs.get(1 - port) if port in (0, 1) else None
    if user.type == "Gather" and port == 1 and other is not None and _constant(other) is not None:
        return replace(chain, steps=(*chain.steps, "Gather"), codebook=_constant(other))
    if user.type == "Subtract" and port == 0 and "Multiply" not in chain.steps:
        return replace(chain, steps=(*chain.steps, "Subtract"), zero_point=_needed(graph, user, other))
    if user.type == "Multiply" and chain.coded and other is not None:
        scale, upper = _scale(graph, user, other)
        return replace(chain, steps=(*chain.steps, "Multiply"), scale=scale, super_scale=upper)
    if user.type == "Reshape" and port == 0:
        target = _needed(graph, user, other)
        if target.type != "i64" or len(target.shape) != 1 or target.shape[0] > 8:
            graph.fail(user, "has a shape that is not a short list of int64")
        shape = tuple(int(n) for n in np.frombuffer(graph.read(target), "<i8"))
        return replace(chain, steps=(*chain.steps, "Reshape"), shape=shape)
    return None


def _check_user(graph: Graph, layer: Layer, chain: Chain, user: Layer, port: int) -> None:
    transposed = user.data.get("transpose_b") in ("true", "1") and user.data.get("transpose_a") not in ("true", "1")
    matmul = user.type == "MatMul" and port == 1 and transposed and len(chain.shape) == 2
    gather = user.type == "Gather" and port == 0 and len(chain.shape) == 2
    if not (matmul or gather or (user.type == "Multiply" and len(chain.shape) == 1)):
        graph.fail(layer, f"ends in {user.type} {user.name[:80]!r} at port {port}, which is no use of a weight")


def _scale(graph: Graph, user: Layer, other: Layer) -> tuple[Constant, Constant | None]:
    """The scale of a Multiply; with two levels: (codes of scales, their scale)."""
    if other.type != "Reshape":
        return _needed(graph, user, other), None
    product = other.inputs.get(0)
    if product is None or product.type != "Multiply":
        graph.fail(other, "is no product of two constants")
    return _needed(graph, product, product.inputs.get(0)), _needed(graph, product, product.inputs.get(1))


def _constant(layer: Layer) -> Constant | None:
    """The constant itself, or what is converted to float32."""
    if layer.type == "Convert" and layer.data.get("destination_type") == "f32" and 0 in layer.inputs:
        layer = layer.inputs[0]
    return layer.constant


def _needed(graph: Graph, user: Layer, layer: Layer | None) -> Constant:
    found = None if layer is None else _constant(layer)
    if found is None:
        graph.fail(user, "should have a constant beside the weight, and has none")
    return found


def _checked(graph: Graph, chain: Chain) -> Chain:
    """Shapes and types that go together; what numpy would broadcast otherwise is refused."""
    codes, shape = chain.codes, chain.shape
    count = int(np.prod(shape, dtype=object))
    if min(shape) < 1 or count != int(np.prod(codes.shape, dtype=object)):
        graph.fail(codes, f"has shape {list(codes.shape)}, which is not {list(shape)[:8]}")
    if not chain.coded:
        if chain.steps not in ((), ("Convert",)) or (codes.type != "f32") != (chain.steps == ("Convert",)):
            graph.fail(codes, f"is {codes.type} with the operations {' '.join(chain.steps)}")
        return chain
    if len(shape) != 2 or shape[1] * codes.bits % 8:
        graph.fail(codes, f"has codes of {codes.bits} bits for a weight of shape {list(shape)[:8]}")
    allowed = [
        ("Convert", "Multiply"), ("Convert", "Subtract", "Multiply"), ("Gather",), ("Gather", "Multiply"),
    ]  # fmt: skip
    plain = tuple(step for step in chain.steps if step != "Reshape")
    if plain not in allowed or "Reshape" in chain.steps[:-1]:
        graph.fail(codes, f"is decoded by {' '.join(chain.steps)}, which phiquant does not know")
    _check_parameters(graph, chain)
    return chain


def _check_parameters(graph: Graph, chain: Chain) -> None:
    codes, (rows, _) = chain.codes, chain.shape
    shapes = [(*codes.shape[:-1], 1), (1,) * len(codes.shape)]
    if codes.shape[0] != rows and not (chain.codebook is not None and len(chain.codebook.shape) == 2):
        graph.fail(codes, f"has {codes.shape[0]} rows, its weight {rows}")
    if chain.zero_point is not None and chain.zero_point.shape not in shapes:
        graph.fail(chain.zero_point, f"has shape {list(chain.zero_point.shape)} beside codes {list(codes.shape)}")
    integers = codes.type in ("u2", "u4", "i4", "u8", "i8")
    if chain.zero_point is not None and (not integers or chain.zero_point.type not in (codes.type, "f8e4m3")):
        graph.fail(chain.zero_point, f"is a zero point of {chain.zero_point.type} beside {codes.type}")
    if chain.super_scale is not None:
        scale, upper = chain.scale, chain.super_scale
        assert scale is not None
        fits = len(scale.shape) == len(upper.shape) == 3 and upper.shape[2] == 1
        fits = fits and upper.shape[0] in (1, rows) and upper.shape[1] in (1, scale.shape[1])
        if not fits or scale.shape[0] != rows or codes.shape[:2] != (rows, scale.shape[1] * scale.shape[2]):
            graph.fail(scale, f"has shape {list(scale.shape)} times {list(upper.shape)} beside {list(codes.shape)}")
        if scale.type not in ("f8e4m3", "i8", "u8") or upper.type not in _FLOATS:
            graph.fail(scale, f"is {scale.type} times {upper.type}")
    elif chain.scale is not None:
        if chain.scale.shape not in shapes:
            graph.fail(chain.scale, f"has shape {list(chain.scale.shape)} beside codes {list(codes.shape)}")
        if chain.scale.type not in (*_FLOATS, "f8e8m0", "f8e4m3"):
            graph.fail(chain.scale, f"is a scale of {chain.scale.type}")
    if chain.codebook is not None:
        _check_codebook(graph, chain, chain.codebook)


def _check_codebook(graph: Graph, chain: Chain, codebook: Constant) -> None:
    blocks = codebook.shape[0] if len(codebook.shape) == 2 else 1
    rows = chain.shape[0]
    whole = max(blocks, rows) % min(blocks, rows) == 0
    if len(codebook.shape) not in (1, 2) or not 2 <= codebook.shape[-1] <= 256 or codebook.type not in _FLOATS:
        graph.fail(codebook, f"is no codebook: {codebook.type} {list(codebook.shape)}")
    if chain.codes.type not in ("u2", "u4", "u8") or not whole or (blocks > 1 and chain.codes.shape[0] != blocks):
        graph.fail(codebook, f"has {blocks} blocks for codes {list(chain.codes.shape)}")
