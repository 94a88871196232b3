"""The stages of an experiment: who learns what from whom, with which settings, and that an interruption changes no byte.

``test_report`` goes through a whole run. Here most stages are not trained at all: a stand-in for ``train``
notes what it is asked to do.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import sklearn
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sferd_lab import experiment
from sferd_lab.artifacts import load_model, shipped_folder
from sferd_lab.config import Settings, make_settings
from sferd_lab.data import load_images
from sferd_lab.denoiser import ClassifierFree, Denoiser, NetworkDenoiser
from sferd_lab.diffusion import angle_grid
from sferd_lab.distill import Batch, ConsistencyTarget, DataTarget, ProgressiveTarget
from sferd_lab.errors import SferdError
from sferd_lab.experiment import Row, Run, as_student, on_codes, read_table, stage_name, stage_seed
from sferd_lab.files import load_tensors, read_json, sha256
from sferd_lab.guidance import GuidedDenoiser
from sferd_lab.metrics import METRICS, Scorer
from sferd_lab.report import summary
from sferd_lab.sample import sample
from sferd_lab.train import TrainSettings, TrainState


@pytest.fixture(autouse=True, scope="module")
def _tiny() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SFERD_LAB_TINY", "1")
        patch.setattr(experiment, "load_images", functools.cache(load_images))
        # Two splits: the floor's own precision is test_metrics' business.
        patch.setattr(experiment, "Scorer", functools.partial(Scorer, floor_splits=2))
        yield


def make(folder: Path, preset: str = "digits", **given: Any) -> Settings:
    return make_settings(preset, run_folder=str(folder), **{"widths": [8, 8], "retrain": True, "device": "cpu", **given})


def start(folder: Path, preset: str = "digits", **given: Any) -> Run:
    return Run(make(folder, preset, **given), progress=False)


def train_everything(run: Run) -> None:
    for method in run.settings.methods:
        for guided in run.settings.guided:
            run.students(method, guided)
            run.semantic_students(method, guided)


def names(folder: Path) -> set[str]:
    return {path.stem for path in folder.iterdir()} if folder.exists() else set()


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# ---- a stand-in for training


@dataclass
class Asked:
    """What a stage asked of ``train``."""

    model: Denoiser  # as it was before
    target: Any
    data: Any
    settings: TrainSettings


@dataclass
class FakeTraining:
    """Instead of ``train``: moves every trained weight by a little that differs from stage to stage."""

    asked: dict[str, Asked] = field(default_factory=dict)

    def __call__(self, model: Denoiser, target: Any, data: Any, settings: TrainSettings, checkpoint: Path) -> Iterator[TrainState]:
        assert checkpoint.stem not in self.asked, f"{checkpoint.stem} is trained twice"
        self.asked[checkpoint.stem] = Asked(copy.deepcopy(model), target, data, settings)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.01 * len(self.asked)
        checkpoint.parent.mkdir(exist_ok=True)
        checkpoint.touch()
        yield TrainState(settings.steps, torch.arange(settings.steps).double(), settings.lr, model, model.eval())


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> dict[str, Asked]:
    training = FakeTraining()
    monkeypatch.setattr(experiment, "train", training)
    return training.asked


def test_the_conditional_variant_has_these_stages_and_keeps_their_weights_losses_and_times(fake: dict[str, Asked], tmp_path: Path) -> None:
    run = start(tmp_path)
    train_everything(run)
    assert list(fake) == [
        *("teacher", "pd-4", "pd-2", "pd-1", "teacher-sgp", "pd-sgp-1"),
        *("pd-guided-4", "pd-guided-2", "pd-guided-1", "pd-guided-sgp-1", "cd", "cd-sgp", "cd-guided", "cd-guided-sgp"),
    ]
    assert names(tmp_path / "weights") == {*fake, "teacher-sgp-prior"}
    assert names(tmp_path / "checkpoints") == set()
    losses = pd.read_csv(tmp_path / "training.csv")
    assert list(losses) == ["stage", "step", "loss"]
    for stage, rows in losses.groupby("stage"):
        steps = fake[stage].settings.steps
        assert rows["step"].tolist() == list(range(1, steps + 1))
        assert rows["loss"].tolist() == list(range(steps))
    times = pd.read_csv(tmp_path / "stages.csv")
    assert times["stage"].tolist() == list(fake)
    assert (times["seconds"] >= 0).all()
    tflop = times.set_index("stage")["tflop"]
    of_a_step = tflop / [fake[stage].settings.steps for stage in tflop.index]
    assert 0 < of_a_step["teacher"] < of_a_step["pd-4"] < of_a_step["pd-guided-4"]


def test_weights_say_what_made_them(fake: dict[str, Asked], tmp_path: Path) -> None:
    run = start(tmp_path, seed=5)
    run.progressive(run.teacher(), guided=False)
    model, info = load_model(tmp_path / "weights" / "pd-2.safetensors")
    assert (info["stage"], info["data"], info["shape"], info["seed"]) == ("pd-2", "digits", [1, 8, 8], 5)
    assert info["training"] == json.loads(json.dumps(fake["pd-2"].settings.__dict__))
    assert (model.role, info["role"]) == ("student", "student")


def test_settings_reach_the_stages_that_they_are_for(fake: dict[str, Asked], tmp_path: Path) -> None:
    # A different number for each, so that none can stand in for another.
    given: dict[str, Any] = {
        "batch_size": 9, "ema_decay": 0.5, "checkpoint_every": 7, "label_dropout": 0.25, "precision": "bf16",
        "teacher_steps": 11, "teacher_lr": 0.011, "teacher_ema_decay": 0.6, "pd_stage_steps": (12, 13, 14), "pd_lr": 0.012,
        "pd_loss": "x0_snr", "cd_steps": 15, "cd_lr": 0.015, "cd_loss": "l2", "cd_target_decay": 0.7, "sgp_steps": 16, "sgp_lr": 0.016,
        "sgp_distil_steps": 17, "z_dim": 5, "z_noise": 0.3, "prior": "diffusion", "prior_steps": 18, "class_conditional": True,
    }  # fmt: skip
    run = start(tmp_path, **given)
    train_everything(run)
    common = TrainSettings(
        steps=1, batch_size=9, ema_decay=0.5, checkpoint_every=7, precision="bf16", device="cpu", label_dropout=0.25, null_label=10,
        anneal="linear",
    )  # fmt: skip
    codes = {"z_dim": 5, "z_noise": 0.3}
    pd_options, cd_options = {"lr": 0.012, "loss": "x0_snr"}, {"lr": 0.015, "loss": "l2", "target_decay": 0.7}
    expected = {
        "teacher": replace(common, steps=11, lr=0.011, ema_decay=0.6, anneal="cosine"),
        "pd-4": replace(common, steps=12, **pd_options),
        "pd-2": replace(common, steps=13, **pd_options),
        "pd-guided-1": replace(common, steps=14, **pd_options),
        "cd-guided": replace(common, steps=15, **cd_options),
        "teacher-sgp": replace(common, steps=16, lr=0.016, **codes),
        "pd-guided-sgp-1": replace(common, steps=17, **pd_options, **codes),
        "cd-sgp": replace(common, steps=17, **cd_options, **codes),
        "teacher-sgp-latent": replace(common, steps=18),
    }
    for stage, settings in expected.items():
        assert replace(fake[stage].settings, seed=0) == settings, stage


def test_without_labels_nothing_is_told_about_labels(fake: dict[str, Asked], tmp_path: Path) -> None:
    run = start(tmp_path, label_dropout=0.25)
    run.teacher()
    assert fake["teacher"].data.labels is None
    assert (fake["teacher"].settings.label_dropout, fake["teacher"].settings.null_label) == (0, 0)
    fake.clear()
    labelled = start(tmp_path / "labelled", class_conditional=True)
    labelled.teacher()
    assert torch.equal(fake["teacher"].data.labels, labelled.data.train.labels)
    assert load_model(tmp_path / "labelled" / "weights" / "teacher.safetensors")[0].network.shape.classes == 10


def test_classifier_free_guidance_is_the_teacher_s_and_its_students_learn_it(fake: dict[str, Asked], tmp_path: Path) -> None:
    given = {"class_conditional": True, "sgp": False, "classifier_free": 2.5}
    run = start(tmp_path, **given)
    for method, guided in itertools.product(("pd", "cd"), (False, True)):
        run.students(method, guided)
    for stage, guided in (("pd-4", False), ("pd-guided-4", True), ("cd", False), ("cd-guided", True)):
        teacher = fake[stage].target.teacher
        assert isinstance(teacher, GuidedDenoiser) is guided
        inner = teacher.teacher if guided else teacher
        assert isinstance(inner, ClassifierFree)
        assert inner.scale == 2.5
        assert not isinstance(fake[stage].model, ClassifierFree)
    # Later stages imitate a student, which has it in its weights.
    assert all(type(fake[stage].target.teacher) is NetworkDenoiser for stage in ("pd-2", "pd-1", "pd-guided-2"))
    row = Row("teacher", sampler="ddim", steps=3)
    assert run.draw(row, run.guide(run.teacher(), False), range(2)).nfe == {"teacher": 6}
    fake.clear()
    plain = start(tmp_path / "plain", **given | {"classifier_free": 1.0})
    assert plain.draw(row, plain.guide(plain.teacher(), False), range(2)).nfe == {"teacher": 3}


def test_plain_and_guided_stages_share_their_seed_and_no_others_do(fake: dict[str, Asked], tmp_path: Path) -> None:
    train_everything(start(tmp_path, seed=3))
    seeds = {stage: asked.settings.seed for stage, asked in fake.items()}
    groups = [
        *(["teacher"], ["teacher-sgp"], ["pd-4", "pd-guided-4"], ["pd-2", "pd-guided-2"]),
        *(["pd-1", "pd-guided-1", "pd-sgp-1", "pd-guided-sgp-1"], ["cd", "cd-guided", "cd-sgp", "cd-guided-sgp"]),
    ]
    assert sorted(stage for group in groups for stage in group) == sorted(seeds)
    assert all(len({seeds[stage] for stage in group}) == 1 for group in groups)
    assert len(set(seeds.values())) == len(groups)
    assert seeds["pd-2"] == stage_seed(3, "pd-2") != stage_seed(4, "pd-2")


def test_every_student_starts_from_its_teacher_and_learns_from_it(fake: dict[str, Asked], tmp_path: Path) -> None:
    run = start(tmp_path, cd_solver="ddim", cd_boundaries=5)
    teacher = run.teacher()
    students = run.progressive(teacher, guided=False)
    source = teacher
    for steps in (4, 2, 1):
        asked = fake[f"pd-{steps}"]
        assert isinstance(asked.target, ProgressiveTarget)
        assert asked.target.steps == steps
        assert same_weights(asked.target.teacher, source)
        assert same_weights(asked.model, source)
        assert not same_weights(students[steps], source)
        assert all(parameter.requires_grad for parameter in asked.model.parameters())
        assert not any(parameter.requires_grad for parameter in asked.target.teacher.parameters())
        source = students[steps]
    student = run.consistency(teacher, guided=False)
    target = fake["cd"].target
    assert isinstance(target, ConsistencyTarget)
    assert (target.boundaries, target.solver) == (5, "ddim")
    assert target.teacher is teacher
    assert same_weights(fake["cd"].model, teacher)
    assert run.students("cd", guided=False).keys() >= {1, 2}
    assert same_weights(run.students("cd", guided=False)[1], student)


@pytest.mark.parametrize("every_stage", [False, True])
def test_the_teacher_is_guided_in_the_first_stage_or_in_every_one(fake: dict[str, Asked], tmp_path: Path, every_stage: bool) -> None:
    run = start(tmp_path, guide_every_stage=every_stage)
    train_everything(run)
    guided = {stage for stage, asked in fake.items() if isinstance(getattr(asked.target, "teacher", None), GuidedDenoiser)}
    first = {"pd-guided-4", "pd-guided-sgp-1", "cd-guided", "cd-guided-sgp"}
    assert guided == (first | {"pd-guided-2", "pd-guided-1"} if every_stage else first)


def test_guidance_is_what_the_settings_say(tmp_path: Path, fake: dict[str, Asked]) -> None:
    given = {"weight": 0.4, "form": "x0", "threshold": 1.2, "layer": "middle", "mask": "edge"}
    run = start(tmp_path, blur_kernel=7, blur_sigma=1.5, seed=6, **{f"guidance_{name}": value for name, value in given.items()})
    teacher = run.teacher()
    assert run.guide(teacher, False) is teacher
    guided = run.guide(teacher, True)
    assert guided.teacher is teacher
    expected = given | {"blur_kernel": 7, "blur_sigma": 1.5, "seed": 6}
    assert {name: getattr(guided, name) for name in expected} == expected


def test_after_a_restart_rows_are_held_against_the_teacher_that_was_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"class_conditional": True, "sgp": False, "classifier_free": 3.0, "teacher_sampling_steps": (2, 1)}  # in any order
    run, drawn = start(tmp_path, **given), []

    def draw(row: Row, denoiser: Denoiser, *rest: Any) -> Any:
        drawn.append((row, denoiser))
        return Run.draw(run, row, denoiser, *rest)

    monkeypatch.setattr(run, "draw", draw)
    list(run.evaluate_teacher())
    del run.yardstick  # as it is when the row is read, not made
    _ = run.yardstick
    (scored, by), *_, (last, again) = drawn
    assert scored == last == run.yardstick_row == Row("teacher", sampler="ddim", steps=2)
    assert (by.scale, again.scale) == (3.0, 3.0)


def batch(run: Run, z_noise: float = 0.5) -> Batch:
    images = run.data.train.images[:4]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4, run.settings.z_dim, generator=generator)
    return Batch(images, torch.randn(images.shape, generator=generator), torch.tensor([0.1, 0.4, 0.6, 0.9]), None, z_noise * noise)


def test_the_conditional_pair_is_distilled_with_the_same_noisy_code_for_teacher_and_student(fake: dict[str, Asked], tmp_path: Path) -> None:
    run = start(tmp_path)
    source = run.semantic_teacher(run.teacher())
    pairs = run.progressive(run.teacher(), False, source)
    run.consistency(run.teacher(), False, source)
    draw = batch(run)
    z = source.encoder(draw.x0) + draw.z_noise
    for stage in ("pd-sgp-1", "cd-sgp"):
        asked = fake[stage]
        assert asked.target.teacher is source
        for condition in (asked.target.condition, asked.target.teacher_condition):
            assert condition(draw).keys() == {"z"}
            torch.testing.assert_close(condition(draw)["z"], z)
        assert same_weights(asked.model, source)
        # The codes' meaning stays: only denoiser and predictor are trained.
        trained = {name.split(".")[0] for name, parameter in asked.model.named_parameters() if parameter.requires_grad}
        assert trained == {"base", "gradient"}
    assert list(pairs) == [1]
    # The condition's encoder standardises by what it learned, not by this batch of four, and keeps it.
    torch.testing.assert_close(on_codes(source.train())(draw)["z"], z)
    torch.testing.assert_close(source.eval().encoder(draw.x0) + draw.z_noise, z)


def test_what_is_told_a_code_learns_without_labels_as_it_is_sampled(fake: dict[str, Asked], tmp_path: Path) -> None:
    run = start(tmp_path, class_conditional=True)
    train_everything(run)
    draw = replace(batch(run), labels=torch.arange(4))
    assert fake["pd-4"].target.condition(draw).keys() == {"labels"}
    for stage in ("pd-sgp-1", "cd-sgp"):
        assert fake[stage].target.condition(draw).keys() == fake[stage].target.teacher_condition(draw).keys() == {"z"}
    assert fake["teacher-sgp"].target(draw, fake["teacher-sgp"].model).condition.keys() == {"image", "z_noise"}


def test_the_z_conditional_teacher_keeps_the_teacher_frozen_and_sees_the_image(fake: dict[str, Asked], tmp_path: Path) -> None:
    run = start(tmp_path)
    teacher = run.teacher()
    source = run.semantic_teacher(teacher)
    asked = fake["teacher-sgp"]
    trained = {name.split(".")[0] for name, parameter in asked.model.named_parameters() if parameter.requires_grad}
    assert trained == {"gradient", "encoder"}
    assert same_weights(source.base, teacher)
    target = asked.target(batch(run), asked.model)
    assert torch.equal(target.condition["image"], batch(run).x0)
    assert torch.equal(target.condition["z_noise"], batch(run).z_noise)
    assert torch.equal(target.x0, batch(run).x0)


def test_a_kernel_prior_holds_the_codes_of_all_training_images_and_the_noise_of_their_training(
    fake: dict[str, Asked], tmp_path: Path
) -> None:
    run = start(tmp_path, prior="kernel", z_noise=0.3, methods=("pd",), guided=(False,))
    teacher = run.semantic_teacher(run.teacher())
    prior = run.prior("teacher-sgp", teacher)
    assert prior.bandwidth == 0.3
    with torch.inference_mode():
        torch.testing.assert_close(prior.codes, teacher.encoder(run.data.train.images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("joint", [False, True])
def test_a_walk_target_is_the_one_that_the_student_was_distilled_with(fake: dict[str, Asked], tmp_path: Path, joint: bool) -> None:
    run = start(tmp_path, sgp_target="walk", sgp_sampling_steps=(4, 2), sgp_joint=joint, guided=(True,), cd_solver="heun")
    train_everything(run)
    students = run.students("pd", True)
    first, second = fake["pd-guided-4-sgp"].target, fake["pd-guided-2-sgp"].target
    assert (first.steps, second.steps) == (4, 2)
    assert isinstance(first.teacher, GuidedDenoiser)  # as in the first stage, and not after it
    assert same_weights(first.teacher.teacher, run.teacher())
    assert same_weights(second.teacher, students[4])
    walk = fake["cd-guided-2-sgp"].target
    assert isinstance(walk.teacher, GuidedDenoiser)
    assert (walk.boundaries, walk.solver) == (4, "heun")
    # At every boundary: one that is never asked at the last, where psi = 0, has nothing that ties it to an image.
    images, noise = torch.zeros(8, 1, 8, 8), torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    drawn = Batch(images, noise, torch.arange(8) / 8, z_noise=torch.zeros(8, 8))
    torch.testing.assert_close(walk(drawn, fake["cd-guided-2-sgp"].model).phi.unique(), angle_grid(4).float()[:-1].flip(0))
    asked = fake["pd-guided-2-sgp"]
    assert same_weights(asked.model.base, students[2])
    trained = {name.split(".")[0] for name, parameter in asked.model.named_parameters() if parameter.requires_grad}
    assert trained == {"gradient", "encoder"} | ({"base"} if joint else set())
    assert asked.target.condition(batch(run)).keys() == {"image", "z_noise"}
    assert asked.target.teacher_condition(batch(run)) == {}
    # Each predictor brings its own encoder, so each has its own prior.
    assert {"pd-guided-4-sgp-prior", "pd-guided-2-sgp-prior", "cd-guided-4-sgp-prior"} <= names(tmp_path / "weights")


def test_a_data_target_is_the_guided_teacher_itself_one_sampling_step_on(fake: dict[str, Asked], tmp_path: Path) -> None:
    run = start(tmp_path, sgp_target="data", sgp_sampling_steps=(2,), guided=(False, True))
    train_everything(run)
    for stage in ("pd-2-sgp", "cd-2-sgp", "pd-guided-2-sgp", "cd-guided-2-sgp"):
        target = fake[stage].target
        assert isinstance(target, DataTarget)
        assert target.steps == 2
        assert isinstance(target.teacher, GuidedDenoiser) == ("guided" in stage)
        assert same_weights(getattr(target.teacher, "teacher", target.teacher), run.teacher())


def test_a_student_is_a_trainable_copy_that_has_evaluated_nothing(fake: dict[str, Asked], tmp_path: Path) -> None:
    run = start(tmp_path)
    teacher = run.teacher()
    source = run.semantic_teacher(teacher)
    x = torch.zeros(2, 1, 8, 8)
    teacher(x, 0.5)
    source(x, 0.5, z=torch.zeros(2, 8))
    student, pair = as_student(teacher), as_student(source)
    assert (student.nfe(), pair.nfe()) == (Counter(student=0), Counter(student=0, gradient=0))
    assert teacher.role == "teacher"
    assert source.base.role == "teacher"
    assert same_weights(student, teacher)
    assert student.network is not teacher.network
    assert [stage_name("pd", False), stage_name("cd", True), stage_name("pd", True, source)] == ["pd", "cd-guided", "pd-guided-sgp"]


# ---- the same bytes, whatever happens


def interrupted(stops: Callable[[str, int], bool], seen: list[tuple[str, int]]) -> Callable[..., Iterator[TrainState]]:
    """``train`` that notes every (stage, step) and is interrupted after those that ``stops`` names."""
    real = experiment.train

    def train(model: Denoiser, target: Any, data: Any, settings: TrainSettings, checkpoint: Path) -> Iterator[TrainState]:
        for state in real(model, target, data, settings, checkpoint):
            seen.append((checkpoint.stem, state.step))
            if stops(*seen[-1]):
                raise KeyboardInterrupt
            yield state

    return train


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


VARIANTS: dict[str, dict[str, Any]] = {
    "conditional": {"prior": "diffusion", "cd_target_decay": 0.5, "guided": (True,)},
    "walk": {"sgp_target": "walk", "prior": "kernel", "sgp_joint": True, "methods": ("pd",), "guided": (True,), "class_conditional": True},
    "data": {"sgp_target": "data", "methods": ("cd",), "guided": (True,)},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_interrupting_every_stage_changes_no_byte_of_any_file(variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"checkpoint_every": 1, **VARIANTS[variant]}
    whole = start(tmp_path / "whole", **given)
    train_everything(whole)
    expected = contents(whole.folder / "weights")

    # Twice a stage: after its first step, and when it is trained but not yet kept.
    seen: list[tuple[str, int]] = []
    stopped: set[str] = set()
    dropped: set[str] = set()

    def stop(stage: str, step: int) -> bool:
        first = step == 1 and stage not in stopped
        stopped.update([stage] if first else [])
        return first

    monkeypatch.setattr(experiment, "train", interrupted(stop, seen))
    keep = Run._save

    def save(run: Run, path: Path, *rest: Any) -> None:
        if path.stem not in dropped:
            dropped.add(path.stem)
            raise KeyboardInterrupt
        keep(run, path, *rest)

    monkeypatch.setattr(Run, "_save", save)
    attempts = 0
    while True:
        attempts += 1
        run = start(tmp_path / "again", **given)
        try:
            train_everything(run)
        except KeyboardInterrupt:
            continue
        break
    stages = set(pd.read_csv(whole.folder / "stages.csv")["stage"])
    priors = {name.removesuffix(".safetensors") for name in expected} - stages
    assert stopped == stages
    assert dropped == stages | priors
    assert attempts == 1 + len(stopped) + len(dropped)
    assert contents(run.folder / "weights") == expected
    assert contents(run.folder)["training.csv"] == contents(whole.folder)["training.csv"]
    assert contents(run.folder / "checkpoints") == {}
    # No step is done twice: only the last one is seen again, when it is read back from the checkpoint to be kept.
    counts = Counter(seen)
    last = pd.read_csv(whole.folder / "training.csv").groupby("stage")["step"].max()
    assert all(count == 1 + (step == last[stage]) for (stage, step), count in counts.items())
    assert len(counts) == last.sum()


def test_another_seed_gives_other_weights_in_every_stage(tmp_path: Path) -> None:
    given: dict[str, Any] = {"methods": ("pd",), "guided": (False,), "prior": "diffusion"}
    one, same, other = (start(tmp_path / name, seed=seed, **given) for name, seed in (("one", 1), ("same", 1), ("other", 2)))
    for run in (one, same, other):
        train_everything(run)
    assert contents(one.folder / "weights") == contents(same.folder / "weights")
    for name in names(one.folder / "weights"):
        mine, others = (load_tensors(run.folder / "weights" / f"{name}.safetensors")[0] for run in (one, other))
        assert any(not torch.equal(mine[key], others[key]) for key in mine), name


def test_the_seed_decides_what_every_new_network_starts_from(fake: dict[str, Asked], tmp_path: Path) -> None:
    def first_weights(folder: str, seed: int) -> list[Tensor]:
        fake.clear()
        torch.manual_seed(len(folder))
        train_everything(start(tmp_path / folder, seed=seed, methods=("pd",), guided=(False,), prior="diffusion"))
        parts = (
            fake["teacher"].model,
            fake["teacher-sgp"].model.encoder,
            fake["teacher-sgp"].model.gradient,
            fake["teacher-sgp-latent"].model,
        )
        return [torch.cat([parameter.flatten() for parameter in part.parameters()]) for part in parts]

    one, same, other = first_weights("one", 1), first_weights("same", 1), first_weights("other", 2)
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_training_leaves_torchs_random_state_out_of_it(tmp_path: Path) -> None:
    torch.manual_seed(1)
    first = start(tmp_path / "a").teacher()
    torch.manual_seed(2)
    assert same_weights(start(tmp_path / "b").teacher(), first)


def test_another_number_of_threads_changes_rounding_only(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    models = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            models.append(start(tmp_path / str(threads), teacher_steps=3, batch_size=32, widths=(16, 32)).teacher())
    finally:
        torch.set_num_threads(before)
    # 3 steps at a rate of 2e-3 move weights by up to 0.006; 1.5e-8 was found after 30 where this was written.
    for one, two in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(two, one, rtol=0, atol=1e-6)


# ---- the run folder


def test_the_run_folder_says_what_made_it(tmp_path: Path) -> None:
    run = start(tmp_path, seed=4)
    config = read_json(tmp_path / "config.json")
    assert config["settings"] == json.loads(run.settings.model_copy(update={"run_folder": None}).model_dump_json())
    made = config["made_with"]
    assert made["torch"] == torch.__version__
    assert made["commit"] is None or len(made["commit"]) == 40
    versions = {"sferd_lab", "python", "torch", "numpy", "scipy", "scikit-learn", "accelerate", "commit", "uncommitted_changes"}
    assert made.keys() == versions | {"machine", "instructions", "cores", "threads", "gpu"}
    assert made["scikit-learn"] == sklearn.__version__
    # A folder that was moved is still the same run.
    tmp_path.rename(tmp_path.with_name("moved"))
    start(tmp_path.with_name("moved"), seed=4)


@pytest.mark.parametrize(("name", "value"), [("seed", 2), ("pd_stage_steps", (2, 2, 3)), ("guidance_mask", "edge"), ("data", "mixture")])
def test_a_folder_of_other_settings_is_refused_by_the_first_that_differs(tmp_path: Path, name: str, value: Any) -> None:
    run = start(tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    theirs = json.loads(run.settings.model_dump_json())[name]
    with pytest.raises(SferdError) as caught:
        start(tmp_path, **{name: value})
    mine = list(value) if isinstance(value, tuple) else value
    assert str(caught.value) == (
        f"run folder {tmp_path} was made with {name} = {theirs}, these settings have {mine}; "
        "allowed: the same settings, or another run_folder"
    )
    assert (tmp_path / "config.json").read_bytes() == before


def test_without_a_folder_a_run_goes_to_its_presets_and_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFERD_LAB_RUNS", str(tmp_path / "all"))
    run = Run(make(tmp_path).model_copy(update={"run_folder": None, "seed": 12}), progress=False)
    assert run.folder == tmp_path / "all" / "digits-seed12"
    assert (run.folder / "config.json").is_file()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"z_dim": 9}, "z_dim = 9; allowed: at most 8, 1/8 of the 64 pixels"),
        ({"widths": (8,) * 5}, "image size 8x8; allowed: multiples of 16, for 5 levels"),
        ({"image_size": 3}, "size = 3 for data set 'digits'; allowed: 4, 8"),
        ({"n_samples": 64}, "n_samples = 64; allowed: 65 to 847"),
        ({"n_samples": 848}, "n_samples = 848; allowed: 65 to 847"),
        ({"blur_kernel": 17}, "blur kernel = 17; allowed: odd, 1 to 15 for 8x8 images"),
        ({"guidance_layer": "decoder.7"}, "attention layer 'decoder.7'; allowed: .*middle"),
        ({"neighbours": 80}, "neighbours = 80; allowed: at most 79"),
        ({"neighbours": 500, "n_samples": 700}, "neighbours = 500; allowed: at most 499"),
        ({"prior_components": 848}, "prior_components = 848; allowed: at most 847"),
        ({"image_size": 4, "widths": (8,), "attention": (0,), "z_dim": 2, "blur_kernel": 3}, "image_size = 4; allowed: 8 or more"),
        ({"attention": (), "guidance_layer": "decoder.0"}, "attention layer 'decoder.0'; allowed: middle"),
        ({"class_conditional": True, "label_dropout": 0.0}, "label_dropout = 0 with class_conditional and sgp; allowed: above 0"),
        ({"data": "patches", "z_dim": 400}, "z_dim = 400; allowed: at most 384, 1/8 of the 3072 pixels"),
    ],
)
def test_what_does_not_fit_the_data_is_refused_before_anything_is_made(tmp_path: Path, given: dict[str, Any], words: str) -> None:
    with pytest.raises(SferdError, match=words):
        start(tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()


def test_labels_cannot_be_used_where_there_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = load_images("digits")
    parts = {part: replace(getattr(data, part), labels=None) for part in ("features", "train", "reference")}
    monkeypatch.setattr(experiment, "load_images", lambda *_: replace(data, name="unlabelled", classes=0, **parts))
    with pytest.raises(SferdError, match="class_conditional = True; allowed: False, since unlabelled has no labels"):
        start(tmp_path / "run", class_conditional=True)
    with pytest.raises(SferdError, match="unlabelled has no labels to train a feature network on; allowed: data sets with labels"):
        start(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_shipped_teacher_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "train", None)
    run = Run(make_settings(run_folder=str(tmp_path), device="cpu", seed=8), progress=False)
    shipped, info = load_model(shipped_folder() / "digits" / "teacher.safetensors")
    assert same_weights(run.teacher(), shipped)
    kept = load_model(tmp_path / "weights" / "teacher.safetensors")[1]
    assert kept["stage"] == info["stage"] == "teacher"
    # The folder stands on its own: the next call reads its copy.
    monkeypatch.setattr(experiment, "shipped_folder", lambda: tmp_path / "nothing")
    assert same_weights(run.teacher(), shipped)


def test_a_shipped_teacher_of_another_shape_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        SferdError, match=r"the shipped teacher has .*widths=\(32, 32\).*, these settings .*; set retrain = True to train one"
    ):
        start(tmp_path, retrain=False).teacher()
    assert names(tmp_path / "weights") == set()


# ---- scores


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One method, evaluated at 4 and 2 steps, with a diffusion prior."""
    run = start(
        tmp_path_factory.mktemp("scored") / "run",
        guided=(True,), sampling_steps=(4,), teacher_sampling_steps=(2, 3), prior="diffusion", class_conditional=True,
        sgp_sampling_steps=(2,), sgp_start_steps=4,
    )  # fmt: skip
    for rows in (run.evaluate_teacher(), run.evaluate_students(), run.evaluate_semantic()):
        list(rows)
    return run


