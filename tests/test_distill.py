import math

import numpy as np
import pytest
import torch
from torch import nn

from sferd_lab.data import Mixture, two_dimensional_mixture
from sferd_lab.denoiser import Denoiser, FunctionDenoiser, MixtureDenoiser, Prediction
from sferd_lab.diffusion import HALF_PI, add_noise, angle_grid, ddim_step, velocity
from sferd_lab.distill import (
    LOSSES,
    Batch,
    ConsistencyTarget,
    DataTarget,
    ProgressiveTarget,
    Target,
    denoising_target,
    distillation_loss,
    halving_schedule,
    teacher_step,
)
from sferd_lab.errors import SferdError
from sferd_lab.sample import SAMPLERS


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tensor(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def close(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def batch(size=64, **parts):
    """Draws of the ring mixture, their angles spread over the whole grid."""
    x0, _ = two_dimensional_mixture().sample(size, torch.Generator().manual_seed(7))
    return Batch(x0, normal(size, 2, seed=8), (torch.arange(size, dtype=torch.float64) + 0.5) / size, **parts)


class Recorder(Denoiser):
    """A denoiser that keeps what it was asked."""

    def __init__(self, inner):
        super().__init__("teacher")
        self.inner, self.asked = inner, []
        self.phi_lo, self.phi_hi = inner.phi_lo, inner.phi_hi

    def predict(self, x, phi, layers=(), **condition):
        self.asked.append((x, torch.as_tensor(phi), condition))
        return self.inner(x, phi, layers, **condition)


class Composed(Denoiser):
    """The student that consistency distillation should arrive at: at a boundary, all of the teacher's remaining steps to data.

    The steps are the samplers', which are written apart from the distiller's own.
    """

    def __init__(self, teacher, boundaries, solver):
        super().__init__("student")
        self.teacher, self.solver, self.grid = teacher, solver, angle_grid(boundaries, teacher.phi_hi)

    def predict(self, x, phi, layers=(), **condition):
        x0 = x.clone()
        for angle in phi.unique():
            remaining = self.grid[self.grid <= angle + 1e-9]
            rows = phi == angle
            *_, x0[rows] = (state.x for state in SAMPLERS[self.solver](self.teacher, x[rows], remaining))
        return Prediction.from_x0(x, x0, phi)


class Learned(Denoiser):
    """One parameter that multiplies the velocity, and a condition ``z`` that shifts it."""

    def __init__(self, scale=0.7):
        super().__init__("student")
        self.scale = nn.Parameter(tensor(scale))

    def predict(self, x, phi, layers=(), z=None, labels=None):
        return Prediction.from_v(x, self.scale * x + (0 if z is None else z), phi)


# ---- one Gaussian, whose probability flow is known in closed form


MEAN, TURN, VARIANCES = tensor(0.5, -1.0), tensor(*[[0.8, -0.6], [0.6, 0.8]]), tensor(0.3, 2.0)
GAUSSIAN = MixtureDenoiser(Mixture(tensor(1.0), MEAN[None], (TURN @ VARIANCES.diag() @ TURN.T)[None], (2,)))


def flow(x, phi, psi):
    """The exact solution from phi to psi: along each eigenvector, distance from the mean scales with the standard deviation."""
    spread = [math.cos(angle) ** 2 * VARIANCES + math.sin(angle) ** 2 for angle in (phi, psi)]
    along = (x - math.cos(phi) * MEAN) @ TURN * (spread[1] / spread[0]).sqrt()
    return math.cos(psi) * MEAN + along @ TURN.T


def slope(steps, errors):
    """The measured order of convergence: error ~ steps^-slope."""
    return -np.polyfit(np.log(steps), np.log(errors), 1)[0]


def test_the_exact_denoiser_moves_along_the_closed_form_flow():
    x, phi, h = normal(6, 2), 0.8, 1e-5
    close(GAUSSIAN(x, phi).v, (flow(x, phi, phi + h) - flow(x, phi, phi - h)) / (2 * h), 1e-8)


@pytest.mark.parametrize(("phi", "psi"), [(HALF_PI, 0.0), (1.2, 0.4)])
@pytest.mark.parametrize(("solver", "order"), [("ddim", 1), ("heun", 2)])
def test_the_teachers_steps_converge_to_the_flow_at_the_order_of_the_solver(solver, order, phi, psi):
    start = normal(6, 2)
    counts, errors = (32, 64, 128, 256), []
    for steps in counts:
        x = start
        for a, b in angle_grid(steps, phi, psi).unfold(0, 2, 1):
            x = teacher_step(GAUSSIAN, x, a, b, solver)
        errors.append(float((x - flow(start, phi, psi)).abs().max()))
    assert slope(counts, errors) == pytest.approx(order, abs=0.15)


def test_heuns_last_step_to_data_is_ddims():
    x = normal(6, 2)
    close(teacher_step(GAUSSIAN, x, 0.3, 0.0, "heun"), teacher_step(GAUSSIAN, x, 0.3, 0.0, "ddim"))
    # Rows that end at data and rows that do not, in one batch.
    psi = tensor(0.0, 0.1, 0.0, 0.1, 0.0, 0.1)
    mixed = teacher_step(GAUSSIAN, x, torch.full((6,), 0.3, dtype=torch.float64), psi, "heun")
    for row in range(6):
        close(mixed[row], teacher_step(GAUSSIAN, x[row : row + 1], 0.3, float(psi[row]), "heun")[0])


def test_heun_never_asks_a_teacher_below_its_lowest_angle():
    teacher = FunctionDenoiser(lambda x, phi: 0.5 * x, "x0", phi_lo=0.05)
    x = teacher_step(teacher, normal(6, 2), torch.full((6,), 0.3, dtype=torch.float64), torch.zeros(6, dtype=torch.float64), "heun")
    close(x, 0.5 * normal(6, 2))


# ---- progressive distillation


@pytest.mark.parametrize("steps", [1, 4])
def test_one_student_step_lands_where_two_teacher_steps_land(steps):
    teacher, grid = MixtureDenoiser(two_dimensional_mixture()), angle_grid(2 * steps)
    target = ProgressiveTarget(teacher, steps)(batch(), Learned())
    for interval in range(steps):
        phi, middle, psi = grid[2 * interval : 2 * interval + 3]
        rows = target.phi == phi
        assert int(rows.sum()) == 64 // steps
        x = target.x[rows]
        half_way = ddim_step(x, teacher(x, phi).v, phi, middle)
        landed = ddim_step(half_way, teacher(half_way, middle).v, middle, psi)
        close(ddim_step(x, target.v[rows], phi, psi), landed)


@pytest.mark.parametrize("steps", [1, 2, 8])
def test_progressive_target_is_salimans_and_hos_formula(steps):
    recorder = Recorder(MixtureDenoiser(two_dimensional_mixture()))
    target = ProgressiveTarget(recorder, steps)(batch(), Learned())
    (_, phi, _), (x_middle, middle, _) = recorder.asked
    psi = (phi - HALF_PI / steps).clamp_min(0)
    x_psi = ddim_step(x_middle, recorder.inner(x_middle, middle).v, middle, psi)
    assert bool((psi < 1e-12).any())  # the formula holds at psi = 0 too, where sigma_psi = 0 and alpha_psi = 1
    alpha, sigma, alpha_psi, sigma_psi = (part[:, None] for part in (phi.cos(), phi.sin(), psi.cos(), psi.sin()))
    ratio = sigma_psi / sigma
    close(target.x0, (x_psi - ratio * target.x) / (alpha_psi - ratio * alpha))


def test_the_teacher_walks_phi_then_the_middle_then_psi():
    recorder, draw = Recorder(MixtureDenoiser(two_dimensional_mixture())), batch()
    target = ProgressiveTarget(recorder, 2)(draw, Learned())
    (x, phi, _), (x_middle, middle, _) = recorder.asked
    close(x, add_noise(draw.x0, draw.eps, phi))
    close(target.x, x)
    close(phi.unique(), tensor(HALF_PI / 2, HALF_PI))
    close(middle, phi - HALF_PI / 4)
    close(x_middle, ddim_step(x, recorder.inner(x, phi).v, phi, middle))


def test_the_walk_starts_where_the_teacher_starts():
    recorder = Recorder(FunctionDenoiser(lambda x, phi: 0.5 * x, "v", phi_hi=1.4))
    for make in (ProgressiveTarget(recorder, 2), ConsistencyTarget(recorder, 2), DataTarget(recorder, 2)):
        close(make(batch(), Learned()).phi.unique(), tensor(0.7, 1.4))


def test_a_teacher_whose_two_steps_already_agree_is_its_own_target():
    # A constant x0 makes straight walks: distillation has nothing to change.
    teacher = FunctionDenoiser(lambda x, phi: torch.full_like(x, 0.3), "x0", phi_lo=1e-3)
    close(ProgressiveTarget(teacher, 4)(batch(), Learned()).x0, torch.full((64, 2), 0.3, dtype=torch.float64))


def test_halving_schedule():
    assert halving_schedule(8) == [4, 2, 1]
    assert halving_schedule(32, 8) == [16, 8]
    assert halving_schedule(12, 3) == [6, 3]


@pytest.mark.parametrize(("start", "end"), [(6, 1), (8, 3), (1, 1), (2, 4), (0, 1), (0, -1), (8, 0)])
def test_step_counts_that_halving_cannot_reach_are_refused(start, end):
    with pytest.raises(SferdError, match=rf"{start} steps cannot be halved to {end}; allowed: .* times 2, 4, 8"):
        halving_schedule(start, end)


# ---- consistency distillation


@pytest.mark.parametrize("solver", ["ddim", "heun"])
def test_the_composed_teacher_is_consistencys_fixed_point(solver):
    teacher = MixtureDenoiser(two_dimensional_mixture(std=0.3))
    student = Composed(teacher, 8, solver)
    target = ConsistencyTarget(teacher, 8, solver)(batch(), student)
    assert len(target.phi.unique()) == 8
    close(target.x0, student(target.x, target.phi).x0)
    close(target.v, student(target.x, target.phi).v)


@pytest.mark.parametrize(("solver", "order"), [("ddim", 1), ("heun", 2)])
def test_consistencys_fixed_point_converges_to_the_end_of_the_flow(solver, order):
    start = Batch(normal(6, 2), normal(6, 2, seed=1), torch.zeros(6, dtype=torch.float64))  # uniform = 0 is phi = pi/2
    counts, errors = (16, 32, 64, 128), []
    for boundaries in counts:
        target = ConsistencyTarget(GAUSSIAN, boundaries, solver)(start, Composed(GAUSSIAN, boundaries, solver))
        errors.append(float((target.x0 - flow(start.eps, HALF_PI, 0.0)).abs().max()))
    assert slope(counts, errors) == pytest.approx(order, abs=0.2)
    assert errors[0] > 1e-3  # on a coarse grid the fixed point is not the flow


def test_in_the_last_interval_the_teacher_alone_decides():
    # f(x, 0) = x by construction: no student, however wrong, can change the target there.
    last = Batch(normal(5, 2), normal(5, 2, seed=1), torch.full((5,), 0.99, dtype=torch.float64))
    targets = [ConsistencyTarget(GAUSSIAN, 4)(last, Learned(scale)) for scale in (0.0, 50.0)]
    close(targets[0].x0, targets[1].x0)
    close(targets[0].x0, GAUSSIAN(targets[0].x, targets[0].phi).x0)


def test_where_the_walk_ends_the_student_is_not_asked_if_it_is_not_defined_there():
    ring = MixtureDenoiser(two_dimensional_mixture("ring"))
    nonsense = FunctionDenoiser(lambda x, phi: torch.full_like(x, 7.0), "x0", phi_lo=0.05)
    drawn = batch()
    target = ConsistencyTarget(ring, 4)(drawn, nonsense)
    grid = angle_grid(4, ring.phi_hi).to(drawn.x0)
    last = target.phi < grid[2]
    assert 0 < last.sum() < len(last)
    close(target.x0[last], teacher_step(ring, target.x[last], grid[3], grid[4], "ddim"))
    assert (target.x0[~last] == 7).all()


def test_consistency_asks_the_student_one_boundary_further_down():
    student = Recorder(Learned())
    target = ConsistencyTarget(GAUSSIAN, 8)(batch(), student)
    ((x_psi, psi, _),) = student.asked
    close(psi, target.phi - HALF_PI / 8)
    close(x_psi, ddim_step(target.x, GAUSSIAN(target.x, target.phi).v, target.phi, psi))


def test_an_unknown_solver_is_refused():
    with pytest.raises(SferdError, match="consistency solver = 'euler'; allowed: ddim, heun"):
        ConsistencyTarget(GAUSSIAN, 8, "euler")


@pytest.mark.parametrize("make", [ProgressiveTarget, ConsistencyTarget, DataTarget])
def test_a_target_needs_a_step(make):
    with pytest.raises(SferdError, match="steps = 0; allowed: 1 or more"):
        make(GAUSSIAN, 0)(batch(), Learned())


# ---- the data target, and ordinary training


def test_data_target_is_the_teacher_at_psi_on_the_same_image_and_noise():
    draw, teacher = batch(), MixtureDenoiser(two_dimensional_mixture())
    target = DataTarget(teacher, 4)(draw, Learned())
    psi = target.phi - HALF_PI / 4
    inside = psi > 1e-9
    assert 0 < int(inside.sum()) < 64
    close(target.x, add_noise(draw.x0, draw.eps, target.phi))
    close(target.x0[inside], teacher(add_noise(draw.x0, draw.eps, psi.clamp_min(0)), psi.clamp_min(0)).x0[inside])
    close(target.x0[~inside], draw.x0[~inside])


def test_with_one_step_the_data_target_is_the_image_and_asks_no_teacher():
    recorder, draw = Recorder(GAUSSIAN), batch()
    target = DataTarget(recorder, 1)(draw, Learned())
    assert torch.equal(target.x0, draw.x0)
    assert recorder.asked == []
    close(target.x, draw.eps)


def test_data_target_keeps_a_singular_teacher_above_its_lowest_angle():
    teacher = FunctionDenoiser(lambda x, phi: 0.5 * x, "x0", phi_lo=0.05)
    draw = batch()
    target = DataTarget(teacher, 2)(draw, Learned())
    assert bool(target.x0.isfinite().all())
    last = target.phi < 1
    close(target.x0[last], draw.x0[last])


def test_ordinary_training_targets_the_datas_own_velocity():
    draw = batch()
    target = denoising_target(0.1, 1.5)(draw, Learned())
    close(target.phi, 0.1 + 1.4 * draw.uniform)
    close(target.v, velocity(draw.x0, draw.eps, target.phi))
    assert target.x0 is draw.x0


@pytest.mark.parametrize(
    "make",
    [ProgressiveTarget(GAUSSIAN, 4), ConsistencyTarget(GAUSSIAN, 4, "heun"), DataTarget(GAUSSIAN, 4), denoising_target(0.1, HALF_PI)],
)
def test_a_targets_x0_and_v_say_the_same(make):
    target = make(batch(), Learned())
    close(target.x0, Prediction.from_v(target.x, target.v, target.phi).x0)


# ---- what each side is told, and where gradients stop


def make_targets(teacher, **conditions):
    return (
        ProgressiveTarget(teacher, 4, **conditions),
        ConsistencyTarget(teacher, 4, "ddim", **conditions),
        ConsistencyTarget(teacher, 4, "heun", **conditions),
        DataTarget(teacher, 4, **conditions),
    )


@pytest.mark.parametrize("which", range(4), ids=["progressive", "consistency", "consistency-heun", "data"])
def test_the_teacher_gets_no_gradient_and_the_target_carries_none(which):
    teacher, student = Learned(0.4), Learned(0.7)
    target = make_targets(teacher)[which](batch(), student)
    assert not any(part.requires_grad for part in (target.x, target.phi, target.x0, target.v))
    distillation_loss(student(target.x, target.phi), target, "v").mean().backward()
    assert teacher.scale.grad is None
    # The student's gradient is that of the loss with its target held fixed.
    held = Target(target.x, target.phi, target.x0.clone(), target.v.clone())
    alone = Learned(0.7)
    distillation_loss(alone(held.x, held.phi), held, "v").mean().backward()
    assert float(alone.scale.grad.abs()) > 0
    close(student.scale.grad, alone.scale.grad)


@pytest.mark.parametrize("which", range(4), ids=["progressive", "consistency", "consistency-heun", "data"])
def test_the_students_condition_keeps_its_gradient(which):
    # The semantic encoder learns through the condition; the target made with it must not carry its gradient.
    z = torch.full((64, 2), 0.2, dtype=torch.float64, requires_grad=True)
    told = {"condition": lambda batch: {"z": z}, "teacher_condition": lambda batch: {}}
    student = Learned()
    target = make_targets(GAUSSIAN, **told)[which](batch(), student)
    assert target.condition["z"] is z
    assert not target.x0.requires_grad
    distillation_loss(student(target.x, target.phi, **target.condition), target, "v").mean().backward()
    assert float(z.grad.abs().max()) > 0


@pytest.mark.parametrize("which", range(4), ids=["progressive", "consistency", "consistency-heun", "data"])
def test_teacher_and_student_are_each_told_their_own_condition(which):
    teacher, student = Recorder(Learned()), Recorder(Learned())
    told = {"condition": lambda batch: {"z": tensor(1.0)}, "teacher_condition": lambda batch: {"z": tensor(2.0)}}
    target = make_targets(teacher, **told)[which](batch(), student)
    assert {float(condition["z"]) for _, _, condition in teacher.asked} == {2.0}
    assert {float(condition["z"]) for _, _, condition in student.asked} <= {1.0}
    assert float(target.condition["z"]) == 1.0


@pytest.mark.parametrize("which", range(4), ids=["progressive", "consistency", "consistency-heun", "data"])
def test_labels_are_told_to_both_unless_there_are_none(which):
    labels = torch.arange(64)
    for given, expected in ((labels, {"labels": labels}), (None, {})):
        teacher = Recorder(Learned())
        target = make_targets(teacher)[which](batch(labels=given), Learned())
        assert all(condition == expected for _, _, condition in [*teacher.asked, (None, None, target.condition)])


# ---- losses


PHI = tensor(0.05, 0.3, HALF_PI / 2, 1.2, 1.5)


def prediction_and_target():
    x = normal(5, 1, 2, 2)
    said = Prediction.from_v(x, normal(5, 1, 2, 2, seed=1), PHI)
    wanted = Prediction.from_v(x, normal(5, 1, 2, 2, seed=2), PHI)
    return said, Target(x, PHI, wanted.x0, wanted.v)


def test_v_loss_is_the_x0_loss_weighted_once_by_one_plus_snr():
    said, target = prediction_and_target()
    snr = PHI.cos() ** 2 / PHI.sin() ** 2
    close(distillation_loss(said, target, "v"), (1 + snr) * (said.x0 - target.x0).square().mean((1, 2, 3)))


def test_x0_snr_loss_is_weighted_by_snr_truncated_at_one():
    said, target = prediction_and_target()
    weight = torch.maximum(PHI.cos() ** 2 / PHI.sin() ** 2, torch.ones(5, dtype=torch.float64))
    assert weight.tolist()[3:] == [1.0, 1.0]
    close(distillation_loss(said, target, "x0_snr"), weight * (said.x0 - target.x0).square().mean((1, 2, 3)))


def test_l2_loss_is_the_unweighted_x0_loss():
    said, target = prediction_and_target()
    close(distillation_loss(said, target, "l2"), (said.x0 - target.x0).square().mean((1, 2, 3)))


def test_pseudo_huber_loss_is_its_formula():
    said, target = prediction_and_target()
    c = 0.00054 * math.sqrt(4)  # four pixels
    distance = (said.x0 - target.x0).flatten(1).norm(dim=1)
    close(distillation_loss(said, target, "pseudo_huber"), (distance**2 + c**2).sqrt() - c)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_is_zero_and_flat_at_the_target(loss):
    _, target = prediction_and_target()
    v = target.v.clone().requires_grad_()
    losses = distillation_loss(Prediction.from_v(target.x, v, PHI), target, loss)
    assert losses.shape == (5,)
    losses.sum().backward()
    close(losses.detach(), torch.zeros(5, dtype=torch.float64))
    close(v.grad, torch.zeros_like(v))


def test_pseudo_huber_is_flat_at_the_target_and_a_distance_far_from_it():
    def of(distance):
        x0 = torch.full((1, 4), distance / 2, dtype=torch.float64)  # of norm `distance`
        zero = torch.zeros(1, 4, dtype=torch.float64)
        return float(distillation_loss(Prediction(x0, zero, zero), Target(zero, tensor(1.0), zero, zero), "pseudo_huber"))

    c = 0.00054 * 2
    assert of(1e-5) == pytest.approx(1e-10 / (2 * c), rel=1e-3)
    assert of(10.0) == pytest.approx(10 - c, rel=1e-6)


def test_an_unknown_loss_is_refused():
    said, target = prediction_and_target()
    with pytest.raises(SferdError, match="loss = 'lpips'; allowed: v, x0_snr, l2, pseudo_huber"):
        distillation_loss(said, target, "lpips")


@pytest.mark.parametrize("make", [lambda t: ProgressiveTarget(t, 2), lambda t: ConsistencyTarget(t, 4), lambda t: DataTarget(t, 2)])
def test_the_teacher_runs_in_inference_mode_and_the_target_is_ordinary_tensors(make):
    seen = []

    def velocity_of(x, phi):
        seen.append(torch.is_inference_mode_enabled())
        return 0.5 * x

    batch = Batch(torch.zeros(4, 1, 2, 2), torch.ones(4, 1, 2, 2), torch.arange(4) / 4)
    target = make(FunctionDenoiser(velocity_of, "v"))(batch, FunctionDenoiser(lambda x, phi: 0.1 * x, "v"))
    assert seen
    assert all(seen)
    # An inference tensor could not be saved for the student's backward pass.
    assert not any(tensor.is_inference() for tensor in (target.x, target.phi, target.x0, target.v))
