import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sferd_lab.diffusion import (
    HALF_PI,
    add_noise,
    angle_grid,
    as_angle,
    ddim_step,
    ddpm_step,
    eps_from_v,
    heun_velocity,
    implied_velocity,
    log_snr,
    phi_from_alpha_bar,
    phi_from_log_snr,
    phi_from_sigma,
    snr,
    v_from_eps,
    v_from_x0,
    velocity,
    x0_from_v,
)
from sferd_lab.errors import SferdError

# Every angle, and the angles at which no conversion divides by a sine or cosine below 0.05 (which would cost digits).
ANGLES = torch.linspace(0, HALF_PI, 33, dtype=torch.float64)
inner = st.floats(0.05, HALF_PI - 0.05)
values = st.lists(st.floats(-5, 5), min_size=6, max_size=6)


def pair(a, b):
    return torch.tensor(a, dtype=torch.float64).reshape(2, 3), torch.tensor(b, dtype=torch.float64).reshape(2, 3)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ---- the forward process and its conversions


def test_alpha_squared_plus_sigma_squared_is_one():
    one, zero = torch.ones(33, 1, dtype=torch.float64), torch.zeros(33, 1, dtype=torch.float64)
    alpha, sigma = add_noise(one, zero, ANGLES), add_noise(zero, one, ANGLES)
    close(alpha**2 + sigma**2, one)
    close(alpha[[0, -1]], torch.tensor([[1.0], [0.0]], dtype=torch.float64))  # data at 0, noise at pi/2
    assert bool((alpha.diff(dim=0) < 0).all())
    assert bool((sigma.diff(dim=0) > 0).all())


@settings(max_examples=50, deadline=None)
@given(values, values, inner)
def test_x0_eps_and_v_say_the_same_in_every_direction(a, b, phi):
    x0, eps = pair(a, b)
    x, v = add_noise(x0, eps, phi), velocity(x0, eps, phi)
    close(x0_from_v(x, v, phi), x0)
    close(eps_from_v(x, v, phi), eps)
    close(v_from_x0(x, x0, phi), v, 1e-10)
    close(v_from_eps(x, eps, phi), v, 1e-10)


@settings(max_examples=50, deadline=None)
@given(values, values, st.sampled_from([0.0, HALF_PI]))
def test_conversions_from_v_are_exact_at_both_ends(a, b, phi):
    x0, eps = pair(a, b)
    x, v = add_noise(x0, eps, phi), velocity(x0, eps, phi)
    close(x0_from_v(x, v, phi), x0)
    close(eps_from_v(x, v, phi), eps)


def test_at_zero_the_image_is_x_whatever_the_velocity():
    x = normal(4, 3)
    assert torch.equal(x0_from_v(x, normal(4, 3, seed=1), 0.0), x)


@pytest.mark.parametrize("phi", [0.0, 0.4, 1.1, HALF_PI])
def test_v_is_the_derivative_of_x_phi(phi):
    x0, eps, h = normal(5, 2), normal(5, 2, seed=1), 1e-5
    # add_noise refuses angles outside [0, pi/2]: one-sided second-order differences at the two ends.
    inwards = -1 if phi == HALF_PI else 1
    x = [add_noise(x0, eps, phi + inwards * k * h) for k in range(3)]
    slope = inwards * (-3 * x[0] + 4 * x[1] - x[2]) / (2 * h)
    close(velocity(x0, eps, phi), slope, 1e-8)


def test_one_angle_for_each_row_is_the_same_as_row_by_row():
    x0, eps, phi = normal(4, 1, 2, 2), normal(4, 1, 2, 2, seed=1), torch.tensor([0.1, 0.7, 1.2, 1.5], dtype=torch.float64)
    together = add_noise(x0, eps, phi)
    for row in range(4):
        close(together[row : row + 1], add_noise(x0[row : row + 1], eps[row : row + 1], float(phi[row])))


def test_as_angle_is_idempotent_and_takes_the_dtype_of_x():
    x, phi = normal(3, 1, 2, 2).float(), torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    angle = as_angle(phi, x)
    assert angle.shape == (3, 1, 1, 1)
    assert angle.dtype == torch.float32
    assert torch.equal(as_angle(angle, x), angle)


def test_a_python_angle_keeps_its_digits():
    assert float(as_angle(0.7, normal(1, 1))) == 0.7


# ---- other schedules are maps to the angle


def test_log_snr_and_its_inverse():
    phi = ANGLES[1:-1]
    close(phi_from_log_snr(log_snr(phi)), phi)
    close(log_snr(phi), (phi.cos() ** 2 / phi.sin() ** 2).log())
    close(snr(phi), log_snr(phi).exp(), 1e-10)
    # The clip of log-SNR to [-20, 20] in the authors' code.
    close(phi_from_log_snr(torch.tensor(20.0, dtype=torch.float64)), torch.tensor(math.atan(math.exp(-10)), dtype=torch.float64))


