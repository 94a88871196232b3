import math
from collections import Counter

import pytest
import torch
from torch import nn

from sferd_lab.data import Mixture, Split
from sferd_lab.denoiser import FunctionDenoiser, MixtureDenoiser, NetworkDenoiser
from sferd_lab.diffusion import HALF_PI, add_noise
from sferd_lab.distill import DataTarget, denoising_target, distillation_loss
from sferd_lab.errors import SferdError
from sferd_lab.sample import sample
from sferd_lab.semantic import DiffusionPrior, Encoder, KernelPrior, LatentDenoiser, MixturePrior, SemanticDenoiser, semantic_info
from sferd_lab.train import TrainSettings, draw_batch, train
from sferd_lab.unet import UNet, UNetSettings

Z_DIM = 3


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def base(**settings):
    """A small network in float64 with random weights throughout."""
    torch.manual_seed(0)
    network = UNet(UNetSettings(**{"widths": (8, 8), "blocks": 1, "heads": 2} | settings)).double()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    return NetworkDenoiser(network.requires_grad_(False))


def fresh(**settings):
    return SemanticDenoiser(base(**settings), Z_DIM, encoder_width=8).double().eval()


def lively(**settings):
    """With random weights in G as well: a new one's head is zero."""
    model = fresh(**settings)
    for parameter in model.gradient.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.requires_grad_(False)


def test_a_blind_predictor_is_told_zeros_whatever_the_code():
    model = lively()
    blind = SemanticDenoiser(model.base, Z_DIM, encoder_width=8, blind=True).double().eval()
    blind.load_state_dict(model.state_dict())
    x, image = normal(2, 1, 4, 4), normal(2, 1, 4, 4, seed=3)
    zeros = model(x, 0.8, z=torch.zeros(2, Z_DIM, dtype=torch.float64)).v
    for told in ({"z": normal(2, Z_DIM)}, {"image": image}, {"image": image, "z_noise": normal(2, Z_DIM, seed=4)}):
        assert torch.equal(blind(x, 0.8, **told).v, zeros)
        assert not torch.equal(model(x, 0.8, **told).v, zeros)
    assert semantic_info(blind)["blind"] is True


# ---- the corrected student


@pytest.mark.parametrize("phi", [0.05, 0.8, HALF_PI])
def test_a_new_predictor_leaves_the_student_exactly_as_it_is(phi):
    model, x = fresh(), normal(2, 1, 4, 4)
    corrected, plain = model(x, phi, z=normal(2, Z_DIM)), model.base(x, phi)
    for part in ("x0", "eps", "v"):
        assert torch.equal(getattr(corrected, part), getattr(plain, part))


@pytest.mark.parametrize("phi", [0.05, 0.8, 1.5, HALF_PI])
def test_the_code_moves_v_by_h_and_x0_by_minus_sin_phi_h(phi):
    model, x, z = lively(), normal(2, 1, 4, 4), normal(2, Z_DIM)
    corrected, plain = model(x, phi, z=z), model.base(x, phi)
    h = model.gradient(model.base.network.encode(x, phi), z)
    assert h.abs().max() > 0.1
    torch.testing.assert_close(corrected.v - plain.v, h)
    torch.testing.assert_close(corrected.x0 - plain.x0, -math.sin(phi) * h)
    torch.testing.assert_close(corrected.eps - plain.eps, math.cos(phi) * h)


def test_the_shift_is_tweedies_formula_for_the_gradient_of_log_p_of_z():
    # PDAE: x0 gains (sigma^2 / alpha) G. With G = -(cos / sin) h that is -sin(phi) h.
    model, x, z, phi = lively(), normal(2, 1, 4, 4), normal(2, Z_DIM), 0.8
    h = model.gradient(model.base.network.encode(x, phi), z)
    gradient = -math.cos(phi) / math.sin(phi) * h
    shift = math.sin(phi) ** 2 / math.cos(phi) * gradient
    torch.testing.assert_close(model(x, phi, z=z).x0, model.base(x, phi).x0 + shift)


