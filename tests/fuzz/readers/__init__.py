"""Fuzzers of the Python readers: hostile files in, a model or a PhiquantError out, and nothing else."""
