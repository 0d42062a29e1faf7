"""NNCF on an OpenVINO model: GPTQ and scale estimation; judged in OpenVINO, computing in float32."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import phiquant as pq
import torch

PACKAGE = "nncf"


def _quantize(
    model: Any, ids: torch.Tensor, tokenizer: Any, bits: int, group: int, options: dict[str, bool], symmetric: bool
) -> tuple[Any, float]:
    import nncf
    import openvino as ov

    with tempfile.TemporaryDirectory() as folder:  # NNCF starts from an OpenVINO model; ours of the float weights
        pq.quantize(model, "openvino:F32")
        pq.export(model, tokenizer, folder, format="openvino")
        graph = ov.Core().read_model(next(Path(folder).glob("*model.xml")))
    mode = {(4, False): "INT4_ASYM", (4, True): "INT4_SYM", (8, False): "INT8_ASYM", (8, True): "INT8_SYM"}
    grouped = {"group_size": group, "ratio": 1.0, "all_layers": False} if bits == 4 else {}
    graph = nncf.compress_weights(
        graph,
        mode=getattr(nncf.CompressWeightsMode, mode[bits, symmetric]),
        dataset=nncf.Dataset([_feed(row) for row in ids.tolist()]) if options else None,
        ignored_scope=nncf.IgnoredScope(patterns=[".*lm_head.*", ".*embed_tokens.*"], validate=False),
        subset_size=len(ids),
        **grouped,
        **options,
    )
    settings = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    compiled = ov.Core().compile_model(graph, "CPU", settings)
    overhead = (16 if symmetric else 16 + bits) / group if bits == 4 else 24 / 512

    def logits(rows: list[list[int]]) -> Iterator[Any]:
        request = compiled.create_infer_request()
        for row in rows:
            request.reset_state()
            yield request.infer(_feed(row))["logits"][0].copy()

    return logits, bits + overhead


def _feed(row: list[int]) -> dict[str, np.ndarray]:
    ids = np.array([row], np.int64)
    return {
        "input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(len(row))[None],
        "beam_idx": np.zeros(1, np.int32),
    }  # fmt: skip


METHODS = {
    f"int4 {'sym' if symmetric else 'asym'} g{group} {'+'.join(options) or 'nearest'}": partial(
        _quantize, bits=4, group=group, options=dict.fromkeys(options, True), symmetric=symmetric
    )
    for group in (32, 64)
    for symmetric in (False,)
    for options in (("gptq",), ("scale_estimation",), ("gptq", "scale_estimation"))
}
