"""The course keeps its form: every notebook of it is built alike, short enough to read in an evening, and asserts what it says."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest

PATHS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
NOTEBOOKS = {path.stem: nbformat.read(path, as_version=4).cells for path in PATHS}


def prose(name: str) -> str:
    """A notebook's text without formulas, code and what is folded."""
    text = "\n".join(cell.source for cell in NOTEBOOKS[name] if cell.cell_type == "markdown")
    return re.sub(r"<details>.*?</details>|```.*?```|\$\$.*?\$\$|\$[^$]*\$", " ", text, flags=re.DOTALL)


def code(name: str) -> list[nbformat.NotebookNode]:
    return [cell for cell in NOTEBOOKS[name] if cell.cell_type == "code"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_has_the_parts_of_a_lesson(name: str) -> None:
    text, sources = prose(name), "\n".join(cell.source for cell in code(name))
    if name != "experiment":  # which is a run first, and a lesson after it
        assert "At the end of this notebook you can" in " ".join(text.split())
        assert re.search(r"\d+ minutes to read", text)
        assert "**Predict" in text
        assert sources.count("assert ") >= 3
    assert "## What would break this" in text
    assert re.search(r"## Further reading|\*\*Further reading\.", text)
    assert 2 <= len(re.findall(r"exercises\.check_\w+", sources)) <= 4
    assert re.search(r"widgets\.\w+_explorer\(", sources)
    assert any("image/png" in output.get("data", {}) for cell in code(name) for output in cell.outputs), "no figure among the outputs"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_is_short_and_so_are_its_cells(name: str) -> None:
    assert 800 <= len(re.findall(r"\w[\w'-]*", prose(name))) <= 1500
    for cell in code(name):
        if "parameters" not in cell.metadata.get("tags", []):
            assert len(cell.source.splitlines()) <= 20, cell.source.splitlines()[0]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_every_exercise_says_how_hard_it_is_and_folds_hint_and_solution(name: str) -> None:
    told = [cell.source for cell in NOTEBOOKS[name] if cell.cell_type == "markdown" and "<summary>Solution</summary>" in cell.source]
    assert len(told) == sum("exercises.check_" in cell.source for cell in code(name))
    for text in told:
        assert re.search(r"\*(Easy|Medium|Hard), \d+ minutes\.\*", text)
        assert "<summary>Hint</summary>" in text


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_was_run_from_the_first_cell_to_the_last_and_no_cell_failed_or_warned(name: str) -> None:
    cells = [cell for cell in code(name) if cell.source.strip()]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not any(output.output_type == "error" for cell in cells for output in cell.outputs)
    # A warning names a file of the process that gave it, so no other run would have the same output.
    assert not any(output.get("name") == "stderr" for cell in cells for output in cell.outputs)
    assert not any("widget" in kind for cell in cells for output in cell.outputs for kind in output.get("data", {}))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_defines_no_model(name: str) -> None:
    assert not any(re.search(r"\bnn\.Module\b|^class ", cell.source, re.MULTILINE) for cell in code(name))
