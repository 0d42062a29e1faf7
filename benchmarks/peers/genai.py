"""python -m onnxruntime_genai.models.builder -p int4 -e cpu: blocks of 32; the embedding stays float."""

from onnxruntime_genai.models.builder import create_model


def convert(checkpoint: str, out: str) -> None:
    create_model("", checkpoint, out, "int4", "cpu", f"{out}.cache", int4_block_size=32)
