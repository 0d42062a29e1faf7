"""GPTQ and AWQ layers, encoded from the layouts' published definitions word by word, and folders of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # AutoAWQ: nibble i of a word holds column order[i]


def gptq_stream(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes of the columns of [K, N] as AutoGPTQ's loop packs them: one big integer per column, cut into words."""
    rows, columns = codes.shape
    words = np.zeros((rows * bits // 32, columns), np.uint32)
    for n in range(columns):
        whole = sum(int(code) << (bits * k) for k, code in enumerate(codes[:, n]))
        for w in range(len(words)):
            words[w, n] = whole >> (32 * w) & 0xFFFFFFFF
    return words.view(np.int32)


def gptq_layer(
    codes: np.ndarray,
    zeros: np.ndarray,
    scales: np.ndarray,
    bits: int,
    version: int = 1,
    g_idx: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """codes [N, K], zeros and scales [N, G] as the tensors of a GPTQ linear."""
    stored = (zeros.astype(np.int64) - (version == 1)) % (1 << bits)
    groups = np.repeat(np.arange(zeros.shape[1]), codes.shape[1] // zeros.shape[1])
    return {
        "qweight": gptq_stream(codes.T, bits),
        "qzeros": np.ascontiguousarray(gptq_stream(stored, bits).T),
        "scales": np.ascontiguousarray(scales.T),
        "g_idx": (groups if g_idx is None else g_idx).astype(np.int32),
    }


def awq_words(values: np.ndarray) -> np.ndarray:
    """[A, N] as [A, N / 8] words in AWQ's order."""
    words = np.zeros((values.shape[0], values.shape[1] // 8), np.uint32)
    for i, column in enumerate(AWQ_ORDER):
        words |= values[:, column::8].astype(np.uint32) << np.uint32(4 * i)
    return words.view(np.int32)


def awq_layer(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray) -> dict[str, np.ndarray]:
    """codes [N, K], zeros and scales [N, G] as the tensors of an AWQ linear."""
    return {
        "qweight": awq_words(codes.T),
        "qzeros": awq_words(zeros.T),
        "scales": np.ascontiguousarray(scales.T),
    }


def write_folder(
    folder: Path, config: dict[str, Any], layers: dict[str, dict[str, np.ndarray]], floats: dict[str, np.ndarray]
) -> None:
    """A checkpoint folder of those layers and floats."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"{module}.{part}": array for module, parts in layers.items() for part, array in parts.items()}
    save_file(
        {name: np.ascontiguousarray(array) for name, array in (tensors | floats).items()}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text(json.dumps(config))
