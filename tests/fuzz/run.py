"""Fuzz every reader of files and parameters: each input must end in a value or SferdError, in little memory and time.

    .venv/bin/python tests/fuzz/run.py [inputs=100000] [table=data/results/reliability.csv] [only=part of a reader's name]

The tally replaces the rows of the part "fuzz" in the table, or those of the readers that were run. Exit status 1, with the traceback and
the input, when anything else came out: another exception, no end within 10 seconds, or more than 2 GiB beyond what the process had at the
start.
"""

from __future__ import annotations

import math
import os
import resource
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import psutil
from hypothesis import HealthCheck, Phase, given, seed, settings

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from fuzz.readers import Reader, readers

from sferd_lab.errors import SferdError
from sferd_lab.files import replacing

TABLE = Path(__file__).resolve().parent.parent.parent / "data" / "results" / "reliability.csv"
COLUMNS = ["part", "case", "outcome", "count"]
SECONDS = 10
BYTES = 2 << 30


def tally(reader: Reader, inputs: int) -> Counter[str]:
    """How often ``inputs`` calls of a reader gave a value and how often SferdError. Raises whatever else came out."""
    outcomes: Counter[str] = Counter()

    def once(given: object) -> None:
        signal.alarm(SECONDS)
        try:
            reader.call(given)
            outcomes["value"] += 1
        except SferdError as error:
            if not str(error).strip():
                raise AssertionError("an SferdError without words") from error
            outcomes["SferdError"] += 1
        finally:
            signal.alarm(0)

    options = {"database": None, "deadline": None, "phases": [Phase.generate], "suppress_health_check": list(HealthCheck)}
    # Hypothesis ends early when it has seen too many inputs twice; another seed goes on, unless there are no others.
    while (missing := inputs - (before := outcomes.total())) > 0:

        @seed(before)
        @settings(max_examples=missing, **options)
        @given(reader.inputs)
        def run(given: object) -> None:
            once(given)

        run()
        if outcomes.total() == before:
            break
    return outcomes


def too_slow(_signal: int, _frame: object) -> None:
    """Said of an input that takes too long; SferdError's own handlers do not catch it."""
    raise BaseExceptionGroup("slow", [TimeoutError(f"no end after {SECONDS} s")])


def keep(counts: dict[str, Counter[str]], path: Path, whole: bool) -> None:
    """Put the tally in place of the table's rows of this part or, if not all readers were run, of their own."""
    rows = [("fuzz", name, outcome, count) for name, found in counts.items() for outcome, count in sorted(found.items())]
    table = pd.DataFrame(rows, columns=COLUMNS)
    if path.exists():
        old = pd.read_csv(path)
        replaced = (old["part"] == "fuzz") & (whole | old["case"].isin(list(counts)))
        table = pd.concat([old[~replaced], table], ignore_index=True)
    with replacing(path) as temporary:
        table.to_csv(temporary, index=False)


def main(inputs: int = 100_000, table: str = str(TABLE), only: str = "") -> int:
    """Fuzz the readers with ``inputs`` in all, at least, and keep the tally in ``table``; the exit status."""
    path = Path(table).resolve()
    warnings.simplefilter("ignore")  # Pillow's and Python's own, about what they were given
    signal.signal(signal.SIGALRM, too_slow)
    counts, broken, here = {}, [], Path.cwd()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    with TemporaryDirectory(prefix="sferd-fuzz-") as name:
        try:
            chosen = [reader for reader in readers(Path(name)) if only in reader.name]
            resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + BYTES, limits[1]))
            for reader in chosen:
                started = time.perf_counter()
                try:
                    counts[reader.name] = tally(reader, math.ceil(inputs * reader.share))
                except BaseException:
                    traceback.print_exc()
                    broken.append(reader.name)
                    continue
                print(f"{reader.name:22} {dict(counts[reader.name])} {time.perf_counter() - started:.0f} s", flush=True)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, limits)
            os.chdir(here)
    if broken:
        print(f"something other than a value or SferdError came out of: {', '.join(broken)}")
    else:
        keep(counts, path, whole=not only)
    return int(bool(broken))


if __name__ == "__main__":
    options = dict(word.split("=", 1) for word in sys.argv[1:])
    sys.exit(main(**{name: int(value) if name == "inputs" else value for name, value in options.items()}))
