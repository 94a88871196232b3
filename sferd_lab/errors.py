"""The one error type that this package raises for bad input, bad files and failed runs, and how a command tells of it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence


class SferdError(ValueError):
    """Something the caller can mend: the message names the thing, the value and what is allowed."""


def command(main: Callable[[Sequence[str]], int | None]) -> Callable[[Sequence[str]], int]:
    """A module's ``main``, which takes the words of its command line, as one that returns the exit status.

    What the caller can mend is a line on stderr and the status 2, not a traceback; ``--help`` prints what the module says of itself.
    """

    @functools.wraps(main)
    def run(arguments: Sequence[str]) -> int:
        if {"-h", "--help"} & set(arguments):
            sys.stdout.write(f"{(sys.modules[main.__module__].__doc__ or '').strip()}\n")
            return 0
        try:
            return main(arguments) or 0
        except SferdError as error:
            sys.stderr.write(f"{error}\n")
            return 2

    return run