def test_infinite_log_snr_is_the_end_of_the_angle():
    ends = phi_from_log_snr(torch.tensor([math.inf, -math.inf], dtype=torch.float64))
    close(ends, torch.tensor([0.0, HALF_PI], dtype=torch.float64))


def test_ddpm_alpha_bar_maps_to_the_angle():
    alpha_bar = torch.linspace(0, 1, 11, dtype=torch.float64)
    phi = phi_from_alpha_bar(alpha_bar)
    close(phi.cos() ** 2, alpha_bar)
    close(phi.sin() ** 2, 1 - alpha_bar)


def test_edm_sigma_maps_to_the_angle_up_to_the_scale_of_x():
    sigma = torch.tensor([0.002, 0.5, 1.0, 80.0], dtype=torch.float64)
    x0, eps = normal(4, 3), normal(4, 3, seed=1)
    phi = phi_from_sigma(sigma)
    close(add_noise(x0, eps, phi), phi.cos()[:, None] * (x0 + sigma[:, None] * eps))
    close(phi_from_sigma(torch.tensor(1.0, dtype=torch.float64)), torch.tensor(HALF_PI / 2, dtype=torch.float64))


def test_angle_grid_descends_from_noise_to_data_in_equal_steps():
    grid = angle_grid(7)
    assert grid.dtype == torch.float64
    assert len(grid) == 8
    assert float(grid[0]) == HALF_PI
    assert float(grid[-1]) == 0.0
    close(grid.diff(), torch.full((7,), -HALF_PI / 7, dtype=torch.float64))
    close(angle_grid(2, 1.0, 0.5), torch.tensor([1.0, 0.75, 0.5], dtype=torch.float64))


def test_halving_a_grid_keeps_every_second_angle():
    # What makes a stage of progressive distillation start where the last one ended.
    close(angle_grid(4), angle_grid(8)[::2])


# ---- steps


@settings(max_examples=50, deadline=None)
@given(values, values, inner, st.floats(0, 0.99))
def test_a_ddim_step_keeps_x0_and_eps_and_changes_their_mix(a, b, phi, fraction):
    x0, eps = pair(a, b)
    psi = phi * fraction
    close(ddim_step(add_noise(x0, eps, phi), velocity(x0, eps, phi), phi, psi), add_noise(x0, eps, psi))


@pytest.mark.parametrize("psi", [0.0, 0.3, 0.9])
def test_the_implied_velocity_is_the_ddim_step_solved_for_v(psi):
    x, v = normal(4, 3), normal(4, 3, seed=1)
    close(implied_velocity(x, ddim_step(x, v, 1.3, psi), 1.3, psi), v)


def test_heun_changes_nothing_where_the_predicted_x0_and_eps_do_not_change():
    # The two velocities differ by the frame they are written in; averaged without turning one of them they would not give v.
    x0, eps, phi, psi = normal(4, 3), normal(4, 3, seed=1), 1.3, 0.4
    v1, v2 = velocity(x0, eps, phi), velocity(x0, eps, psi)
    close(heun_velocity(v1, v2, add_noise(x0, eps, psi), phi, psi), v1)


@pytest.mark.parametrize(("phi", "psi"), [(HALF_PI, 1.2), (1.2, 0.7), (0.7, 0.05), (0.05, 0.0), (HALF_PI, 0.0)])
def test_an_ancestral_step_from_q_of_x_phi_lands_on_q_of_x_psi(phi, psi):
    # Both marginals are Gaussian given x0, so agreement of mean and variance is agreement. The step is linear: read off its coefficients.
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    on_x, on_x0, on_noise = (float(ddpm_step(*parts, phi, psi)) for parts in ((one, zero, zero), (zero, one, zero), (zero, zero, one)))
    assert on_x * math.cos(phi) + on_x0 == pytest.approx(math.cos(psi), abs=1e-12)
    assert on_x**2 * math.sin(phi) ** 2 + on_noise**2 == pytest.approx(math.sin(psi) ** 2, abs=1e-12)


# ---- the same as diffusers


def load_scheduler(name, prediction, spacing, **options):
    diffusers = pytest.importorskip("diffusers")
    scheduler = getattr(diffusers, name)(
        num_train_timesteps=100, beta_end=0.1, prediction_type=prediction, timestep_spacing=spacing, clip_sample=False, **options
    )
    # float64, so that a difference means another formula and not another rounding.
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.set_timesteps(10)
    return scheduler


def angle_of(scheduler, timestep):
    """The angle at ``timestep``; a step below 0 is data."""
    return phi_from_alpha_bar(scheduler.alphas_cumprod[timestep]) if timestep >= 0 else torch.tensor(0.0, dtype=torch.float64)


PREDICTIONS = {"v_prediction": lambda x, out, phi: out, "epsilon": v_from_eps, "sample": v_from_x0}
each_prediction_and_spacing = pytest.mark.parametrize(
    ("prediction", "spacing"), [(p, s) for p in PREDICTIONS for s in ("leading", "trailing", "linspace")]
)


