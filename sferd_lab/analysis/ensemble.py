"""Many trainings of the same thing, which bias and variance are made of.

Small networks train all at once: an ``EnsembleDenoiser`` holds the parameters of its members stacked, and ``train`` treats it as one
denoiser. U-Nets train one after another or spread over processes: ``train_members`` makes a run folder for every teacher and for every
student, ``load_members`` reads them.

``python -m sferd_lab.analysis.ensemble PRESET FOLDER teachers=6 students=2 [workers=2] [name=value ...]`` is ``train_members``.
"""

from __future__ import annotations

import copy
import shutil
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from sferd_lab.artifacts import load_model
from sferd_lab.config import make_settings, parse_literals
from sferd_lab.data import Split
from sferd_lab.denoiser import Denoiser, Prediction
from sferd_lab.diffusion import Angle, as_angle
from sferd_lab.errors import SferdError, command
from sferd_lab.experiment import Run
from sferd_lab.semantic import LatentDenoiser

# What ``train_members`` decides for every run, so that no parameter may.
DECIDED = ("guided", "retrain", "run_folder", "seed", "sgp")
# torch's random state and accelerate's settings belong to the process, so threads of one process take turns.
TURN = threading.Lock()


class EnsembleDenoiser(Denoiser):
    """Networks of one shape evaluated as one: of a batch (members * b, dim), rows e b to (e + 1) b - 1 belong to member e.

    So ``train`` with ``TrainSettings.members``, every ``Target`` and every sampler work on it as on any denoiser, each member on rows of
    its own. Two settings see all members at once: a ``clip`` within reach ties their steps together, and ``sample`` gives every batch's
    rows to all members, so it must draw one batch. Raises SferdError for members of different shapes and for batches that do not divide.
    """

    def __init__(self, members: Sequence[LatentDenoiser]) -> None:
        super().__init__("ensemble")
        if not members or any(member.settings != members[0].settings for member in members):
            raise SferdError(f"an ensemble of {[member.settings for member in members]}; allowed: one or more networks of one shape")
        self.settings, self.members = members[0].settings, len(members)
        weights = [member.network.state_dict() for member in members]
        # The names of registered parameters may not hold dots.
        self.stacked = nn.ParameterDict(
            {name.replace(".", "/"): nn.Parameter(torch.stack([own[name] for own in weights])) for name in weights[0]}
        )
        # In a tuple, so that the template is no part of the model: it lends its code, never its weights.
        self._template = (copy.deepcopy(members[0].network).to("meta"),)

    def predict(self, x: Tensor, phi: Angle, layers: Sequence[str] = ()) -> Prediction:
        """One pass of every member over its own rows."""
        rows, angles = self.gather(x), self.gather(as_angle(phi, x).flatten().expand(len(x)))
        self.evaluations += 1

        def one(parameters: dict[str, Tensor], x: Tensor, phi: Tensor) -> Tensor:
            return functional_call(self._template[0], parameters, (x, phi))

        stacked = {name.replace("/", "."): tensor for name, tensor in self.stacked.items()}
        v = vmap(one)(stacked, rows, angles).flatten(0, 1)
        return Prediction.from_v(x, v, phi)

    def spread(self, x: Tensor) -> Tensor:
        """The same rows (B, ...) for every member: (members * B, ...)."""
        return x.repeat(self.members, *[1] * (x.ndim - 1))

    def gather(self, x: Tensor) -> Tensor:
        """(members * B, ...) to (members, B, ...)."""
        if len(x) % self.members:
            raise SferdError(f"x has {len(x)} rows; allowed: multiples of the {self.members} members")
        return x.unflatten(0, (self.members, len(x) // self.members))

    def repeated(self, times: int) -> EnsembleDenoiser:
        """Each member ``times`` times in a row: the teachers of that many students each, or where those students start."""
        if times < 1:
            raise SferdError(f"times = {times}; allowed: 1 or more")
        copied = copy.deepcopy(self)
        copied.members, copied.evaluations = self.members * times, 0
        for name, tensor in self.stacked.items():
            copied.stacked[name] = nn.Parameter(tensor.detach().repeat_interleave(times, dim=0))
        return copied.requires_grad_(True)

    def member(self, index: int) -> LatentDenoiser:
        """One of the networks by itself."""
        with torch.device("meta"):  # draws no random weights, which would be thrown away
            alone = LatentDenoiser(**self.settings)
        weights = {name.replace("/", "."): tensor[index].detach().clone() for name, tensor in self.stacked.items()}
        # Assigned rather than copied, which keeps their dtype and device.
        alone.network.load_state_dict(weights, assign=True)
        return alone


def stacked_data(splits: Sequence[Split]) -> Split:
    """The training sets of an ensemble's members as the one set that ``train`` takes. Raises SferdError unless they are of equal size
    and in memory.
    """
    if stored := [type(split.images).__name__ for split in splits if not isinstance(split.images, Tensor)]:
        raise SferdError(f"the members' training sets are {stored[0]}; allowed: tensors in memory, since they are put together")
    if len(sizes := {len(split.images) for split in splits}) != 1:
        raise SferdError(f"the members' training sets have {sorted(sizes)} images; allowed: one or more sets of equal size")
    return Split(torch.cat([split.images for split in splits]), None)


def member_folder(folder: Path | str, teacher: int, student: int | None = None) -> Path:
    """Where the run of a teacher, or of one of its students, is kept; both count from 1."""
    return Path(folder) / (f"teacher-{teacher}" if student is None else f"teacher-{teacher}-student-{student}")


def train_member(preset: str, folder: Path | str, teacher: int, students: int, bootstrap: bool, parameters: Mapping[str, Any]) -> None:
    """Train one teacher with the seed ``teacher``, and its students with seeds of their own; what is there already is kept.

    With ``bootstrap`` teacher and students see a bootstrap sample of the training images drawn for this teacher.
    """
    common = {"retrain": True, "guided": (False,), "sgp": False, "bootstrap": teacher if bootstrap else None, **parameters}

    def start(seed: int, student: int | None = None) -> Run:
        run_folder = str(member_folder(folder, teacher, student))
        return Run(make_settings(preset, **common, seed=seed, run_folder=run_folder), progress=False)

    with TURN:
        run = start(teacher)
        run.teacher()
        for student in range(1, students + 1):
            # Beyond every teacher's seed, and no two students share one.
            own = start(1000 * teacher + student, student)
            weights = own.folder / "weights" / "teacher.safetensors"
            weights.parent.mkdir(exist_ok=True)
            shutil.copy(run.folder / "weights" / "teacher.safetensors", weights)
            for method in own.settings.methods:
                own.students(method, guided=False)


def train_members(
    preset: str,
    folder: Path | str,
    teachers: int,
    students: int,
    bootstrap: bool = False,
    executor: Executor | None = None,
    **parameters: Any,
) -> None:
    """``teachers`` teachers and ``students`` students of each, as run folders under ``folder``; an interrupted call goes on.

    One after another, or over an ``executor``: a process pool, or ``distributed.Client(...).get_executor()`` for Dask; threads of one
    process take turns. ``parameters`` are ``make_settings``'s. Raises SferdError for fewer than 2 of either, of which no variance can be
    estimated, for more than seeds are there for, and for a parameter that is decided here.
    """
    for name, count in (("teachers", teachers), ("students", students)):
        if not 2 <= count < 1000:
            raise SferdError(f"{name} = {count}; allowed: 2 or more, since a variance needs two, and below 1000")
    if given := sorted(set(DECIDED) & set(parameters)):
        raise SferdError(f"parameter '{given[0]}' = {parameters[given[0]]!r}; allowed: none, it is decided for each member")
    jobs = [(preset, str(folder), teacher, students, bootstrap, parameters) for teacher in range(1, teachers + 1)]
    if executor is None:
        for job in jobs:
            train_member(*job)
    else:
        for future in [executor.submit(train_member, *job) for job in jobs]:
            future.result()


def load_members(folder: Path | str, method: str, steps: int) -> tuple[list[Denoiser], list[list[Denoiser]]]:
    """The teachers, and for each its students of ``method`` ("pd" or "cd") for ``steps`` sampling steps.

    Raises SferdError for another method, and for a folder in which weights are missing or not every teacher has as many students.
    """
    if method not in ("pd", "cd"):
        raise SferdError(f"method = '{method}'; allowed: pd, cd")
    name = "cd" if method == "cd" else f"pd-{steps}"
    teachers: list[Denoiser] = []
    students: list[list[Denoiser]] = []
    while (run := member_folder(folder, len(teachers) + 1)).exists():
        teachers.append(load_model(run / "weights" / "teacher.safetensors")[0])
        students.append([])
        while (run := member_folder(folder, len(teachers), len(students[-1]) + 1)).exists():
            students[-1].append(load_model(run / "weights" / f"{name}.safetensors")[0])
    counts = [len(own) for own in students]
    if len(set(counts)) != 1 or not counts[0]:
        raise SferdError(f"{folder} holds {len(teachers)} teachers with {counts} students; allowed: the folder of a finished train_members")
    return teachers, students


def one_thread() -> None:
    """Keep a worker process to one thread: more threads than cores slow each other down."""
    torch.set_num_threads(1)


@command
def main(arguments: Sequence[str]) -> None:
    """The command of this module."""
    options = parse_literals(arguments[2:])
    if missing := [name for name in ("teachers", "students") if name not in options]:
        raise SferdError(f"{missing[0]} is not given; allowed: PRESET FOLDER teachers=... students=... [workers=...] [name=value ...]")
    workers = options.pop("workers", 1)
    if workers == 1:
        train_members(arguments[0], arguments[1], **options)
    else:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=one_thread) as pool:
            train_members(arguments[0], arguments[1], executor=pool, **options)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
