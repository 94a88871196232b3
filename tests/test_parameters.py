"""A parameter is a value and never code, and a file of parameters leads nowhere outside the current folder."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from nbformat.v4 import new_code_cell, new_notebook, writes
from papermill.parameterize import parameterize_notebook

from sferd_lab import config
from sferd_lab.config import PLACES, make_settings, parse_literals, read_parameters
from sferd_lab.errors import SferdError
from sferd_lab.sweep import main, read_sweep

ROOT = Path(__file__).parent.parent
CODE = [
    '__import__("os").system("touch ran")',
    "open('ran', 'w')",
    "exec(\"open('ran', 'w')\")",
    "(lambda: open('ran', 'w'))()",
    "[open('ran', 'w')]",
    "(open('ran', 'w'),)",
    "{'a': open('ran', 'w')}",
    "f\"{open('ran', 'w')}\"",
    "1 if open('ran', 'w') else 2",
]
YAML_CODE = [
    "!!python/object/apply:os.system [touch ran]",
    "!!python/object/new:os.system [touch ran]",
    "!!python/name:os.system",
    "!!python/module:os",
    "!!python/object:pathlib.Path {}",
]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, in which nothing may have run at the end."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("text", CODE)
@pytest.mark.parametrize("name", ["seed", "data", "widths", "preset", "teacher_lr", "retrain", "teacher_samplers"])
def test_a_word_on_the_command_line_that_is_code_arrives_as_text_and_is_refused(here: Path, name: str, text: str) -> None:
    given = parse_literals([f"{name}={text}"])
    assert given == {name: text}
    with pytest.raises(SferdError, match=name):
        make_settings(**given)
    assert not list(here.iterdir())


@pytest.mark.parametrize("text", CODE)
def test_a_notebooks_parameter_that_is_code_is_a_literal_in_its_cell(here: Path, text: str) -> None:
    notebook = new_notebook(cells=[new_code_cell("seed = 1", metadata={"tags": ["parameters"]})])
    notebook.metadata["kernelspec"] = {"name": "python3", "language": "python", "display_name": "Python 3"}
    notebook.metadata["papermill"] = {}
    cell = parameterize_notebook(notebook, {"seed": text, "widths": [text]}).cells[1].source
    namespace: dict[str, Any] = {}
    exec(cell, namespace)  # as the kernel does
    assert (namespace["seed"], namespace["widths"]) == (text, [text])
    assert not list(here.iterdir())


@pytest.mark.parametrize("text", YAML_CODE)
def test_a_tag_in_a_file_of_parameters_makes_no_object(here: Path, text: str) -> None:
    path = here.parent / "file.yaml"
    path.write_text(f"seed: {text}\n")
    with pytest.raises(SferdError, match="cannot be read as YAML"):
        read_parameters(path)
    # papermill's own reader, for those who give it the file.
    papermill = subprocess.run(
        [sys.executable, "-m", "papermill", "none.ipynb", "out.ipynb", "-f", str(path)], capture_output=True, text=True, check=False
    )
    assert papermill.returncode != 0
    assert "could not determine a constructor" in papermill.stderr
    assert not list(here.iterdir())


@pytest.mark.parametrize("name", ["seed; open('ran', 'w'); x", "open('ran', 'w').name", "__class__", "sed", 3, None])
def test_a_name_in_a_file_of_parameters_is_a_settings_name(here: Path, name: Any) -> None:
    path = here.parent / "file.yaml"
    path.write_text(f"{name!r}: 1\n" if isinstance(name, str) else f"{'null' if name is None else name}: 1\n")
    with pytest.raises(SferdError, match=r"unknown parameter .*; allowed: preset, seed"):
        read_parameters(path)
    assert config.main([str(path)]) == 2


WRONG = (
    ("analysis.ensemble", ["digits", "out", "teachers=2"], "students is not given"),
    ("analysis.study", ["spatiol", "run", "name"], "'spatiol run name'; allowed: one of spatial"),
    ("analysis.study", ["mechanism", "runs", "name"], "mechanism: missing a required argument: 'seeds'"),
    ("analysis.study", ["spatial", "run", "name", "m=3"], "spatial: got an unexpected keyword argument 'm'"),
    ("config", ["none.yaml"], "none.yaml is missing"),
    ("experiment", ["preset=digit"], "preset = 'digit'; allowed: digits"),
    ("plan", ["digits"], "argument 'digits'; allowed: name=value"),
    ("report", [], "no run folder"),
    ("report", ["out"], "out/metrics.csv is missing"),
    ("ship", [], "too few words"),
    ("ship", ["results", "name"], "too few words"),
    ("sweep", ["none.yaml"], "usage: "),
)


@pytest.mark.parametrize(("module", "words", "told"), WRONG)
def test_a_command_says_in_a_line_what_is_wrong_and_with_help_what_it_does(
    here: Path, capsys: pytest.CaptureFixture[str], module: str, words: list[str], told: str
) -> None:
    found = import_module(f"sferd_lab.{module}")
    assert found.main(words) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(told)
    assert found.main([*words, "--help"]) == 0
    assert capsys.readouterr() == (f"{found.__doc__.strip()}\n", "")
    assert not list(here.iterdir())


def test_the_check_of_a_file_prints_nothing_of_python_itself() -> None:
    file = ROOT / "data" / "studies" / "digits" / "paper.yaml"
    done = subprocess.run([sys.executable, "-m", "sferd_lab.config", str(file)], capture_output=True, text=True, check=True, cwd=ROOT)
    assert (done.stdout, done.stderr) == ("", "")


def test_make_checks_a_file_before_papermill_sees_it() -> None:
    lines = (ROOT / "Makefile").read_text().splitlines()
    check = lines.index("\t$(if $(file),$(BIN)/python -m sferd_lab.config $(file))")
    assert check < next(place for place, line in enumerate(lines) if "papermill" in line and "--log-output" in line)


@pytest.mark.parametrize("path", sorted((ROOT / "data" / "studies").rglob("*.yaml")), ids=lambda path: path.stem)
def test_the_studies_files_are_taken(path: Path) -> None:
    assert make_settings(**read_parameters(path)).preset


OUTSIDE = ["/etc", "..", "../there", "a/../../there", "link", "link/deeper", "\x00", 3]
INSIDE = ["there", "./there/deeper", "a/../there", "google/ddpm-cifar10-32", None]


@pytest.mark.parametrize("place", PLACES)
def test_a_file_of_parameters_can_name_places_inside_the_current_folder_alone(here: Path, place: str) -> None:
    (here / "link").symlink_to(here.parent)
    path = here / "file.yaml"
    for value in OUTSIDE:
        config_text = {"\x00": '"\\0"'}.get(value, value) if isinstance(value, str) else value
        path.write_text(f"{place}: {config_text}\n")
        with pytest.raises(SferdError, match=f"file.yaml: {place} = .*; allowed in a file: a place inside the current folder"):
            read_parameters(path)
    for value in INSIDE:
        path.write_text(f"{place}: {'null' if value is None else value}\n")
        assert read_parameters(path) == {place: value}


@pytest.fixture
def sweep_here(here: Path) -> Path:
    notebook = new_notebook(cells=[new_code_cell("data_folder = None\nteacher_from = None\nseed = 1", metadata={"tags": ["parameters"]})])
    notebook.metadata["kernelspec"] = {"name": "python3", "language": "python", "display_name": "Python 3"}
    (here / "small.ipynb").write_text(writes(notebook))
    (here.parent / "small.ipynb").write_text(writes(notebook))
    return here / "sweep.yaml"


@pytest.mark.parametrize("part", ["parameters: {%s: %s}\ngrid: {seed: [1]}", "grid: {%s: [inside, %s]}"])
@pytest.mark.parametrize("name", ["data_folder", "teacher_from"])
def test_so_can_a_sweep_unless_whoever_starts_it_says_so(sweep_here: Path, part: str, name: str) -> None:
    sweep_here.write_text("notebook: small.ipynb\n" + part % (name, "../there"))
    with pytest.raises(SferdError, match=rf"sweep.yaml: {name} = '../there'; allowed in a file"):
        read_sweep(sweep_here)
    assert read_sweep(sweep_here, allow_outside=True).runs
    sweep_here.write_text("notebook: small.ipynb\n" + part % (name, "there"))
    assert read_sweep(sweep_here).runs


def test_a_sweeps_notebook_which_is_code_lies_inside_too(sweep_here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep_here.write_text("notebook: ../small.ipynb\ngrid: {seed: [1]}")
    assert main([str(sweep_here), "out"]) == 2
    assert "notebook = '../small.ipynb'; allowed in a file" in capsys.readouterr().err
    assert read_sweep(sweep_here, allow_outside=True).runs
    assert main([str(sweep_here), "out", "allow_outside=perhaps"]) == 2
    assert "allow_outside = 'perhaps'; allowed: true, false" in capsys.readouterr().err
    assert not os.path.exists("out")


@pytest.mark.parametrize("text", CODE)
def test_a_sweeps_value_that_is_code_is_refused_where_it_is_no_text(here: Path, text: str) -> None:
    import json

    path = here.parent / "sweep.yaml"
    path.write_text(json.dumps({"grid": {"seed": [text]}}))
    with pytest.raises(SferdError, match="parameter 'seed' = "):
        read_sweep(path)
    assert not list(here.iterdir())


def test_a_grid_of_more_runs_than_anyone_has_time_for_is_refused_at_once(sweep_here: Path) -> None:
    import json

    grid = {name: list(range(400)) for name in ("data_folder", "teacher_from", "seed")}
    sweep_here.write_text(json.dumps({"notebook": "small.ipynb", "grid": grid}))
    with pytest.raises(SferdError, match="the grid has 64000000 combinations; allowed: up to 10000 runs"):
        read_sweep(sweep_here)
