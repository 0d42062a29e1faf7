"""OpenVINO IR folders: writer.py writes, reader.py reads back."""