def numbers(run: Run, row: Row) -> dict[str, float]:
    table = run.table()
    chosen = table[(table[list(Row.__dataclass_fields__)] == list(row.__dict__.values())).all(axis=1)]
    assert not chosen["metric"].duplicated().any()
    return dict(zip(chosen["metric"], chosen["value"], strict=True))


def nfe(run: Run, row: Row) -> dict[str, float]:
    return {name.removeprefix("nfe_"): value for name, value in numbers(run, row).items() if name.startswith("nfe_")}


PRIOR = {"sgp": "conditional", "z": "prior"}


def test_evaluations_are_counted_by_role(scored: Run) -> None:
    assert nfe(scored, Row("teacher", sampler="ddim", steps=3)) == {"teacher": 3}
    assert nfe(scored, Row("teacher", True, sampler="ddim", steps=3)) == {"teacher": 6}
    assert nfe(scored, Row("pd", True, sampler="ddim", steps=4)) == {"student": 4}
    assert nfe(scored, Row("cd", True, sampler="consistency", steps=4)) == {"student": 4}
    # Two latent steps for the codes, by the tiny settings.
    assert nfe(scored, Row("pd", True, **PRIOR, sampler="ddim", steps=2)) == {"student": 2, "gradient": 2, "prior": 2}
    assert nfe(scored, Row("teacher", **PRIOR, sampler="ddim", steps=2)) == {"teacher": 2, "gradient": 2, "prior": 2}
    assert nfe(scored, Row("cd", True, "conditional", "encoder", "consistency", 2)) == {"student": 2, "gradient": 2}


