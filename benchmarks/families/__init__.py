"""The numerics' benchmarks, a family a file: `rows(repeats)` gives the rows, running the file prints them."""
