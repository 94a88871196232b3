"""The notebooks in JupyterLab in a browser: all cells run, the keyboard moves the explorers, exercises answer. ``make test-browser``."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from chromium import MISSING, find
from lab import CHROMIUM_OPTIONS, RESPONSE, START, Lab, serve
from playwright.sync_api import expect, sync_playwright

NOTEBOOKS = Path(__file__).resolve().parent.parent.parent / "notebooks"
EXPLORER = re.compile(r"(?<!def )\b\w+_explorer\(")


def sources(name: str) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in nbformat.read(NOTEBOOKS / name, as_version=4).cells]


def explorer_cells(name: str) -> dict[int, list[str]]:
    """The explorers that each cell of a notebook calls, by the cell's index."""
    found = {index: EXPLORER.findall(source) for index, (kind, source) in enumerate(sources(name)) if kind == "code"}
    return {index: [call.rstrip("(") for call in calls] for index, calls in found.items() if calls}


WITH_EXPLORERS = [path.name for path in sorted(NOTEBOOKS.glob("*.ipynb")) if explorer_cells(path.name)]


def make_tiny(path: Path) -> None:
    """Have a copy of the experiment train a few steps only: what is tested there is its explorer."""
    notebook = nbformat.read(path, as_version=4)
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    cell.source = f"%env SFERD_LAB_TINY=1\n{cell.source}"
    nbformat.write(notebook, path)


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    if not (chromium := find()):
        pytest.fail(MISSING)
    folder = tmp_path_factory.mktemp("lab")
    # What a run writes into the notebooks stays in this copy.
    copy = Path(shutil.copytree(NOTEBOOKS, folder / "notebooks", ignore=shutil.ignore_patterns(".ipynb_checkpoints")))
    make_tiny(copy / "experiment.ipynb")
    with serve(copy, folder) as (address, token), sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_OPTIONS, timeout=START * 1000)
        yield Lab(browser, address, token, folder)
        browser.close()


def assert_all_ran(cells: list[dict]) -> None:
    code = [(index, cell) for index, cell in enumerate(cells) if cell["cell_type"] == "code" and "".join(cell["source"]).strip()]
    assert code
    for index, cell in code:
        errors = [f"{output['ename']}: {output['evalue']}" for output in cell["outputs"] if output["output_type"] == "error"]
        assert not errors, f"cell {index}: {errors[0]}"
    # From the first to the last, each once.
    assert [cell["execution_count"] for _, cell in code] == list(range(1, len(code) + 1))


def test_the_first_notebook_runs_from_the_first_cell_to_the_last(lab: Lab) -> None:
    with lab.open("00_start_here.ipynb") as notebook:
        assert not any(cell.get("execution_count") for cell in notebook.cells())
        notebook.execute("notebook:run-all-cells")
        assert_all_ran(notebook.cells())


@pytest.mark.parametrize("name", WITH_EXPLORERS)
def test_the_arrow_keys_move_picture_and_words_of_every_explorer(lab: Lab, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    cells = explorer_cells(name)
    with lab.open(name) as notebook:
        last = max(cells)
        notebook.run_until(last)
        assert_all_ran(notebook.cells()[: last + 1])
        for index, calls in cells.items():
            explorers = notebook.explorers(notebook.activate(index), len(calls))
            for call, explorer in zip(calls, explorers, strict=True):
                moved = notebook.move(explorer)
                for part in ("picture", "words", "alt"):
                    assert moved.before[part], f"{call} has no {part}"
                    assert moved.after[part] != moved.before[part], f"{call}: {moved.keys} on '{moved.control}' did not change the {part}"
                assert moved.after["alt"] == moved.after["words"]
                assert explorer.evaluate("box => box.scrollWidth <= box.clientWidth"), f"{call} is wider than its cell, which cuts it off"
                assert moved.seconds < RESPONSE
                with capsys.disabled():
                    print(f"\n{name}: {call} followed {moved.keys} on '{moved.control}' in {moved.seconds:.2f} s", end=" ")


def first_exercise(name: str) -> tuple[int, str, str]:
    """The index of a notebook's first exercise cell, the folded solution above it, and its last line, the check."""
    cells = sources(name)
    index = next(index for index, (kind, source) in enumerate(cells) if kind == "code" and "exercises.check_" in source)
    solution = re.search(r"<summary>Solution</summary>\s*```python\n(.*?)```", cells[index - 1][1], re.DOTALL)[1]
    return index, solution, cells[index][1].strip().splitlines()[-1]


def test_an_exercise_says_what_is_wrong_and_then_that_it_passed(lab: Lab) -> None:
    index, solution, check = first_exercise("01_the_angle.ipynb")
    assert solution.count(" + ") == 1
    with lab.open("01_the_angle.ipynb") as notebook:
        cell = notebook.run_until(index)
        said = cell.locator(".jp-OutputArea-output")
        expect(said).to_have_text("not yet: your function returns nothing. Write its body, and end it with return.")
        for answer, words in (
            (solution.replace(" + ", " - "), "not yet: the noise is subtracted. As noise it is as good, but then v points the other way."),
            (solution, "passed"),
        ):
            notebook.write(cell, f"{answer}\n\n{check}")
            notebook.page.keyboard.press("Control+Enter")
            expect(said).to_have_text(words, timeout=30_000)
