import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import nn

from sferd_lab.data import Mixture, image_mixture
from sferd_lab.denoiser import MixtureDenoiser, NetworkDenoiser
from sferd_lab.diffusion import HALF_PI, add_noise, eps_from_v, velocity
from sferd_lab.errors import SferdError
from sferd_lab.guidance import FORMS, MASKS, GuidedDenoiser, default_layer, edge_energy, gaussian_blur, guidance_mask, guide
from sferd_lab.unet import AttentionMap, UNet, UNetSettings

ANGLES = [0.05, 0.3, 0.8, 1.2, 1.5, HALF_PI]
WEIGHT = 0.3


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(a, b, tolerance=1e-11):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def inner(a, b):
    return (a * b).flatten(1).sum(1)


def attention(received):
    """A map in which every query looks at key k with weight a_k / n, so that what position k receives is a_k (mean 1) exactly."""
    received = torch.tensor(received, dtype=torch.float64)
    batch, height, width = received.shape
    weights = (received.reshape(batch, 1, 1, -1) / (height * width)).expand(-1, 2, height * width, -1)
    return AttentionMap(weights, height, width)


def teacher(**settings):
    """A small network in float64 with random weights throughout."""
    torch.manual_seed(0)
    network = UNet(UNetSettings(**{"widths": (8, 8), "blocks": 1, "heads": 2} | settings)).double()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    return NetworkDenoiser(network.requires_grad_(False))


class Exact:
    """The exact denoiser of an image mixture, its first prediction at noisy draws, and a mask: what ``guide`` starts from."""

    def __init__(self, phi, components=10, n=40):
        mixture = image_mixture(8, components)
        self.denoiser = MixtureDenoiser(mixture)
        x0, _ = mixture.sample(n, torch.Generator().manual_seed(0))
        self.phi = phi
        self.x = add_noise(x0, normal(*x0.shape), phi)
        self.first = self.denoiser(self.x, phi)
        self.mask = (normal(n, 1, 8, 8, seed=1) > 0.3).double()
        self.x0_bar = self.mask * gaussian_blur(self.first.x0, 5, 1.0) + (1 - self.mask) * self.first.x0
        self.second = self.denoiser(math.cos(phi) * self.x0_bar + math.sin(phi) * self.first.eps, phi)

    def guide(self, form, weight=WEIGHT, mask=None):
        return guide(self.denoiser, self.first, self.x, self.phi, self.mask if mask is None else mask, weight, form, 5, 1.0)


# ---- the blur


@pytest.mark.parametrize(("kernel", "sigma"), [(1, 1.0), (3, 0.5), (5, 1.0), (7, 3.0), (11, 2.0)])
def test_the_blur_is_scipys_gaussian_filter_cut_to_the_kernel_with_mirrored_borders(kernel, sigma):
    images = normal(2, 3, 6, 9)
    # What torch calls "reflect", the border pixel not repeated, is scipy's "mirror".
    expected = gaussian_filter(images.numpy(), (0, 0, sigma, sigma), mode="mirror", radius=(0, 0, kernel // 2, kernel // 2))
    close(gaussian_blur(images, kernel, sigma), torch.from_numpy(expected), 1e-13)


def test_the_blur_leaves_a_constant_image_alone_and_keeps_its_dtype():
    images = torch.full((1, 2, 4, 4), 0.7)
    torch.testing.assert_close(gaussian_blur(images, 7, 2.0), images)


@pytest.mark.parametrize("kernel", [0, 2, 4, -1, 9])
def test_a_kernel_that_is_even_or_wider_than_reflection_can_fill_is_refused(kernel):
    images = normal(1, 1, 4, 8)
    assert gaussian_blur(images, 7, 1.0).shape == images.shape
    with pytest.raises(SferdError, match=rf"blur kernel = {kernel}; allowed: odd, 1 to 7 for 4x8 images"):
        gaussian_blur(images, kernel, 1.0)


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.nan])
def test_a_blur_needs_a_positive_width(sigma):
    with pytest.raises(SferdError, match=r"blur sigma = .*; allowed: above 0"):
        gaussian_blur(normal(1, 1, 4, 4), 3, sigma)


# ---- the guided prediction on an exact denoiser


