"""What is true of the supported model families, as data."""