def test_cost_grows_with_steps_guidance_and_predictor(scored: Run) -> None:
    def cost(*row: Any) -> float:
        return numbers(scored, Row(*row))["sampling_mflops_per_image"]

    two, three = cost("teacher", False, "", "", "ddim", 2), cost("teacher", False, "", "", "ddim", 3)
    assert three == pytest.approx(1.5 * two)
    assert 2 * three <= cost("teacher", True, "", "", "ddim", 3) < 2.2 * three
    encoder, prior = (cost("teacher", False, "conditional", z, "ddim", 2) for z in ("encoder", "prior"))
    assert two < encoder < 2 * two
    assert encoder < prior


@pytest.mark.parametrize("sampler", ["ddim", "heun", "ddpm", "consistency"])
def test_cost_of_many_steps_is_that_of_counting_them_all(scored: Run, sampler: str) -> None:
    teacher = scored.semantic_teacher(scored.teacher())
    prior = scored.prior("teacher-sgp", teacher)
    row = Row("teacher", sgp="conditional", z="prior", sampler=sampler, steps=5)
    with FlopCounterMode(display=False) as counter:
        sample(teacher, 4, scored.shape, 5, method=sampler, prior=prior)
    assert scored._flops(row, teacher, prior, {}) == counter.get_total_flops() / 4


