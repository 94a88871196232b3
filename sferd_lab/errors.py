"""The one error type that this package raises for bad input, bad files and failed runs."""

from __future__ import annotations


class SferdError(ValueError):
    """Something the caller can mend: the message names the thing, the value and what is allowed."""
