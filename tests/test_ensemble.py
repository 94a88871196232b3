"""Ensembles: members trained at once are what each is alone, and an ensemble's run folders hold what their names say.

Small networks are compared in float64 with a training loop written out here. U-Nets are trained for a few steps, or not at all: then a
stand-in for ``train`` notes what it is asked to do.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed import Client, LocalCluster
from torch import Tensor, nn

from sferd_lab import experiment
from sferd_lab.analysis import ensemble as module
from sferd_lab.analysis.ensemble import EnsembleDenoiser, load_members, member_folder, stacked_data, train_members
from sferd_lab.artifacts import load_model, seeded
from sferd_lab.data import Split, bootstrap, load_images
from sferd_lab.denoiser import Denoiser
from sferd_lab.diffusion import HALF_PI, add_noise, angle_grid, velocity
from sferd_lab.distill import Batch, ConsistencyTarget, ProgressiveTarget, Target, denoising_target
from sferd_lab.errors import SferdError
from sferd_lab.files import read_json
from sferd_lab.sample import SAMPLERS, SampleNoise, sample
from sferd_lab.semantic import LatentDenoiser
from sferd_lab.train import TrainSettings, TrainState, draw_batch, train

DIM = 3
# Sums in another order differ by the last bits of a float64; a handful of Adam steps multiply that.
TOLERANCE = 1e-9


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(a: Tensor, b: Tensor, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def small(seed: int = 0, **settings: int) -> LatentDenoiser:
    return seeded(lambda: LatentDenoiser(**{"z_dim": DIM, "width": 8, "depth": 2} | settings), seed).double()


def several(count: int = 4, first: int = 0) -> EnsembleDenoiser:
    return EnsembleDenoiser([small(first + index) for index in range(count)])


def options(**changes: Any) -> TrainSettings:
    common = {"steps": 6, "batch_size": 20, "warmup": 2, "lr": 0.02, "clip": math.inf, "members": 4, "device": "cpu"}
    return TrainSettings(**common | changes)


def parts(count: int = 4, size: int = 10) -> list[Split]:
    """A training set for each member, unlike the others'."""
    return [Split(normal(size, DIM, seed=100 + index) + index, None) for index in range(count)]


def trained(model: Denoiser, make_target: Callable[[Batch, Denoiser], Target], data: Split, settings: TrainSettings) -> TrainState:
    *_, last = train(model, make_target, data, settings)
    return last


