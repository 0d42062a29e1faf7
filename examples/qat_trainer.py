"""QAT by transformers.Trainer: train through a grid, distilled from the float model, and export the codes.

    python examples/qat_trainer.py --out build/qat-trainer                      # phi3-tiny, about a minute
    python examples/qat_trainer.py --model path/to/phi --text corpus.txt --target mlx:int4-g64 --steps 500 --out build/x

Everything of the Trainer's is at hand: mixed precision, accumulated batches, several devices under torchrun. A run that
is killed goes on from its last checkpoint by the same command, to the same codes. Needs 'phiquant[hf,train]'.
"""

import argparse
import copy
from pathlib import Path

import phiquant as pq
import torch
from phiquant.trainer import DistillationTrainer, QATCallback
from transformers import TrainingArguments
from transformers.trainer_utils import get_last_checkpoint


def read(path: Path | None, otherwise: str) -> str:
    return path.read_text(encoding="utf-8") if path else otherwise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="phi3-tiny", help="a checkpoint folder, or the model that ships with phiquant"
    )
    parser.add_argument("--target", default="gguf:Q4_0", help="format and grid: `phiquant targets` lists them")
    parser.add_argument("--range", default="mse", help="where ranges come from: mse, learned, observer, tensor")
    parser.add_argument("--freeze", type=float, help="share of the steps after which observed ranges stay")
    parser.add_argument("--text", type=Path, help="what to train on; default: the standard library")
    parser.add_argument("--heldout", type=Path, help="what to measure on; default: the modules phi3-tiny never saw")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2.5e-4)
    parser.add_argument("--save-steps", type=int, default=20)
    parser.add_argument("--windows", type=int, default=4, help="windows of 512 tokens to measure on")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    model, tokenizer = pq.load(args.model)
    text = read(args.text, pq.testing.training_text(characters=6 * args.steps * args.batch * args.window))
    ids = pq.qat.encode(tokenizer, text).long()
    windows = [{"input_ids": row} for row in ids[: len(ids) // args.window * args.window].view(-1, args.window)]
    heldout = read(args.heldout, pq.testing.heldout_text())
    teacher = copy.deepcopy(model)

    settings = TrainingArguments(
        str(args.out / "run"),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch,
        learning_rate=args.lr,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, args.steps // 20),
        adam_beta2=0.98,
        max_grad_norm=1.0,
        save_steps=args.save_steps,
        save_total_limit=2,
        logging_steps=10,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    callback = QATCallback(args.target, range=args.range, freeze=args.freeze)
    trainer = DistillationTrainer(model, settings, teacher=teacher, train_dataset=windows, callbacks=[callback])
    last = get_last_checkpoint(settings.output_dir) if Path(settings.output_dir).exists() else None
    trainer.train(resume_from_checkpoint=last)

    if not trainer.is_world_process_zero():
        return
    model, teacher = model.to("cpu"), teacher.to("cpu")
    rounded = pq.quantize(copy.deepcopy(teacher), args.target)
    for name, other in (("rounded", rounded), ("trained", model)):
        found = pq.evaluate.compare(other, teacher, tokenizer, heldout, limit=args.windows)
        print(f"{name}: KL to float {found.kl:.5f}, perplexity {found.perplexity:.3f}", flush=True)
    print(f"float: perplexity {found.reference_perplexity:.3f}")
    pq.export(model, tokenizer, args.out, format=args.target.split(":")[0])
    print(pq.verify(args.out))


if __name__ == "__main__":
    main()
