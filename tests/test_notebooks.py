"""Every notebook runs with other parameters than its own, and what it asserts holds there too."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import nbformat
import papermill
import pytest
from papermill.inspection import inspect_notebook

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
# Another seed, unless said here.
OTHER: dict[str, dict[str, Any]] = {
    "10_controls": {"judge": "fd_second"},
    "11_evidence": {"judge": "kid"},
    "experiment": {"seed": 2, "guidance_form": "x0", "methods": ["cd"], "prior": "diffusion", "sgp_target": "data"},
}
# These train for minutes: make test runs them as committed only, make test-long with other parameters too.
LONG = "02_a_teacher", "05_progressive_distillation", "12_your_own"


def params() -> list[Any]:
    aside = pytest.mark.skipif("SFERD_LAB_LONG" not in os.environ, reason="takes minutes; make test-long runs it")
    return [pytest.param(path, id=path.stem, marks=aside if path.stem in LONG else ()) for path in NOTEBOOKS]


@pytest.mark.parametrize("path", params())
def test_it_runs_with_other_parameters(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFERD_LAB_TINY", "1")
    monkeypatch.setenv("SFERD_LAB_WIDGETS", "0")
    monkeypatch.setenv("SFERD_LAB_RUNS", str(tmp_path))
    parameters = OTHER.get(path.stem, {"seed": 2})
    defaults = inspect_notebook(str(path))
    for name, value in parameters.items():
        assert name in defaults, f"{path.stem} has no parameter {name}; papermill would only warn"
        assert defaults[name]["default"] != repr(value)
    papermill.execute_notebook(path, tmp_path / "out.ipynb", parameters, cwd=path.parent, start_timeout=600, progress_bar=False)
    cells = nbformat.read(tmp_path / "out.ipynb", as_version=4).cells
    (injected,) = [cell for cell in cells if "injected-parameters" in cell.metadata.get("tags", [])]
    assert all(name in injected.source for name in parameters)
