"""Runs the stages of a QNN export in a process of its own: `python run_qnn.py request.json` (see exchange.py).

On Qualcomm's x86 emulator of its HTP processor, with the CPU fallback of onnxruntime disabled, or, for the float
check, on onnxruntime's CPU provider. Tokens and cache move as in ORT-GenAI's windowed pipeline: chunks of the prefill
stage, the first one filled up from the left, then token by token.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from exchange import create_logits, serve

DTYPES = {"tensor(float)": np.float32, "tensor(uint8)": np.uint8, "tensor(int32)": np.int32}


class Sessions:
    """A session for each stage, made when it is first used."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.folder = Path(request["model"])
        self.config = json.loads((self.folder / "genai_config.json").read_text(encoding="utf-8"))["model"]
        self.stages = {n: s for stage in self.config["decoder"]["pipeline"] for n, s in stage.items()}
        self.threads = request["threads"]
        self.qnn = None if request["exact"] else register()
        self.open: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self.open:
            stage = self.stages[name]
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = self.threads
            options.log_severity_level = 3
            if self.qnn is not None and stage["session_options"]["provider_options"]:
                options.add_provider_for_devices([self.qnn[0]], {"backend_path": self.qnn[1]})
                # Without this, what QNN does not take runs on the CPU, and nobody is told.
                options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
            self.open[name] = onnxruntime.InferenceSession(str(self.folder / stage["filename"]), options)
        return self.open[name]


def register() -> tuple[Any, str]:
    """The emulated device, and the library of its backend."""
    import onnxruntime_qnn

    name = "QNNExecutionProvider"
    onnxruntime.register_execution_provider_library(name, onnxruntime_qnn.get_library_path())
    devices = [device for device in onnxruntime.get_ep_devices() if device.ep_name == name]
    if not devices:
        raise RuntimeError("onnxruntime-qnn offers no device on this machine")
    return devices[0], onnxruntime_qnn.get_qnn_htp_path()


class Pipeline:
    """One text, from an empty cache. C = context, S = tokens of a stage."""

    def __init__(self, sessions: Sessions) -> None:
        self.sessions = sessions
        self.context = sessions.config["context_length"]
        self.window = sessions.config["decoder"]["sliding_window"]["window_size"]
        self.seen = 0  # tokens of the text so far
        self.cache: dict[str, np.ndarray] = {}

    def prompt(self, tokens: list[int]) -> Iterator[np.ndarray]:
        """Logits [T, V] of the prompt, chunk by chunk."""
        filling = -len(tokens) % self.window
        padded = [0] * filling + tokens
        for start in range(0, len(padded), self.window):
            skip = filling if start == 0 else 0
            yield self.step(padded[start : start + self.window], "prefill", skip)[skip:]

    def token(self, token: int) -> np.ndarray:
        """Logits [V] after one more token."""
        return self.step([token], "decode", 0)[0]

    def step(self, tokens: list[int], stage: str, skip: int) -> np.ndarray:
        """One run of a stage; the first `skip` tokens only fill it up."""
        if self.seen + len(tokens) - skip > self.context:
            raise ValueError(f"the text has more than the {self.context} tokens of this export's static context")
        session, count = self.sessions[stage], len(tokens)
        positions = np.maximum(np.arange(count) - skip, 0) + self.seen
        self.seen += count - skip
        mask = np.zeros((1, self.context), np.int32)
        mask[0, self.context - self.seen :] = 1
        ids = np.array([tokens], np.int32)
        feeds = {"inputs_embeds": self.sessions["embeddings"].run(None, {"input_ids": ids})[0]}
        feeds |= {"position_ids": positions[None].astype(np.int32), "attention_mask": mask, **self.past(session)}
        names = [value.name for value in session.get_outputs()]
        found = dict(zip(names, session.run(names, feeds), strict=True))
        for name in names:
            if name.startswith("present."):
                past = name.replace("present.", "past_key_values.")
                axis = 3 if name.endswith("key") else 2
                self.cache[past] = np.concatenate([feeds[past], found[name]], axis)
        head = self.sessions[f"head_{stage}"]
        return head.run(None, {"hidden_states": found["hidden_states"]})[0][0]

    def past(self, session: Any) -> dict[str, np.ndarray]:
        """The newest tokens of the cache, as many as the stage takes; zeros, which are masked, before there are any."""
        feeds = {}
        for value in session.get_inputs():
            if value.name.startswith("past_key_values."):
                axis = 3 if value.name.endswith("key") else 2
                wanted = value.shape[axis]
                shape = tuple(0 if i == axis else n for i, n in enumerate(value.shape))
                held = self.cache.get(value.name, np.zeros(shape, DTYPES[value.type]))
                missing = max(0, wanted - held.shape[axis])
                width = [(missing if i == axis else 0, 0) for i in range(4)]
                held = np.pad(held, width)
                feeds[value.name] = np.take(held, range(held.shape[axis] - wanted, held.shape[axis]), axis)
        return feeds


def logits(sessions: Sessions, request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """logits-<i>.npy for each window: by chunks of the prefill stage, or from token request["one_by_one"] on singly."""
    vocab = sessions.config["vocab_size"]
    for index, window in enumerate(request["windows"]):
        text = Pipeline(sessions)
        first = request["one_by_one"] if request["one_by_one"] is not None else len(window)
        rows = list(text.prompt(window[:first])) if first else []
        rows += [text.token(token)[None] for token in window[first:]]
        create_logits(folder, index, (len(window), vocab))[:] = np.concatenate(rows)
    return {"windows": len(request["windows"])}


def generate(sessions: Sessions, request: dict[str, Any]) -> dict[str, Any]:
    """Greedy continuation: prefill, then the one-token stage."""
    tokenizer, prompt = load_tokenizer(request), request["prompt"]
    tokens = list(tokenizer(prompt)["input_ids"]) if isinstance(prompt, str) else prompt
    if not tokens:
        raise ValueError("the prompt is empty")
    ends = sessions.config["eos_token_id"]
    ends = set(ends if isinstance(ends, list) else [ends])
    text = Pipeline(sessions)
    made: list[int] = []
    row = list(text.prompt(tokens))[-1][-1]
    while len(made) < request["max_new_tokens"]:
        made.append(int(row.argmax()))
        if made[-1] in ends or len(made) == request["max_new_tokens"]:
            break
        row = text.token(made[-1])
    return {"prompt_tokens": tokens, "tokens": made, "text": tokenizer.decode(made, skip_special_tokens=True)}


def load_tokenizer(request: dict[str, Any]) -> Any:
    """The tokenizer of the folder."""
    import transformers

    return transformers.AutoTokenizer.from_pretrained(request["model"], local_files_only=True)


def act(request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Logits, token ids or a continuation."""
    if request["action"] == "tokenize":
        tokenizer = load_tokenizer(request)
        return {"ids": [tokenizer(text)["input_ids"] for text in request["texts"]]}
    sessions = Sessions(request)
    return generate(sessions, request) if request["action"] == "generate" else logits(sessions, request, folder)


if __name__ == "__main__":
    serve(act)
