import itertools
import math
from collections import Counter

import pytest
import torch

from sferd_lab.data import Mixture, two_dimensional_mixture
from sferd_lab.denoiser import FunctionDenoiser, MixtureDenoiser
from sferd_lab.diffusion import HALF_PI, angle_grid, ddim_step
from sferd_lab.errors import SferdError
from sferd_lab.sample import SAMPLERS, SampleNoise, consistency, ddpm, heun, sample, sampler_by_name

STOCHASTIC = ("ddpm", "consistency")


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def ring():
    return MixtureDenoiser(two_dimensional_mixture(std=0.3))


def walk(method, denoiser, x, grid, seed=0, **condition):
    return list(SAMPLERS[method](denoiser, x, grid, SampleNoise(seed, len(x)), **condition))


class BulkNoise:
    """Standard normal noise from one stream: quick for many rows, where no row needs a stream of its own."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self, shape, like):
        return torch.randn(like.shape, generator=self.generator, dtype=like.dtype)


# ---- the walk


@pytest.mark.parametrize("method", SAMPLERS)
def test_a_sampler_yields_its_start_and_every_step_down_to_data(method):
    x, grid = normal(3, 2), angle_grid(5)
    states = walk(method, ring(), x, grid)
    assert [state.step for state in states] == [0, 1, 2, 3, 4, 5]
    assert [state.phi for state in states] == grid.tolist()
    assert all(a.phi > b.phi for a, b in itertools.pairwise(states))
    assert states[0].x is x
    assert states[0].prediction is None
    assert all(state.prediction.x0.shape == state.x.shape == (3, 2) for state in states[1:])


@pytest.mark.parametrize(("method", "evaluations"), [("ddim", 6), ("heun", 11), ("ddpm", 6), ("consistency", 6)])
def test_network_evaluations_of_six_steps(method, evaluations):
    denoiser = ring()
    walk(method, denoiser, normal(3, 2), angle_grid(6))
    assert denoiser.nfe() == Counter(exact=evaluations)
    # Each sample pays once, however many batches there were and whatever came before.
    assert sample(denoiser, 5, (2,), 6, method=method, batch_size=2).nfe == {"exact": evaluations}


def test_heun_pays_twice_for_a_last_step_that_does_not_end_at_data():
    denoiser = ring()
    walk("heun", denoiser, normal(3, 2), angle_grid(6, HALF_PI, 0.1))
    assert denoiser.nfe() == Counter(exact=12)


@pytest.mark.parametrize("method", SAMPLERS)
def test_a_walk_to_data_ends_at_the_last_predicted_image(method):
    *_, last = walk(method, ring(), normal(3, 2), angle_grid(4))
    close(last.x, last.prediction.x0)


@pytest.mark.parametrize("method", ["ddim", "heun"])
def test_the_path_does_not_matter_where_the_predicted_image_is_fixed(method):
    # a -> b -> c is a -> c.
    denoiser = FunctionDenoiser(lambda x, phi: torch.full_like(x, 0.4), "x0", phi_lo=1e-3)
    x = normal(3, 2)
    once, often = (walk(method, denoiser, x, angle_grid(steps, 1.5, 0.2))[-1].x for steps in (1, 7))
    close(often, once)
    uneven = walk(method, denoiser, x, torch.tensor([1.5, 1.4, 0.3, 0.2], dtype=torch.float64))[-1].x
    close(uneven, once)


def test_samplers_start_where_the_denoiser_starts():
    asked = []

    def function(x, phi):
        asked.append(float(phi))
        return x

    sample(FunctionDenoiser(function, "eps", phi_hi=1.4), 2, (3,), 4)
    close(torch.tensor(asked), torch.tensor([1.4, 1.05, 0.7, 0.35]), 1e-6)


def test_a_grid_of_ones_own_is_walked():
    asked = []

    def function(x, phi):
        asked.append(float(phi))
        return x

    sample(FunctionDenoiser(function, "v"), 2, (3,), 2, grid=torch.tensor([1.5, 0.9, 0.2], dtype=torch.float64))
    assert asked == [1.5, 0.9]


# ---- noise


@pytest.mark.parametrize("method", SAMPLERS)
def test_sample_i_is_the_same_in_any_batch_size(method):
    one, three, all_at_once = (sample(ring(), 7, (2,), 4, method=method, batch_size=size).images for size in (1, 3, 100))
    close(one, all_at_once, 1e-4)  # float32, and the batch size changes the order of additions
    close(three, all_at_once, 1e-4)
    assert torch.pdist(one).min() > 1e-3  # and no two samples are the same


@pytest.mark.parametrize("method", SAMPLERS)
def test_more_samples_leave_the_first_as_they_were(method):
    close(sample(ring(), 9, (2,), 4, method=method).images[:4], sample(ring(), 4, (2,), 4, method=method).images, 1e-4)


@pytest.mark.parametrize("method", SAMPLERS)
def test_a_seed_decides_the_samples(method):
    first, again, other = (sample(ring(), 4, (2,), 4, method=method, seed=seed).images for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert (first - other).abs().amax(1).min() > 1e-3


def test_noise_streams_are_standard_normal_and_independent():
    noise = SampleNoise(0, 200)
    draws = torch.stack([noise.draw((50,)) for _ in range(4)], dim=1).double()  # (row, draw, element)
    flat = draws.flatten()
    assert abs(float(flat.mean())) < 4 / len(flat) ** 0.5
    assert abs(float(flat.var()) - 1) < 4 * (2 / len(flat)) ** 0.5
    for a, b in (
        (draws[:-1], draws[1:]),  # neighbouring rows
        (draws[:, :-1], draws[:, 1:]),  # successive draws
        (draws[:, 0], SampleNoise(1, 200).draw((50,)).double()),  # seeds
        (draws[:, 0], SampleNoise(0, 200, purpose=1).draw((50,)).double()),  # images and codes
    ):
        assert abs(float((a * b).mean())) < 4 / a.numel() ** 0.5


def test_row_i_of_the_noise_is_the_stream_of_sample_first_plus_i():
    assert torch.equal(SampleNoise(3, 5).draw((4,))[2:], SampleNoise(3, 3, first=2).draw((4,)))


def test_noise_takes_the_dtype_of_x():
    assert SampleNoise(0, 2).draw((3,), normal(2, 3)).dtype == torch.float64


@pytest.mark.parametrize("method", STOCHASTIC)
def test_stochastic_samplers_draw_from_their_noise_and_the_others_do_not(method):
    x, grid = normal(3, 2), angle_grid(4)
    runs = [walk(method, ring(), x, grid, seed=seed)[-1].x for seed in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1])
    assert (runs[0] - runs[2]).abs().amax(1).min() > 1e-3
    for deterministic in ("ddim", "heun"):
        assert torch.equal(*(walk(deterministic, ring(), x, grid, seed=seed)[-1].x for seed in (0, 1)))


def test_consistency_sampling_adds_fresh_noise_at_every_step():
    noise, reference = SampleNoise(0, 3), SampleNoise(0, 3)
    x, *fresh = (reference.draw((2,), normal(3, 2)) for _ in range(3))
    states = list(consistency(ring(), noise.draw((2,), normal(3, 2)), angle_grid(3), noise))
    close(states[0].x, x)
    for state, expected in zip(states[1:3], fresh, strict=True):
        used = (state.x - math.cos(state.phi) * state.prediction.x0) / math.sin(state.phi)
        close(used, expected)
        assert (used - x).abs().amax(1).min() > 1e-3


def test_the_last_ancestral_step_adds_no_noise():
    one, other = (walk("ddpm", ring(), normal(3, 2), angle_grid(1), seed=seed)[-1].x for seed in (0, 1))
    close(one, other)


# ---- on one Gaussian


MEAN, VARIANCE = torch.tensor([0.5, -1.0], dtype=torch.float64), torch.tensor([0.3, 2.0], dtype=torch.float64)
GAUSSIAN = Mixture(torch.ones(1, dtype=torch.float64), MEAN[None], VARIANCE[None], (2,))


@pytest.mark.parametrize("method", ["ddim", "heun"])
def test_deterministic_samplers_turn_noise_into_the_gaussian(method):
    # Noise whose sample mean is 0 and sample covariance is I, exactly: the map is affine, so the moments come out exactly too.
    x = normal(1000, 2)
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / len(x))).T
    *_, last = walk(method, MixtureDenoiser(GAUSSIAN), x, angle_grid(400))
    # An affine step keeps a mean on its path whatever the step's length; the spread is right to first order, 1 / 400.
    close(last.x.mean(0), MEAN)
    close(last.x.T.cov(correction=0), VARIANCE.diag(), 0.01)


def ancestral_variance(alpha_bar):
    """The variance that Ho et al.'s chain (equations 6, 7; in their beta) leaves when the data are N(MEAN, VARIANCE), from pure noise."""
    variance = torch.ones(2, dtype=torch.float64)
    for now, before in itertools.pairwise(alpha_bar.tolist()):
        beta = 1 - now / before
        gain = VARIANCE * now**0.5 / (now * VARIANCE + 1 - now)  # of E[x0 | x] in x
        factor = (before**0.5 * beta * gain + (1 - beta) ** 0.5 * (1 - before)) / (1 - now)
        variance = factor**2 * variance + (1 - before) / (1 - now) * beta
    return variance


