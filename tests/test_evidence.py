"""A claim of the evidence notebooks hangs on the rows it is about: with these replaced by their control's, its cell fails.

The notebooks' code runs here without their figures, on a copy of ``data/results`` in which one row's numbers are another's.
"""

from __future__ import annotations

import ast
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import nbformat
import pandas as pd
import pytest

from sferd_lab.experiment import read_table

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "data" / "results"
NOTEBOOKS = {
    name: [cell for cell in nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4).cells if cell.cell_type == "code"]
    for name in ("10_controls", "11_evidence")
}


@dataclass(frozen=True)
class Claim:
    """The cell ``cell`` must fail when the numbers of ``rows`` become those of ``control`` (same seed and metric); both are queries."""

    notebook: str
    cell: str
    rows: str
    control: str
    table: str = "digits/metrics.csv"
    other: str = ""  # the control's table, if another
    by: tuple[str, ...] = ("seed", "metric")

    def __str__(self) -> str:
        return f"{self.notebook} {self.cell} {self.rows}"


PD1 = "method == 'pd' and not guidance and sgp == '' and steps == 1"
GUIDED1 = "method == 'pd' and guidance and sgp == '' and steps == 1"
BOTH1 = "method == 'pd' and guidance and sgp != '' and z == 'prior' and steps == 1"
CD1 = "method == 'cd' and steps == 1"
TEACHER = "method == 'teacher' and not guidance and sgp == ''"


def pair(z: str = "prior", method: str = "pd", steps: str = "steps == 1", more: str = "") -> str:
    return f"method == '{method}' and not guidance and sgp != '' and z == '{z}' and {steps}" + (f" and {more}" if more else "")


def with_both(name: str) -> str:
    return f"{BOTH1} and {study(name)}"


def study(name: str) -> str:
    return f"run.str.startswith('{name}-seed')"


def weighted(form: str, weight: float, threshold: float = 1.0) -> str:
    return f"guidance and steps == 8 and {study(f'guidance-{form}-{weight}-{threshold}')}"