@pytest.mark.parametrize("phi", ANGLES)
def test_the_eps_form_extrapolates_the_noise_away_from_that_of_the_blurred_image(phi):
    exact = Exact(phi)
    guided = exact.guide("eps")
    close(guided.eps, exact.first.eps + WEIGHT * (exact.first.eps - exact.second.eps))
    # The same thing said in x0, without dividing by the cosine.
    close(guided.x0, exact.first.x0 + WEIGHT * (exact.x0_bar - exact.second.x0))


@pytest.mark.parametrize("phi", ANGLES)
def test_the_x0_form_extrapolates_the_image_away_from_that_of_the_blurred_image(phi):
    exact = Exact(phi)
    close(exact.guide("x0").x0, exact.first.x0 + WEIGHT * (exact.first.x0 - exact.second.x0))


@pytest.mark.parametrize("phi", ANGLES)
def test_the_two_forms_differ_by_exactly_the_weighted_detail_under_the_mask(phi):
    exact = Exact(phi)
    detail = exact.mask * (exact.first.x0 - gaussian_blur(exact.first.x0, 5, 1.0))
    assert detail.abs().max() > 0.01
    close(exact.guide("x0").x0 - exact.guide("eps").x0, WEIGHT * detail)


@pytest.mark.parametrize("components", [1, 10])
@pytest.mark.parametrize("phi", ANGLES)
def test_the_eps_form_moves_x0_towards_the_blur_and_the_x0_form_away_from_it(phi, components):
    # With d = x0_bar - x0_hat and a denoiser that contracts, x0_hat(x_bar) = x0_hat + A d with A between 0 and 1, the eps form's shift is
    # w (I - A) d and the x0 form's -w A d. A is cos(phi) times the denoiser's slope: for one Gaussian c^2 S / (c^2 S + s^2), always within
    # (0, 1); it falls to 0 at pi/2, where the x0 form does nothing at all. A mixture keeps it there away from the ridge between modes.
    exact = Exact(phi, components)
    direction = exact.x0_bar - exact.first.x0
    along = {form: inner(exact.guide(form).x0 - exact.first.x0, direction) / inner(direction, direction) for form in FORMS}
    assert (along["eps"] > 0).all()
    assert (along["eps"] < WEIGHT + 1e-12).all()
    assert (along["x0"] < 1e-12).all()
    assert (along["x0"] > -WEIGHT).all()
    if phi < HALF_PI:
        assert (along["x0"] < 0).all()
    else:
        close(exact.guide("x0").x0, exact.first.x0)


