"""MLX folders, for mlx-lm: writer.py writes, reader.py reads back."""