CONTROLS, FASHION, KERNEL = "digits-controls/metrics.csv", "fashion16/metrics.csv", "fashion16-kernel/metrics.csv"
ERROR, MECHANISM, PARTS = "reconstruction_mse", "mechanism/digits.csv", ("term", "where", "seed")
ORDER, ONE_CODE = "fashion16-paper/metrics.csv", "method == 'pd' and steps == 1"
LONGEST, TUNED = "fashion16-longest/metrics.csv", "run.str.startswith('tuning-pd_start_steps-16-')"
MASKS, GARMENTS = "fashion16-mask-x0/metrics.csv", "mechanism/fashion16.csv"
CLAIMS = [
    Claim("10_controls", "157e00e4", f"{GUIDED1} and {study('mask-inverse')}", PD1, CONTROLS, "digits/metrics.csv"),
    Claim("10_controls", "157e00e4", f"{GUIDED1} and {study('mask-full')}", GUIDED1, CONTROLS, "digits/metrics.csv"),
    Claim("10_controls", "157e00e4", GUIDED1, pair()),
    Claim("10_controls", "157e00e4", f"{GUIDED1} and {study('guidance-x0')}", PD1, CONTROLS, "digits/metrics.csv"),
    Claim("10_controls", "157e00e4", f"{GUIDED1} and {study('mask-x0-random')}", f"{GUIDED1} and {study('guidance-x0')}", CONTROLS),
    Claim("10_controls", "157e00e4", f"{GUIDED1} and {study('mask-x0-inverse')}", f"{GUIDED1} and {study('guidance-x0')}", CONTROLS),
    Claim("10_controls", "157e00e4", f"{GUIDED1} and {study('mask-x0-full')}", f"{GUIDED1} and {study('mask-x0-random')}", CONTROLS),
    Claim("10_controls", "b19f7e55", f"{PD1} and {study('contrast-1.1')}", PD1, CONTROLS, "digits/metrics.csv"),
    Claim("10_controls", "b19f7e55", f"{GUIDED1} and {study('guidance-x0')}", GUIDED1, CONTROLS, "digits/metrics.csv"),
    Claim("10_controls", "4480af72", f"{PD1} and {study('contrast-1.1')}", PD1, CONTROLS, "digits/metrics.csv"),
    Claim("10_controls", "0b4e4069", weighted("eps", -0.7), weighted("eps", 0.1), CONTROLS),
    Claim("10_controls", "0b4e4069", weighted("x0", 1.0), weighted("x0", -0.7), CONTROLS),
    Claim("10_controls", "0b4e4069", weighted("eps", 0.3, 0.8), weighted("eps", 0.3, 1.2), CONTROLS),
    Claim("10_controls", "4480af72", pair(more=study("improved")), PD1, CONTROLS, "digits/metrics.csv"),
    Claim("10_controls", "4480af72", pair(more=study("blind")), pair("encoder", more=study("chain")), CONTROLS),
    Claim("10_controls", "4480af72", pair("mean", more=study("chain")), pair(more=study("chain")), CONTROLS),
    Claim(
        "10_controls",
        "fc464014",
        f"metric == '{ERROR}_encoder'",
        f"metric == '{ERROR}_shuffled'",
        CONTROLS,
        by=("run", "method", "guidance", "steps"),
    ),
    Claim("10_controls", "f195a710", pair("encoder", more=study("paper")), pair("encoder", more=study("chain")), CONTROLS),
    Claim("10_controls", "f195a710", pair("encoder", more=study("data")), PD1, CONTROLS, "digits/metrics.csv"),
    Claim("10_controls", "f195a710", pair("prior", "cd", more=study("paper")), pair("prior", more=study("improved")), CONTROLS),
    Claim("10_controls", "f195a710", with_both("paper-x0"), with_both("paper"), CONTROLS),
    Claim("10_controls", "639b20f8", pair(more=study("improved")), f"{PD1} and {study('long')}", CONTROLS),
    Claim("10_controls", "639b20f8", f"{PD1} and {study('long')}", PD1, CONTROLS, "digits/metrics.csv"),
    Claim(
        "10_controls", "cca27088", "model == 'pd-1' and term == 'bias'", "model == 'pd-1' and term == 'variance'", MECHANISM, by=("where",)
    ),
    Claim("10_controls", "cca27088", "model == 'pd-sgp-1'", "model == 'pd-1'", MECHANISM, by=PARTS),
    Claim("10_controls", "cca27088", "model == 'pd-guided-1'", "model == 'pd-1'", MECHANISM, by=PARTS),
    Claim("10_controls", "cca27088", "model == 'pd-guided-1'", "model == 'pd-1'", "mechanism/digits-mask-full.csv", MECHANISM, PARTS),
    Claim("10_controls", "cca27088", "model == 'pd-guided-1'", "model == 'pd-1'", "mechanism/digits-guidance-x0.csv", MECHANISM, PARTS),
    Claim("10_controls", "cca27088", "where == 'inside'", "where == 'outside'", MECHANISM, by=("term", "model", "seed")),
    Claim("11_evidence", "evidence-05", "method == 'blurred real'", f"{TEACHER} and steps == 64"),
    Claim("11_evidence", "evidence-05", "method == 'copies of training images'", f"{TEACHER} and steps == 64", FASHION),
    Claim("11_evidence", "evidence-08", f"{TEACHER} and steps == 8", f"{TEACHER} and steps == 4"),
    Claim("11_evidence", "evidence-08", f"{TEACHER} and steps == 16", f"{TEACHER} and steps == 8 and sampler == 'ddim'", FASHION),
    Claim("11_evidence", "b1a40006", pair(more=study("improved")), PD1, CONTROLS, "digits/metrics.csv"),
    Claim("11_evidence", "b1a40006", GUIDED1, pair()),
    Claim("11_evidence", "b1a40006", f"{GUIDED1} and {study('guidance-x0')}", PD1, CONTROLS, "digits/metrics.csv"),
    Claim("11_evidence", "b1a40006", pair("prior", more=study("paper")), pair("encoder", more=study("chain")), CONTROLS),
    Claim(
        "11_evidence", "b1a40006", pair(method="cd", more=study("improved")), f"{TEACHER} and steps == 64", CONTROLS, "digits/metrics.csv"
    ),
    Claim("11_evidence", "b1a40006", with_both("paper-x0"), with_both("paper"), CONTROLS),
    Claim("11_evidence", "b1a40006", with_both("improved-x0"), with_both("improved"), CONTROLS),
    Claim("11_evidence", "b1a40006", with_both("improved"), pair(more=study("improved")), CONTROLS),
    Claim("11_evidence", "b1a40006", f"{PD1} and {study('long')}", pair(more=study("improved")), CONTROLS),
    Claim("11_evidence", "b1a40006", f"{PD1} and {TUNED}", f"{PD1} and {study('long')}", "digits-tuning/metrics.csv", CONTROLS),
    Claim("11_evidence", "b1a40006", f"{TEACHER} and steps == 64", PD1),
    Claim("11_evidence", "evidence-21", pair(), PD1),
    Claim("11_evidence", "evidence-23", PD1, f"{TEACHER} and steps == 64", FASHION),
    Claim("11_evidence", "2e7b38ae", pair(), PD1, FASHION),
    Claim("11_evidence", "2e7b38ae", GUIDED1, PD1, FASHION),
    Claim("11_evidence", "c2862cb1", pair("encoder", steps="steps == 2"), pair(steps="steps == 2"), FASHION),
    Claim("11_evidence", "c99dc10c", pair(), pair(), KERNEL, FASHION),
    Claim("11_evidence", "c388d718", pair("encoder"), PD1, FASHION),
    Claim("11_evidence", "b1a40009", pair(), PD1, "fashion16-improved/metrics.csv", FASHION),
    Claim("11_evidence", "b1a40009", pair(), pair(), "fashion16-improved-mixture/metrics.csv", FASHION),
    Claim("11_evidence", "b1a40009", pair(), pair(), "fashion16-improved/metrics.csv", "fashion16-improved-mixture/metrics.csv"),
    Claim("11_evidence", "b1a40009", BOTH1, pair(), "fashion16-improved-x0/metrics.csv", "fashion16-improved/metrics.csv"),
    Claim("11_evidence", "b1a40009", CD1, PD1, FASHION),
    Claim("11_evidence", "b1a40009", CD1, CD1, "fashion16-improved-x0/metrics.csv", FASHION),
    Claim("11_evidence", "b1a40009", pair(method="cd"), CD1, "fashion16-improved/metrics.csv", FASHION),
    Claim("11_evidence", "c3e07a53", f"{CD1[:-1]}4", f"{CD1[:-1]}4", "fashion16-guidance-x0/metrics.csv", FASHION),
    Claim("11_evidence", "c3e07a52", BOTH1, pair(), "fashion16-improved-x0/metrics.csv", "fashion16-improved/metrics.csv"),
    Claim("11_evidence", "c3e07a52", GUIDED1, PD1, "fashion16-guidance-x0/metrics.csv", FASHION),
    Claim("11_evidence", "c3e07a53", CD1, CD1, "fashion16-improved-x0/metrics.csv", FASHION),
    Claim("11_evidence", "c3e07a53", pair(method="cd"), CD1, "fashion16-improved/metrics.csv", FASHION),
    Claim(
        *("11_evidence", "c3e07a53", f"{CD1[:-1]}4", pair(method="cd", steps="steps == 4")),
        *("fashion16-improved-x0/metrics.csv", "fashion16-improved/metrics.csv"),
    ),
    Claim("11_evidence", "c3e07a52", "sgp == ''", PD1, "fashion16-contrast/metrics.csv", FASHION),
    Claim("11_evidence", "c3e07a52", "sgp != ''", pair(), "fashion16-contrast/metrics.csv", "fashion16-improved/metrics.csv"),
    Claim(
        "11_evidence", "c3e07a55", f"{GUIDED1} and {study('fashion16-mask-x0-full')}", GUIDED1, MASKS, "fashion16-guidance-x0/metrics.csv"
    ),
    Claim("11_evidence", "c3e07a55", f"{GUIDED1} and {study('fashion16-mask-x0-random')}", PD1, MASKS, FASHION),
    Claim("11_evidence", "c3e07a5b", f"not guidance and z == 'prior' and {ONE_CODE}", GUIDED1, ORDER, "fashion16-guidance-x0/metrics.csv"),
    Claim("11_evidence", "c3e07a5b", f"guidance and z == 'prior' and {ONE_CODE}", PD1, ORDER, FASHION),
    Claim("11_evidence", "c3e07a5b", f"guidance and z == 'mean' and {ONE_CODE}", PD1, ORDER, FASHION),
    Claim("11_evidence", "c3e07a57", "model == 'pd-guided-sgp-1'", "model == 'pd-guided-1'", GARMENTS, by=PARTS),
    Claim("11_evidence", "c3e07a57", "model == 'pd-guided-1'", "model == 'pd-1'", GARMENTS, by=PARTS),
    Claim("11_evidence", "c3e07a57", "where == 'inside'", "where == 'outside'", GARMENTS, by=("term", "model", "seed")),
    Claim("11_evidence", "2c6d200b", pair(), pair(), "fashion16-improved/metrics.csv", FASHION),
    Claim("11_evidence", "2c6d200b", pair(), f"{PD1[:-1]}2", FASHION),
    Claim("11_evidence", "d5b1f5ae", PD1, pair(), "fashion16-long/metrics.csv", KERNEL),
    Claim("11_evidence", "d5b1f5ae", PD1, PD1, "fashion16-long/metrics.csv", FASHION),
    Claim("11_evidence", "fair-01", PD1, PD1, LONGEST, FASHION),
    Claim("11_evidence", "fair-01", CD1, CD1, LONGEST, FASHION),
    Claim("11_evidence", "fair-01", BOTH1, PD1, "fashion16-improved-x0/metrics.csv", LONGEST),
    Claim("11_evidence", "fair-01", f"{CD1} and guidance and z == 'prior'", CD1, "fashion16-improved-x0/metrics.csv", LONGEST),
    Claim("11_evidence", "fair-01", pair(), pair(), "fashion16-blind/metrics.csv", "fashion16-improved/metrics.csv"),
    Claim("11_evidence", "evidence-recall-code", pair(), PD1, FASHION),
    Claim("11_evidence", "native-01", BOTH1, PD1, "fashion28/metrics.csv"),
    Claim("11_evidence", "native-01", GUIDED1, PD1, "fashion28/metrics.csv"),
    Claim("11_evidence", "native-01", f"{TEACHER} and steps == 64", BOTH1, "fashion28/metrics.csv"),
    Claim("11_evidence", "native-01", BOTH1.replace("steps == 1", "steps == 2"), f"{PD1[:-1]}2", "fashion28/metrics.csv"),
    Claim("11_evidence", "patches-01", BOTH1, PD1, "patches/metrics.csv"),
    Claim("11_evidence", "patches-01", BOTH1, f"{TEACHER} and steps == 64", "patches/metrics.csv"),
    Claim("11_evidence", "patches-01", GUIDED1, BOTH1, "patches/metrics.csv"),
    Claim("11_evidence", "patches-01", pair(), PD1, "patches/metrics.csv"),
    Claim("11_evidence", "patches-01", "method == 'teacher' and sgp != '' and steps == 1", PD1, "patches/metrics.csv"),
    Claim("11_evidence", "patches-01", "method == 'blurred real'", f"{TEACHER} and steps == 64", "patches/metrics.csv"),
    Claim("11_evidence", "patches-01", "method == 'copies of training images'", BOTH1.replace("prior", "encoder"), "patches/metrics.csv"),
]


