"""optimum-cli export openvino --weight-format int4: traced by optimum-intel, compressed by NNCF, groups of 64."""

import sys

from optimum.commands.optimum_cli import main

_OPTIONS = (
    "--task text-generation-with-past --weight-format int4 --sym --group-size 64 --ratio 1.0 "
    "--disable-convert-tokenizer"
)


def convert(checkpoint: str, out: str) -> None:
    sys.argv = ["optimum-cli", "export", "openvino", "--model", checkpoint, *_OPTIONS.split(), out]
    main()
