"""The instruments on small runs: what the tables hold, and that they follow from the run's own models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from sferd_lab.analysis import study
from sferd_lab.analysis.bias_variance import decompose, predict
from sferd_lab.analysis.ensemble import load_members, train_members
from sferd_lab.analysis.study import LEVELS, bias_variance_study, cases, noised, spatial_study
from sferd_lab.config import make_settings
from sferd_lab.data import load_images
from sferd_lab.diffusion import HALF_PI
from sferd_lab.experiment import Run
from sferd_lab.files import read_json


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both studies on trainings of a few steps: where their tables and runs are."""
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SFERD_LAB_TINY", "1")
        run = Run(make_settings("digits", run_folder=str(folder / "run"), guided=(False,)), progress=False)
        for method in ("pd", "cd"):
            run.students(method, guided=False)
            run.semantic_students(method, guided=False)
        train_members("digits", folder / "ensemble", teachers=3, students=2, methods=("cd",), pd_lr=1e-2)
        patch.setattr(study, "shipped_folder", lambda: folder)
        spatial_study(folder / "run", "small", n=12)
        bias_variance_study(folder / "ensemble", "small", n=10)
    return folder


def test_every_model_of_a_run_is_a_case_at_the_levels_it_knows(results: Path) -> None:
    found = {case.name: case for case in cases(results / "run", load_images("digits").reference.images[:12])}
    assert list(found) == ["teacher", "cd", "pd-4", "pd-2", "pd-1", "pd-sgp-1", "cd-sgp"]
    assert found["cd"].levels == LEVELS
    assert found["pd-2"].levels == (1.0,)
    assert found["pd-2"].steps == 2
    assert found["pd-sgp-1"].condition["z"].shape == (12, 8)
    assert found["pd-sgp-1"].source is not found["pd-1"].source


def test_noise_of_an_image_is_the_same_at_every_level() -> None:
    images = load_images("digits").reference.images[:5]
    at = {level: noised(images, level, seed=3) for level in (0.25, 1.0)}
    torch.testing.assert_close(at[0.25], np.cos(0.25 * HALF_PI) * images + np.sin(0.25 * HALF_PI) * at[1.0])


def test_the_spatial_tables_hold_each_model_error_level_and_layer(results: Path) -> None:
    attention = pd.read_csv(results / "results" / "spatial" / "small-attention.csv")
    errors = attention.groupby("model")["error"].unique().map(sorted).to_dict()
    assert errors["teacher"] == ["fitting", "total"]
    assert all(errors[name] == ["distillation", "total"] for name in ("cd", "pd-1", "pd-sgp-1"))
    assert set(attention["layer"]) == {"encoder.0.0", "encoder.1.0", "middle", "decoder.1.0", "decoder.0.0"}
    assert sorted(attention[attention["model"] == "cd"]["level"].unique()) == list(LEVELS)
    shares = pd.read_csv(results / "results" / "spatial" / "small-shares.csv")
    assert len(shares) == len(attention[["model", "error", "level", "layer"]].drop_duplicates())
    assert shares["area"].between(0, 1).all()


def test_the_spectrum_adds_up_to_the_mean_of_the_error_map(results: Path) -> None:
    spectrum = pd.read_csv(results / "results" / "spatial" / "small-spectrum.csv")
    maps = pd.read_csv(results / "results" / "spatial" / "small-maps.csv")
    for model, kind in (("teacher", "fitting"), ("cd", "distillation"), ("cd", "total")):
        power = spectrum[(spectrum["model"] == model) & (spectrum["error"] == kind) & (spectrum["level"] == 0.5)]["power"].sum()
        pixels = maps[(maps["model"] == model) & (maps["map"] == f"{kind} error") & (maps["level"] == 0.5)]["value"]
        assert len(pixels) == 64
        assert power == pytest.approx(pixels.mean(), rel=1e-3)  # five digits are kept


def test_the_decomposition_is_that_of_the_loaded_members(results: Path) -> None:
    table = pd.read_csv(results / "results" / "bias-variance" / "small.csv")
    data = load_images("digits")
    teachers, students = load_members(results / "ensemble", "cd", 1)
    x = noised(data.reference.images[:10], 0.75, seed=1)
    walks = predict(teachers, x, 0.75 * HALF_PI, steps=study.TEACHER_STEPS)
    expected = decompose(predict(students, x, 0.75 * HALF_PI), walks, x0=data.reference.images[:10])
    rows = table[(table["images"] == "held-out") & (table["method"] == "cd") & (table["level"] == 0.75)].set_index("term")
    for term in expected.maps:
        assert rows.loc[term, "value"] == pytest.approx(expected[term], rel=1e-4, abs=1e-12)
        assert rows.loc[term, "se"] == pytest.approx(expected.se[term], rel=1e-3, abs=1e-12)


def test_terms_of_the_decomposition_add_up_and_are_named_by_what_is_known(results: Path) -> None:
    table = pd.read_csv(results / "results" / "bias-variance" / "small.csv")
    for (images, method, _), part in table.groupby(["images", "method", "level"]):
        values = part.set_index("term")["value"]
        assert values.drop("total").sum() == pytest.approx(values["total"], rel=1e-3)
        assert ("irreducible_and_teacher_bias" in values) == (images == "held-out")
        assert ("irreducible" in values) == (images == "training" and method == "teacher")
    copies = table[table["method"] == "teacher"].set_index("term")["value"]
    assert copies["student_variance"].abs().max() < 1e-9  # the teacher is its own perfect student
    assert copies["distillation_bias"].abs().max() < 1e-9


def test_the_settings_of_a_study_are_beside_its_tables(results: Path) -> None:
    spatial, decomposition = (read_json(results / "results" / kind / "small.json") for kind in ("spatial", "bias-variance"))
    assert (spatial["n"], decomposition["n"]) == (12, 10)
    assert "study spatial" in spatial["command"]
    assert spatial["run"]["settings"]["preset"] == "digits"
    assert len(decomposition["runs"]) == 9
