"""Static QDQ ONNX models, for Qualcomm's QNN: writer.py writes, reader.py reads back."""
