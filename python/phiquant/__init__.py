"""phiquant: choose a grid, choose the codes, keep the codes.

    import phiquant as pq

    model, tok = pq.load("phi3-tiny")
    pq.quantize(model, "gguf:Q4_0")                 # or: pq.prepare_qat(...), train, pq.convert(model)
    pq.export(model, tok, "out/", format="gguf")    # the same codes, and a receipt
    pq.verify("out/")

Needs torch, numpy and safetensors; anything else is imported where it is used, with an error that
names the extra to install.
"""

from __future__ import annotations

from . import (
    evaluate,
    imatrix,
    integer,
    ops,  # first: loads the compiled part, or says why it cannot
    qat,
    sensitivity,
    testing,
)
from .codebook_linear import CodebookLinear
from .compression import (
    CodebookConv2d,
    CompressedSize,
    DeepCompression,
    GradualPruning,
    compress,
    compressed_size,
    decompress,
    deep_compress,
    finalize_pruning,
    magnitude_mask,
    prune,
    read_compressed,
    share_weights,
)
from .describe import bits, describe
from .errors import PhiquantError, UnsupportedModelError
from .export import export, verify
from .fake_quant import FakeQuantize, fake_quantize
from .input_quantizers import input_quantizer, round_inputs
from .integer_model import compute_per_token, to_integer
from .kmeans import kmeans, vector_kmeans
from .learned import LearnedFakeQuantize, TrainedScales, learned_groups, learned_parameters
from .learned_clip import LearnedClipping
from .learned_levels import LearnedCodebook, TrainedTernary
from .load import load
from .modules import QATEmbedding, QATLinear, QuantizedConv2d, QuantizedEmbedding, QuantizedLinear
from .observers import (
    EmaObserver,
    HistogramObserver,
    KLObserver,
    MinMaxObserver,
    PercentileObserver,
    TorchHistogramObserver,
)
from .packing import pack, unpack
from .quantize import convert, prepare_qat, quantize
from .quantized_cache import quantized_cache
from .recipe import Recipe
from .repack import repack
from .same_codes import same_codes
from .search import search
from .solvers import quantize_tensor
from .spec import (
    IQ4NL,
    TARGETS,
    Binary,
    Codebook,
    FixedPoint,
    Float,
    Int,
    NormalFloat,
    PerChannel,
    PerGroup,
    PerRows,
    PerTensor,
    PerToken,
    QuantSpec,
    Target,
    Ternary,
    spec,
    target,
)
from .tensor import QuantizedTensor
from .transforms import transform

__version__ = "0.1.0"

__all__ = [
    "IQ4NL",
    "TARGETS",
    "Binary",
    "Codebook",
    "CodebookConv2d",
    "CodebookLinear",
    "CompressedSize",
    "DeepCompression",
    "EmaObserver",
    "FakeQuantize",
    "FixedPoint",
    "Float",
    "GradualPruning",
    "HistogramObserver",
    "Int",
    "KLObserver",
    "LearnedClipping",
    "LearnedCodebook",
    "LearnedFakeQuantize",
    "MinMaxObserver",
    "NormalFloat",
    "PerChannel",
    "PerGroup",
    "PerRows",
    "PerTensor",
    "PerToken",
    "PercentileObserver",
    "PhiquantError",
    "QATEmbedding",
    "QATLinear",
    "QuantSpec",
    "QuantizedConv2d",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "QuantizedTensor",
    "Recipe",
    "Target",
    "Ternary",
    "TorchHistogramObserver",
    "TrainedScales",
    "TrainedTernary",
    "UnsupportedModelError",
    "bits",
    "compress",
    "compressed_size",
    "compute_per_token",
    "convert",
    "decompress",
    "deep_compress",
    "describe",
    "evaluate",
    "export",
    "fake_quantize",
    "finalize_pruning",
    "imatrix",
    "input_quantizer",
    "integer",
    "kmeans",
    "learned_groups",
    "learned_parameters",
    "load",
    "magnitude_mask",
    "ops",
    "pack",
    "prepare_qat",
    "prune",
    "qat",
    "quantize",
    "quantize_tensor",
    "quantized_cache",
    "read_compressed",
    "repack",
    "round_inputs",
    "same_codes",
    "search",
    "sensitivity",
    "share_weights",
    "spec",
    "target",
    "testing",
    "to_integer",
    "transform",
    "unpack",
    "vector_kmeans",
    "verify",
]