def weights(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


denoise = denoising_target(0.0, HALF_PI)


# ---- one denoiser


@pytest.mark.parametrize("phi", [0.7, torch.tensor(0.7), torch.linspace(0, HALF_PI, 20), torch.linspace(0.1, 1.5, 20)[:, None]])
def test_each_member_predicts_its_own_rows(phi: float | Tensor) -> None:
    together, x = several(), normal(20, DIM)
    prediction = together(x, phi)
    for index in range(4):
        rows = slice(5 * index, 5 * index + 5)
        own = phi[rows] if isinstance(phi, Tensor) and phi.ndim else phi
        alone = small(index)(x[rows], own)
        for name in ("x0", "eps", "v"):
            close(getattr(prediction, name)[rows], getattr(alone, name), 1e-12)


def test_one_evaluation_of_all_members_counts_once() -> None:
    together = several()
    together(normal(8, DIM), 0.5)
    together(normal(4, DIM), 0.5)
    assert together.nfe() == Counter(ensemble=2)
    assert together.repeated(2).nfe() == Counter(ensemble=0)


def test_every_parameter_can_be_trained_and_the_given_networks_are_left_alone() -> None:
    members = [small(index).requires_grad_(False) for index in range(2)]
    before = [weights(member) for member in members]
    together = EnsembleDenoiser(members)
    assert sum(parameter.numel() for parameter in together.parameters()) == 2 * len(before[0])
    assert all(parameter.requires_grad and parameter.dtype == torch.float64 for parameter in together.parameters())
    with torch.no_grad():
        for parameter in together.parameters():
            parameter += 1
    assert all(torch.equal(weights(member), start) for member, start in zip(members, before, strict=True))
    members[0].network.head.bias.fill_(7)
    assert not (together.member(0).network.head.bias == 7).any()


def test_networks_in_training_and_in_evaluation_mode_go_together() -> None:
    together = EnsembleDenoiser([small(0).train(), small(1).eval()])
    assert same_weights(together.member(1), small(1))


def test_a_member_by_itself_is_the_network_that_went_in() -> None:
    together = several()
    state = torch.get_rng_state()
    for index in range(4):
        alone = together.member(index)
        assert isinstance(alone, LatentDenoiser)
        assert same_weights(alone, small(index))
        assert all(parameter.dtype == torch.float64 and parameter.requires_grad for parameter in alone.parameters())
        close(alone(normal(5, DIM), 0.4).v, small(index)(normal(5, DIM), 0.4).v, 1e-12)
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        together.member(0).network.head.bias.fill_(7)
    assert same_weights(together.member(0), small(0))


def test_spread_gives_every_member_the_same_rows_and_gather_takes_them_apart() -> None:
    together, x = several(3), normal(5, 2, 4)
    spread = together.spread(x)
    assert spread.shape == (15, 2, 4)
    gathered = together.gather(spread)
    assert gathered.shape == (3, 5, 2, 4)
    assert all(torch.equal(own, x) for own in gathered)
    assert torch.equal(together.spread(torch.arange(2)), torch.tensor([0, 1] * 3))
    assert torch.equal(together.gather(torch.arange(6)), torch.tensor([[0, 1], [2, 3], [4, 5]]))


def test_repeated_members_stand_side_by_side() -> None:
    together = several(2)
    for parameter in together.parameters():
        parameter.requires_grad_(False)
    six = together.repeated(3)
    assert six.members == 6
    assert all(same_weights(six.member(3 * teacher + student), small(teacher)) for teacher in range(2) for student in range(3))
    assert all(parameter.requires_grad for parameter in six.parameters())
    assert together.members == 2
    with torch.no_grad():
        for parameter in together.repeated(1).parameters():
            parameter.zero_()
    assert same_weights(together.member(1), small(1))


def test_networks_of_different_shapes_are_refused() -> None:
    with pytest.raises(SferdError, match=r"'width': 8.*'width': 16.*allowed: one or more networks of one shape"):
        EnsembleDenoiser([small(), small(width=16)])
    with pytest.raises(SferdError, match=r"an ensemble of \[\]; allowed: one or more"):
        EnsembleDenoiser([])


def test_rows_that_cannot_be_shared_out_are_refused() -> None:
    together = several()
    for call in (lambda x: together(x, 0.5), together.gather):
        with pytest.raises(SferdError, match="x has 10 rows; allowed: multiples of the 4 members"):
            call(normal(10, DIM))
    assert together.nfe() == Counter(ensemble=0)
    with pytest.raises(SferdError, match="times = 0; allowed: 1 or more"):
        together.repeated(0)


@pytest.mark.parametrize("method", SAMPLERS)
def test_a_sampler_walks_every_member_on_its_own_rows(method: str) -> None:
    together, grid = several(), angle_grid(3)
    like = torch.zeros(0, dtype=torch.float64)

    def walk(denoiser: Denoiser, count: int, first: int) -> Tensor:
        noise = SampleNoise(5, count, first)
        *_, last = SAMPLERS[method](denoiser, noise.draw((DIM,), like), grid, noise)
        return last.x

    for index, own in enumerate(together.gather(walk(together, 20, 0))):
        close(own, walk(small(index), 5, 5 * index))


def test_samples_drawn_as_one_batch_belong_to_the_members_in_a_row() -> None:
    together = several(2).float()
    drawn = together.gather(sample(together, 8, (DIM,), 2, batch_size=8).images)
    alone = sample(small(0).float(), 4, (DIM,), 2).images
    close(drawn[0], alone, 1e-5)
    assert (drawn[1] - alone).abs().max() > 1e-3


# ---- the batch


def numbered(members: int, size: int) -> Split:
    """Points (N, 1): image i of member e is 100 e + i, and so is its label."""
    values = torch.tensor([[100 * member + index] for member in range(members) for index in range(size)])
    return Split(values.float(), values[:, 0])


def test_a_member_draws_from_its_own_part_of_the_data_and_from_all_of_it() -> None:
    data, settings = numbered(3, 7), options(members=3, batch_size=12)
    seen: list[set[int]] = [set(), set(), set()]
    for step in range(40):
        batch = draw_batch(data, settings, step)
        assert torch.equal(batch.labels, batch.x0[:, 0].long())
        for own, rows in zip(seen, batch.labels.split(4), strict=True):
            own.update(rows.tolist())
    # 160 draws a member: that one of 7 images never comes has a chance of 1e-10.
    assert seen == [{100 * member + index for index in range(7)} for member in range(3)]


def test_the_angles_are_stratified_within_each_member() -> None:
    settings = options(members=3, batch_size=24)
    for step in range(20):
        uniform = draw_batch(numbered(3, 7), settings, step).uniform
        assert (uniform * 8).long().tolist() == [*range(8)] * 3
    assert len(uniform.unique()) == 24


def test_members_on_the_same_data_see_other_images_and_noise() -> None:
    data = Split(normal(200, DIM).repeat(2, 1), None)
    batch = draw_batch(data, options(members=2, batch_size=20), 3)
    for drawn in (batch.x0, batch.eps, batch.uniform):
        assert not torch.equal(drawn[:10], drawn[10:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_with_one_member_a_batch_is_what_it_is_without_members(dtype: torch.dtype) -> None:
    data = Split(normal(40, 1, 2, 2).to(dtype), torch.arange(40) % 5)
    settings = options(members=1, batch_size=16, label_dropout=0.4, null_label=5, z_dim=3, z_noise=0.1, seed=8)
    for step in (0, 17):
        batch = draw_batch(data, settings, step)
        stream = torch.Generator().manual_seed(int(np.random.SeedSequence([8, step]).generate_state(1, np.uint64)[0]) >> 1)
        index = torch.randint(40, (16,), generator=stream)
        eps = torch.randn(16, 1, 2, 2, generator=stream, dtype=dtype)
        uniform = ((torch.arange(16) + torch.rand(16, generator=stream, dtype=torch.float64)) / 16).to(dtype)
        labels = torch.where(torch.rand(16, generator=stream) < 0.4, 5, data.labels[index])
        z_noise = 0.1 * torch.randn(16, 3, generator=stream, dtype=dtype)
        expected = (data.images[index], eps, uniform, labels, z_noise)
        found = (batch.x0, batch.eps, batch.uniform, batch.labels, batch.z_noise)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_training_sets_of_members_follow_each_other() -> None:
    data = stacked_data(parts())
    assert torch.equal(data.images, torch.cat([part.images for part in parts()]))
    assert data.labels is None
    # 5 and 15 would divide among two members, and give one of them images of the other.
    with pytest.raises(SferdError, match=r"training sets have \[5, 15\] images; allowed: one or more sets of equal size"):
        stacked_data([Split(normal(15, DIM), None), Split(normal(5, DIM), None)])
    with pytest.raises(SferdError, match=r"training sets have \[\] images"):
        stacked_data([])


# ---- training


def alone(
    network: LatentDenoiser, make_target: Callable[[Batch, Denoiser], Target], data: Split, settings: TrainSettings, member: int
) -> tuple[Tensor, Tensor]:
    """One member's training written out: its weights after the last step, and their moving average."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=settings.lr, betas=(0.9, 0.99), weight_decay=settings.weight_decay)
    share = settings.batch_size // settings.members
    average = None
    for step in range(settings.steps):
        drawn = draw_batch(data, settings, step)
        rows = slice(share * member, share * member + share)
        target = make_target(Batch(drawn.x0[rows], drawn.eps[rows], drawn.uniform[rows]), network)
        loss = (network(target.x, target.phi).v - target.v).square().mean()
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * settings.lr_factor(step)
        optimizer.step()
        now = weights(network)
        average = now if average is None else settings.ema_decay * average + (1 - settings.ema_decay) * now
    return weights(network), average


def denoise_by_hand(batch: Batch, student: Denoiser) -> Target:
    phi = HALF_PI * batch.uniform
    return Target(add_noise(batch.x0, batch.eps, phi), phi, batch.x0, velocity(batch.x0, batch.eps, phi))


# What an ensemble of four learns, from an ensemble of teachers or from none, and what its member of that number learns alone.
TARGETS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "denoising": (lambda teachers: denoise, lambda teacher: denoise_by_hand),
    "progressive": (lambda teachers: ProgressiveTarget(teachers, 2), lambda teacher: ProgressiveTarget(teacher, 2)),
    "consistency": (lambda teachers: ConsistencyTarget(teachers, 4, "heun"), lambda teacher: ConsistencyTarget(teacher, 4, "heun")),
}


@pytest.mark.parametrize("name", TARGETS)
def test_training_members_at_once_is_training_each_alone(name: str) -> None:
    teachers = several(2, first=50)
    together, lone = TARGETS[name]
    data, settings = stacked_data(parts()), options(weight_decay=0.05, ema_decay=0.7)
    last = trained(several(), together(teachers.repeated(2)), data, settings)
    for member in range(4):
        start = small(member)
        before = weights(start)
        now, average = alone(start, lone(small(50 + member // 2)), data, settings, member)
        assert (now - before).abs().max() > 0.01  # so that the tolerance below means something
        close(weights(last.model.member(member)), now)
        close(weights(last.ema.member(member)), average)


def test_the_loss_is_the_mean_over_members() -> None:
    data, settings = stacked_data(parts()), options(steps=1)
    batch = draw_batch(data, settings, 0)
    target = denoise_by_hand(batch, several())
    expected = (several()(target.x, target.phi).v - target.v).square().mean().item()
    assert trained(several(), denoise, data, settings).losses.item() == pytest.approx(expected, rel=1e-12)


def test_a_members_training_does_not_depend_on_the_other_members_data() -> None:
    data = stacked_data(parts())
    changed = Split(data.images.clone(), None)
    changed.images[10:20] *= 3
    first, second = (trained(several(), denoise, each, options()).model for each in (data, changed))
    assert [same_weights(first.member(index), second.member(index)) for index in range(4)] == [True, False, True, True]


def test_members_that_start_alike_see_other_batches_and_end_apart() -> None:
    data = Split(normal(40, DIM).repeat(3, 1), None)
    settings = options(members=3, batch_size=30)

    def ends(seeds: tuple[int, ...], **changes: Any) -> list[Tensor]:
        model = EnsembleDenoiser([small(seed) for seed in seeds])
        last = trained(model, denoise, data, options(**settings.__dict__ | changes))
        return [weights(last.model.member(index)) for index in range(3)]

    one = ends((0, 0, 1))
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(one, 2))
    again, other_seed = ends((0, 0, 1)), ends((0, 0, 1), seed=1)
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(one, other_seed, strict=True))


def test_students_of_an_ensemble_start_from_their_own_teacher_and_learn_from_it() -> None:
    teachers, students = several(2), 3
    settings = options(members=6, batch_size=30)
    batch = draw_batch(Split(normal(60, DIM), None), settings, 0)
    target = ProgressiveTarget(teachers.repeated(students), 2)(batch, teachers.repeated(students))
    for teacher, student in itertools.product(range(2), range(students)):
        rows = slice(5 * (students * teacher + student), 5 * (students * teacher + student + 1))
        own = Batch(batch.x0[rows], batch.eps[rows], batch.uniform[rows])
        expected, other = (ProgressiveTarget(small(index), 2)(own, small()) for index in (teacher, 1 - teacher))
        close(target.x[rows], expected.x, 1e-12)
        close(target.v[rows], expected.v, 1e-12)
        close(target.x0[rows], expected.x0, 1e-12)
        assert (target.v[rows] - other.v).abs().max() > 1e-3


def test_an_ensemble_that_was_stopped_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    # A checkpoint cannot hold infinity; no gradient is so large.
    data, settings = stacked_data(parts()), options(checkpoint_every=2, clip=1e9)
    whole, stopped = tmp_path / "whole.safetensors", tmp_path / "stopped.safetensors"
    for stop in (3, None):
        states = train(several(), denoise, data, settings, stopped)
        list(itertools.islice(states, stop))
        states.close()
    list(train(several(), denoise, data, settings, whole))
    assert stopped.read_bytes() == whole.read_bytes()


def test_members_that_do_not_divide_the_batch_or_the_data_are_refused() -> None:
    with pytest.raises(SferdError, match="members = 0; allowed: 1 or more"):
        options(members=0)
    for members, batch_size, words in (
        (3, 20, "batch_size = 20; allowed: multiples of members = 3"),
        (4, 2, "batch_size = 2; allowed: multiples of members = 4"),
        (3, 21, "the number of training images = 40; allowed: multiples of members = 3"),
    ):
        with pytest.raises(SferdError, match=words):
            trained(several(members), denoise, stacked_data(parts()), options(members=members, batch_size=batch_size))


# ---- bootstrap samples


def test_a_bootstrap_sample_is_drawn_with_replacement_and_labels_follow() -> None:
    n = 2000
    values = torch.arange(n)
    drawn = bootstrap(Split(values[:, None, None, None].float(), values), 3)
    assert drawn.images.shape == (n, 1, 1, 1)
    assert torch.equal(drawn.images.flatten().long(), drawn.labels)
    assert set(drawn.labels.tolist()) <= set(range(n))
    # A share 1 - 1/e of the images is expected; four standard deviations of it, sqrt((1 - 2/e) / (e n)).
    share = len(drawn.labels.unique()) / n
    assert abs(share - (1 - math.exp(-1))) < 4 * math.sqrt((1 - 2 / math.e) / (math.e * n))
    # How often an image comes is all but Poisson of mean 1: no more than 9 of one.
    assert drawn.labels.bincount().max() < 10
    assert drawn.labels.min() < 10
    assert drawn.labels.max() > n - 10
    assert bootstrap(Split(drawn.images, None), 3).labels is None


def test_a_bootstrap_sample_depends_on_its_seed_alone() -> None:
    split = Split(torch.arange(500.0)[:, None, None, None], torch.arange(500))
    torch.manual_seed(1)
    first, state = bootstrap(split, 3), torch.get_rng_state()
    assert torch.equal(bootstrap(split, 3).labels, first.labels)
    assert not torch.equal(bootstrap(split, 4).labels, first.labels)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(split.labels, torch.arange(500))


# ---- run folders


GIVEN: dict[str, Any] = {"widths": (8, 8), "device": "cpu"}
RUNS = {f"teacher-{teacher}{student}" for teacher in (1, 2) for student in ("", "-student-1", "-student-2")}


@pytest.fixture(autouse=True, scope="module")
def _tiny() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums split over threads differ by rounding, and below bytes are compared
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SFERD_LAB_TINY", "1")
        patch.setattr(experiment, "load_images", functools.cache(load_images))
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two teachers with two students each, trained one after another."""
    folder = tmp_path_factory.mktemp("ensemble") / "whole"
    train_members("digits", folder, 2, 2, methods=("pd", "cd"), **GIVEN)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.glob("*/weights/*"))}


def times(folder: Path) -> dict[str, int]:
    """When each file of weights that was trained, not copied, was written."""
    files = folder.glob("*/weights/*")
    copied = {path for path in files if "student" in path.parent.parent.name and path.stem == "teacher"}
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.glob("*/weights/*") if path not in copied}