def test_base_and_predictor_share_one_pass_of_the_bases_encoder(monkeypatch):
    model, calls, encode = lively(), [], UNet.encode
    monkeypatch.setattr(UNet, "encode", lambda self, *args: calls.append(self) or encode(self, *args))
    model(normal(2, 1, 4, 4), 0.8, z=normal(2, Z_DIM))
    assert calls == [model.base.network]
    assert model.nfe() == Counter(teacher=1, gradient=1)


def test_each_image_is_told_its_own_code():
    model, x, z = lively(), normal(3, 1, 4, 4), normal(3, Z_DIM)
    together = model(x, 0.8, z=z).v
    for row in range(3):
        torch.testing.assert_close(together[row : row + 1], model(x[row : row + 1], 0.8, z=z[row : row + 1]).v, rtol=1e-9, atol=1e-9)
    assert (model(x, 0.8, z=z.flip(0)).v - together).abs().max() > 1e-3


def test_an_image_stands_for_its_code_and_noise_is_added_to_that():
    model, x, image, noise = lively(), normal(2, 1, 4, 4), normal(2, 1, 4, 4, seed=1), normal(2, Z_DIM, seed=2)
    z = model.encoder(image)
    assert torch.equal(model(x, 0.8, image=image).v, model(x, 0.8, z=z).v)
    assert torch.equal(model(x, 0.8, image=image, z_noise=noise).v, model(x, 0.8, z=z + noise).v)


def test_attention_is_the_bases_own():
    model, x = lively(), normal(2, 1, 4, 4)
    assert model.attention_layers == model.base.attention_layers
    with_maps = model(x, 0.8, model.attention_layers, z=normal(2, Z_DIM))
    assert set(with_maps.attention) == set(model.attention_layers)
    plain = model.base(x, 0.8, model.attention_layers)
    for name, map_ in with_maps.attention.items():
        assert torch.equal(map_.weights, plain.attention[name].weights)


def test_labels_reach_the_base():
    model, x, z, labels = fresh(classes=3), normal(2, 1, 4, 4), normal(2, Z_DIM), torch.tensor([2, 0])
    assert torch.equal(model(x, 0.8, z=z, labels=labels).v, model.base(x, 0.8, labels=labels).v)
    assert not torch.equal(model(x, 0.8, z=z, labels=labels).v, model(x, 0.8, z=z).v)
    with pytest.raises(SferdError, match="labels were given to an unconditional network"):
        lively()(x, 0.8, z=z, labels=labels)


@pytest.mark.parametrize("given", [{}, {"z": normal(2, Z_DIM), "image": normal(2, 1, 4, 4)}], ids=["neither", "both"])
def test_exactly_one_of_code_and_image_must_be_given(given):
    with pytest.raises(SferdError, match="exactly one of the conditions z and image"):
        lively()(normal(2, 1, 4, 4), 0.8, **given)


@pytest.mark.parametrize("shape", [(2, Z_DIM + 1), (2,), (2, Z_DIM, 1)])
def test_a_code_of_another_size_is_refused(shape):
    with pytest.raises(SferdError, match=rf"z has shape .*; allowed: \(B, {Z_DIM}\)"):
        lively()(normal(2, 1, 4, 4), 0.8, z=normal(*shape))


def test_a_code_needs_at_least_one_number():
    with pytest.raises(SferdError, match="z_dim = 0; allowed: 1 or more"):
        SemanticDenoiser(base(), 0)