def test_rows_share_their_noise_and_labels_image_by_image(scored: Run) -> None:
    plain = Row("teacher", sampler="ddim", steps=3)
    torch.testing.assert_close(scored.images(plain), scored.yardstick[: experiment.KEPT], rtol=0, atol=1e-6)
    assert numbers(scored, plain)["teacher_mse"] == pytest.approx(0, abs=1e-10)
    student = Row("pd", True, sampler="ddim", steps=4)
    drawn = scored.draw(student, scored.students("pd", True)[4]).images
    torch.testing.assert_close(scored.images(student), drawn[: experiment.KEPT], rtol=0, atol=1e-6)
    assert numbers(scored, student)["teacher_mse"] == pytest.approx(float((drawn - scored.yardstick).square().mean()), rel=1e-4)
    # Consistency sampling adds noise of its own on the way, so there is no image to compare with.
    assert "teacher_mse" not in numbers(scored, Row("cd", True, sampler="consistency", steps=4))


@pytest.mark.parametrize(("first", "count"), [(0, 80), (0, 30), (25, 40)])
def test_labels_are_as_frequent_as_in_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: int, count: int) -> None:
    run, told = start(tmp_path, class_conditional=True), {}
    labels = torch.tensor([0] * 600 + [3] * 200 + [9] * 47)[torch.randperm(847, generator=torch.Generator().manual_seed(0))]
    run.train_split = replace(run.train_split, labels=labels)
    monkeypatch.setattr(experiment, "sample", lambda *_, condition, **__: told.update(condition))
    run.draw(Row("pd", sampler="ddim", steps=1), run.teacher(), range(first, first + count))
    found = told["labels"].bincount(minlength=10)
    assert len(told["labels"]) == count
    assert (found - count * labels.bincount() / 847).abs().max() < 1.5  # any first few, and any that follow