@each_prediction_and_spacing
def test_ddim_walks_with_diffusers(prediction, spacing):
    scheduler = load_scheduler("DDIMScheduler", prediction, spacing, set_alpha_to_one=True)
    scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    x = normal(3, 1, 2, 2)
    for timestep in scheduler.timesteps.tolist():
        output = normal(3, 1, 2, 2, seed=timestep + 1)  # what the network would say
        phi, psi = angle_of(scheduler, timestep), angle_of(scheduler, timestep - 10)
        ours = ddim_step(x, PREDICTIONS[prediction](x, output, phi), phi, psi)
        close(ours, scheduler.step(output, timestep, x, eta=0.0).prev_sample, 1e-9)
        x = ours


@each_prediction_and_spacing
def test_ddpm_walks_with_diffusers(prediction, spacing):
    scheduler = load_scheduler("DDPMScheduler", prediction, spacing, variance_type="fixed_small")
    scheduler.one = scheduler.one.double()
    x = normal(3, 1, 2, 2)
    for timestep in scheduler.timesteps.tolist():
        output, noise = normal(3, 1, 2, 2, seed=timestep + 1), normal(3, 1, 2, 2, seed=timestep + 1000)
        phi, psi = angle_of(scheduler, timestep), angle_of(scheduler, int(scheduler.previous_timestep(timestep)))
        x0 = x0_from_v(x, PREDICTIONS[prediction](x, output, phi), phi)
        ours = ddpm_step(x, x0, noise, phi, psi)
        # The same seed makes the scheduler draw the same noise.
        theirs = scheduler.step(output, timestep, x, generator=torch.Generator().manual_seed(timestep + 1000)).prev_sample
        close(ours, theirs, 1e-9)
        x = ours


def test_ddim_starts_from_pure_noise_with_diffusers():
    scheduler = load_scheduler("DDIMScheduler", "v_prediction", "trailing", rescale_betas_zero_snr=True)
    scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    x, v = normal(3, 4), normal(3, 4, seed=1)
    assert float(angle_of(scheduler, 99)) == pytest.approx(HALF_PI)
    close(ddim_step(x, v, HALF_PI, angle_of(scheduler, 89)), scheduler.step(v, 99, x).prev_sample, 1e-9)


# ---- bad input


@pytest.mark.parametrize("phi", [-0.01, 1.6, math.nan, torch.tensor([0.5, 2.0])])
def test_an_angle_outside_0_to_half_pi_is_refused(phi):
    with pytest.raises(SferdError, match=r"phi runs from .* allowed: 0 \(data\) to pi/2 = 1.5708"):
        add_noise(normal(2, 3), normal(2, 3), phi)


def test_angles_that_do_not_match_the_rows_are_refused():
    with pytest.raises(SferdError, match=r"phi has shape \(3,\); allowed: a number, or one angle for each of the 2 rows"):
        add_noise(normal(2, 4), normal(2, 4), torch.full((3,), 0.5))
    with pytest.raises(SferdError, match=r"phi has shape \(2, 2\)"):
        add_noise(normal(2, 4, 4), normal(2, 4, 4), torch.full((2, 2), 0.5))


@pytest.mark.parametrize("psi", [0.5, 0.7])
@pytest.mark.parametrize(
    "step",
    [
        lambda x, psi: ddim_step(x, x, 0.5, psi),
        lambda x, psi: implied_velocity(x, x, 0.5, psi),
        lambda x, psi: ddpm_step(x, x, x, 0.5, psi),
    ],
    ids=["ddim", "implied", "ddpm"],
)
def test_a_step_that_does_not_remove_noise_is_refused(step, psi):
    with pytest.raises(SferdError, match=rf"must go down in noise: psi = \[{psi}\] is not below phi = \[0.5\]"):
        step(normal(2, 3), psi)


def test_one_row_that_does_not_go_down_is_enough_to_refuse():
    with pytest.raises(SferdError, match="must go down in noise"):
        ddim_step(normal(2, 3), normal(2, 3), torch.tensor([0.5, 0.5]), torch.tensor([0.4, 0.6]))


@pytest.mark.parametrize("steps", [0, -3])
def test_a_grid_needs_a_step(steps):
    with pytest.raises(SferdError, match=f"steps = {steps}; allowed: 1 or more"):
        angle_grid(steps)


@pytest.mark.parametrize(("phi_hi", "phi_lo"), [(1.0, 1.0), (0.5, 0.7), (1.7, 0.0), (1.0, -0.1), (math.nan, 0.0)])
def test_a_grid_needs_ordered_angles(phi_hi, phi_lo):
    with pytest.raises(SferdError, match=rf"phi_lo = {phi_lo}, phi_hi = {phi_hi}; allowed: 0 <= phi_lo < phi_hi <= pi/2"):
        angle_grid(4, phi_hi, phi_lo)