def test_on_the_ridge_between_two_modes_the_eps_form_overshoots_and_points_away_from_the_blur():
    # Two sharp modes, +board and -board, seen from near the middle: the posterior mean leans to one, blurring it tips x_bar to the other,
    # whose posterior mean lies beyond the blur. The denoiser's slope is far above 1 there, so the rule of thumb above has this exception.
    board = 0.3 * torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(4)
    board = (board * board[:, None].sign()).flatten()
    mixture = Mixture(
        torch.tensor([0.5, 0.5], dtype=torch.float64),
        torch.stack([board, -board]),
        torch.full((2, 64), 1e-4, dtype=torch.float64),
        (1, 8, 8),
    )
    denoiser, phi = MixtureDenoiser(mixture), 0.5
    x = 0.02 * board.reshape(1, 1, 8, 8)
    first = denoiser(x, phi)
    direction = gaussian_blur(first.x0, 5, 1.0) - first.x0
    guided = guide(denoiser, first, x, phi, torch.ones(1, 1, 8, 8, dtype=torch.float64), WEIGHT, "eps", 5, 1.0)
    assert inner(guided.x0 - first.x0, direction).item() < 0


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("phi", ANGLES)
def test_a_guided_prediction_still_adds_up_to_x(phi, form):
    exact = Exact(phi)
    guided = exact.guide(form)
    close(math.cos(phi) * guided.x0 + math.sin(phi) * guided.eps, exact.x)
    close(velocity(guided.x0, guided.eps, phi), guided.v, 1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_an_empty_mask_changes_nothing_on_any_denoiser(form):
    # x_bar is then x itself.
    exact = Exact(0.8)
    close(exact.guide(form, mask=torch.zeros_like(exact.mask)).x0, exact.first.x0)


@pytest.mark.parametrize("form", FORMS)
def test_the_shift_is_proportional_to_the_weight(form):
    exact = Exact(0.8)
    close(exact.guide(form, weight=-0.7).x0 - exact.first.x0, -7 * (exact.guide(form, weight=0.1).x0 - exact.first.x0))


# ---- the guided network


def expected(denoiser, x, phi, weight, form, mask, **condition):
    """The paper's steps, written out on two plain evaluations: the guided x0."""
    plain = denoiser(x, phi, **condition)
    x0_bar = mask * gaussian_blur(plain.x0, 3, 1.0) + (1 - mask) * plain.x0
    second = denoiser(math.cos(phi) * x0_bar + math.sin(phi) * plain.eps, phi, **condition)
    return plain.x0 + weight * ((plain.x0 if form == "x0" else x0_bar) - second.x0)


@pytest.mark.parametrize("form", FORMS)
def test_a_guided_network_blurs_where_its_own_layer_attends_more_than_the_threshold(form):
    denoiser, x, phi = teacher(), normal(3, 1, 4, 8), 0.8
    guided = GuidedDenoiser(denoiser, 0.5, form=form, threshold=1.05, blur_kernel=3, layer="middle")(x, phi)
    received = denoiser(x, phi, ["middle"]).attention["middle"].received()
    mask = torch.from_numpy(np.kron((received > 1.05).numpy(), np.ones((1, 2, 2))))[:, None]
    assert 0 < mask.mean() < 1
    close(guided.x0, expected(denoiser, x, phi, 0.5, form, mask))


def test_weight_zero_is_the_teacher_bit_for_bit_in_one_evaluation():
    denoiser, x, phi = teacher(), normal(2, 1, 4, 4), 0.8
    plain = denoiser(x, phi)
    guided = GuidedDenoiser(denoiser, 0.0)
    before = guided.nfe()
    prediction = guided(x, phi)
    assert guided.nfe() - before == {"teacher": 1}
    for part in ("x0", "eps", "v"):
        assert torch.equal(getattr(prediction, part), getattr(plain, part))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mask", MASKS)
def test_any_other_weight_takes_two_evaluations(form, mask):
    denoiser = teacher()
    guided = GuidedDenoiser(denoiser, 0.3, form=form, mask=mask, blur_kernel=3)
    prediction = guided(normal(2, 1, 4, 4), 0.8)
    assert guided.nfe() == {"teacher": 2}
    assert (prediction.x0 - denoiser(normal(2, 1, 4, 4), 0.8).x0).abs().max() > 1e-4


@pytest.mark.parametrize("form", FORMS)
def test_a_full_mask_blurs_everything(form):
    denoiser, x = teacher(), normal(2, 1, 4, 4)
    guided = GuidedDenoiser(denoiser, 0.5, form=form, mask="full", blur_kernel=3)(x, 0.8)
    close(guided.x0, expected(denoiser, x, 0.8, 0.5, form, torch.ones(2, 1, 4, 4, dtype=torch.float64)))


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_labels_reach_every_evaluation(weight):
    seen = []

    class Spy(NetworkDenoiser):
        def predict(self, x, phi, layers=(), labels=None):
            seen.append(labels)
            return super().predict(x, phi, layers, labels)

    denoiser, labels = Spy(teacher(classes=3).network), torch.tensor([2, 0])
    GuidedDenoiser(denoiser, weight, blur_kernel=3)(normal(2, 1, 4, 4), 0.8, labels=labels)
    assert len(seen) == (1 if weight == 0 else 2)
    assert all(given is labels for given in seen)


def test_the_attention_handed_on_is_the_first_passs_and_only_what_was_asked_for():
    denoiser, x = teacher(), normal(2, 1, 4, 4)
    guided = GuidedDenoiser(denoiser, 0.5, blur_kernel=3)
    assert guided(x, 0.8).attention == {}
    attention_maps = guided(x, 0.8, ["middle"]).attention
    assert set(attention_maps) == {"middle"}
    assert torch.equal(attention_maps["middle"].weights, denoiser(x, 0.8, ["middle"]).attention["middle"].weights)


def test_the_default_layer_is_the_decoders_first_which_has_the_lowest_resolution():
    denoiser = teacher(widths=(8, 8, 8), attention=(0, 2))
    assert GuidedDenoiser(denoiser, 0.3).layer == "decoder.2.0"
    maps = denoiser(normal(1, 1, 8, 8), 0.8, denoiser.attention_layers).attention
    assert maps["decoder.2.0"].height == min(map_.height for map_ in maps.values())


def test_the_default_layer_is_the_last_where_the_decoder_has_none():
    assert default_layer(["encoder.0.0", "middle"]) == "middle"


def test_the_eps_form_is_finite_at_both_ends_and_the_x0_form_refuses_phi_0():
    # x0 at phi = 0 is x, whatever v: a form that moves x0 there has no velocity.
    denoiser, x = teacher(), normal(2, 1, 4, 4)
    for phi in (0.0, HALF_PI):
        assert GuidedDenoiser(denoiser, 0.3, form="eps", blur_kernel=3)(x, phi).v.isfinite().all()
    guided = GuidedDenoiser(denoiser, 0.3, form="x0", blur_kernel=3)
    assert guided(x, HALF_PI).v.isfinite().all()
    assert guided(x, guided.phi_lo).v.isfinite().all()
    with pytest.raises(SferdError, match=r"this GuidedDenoiser is defined from 0\.001 to"):
        guided(x, 0.0)


# ---- the mask


def test_the_mask_is_one_where_a_position_receives_more_than_the_threshold():
    map_, x0 = attention([[[2.0, 1.0], [0.5, 0.5]]]), normal(1, 3, 2, 2)
    assert guidance_mask(map_, x0).tolist() == [[[[1, 0], [0, 0]]]]
    assert guidance_mask(map_, x0, 0.8).tolist() == [[[[1, 1], [0, 0]]]]


def test_the_mask_is_upsampled_to_the_image_by_nearest_neighbour():
    map_ = attention([[[2.0, 0.5, 0.5], [0.5, 0.5, 2.0]]])
    mask = guidance_mask(map_, normal(1, 1, 6, 9))
    assert torch.equal(mask[0, 0], torch.from_numpy(np.kron([[1.0, 0, 0], [0, 0, 1]], np.ones((3, 3)))))


def random_attention(n=4, size=(4, 6), seed=3):
    received = normal(n, *size, seed=seed).exp()
    return attention((received / received.mean((1, 2), keepdim=True)).tolist())


@pytest.mark.parametrize("kind", ["random", "inverse", "edge"])
@pytest.mark.parametrize("threshold", [0.7, 1.0, 1.5])
def test_control_masks_mark_as_many_positions_as_the_attention_mask_in_every_image(kind, threshold):
    map_, x0 = random_attention(), normal(4, 3, 8, 12)
    areas = guidance_mask(map_, x0, threshold).sum((1, 2, 3))
    assert len(set(areas.tolist())) > 1
    control = guidance_mask(map_, x0, threshold, kind)
    assert torch.equal(control.sum((1, 2, 3)), areas)
    assert not torch.equal(control, guidance_mask(map_, x0, threshold))
    # At the map's resolution, like the attention mask: every block of 2 x 2 pixels is all marked or not at all.
    assert torch.equal(control, torch.from_numpy(np.kron(control[..., ::2, ::2].numpy(), np.ones((2, 2)))))


def test_the_inverse_mask_marks_what_receives_least():
    map_ = random_attention()
    mask = guidance_mask(map_, normal(4, 1, 4, 6), kind="inverse")[:, 0].bool()
    for received, marked in zip(map_.received(), mask, strict=True):
        assert received[marked].max() < received[~marked].min()


def test_the_edge_mask_marks_the_highest_gradient_energy_at_the_maps_resolution():
    map_, x0 = random_attention(), normal(4, 3, 8, 12)
    # Central differences, the border repeated, pixel by pixel.
    energy = torch.zeros(4, 8, 12, dtype=torch.float64)
    for i in range(8):
        for j in range(12):
            across = (x0[:, :, i, min(j + 1, 11)] - x0[:, :, i, max(j - 1, 0)]) / 2
            down = (x0[:, :, min(i + 1, 7), j] - x0[:, :, max(i - 1, 0), j]) / 2
            energy[:, i, j] = (across**2 + down**2).sum(1)
    close(edge_energy(x0)[:, 0], energy)
    blocks = energy.reshape(4, 4, 2, 6, 2).mean((2, 4))
    mask = guidance_mask(map_, x0, kind="edge")[:, 0, ::2, ::2].bool()
    for block, marked in zip(blocks, mask, strict=True):
        assert block[marked].min() > block[~marked].max()


def test_the_edge_mask_finds_the_edge_of_a_bar():
    received = torch.full((1, 8, 8), 0.5, dtype=torch.float64)
    received[:, :, :2] = 2.5  # 16 of 64 positions, as many as the edge's two columns
    x0 = torch.zeros(1, 1, 8, 8, dtype=torch.float64)
    x0[..., 5:] = 1.0
    mask = guidance_mask(attention(received.tolist()), x0, kind="edge")
    assert mask[0, 0, 0].tolist() == [0, 0, 0, 0, 1, 1, 0, 0]


def test_the_random_mask_moves_every_images_mask_by_one_permutation_that_the_seed_fixes():
    n = 24
    # Image k attends to position k alone: where its mark lands shows the permutation.
    received = [np.where(np.arange(n) == k, n / 2, n / 2 / (n - 1)).reshape(4, 6).tolist() for k in range(n)]
    map_, x0 = attention(received), normal(n, 1, 4, 6)
    landed = guidance_mask(map_, x0, kind="random", seed=5).flatten(1).argmax(1)
    assert sorted(landed.tolist()) == list(range(n))
    assert landed.tolist() != list(range(n))
    assert torch.equal(guidance_mask(map_, x0, kind="random", seed=5).flatten(1).argmax(1), landed)
    assert not torch.equal(guidance_mask(map_, x0, kind="random", seed=6).flatten(1).argmax(1), landed)
    alone = guidance_mask(attention(received[3:4]), x0[:1], kind="random", seed=5)
    assert alone.flatten().argmax() == landed[3]


def test_the_full_mask_marks_everything():
    x0 = normal(2, 3, 4, 6)
    assert torch.equal(guidance_mask(random_attention(2), x0, kind="full"), torch.ones(2, 1, 4, 6, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["attention", "random", "inverse", "edge"])
@pytest.mark.parametrize(("threshold", "what"), [(2.0, "nothing"), (0.49, "everything")])
def test_a_threshold_that_marks_nothing_or_everything_is_refused_with_the_range_there_is(kind, threshold, what):
    map_ = attention([[[2.0, 1.0], [0.5, 0.5]]])
    with pytest.raises(SferdError, match=rf"guidance threshold = {threshold} marks {what}; allowed: between 0.5 and 2,"):
        guidance_mask(map_, normal(1, 1, 2, 2), threshold, kind)


def test_one_marked_image_is_enough_for_a_batch():
    map_ = attention([[[2.0, 1.0], [0.5, 0.5]], [[1.0, 1.0], [1.0, 1.0]]])
    assert guidance_mask(map_, normal(2, 1, 2, 2)).sum((1, 2, 3)).tolist() == [1, 0]


# ---- bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"form": "v"}, "guidance form = 'v'; allowed: eps, x0"),
        ({"mask": "circle"}, "guidance mask = 'circle'; allowed: attention, random, inverse, edge, full"),
        ({"layer": "decoder.9.9"}, r"attention layer 'decoder.9.9'; allowed: encoder.0.0, .*"),
    ],
)
def test_unknown_forms_masks_and_layers_are_refused_before_anything_is_evaluated(settings, message):
    with pytest.raises(SferdError, match=message):
        GuidedDenoiser(teacher(), 0.3, **settings)


def test_an_unknown_mask_is_refused_by_the_function_too():
    with pytest.raises(SferdError, match="guidance mask = 'circle'"):
        guidance_mask(random_attention(), normal(4, 1, 4, 6), kind="circle")


def test_a_denoiser_without_attention_cannot_be_guided():
    with pytest.raises(SferdError, match="this one has no attention layers"):
        GuidedDenoiser(MixtureDenoiser(image_mixture(4)), 0.3)


def test_guidance_without_blur_is_no_guidance():
    # A kernel of one tap leaves x0_bar = x0_hat, so x_bar = x in either form.
    denoiser, x = teacher(), normal(2, 1, 4, 4)
    for form in FORMS:
        guided = GuidedDenoiser(denoiser, 0.5, form=form, blur_kernel=1)(x, 0.8)
        close(guided.x0, denoiser(x, 0.8).x0)
        close(guided.eps, eps_from_v(x, denoiser(x, 0.8).v, 0.8))