def test_scores_are_those_of_the_sampled_images(scored: Run) -> None:
    row = Row("pd", True, sampler="ddim", steps=4)
    images = scored.draw(row, scored.students("pd", True)[4]).images
    found = numbers(scored, row)
    for score in scored.scorer.scores(images):
        assert found[score.metric] == pytest.approx(score.value, rel=1e-4, abs=1e-6)
    table = scored.table()
    scores = table[table["metric"].isin(METRICS)]
    assert set(scores["n"]) == {80}
    assert set(scores["features"]) == {"digits-net"}
    assert set(scores["features_sha256"]) == {scored.scorer.sha256}


def test_a_summary_has_a_line_for_each_scored_row_and_one_for_the_floor(scored: Run) -> None:
    table = scored.table()
    rows = table.loc[table["metric"] == "fd", list(Row.__dataclass_fields__)]
    lines = summary(table)
    assert list(lines.index) == ["floor: real images", *(Row(*row).label for row in rows.itertuples(index=False))]
    assert lines["fd"].tolist() == pytest.approx([table["floor"].dropna().iloc[0], *table.loc[table["metric"] == "fd", "value"]])


def test_with_a_code_there_is_no_label(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, row, told = start(tmp_path, class_conditional=True), Row("pd", sampler="ddim", steps=1), []
    monkeypatch.setattr(experiment, "sample", lambda *_args, condition, **_options: told.append(set(condition)))
    run.draw(row, run.teacher(), range(8))
    run.draw(row, run.teacher(), range(8), z=torch.zeros(8, 4))
    run.draw(row, run.teacher(), range(8), prior=object())
    assert told == [{"labels"}, {"z"}, set()]


# The digits' 500 reference images are taken at once, the mixture's 5,000 in pieces, each with its own noise and codes.
@pytest.mark.parametrize("preset", ["digits", "mixture"])
def test_codes_are_compared_by_one_step_from_noise_to_held_out_images(fake: dict[str, Asked], tmp_path: Path, preset: str) -> None:
    run = start(tmp_path, preset, class_conditional=True)
    model = run.semantic_teacher(run.teacher())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.gradient.parameters():  # fresh heads are zero, and no code would matter
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    row = Row("teacher", False, "conditional", "", "ddim", 1)
    run.code_errors(row, model, run.prior("teacher-sgp", model))
    found = numbers(run, row)
    assert list(found) == [f"reconstruction_mse_{name}" for name in ("encoder", "shuffled", "mean", "prior")]
    reference = run.data.reference
    x = experiment.SampleNoise(run.settings.seed, len(reference.images), purpose=2).draw(run.shape)
    codes = run.codes(model, reference.images)
    expected = []
    with torch.inference_mode():
        for z in (codes, torch.cat([codes[-1:], codes[:-1]]), codes.mean(0).repeat(len(codes), 1)):
            predicted = model(x, model.phi_hi, z=z).x0
            expected.append(float((predicted - reference.images).square().mean()))
    assert list(found.values())[:3] == pytest.approx(expected, rel=1e-6)
    assert all(abs(a / b - 1) > 1e-5 for a, b in itertools.combinations(found.values(), 2))
    assert set(run.table().query("metric.str.startswith('reconstruction')")["n"]) == {len(reference.images)}


def test_a_row_that_is_there_is_read_and_a_missing_one_is_made_in_its_place(scored: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    row = Row("pd", True, sampler="ddim", steps=4)
    before = scored.table()
    monkeypatch.setattr(experiment, "sample", None)
    read = scored.evaluate(row, scored.teacher())  # another denoiser would give other scores
    assert dict(zip(read["metric"], read["value"], strict=True)) == numbers(scored, row)
    monkeypatch.undo()
    # Written again, a row takes the place of the old one.
    scored._append_rows(row, [{"metric": "teacher_mse", "value": 7.0, "n": 80}])
    assert numbers(scored, row) == {"teacher_mse": 7.0}
    rest = scored.table()
    rest = rest[~(rest[["method", "steps", "sampler"]] == ["pd", 4, "ddim"]).all(axis=1)]
    old = before[~(before[["method", "steps", "sampler"]] == ["pd", 4, "ddim"]).all(axis=1)]
    pd.testing.assert_frame_equal(rest.reset_index(drop=True), old.reset_index(drop=True))
    with pytest.raises(AssertionError):
        pd.testing.assert_frame_equal(scored.table(), before)
    before.to_csv(scored.folder / "metrics.csv", index=False)


def test_a_feature_network_is_trained_where_none_is_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "shipped_folder", lambda: tmp_path / "nothing")
    quick = functools.partial(experiment.train_feature_network, steps=4)
    monkeypatch.setattr(experiment, "train_feature_network", quick)
    first = start(tmp_path / "run").scorer
    assert first.name == "digits-net"
    monkeypatch.setattr(experiment, "train_feature_network", None)
    again = start(tmp_path / "run").scorer
    assert again.sha256 == first.sha256
    assert (tmp_path / "run" / "weights" / "features.safetensors").is_file()


def test_known_bad_sets_are_scored_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = start(tmp_path)
    table = run.evaluate_known_bad()
    assert table["method"].unique().tolist() == ["blurred real", "one class", "copies of training images"]
    copies = table[(table["method"] == "copies of training images") & (table["metric"] == "memorisation_ratio")]
    assert copies["value"].item() == 0
    assert run.images(Row("one class")).shape == (experiment.KEPT, 1, 8, 8)
    monkeypatch.setattr(run.scorer, "scores", None)
    pd.testing.assert_frame_equal(
        run.evaluate_known_bad()[["method", "metric", "value"]], table[["method", "metric", "value"]], check_dtype=False
    )


def test_contrast_stretches_the_students_images_from_black_and_nobody_elses(tmp_path: Path) -> None:
    given = {"methods": ["pd"], "guided": [False], "sgp": False}
    plain, stretched = (start(tmp_path / str(factor), contrast=factor, **given) for factor in (1.0, 1.25))
    for row, same in zip(plain.rows(), stretched.rows(), strict=True):
        assert row == same
        factor = 1.0 if row.method == "teacher" else 1.25
        torch.testing.assert_close(stretched.images(row) + 1, factor * (plain.images(row) + 1))
        scores, before = (run.table().set_index(["method", "steps", "metric"])["value"] for run in (stretched, plain))
        for metric in ("fd", "teacher_mse"):
            name = (row.method, row.steps, metric)
            assert (scores[name] == before[name]) == (row.method == "teacher")


# ---- small parts


@pytest.mark.parametrize(
    ("row", "label", "key"),
    [
        (Row("teacher", sampler="ddim", steps=64), "teacher, 64 steps", "teacher--64-steps"),
        (Row("teacher", sampler="heun", steps=64), "teacher, Heun, 64 steps", "teacher--Heun--64-steps"),
        (Row("pd", True, "walk", "prior", "ddim", 1), "pd+guidance+sgp (prior), 1 step", "pd-guidance-sgp--prior---1-step"),
        (Row("blurred real"), "blurred real", "blurred-real"),
    ],
)
def test_a_row_has_a_name_and_a_file_name(row: Row, label: str, key: str) -> None:
    assert (row.label, row.key) == (label, key)


def test_figures_are_kept_as_pictures(tmp_path: Path, scored: Run) -> None:
    figure, _ = plt.subplots(figsize=(2, 1))
    scored.save_figure("curve", figure)
    plt.close(figure)
    path = scored.folder / "figures" / "curve.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    assert plt.imread(path).shape[:2] == (150, 300)  # 150 dots an inch


def test_empty_text_is_read_as_text(tmp_path: Path) -> None:
    frame = pd.DataFrame([{**Row("teacher", steps=1).__dict__, "metric": "fd", "value": 1.0, "floor": None}])
    frame.to_csv(tmp_path / "metrics.csv", index=False)
    table = read_table(tmp_path / "metrics.csv")
    assert table.loc[0, ["sgp", "z", "sampler"]].tolist() == ["", "", ""]
    assert table["floor"].isna().all()


def test_the_teacher_is_scored_by_every_sampler_that_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, scored = start(tmp_path, teacher_samplers=("ddim", "heun"), guided=(False, True)), []
    monkeypatch.setattr(run, "evaluate", lambda row, *_: scored.append(row))
    assert list(run.evaluate_teacher()) == scored
    assert scored == [
        Row("teacher", sampler="ddim", steps=4),  # the yardstick, so that no other row has to draw it
        *(Row("teacher", sampler="ddim", steps=steps) for steps in (1, 2)),
        *(Row("teacher", sampler="heun", steps=steps) for steps in (1, 2, 4)),
        Row("teacher", True, sampler="ddim", steps=4),
    ]


def test_a_second_network_gives_its_own_fd_and_kid_where_one_is_shipped(tmp_path: Path) -> None:
    run = start(tmp_path)
    row = Row("teacher", sampler="ddim", steps=1)
    scores = run.evaluate(row, run.teacher())
    scores = scores.dropna(subset="floor").set_index("metric")
    assert list(scores.index) == [*METRICS, "fd_second", "kid_second"]
    assert scores.loc["fd_second", "features"] == "digits-net-2"
    assert scores.loc["fd_second", "features_sha256"] == sha256(shipped_folder() / "digits" / "second-features.safetensors")
    assert scores.loc["fd_second", "value"] != scores.loc["fd", "value"]


def test_shipped_floors_are_what_the_scorers_would_compute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFERD_LAB_TINY", "0")
    run = start(tmp_path)
    for known in (run.scorer, run.second_scorer):
        fresh = Scorer(known.network, known.sha256, known.name, run.data.reference.images, run.data.train.images, metrics=known.metrics)
        assert known._floors.keys() == {500}
        for metric, floor in fresh.floors(500).items():
            # On another kind of processor features are rounded otherwise, and an image may be counted as a neighbour or not.
            counted = metric in ("precision", "recall", "density", "coverage")
            assert known.floors(500)[metric] == pytest.approx(floor, rel=1e-4, abs=1 / 500 / 5 if counted else 1e-6)


def test_floors_of_another_k_are_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFERD_LAB_TINY", "0")
    assert start(tmp_path / "shipped").scorer._floors.keys() == {500}
    assert not start(tmp_path / "other", neighbours=3).scorer._floors
