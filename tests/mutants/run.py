"""Show that the tests can fail: make each change of ``mutations.toml`` to the library and see the test named for it notice.

    .venv/bin/python tests/mutants/run.py [part of a name, file or test]

Every change is made in a scratch copy of library and tests; the working tree is only read. Exit status 0: every mutation was caught.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent.parent
LIST = Path(__file__).with_name("mutations.toml")
TIMEOUT = 600  # seconds
# pytest imports it first: with another copy of the library on the path it exits with 4, which is not 1, a failed test.
GUARD = """
from pathlib import Path
import sferd_lab
assert Path(sferd_lab.__file__).resolve().parent.parent == Path(__file__).resolve().parent, sferd_lab.__file__
"""
# A test that fails on one of these has met code that does not run, which any test would have noticed.
CRASH = re.compile(r"^FAILED .* - (ImportError|ModuleNotFoundError|NameError|UnboundLocalError|SyntaxError|IndentationError)", re.MULTILINE)


@dataclass(frozen=True)
class Mutation:
    """In ``sferd_lab/<file>`` the text ``old`` becomes ``new``; the test with the node id ``test`` must fail for it."""

    name: str
    file: str
    old: str
    new: str
    test: str


def read_mutations() -> list[Mutation]:
    """The committed list."""
    return [Mutation(**entry) for entry in tomllib.loads(LIST.read_text(encoding="utf-8"))["mutation"]]


def mutated(mutation: Mutation) -> str:
    """The text of the mutated file. Raises ValueError unless the old text occurs exactly once: the list has drifted from the code."""
    text = (ROOT / "sferd_lab" / mutation.file).read_text(encoding="utf-8")
    if (count := text.count(mutation.old)) != 1 or mutation.old == mutation.new:
        raise ValueError(f"mutation '{mutation.name}': its old text occurs {count} times in {mutation.file}; allowed: once, and not as new")
    return text.replace(mutation.old, mutation.new)


def run_tests(tests: Iterable[str], mutation: Mutation | None = None) -> subprocess.CompletedProcess[str]:
    """pytest on ``tests`` in a scratch copy of the project, stopping at the first failure."""
    with TemporaryDirectory(prefix="sferd-mutant-") as name:
        scratch = Path(name)
        for folder in ("sferd_lab", "tests", "data"):
            shutil.copytree(ROOT / folder, scratch / folder, ignore=shutil.ignore_patterns("__pycache__", "*-ubyte*"))
        shutil.copy(ROOT / "pyproject.toml", scratch)
        (scratch / "conftest.py").write_text(GUARD, encoding="utf-8")
        if mutation is not None:
            (scratch / "sferd_lab" / mutation.file).write_text(mutated(mutation), encoding="utf-8")
        # PYTHONPATH comes before the editable install. COLUMNS: pytest cuts the reason of a failure to the width of the terminal.
        environment = os.environ | {"PYTHONPATH": name, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "1000"}
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", f"--basetemp={scratch / 'tmp'}", *tests]
        return subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False)


def judge(mutation: Mutation) -> str:
    """What became of a mutation: "caught", the test failed; "SURVIVED", it passed; "BROKEN", with the reason, it did not run."""
    try:
        done = run_tests([mutation.test], mutation)
    except subprocess.TimeoutExpired:
        return f"BROKEN (no end after {TIMEOUT} s)"
    if done.returncode == 0:
        return "SURVIVED"
    # A fixture that raises is an ERROR, though pytest exits with 1 for it too.
    if done.returncode == 1 and "\nFAILED " in done.stdout and not CRASH.search(done.stdout):
        return "caught"
    return f"BROKEN (pytest ended with {done.returncode}: {(done.stdout + done.stderr).strip().splitlines()[-1]})"


def main(mutations: Sequence[Mutation], workers: int = 2) -> int:
    """Print one line a mutation and a tally; the exit status."""
    try:
        for mutation in mutations:
            mutated(mutation)
    except ValueError as error:
        print(error)
        return 1
    tests = list(dict.fromkeys(mutation.test for mutation in mutations))
    print(f"{len(mutations)} mutations; first their {len(tests)} tests on the library as it is", flush=True)
    if not mutations or (done := run_tests(tests)).returncode != 0:
        print("nothing to show" if not mutations else f"{done.stdout}{done.stderr}\nthe tests must pass on the library as it is")
        return 1
    tally: Counter[str] = Counter()
    with ThreadPoolExecutor(workers) as pool:
        for number, (mutation, verdict) in enumerate(zip(mutations, pool.map(judge, mutations), strict=True), start=1):
            tally[verdict.split()[0]] += 1
            print(f"{number:3}/{len(mutations)} {verdict:9} {mutation.name}  [{mutation.test}]", flush=True)
    print(f"{tally['caught']} of {len(mutations)} mutations caught, {tally['SURVIVED']} survived, {tally['BROKEN']} broken")
    return int(tally["caught"] != len(mutations))


if __name__ == "__main__":
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    chosen = [mutation for mutation in read_mutations() if any(wanted in text for text in (mutation.name, mutation.file, mutation.test))]
    sys.exit(main(chosen))
