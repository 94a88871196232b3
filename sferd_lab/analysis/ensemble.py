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
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from sferd_lab.config import make_settings, parse_literals
from sferd_lab.data import Split
from sferd_lab.denoiser import Denoiser, Prediction
from sferd_lab.diffusion import Angle, as_angle
from sferd_lab.errors import SferdError
from sferd_lab.experiment import Run
from sferd_lab.semantic import LatentDenoiser


class EnsembleDenoiser(Denoiser):
    """Networks of one shape evaluated as one: of a batch (members * b, dim), rows e b to (e + 1) b - 1 belong to member e.

    So ``train`` with ``TrainSettings.members``, every ``Target`` and every sampler work on it as on any denoiser, each member on rows of
    its own. Raises SferdError for members of different shapes and for batches that do not divide.
    """

    def __init__(self, members: Sequence[LatentDenoiser]) -> None:
        super().__init__("ensemble")
        if not members or any(member.settings != members[0].settings for member in members):
            raise SferdError(f"an ensemble of {[member.settings for member in members]}; allowed: one or more networks of one shape")
        self.settings, self.members = members[0].settings, len(members)
        stacked, _ = stack_module_state([member.network for member in members])
        # The names of registered parameters may not hold dots.
        self.stacked = nn.ParameterDict({name.replace(".", "/"): nn.Parameter(tensor.detach()) for name, tensor in stacked.items()})
        # In a tuple, so that the template is no part of the model: it lends its code, never its weights.
        self._template = (copy.deepcopy(members[0].network).to("meta"),)

    def predict(self, x: Tensor, phi: Angle, layers: Sequence[str] = ()) -> Prediction:
        """One pass of every member over its own rows."""
        if len(x) % self.members:
            raise SferdError(f"x has {len(x)} rows; allowed: multiples of the {self.members} members")
        self.evaluations += 1
        rows = (self.members, len(x) // self.members)
        angles = as_angle(phi, x).flatten().expand(len(x))

        def one(parameters: dict[str, Tensor], x: Tensor, phi: Tensor) -> Tensor:
            return functional_call(self._template[0], parameters, (x, phi))

        stacked = {name.replace("/", "."): tensor for name, tensor in self.stacked.items()}
        v = vmap(one)(stacked, x.unflatten(0, rows), angles.unflatten(0, rows)).flatten(0, 1)
        return Prediction.from_v(x, v, phi)

    def spread(self, x: Tensor) -> Tensor:
        """The same rows (B, ...) for every member: (members * B, ...)."""
        return x.repeat(self.members, *[1] * (x.ndim - 1))

    def gather(self, x: Tensor) -> Tensor:
        """(members * B, ...) to (members, B, ...)."""
        return x.unflatten(0, (self.members, -1))

    def repeated(self, times: int) -> EnsembleDenoiser:
        """Each member ``times`` times in a row: the teachers of that many students each, or where those students start."""
        copied = copy.deepcopy(self)
        copied.members = self.members * times
        for name, tensor in self.stacked.items():
            copied.stacked[name] = nn.Parameter(tensor.detach().repeat_interleave(times, dim=0))
        return copied.requires_grad_(True)

    def member(self, index: int) -> LatentDenoiser:
        """One of the networks by itself."""
        alone = LatentDenoiser(**self.settings)
        alone.network.load_state_dict({name.replace("/", "."): tensor[index].detach() for name, tensor in self.stacked.items()})
        return alone


def stacked_data(splits: Sequence[Split]) -> Split:
    """The training sets of an ensemble's members, of equal size, as the one set that ``train`` takes."""
    return Split(torch.cat([split.images for split in splits]), None)


def member_folder(folder: Path | str, teacher: int, student: int | None = None) -> Path:
    """Where the run of a teacher, or of one of its students, is kept; both count from 1."""
    return Path(folder) / (f"teacher-{teacher}" if student is None else f"teacher-{teacher}-student-{student}")


def train_member(preset: str, folder: Path | str, teacher: int, students: int, bootstrap: bool, parameters: Mapping[str, Any]) -> None:
    """Train one teacher with the seed ``teacher``, and its students with seeds of their own; what is there already is kept.

    With ``bootstrap`` teacher and students see a bootstrap sample of the training images drawn for this teacher.
    """
    common = {"retrain": True, "guided": (False,), "sgp": False, "bootstrap": teacher if bootstrap else None, **parameters}
    run = Run(make_settings(preset, **common, seed=teacher, run_folder=str(member_folder(folder, teacher))), progress=False)
    run.teacher()
    for student in range(1, students + 1):
        # Far from the teachers' seeds, and no two students share one.
        settings = make_settings(preset, **common, seed=1000 * teacher + student, run_folder=str(member_folder(folder, teacher, student)))
        own = Run(settings, progress=False)
        weights = own.folder / "weights" / "teacher.safetensors"
        weights.parent.mkdir(exist_ok=True)
        shutil.copy(run.folder / "weights" / "teacher.safetensors", weights)
        for method in settings.methods:
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

    One after another, or over an ``executor``: a process pool, or ``distributed.Client(...).get_executor()`` for Dask. Raises SferdError
    for fewer than 2 of either, of which no variance can be estimated.
    """
    for name, count in (("teachers", teachers), ("students", students)):
        if count < 2:
            raise SferdError(f"{name} = {count}; allowed: 2 or more, since a variance needs two")
    jobs = [(preset, str(folder), teacher, students, bootstrap, parameters) for teacher in range(1, teachers + 1)]
    if executor is None:
        for job in jobs:
            train_member(*job)
    else:
        for future in [executor.submit(train_member, *job) for job in jobs]:
            future.result()


def load_members(folder: Path | str, method: str, steps: int) -> tuple[list[Denoiser], list[list[Denoiser]]]:
    """The teachers, and for each its students of ``method`` ("pd" or "cd") for ``steps`` sampling steps."""
    from sferd_lab.artifacts import load_model

    name = "cd" if method == "cd" else f"pd-{steps}"
    teachers, students = [], []
    while (path := member_folder(folder, len(teachers) + 1) / "weights" / "teacher.safetensors").exists():
        teacher = len(teachers) + 1
        teachers.append(load_model(path)[0])
        runs = sorted(Path(folder).glob(f"teacher-{teacher}-student-*"), key=lambda run: int(run.name.rsplit("-", 1)[1]))
        students.append([load_model(run / "weights" / f"{name}.safetensors")[0] for run in runs])
    if not teachers:
        raise SferdError(f"{folder} holds no teachers; allowed: the folder of a finished train_members")
    return teachers, students


def one_thread() -> None:
    """Keep a worker process to one thread: more threads than cores slow each other down."""
    torch.set_num_threads(1)


if __name__ == "__main__":
    options = parse_literals(sys.argv[3:])
    workers = options.pop("workers", 1)
    if workers == 1:
        train_members(sys.argv[1], sys.argv[2], **options)
    else:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=one_thread) as pool:
            train_members(sys.argv[1], sys.argv[2], executor=pool, **options)