def test_every_teacher_and_student_has_a_run_folder_of_its_own(whole: Path) -> None:
    assert {path.name for path in whole.iterdir()} == RUNS
    files = Counter(Path(name).parts[0] for name in contents(whole))
    assert files == {name: 5 if "student" in name else 1 for name in RUNS}
    assert {path.stem for path in (whole / "teacher-2-student-1" / "weights").iterdir()} == {"teacher", "pd-4", "pd-2", "pd-1", "cd"}
    assert member_folder("here", 3) == Path("here/teacher-3")
    assert member_folder(Path("here"), 3, 12) == Path("here/teacher-3-student-12")


def test_no_two_members_share_a_seed_or_weights(whole: Path) -> None:
    settings = {name: read_json(whole / name / "config.json")["settings"] for name in RUNS}
    assert len({own["seed"] for own in settings.values()}) == 6
    assert all((own["bootstrap"], own["guided"], own["sgp"], own["retrain"]) == (None, [False], False, True) for own in settings.values())
    files = contents(whole)
    trained_files = [files[name] for name in times(whole)]
    assert len(set(trained_files)) == len(trained_files) == 2 + 4 * 4
    # The seed alone is what differs: weights do, beyond the seed that the file names.
    students = [load_model(whole / f"teacher-1-student-{index}" / "weights" / "cd.safetensors")[0] for index in (1, 2)]
    assert not same_weights(*students)


