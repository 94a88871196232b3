"""The browser of these tests: the system's Chromium or Chrome. Nothing is downloaded behind the package manager's back.

    python tests/browser/chromium.py

prints where it is. On Debian, where there is none and we are root, it is installed first; elsewhere the program says what to install.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
INSTALL = (["apt-get", "update", "-qq"], ["apt-get", "install", "-y", "-qq", "--no-install-recommends", "chromium"])
MISSING = (
    "No Chromium or Chrome that starts. Install one (on Debian: apt-get install chromium), or say where it is: "
    "make test-browser CHROMIUM=/path/to/the/program"
)


def starts(program: str) -> bool:
    """Whether it says its version: on some systems the name is there, as a pointer to a package that is not."""
    try:
        return subprocess.run([program, "--version"], capture_output=True, timeout=60, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def find() -> str | None:
    """The program that the environment variable CHROMIUM names, or else the first of the usual names; None if it is not there."""
    named = os.environ.get("CHROMIUM")
    paths = (shutil.which(name) for name in ([named] if named else NAMES))
    return next((path for path in paths if path and starts(path)), None)


def install() -> None:
    """Try it with Debian's package manager: it needs root and a network."""
    for command in INSTALL:
        print(*command, file=sys.stderr)
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=300, check=False)


def main() -> int:
    """Exit status 0: there is one, and its path is printed."""
    if not (path := find()) and shutil.which("apt-get") and os.geteuid() == 0 and not os.environ.get("CHROMIUM"):
        install()
        path = find()
    print(path or MISSING, file=sys.stdout if path else sys.stderr)
    return 0 if path else 1


if __name__ == "__main__":
    sys.exit(main())