def test_ancestral_sampling_turns_noise_into_the_gaussian():
    n, grid = 20_000, angle_grid(100)
    *_, last = ddpm(MixtureDenoiser(GAUSSIAN), normal(n, 2), grid, BulkNoise(1))
    # Of the chain's own variance: each step leaves out the spread of x0 given x, so 100 steps stay a few per cent below the data's.
    expected = ancestral_variance(grid.cos() ** 2)
    assert bool(((last.x.mean(0) - MEAN).abs() < 4 * (expected / n).sqrt()).all())
    assert bool(((last.x.var(0) - expected).abs() < 4 * expected * (2 / n) ** 0.5).all())
    assert abs(float(last.x.T.cov()[0, 1])) < 4 * float((expected.prod() / n).sqrt())


def test_the_ancestral_chain_approaches_the_data_at_first_order():
    bias = [float((ancestral_variance(angle_grid(steps).cos() ** 2) - VARIANCE).abs().max()) for steps in (200, 400, 800)]
    assert bias[2] < 0.02
    assert bias[0] / bias[1] == pytest.approx(2, rel=0.1)
    assert bias[1] / bias[2] == pytest.approx(2, rel=0.1)


def test_consistency_sampling_of_a_one_step_map_keeps_the_gaussian_at_any_number_of_steps():
    # With f the exact flow to data, every step takes N(MEAN, VARIANCE) to itself.
    def to_data(x, phi):
        spread = math.cos(phi) ** 2 * VARIANCE + math.sin(phi) ** 2
        return MEAN + (x - math.cos(phi) * MEAN) * (VARIANCE / spread).sqrt()

    n = 20_000
    *_, last = consistency(FunctionDenoiser(to_data, "x0", phi_lo=1e-3), normal(n, 2), angle_grid(4), BulkNoise(1))
    assert bool(((last.x.mean(0) - MEAN).abs() < 4 * (VARIANCE / n).sqrt()).all())
    assert bool(((last.x.var(0) - VARIANCE).abs() < 4 * VARIANCE * (2 / n) ** 0.5).all())


