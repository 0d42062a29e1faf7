"""What users have today, a file per tool, each in an environment where that tool and phiquant are installed.

METHODS: name -> function(model, ids [n, T], tokenizer) -> (what to judge, bits per weight); see benchmarks/quality.py.
Bits count scales and zero points as the tool stores them.
"""
