"""The errors of phiquant. Each message says what was wrong, where, and what to do next."""

from __future__ import annotations


class PhiquantError(ValueError):
    """Input, model or file that phiquant cannot work with. A ValueError, so callers may catch either."""

    def __init__(self, message: str = "") -> None:
        # Half a surrogate pair, which a file's JSON may hold, could not be printed.
        super().__init__(message.encode("utf-8", "backslashreplace").decode("utf-8"))


class UnsupportedModelError(PhiquantError):
    """A model of another architecture than the supported one; the message names it."""
