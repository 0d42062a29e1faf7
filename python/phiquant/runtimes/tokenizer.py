"""A runtime's own tokenizer, called as one of transformers is."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any


class RuntimeTokenizer:
    """text -> {"input_ids": [...]} as the runtime makes them of the model at `path`, no token put in front.

    load: gives a tokenizer of transformers for the same model. It is asked only for the special tokens, and for a text
    with them: runtimes tell neither.
    """

    def __init__(self, runtime: Any, path: Path, load: Callable[[], Any] | None = None) -> None:
        self._runtime, self._path, self._load = runtime, path, load

    def __call__(self, text: str, add_special_tokens: bool = False, **options: Any) -> dict[str, list[int]]:
        if add_special_tokens and self._like is not None:
            return self._like(text, add_special_tokens=True, **options)
        return {"input_ids": self._runtime.tokenize(self._path, [text])[0]}

    @property
    def bos_token_id(self) -> int | None:
        return getattr(self._like, "bos_token_id", None)

    @property
    def eos_token_id(self) -> int | None:
        return getattr(self._like, "eos_token_id", None)

    @cached_property
    def _like(self) -> Any:
        return self._load() if self._load is not None else None