def test_a_students_teacher_is_its_own(whole: Path) -> None:
    files = contents(whole)
    for teacher, student in itertools.product((1, 2), (1, 2)):
        mine = files[f"teacher-{teacher}-student-{student}/weights/teacher.safetensors"]
        assert mine == files[f"teacher-{teacher}/weights/teacher.safetensors"]


@dataclass
class Asked:
    """What a stage asked of ``train``."""

    model: Denoiser  # as it was before
    target: Any
    data: Split
    settings: TrainSettings


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str], Asked]:
    """What every (run, stage) asks for, with a stand-in for ``train`` that moves all weights by an amount of that run's and stage's own."""
    asked: dict[tuple[str, str], Asked] = {}

    def stand_in(model: Denoiser, target: Any, data: Split, settings: TrainSettings, checkpoint: Path) -> Iterator[TrainState]:
        asked[checkpoint.parent.parent.name, checkpoint.stem] = Asked(copy.deepcopy(model), target, data, settings)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.01 * len(asked)
        checkpoint.parent.mkdir(exist_ok=True)
        checkpoint.touch()
        yield TrainState(settings.steps, torch.zeros(settings.steps), settings.lr, model, model.eval())

    monkeypatch.setattr(experiment, "train", stand_in)
    return asked


def test_students_start_from_their_own_teacher_and_distil_it(fake: dict[tuple[str, str], Asked], tmp_path: Path) -> None:
    train_members("digits", tmp_path, 2, 2, methods=("pd", "cd"), **GIVEN)
    stages = {run: [stage for name, stage in fake if name == run] for run in RUNS}
    assert stages == {run: ["pd-4", "pd-2", "pd-1", "cd"] if "student" in run else ["teacher"] for run in RUNS}
    teachers = {teacher: load_model(tmp_path / f"teacher-{teacher}" / "weights" / "teacher.safetensors")[0] for teacher in (1, 2)}
    assert not same_weights(teachers[1], teachers[2])
    for teacher, student, stage in itertools.product((1, 2), (1, 2), ("pd-4", "cd")):
        asked = fake[f"teacher-{teacher}-student-{student}", stage]
        assert same_weights(asked.model, teachers[teacher])
        assert same_weights(asked.target.teacher, teachers[teacher])
    for stage in ("pd-4", "cd"):
        seeds = {asked.settings.seed for (_, name), asked in fake.items() if name == stage}
        assert len(seeds) == 4


