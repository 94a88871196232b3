"""The tables of README.md and data/results/README.md are what the committed rows give."""

from __future__ import annotations

import re

import pandas as pd
import pytest
import tables

from sferd_lab import report
from sferd_lab.errors import SferdError
from sferd_lab.experiment import Row


def test_both_files_have_the_tables_of_the_committed_rows(capsys: pytest.CaptureFixture[str]) -> None:
    assert tables.main(check=True) == 0, capsys.readouterr().err


def test_a_changed_number_is_noticed_and_written_anew() -> None:
    for path in tables.FILES:
        text = path.read_text()
        names = re.findall(r"<!-- table: (\w+) -->", text)
        assert names
        for name in names:
            start = text.index(f"<!-- table: {name} -->")
            digit = re.compile(r"\d(?= [±\[])").search(text, start)
            changed = text[: digit.start()] + str((int(digit[0]) + 1) % 10) + text[digit.end() :]
            assert tables.written(changed) == text


def test_every_run_of_a_study_is_in_a_table() -> None:
    """Only what has no student is left out: guided teachers of the sweep, and the teacher's own study."""
    lines = [*tables.digits("pd"), *tables.digits("cd"), *tables.fashion("pd"), *tables.fashion("cd"), *tables.undistilled()]
    lines += [line for name in ("fashion28", "patches") for method in tables.PLAIN for line in tables.one_study(name, method)]
    told = {(line.folder, line.study) for line in lines}
    for several in ("digits-controls", "digits-tuning"):
        names = tables.rows_of(several)["run"].str.replace(r"-seed\d+$", "", regex=True)
        studies = {study for study in names if not study.startswith(("guidance-eps-", "guidance-x0-", "teacher"))}
        assert studies == {study for folder, study in told if folder == several}
    folders = {path.parent.name for path in tables.RESULTS.glob("*/metrics.csv")}
    assert folders == {folder for folder, _ in told}


