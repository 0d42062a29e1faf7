"""Runs plain transformers in a process of its own: `python transformers_worker.py request.json`.

This file is run by its path and imports nothing of phiquant: what it computes is what anyone gets who
has the folder, transformers and compressed-tensors. It reads a request, writes result.json (and
logits-<i>.npy, float32 [T, V], one per window) beside it, and reports errors on stderr.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HERE = str(Path(__file__).resolve().parent)
sys.path[:] = [place for place in sys.path if place != HERE]  # it holds a transformers.py of phiquant's own

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402


def load(request: dict[str, Any]) -> Any:
    """The model, as from_pretrained(folder) gives it: in the dtype that config.json names."""
    torch.set_num_threads(request["threads"])
    return transformers.AutoModelForCausalLM.from_pretrained(
        request["model"], local_files_only=True, use_safetensors=True, trust_remote_code=False
    ).eval()


@torch.no_grad()
def logits(model: Any, request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """logits-<i>.npy in `folder` for each of request["windows"]."""
    for index, window in enumerate(request["windows"]):
        values = model(torch.tensor([window]), use_cache=False).logits[0]
        np.save(folder / f"logits-{index}.npy", values.float().numpy())
    return {"windows": len(request["windows"]), "dtype": str(model.dtype)}


@torch.no_grad()
def generate(model: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Greedy continuation of a text or of token ids."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(request["model"], local_files_only=True)
    prompt = request["prompt"]
    tokens = list(tokenizer(prompt)["input_ids"]) if isinstance(prompt, str) else prompt
    if not tokens:
        raise RuntimeError("the prompt is empty")
    ids = torch.tensor([tokens])
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=request["max_new_tokens"], do_sample=False
    )
    new = made[0, len(tokens) :].tolist()
    return {"prompt_tokens": tokens, "tokens": new, "text": tokenizer.decode(new, skip_special_tokens=True)}


def main() -> None:
    """Answer the request whose file is the first argument."""
    path = Path(sys.argv[1])
    request = json.loads(path.read_text(encoding="utf-8"))
    transformers.utils.logging.disable_progress_bar()
    model = load(request)
    result = generate(model, request) if request["action"] == "generate" else logits(model, request, path.parent)
    if any(name.partition(".")[0] == "phiquant" for name in sys.modules):
        raise RuntimeError("phiquant was imported, so this run does not show that the folder needs none of it")
    (path.parent / "result.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except Exception as error:
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)
