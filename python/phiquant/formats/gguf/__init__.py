"""GGUF, the format of llama.cpp: writer.py writes, reader.py reads back."""