def test_every_member_of_a_plain_ensemble_sees_all_training_images(fake: dict[tuple[str, str], Asked], tmp_path: Path) -> None:
    train_members("digits", tmp_path, 2, 2, methods=("cd",), **GIVEN)
    images = load_images("digits").train.images
    assert all(torch.equal(asked.data.images, images) for asked in fake.values())


def test_a_teachers_bootstrap_sample_is_its_students_too(fake: dict[tuple[str, str], Asked], tmp_path: Path) -> None:
    train_members("digits", tmp_path, 2, 2, bootstrap=True, methods=("cd",), class_conditional=True, **GIVEN)
    split = load_images("digits").train
    assert len(fake) == 6
    for (name, _), asked in fake.items():
        teacher = int(name.split("-")[1])
        assert read_json(tmp_path / name / "config.json")["settings"]["bootstrap"] == teacher
        sampled = bootstrap(split, teacher)
        assert torch.equal(asked.data.images, sampled.images)
        assert torch.equal(asked.data.labels, sampled.labels)
    first, second = (fake[f"teacher-{teacher}", "teacher"].data.images for teacher in (1, 2))
    assert not torch.equal(first, second)
    assert not torch.equal(first, split.images)


def test_a_second_call_trains_nothing(whole: Path, fake: dict[tuple[str, str], Asked]) -> None:
    files, written = contents(whole), times(whole)
    train_members("digits", whole, 2, 2, methods=("pd", "cd"), **GIVEN)
    assert fake == {}
    assert contents(whole) == files
    assert times(whole) == written


