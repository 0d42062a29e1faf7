"""ONNX folders, for ONNX Runtime and ORT-GenAI: writer.py writes, reader.py reads back."""
