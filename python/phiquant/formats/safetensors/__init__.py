"""Safetensors folders: compressed-tensors, GPTQ, AWQ: writer.py writes, reader.py reads back."""
