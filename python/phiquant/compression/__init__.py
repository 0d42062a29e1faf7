"""Models of few values as small files: masks that hold, Deep Compression, one file, a reader that trusts nothing."""

from .deep import CodebookConv2d, DeepCompression, deep_compress, share_weights
from .prune import GradualPruning, finalize_pruning, magnitude_mask, prune
from .reader import CompressedSize, compressed_size, decompress, read_compressed
from .writer import compress

__all__ = [
    "CodebookConv2d",
    "CompressedSize",
    "DeepCompression",
    "GradualPruning",
    "compress",
    "compressed_size",
    "decompress",
    "deep_compress",
    "finalize_pruning",
    "magnitude_mask",
    "prune",
    "read_compressed",
    "share_weights",
]
