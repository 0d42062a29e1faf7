"""mlx_lm.convert -q: 4 bits, groups of 64, embedding and head too."""

import mlx_lm


def convert(checkpoint: str, out: str) -> None:
    mlx_lm.convert(checkpoint, out, quantize=True, q_bits=4, q_group_size=64)
