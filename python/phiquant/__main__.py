"""`python -m phiquant` is the command `phiquant`."""

from .cli import main

main()