def test_the_encoder_standardises_codes_over_the_batch_in_training_and_over_the_data_afterwards():
    torch.manual_seed(0)
    encoder, images = Encoder(3, 5, 8).double(), normal(64, 3, 8, 12)
    codes = encoder(images)
    torch.testing.assert_close(codes.mean(0), torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(codes.var(0, unbiased=False), torch.ones(5, dtype=torch.float64), rtol=0, atol=1e-2)
    for _ in range(100):
        encoder(images)
    encoder.eval()
    torch.testing.assert_close(encoder(images), codes, rtol=0, atol=0.05)
    # What one image's code is does not depend on the other images.
    torch.testing.assert_close(encoder(images[:1]), encoder(images)[:1])


def test_the_info_of_a_semantic_denoiser_builds_the_same_one():
    model = lively()
    twin = SemanticDenoiser(base(), **semantic_info(model)).double().eval()
    twin.load_state_dict(model.state_dict())
    x, image = normal(2, 1, 4, 4), normal(2, 1, 4, 4, seed=1)
    assert torch.equal(twin(x, 0.8, image=image).v, model(x, 0.8, image=image).v)


# ---- learning


def on_image(batch):
    return {"image": batch.x0, "z_noise": batch.z_noise}


VARIANTS = {
    # Variant (c): E and G learn the data's own velocity on the teacher.
    "conditional": lambda teacher: denoising_target(0.0, HALF_PI, on_image),
    # Variant (b) at one step: the target at pi/2 is the image, which the student's noise says nothing about.
    "data": lambda teacher: DataTarget(teacher, 1, on_image),
}


@pytest.fixture(scope="module", params=VARIANTS)
def trained(request):
    """A variant after a short training on 16 images that differ in overall brightness, with what went in and came out."""
    torch.manual_seed(0)
    data = Split((torch.linspace(-1, 1, 16)[:, None, None, None] * torch.ones(1, 4, 4)).contiguous(), None)
    network = UNet(UNetSettings(widths=(8, 8), blocks=1))
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    teacher = NetworkDenoiser(network.requires_grad_(False))
    model = SemanticDenoiser(teacher, Z_DIM, encoder_width=8)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    make_target = VARIANTS[request.param](teacher)
    settings = TrainSettings(steps=120, batch_size=16, lr=1e-2, z_dim=Z_DIM, z_noise=0.1, device="cpu")
    encoder_gradients = []
    for _ in train(model, make_target, data, settings):
        gradient = model.encoder.code.weight.grad
        encoder_gradients.append(0.0 if gradient is None else gradient.abs().max().item())
    batch = draw_batch(data, settings, 10_000)
    return model.eval(), before, encoder_gradients, make_target(batch, model)


def test_the_encoder_gets_a_gradient_as_soon_as_the_predictor_is_no_longer_zero(trained):
    _, _, gradients, _ = trained
    assert gradients[0] == 0
    assert min(gradients[3:]) > 0


def test_the_output_depends_on_the_code_and_the_right_code_is_the_better_one(trained):
    model, _, _, goal = trained
    right = model(goal.x, goal.phi, **goal.condition)
    shuffled = model(goal.x, goal.phi, image=goal.condition["image"].roll(5, 0))
    assert (right.v - shuffled.v).abs().mean() > 0.1
    # A network that ignores z would give equal losses.
    losses = [distillation_loss(prediction, goal, "v").mean() for prediction in (right, shuffled)]
    assert losses[0] < 0.7 * losses[1]


def test_the_frozen_base_gets_no_gradient_and_keeps_its_weights(trained):
    model, before, _, _ = trained
    assert all(parameter.grad is None for parameter in model.base.parameters())
    after = model.state_dict()
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"gradient", "encoder"}


# ---- the latent diffusion prior


def test_codes_are_taken_back_to_their_own_mean_and_scale():
    # Standard normal codes have v = 0 at every angle, where a DDIM step of pi/8 only shortens x by cos(pi/8).
    mean, std = torch.tensor([1.0, -2.0], dtype=torch.float64), torch.tensor([0.5, 3.0], dtype=torch.float64)
    prior = DiffusionPrior(FunctionDenoiser(lambda x, phi: torch.zeros_like(x), "v"), mean, std, steps=4)
    noise = normal(5, 2)
    torch.testing.assert_close(prior.from_noise(noise), math.cos(math.pi / 8) ** 4 * noise * std + mean)


