"""Runs llama.cpp in a process of its own: `python run_llamacpp.py request.json` (see exchange.py).

llama.cpp aborts its process on some broken files, so it never runs inside the user's. No torch is loaded
beside it: a call starts in a fraction of a second.

The library is the one inside the package xllamacpp, which exports llama.cpp's C functions.
"""

from __future__ import annotations

import ctypes as C
import sys
from pathlib import Path
from typing import Any

import numpy as np
from exchange import create_logits, serve

POINTER = C.POINTER
WARN, CONTINUED = 3, 5  # ggml_log_level
FLASH_ATTENTION, TYPE_K, TYPE_V = 13, 26, 27  # 32-bit words of llama_context_params
AUTO, F16, F32 = -1, 1, 0
CHUNK = 512  # tokens decoded at once


class Opaque(C.Structure):
    """A parameter struct of which only known words are touched; larger than the real one."""

    _fields_ = [("bytes", C.c_uint8 * 2048)]


class Batch(C.Structure):
    """llama_batch."""

    _fields_ = [
        ("n_tokens", C.c_int32),
        ("token", POINTER(C.c_int32)),
        ("embd", POINTER(C.c_float)),
        ("pos", POINTER(C.c_int32)),
        ("n_seq_id", POINTER(C.c_int32)),
        ("seq_id", POINTER(POINTER(C.c_int32))),
        ("logits", POINTER(C.c_int8)),
    ]


LogCallback = C.CFUNCTYPE(None, C.c_int, C.c_char_p, C.c_void_p)
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "llama_log_set": (None, LogCallback, C.c_void_p),
    "llama_backend_init": (None,),
    "ggml_backend_load_all": (None,),
    "llama_model_default_params": (Opaque,),
    "llama_model_load_from_file": (C.c_void_p, C.c_char_p, Opaque),
    "llama_model_get_vocab": (C.c_void_p, C.c_void_p),
    "llama_vocab_n_tokens": (C.c_int32, C.c_void_p),
    "llama_vocab_is_eog": (C.c_bool, C.c_void_p, C.c_int32),
    "llama_context_default_params": (Opaque,),
    "llama_init_from_model": (C.c_void_p, C.c_void_p, Opaque),
    "llama_set_n_threads": (None, C.c_void_p, C.c_int32, C.c_int32),
    "llama_get_memory": (C.c_void_p, C.c_void_p),
    "llama_memory_clear": (None, C.c_void_p, C.c_bool),
    "llama_batch_init": (Batch, C.c_int32, C.c_int32, C.c_int32),
    "llama_batch_free": (None, Batch),
    "llama_decode": (C.c_int32, C.c_void_p, Batch),
    "llama_get_logits": (POINTER(C.c_float), C.c_void_p),
    "llama_free": (None, C.c_void_p),
    "llama_tokenize": (
        C.c_int32, C.c_void_p, C.c_char_p, C.c_int32, POINTER(C.c_int32), C.c_int32, C.c_bool, C.c_bool,
    ),
    "llama_detokenize": (
        C.c_int32, C.c_void_p, POINTER(C.c_int32), C.c_int32, C.c_char_p, C.c_int32, C.c_bool, C.c_bool,
    ),
}  # fmt: skip


class Model:
    """A loaded GGUF file."""

    def __init__(self, library: str, path: str) -> None:
        self._c = C.CDLL(library)
        for name, (result, *arguments) in _SIGNATURES.items():
            function = getattr(self._c, name)
            function.restype, function.argtypes = result, arguments
        self._log = LogCallback(self._print)  # kept: the library calls it as long as it lives
        self._level = 0
        self._c.llama_log_set(self._log, None)
        self._c.llama_backend_init()
        self._c.ggml_backend_load_all()
        self._model = self._c.llama_model_load_from_file(path.encode(), self._c.llama_model_default_params())
        if not self._model:
            raise RuntimeError("llama.cpp could not load the file")
        self._vocab = self._c.llama_model_get_vocab(self._model)
        self.vocab_size = self._c.llama_vocab_n_tokens(self._vocab)

    def _print(self, level: int, text: bytes, _: Any) -> None:
        self._level = self._level if level == CONTINUED else level
        if self._level >= WARN:
            sys.stderr.write(text.decode("utf-8", "replace"))
            sys.stderr.flush()  # an abort would lose what is buffered

    def context(self, size: int, request: dict[str, Any]) -> Context:
        return Context(self._c, self._model, self.vocab_size, size, request)

    def tokenize(self, text: str, add_special: bool) -> list[int]:
        raw = text.encode()
        ids = (C.c_int32 * (len(raw) + 8))()
        n = self._c.llama_tokenize(self._vocab, raw, len(raw), ids, len(ids), add_special, True)
        if n < 0:
            raise RuntimeError(f"llama.cpp could not tokenize {text[:40]!r}")
        return list(ids[:n])

    def detokenize(self, ids: list[int]) -> str:
        """Text of `ids`; special tokens are spelled out."""
        array = (C.c_int32 * len(ids))(*ids)
        size = 64 + 16 * len(ids)
        while True:
            buffer = C.create_string_buffer(size)
            n = self._c.llama_detokenize(self._vocab, array, len(ids), buffer, size, False, True)
            if n >= 0:
                return buffer.raw[:n].decode("utf-8", "replace")
            size = -n

    def ends(self, token: int) -> bool:
        return bool(self._c.llama_vocab_is_eog(self._vocab, token))


