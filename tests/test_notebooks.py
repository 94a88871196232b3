"""Every notebook runs with other parameters than its own, and what it asserts holds there too."""

from __future__ import annotations

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
# Those that train for half a minute or more have a command of their own: make test-slow.
SLOW = ("02_a_teacher", "03_samplers", "04_bias_variance", "05_progressive_distillation", "06_consistency_distillation", "12_your_own")
assert set(SLOW) <= {path.stem for path in NOTEBOOKS}
CASES = [pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if path.stem in SLOW else []) for path in NOTEBOOKS]


@pytest.mark.parametrize("path", CASES)
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
