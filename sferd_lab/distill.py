"""A distillation method is a target: where the student stands, and what it should predict there.

Progressive distillation (Salimans & Ho 2022), consistency distillation (Song et al. 2023) and the targets of SFERD's semantic gradient
predictor differ only in how they make a ``Target``. Each is a class here whose call turns a batch into one; ``distillation_loss``
compares it with the student's prediction. The teacher is any ``Denoiser``, guided or exact ones included, and never receives a gradient:
it runs in inference mode, and only copies of what it made leave it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sferd_lab.denoiser import Denoiser, Prediction
from sferd_lab.diffusion import (
    Angle,
    add_noise,
    angle_grid,
    as_angle,
    ddim_step,
    heun_velocity,
    implied_velocity,
    snr,
    v_from_x0,
    x0_from_v,
)
from sferd_lab.errors import SferdError

LOSSES = ("v", "x0_snr", "l2", "pseudo_huber")
SOLVERS = ("ddim", "heun")


@dataclass(frozen=True)
class Batch:
    """One training step's draw: images ``x0`` and noise ``eps`` (B, C, H, W), ``labels`` (B,) or None, ``uniform`` (B,) in [0, 1).

    ``uniform`` decides the angle; it is stratified over the batch. ``z_noise`` (B, z_dim) perturbs semantic codes.
    """

    x0: Tensor
    eps: Tensor
    uniform: Tensor
    labels: Tensor | None = None
    z_noise: Tensor | None = None

    def part(self, index: int, count: int) -> Batch:
        """The rows that are the ``index``-th of ``count`` equal parts in order."""
        if count == 1:
            return self
        values = (getattr(self, name) for name in self.__dataclass_fields__)
        return Batch(*(None if value is None else value.chunk(count)[index] for value in values))

    def pick(self, grid: Tensor) -> tuple[Tensor, Tensor]:
        """Random neighbours (phi, psi) of a descending ``grid`` of angles, each (B,)."""
        index = (self.uniform * (len(grid) - 1)).long()
        grid = grid.to(self.x0)
        return grid[index], grid[index + 1]


@dataclass(frozen=True)
class Target:
    """At (``x``, ``phi``) under ``condition`` the student should predict ``x0``, which is the same as predicting ``v``."""

    x: Tensor
    phi: Tensor
    x0: Tensor
    v: Tensor
    condition: dict[str, Tensor] = field(default_factory=dict)


# What a batch conditions a denoiser on: labels, an image to encode, a semantic code.
Conditioner = Callable[[Batch], dict[str, Tensor]]


def on_labels(batch: Batch) -> dict[str, Tensor]:
    """Condition on the batch's labels, where it has any."""
    return {} if batch.labels is None else {"labels": batch.labels}


def halving_schedule(start: int, end: int = 1) -> list[int]:
    """The student step counts of progressive distillation from ``start`` teacher steps down to ``end``: 8 to 1 gives [4, 2, 1].

    Raises SferdError when halving ``start`` cannot reach ``end``.
    """
    stages = []
    steps = start
    while steps > end > 0 and steps % 2 == 0:
        steps //= 2
        stages.append(steps)
    if steps != end or not stages:
        raise SferdError(f"{start} steps cannot be halved to {end}; allowed: {end} times 2, 4, 8, ...")
    return stages


@dataclass(frozen=True)
class ProgressiveTarget:
    """Progressive distillation: two DDIM steps of the teacher become one step of the student, on a grid of ``steps`` student steps.

    The target velocity is the one whose single step lands where the teacher's two steps land (Salimans & Ho 2022, appendix G).
    ``teacher_condition`` and ``condition`` say what teacher and student are told.
    """

    teacher: Denoiser
    steps: int
    condition: Conditioner = on_labels
    teacher_condition: Conditioner = on_labels

    def __call__(self, batch: Batch, student: Denoiser) -> Target:
        """The target for this batch. The student is not used."""
        phi, psi = batch.pick(angle_grid(self.steps, self.teacher.phi_hi))
        middle = (phi + psi) / 2
        x = add_noise(batch.x0, batch.eps, phi)
        with torch.inference_mode():
            told = self.teacher_condition(batch)
            x_middle = ddim_step(x, self.teacher(x, phi, **told).v, phi, middle)
            x_psi = ddim_step(x_middle, self.teacher(x_middle, middle, **told).v, middle, psi)
        v = implied_velocity(x, x_psi, phi, psi)
        return Target(x, phi, x0_from_v(x, v, phi), v, self.condition(batch))


def teacher_step(teacher: Denoiser, x: Tensor, phi: Angle, psi: Angle, solver: str, **condition: Tensor) -> Tensor:
    """One step of the teacher's probability-flow ODE from phi to psi by DDIM or Heun; Heun's step to psi = 0 is DDIM's."""
    v = teacher(x, phi, **condition).v
    if solver == "heun":
        inner = as_angle(psi, x).clamp_min(teacher.phi_lo)
        x_inner = ddim_step(x, v, phi, inner)
        v_inner = teacher(x_inner, inner.flatten(), **condition).v
        v = torch.where(as_angle(psi, x) > 0, heun_velocity(v, v_inner, x_inner, phi, inner), v)
    return ddim_step(x, v, phi, psi)