@pytest.mark.parametrize(
    ("lost", "more"),
    [
        ("teacher-2-student-1/weights/cd.safetensors", ()),
        ("teacher-1-student-2/weights/pd-1.safetensors", ()),
        ("teacher-2/weights/teacher.safetensors", ("teacher-2-student-1/weights/teacher.safetensors",)),
        ("teacher-1-student-2", ()),
    ],
)
def test_what_an_interruption_left_out_is_made_up_for(whole: Path, tmp_path: Path, lost: str, more: tuple[str, ...]) -> None:
    folder = tmp_path / "again"
    shutil.copytree(whole, folder)  # with the times of its files
    for name in (lost, *more):
        (shutil.rmtree if (folder / name).is_dir() else Path.unlink)(folder / name)
    kept = times(folder)
    train_members("digits", folder, 2, 2, methods=("pd", "cd"), **GIVEN)
    assert contents(folder) == contents(whole)
    assert {name: written for name, written in times(folder).items() if name in kept} == kept


def only_cd(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if Path(name).stem in ("teacher", "cd")}


def test_threads_of_one_process_train_the_same_weights(whole: Path, tmp_path: Path) -> None:
    # Were both at it at once, they would draw their first weights from one random state.
    with ThreadPoolExecutor(2) as pool:
        train_members("digits", tmp_path, 2, 2, executor=pool, methods=("cd",), **GIVEN)
    assert contents(tmp_path) == only_cd(contents(whole))