def with_control(claim: Claim) -> pd.DataFrame:
    """The claim's table with the control's numbers in its rows; a metric that the control lacks keeps its number."""
    frame, by = read_table(RESULTS / claim.table), list(claim.by)
    rows, control = frame.query(claim.rows), read_table(RESULTS / (claim.other or claim.table)).query(claim.control)
    assert not control.duplicated(by).any(), "the control has several numbers for one of the rows"
    found = rows[by].merge(control[[*by, "value"]], on=by, how="left").set_index(rows.index)["value"].fillna(rows["value"])
    assert (found != rows["value"]).any(), "the control's numbers are the rows' own"
    frame.loc[rows.index, "value"] = found
    return frame


class WithoutAssertions(ast.NodeTransformer):
    def visit_Assert(self, node: ast.Assert) -> ast.Pass:
        return ast.copy_location(ast.Pass(), node)


def run(name: str, data: Path, monkeypatch: pytest.MonkeyPatch, until: str | None = None) -> None:
    """Run a notebook's code, without figures, images and exercises, on the tables under ``data``; of one cell alone what it asserts."""
    monkeypatch.setattr("sferd_lab.artifacts.shipped_folder", lambda: data)
    aside = {part: MagicMock() for part in ("plots", "widgets", "exercises", "load", "sns", "display")}
    space: dict[str, Any] = {}
    for cell in NOTEBOOKS[name]:
        tree = ast.parse(cell.source)
        if until not in (None, cell["id"]):
            tree = WithoutAssertions().visit(tree)
        exec(compile(tree, cell["id"], "exec"), space)
        space |= aside
        if cell["id"] == until:
            return


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_every_cell_that_asserts_holds_and_has_a_control(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run(name, ROOT / "data", monkeypatch)
    asserting = {cell["id"] for cell in NOTEBOOKS[name] if any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(cell.source)))}
    assert asserting == {claim.cell for claim in CLAIMS if claim.notebook == name}


@pytest.mark.parametrize("claim", CLAIMS, ids=str)
def test_a_claim_fails_on_its_control(claim: Claim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(RESULTS, tmp_path / "results", ignore=shutil.ignore_patterns("*.png"))
    with_control(claim).to_csv(tmp_path / "results" / claim.table, index=False)
    with pytest.raises(AssertionError):
        run(claim.notebook, tmp_path, monkeypatch, claim.cell)
