"""The ops: the one room that says torch.ops.phiquant. A file per family: wrappers, meta kernels, gradients."""

from __future__ import annotations

from .._extension import load

load()  # before the families: they bind the ops that the extension registers

from .affine import (  # noqa: E402
    FORMATS,
    RULES,
    choose_range,
    dequantize,
    fake_quantize,
    fake_quantize_dynamic,
    min_max,
    quantize,
    quantize_dynamic,
    range_from_min_max,
)
from .bits import pack_bits, pack_trits, unpack_bits, unpack_trits  # noqa: E402
from .gptq import GPTQ_COLUMNS, gptq_run  # noqa: E402
from .hadamard import hadamard_base, hadamard_rotate_  # noqa: E402
from .histogram import (  # noqa: E402
    coarsen,
    dyadic_histogram,
    histogram,
    histogram_mse,
    kl_divergence,
    kl_threshold,
    percentile,
)
from .hqq import hqq  # noqa: E402
from .huffman import huffman_decode, huffman_encode, huffman_lengths  # noqa: E402
from .integer import (  # noqa: E402
    PackedWeight,
    conv2d_codes,
    linear_codes,
    linear_floats,
    linear_sums,
    pack_weight,
    quantize_multiplier,
    requantize,
)
from .kmeans import (  # noqa: E402
    codebook_assign,
    codebook_gradient,
    codebook_lookup,
    kmeans_exact,
    kmeans_lloyd,
    kmeans_minibatch,
    kmeans_vectors,
)
from .learned import learned_fake_quantize  # noqa: E402
from .search import search_range  # noqa: E402
from .two_level import fake_quantize_two_level_out, refine_two_level  # noqa: E402

__all__ = [
    "FORMATS",
    "GPTQ_COLUMNS",
    "RULES",
    "PackedWeight",
    "choose_range",
    "coarsen",
    "codebook_assign",
    "codebook_gradient",
    "codebook_lookup",
    "conv2d_codes",
    "dequantize",
    "dyadic_histogram",
    "fake_quantize",
    "fake_quantize_dynamic",
    "fake_quantize_two_level_out",
    "gptq_run",
    "hadamard_base",
    "hadamard_rotate_",
    "histogram",
    "histogram_mse",
    "hqq",
    "huffman_decode",
    "huffman_encode",
    "huffman_lengths",
    "kl_divergence",
    "kl_threshold",
    "kmeans_exact",
    "kmeans_lloyd",
    "kmeans_minibatch",
    "kmeans_vectors",
    "learned_fake_quantize",
    "linear_codes",
    "linear_floats",
    "linear_sums",
    "min_max",
    "pack_bits",
    "pack_trits",
    "pack_weight",
    "percentile",
    "quantize",
    "quantize_dynamic",
    "quantize_multiplier",
    "range_from_min_max",
    "refine_two_level",
    "requantize",
    "search_range",
    "unpack_bits",
    "unpack_trits",
]