def test_with_an_exact_denoiser_the_prior_draws_the_codes_distribution():
    mean, std, n = torch.tensor([1.0, -2.0], dtype=torch.float64), torch.tensor([0.5, 3.0], dtype=torch.float64), 4000
    correlation = torch.tensor([[1.0, 0.8], [0.8, 1.0]], dtype=torch.float64)
    standardised = Mixture(torch.ones(1, dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64), correlation[None], (2,))
    codes = DiffusionPrior(MixtureDenoiser(standardised), mean, std, steps=1000).from_noise(normal(n, 2))
    # Four standard errors of a mean and of a covariance; the walk's own error is some 1/1000.
    assert ((codes.mean(0) - mean).abs() < 4 * std / n**0.5).all()
    covariance = correlation * std[:, None] * std
    spread = ((covariance**2 + torch.outer(std, std) ** 2) / n) ** 0.5
    assert ((codes.T.cov() - covariance).abs() < 4 * spread + 2e-3 * std[:, None] * std).all()


@pytest.fixture(scope="module")
def latent():
    """A latent denoiser trained on 2,000 codes from N(0.5, diag(0.5, 1, 1.5)^2), standardised neither in mean nor in scale."""
    torch.manual_seed(0)
    codes = torch.tensor([0.5, 1.0, 1.5]) * normal(2000, 3).float() + 0.5
    model = LatentDenoiser(3, width=32, depth=2)
    settings = TrainSettings(steps=600, batch_size=128, lr=5e-3, device="cpu")
    *_, last = train(model, denoising_target(0.0, HALF_PI), Split(codes, None), settings)
    return codes, last.ema.requires_grad_(False)


def test_a_latent_denoiser_trained_on_a_gaussian_gives_its_mean_and_standard_deviation(latent):
    codes, denoiser = latent
    drawn = DiffusionPrior(denoiser, torch.zeros(3), torch.ones(3), steps=50).from_noise(normal(4000, 3, seed=1).float())
    # A short training: an untrained network misses the mean by 0.5 and the first standard deviation by a factor of 2.
    assert (drawn.mean(0) - codes.mean(0)).abs().max() < 0.15
    assert (drawn.std(0) / codes.std(0) - 1).abs().max() < 0.15


def test_a_latent_denoiser_nears_the_gaussians_exact_posterior_mean(latent):
    _, denoiser = latent
    std = torch.tensor([0.5, 1.0, 1.5])
    exact = MixtureDenoiser(Mixture(torch.ones(1), torch.full((1, 3), 0.5), (std**2)[None], (3,)))
    for phi in (0.3, 0.8, 1.2):
        x = add_noise(std * normal(1000, 3, seed=2).float() + 0.5, normal(1000, 3, seed=3).float(), phi)
        error = (denoiser(x, phi).v - exact(x, phi).v).square().mean()
        assert error < 0.1 * exact(x, phi).v.var()


@pytest.mark.parametrize("kind", ["diffusion", "mixture", "kernel"])
def test_a_code_does_not_depend_on_the_codes_drawn_with_it(kind):
    torch.manual_seed(0)
    if kind == "diffusion":
        ones = torch.ones(3, dtype=torch.float64)
        prior = DiffusionPrior(LatentDenoiser(3, width=16, depth=2).double().requires_grad_(False), ones, ones, steps=3)
    else:
        prior = two_modes() if kind == "mixture" else KernelPrior(normal(5, 3, seed=1), 0.1)
    noise = normal(7, prior.noise_dim)
    together = prior.from_noise(noise)
    for row in range(7):
        torch.testing.assert_close(together[row : row + 1], prior.from_noise(noise[row : row + 1]))


def test_the_latent_evaluations_of_sampling_are_counted_beside_the_students():
    model = lively().float()
    prior = DiffusionPrior(LatentDenoiser(Z_DIM, width=16), torch.zeros(Z_DIM), torch.ones(Z_DIM), steps=5)
    assert sample(model, 6, (1, 4, 4), 2, batch_size=3, prior=prior).nfe == {"gradient": 2, "prior": 5, "teacher": 2}


