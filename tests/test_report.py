"""The whole experiment, once through, and the report on what it leaves; its parts are tested in test_experiment.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from sferd_lab import experiment, make_settings, metrics, report
from sferd_lab.artifacts import shipped_folder
from sferd_lab.config import Settings
from sferd_lab.errors import SferdError
from sferd_lab.experiment import Row, Run, read_table
from sferd_lab.report import by_seed, effects, headline, known_bad_verdicts, ratio, ratios, summary, training_tflop, verdict


@pytest.fixture(scope="module", autouse=True)
def _tiny() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SFERD_LAB_TINY", "1")
        # Two splits: the floor's own precision is test_metrics' business.
        patch.setattr(metrics.Scorer.__init__, "__defaults__", (5, 2, 0))
        yield


def settings(folder: Path, **given: Any) -> Settings:
    return make_settings("digits", run_folder=str(folder), **{"widths": [8, 8], "retrain": True, **given})


def whole(run: Run) -> Run:
    for rows in (run.evaluate_teacher(), run.evaluate_students(), run.evaluate_semantic()):
        list(rows)
    run.evaluate_known_bad()
    return run


def weights(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted((folder / "weights").iterdir())}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, _tiny: None) -> Run:
    return whole(Run(settings(tmp_path_factory.mktemp("run") / "a"), progress=False))


def test_a_run_leaves_settings_weights_and_a_number_a_row(finished: Run) -> None:
    assert {"config.json", "weights", "metrics.csv", "training.csv", "stages.csv", "samples"} <= {f.name for f in finished.folder.iterdir()}
    assert not list((finished.folder / "checkpoints").iterdir())
    expected = {
        "teacher",
        "pd-4",
        "pd-2",
        "pd-1",
        "pd-guided-4",
        "pd-guided-2",
        "pd-guided-1",
        "cd",
        "cd-guided",
        "teacher-sgp",
        "teacher-sgp-prior",
    }
    expected |= {"pd-sgp-1", "pd-guided-sgp-1", "cd-sgp", "cd-guided-sgp"}
    assert {name.removesuffix(".safetensors") for name in weights(finished.folder)} == expected
    table = finished.table()
    identity = [*Row.__dataclass_fields__, "metric"]
    assert not table.duplicated(identity).any()
    assert table["value"].notna().all()
    scores = table[table["metric"].isin(metrics.METRICS)]
    assert scores["floor"].notna().all()
    assert scores["features_sha256"].str.fullmatch("[0-9a-f]{64}").all()
    assert set(table["z"]) == {"", "prior", "encoder", "mean"}


def test_the_report_has_a_line_for_every_set_of_samples(finished: Run) -> None:
    wide = summary(finished.table())
    assert wide.index[0] == "floor: real images"
    assert {"pd+guidance+sgp (prior), 1 step", "cd, 2 steps", "blurred real", "teacher, 4 steps"} <= set(wide.index)
    effect = effects(finished.table())
    assert effect.loc[("pd", 1), "+guidance / plain"] == pytest.approx(effect.loc[("pd", 1), "+guidance"] / effect.loc[("pd", 1), "plain"])
    verdicts = known_bad_verdicts(finished).set_index("samples")
    assert bool(verdicts.loc["copies of training images", "ranks below the teacher"])


def test_without_plain_students_there_are_scores_and_no_ratios(finished: Run) -> None:
    table = finished.table().query("guidance or method == 'teacher'")
    assert list(effects(table)) == ["+guidance", "+guidance+sgp"]
    assert ratios(table).empty


def test_two_runs_of_one_seed_are_not_averaged(finished: Run) -> None:
    table = finished.table()
    with pytest.raises(SferdError, match=r"two numbers of 'pd plain 1' \(fd\); allowed: one a seed"):
        ratios(pd.concat([table, table]))


def test_a_summary_keeps_samplers_apart() -> None:
    rows = {Row("teacher", sampler=sampler, steps=4): value for sampler, value in {"ddim": 2.0, "heun": 1.0}.items()}
    table = pd.DataFrame([{**asdict(row), "seed": 1, "metric": "fd", "value": value, "floor": 0.5} for row, value in rows.items()])
    assert summary(table)["fd"].to_dict() == {"floor: real images": 0.5, "teacher, 4 steps": 2.0, "teacher, Heun, 4 steps": 1.0}


def test_a_table_of_something_else_is_refused_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.csv").write_text("a,b\n1,2\n")
    assert report.main([str(tmp_path)]) == 2
    assert "metrics.csv has no column 'method'; expected method, guidance" in capsys.readouterr().err


def test_ratios_are_geometric_means_with_a_t_interval(finished: Run) -> None:
    table = finished.table()
    doubled = table.assign(seed=table["seed"] + 1, value=table["value"].where(~table["guidance"], table["value"] * 4))
    result = ratios(pd.concat([table, doubled])).set_index(["method", "steps", "variant"]).loc[("pd", 1, "+guidance")]
    single = effects(table).loc[("pd", 1), "+guidance / plain"]
    assert result["ratio"] == pytest.approx(2 * single)  # geometric mean of r and 4 r
    assert result["high"] / result["ratio"] == pytest.approx(
        2.0**12.706, rel=1e-3
    )  # t(0.975, 1) = 12.706; half the logs' distance is log 2


def test_the_gap_closed_is_a_share_of_the_way_to_the_many_step_teacher() -> None:
    def lines(seed: int, teacher: float, plain: float, sgp: float) -> list[dict[str, Any]]:
        rows = {Row("teacher", sampler="ddim", steps=64): teacher, Row("teacher", sampler="ddim", steps=1): 90.0}
        rows |= {Row("teacher", True, sampler="ddim", steps=64): 0.5, Row("teacher", sampler="heun", steps=64): 0.6}
        rows |= {Row("pd", sampler="ddim", steps=1): plain, Row("pd", sgp="conditional", z="prior", sampler="ddim", steps=1): sgp}
        rows |= {Row("pd", sgp="conditional", z="encoder", sampler="ddim", steps=1): 0.1}
        return [{**asdict(row), "seed": seed, "metric": "fd", "value": value} for row, value in rows.items()]

    one, two = lines(1, 1.0, 3.0, 2.0), lines(2, 1.0, 5.0, 2.0)
    found = ratios(pd.DataFrame(one + two)).set_index(["method", "steps", "variant"]).loc[("pd", 1, "+sgp")]
    assert found["closed"] == pytest.approx((0.5 + 0.75) / 2)
    assert found["closed_high"] - found["closed"] == pytest.approx(12.706 * 0.125, rel=1e-3)
    alone = ratios(pd.DataFrame(one)).iloc[0]
    assert (alone["closed"], alone["seeds"]) == (0.5, 1)
    assert np.isnan([alone["closed_low"], alone["low"]]).all()


def test_a_ratio_is_paired_by_seed_whatever_the_order_and_leaves_out_what_only_one_side_has() -> None:
    mine, plain = pd.Series({3: 2.0, 1: 1.0, 4: 9.0}), pd.Series({1: 2.0, 2: 7.0, 3: 8.0})
    middle, low, high, seeds = ratio(mine, plain)  # 1/2 and 1/4
    half = 12.706 * np.log(2) / 2  # t of one degree of freedom times the standard error
    assert (middle, seeds) == (pytest.approx(8**-0.5), 2)
    assert np.log([low, high]) == pytest.approx([np.log(middle) - half, np.log(middle) + half], rel=1e-4)
    with pytest.raises(SferdError, match="no seed in common"):
        ratio(mine, pd.Series({7: 1.0}))


@pytest.mark.parametrize("value", [0.0, -0.5, np.nan])
def test_a_seed_is_not_left_out_of_a_ratio_for_its_value(value: float) -> None:
    scores, other = pd.Series({1: 2.0, 2: value, 3: 4.0}), pd.Series({1: 1.0, 2: 1.0, 3: 1.0})
    for found in (ratio(scores, other), ratio(other, scores)):
        assert np.isnan(found[:3]).all()
        assert found[3] == 3


def test_the_numbers_of_a_row_are_one_a_seed_in_order() -> None:
    row, other = Row("pd", sampler="ddim", steps=1), Row("pd", True, sampler="ddim", steps=1)
    numbers = [(row, 2, "fd", 0.2), (row, 1, "fd", 0.1), (row, 1, "kid", 5.0), (other, 1, "fd", 7.0)]
    table = pd.DataFrame([{**asdict(row), "seed": seed, "metric": metric, "value": value} for row, seed, metric, value in numbers])
    assert by_seed(table, row).to_dict() == {1: 0.1, 2: 0.2}
    assert list(by_seed(table, row).index) == [1, 2]
    assert by_seed(table, row, "kid").to_dict() == {1: 5.0}
    with pytest.raises(SferdError, match="0 numbers of 'pd, 4 steps'"):
        by_seed(table, Row("pd", sampler="ddim", steps=4))
    with pytest.raises(SferdError, match=r"4 numbers of 'pd, 1 step' \(fd\) for seeds \[1, 2\]; allowed: one a seed"):
        by_seed(pd.concat([table, table]), row)


@pytest.fixture(scope="module")
def digits() -> pd.DataFrame:
    return read_table(shipped_folder() / "results" / "digits" / "metrics.csv")


def test_a_verdict_falls_when_a_row_is_replaced_by_its_control(digits: pd.DataFrame) -> None:
    assert verdict(digits, "pd", "+sgp") == "better"
    # The same student with one code for all images takes the place of the one with codes from the prior.
    pair = (digits["method"] == "pd") & (digits["sgp"] != "") & ~digits["guidance"]
    control = digits.assign(z=digits["z"].mask(pair, digits["z"].map({"prior": "kept", "mean": "prior"})))
    assert verdict(control, "pd", "+sgp") == "worse"
    assert verdict(digits, "cd", "+sgp") == "undecided"
    with pytest.raises(SferdError, match=r"no two seeds of 'pd \+sgp 1'; allowed: none"):
        verdict(digits[digits["seed"] == 1], "pd", "+sgp")


def test_a_verdict_needs_an_interval_that_excludes_one(digits: pd.DataFrame) -> None:
    found = ratios(digits).set_index(["method", "steps", "variant"])
    assert found.loc[("pd", 1, "+guidance"), "ratio"] < 1 < found.loc[("pd", 1, "+guidance"), "high"]
    assert verdict(digits, "pd", "+guidance") == "undecided"


def test_the_headline_has_means_and_spreads_over_seeds(digits: pd.DataFrame) -> None:
    table = headline(digits)
    values = digits[(digits["metric"] == "fd") & (digits["method"] == "pd") & (digits["steps"] == 2) & ~digits["guidance"]]["value"]
    assert len(values) == 3
    assert table.loc["pd", 2] == f"{values.mean():.3g} ± {values.std():.2g}"
    assert list(table.columns) == [1, 2, 4, 8, 64]
    assert "±" not in "".join(headline(digits[digits["seed"] == 1]).to_numpy().ravel())
    heun = digits.assign(sampler=digits["sampler"].where(digits["method"] != "teacher", "heun"))
    assert "teacher, Heun" in headline(pd.concat([digits, heun])).index


def test_training_costs_are_those_of_every_stage_on_the_way() -> None:
    names = ["teacher", "pd-4", "pd-2", "pd-1", "pd-guided-4", "pd-guided-1", "cd", "cd-guided", "teacher-sgp", "pd-sgp-2", "pd-sgp-1"]
    names += ["cd-sgp", "cd-guided-1-sgp", "cd-guided-1-sgp-latent"]
    stages = pd.DataFrame({"stage": names, "tflop": [2.0**power for power in range(len(names))]})

    def cost(*wanted: str) -> float:
        return sum(2.0 ** names.index(name) for name in wanted)

    for row, wanted in {
        Row("teacher", steps=64): (),
        Row("teacher", sgp="conditional", z="prior", steps=1): ("teacher-sgp",),
        Row("pd", steps=1): ("pd-4", "pd-2", "pd-1"),
        Row("pd", steps=2): ("pd-4", "pd-2"),
        Row("pd", True, steps=1): ("pd-guided-4", "pd-guided-1"),
        Row("pd", sgp="conditional", z="prior", steps=1): ("teacher-sgp", "pd-sgp-2", "pd-sgp-1"),
        Row("cd", steps=2): ("cd",),
        Row("cd", sgp="conditional", z="prior", steps=1): ("teacher-sgp", "cd-sgp"),
        Row("cd", True, sgp="walk", z="prior", steps=1): ("cd-guided", "cd-guided-1-sgp", "cd-guided-1-sgp-latent"),
        Row("cd", True, sgp="walk", z="encoder", steps=1): ("cd-guided", "cd-guided-1-sgp"),
    }.items():
        assert training_tflop(stages, row) == cost(*wanted), row


def test_a_finished_run_is_read_and_nothing_is_done_again(finished: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (finished.folder / "metrics.csv").read_bytes()

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("trained or sampled again")

    monkeypatch.setattr(experiment, "train", fail)
    monkeypatch.setattr(experiment, "sample", fail)
    whole(Run(finished.settings, progress=False))
    assert (finished.folder / "metrics.csv").read_bytes() == before


def test_guidance_of_weight_zero_gives_the_plain_student(tmp_path: Path) -> None:
    run = Run(settings(tmp_path, guidance_weight=0.0), progress=False)
    plain, guided = run.students("pd", False), run.students("pd", True)
    for steps, student in plain.items():
        assert all(torch.equal(a, b) for a, b in zip(student.state_dict().values(), guided[steps].state_dict().values(), strict=True))


@pytest.mark.parametrize(
    "given",
    [
        {"sgp_target": "walk", "prior": "diffusion"},
        {"sgp_target": "data", "sgp_sampling_steps": [1, 2], "sgp_joint": True},
        {"class_conditional": True, "cd_target_decay": 0.5, "guide_every_stage": True},
    ],
)
def test_every_variant_runs_to_the_end(given: dict[str, Any], tmp_path: Path) -> None:
    run = Run(settings(tmp_path, guided=[True], **given), progress=False)
    for rows in (run.evaluate_students(), run.evaluate_semantic()):
        assert list(rows)
    assert run.table()["value"].notna().all()
