"""GPTQ of one 3072 x 3072 layer, its moments given, against plain PyTorch: a third of the time, the same codes.

python benchmarks/gptq_speed.py [--repeats 15] [--json]
"""

from __future__ import annotations

from typing import Any

import phiquant as pq
import torch
from common import Row, interleave, main
from phiquant.solvers.gptq import gptq
from phiquant.statistics import Statistics


def plain_pytorch(w: torch.Tensor, h: torch.Tensor, group: int = 32, bits: int = 4, damping: float = 0.01) -> Any:
    """The paper's algorithm with act-order and static groups, a torch operation per step, blocks of 128 columns.

    Written after IST-DASLab/gptq: the same steps, the per-column loss among them.
    """
    columns, largest = w.shape[1], torch.tensor(2**bits - 1)
    w, h = w.clone(), h.clone()
    scales = [2 * w[:, start : start + group].abs().amax(1) / (largest - 1) for start in range(0, columns, group)]
    zero = torch.full_like(scales[0], 2 ** (bits - 1))
    order = torch.argsort(h.diagonal(), descending=True)
    w, h = w[:, order], h[order][:, order]
    h.diagonal().add_(damping * h.diagonal().mean())
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    values, losses = torch.zeros_like(w), torch.zeros_like(w)
    for start in range(0, columns, 128):
        stop = min(start + 128, columns)
        block, errors = w[:, start:stop].clone(), torch.zeros(len(w), stop - start)
        inside = upper[start:stop, start:stop]
        for i in range(stop - start):
            column, scale = block[:, i], scales[int(order[start + i]) // group]
            code = torch.clamp(torch.round(column / scale) + zero, 0, largest)
            value = scale * (code - zero)
            values[:, start + i] = value
            losses[:, start + i] = (column - value) ** 2 / inside[i, i] ** 2
            error = (column - value) / inside[i, i]
            block[:, i:] -= error[:, None] @ inside[i, i:][None]
            errors[:, i] = error
        w[:, stop:] -= errors @ upper[start:stop, stop:]
    return values[:, torch.argsort(order)]


def run(repeats: int) -> list[Row]:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    statistics = Statistics(3072)
    statistics.update(torch.randn(6144, 3072, generator=generator) * torch.rand(3072, generator=generator))
    w, spec = torch.randn(3072, 3072, generator=generator) * 0.02, pq.spec("int4-g32-sym")
    h = statistics.hessian.clone()
    times = interleave({"torch": lambda: plain_pytorch(w, h), "ours": lambda: gptq(w, spec, statistics)}, repeats)
    same = (plain_pytorch(w, h) - gptq(w, spec, statistics).dequantize()).abs() < 1e-6
    share = same.float().mean().item()  # the others lie within rounding of the middle between two codes
    name = f"gptq int4 g32, 3072x3072, {100 * share:.2f} % of the codes equal"
    return [Row(name, times["torch"], times["ours"], 3.0, share > 0.995)]


if __name__ == "__main__":
    main(__doc__, run)