def test_cells_are_what_report_says(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, guided = tables.PLAIN["pd"], Row("pd", True, sampler="ddim")
    values = {1: (2.0, 3.0, 0.5), 2: (2.0, 1.0, 0.8), 3: (2.0, 2.0, 0.65)}
    rows = [
        {**{name: getattr(row, name) for name in Row.__dataclass_fields__}, "steps": 1, "seed": seed, "metric": metric, "value": value}
        for seed, found in values.items()
        for row, metric, value in ((plain, "fd", found[0]), (guided, "fd", found[1]), (guided, "recall", found[2]))
    ]
    rows += [{**row, "method": "teacher", "steps": 64, "value": 1.0} for row in rows if row["metric"] == "fd" and not row["guidance"]][:2]
    rows += [{**row, "steps": 2, "value": 1.0} for row in rows if row["metric"] == "fd" and not row["guidance"] and row["steps"] == 1]
    monkeypatch.setattr(tables, "rows_of", lambda folder, study="": pd.DataFrame(rows))
    mine, base = tables.Line("", guided, "digits", "some"), tables.Line("", plain, "digits")
    ratio, low, high, _ = report.ratio(mine.scores(1), base.scores(1))
    assert (round(ratio, 6), low < 1 < high) == (round(0.75 ** (1 / 3), 6), True)
    assert mine.over(base, 1) == f"0.91 [{low:.2f}, {high:.2f}]"
    assert base.over(base, 1) == "1"
    assert base.over(base, 1, theirs=2) == "2.00 [2.00, 2.00]"
    assert mine.over(base, 2) == ""
    assert mine.over(tables.Line("", tables.TEACHER, "digits"), 1, theirs=64).startswith("1.73 [")  # of seeds 1 and 2: 3 and 1, over 1
    # Of seeds 1 and 2, for the third has no teacher: (2 - 3) / (2 - 1) and (2 - 1) / (2 - 1).
    assert mine.closed(base, tables.Line("", tables.TEACHER, "digits")).startswith("0.00 [")
    assert base.closed(base, base) == ""
    assert tables.spread(mine.scores(1)) == "2.00 ± 1.0"
    assert [tables.span(seeds) for seeds in ([1, 2, 3], [3], [1, 2], [1, 3, 4])] == ["1 to 3", "3", "1, 2", "1, 3, 4"]
    assert [tables.digits_of(value, 3) for value in (86.04, 0.31, 103.2, 0.0433)] == ["86.0", "0.310", "103", "0.0433"]


def test_the_brightened_images_are_those_of_the_best_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    row = tables.PLAIN["pd"]
    line = {**{name: getattr(row, name) for name in Row.__dataclass_fields__}, "steps": 1, "seed": 1, "metric": "fd"}
    values = dict(zip(tables.FACTORS, (3.0, 1.0, 2.0, 4.0), strict=True))
    monkeypatch.setattr(tables, "rows_of", lambda folder, study: pd.DataFrame([{**line, "value": values[study.removeprefix("contrast-")]}]))
    assert tables.brightened(row, "digits-controls").study == f"contrast-{tables.FACTORS[1]}"


def test_the_best_study_is_that_of_the_seeds_which_all_have(monkeypatch: pytest.MonkeyPatch) -> None:
    row = tables.PLAIN["pd"]
    line = {**{name: getattr(row, name) for name in Row.__dataclass_fields__}, "steps": 1, "metric": "fd"}
    values = {"one seed": {1: 2.0}, "two seeds": {1: 1.0, 2: 9.0}, "another": {1: 3.0, 2: 0.5}}  # by all its seeds another would be
    found = {
        study: pd.DataFrame([{**line, "seed": seed, "value": value} for seed, value in told.items()]) for study, told in values.items()
    }
    monkeypatch.setattr(tables, "rows_of", lambda folder, study: found[study])
    assert tables.best(row, "digits-tuning", found).study == "two seeds"


def test_a_comparison_is_of_the_rows_that_it_names() -> None:
    cells = {line.split(" | ")[0].removeprefix("| "): line.split(" | ")[1:] for line in tables.comparisons().splitlines()[2:]}
    assert list(cells) == [text for text, *_ in tables.COMPARED]
    found = {name: tables.rows_of(name) for name in ("fashion16", "fashion16-improved", "fashion16-improved-x0")}
    pair, both = (Row("pd", guidance, "conditional", "prior", "ddim", 1) for guidance in (False, True))
    for metric, place in (("fd", 4), ("fd_second", 5)):
        for text, mine, theirs in (
            (
                "PD + SGP over two steps of PD",
                (found["fashion16-improved"], pair),
                (found["fashion16"], Row("pd", sampler="ddim", steps=2)),
            ),
            (
                "SFERD-PD over the teacher's 64 steps",
                (found["fashion16-improved-x0"], both),
                (found["fashion16"], Row("teacher", sampler="ddim", steps=64)),
            ),
        ):
            middle, low, high, seeds = report.ratio(report.by_seed(*mine, metric), report.by_seed(*theirs, metric))
            assert seeds > 2
            assert cells[text][place].strip(" |*") == f"{middle:.2f} [{low:.2f}, {high:.2f}]"
    assert [cell.strip(" |") for cell in cells["guidance where attention is least over guidance"][3:]] == ["", "", ""]  # not run there


def test_two_numbers_of_one_seed_are_no_blank(monkeypatch: pytest.MonkeyPatch) -> None:
    row = tables.PLAIN["pd"]
    line = {**{name: getattr(row, name) for name in Row.__dataclass_fields__}, "steps": 1, "seed": 1, "metric": "fd", "value": 1.0}
    monkeypatch.setattr(tables, "rows_of", lambda folder, study="": pd.DataFrame([line, line]))
    with pytest.raises(SferdError, match="2 numbers of 'pd, 1 step'"):
        tables.Line("", row, "digits").scores(1)
