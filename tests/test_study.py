"""The instruments on small runs: what the tables hold, and that they follow from the run's own models."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from sferd_lab.analysis import study
from sferd_lab.analysis.bias_variance import decompose, predict
from sferd_lab.analysis.ensemble import load_members, train_members
from sferd_lab.analysis.study import LEVELS, bias_variance_study, cases, mechanism_study, noised, spatial_study
from sferd_lab.artifacts import shipped_folder
from sferd_lab.config import make_settings
from sferd_lab.data import load_images
from sferd_lab.diffusion import HALF_PI
from sferd_lab.errors import SferdError
from sferd_lab.experiment import Run
from sferd_lab.files import read_json
from sferd_lab.metrics import extract, frechet_distance, load_feature_network

SEEDS = (1, 2, 3)
POINTS = 70  # more than the feature network has features


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All studies on trainings of a few steps: where their tables and runs are."""
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SFERD_LAB_TINY", "1")
        run = Run(make_settings("digits", run_folder=str(folder / "run"), guided=(False,)), progress=False)
        for method in ("pd", "cd"):
            run.students(method, guided=False)
            run.semantic_students(method, guided=False)
        train_members("digits", folder / "ensemble", teachers=3, students=2, methods=("cd",), pd_lr=1e-2)
        (folder / "digits").mkdir()
        shutil.copy(study.shipped_folder() / "digits" / "features.safetensors", folder / "digits")
        patch.setattr(study, "shipped_folder", lambda: folder)
        spatial_study(folder / "run", "small", n=12)
        bias_variance_study(folder / "ensemble", "small", n=10)
        for seed in SEEDS:
            run = Run(make_settings("digits", seed=seed, run_folder=str(folder / "runs" / f"small-seed{seed}"), pd_lr=0.05), progress=False)
            run.students("pd", guided=False)
            run.semantic_students("pd", guided=False)
        mechanism_study(folder / "runs", "small", SEEDS, n=POINTS)
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
    spatial, decomposition, mechanism = (
        read_json(results / "results" / kind / "small.json") for kind in ("spatial", "bias-variance", "mechanism")
    )
    assert (spatial["n"], decomposition["n"]) == (12, 10)
    assert "study spatial" in spatial["command"]
    assert spatial["run"]["settings"]["preset"] == "digits"
    assert len(decomposition["runs"]) == 9
    assert [run["settings"]["seed"] for run in mechanism["runs"].values()] == list(SEEDS)
    assert mechanism["command"].endswith("small seeds=[1,2,3] n=70 seed=1")


@pytest.fixture(scope="module")
def mechanism(results: Path) -> pd.DataFrame:
    return pd.read_csv(results / "results" / "mechanism" / "small.csv").set_index(["model", "term", "where"])


def test_the_mechanism_is_that_of_the_one_step_students_of_all_seeds(results: Path, mechanism: pd.DataFrame) -> None:
    assert set(mechanism.index.get_level_values("model")) == {"pd-1", "pd-sgp-1"}
    images = load_images("digits").reference.images[:POINTS]
    x = noised(images, 1.0, seed=1)
    network, _ = load_feature_network(shipped_folder() / "digits" / "features.safetensors")
    for seed in SEEDS:
        found = {case.name: case for case in cases(results / "runs" / f"small-seed{seed}", images)}
        for name in ("pd-1", "pd-sgp-1"):
            case = found[name]
            goal = predict(case.source, x, HALF_PI, study.TEACHER_STEPS, **case.condition)
            made = predict(case.model, x, HALF_PI, 1, **case.condition)
            error = (made - goal).double().square()[:, 0].numpy()
            halfway = (goal + x) / 2**0.5
            attended = found["teacher"].model(halfway, HALF_PI / 2, ["decoder.1.0"]).attention["decoder.1.0"].received().detach().numpy()
            mask = attended.repeat(2, axis=1).repeat(2, axis=2) > 1
            known = mechanism.loc[(name, "fd", "image")].set_index("seed")["value"][seed]
            assert known == pytest.approx(frechet_distance(extract(network, made), extract(network, goal)), rel=1e-4)
            for where, part in {"image": error, "inside": error[mask], "outside": error[~mask]}.items():
                told = mechanism.loc[(name, "error", where)].set_index("seed")["value"]
                assert told[seed] == pytest.approx(part.mean(), rel=1e-4)


