"""One set of codes: the values every reader decodes, and the logits every runtime computes.

    python benchmarks/runtimes.py [--json FILE]

Bars, on phi3-tiny. Largest difference between the weights of the last QAT forward, `dequantize()` of the
codes, gguf-py's decode of the GGUF and compressed-tensors' decode of the folder: 0. Relative error of
logits, |a - b| / |b| over four windows of 256 held-out tokens: transformers <= 1e-6; llama.cpp (F32
key-value cache, flash attention off) F16 <= 1e-3, Q4_0, Q4_1 and Q8_0 <= 2e-2 (its activations are int8).
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import gguf
import phiquant as pq
import torch
from common import machine
from compressed_tensors.compressors import unpack_from_int32
from phiquant import qat
from phiquant.formats.gguf_names import gguf_name
from phiquant.modules import QATLinear
from safetensors import safe_open

LLAMA, INT8_ACTIVATIONS, TRANSFORMERS = 1e-3, 2e-2, 1e-6
BARS = {
    "gguf:F16": LLAMA,
    "gguf:BF16": None,  # llama.cpp rounds activations to bf16 there; printed without a bar
    "gguf:Q8_0": INT8_ACTIVATIONS,
    "gguf:Q4_0": INT8_ACTIVATIONS,
    "gguf:Q4_1": INT8_ACTIVATIONS,
    "safetensors:F32": TRANSFORMERS,
    "safetensors:int4-g32": TRANSFORMERS,
    "safetensors:int8-channel": TRANSFORMERS,
}


def trained(spec: str, steps: int) -> tuple[Any, Any, dict[str, torch.Tensor]]:
    """phi3-tiny after a short QAT, its tokenizer, and the weights that its last forward computed with."""
    model, tokenizer = pq.load("phi3-tiny")
    teacher = copy.deepcopy(model)
    pq.prepare_qat(model, spec, range="mse")
    ids = qat.encode(tokenizer, pq.testing.training_text(characters=400_000))
    qat.distill(model, teacher, ids, qat.Settings(steps=steps, batch=4))
    model.eval()
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QATLinear)}
    weights = {f"{n}.weight": m.weight_quantizer(m.weight).detach().clone() for n, m in layers.items()}
    return pq.convert(model), tokenizer, weights


def decoded_by_gguf_py(path: Path, names: list[str]) -> dict[str, torch.Tensor]:
    stored = {t.name: t for t in gguf.GGUFReader(path).tensors}
    tensors = {name: stored[gguf_name(name)] for name in names}
    return {name: torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).copy()) for name, t in tensors.items()}


def decoded_by_compressed_tensors(path: Path, names: list[str]) -> dict[str, torch.Tensor]:
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    result = {}
    with safe_open(path, "pt") as file:
        for name in names:
            scale = file.get_tensor(f"{name}_scale").float()
            shape = torch.Size(file.get_tensor(f"{name}_shape").tolist())
            codes = unpack_from_int32(file.get_tensor(f"{name}_packed"), 4, shape)
            args = QuantizationArgs(num_bits=4, strategy="group", group_size=shape[1] // scale.shape[1])
            result[name] = dequantize(codes, scale, args=args, dtype=torch.float32)
    return result


def same_codes(folder: Path, spec: str) -> dict[str, float]:
    """Largest absolute difference of each decode from the weights that were trained."""
    model, tokenizer, weights = trained(spec, steps=20)
    pq.export(model, tokenizer, folder / "gguf", format="gguf")
    pq.export(model, tokenizer, folder / "st", format="safetensors")
    names = list(weights)
    modules = {f"{n}.weight": m for n, m in model.named_modules() if isinstance(m, pq.QuantizedLinear)}
    decodes = {
        "dequantize()": {n: modules[n].quantized.dequantize() for n in names},
        "gguf-py": decoded_by_gguf_py(folder / "gguf/model.gguf", names),
        "compressed-tensors": decoded_by_compressed_tensors(folder / "st/model.safetensors", names),
    }
    return {reader: max((found[n] - weights[n]).abs().max().item() for n in names) for reader, found in decodes.items()}


def logits_error(folder: Path, target: str) -> Any:
    """What verify(run=True) finds for phi3-tiny in `target`: the file in its runtime against our model in torch."""
    model, tokenizer = pq.load("phi3-tiny")
    named = pq.target(target)
    if named.spec is not None:
        pq.quantize(model, target)
    elif named.float_dtype == "float16":
        model.half().float()  # the values of the file, so that only the runtime differs
    out = folder / target.replace(":", "-")
    pq.export(model, tokenizer, out, format=named.format, float_dtype=None if named.spec else named.float_dtype)
    return pq.verify(out, run=True, reference=model).runtime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="also write the figures to this file")
    args = parser.parse_args()
    print(machine())
    ok = True
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for spec in ("gguf:Q4_0", "int3-g32-signmax-f16"):
            found = same_codes(Path(temporary) / spec.replace(":", "-"), spec)
            figures[f"QAT {spec}"] = found
            ok &= not any(found.values())
            listed = ", ".join(f"{reader} {difference:g}" for reader, difference in found.items())
            print(f"QAT on {spec}: largest difference from the trained weights: {listed}  (bar 0)")
        for target, bar in BARS.items():
            run = logits_error(Path(temporary), target)
            met = bar is None or run.relative_error <= bar
            ok &= met
            figures[target] = run.relative_error
            verdict = f"bar {bar:g}  {'ok' if met else 'MISSED'}" if bar else ""
            print(f"{target:26} {run.name:14} logits {run.relative_error:.2e}  {verdict}", flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps({"machine": machine(), "figures": figures}, indent=2) + "\n")
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main()
