"""Data-free solvers against their peers on 100 M weights: hqq's package, scikit-learn, kmeans1d, a loop in torch.

    python benchmarks/solver_speed.py [--threads 1] [--only hqq,mse,kmeans,rows] [--repeats 3] [--million 100] [--json]

Peers are in the extra `bench`. Both sides take the same
settings and the same float32 weights, interleaved, and each row says how our objective compares with theirs: the sum
that both claim to make small, ours / theirs, at most 1. A peer that would take minutes is timed on a part, `theirs on
n M`, and its time multiplied; ours is timed on all, so that what does not fit a cache or grows faster than n counts.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable

import phiquant as pq
import torch
from common import Row, interleave, machine, print_rows
from torch import Tensor

BAR = 5.0
COLUMNS = 3072
P = 0.7


def norm(w: Tensor, q: Tensor, unit: Tensor, p: float) -> float:
    """sum |w - q|^p over blocks of `unit`'s shape, errors in units of it."""
    total = 0.0
    for a, b, u in zip(w.split(1024), q.split(1024), unit.split(1024), strict=True):  # no copy of 100 M values
        error = (a - b).abs_().reshape(*u.shape, -1).div_(u[..., None])
        total += error.pow_(p).sum(dtype=torch.float64).item()
    return total


def hqq_rows(w: Tensor, part: int, repeats: int) -> list[Row]:
    """uint4 and uint2, groups of 64 along a row, p = 0.7, beta 10, kappa 1.01, at most 20 iterations."""
    from hqq.core.quantize import Quantizer

    rows = []
    for bits in (4, 2):
        spec, own = pq.spec(f"uint{bits}-g64-min"), w[:part]

        def theirs(bits: int = bits, own: Tensor = own) -> Tensor:
            codes, meta = Quantizer.quantize(own, nbits=bits, group_size=64, axis=1, device="cpu", bitpack=False)
            return ((codes - meta["zero"]) * meta["scale"]).reshape(own.shape)

        ours = pq.quantize_tensor(own, spec, solver="hqq")
        share = norm(own, ours.dequantize(), ours.scales, P) / norm(own, theirs(), ours.scales, P)
        times = interleave(
            {"ours": lambda spec=spec: pq.quantize_tensor(w, spec, solver="hqq"), "theirs": theirs}, repeats
        )
        rows.append(row(f"hqq uint{bits} g64 | hqq package", w, part, times, share))
    return rows


def torch_mse(w: Tensor, group: int = 32, largest: int = 7) -> Tensor:
    """The best of 20 shrunken scales of each group in squared error: the plain way, all groups at once."""
    x = w.reshape(-1, group)
    whole = x.abs().amax(1, keepdim=True) / largest
    best, error = whole.clone(), torch.full_like(whole, torch.inf)
    for i in range(20):
        scale = whole * (1 - 0.03 * i)
        q = torch.clamp(torch.round(x / scale), -largest - 1, largest)
        found = (q * scale - x).square().sum(1, keepdim=True)
        better = found < error
        error, best = torch.where(better, found, error), torch.where(better, scale, best)
    return (torch.clamp(torch.round(x / best), -largest - 1, largest) * best).reshape(w.shape)


def mse_rows(w: Tensor, part: int, repeats: int) -> list[Row]:
    own, spec = w[:part], pq.spec("int4-g32-sym")
    ours = pq.quantize_tensor(own, spec, solver="mse")
    unit = torch.ones(len(own), 1)
    share = norm(own, ours.dequantize(), unit, 2) / norm(own, torch_mse(own), unit, 2)
    runs = {"ours": lambda: pq.quantize_tensor(w, spec, solver="mse"), "theirs": lambda: torch_mse(own)}
    return [row("mse int4 g32, 20 candidates | torch", w, part, interleave(runs, repeats), share)]


def sklearn(x: Tensor) -> Tensor:
    """Lloyd's algorithm from one k-means++ start: not the optimum."""
    from sklearn.cluster import KMeans

    found = KMeans(16, n_init=1, random_state=0).fit(x.reshape(-1, 1).numpy())
    return torch.from_numpy(found.cluster_centers_[found.labels_, 0]).reshape(x.shape)


def optimum(x: Tensor) -> Tensor:
    import kmeans1d

    found = kmeans1d.cluster(x.reshape(-1).numpy(), 16)
    return torch.tensor(found.centroids)[torch.tensor(found.clusters)].reshape(x.shape)


def kmeans_rows(w: Tensor, part: int, repeats: int) -> list[Row]:
    """One codebook of 16 for all."""
    return [
        clustered("kmeans 16 | scikit-learn", "codebook16-tensor", w, w[:part], sklearn, repeats),
        clustered("kmeans 16 | kmeans1d (optimum)", "codebook16-tensor", w, w[: part // 4], optimum, repeats),
    ]


def codebook_rows(w: Tensor, part: int, repeats: int) -> list[Row]:
    """A codebook of 16 for each row."""
    return [
        clustered(f"kmeans 16 a row | {name}", "codebook16-row", w, w[:part], by_row(one), repeats)
        for name, one in (("scikit-learn", sklearn), ("kmeans1d (optimum)", optimum))
    ]


def by_row(one: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.stack([one(row) for row in x])


def clustered(name: str, spec: str, w: Tensor, own: Tensor, peer: Callable[[Tensor], Tensor], repeats: int) -> Row:
    unit = torch.ones(len(own), 1)
    ours = pq.quantize_tensor(own, spec, solver="kmeans").dequantize()
    share = norm(own, ours, unit, 2) / norm(own, peer(own), unit, 2)
    runs = {"ours": lambda: pq.quantize_tensor(w, spec, solver="kmeans"), "theirs": lambda: peer(own)}
    return row(name, w, len(own), interleave(runs, repeats), share)


def row(name: str, w: Tensor, part: int, times: dict[str, list[float]], share: float) -> Row:
    scale = len(w) / part
    on = "" if scale == 1 else f", theirs on {part * COLUMNS / 1e6:.1f} M"
    theirs = [scale * t for t in times["theirs"]]
    return Row(f"{name}{on}; objective {share:.4f}", theirs, times["ours"], BAR, share < 1 + 1e-6)


# And the share of the weights on which the peer is timed.
FAMILIES = {
    "hqq": (hqq_rows, 0.04), "mse": (mse_rows, 0.04), "kmeans": (kmeans_rows, 0.01), "rows": (codebook_rows, 0.0005),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--million", type=float, default=100.0, help="weights, in millions")
    parser.add_argument("--part", type=float, help="share of them for the peer")
    parser.add_argument("--only", default=",".join(FAMILIES))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    w = torch.randn(round(args.million * 1e6 / COLUMNS), COLUMNS, generator=torch.Generator().manual_seed(0)) * 0.02
    rows = []
    for name in args.only.split(","):
        run, part = FAMILIES[name]
        rows += run(w, max(8, round((args.part or part) * len(w))), args.repeats)
    if args.json:
        print(
            json.dumps({"machine": machine(), "threads": args.threads, "rows": [r.as_dict() for r in rows]}, indent=2)
        )
    else:
        print(f"{machine()}; {args.threads} thread(s), {w.numel() / 1e6:.1f} M float32 weights")
        print_rows(rows)
    sys.exit(0 if all(r.ok for r in rows) else 1)


if __name__ == "__main__":
    main()
