"""Load a Phi-3 model and its tokenizer: the embedded one, a local folder, an exported file, or a hub name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch

from .errors import PhiquantError
from .extras import need
from .formats.detect import Found, detect
from .load_exported import load_exported
from .models import phi
from .untrusted import naming, read_json

EMBEDDED = "phi3-tiny"
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


def load(
    source: str | Path, dtype: torch.dtype = torch.float32, *, tokenizer: str | Path | None = None
) -> tuple[Any, Any]:
    """A Phi3ForCausalLM in `dtype`, in eval mode, and its tokenizer.

    source: "phi3-tiny", a folder with config.json and safetensors, a hub name such as
        "microsoft/Phi-4-mini-instruct" (downloaded by transformers, or taken from its cache), or an exported file or
        folder of any format, others' too: layers with codes are then QuantizedLinear and QuantizedEmbedding, to
        evaluate, export again, or go on training by prepare_qat(model).
    tokenizer: a folder to take it from, for exported files that have none that transformers reads.
    Pickled checkpoints are never opened. PhiquantError says what is missing or not supported.
    """
    if str(source) == EMBEDDED:
        with as_file(files("phiquant") / "data" / EMBEDDED) as folder:
            return _load_folder(folder, dtype)
    folder = Path(source)
    if (found := _exported(folder)) is not None:
        return load_exported(found, dtype, None if tokenizer is None else Path(tokenizer))
    if folder.is_dir():
        return _load_folder(folder, dtype)
    if folder.exists():
        raise PhiquantError(
            f"{folder} is a file in no format that phiquant reads; of a checkpoint, give the folder that holds "
            "config.json and the safetensors files"
        )
    if isinstance(source, Path) or str(source).startswith((".", "/", "~")) or str(source).count("/") != 1:
        raise PhiquantError(
            f"no folder {str(source)!r}; give {EMBEDDED!r}, an existing folder, or a hub name 'owner/model'"
        )
    return _load_hub(str(source), dtype)


def _exported(path: Path) -> Found | None:
    """The exported model at `path`; None for float checkpoints, which transformers reads by itself."""
    found = detect(path)
    if found is None or found.format.name != "safetensors":
        return found
    return found if found.quant_method else None


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a checkpoint folder, checked to be a float Phi-3. PhiquantError otherwise."""
    path = folder / "config.json"
    if not path.is_file():
        raise PhiquantError(f"{folder} has no config.json; give the folder of a Hugging Face checkpoint")
    config = read_json(path)
    with naming(path):
        phi.check_architecture(config)
    return config


def _load_folder(folder: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    config = read_config(folder)
    phi.sizes(config)
    if not any(folder.glob("*.safetensors")):
        pickled = sorted(path.name for pattern in _PICKLED for path in folder.glob(pattern))
        advice = "save the model again with save_pretrained, which writes safetensors"
        if pickled:
            raise PhiquantError(
                f"{folder} holds only pickled weights ({', '.join(pickled[:3])}); pickle can run any code, so "
                f"phiquant does not open it: {advice}"
            )
        raise PhiquantError(f"{folder} has no *.safetensors file; {advice}")
    _check_shards(folder)
    return _from_pretrained(str(folder), dtype, local=True)


def _check_shards(folder: Path) -> None:
    """Every shard that the index names must be there and be a whole safetensors file."""
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    names = {path.name for path in folder.glob("*.safetensors")}
    if index.is_file():
        with naming(index):
            listed = {str(name) for name in read_json(index)["weight_map"].values()}
        if missing := sorted(listed - names):
            raise PhiquantError(f"{folder} lacks the shard(s) {', '.join(missing)} named by its index; download them")
        names = listed
    for name in sorted(names):
        try:
            with safe_open(folder / name, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise PhiquantError(f"{folder / name} is damaged or incomplete ({error}); download it again") from error


def _load_hub(name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    transformers = need("transformers", extra="hf")
    try:
        config, _ = transformers.PretrainedConfig.get_config_dict(name)
        phi.check_architecture(config)
        return _from_pretrained(name, dtype, local=False)
    except OSError as error:
        raise PhiquantError(
            f"cannot get {name!r} from the hub ({str(error).splitlines()[0]}). Offline: copy the model's folder "
            f"(config.json, *.safetensors, tokenizer files) here and give its path, or use {EMBEDDED!r}"
        ) from error


@contextmanager
def _without_progress_bar(transformers: Any) -> Iterator[None]:
    """Weights of a folder are there in a moment; a bar for them only garbles the caller's output."""
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()


def _from_pretrained(name: str, dtype: torch.dtype, *, local: bool) -> tuple[Any, Any]:
    transformers = need("transformers", extra="hf")
    options = {"local_files_only": local, "trust_remote_code": False}
    try:
        with _without_progress_bar(transformers):
            model, info = transformers.Phi3ForCausalLM.from_pretrained(
                name, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
            )
    except RuntimeError as error:
        raise PhiquantError(f"the weights in {name} do not fit its config.json: {error}") from error
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if info.get(kind):
            keys = ", ".join(sorted(map(str, info[kind]))[:3])
            raise PhiquantError(
                f"the weights in {name} do not fit its config.json: {kind.replace('_', ' ')} {keys}; "
                "the checkpoint is incomplete or of another model"
            )
    return model.eval(), load_tokenizer(name, local=local)


def load_tokenizer(name: str | Path, *, local: bool = True) -> Any:
    """The tokenizer of a checkpoint folder (`local`) or of a hub name. PhiquantError if there is none."""
    transformers = need("transformers", extra="hf")
    try:
        return transformers.AutoTokenizer.from_pretrained(str(name), local_files_only=local, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise PhiquantError(
            f"{name} has no usable tokenizer ({str(error).splitlines()[0]}); put tokenizer.json and "
            "tokenizer_config.json beside config.json"
        ) from error
