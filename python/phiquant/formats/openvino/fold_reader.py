"""The values of a weight as OpenVINO itself computes them: its operations on the file's bytes, folded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ...extras import need
from .chain_reader import Chain
from .xml_reader import Constant


def fold(chain: Chain, data: Callable[[Constant], bytes], rows: int) -> np.ndarray:
    """float32 [rows, K] (or [rows]) of a chain's operations, on the bytes of `rows` rows that `data` gives."""
    ov, op = need("openvino", extra="openvino"), need("openvino.opset13", extra="openvino")
    passes = need("openvino.passes", extra="openvino")

    def constant(of: Constant) -> Any:
        whole = of is not chain.codes and (len(of.shape) < 2 or of.shape[0] == 1)
        first = of.shape[0] if whole else of.shape[0] * rows // chain.shape[0]
        tensor = ov.Tensor(getattr(ov.Type, of.type), ov.Shape([first, *of.shape[1:]]))
        np.asarray(tensor.data).reshape(-1).view(np.uint8)[:] = np.frombuffer(data(of), np.uint8)
        return ov.op.Constant(tensor)  # the tensor owns its bytes: one over an array would only look at them

    model = ov.Model([op.convert(_replay(op, chain, constant, rows), "f32")], []).clone()
    manager = passes.Manager()
    manager.register_pass(passes.ConstantFolding())
    manager.run_passes(model)
    folded = model.get_results()[0].input_value(0).get_node()
    return np.array(folded.data, np.float32).reshape(rows, *chain.shape[1:])


def _replay(op: Any, chain: Chain, constant: Callable[[Constant], Any], rows: int) -> Any:
    """The operations of the chain on other constants."""

    def floats(of: Constant | None) -> Any:
        assert of is not None
        return op.convert(constant(of), "f32")

    node = constant(chain.codes)
    for step in chain.steps:
        match step:
            case "Convert":
                node = op.convert(node, "f32")
            case "Gather":
                assert chain.codebook is not None
                axis = len(chain.codebook.shape) - 1
                indices = op.convert(node, "i32")
                node = op.gather(floats(chain.codebook), indices, op.constant(np.int64(axis)), batch_dims=axis)
            case "Subtract":
                node = op.subtract(node, floats(chain.zero_point))
            case "Multiply":
                factor = floats(chain.scale)
                if chain.super_scale is not None:
                    factor = op.multiply(factor, floats(chain.super_scale))
                    factor = op.reshape(factor, op.constant(np.array([rows, -1, 1], np.int64)), False)
                node = op.multiply(node, factor)
            case "Reshape":
                node = op.reshape(node, op.constant(np.array([rows, *chain.shape[1:]], np.int64)), False)
    return node
