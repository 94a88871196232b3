"""A short run of ``tests/fuzz/run.py``, whose long one is in ``data/results/reliability.csv``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from fuzz import run
from fuzz.readers import Reader
from hypothesis import strategies as st

from sferd_lab.errors import SferdError

ROOT = Path(__file__).parent.parent


def test_every_reader_takes_whatever_it_is_given(tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    pd.DataFrame([("faults", "teacher", "same bytes", 3), ("fuzz", "old", "value", 1)], columns=run.COLUMNS).to_csv(table, index=False)
    command = [sys.executable, str(ROOT / "tests" / "fuzz" / "run.py"), "inputs=1500", f"table={table}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = pd.read_csv(table)
    assert found.iloc[0].tolist() == ["faults", "teacher", "same bytes", 3]
    fuzzed = found[found["part"] == "fuzz"]
    assert fuzzed["count"].sum() >= 1500
    assert set(fuzzed["outcome"]) == {"value", "SferdError"}
    assert "old" not in set(fuzzed["case"])


@pytest.mark.parametrize("bug", [KeyError("a"), MemoryError(), SferdError(" "), ValueError("b")])
def test_anything_but_a_value_or_an_error_in_words_is_a_bug(bug: Exception) -> None:
    def read(given: int) -> int:
        if given % 3 == 0:
            raise bug
        return given

    with pytest.raises((type(bug), AssertionError)):
        run.tally(Reader("numbers", st.integers(), read, 1.0), 50)


def test_the_recorded_run_is_of_every_reader_and_100_000_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fuzz.readers import readers

    monkeypatch.chdir(tmp_path)
    table = pd.read_csv(run.TABLE)
    fuzzed = table[table["part"] == "fuzz"]
    assert list(table.columns) == run.COLUMNS
    assert set(fuzzed["case"]) == {reader.name for reader in readers(tmp_path)}
    assert fuzzed["count"].sum() >= 100_000
    assert set(fuzzed["outcome"]) <= {"value", "SferdError"}
