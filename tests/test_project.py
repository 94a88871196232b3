"""The project's files agree with each other: environments, notebook, shipped files, README."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import licences
import nbformat
import pandas as pd
import pytest
import torch
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from sferd_lab.artifacts import load_model, shipped_folder
from sferd_lab.config import Settings, make_settings, read_parameters
from sferd_lab.data import load_images
from sferd_lab.files import load_tensors, sha256
from sferd_lab.metrics import extract, load_feature_network

ROOT = Path(__file__).parent.parent
STUDIES = ROOT / "data" / "studies"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PINS = {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in (ROOT / "constraints.txt").read_text().split() if line}


def needed() -> list[Requirement]:
    project = PYPROJECT["project"]
    extras = project["optional-dependencies"]
    return [Requirement(text) for text in project["dependencies"] + extras["dev"] + extras["docs"] + extras["browser"]]


def test_every_dependency_is_pinned_to_a_version_it_allows() -> None:
    for requirement in needed():
        assert canonicalize_name(requirement.name) in PINS, f"constraints.txt does not pin {requirement.name}"
        assert requirement.specifier.contains(PINS[canonicalize_name(requirement.name)]), (
            f"{requirement} excludes the pin {PINS[canonicalize_name(requirement.name)]}"
        )


def test_what_the_dependencies_need_is_pinned_too() -> None:
    """Of what is installed: an extra that is not here can say nothing about itself."""
    waiting, seen = [(requirement.name, frozenset(requirement.extras)) for requirement in needed()], set()
    while waiting:
        name, extras = waiting.pop()
        if (canonicalize_name(name), extras) in seen:
            continue
        seen.add((canonicalize_name(name), extras))
        try:
            texts = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        for requirement in map(Requirement, texts):
            environments = [{"extra": extra} for extra in extras] or [{"extra": ""}]
            if requirement.marker is None or any(requirement.marker.evaluate(environment) for environment in environments):
                waiting.append((requirement.name, frozenset(requirement.extras)))
    found = {name for name, _ in seen}
    # What only tools that come with Python's own environments need, and CUDA's parts of torch, which its CPU build has not.
    unpinned = {name for name in found - PINS.keys() if not name.startswith(("nvidia-", "cuda-", "triton"))}
    assert unpinned <= {"setuptools", "pip"}


def test_the_table_of_licences_is_what_the_installed_packages_state() -> None:
    recorded = pd.read_csv(licences.TABLE, keep_default_na=False).set_index("package")
    assert recorded["extra"].to_dict() == dict(sorted(licences.direct().items()))
    for name, stated in recorded["licence"].items():
        here = licences.licence(name)
        if licences.NOT_HERE not in (here, stated) and metadata.version(name).split("+")[0] == PINS[canonicalize_name(name)]:
            assert stated == here


def test_no_known_advisory_holds_for_a_pin_or_is_allowed_by_a_bound() -> None:
    known = pd.read_csv(ROOT / "data" / "results" / "advisories.csv", keep_default_na=False)
    project = PYPROJECT["project"]
    bounds = [Requirement(text) for texts in (project["dependencies"], *project["optional-dependencies"].values()) for text in texts]
    for line in known.itertuples():
        name = canonicalize_name(line.package)
        if line.fixed_in:
            assert Version(PINS[name]) >= Version(line.fixed_in), line
            for bound in (bound for bound in bounds if canonicalize_name(bound.name) == name):
                lowest = [specifier.version for specifier in bound.specifier if specifier.operator == ">="]
                assert [Version(version) >= Version(line.fixed_in) for version in lowest] == [True], (bound, line)
    # Of the two without a fix it is said that nothing here calls what they are about.
    assert known.loc[known["fixed_in"] == "", "advisory"].tolist() == ["PYSEC-2026-139", "CVE-2025-3000"]
    library = "".join(path.read_text() for path in (ROOT / "sferd_lab").rglob("*.py"))
    assert not re.search(r"torch\.(jit|export|load|_inductor)\b", library)


def test_conda_takes_python_and_pip_and_leaves_the_rest_to_the_same_pins() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *conda, pip = environment["dependencies"]
    assert [name.split("=")[0] for name in conda] == ["python", "pip"]
    assert pip == {"pip": ["--constraint constraints.txt", "--editable .[dev,docs]"]}
    python = next(name for name in conda if name.startswith("python")).split("=")[1]
    assert Requirement(f"python{PYPROJECT['project']['requires-python']}").specifier.contains(python)
    assert '-c constraints.txt -e ".[dev,docs]"' in (ROOT / "Makefile").read_text()


def test_installed_packages_are_consistent() -> None:
    check = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True, check=False)
    assert check.returncode == 0, check.stdout


def parameters_cell() -> str:
    notebook = nbformat.read(ROOT / "notebooks" / "experiment.ipynb", as_version=4)
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    return cell.source


def test_every_setting_is_a_parameter_of_the_notebook_and_none_by_default() -> None:
    statements = ast.parse(parameters_cell()).body
    assert all(isinstance(statement, ast.AnnAssign) for statement in statements)
    values = {statement.target.id: ast.literal_eval(statement.value) for statement in statements}
    assert list(values) == list(Settings.model_fields)
    assert values.pop("preset") == "digits"
    assert set(values.values()) == {None}


def test_papermill_reads_every_parameter_and_its_type() -> None:
    from papermill.inspection import inspect_notebook

    known = inspect_notebook(str(ROOT / "notebooks" / "experiment.ipynb"))
    assert list(known) == list(Settings.model_fields)
    assert all(entry["inferred_type_name"] in ("str", "int", "float", "bool", "list") for entry in known.values())


def test_papermill_stops_at_an_unknown_or_impossible_parameter(tmp_path: Path) -> None:
    import papermill

    for name, value, words in (
        ("sed", 3, "unknown parameter 'sed' = 3; allowed: "),
        ("seed", -1, "'seed' = -1: .*greater than or equal to 0"),
    ):
        with pytest.raises(papermill.PapermillExecutionError, match=words):
            papermill.execute_notebook(
                ROOT / "notebooks" / "experiment.ipynb", tmp_path / "out.ipynb", {name: value, "run_folder": str(tmp_path / "run")},
                start_timeout=600, progress_bar=False,
            )  # fmt: skip
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("digits", {}),
        ("fashion-mnist-16", {"preset": "fashion16"}),
        ("patches-16", read_parameters(STUDIES / "patches" / "improved-x0.yaml")),
    ],
)
def test_shipped_files_are_what_their_record_says(name: str, parameters: dict[str, Any]) -> None:
    folder = shipped_folder() / name
    made = json.loads((folder / "made.json").read_text())
    of_students = folder / "students.json"
    students = json.loads(of_students.read_text()) if of_students.exists() else {"sha256": {}}
    named = {*made["sha256"], *students["sha256"], *(f"{name}-prior" for name in students["sha256"])}
    assert {file.stem for file in folder.glob("*.safetensors")} <= named | {"second-features"}
    for part, digest in (made["sha256"] | students["sha256"]).items():
        assert sha256(folder / f"{part}.safetensors") == digest
    teacher, info = load_model(folder / "teacher.safetensors")
    settings = made["settings"]
    assert list(teacher.network.shape.widths) == settings["widths"]
    assert (info["data"], info["seed"]) == (name, settings["seed"])
    now = make_settings(**parameters).model_dump(mode="json")
    of_the_teacher = ["data", "image_size", "widths", "blocks", "attention", "heads", "batch_size", "class_conditional", "seed"]
    for field in of_the_teacher + [field for field in now if field.startswith("teacher_") and "sampl" not in field]:
        assert now[field] == settings.get(field), f"{field} has changed since the teacher was shipped"
    assert all(file.stat().st_size < 4 * 2**20 for file in folder.iterdir())


def test_the_reference_images_have_the_shipped_statistics() -> None:
    network, digest = load_feature_network(shipped_folder() / "digits" / "features.safetensors")
    statistics, info = load_tensors(shipped_folder() / "digits" / "reference.safetensors")
    features = torch.from_numpy(extract(network, load_images("digits").reference.images))
    assert info["features_sha256"] == digest
    torch.testing.assert_close(features.mean(0), statistics["mean"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(features.T.cov(), statistics["covariance"], rtol=1e-3, atol=1e-3)


def test_no_registry_host_or_pickle_is_named_in_the_project() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    hosts = re.compile("|".join(["pypi" + r"\.org", "python" + "hosted", "registry" + r"\.npmjs", "conda" + r"\.anaconda"]))
    for name in listed:
        if (ROOT / name).suffix in {".py", ".md", ".toml", ".yml", ".txt", ".ipynb", ""} and (ROOT / name).is_file():
            assert not hosts.search((ROOT / name).read_text()), f"{name} names a package registry's host"


def test_every_make_target_of_the_readme_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"make ([a-z-]+)", (ROOT / "README.md").read_text()))
    assert {"experiment", "test"} <= named <= targets


def test_the_guarantees_are_those_of_the_tallies() -> None:
    table = pd.read_csv(ROOT / "data" / "results" / "reliability.csv")
    assert not table.duplicated(["part", "case", "outcome"]).any()
    faults, fuzz, memory = (table[table["part"] == part] for part in ("faults", "fuzz", "memory"))
    kills = faults[~faults["outcome"].str.startswith("(")]  # in parentheses: where they fell
    assert set(kills["outcome"]) == {"same bytes"}
    assert len(kills) == 6
    assert (kills["count"] >= 30).all()
    assert set(fuzz["outcome"]) == {"value", "SferdError"}
    assert fuzz["count"].sum() >= 100_000
    assert memory["case"].nunique() == 5
    for _, peaks in memory.groupby("case"):
        assert peaks["count"].max() < 1.05 * peaks["count"].min()
    words = " ".join((ROOT / "README.md").read_text().split())
    assert f"(tried with {kills['count'].sum()} kills)" in words
    assert f"(tried with {fuzz['count'].sum():,} inputs)" in words