class Context:
    """A key-value cache of `size` tokens, and the decoder that fills it."""

    def __init__(self, library: C.CDLL, model: int, vocab_size: int, size: int, request: dict[str, Any]) -> None:
        self._c, self._vocab_size, self.size = library, vocab_size, size
        parameters = library.llama_context_default_params()
        words = C.cast(C.byref(parameters), POINTER(C.c_int32))
        if (words[FLASH_ATTENTION], words[TYPE_K], words[TYPE_V]) != (AUTO, F16, F16):
            raise RuntimeError("this version of xllamacpp has another llama_context_params; install a tested version")
        words[0], words[1], words[2] = size, CHUNK, CHUNK  # n_ctx, n_batch, n_ubatch
        words[FLASH_ATTENTION] = int(request["flash_attention"])
        words[TYPE_K] = words[TYPE_V] = F32 if request["cache"] == "float32" else F16
        self._context = library.llama_init_from_model(model, parameters)
        if not self._context:
            raise RuntimeError(f"llama.cpp could not make a context of {size} tokens")
        library.llama_set_n_threads(self._context, request["threads"], request["threads"])
        self._batch = library.llama_batch_init(CHUNK, 0, 1)

    def restart(self) -> None:
        self._c.llama_memory_clear(self._c.llama_get_memory(self._context), True)

    def decode(self, tokens: list[int], position: int) -> np.ndarray:
        """Logits float32 [n, V] of up to CHUNK tokens that follow `position` earlier ones."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            if not 0 <= token < self._vocab_size:
                raise RuntimeError(f"token {token} is not in the vocabulary of {self._vocab_size}")
            batch.token[i], batch.pos[i] = token, position + i
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, 1
        status = self._c.llama_decode(self._context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode failed with status {status}")
        return np.ctypeslib.as_array(self._c.llama_get_logits(self._context), (len(tokens), self._vocab_size))

    def close(self) -> None:
        self._c.llama_batch_free(self._batch)
        self._c.llama_free(self._context)


def context_size(length: int, request: dict[str, Any]) -> int:
    """llama.cpp chooses LongRoPE's factors by this size: the least that holds the text follows the text's length."""
    return int(request.get("context") or -(-length // 256) * 256)


def logits(model: Model, request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """logits-<i>.npy in `folder` for each of request["windows"]."""
    context = None
    for index, window in enumerate(request["windows"]):
        size = context_size(len(window), request)
        if context is None or context.size != size:
            if context:
                context.close()
            context = model.context(size, request)
        context.restart()
        out = create_logits(folder, index, (len(window), model.vocab_size))
        for start in range(0, len(window), CHUNK):
            chunk = window[start : start + CHUNK]
            out[start : start + len(chunk)] = context.decode(chunk, start)
        del out  # closes the map
    return {"windows": len(request["windows"])}


def generate(model: Model, request: dict[str, Any]) -> dict[str, Any]:
    """Greedy: the most likely token each time, until the model ends or the limit is reached."""
    prompt = request["prompt"]
    tokens = model.tokenize(prompt, add_special=True) if isinstance(prompt, str) else prompt
    if not tokens:
        raise RuntimeError("the prompt is empty")
    context = model.context(context_size(len(tokens) + request["max_new_tokens"], request), request)
    new: list[int] = []
    fresh, position = tokens, 0
    while len(new) < request["max_new_tokens"]:
        for start in range(0, len(fresh), CHUNK):
            last = context.decode(fresh[start : start + CHUNK], position + start)[-1]
        position += len(fresh)
        fresh = [int(last.argmax())]
        if model.ends(fresh[0]):
            break
        new += fresh
    return {"prompt_tokens": tokens, "tokens": new, "text": model.detokenize(new)}


def act(request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Logits, token ids or a continuation."""
    model = Model(request["library"], request["model"])
    if request["action"] == "logits":
        return logits(model, request, folder)
    if request["action"] == "tokenize":
        return {"ids": [model.tokenize(text, request["add_special"]) for text in request["texts"]]}
    return generate(model, request)


if __name__ == "__main__":
    serve(act)