def test_heuns_step_is_the_trapezoid_rule_on_the_circle():
    denoiser, x = ring(), normal(3, 2)
    phi, psi = torch.tensor([1.2, 0.8], dtype=torch.float64)
    *_, last = heun(denoiser, x, torch.stack([phi, psi]))
    # The second prediction's x0 and eps give a velocity at phi, where the first one's is: there the two may be averaged.
    first = denoiser(x, phi)
    second = denoiser(ddim_step(x, first.v, phi, psi), psi)
    turned = torch.cos(phi) * second.eps - torch.sin(phi) * second.x0  # the second velocity, as seen at phi
    close(last.x, ddim_step(x, (first.v + turned) / 2, phi, psi))


# ---- conditions and priors


@pytest.mark.parametrize("batch_size", [3, 100])
def test_each_sample_has_its_own_row_of_the_condition(batch_size):
    denoiser = FunctionDenoiser(lambda x, phi, labels: labels[:, None].expand_as(x).to(x), "x0", phi_lo=1e-3)
    labels = torch.arange(7)
    images = sample(denoiser, 7, (2,), 3, condition={"labels": labels}, batch_size=batch_size).images
    close(images, labels[:, None].expand(7, 2).float(), 1e-5)


class CountingPrior:
    noise_dim = 4

    def __init__(self):
        self.calls = 0

    def from_noise(self, noise):
        self.calls += 1
        return noise[:, :2]

    def nfe(self):
        return Counter(prior=10 * self.calls)


