"""GPTQ of one layer, its moments given, against GPTQModel's own class: the time and the error of the output.

    python benchmarks/gptqmodel_speed.py [--size 3072] [--repeats 3] [--threads 1]

GPTQModel asks for a CUDA build of torch and does not resolve for a CPU; its class runs without what it asks for. In an
environment of its own beside phiquant: `pip install --no-deps gptqmodel LogBar Device-SMI TokeNicer Defuser PyPcre`.
int4 in groups of 32, symmetric, act-order with static groups, damping 1 %, both sides. Its scale is max|x| / 7.5, ours
max|x| / 7, so codes differ; the errors of the output are printed.
"""

from __future__ import annotations

import argparse
import sys

import phiquant as pq
import torch
from common import Row, interleave, machine, print_rows
from phiquant.solvers.gptq import gptq
from phiquant.statistics import Statistics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=3072)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ

    torch.set_num_threads(args.threads)
    size, generator = args.size, torch.Generator().manual_seed(0)
    statistics = Statistics(size)
    statistics.update(torch.randn(2 * size, size, generator=generator) * torch.rand(size, generator=generator))
    linear = torch.nn.Linear(size, size, bias=False)
    linear.weight.data.copy_(torch.randn(size, size, generator=generator) * 0.02)
    w, h, spec = linear.weight.detach(), statistics.hessian.clone(), pq.spec("int4-g32-sym")
    config = QuantizeConfig(bits=4, group_size=32, desc_act=True, static_groups=True, sym=True, damp_percent=0.01)

    def theirs() -> torch.Tensor:
        solver = GPTQ(linear, config)
        solver.quantizer.configure(perchannel=True)
        solver.H, solver.nsamples, solver.fwd_counter = 2 / statistics.tokens * h, statistics.tokens, 1
        return solver.quantize(blocksize=128)[0].float()

    def ours() -> torch.Tensor:
        return gptq(w, spec, statistics).dequantize()

    def error(q: torch.Tensor) -> float:
        return (((q - w) @ h * (q - w)).sum() / (w @ h * w).sum()).item()

    name = f"gptq int4 g32 {size}x{size}; output error theirs {error(theirs()):.5f}, ours {error(ours()):.5f}"
    times = interleave({"theirs": theirs, "ours": ours}, args.repeats)
    rows = [Row(name, times["theirs"], times["ours"], 1.0)]
    print(machine())
    print_rows(rows)
    sys.exit(0 if rows[0].ok else 1)


if __name__ == "__main__":
    main()
