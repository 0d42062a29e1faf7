"""QAT under torchrun with FSDP2: weights, gradients and optimizer sharded over the ranks, one exported file at the end.

    torchrun --nproc-per-node 2 examples/qat_fsdp.py --out build/qat-fsdp        # phi3-tiny on two CPU processes

On CUDA devices the same command trains one rank on each. State is kept by torch.distributed.checkpoint: a run that is
killed goes on by the same command, also on another number of ranks.
"""

import argparse
import copy
import json
import os
import shutil
from pathlib import Path
from typing import Any

import phiquant as pq
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from phiquant.engines import QATSchedule, gather
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard


def start() -> torch.device:
    """Join the other ranks; the device of this one."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl")
        return torch.device("cuda", torch.cuda.current_device())
    dist.init_process_group("gloo")
    return torch.device("cpu")


def shard(model: Any) -> None:
    """A unit for each decoder layer: memory holds one of them whole, beside what each rank keeps."""
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)


def save(folder: Path, model: Any, optimizer: torch.optim.Optimizer, schedule: QATSchedule) -> None:
    """Every rank writes its shards; the folder appears when all is there, then the older one goes."""
    place = folder / f"step-{schedule.done:06}"
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=place.with_suffix(".partial"))
    dist.barrier()
    if dist.get_rank() == 0:
        (place.with_suffix(".partial") / "schedule.json").write_text(json.dumps(schedule.state_dict()))
        place.with_suffix(".partial").rename(place)
        for other in folder.iterdir():
            if other != place:
                shutil.rmtree(other)
    dist.barrier()


def restore(folder: Path, model: Any, optimizer: torch.optim.Optimizer, schedule: QATSchedule) -> None:
    """Go on from the last checkpoint, if there is one."""
    places = sorted(place for place in folder.glob("step-*") if not place.suffix)
    if places:
        weights, moments = get_state_dict(model, optimizer)
        dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=places[-1])
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
        schedule.load_state_dict(json.loads((places[-1] / "schedule.json").read_text()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="phi3-tiny", help="a checkpoint folder, or the model that ships with phiquant"
    )
    parser.add_argument("--target", default="gguf:Q4_0", help="format and grid: `phiquant targets` lists them")
    parser.add_argument("--range", default="mse", help="where ranges come from: mse, learned")
    parser.add_argument("--text", type=Path, help="what to train on; default: the standard library")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--stop", type=int, help="end here; the same command without it goes on")
    parser.add_argument("--batch", type=int, default=8, help="windows in a step, of all ranks together")
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2.5e-4)
    parser.add_argument("--save-steps", type=int, default=10)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    device = start()
    rank, world = dist.get_rank(), dist.get_world_size()
    model, tokenizer = pq.load(args.model)
    text = args.text.read_text(encoding="utf-8") if args.text else None
    text = text or pq.testing.training_text(characters=6 * args.steps * args.batch * args.window)
    ids = pq.qat.encode(tokenizer, text).long()
    rows = ids[: len(ids) // args.window * args.window].view(-1, args.window)

    teacher = copy.deepcopy(model).eval().requires_grad_(False).to(device)
    shard(teacher)
    pq.prepare_qat(model, args.target, range=args.range)
    on_grid = {id(m.weight) for m in model.modules() if isinstance(m, pq.QATLinear | pq.QATEmbedding)}
    on_grid |= {id(p) for p in pq.learned_parameters(model)}
    for parameter in model.parameters():  # what stays in float stays as it is
        parameter.requires_grad_(id(parameter) in on_grid)
    whole = copy.deepcopy(model) if rank == 0 else None  # takes the result
    model.to(device).train()
    shard(model)

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = QATSchedule(model, args.steps)
    state = args.out / "state"
    state.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    restore(state, model, optimizer, schedule)

    while schedule.done < (args.stop or args.steps):
        first = schedule.done * args.batch
        chosen = torch.arange(first, first + args.batch) % len(rows)
        batch = rows[chosen].chunk(world)[rank].to(device)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * (1 - schedule.done / args.steps)
        schedule.step()
        with torch.no_grad():
            wanted = teacher(batch, use_cache=False).logits
        loss = pq.qat.distillation_loss(model(batch, use_cache=False).logits, wanted)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if rank == 0 and schedule.done % 10 == 0:
            print(f"step {schedule.done} loss {loss.item():.5f}", flush=True)
        if schedule.done % args.save_steps == 0:
            save(state, model, optimizer, schedule)

    if schedule.done == args.steps:
        gather(model, whole)
    if schedule.done == args.steps and whole is not None:
        pq.convert(whole, trained={"steps": schedule.done})
        pq.export(whole, tokenizer, args.out, format=args.target.split(":")[0])
        print(pq.verify(args.out))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