@pytest.mark.parametrize("batch_size", [2, 100])
def test_a_priors_codes_come_from_streams_of_their_own_and_are_counted(batch_size):
    denoiser = FunctionDenoiser(lambda x, phi, z: z, "x0", phi_lo=1e-3)
    drawn = sample(denoiser, 6, (2,), 3, prior=CountingPrior(), seed=5, batch_size=batch_size)
    close(drawn.images, SampleNoise(5, 6, purpose=1).draw((4,))[:, :2], 1e-5)
    assert drawn.nfe == {"prior": 10, "teacher": 3}


def test_samples_carry_no_gradient():
    # Memory would grow with the number of steps otherwise.
    scale = torch.nn.Parameter(torch.tensor(0.5))
    assert not sample(FunctionDenoiser(lambda x, phi: scale * x, "v"), 2, (3,), 3).images.requires_grad


# ---- bad input


@pytest.mark.parametrize("n", [0, -1])
def test_at_least_one_sample(n):
    with pytest.raises(SferdError, match=f"n = {n} samples; allowed: 1 or more"):
        sample(ring(), n, (2,), 3)


def test_at_least_one_row_a_batch():
    with pytest.raises(SferdError, match="batch_size = 0; allowed: 1 or more"):
        sample(ring(), 3, (2,), 3, batch_size=0)


def test_at_least_one_step():
    with pytest.raises(SferdError, match="steps = 0; allowed: 1 or more"):
        sample(ring(), 3, (2,), 0)


def test_an_unknown_method_is_refused():
    for call in (lambda: sample(ring(), 3, (2,), 3, method="euler"), lambda: sampler_by_name("euler")):
        with pytest.raises(SferdError, match="sampler = 'euler'; allowed: ddim, heun, ddpm, consistency"):
            call()


@pytest.mark.parametrize("rows", [3, 5])
def test_a_condition_with_another_number_of_rows_is_refused(rows):
    with pytest.raises(SferdError, match=f"condition 'labels' has {rows} rows for 4 samples; allowed: one row each"):
        sample(ring(), 4, (2,), 3, condition={"labels": torch.arange(rows)})


def test_a_grid_of_another_number_of_steps_is_refused():
    with pytest.raises(SferdError, match=r"the grid has 5 angles for steps = 3; allowed: steps \+ 1"):
        sample(ring(), 4, (2,), 3, grid=angle_grid(4))


@pytest.mark.parametrize("method", SAMPLERS)
def test_a_grid_that_ascends_is_refused(method):
    with pytest.raises(SferdError, match="a step must go down in noise"):
        walk(method, ring(), normal(3, 2), angle_grid(3).flip(0))


@pytest.mark.parametrize(("seed", "count", "first"), [(-1, 1, 0), (0, 0, 0), (0, 1, -1)])
def test_noise_needs_a_seed_and_a_row(seed, count, first):
    with pytest.raises(SferdError, match=f"seed = {seed}, first = {first}, count = {count}; allowed: 0 or more, and at least one sample"):
        SampleNoise(seed, count, first)
