"""python -m onnxruntime_genai.models.builder -p int4 -e cpu: blocks of 32; the embedding stays float."""

import runpy
import sys

import onnxruntime_genai.models  # noqa: F401 (imports are not counted)
import transformers  # noqa: F401


def convert(checkpoint: str, out: str) -> None:
    sys.argv = ["builder", "-i", checkpoint, "-o", out, "-p", "int4", "-e", "cpu", "-c", f"{out}.cache"]
    runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__")