def test_dask_trains_the_same_weights(whole: Path, tmp_path: Path) -> None:
    # A worker in a thread of this process, reached over a socket as one elsewhere would be: what it gets has been serialised.
    settings = {"processes": False, "n_workers": 1, "threads_per_worker": 1, "dashboard_address": None}
    place = {"protocol": "tcp://", "host": "127.0.0.1", "local_directory": str(tmp_path / "dask")}
    with LocalCluster(**settings, **place) as cluster, Client(cluster) as client:
        train_members("digits", tmp_path, 2, 2, executor=client.get_executor(), methods=("cd",), **GIVEN)
    assert contents(tmp_path) == only_cd(contents(whole))


def test_the_command_trains_the_same_weights_over_processes(whole: Path, tmp_path: Path) -> None:
    words = ["teachers=2", "students=2", "workers=2", "methods=('cd',)", "widths=(8, 8)", "device=cpu"]
    command = [sys.executable, "-m", module.__name__, "digits", str(tmp_path), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"SFERD_LAB_TINY": "1"})
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path) == only_cd(contents(whole))


def test_a_failure_in_an_executor_comes_out(tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as pool, pytest.raises(SferdError, match="parameter 'teacher_steps' = -1"):
        train_members("digits", tmp_path, 2, 2, executor=pool, teacher_steps=-1)


@pytest.mark.parametrize(("teachers", "students", "words"), [(1, 2, "teachers = 1"), (2, 1, "students = 1"), (2, 1000, "students = 1000")])
def test_too_few_members_or_more_than_there_are_seeds_for_are_refused(tmp_path: Path, teachers: int, students: int, words: str) -> None:
    with pytest.raises(SferdError, match=f"{words}; allowed: 2 or more, since a variance needs two, and below 1000"):
        train_members("digits", tmp_path, teachers, students)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "value"), [("seed", 3), ("retrain", False), ("guided", (True,)), ("sgp", True), ("run_folder", "here")])
def test_a_parameter_that_the_members_differ_in_or_that_makes_them_alike_is_refused(tmp_path: Path, name: str, value: Any) -> None:
    with pytest.raises(SferdError, match=rf"parameter '{name}' = .*; allowed: none, it is decided for each member"):
        train_members("digits", tmp_path, 2, 2, **{name: value})
    assert not list(tmp_path.iterdir())


def test_loaded_students_are_nested_under_their_teacher(whole: Path) -> None:
    for method, steps, file in (("cd", 1, "cd"), ("cd", 4, "cd"), ("pd", 4, "pd-4"), ("pd", 1, "pd-1")):
        teachers, students = load_members(whole, method, steps)
        assert [len(own) for own in students] == [2, 2]
        for index, teacher in enumerate(teachers):
            assert same_weights(teacher, load_model(whole / f"teacher-{index + 1}" / "weights" / "teacher.safetensors")[0])
            for number, student in enumerate(students[index]):
                path = whole / f"teacher-{index + 1}-student-{number + 1}" / "weights" / f"{file}.safetensors"
                assert same_weights(student, load_model(path)[0])
                assert not student.training


def test_a_folder_without_a_whole_ensemble_is_refused(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(SferdError, match=r"holds 0 teachers with \[\] students; allowed: the folder of a finished train_members"):
        load_members(tmp_path, "cd", 1)
    with pytest.raises(SferdError, match="method = 'PD'; allowed: pd, cd"):
        load_members(whole, "PD", 1)
    with pytest.raises(SferdError, match=r"teacher-1-student-1/weights/pd-8.safetensors is missing"):
        load_members(whole, "pd", 8)
    folder = tmp_path / "part"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "teacher-2-student-2")
    with pytest.raises(SferdError, match=r"holds 2 teachers with \[2, 1\] students; allowed"):
        load_members(folder, "cd", 1)
    # A teacher under way: the members that are there must not pass for all.
    (folder / "teacher-2" / "weights" / "teacher.safetensors").unlink()
    with pytest.raises(SferdError, match=r"teacher-2/weights/teacher.safetensors is missing"):
        load_members(folder, "cd", 1)