@dataclass(frozen=True)
class ConsistencyTarget:
    """Consistency distillation: the student's x0 at phi should equal its own x0 one teacher step further down the same trajectory.

    ``boundaries`` intervals between phi_hi and 0, a ``solver`` step of the teacher between neighbours, and the target network f_{theta-}
    (the student itself without gradient, or its EMA) at the lower one (Song et al. 2023, algorithm 2).
    """

    teacher: Denoiser
    boundaries: int
    solver: str = "ddim"
    condition: Conditioner = on_labels
    teacher_condition: Conditioner = on_labels

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise SferdError(f"consistency solver = '{self.solver}'; allowed: {', '.join(SOLVERS)}")

    def __call__(self, batch: Batch, student: Denoiser) -> Target:
        """The target for this batch; ``student`` is the target network."""
        phi, psi = batch.pick(angle_grid(self.boundaries, self.teacher.phi_hi))
        x = add_noise(batch.x0, batch.eps, phi)
        condition = self.condition(batch)
        with torch.inference_mode():
            x_psi = teacher_step(self.teacher, x, phi, psi, self.solver, **self.teacher_condition(batch))
            x0 = student(x_psi, psi.clamp_min(student.phi_lo), **condition).x0
            x0 = torch.where(as_angle(psi, x0) > 0, x0, x_psi)  # f(x, 0) = x, also for networks that are not defined there
        x0 = x0.clone()
        return Target(x, phi, x0, v_from_x0(x, x0, phi), condition)


@dataclass(frozen=True)
class DataTarget:
    """The authors' code: the teacher's x0 at x_psi = cos(psi) x0 + sin(psi) eps, made from the *same* (x0, eps) as the student's x_phi.

    (phi, psi) are neighbours on a grid of ``steps`` sampling steps. Where psi = 0 the target is the image x0 itself.
    It depends on x0 beyond x_phi, so a code of x0 can help to predict it.
    """

    teacher: Denoiser
    steps: int
    condition: Conditioner = on_labels
    teacher_condition: Conditioner = on_labels

    def __call__(self, batch: Batch, student: Denoiser) -> Target:
        """The target for this batch. The student is not used."""
        phi, psi = batch.pick(angle_grid(self.steps, self.teacher.phi_hi))
        x = add_noise(batch.x0, batch.eps, phi)
        x0 = batch.x0
        if self.steps > 1:  # else psi is 0 in every row; told from the grid, for looking at psi on a GPU would make it wait
            with torch.inference_mode():
                inner = psi.clamp_min(max(self.teacher.phi_lo, 1e-3))
                guided = self.teacher(add_noise(batch.x0, batch.eps, inner), inner, **self.teacher_condition(batch)).x0
            x0 = torch.where(as_angle(psi, x0) > 0, guided, x0)
        return Target(x, phi, x0, v_from_x0(x, x0, phi), self.condition(batch))


def denoising_target(phi_lo: float, phi_hi: float, condition: Conditioner = on_labels) -> Callable[[Batch, Denoiser], Target]:
    """Ordinary diffusion training: the data's own velocity at angles uniform in [phi_lo, phi_hi]."""

    def target(batch: Batch, student: Denoiser) -> Target:
        phi = phi_lo + (phi_hi - phi_lo) * batch.uniform
        x = add_noise(batch.x0, batch.eps, phi)
        angle = as_angle(phi, x)
        return Target(x, phi, batch.x0, angle.cos() * batch.eps - angle.sin() * batch.x0, condition(batch))

    return target


def distillation_loss(prediction: Prediction, target: Target, loss: str) -> Tensor:
    """The distance (B,) between the student's prediction and the target.

    "v": mean squared velocity error, which equals the (1 + SNR)-weighted x0 error (the weight multiplies the square, once).
    "x0_snr": x0 error weighted by max(SNR, 1), Salimans & Ho's truncated SNR. "l2": x0 error unweighted.
    "pseudo_huber": sqrt(||d||^2 + c^2) - c over the x0 difference d with c = 0.00054 sqrt(dim) (Song & Dhariwal 2023).
    """
    if loss not in LOSSES:
        raise SferdError(f"loss = '{loss}'; allowed: {', '.join(LOSSES)}")
    if loss == "v":
        return (prediction.v - target.v).square().flatten(1).mean(1)
    squared = (prediction.x0 - target.x0).square().flatten(1)
    if loss == "pseudo_huber":
        c = 0.00054 * squared.shape[1] ** 0.5
        return (squared.sum(1) + c**2).sqrt() - c
    weight = snr(target.phi).clamp_min(1) if loss == "x0_snr" else 1.0
    return weight * squared.mean(1)