@pytest.mark.parametrize("phi", [torch.zeros(3), 2.0])
def test_a_latent_denoiser_refuses_a_bad_angle(phi):
    with pytest.raises(SferdError, match="phi"):
        LatentDenoiser(3).predict(torch.zeros(2, 3), phi)


# ---- the mixture prior


def two_modes():
    """Weights 0.2 and 0.8, both modes full covariances, in the plane."""
    return MixturePrior(
        torch.tensor([0.2, 0.8], dtype=torch.float64),
        torch.tensor([[-3.0, 0.0], [2.0, 1.0]], dtype=torch.float64),
        torch.tensor([[[1.0, 0.5], [0.5, 0.5]], [[0.3, -0.2], [-0.2, 0.4]]], dtype=torch.float64),
    )


def test_the_mixture_prior_draws_each_component_with_its_weight():
    # Evenly spaced quantiles of a normal for the number that picks, nothing for the others: codes are the means, in exact shares.
    n = 1000
    quantiles = torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)
    codes = two_modes().from_noise(torch.cat([quantiles[:, None], torch.zeros(n, 2, dtype=torch.float64)], 1))
    assert torch.equal(codes[:200], two_modes().means[:1].expand(200, 2))
    assert torch.equal(codes[200:], two_modes().means[1:].expand(800, 2))


def test_the_mixture_prior_draws_with_its_mixtures_mean_and_covariance():
    prior, n = two_modes(), 20_000
    codes = prior.from_noise(normal(n, 3))
    weights, means, covariances = prior.weights, prior.means, prior.covariances
    mean = weights @ means
    centred = means - mean
    covariance = (weights[:, None, None] * (covariances + centred[:, :, None] * centred[:, None])).sum(0)
    assert ((codes.mean(0) - mean).abs() < 4 * covariance.diagonal().sqrt() / n**0.5).all()
    products = (codes - mean)[:, :, None] * (codes - mean)[:, None]
    assert ((products.mean(0) - covariance).abs() < 4 * products.std(0) / n**0.5).all()


def test_the_mixture_prior_draws_each_component_with_its_own_covariance():
    prior, n = two_modes(), 20_000
    for picks, component in ((-3.0, 0), (3.0, 1)):
        codes = prior.from_noise(torch.cat([torch.full((n, 1), picks, dtype=torch.float64), normal(n, 2)], 1))
        products = (codes - prior.means[component])[:, :, None] * (codes - prior.means[component])[:, None]
        assert ((products.mean(0) - prior.covariances[component]).abs() < 4 * products.std(0) / n**0.5).all()


@pytest.mark.parametrize("extreme", [-50.0, 50.0])
def test_the_most_extreme_noise_still_picks_a_component(extreme):
    codes = two_modes().from_noise(torch.tensor([[extreme, 0.0, 0.0]], dtype=torch.float64))
    assert torch.equal(codes, two_modes().means[[0] if extreme < 0 else [1]])


def test_fitting_codes_of_a_mixture_finds_it():
    n = 4000
    fitted = MixturePrior.fit(two_modes().from_noise(normal(n, 3)), 2, seed=0)
    order = fitted.weights.argsort()
    true = two_modes()
    assert ((fitted.weights[order] - true.weights).abs() < 4 * (0.2 * 0.8 / n) ** 0.5).all()
    deviations = true.covariances.diagonal(dim1=1, dim2=2).sqrt() / (true.weights * n).sqrt()[:, None]
    assert ((fitted.means[order] - true.means).abs() < 4 * deviations).all()
    torch.testing.assert_close(fitted.covariances[order].double(), true.covariances, rtol=0.2, atol=0.1)


def test_the_same_seed_fits_the_same_mixture():
    codes = two_modes().from_noise(normal(300, 3))
    first, second = (MixturePrior.fit(codes, 4, seed=1) for _ in range(2))
    assert torch.equal(first.means, second.means)


