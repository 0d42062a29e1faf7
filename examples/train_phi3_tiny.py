"""Make phi3-tiny, the Phi-3 model that ships with phiquant, from Python's own standard library.

    python examples/train_phi3_tiny.py --out build/phi3-tiny --steps 2400

A byte-level BPE vocabulary of 4096 and a `Phi3ForCausalLM` of 5.2 M parameters are trained on the
.py files of the running interpreter's standard library (nothing is downloaded; the text is not
stored). The modules listed in `python/phiquant/data/heldout.json` are left out: they are the text
on which the model is evaluated. A run that is killed continues from its last checkpoint.

B = batch size, T = tokens in a window, V = vocabulary.
"""

import argparse
import json
import math
import random
import sysconfig
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Phi3Config, Phi3ForCausalLM, PreTrainedTokenizerFast

HELDOUT = Path(__file__).parent.parent / "python/phiquant/data/heldout.json"
SPECIAL = ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
# The pattern of Phi-4-mini's vocabulary (o200k): llama.cpp knows it as "gpt-4o".
O200K = "|".join([
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
    r"\s*[\r\n]+",
    r"\s+(?!\S)",
    r"\s+",
])  # fmt: skip
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def training_files() -> list[Path]:
    """The standard library's source files, without the held-out modules and generated tables."""
    root = Path(sysconfig.get_paths()["stdlib"])
    heldout = {root / (name.replace(".", "/") + ".py") for name in json.loads(HELDOUT.read_text())}
    files = [
        path
        for path in sorted(root.rglob("*.py"))
        if "site-packages" not in path.parts and path not in heldout and path.stat().st_size < 300_000
    ]
    return files


def read_texts(files: list[Path]) -> list[str]:
    """Files that are not UTF-8 (the library has some, as tests) are passed over."""
    texts = []
    for path in files:
        try:
            texts.append(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            continue
    return texts


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(O200K), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    bpe.decoder = decoders.ByteLevel()
    # Special tokens come last, as in Phi-4-mini: the byte alphabet has ids 0..255.
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.add_special_tokens(SPECIAL)
    assert bpe.get_vocab_size() == vocab_size
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=SPECIAL[0],
        eos_token=SPECIAL[0],
        pad_token=SPECIAL[0],
        unk_token=SPECIAL[0],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> Phi3ForCausalLM:
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    config = Phi3Config(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        original_max_position_embeddings=1024,
        sliding_window=None,
        tie_word_embeddings=False,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    return Phi3ForCausalLM(config)


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """All texts as one stream of ids, int32 [n], each text ended by <|endoftext|>."""
    end = tokenizer.eos_token_id
    stream: list[int] = []
    for batch in tokenizer.backend_tokenizer.encode_batch(texts):
        stream += [*batch.ids, end]
    return torch.tensor(stream, dtype=torch.int32)


def learning_rate(step: int, steps: int, peak: float) -> float:
    warmup = min(1.0, (step + 1) / 150)
    return peak * warmup * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))


@torch.no_grad()
def heldout_loss(model: Phi3ForCausalLM, stream: torch.Tensor, window: int = 512) -> float:
    """Mean negative log-likelihood (nats per token) over consecutive windows of `stream`."""
    model.eval()
    windows = stream[: len(stream) // window * window].view(-1, window).long()
    total = 0.0
    for rows in windows.split(8):
        logits = model(rows).logits[:, :-1].float()
        total += F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum").item()
    model.train()
    return total / (windows.shape[0] * (window - 1))


def batches(stream: torch.Tensor, batch: int, window: int, step: int, seed: int) -> torch.Tensor:
    """The rows of one step, int64 [B, T + 1]; a function of the step, so a resumed run sees the same."""
    per_epoch = (len(stream) - 1) // (batch * window)
    epoch, index = divmod(step, per_epoch)
    order = random.Random(seed + epoch)
    shift = order.randrange(window)
    starts = list(range(shift, len(stream) - window - 1, window))
    order.shuffle(starts)
    chosen = starts[index * batch : (index + 1) * batch]
    return torch.stack([stream[s : s + window + 1] for s in chosen]).long()


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    state_file = args.out / "training.pt"
    texts = read_texts(training_files())
    root = Path(sysconfig.get_paths()["stdlib"])
    heldout_files = [root / (name.replace(".", "/") + ".py") for name in json.loads(HELDOUT.read_text())]
    if (args.out / "tokenizer.json").exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.out)
    else:
        tokenizer = train_tokenizer(texts, 4096)
        tokenizer.save_pretrained(args.out)
    stream = encode(tokenizer, texts)
    heldout = encode(tokenizer, read_texts(heldout_files))
    print(f"{len(texts)} files, {len(stream):,} tokens; held out {len(heldout):,} tokens", flush=True)

    model = build_model(tokenizer)
    decay = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
    )
    start, curve, heldout_curve = 0, [], []
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start, curve, heldout_curve = state["step"], state["curve"], state["heldout_curve"]
    began = time.time()
    for step in range(start, args.steps):
        rows = batches(stream, args.batch, args.window, step, args.seed)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(rows[:, :-1]).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 20 == 0:
            curve.append([step, round(loss.item(), 4)])
            rate = args.batch * args.window * (step + 1 - start) / (time.time() - began)
            print(f"step {step} loss {loss.item():.4f} {rate:,.0f} tokens/s", flush=True)
        if (step + 1) % 200 == 0 or step + 1 == args.steps:
            heldout_curve.append([step + 1, round(heldout_loss(model, heldout[:32768]), 4)])
            print(f"step {step + 1} held-out loss {heldout_curve[-1][1]:.4f}", flush=True)
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step + 1,
                "curve": curve,
                "heldout_curve": heldout_curve,
            }
            partial = state_file.with_suffix(".partial")
            torch.save(state, partial)
            partial.rename(state_file)

    model.to(torch.bfloat16).save_pretrained(args.out)
    loss = heldout_loss(model.float(), heldout)
    report = {
        "steps": args.steps,
        "tokens_seen": args.steps * args.batch * args.window,
        "training_tokens": len(stream),
        "heldout_tokens": len(heldout),
        "heldout_loss": loss,
        "heldout_perplexity": math.exp(loss),
        "curve": curve,
        "heldout_curve": heldout_curve,
    }
    (args.out / "training.json").write_text(json.dumps(report) + "\n")
    print(f"held-out perplexity {math.exp(loss):.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the model and its checkpoints")
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
