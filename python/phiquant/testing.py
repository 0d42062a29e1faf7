"""Models and texts to try things on: random miniatures, the outlier twin, the standard library's source.

The texts are read from the running interpreter's own standard library, so nothing is downloaded or
stored; they differ a little between Python versions.
"""

from __future__ import annotations

import copy
import json
import random
import sysconfig
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import PhiquantError
from .extras import need
from .models import phi

END_OF_TEXT = "<|endoftext|>"


def random_phi3(seed: int = 0, **config: Any) -> Any:
    """A Phi3ForCausalLM with random weights, small enough for tests; `config` overrides Phi3Config's fields.

    The sizes divide by 128, the vocabulary is that of phi3-tiny, and the norms are not all ones.
    """
    transformers = need("transformers", extra="hf")
    sizes: dict[str, Any] = {
        "vocab_size": 4096,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "original_max_position_embeddings": 512,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "bos_token_id": 4091,
        "eos_token_id": 4091,
        "pad_token_id": 4091,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.Phi3ForCausalLM(transformers.Phi3Config(**{**sizes, **config})).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                nn.init.uniform_(parameter, 0.5, 1.5)
            elif "embed_tokens" in name or name == "lm_head.weight":
                nn.init.normal_(parameter, std=0.2)
            else:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return model


@torch.no_grad()
def outlier_twin(model: nn.Module, channels: int = 3, factor: float = 30.0, seed: int = 0) -> nn.Module:
    """A copy of a Phi-3 model with the outlier channels that large models have, and the same function.

    In every decoder layer, `channels` channels of each norm are scaled up by `factor` and the
    columns of the linear that reads it are scaled down by as much. Logits stay equal to about 1e-5.
    """
    twin = copy.deepcopy(model)
    layers = getattr(getattr(twin, "model", None), "layers", None)
    if layers is None:
        raise PhiquantError(f"outlier_twin needs a {phi.ARCHITECTURE}; {type(model).__name__} has no model.layers")
    generator = torch.Generator().manual_seed(seed)
    for layer in layers:
        for norm_name, linear_name in phi.NORM_CONSUMERS:
            norm, linear = layer.get_submodule(norm_name), layer.get_submodule(linear_name)
            chosen = torch.randperm(norm.weight.numel(), generator=generator)[:channels].to(norm.weight.device)
            norm.weight[chosen] *= factor
            linear.weight[:, chosen] /= factor
    return twin


def _heldout_paths() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    names = json.loads(files("phiquant").joinpath("data/heldout.json").read_text(encoding="utf-8"))
    return [root / (name.replace(".", "/") + ".py") for name in names]


def _read(paths: list[Path], characters: int | None) -> list[str]:
    """The files' texts until `characters` are reached. Files that are not UTF-8 (some tests) are passed over."""
    texts: list[str] = []
    total = 0
    for path in paths:
        if characters is not None and total >= characters:
            break
        try:
            texts.append(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, FileNotFoundError):
            continue
        total += len(texts[-1])
    if not texts:
        raise PhiquantError(
            f"no source file of the standard library was found under {sysconfig.get_paths()['stdlib']}; "
            "this Python has no .py files there, so give a text of your own"
        )
    return texts


def heldout_text() -> str:
    """The held-out modules of the standard library, which phi3-tiny never saw, joined by <|endoftext|>."""
    return END_OF_TEXT.join(_read(_heldout_paths(), None))


def training_text(characters: int | None = None, seed: int = 0) -> str:
    """Standard library files that are not held out, in a shuffled order fixed by `seed`, joined by <|endoftext|>.

    characters: stop after the file that reaches this length. Generated tables (300 kB and more) are left out.
    """
    root, heldout = Path(sysconfig.get_paths()["stdlib"]), set(_heldout_paths())
    paths = [
        path
        for path in sorted(root.rglob("*.py"))
        if "site-packages" not in path.parts and path not in heldout and path.stat().st_size < 300_000
    ]
    random.Random(seed).shuffle(paths)
    return END_OF_TEXT.join(_read(paths, characters))