def test_the_mixture_prior_evaluates_no_network():
    model = lively().float()
    prior = MixturePrior.fit(normal(50, Z_DIM), 2, seed=0)
    assert prior.nfe() == Counter()
    assert sample(model, 4, (1, 4, 4), 1, prior=prior).nfe == {"gradient": 1, "teacher": 1}


@pytest.mark.parametrize("components", [6, 0])
def test_components_must_be_one_to_the_number_of_codes(components):
    with pytest.raises(SferdError, match=f"prior_components = {components} for 5 codes"):
        MixturePrior.fit(normal(5, 3), components, seed=0)


def test_a_mixture_prior_of_weights_that_do_not_sum_to_one_is_refused():
    with pytest.raises(SferdError, match="weights"):
        MixturePrior(torch.tensor([0.5, 0.4]), torch.zeros(2, 3), torch.eye(3).expand(2, 3, 3).clone())


# ---- the kernel prior


def test_the_kernel_prior_draws_every_training_code_equally_often():
    # Evenly spaced quantiles of a normal for the number that picks, nothing for the others.
    n, codes = 4000, normal(1000, 3)
    quantiles = torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)
    drawn = KernelPrior(codes, 0.3).from_noise(torch.cat([quantiles[:, None], torch.zeros(n, 3, dtype=torch.float64)], 1))
    assert torch.equal(drawn, codes.repeat_interleave(4, dim=0))


def test_the_kernel_prior_adds_noise_of_its_bandwidth():
    codes, n = 5 * normal(3, 2), 30_000
    noise = normal(n, 3, seed=1)
    drawn = KernelPrior(codes, 0.2).from_noise(noise)
    own = codes[torch.cdist(drawn, codes).argmin(1)]
    torch.testing.assert_close(drawn, own + 0.2 * noise[:, 1:])
    # Scikit-learn's estimate of the same name has the same log density, up to what a finite sample leaves.
    from sklearn.neighbors import KernelDensity

    estimate = KernelDensity(bandwidth=0.2).fit(codes.numpy())
    theirs = torch.from_numpy(estimate.score_samples(estimate.sample(n, random_state=0)))
    mine = torch.from_numpy(estimate.score_samples(drawn.numpy()))
    assert (mine.mean() - theirs.mean()).abs() < 4 * (mine.var() / n + theirs.var() / n).sqrt()


@pytest.mark.parametrize("extreme", [-50.0, 50.0])
def test_the_most_extreme_noise_still_picks_a_training_code(extreme):
    codes = normal(4, 2)
    drawn = KernelPrior(codes, 0.0).from_noise(torch.tensor([[extreme, 1.0, 1.0]], dtype=torch.float64))
    assert torch.equal(drawn, codes[[0] if extreme < 0 else [3]])


def test_in_single_precision_fifty_thousand_codes_are_all_within_reach():
    codes = torch.arange(50_000.0)[:, None]
    quantiles = torch.special.ndtri((torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000).float()
    drawn = KernelPrior(codes, 0.0).from_noise(torch.stack([quantiles, torch.zeros(200_000)], 1))
    assert len(drawn.unique()) == 50_000


@pytest.mark.parametrize(
    ("codes", "bandwidth"),
    [((0, 2), 0.1), ((4,), 0.1), ((4, 2), -0.1), ((4, 2), math.inf), ((4, 2), math.nan)],
)
def test_a_kernel_prior_without_codes_or_with_an_impossible_bandwidth_is_refused(codes, bandwidth):
    with pytest.raises(SferdError, match="kernel prior of codes"):
        KernelPrior(torch.zeros(codes), bandwidth)


def test_a_kernel_prior_of_codes_that_are_no_numbers_is_refused():
    with pytest.raises(SferdError, match="finite codes"):
        KernelPrior(torch.tensor([[0.0, math.nan]]), 0.1)