@pytest.mark.parametrize("where", ["image", "inside", "outside"])
def test_bias_and_variance_add_up_to_the_mean_error(mechanism: pd.DataFrame, where: str) -> None:
    parts = mechanism.loc[[("pd-1", "bias", where), ("pd-1", "variance", where)], "value"]
    assert parts.sum() == pytest.approx(mechanism.loc[("pd-1", "error", where), "value"].mean(), rel=1e-4)
    assert (parts > 0).all()  # trainings of so large a learning rate differ


def test_bias_and_variance_of_known_differences_and_their_standard_errors() -> None:
    generator = torch.Generator().manual_seed(0)
    count, points, spread = 4, 20_000, 0.7
    common = torch.full((points, 1, 2, 2), 0.5, dtype=torch.float64)
    common[..., 1] = 0.1
    differences = common + spread * torch.randn(count, points, 1, 2, 2, generator=generator, dtype=torch.float64)
    left = np.zeros((points, 2, 2))
    left[..., 0] = 1
    found = {line[1:3]: line[-2:] for line in study._bias_and_variance("model", differences, left)}
    for where, bias in (("image", (0.25 + 0.01) / 2), ("inside", 0.25), ("outside", 0.01)):
        assert found["bias", where][0] == pytest.approx(bias, abs=0.01)  # the naive mean of d, squared, is 0.12 larger
        assert found["variance", where][0] == pytest.approx(spread**2, abs=0.01)
    one = np.array([float(differences[[j for j in range(count) if j != k]].var(0).mean()) for k in range(count)])
    assert found["variance", "image"][1] == pytest.approx(np.sqrt((count - 1) * one.var()), rel=1e-9)
    assert all(np.isnan(line[-1]) for line in study._bias_and_variance("model", differences[:2], left))


def test_detail_is_the_students_fine_power_over_its_teachers(results: Path, mechanism: pd.DataFrame) -> None:
    detail = mechanism.loc[("pd-1", "detail", "image")].set_index("seed")["value"]
    images = load_images("digits").reference.images[:POINTS]
    case = {case.name: case for case in cases(results / "runs" / "small-seed2", images)}["pd-1"]
    x = noised(images, 1.0, seed=1)
    powers = []
    for made in (predict(case.model, x, HALF_PI, 1), predict(case.source, x, HALF_PI, study.TEACHER_STEPS)):
        power = torch.fft.fft2(made.double(), norm="forward").abs().square().mean((0, 1)).numpy()
        radius = np.hypot(np.fft.fftfreq(8, 1 / 8)[:, None], np.fft.fftfreq(8, 1 / 8)[None])
        powers.append(power[np.rint(radius) > 3].sum())  # the highest ring is 6
    assert detail[2] == pytest.approx(powers[0] / powers[1], rel=1e-4)


def test_a_shorter_chain_without_consistency_students_is_decomposed_as_far_as_it_goes(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SFERD_LAB_TINY", "1")
    monkeypatch.setattr(study, "shipped_folder", lambda: results)
    train_members("digits", tmp_path / "short", teachers=2, students=2, methods=("pd",), pd_start_steps=4, pd_stage_steps=(1, 1))
    bias_variance_study(tmp_path / "short", "short", n=2)
    table = pd.read_csv(results / "results" / "bias-variance" / "short.csv")
    assert set(zip(table["method"], table["steps"], strict=True)) == {("teacher", 1), ("pd", 2), ("pd", 1)}


def test_one_seed_that_is_no_list_is_refused_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert study.main(["mechanism", "runs", "small", "seeds=1"]) == 2
    assert "seeds = 1; allowed: a list, such as [1,2,3]" in capsys.readouterr().err


@pytest.mark.parametrize("seeds", [(), (1,), (1, 1)])
def test_a_mechanism_needs_two_different_seeds(tmp_path: Path, seeds: tuple[int, ...]) -> None:
    with pytest.raises(SferdError, match="allowed: two or more, each once"):
        mechanism_study(tmp_path, "small", seeds)


def test_a_mechanism_refuses_runs_of_which_one_lacks_a_student(results: Path) -> None:
    weights = results / "runs" / "small-seed2" / "weights" / "pd-sgp-1.safetensors"
    away = weights.with_suffix(".away")
    weights.rename(away)
    try:
        with pytest.raises(SferdError, match=r"2 of 3 runs .* have weights of 'pd-sgp-1'"):
            mechanism_study(results / "runs", "small", SEEDS, n=POINTS)
    finally:
        away.rename(weights)
