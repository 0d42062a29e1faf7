"""llm-compressor's model_free_ptq, which goes from file to file: int4, groups of 32; the head stays float."""

from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor import model_free_ptq


def convert(checkpoint: str, out: str) -> None:
    weights = QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=32, symmetric=True)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    model_free_ptq(
        checkpoint, out, scheme, ignore=["re:.*embed_tokens", "re:.*norm", "lm_head"], max_workers=2, device="cpu"
    )
