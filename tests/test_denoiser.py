import math
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sferd_lab.data import Mixture, image_mixture, two_dimensional_mixture
from sferd_lab.denoiser import ClassifierFree, Denoiser, FiniteSetDenoiser, FunctionDenoiser, MixtureDenoiser, NetworkDenoiser, Prediction
from sferd_lab.diffusion import HALF_PI, add_noise, velocity
from sferd_lab.errors import SferdError
from sferd_lab.unet import UNet, UNetSettings


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tensor(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def close(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def unet(classes=0):
    """A small network in float64 with random weights throughout: as made, its zeroed layers would hide angle, labels and attention."""
    torch.manual_seed(0)
    network = UNet(UNetSettings(channels=1, widths=(8,), blocks=1, attention=(0,), heads=1, classes=classes)).double()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    return network.requires_grad_(False)


# ---- predictions


@pytest.mark.parametrize("make", ["from_x0", "from_eps", "from_v"])
def test_a_prediction_is_the_same_from_x0_eps_or_v(make):
    x0, eps, phi = normal(3, 2), normal(3, 2, seed=1), tensor(0.2, 0.8, 1.4)
    x, v = add_noise(x0, eps, phi), velocity(x0, eps, phi)
    told = {"from_x0": x0, "from_eps": eps, "from_v": v}[make]
    prediction = getattr(Prediction, make)(x, told, phi)
    close(prediction.x0, x0)
    close(prediction.eps, eps)
    close(prediction.v, v)


# ---- the exact posterior of a mixture


WEIGHTS, MEANS, VARIANCES = np.array([0.2, 0.5, 0.3]), np.array([-1.0, 0.3, 1.2]), np.array([0.05, 0.2, 0.01])
ONE_DIMENSION = Mixture(tensor(*WEIGHTS), tensor(*MEANS)[:, None], tensor(*VARIANCES)[:, None], (1,))


@pytest.mark.parametrize("phi", [0.1, 0.5, 1.0, 1.4, HALF_PI])
def test_mixture_posterior_equals_quadrature(phi):
    x = np.linspace(-2.5, 2.5, 11)
    x0 = np.linspace(-6, 6, 40_001)
    prior = (WEIGHTS * np.exp(-((x0[:, None] - MEANS) ** 2) / (2 * VARIANCES)) / np.sqrt(VARIANCES)).sum(1)
    joint = prior * np.exp(-((x[:, None] - math.cos(phi) * x0) ** 2) / (2 * math.sin(phi) ** 2))
    expected = (joint * x0).sum(1) / joint.sum(1)
    prediction = MixtureDenoiser(ONE_DIMENSION)(torch.tensor(x)[:, None], phi)
    close(prediction.x0[:, 0], torch.tensor(expected), 1e-8)


def test_mixture_posterior_equals_importance_sampling():
    # The data's own draws, weighted by the likelihood of x: full covariances, more than one dimension, and no formula of ours.
    mixture, phi, x = two_dimensional_mixture("two", std=0.2), 0.9, tensor(0.3, -0.4)
    x0, _ = mixture.sample(200_000, torch.Generator().manual_seed(0))
    weight = (-(x - math.cos(phi) * x0).square().sum(1) / (2 * math.sin(phi) ** 2)).softmax(0)[:, None]
    expected = (weight * x0).sum(0)
    error = (weight.square() * (x0 - expected).square()).sum(0).sqrt()
    assert float(error.max()) < 0.003  # sharp enough to tell: the mixture is 1 wide
    exact = MixtureDenoiser(mixture)(x[None], phi).x0[0]
    assert bool(((exact - expected).abs() < 4 * error).all())


def test_the_error_of_the_posterior_mean_is_uncorrelated_with_x():
    # What E[x0 | x_phi] is defined by, on draws of the pair; on images with full covariances.
    mixture = image_mixture(4, components=3)
    x0, _ = mixture.sample(20_000, torch.Generator().manual_seed(0))
    x = add_noise(x0, normal(*x0.shape, seed=1), 0.7)
    products = ((x0 - MixtureDenoiser(mixture)(x, 0.7).x0) * x).flatten(1)
    z = products.mean(0) / (products.std(0) / len(x0) ** 0.5)
    assert float(z.abs().max()) < 4


def test_full_and_diagonal_covariance_agree():
    diagonal = two_dimensional_mixture("ring")
    diagonal = Mixture(diagonal.weights, diagonal.means, diagonal.covariance * tensor(1.0, 4.0), (2,))
    full = Mixture(diagonal.weights, diagonal.means, torch.diag_embed(diagonal.covariance), (2,))
    x, phi = normal(6, 2), tensor(0.0, 0.2, 0.5, 1.0, 1.5, HALF_PI)
    for a, b in zip(*((p.x0, p.eps, p.v) for p in (MixtureDenoiser(diagonal)(x, phi), MixtureDenoiser(full)(x, phi))), strict=True):
        close(a, b)


def test_turning_the_data_turns_the_posterior_mean():
    # In 16 dimensions: in the plane, a matrix of eigenvectors may equal its transpose, which would hide a swap of the two.
    mixture, turn = image_mixture(4, components=3), torch.linalg.qr(normal(16, 16, seed=2)).Q
    flat = Mixture(mixture.weights, mixture.means, mixture.covariance, (16,))
    turned = Mixture(mixture.weights, mixture.means @ turn.T, turn @ mixture.covariance @ turn.T, (16,))
    x = normal(8, 16)
    close(MixtureDenoiser(turned)(x @ turn.T, 0.6).x0, MixtureDenoiser(flat)(x, 0.6).x0 @ turn.T)


@pytest.mark.parametrize("phi", [0.0, 0.3, 1.2, HALF_PI])
def test_exact_x0_eps_and_v_are_consistent_with_x(phi):
    x = normal(5, 1, 4, 4)
    prediction = MixtureDenoiser(image_mixture(4, components=3))(x, phi)
    close(math.cos(phi) * prediction.x0 + math.sin(phi) * prediction.eps, x)
    close(math.cos(phi) * prediction.eps - math.sin(phi) * prediction.x0, prediction.v)


def test_at_pure_noise_the_posterior_mean_is_the_mean_of_the_data():
    mixture = two_dimensional_mixture("two")
    prediction = MixtureDenoiser(mixture)(normal(5, 2), HALF_PI)
    close(prediction.x0, (mixture.weights @ mixture.means).expand(5, 2))


def test_at_data_the_posterior_mean_is_x():
    x = normal(5, 2)
    close(MixtureDenoiser(two_dimensional_mixture("two"))(x, 0.0).x0, x)


def test_a_singular_covariance_has_no_posterior_at_zero():
    points = Mixture(tensor(0.5, 0.5), tensor(-1.0, 1.0)[:, None], torch.zeros(2, 1, dtype=torch.float64), (1,))
    denoiser = MixtureDenoiser(points)
    close(denoiser(tensor(0.2)[:, None], 1.0).x0, (tensor(0.2) * math.cos(1.0) / math.sin(1.0) ** 2).tanh()[:, None])  # two points: tanh
    with pytest.raises(SferdError, match=r"phi runs from 0 to 0; this MixtureDenoiser is defined from 0.001 to 1.5708"):
        denoiser(tensor(0.2)[:, None], 0.0)


# ---- the exact posterior of a finite set


IMAGES = normal(23, 1, 3, 3, seed=5)


def soft_mean(images, x, phi):
    distance = (x[:, None] - math.cos(phi) * images).flatten(2).square().sum(2)
    return torch.einsum("bn,nchw->bchw", (-distance / (2 * math.sin(phi) ** 2)).softmax(1), images)


@pytest.mark.parametrize("chunk_elements", [1, 100, 10**9])
@pytest.mark.parametrize("phi", [0.01, 0.6, 1.3, HALF_PI])
def test_finite_set_equals_the_softmax_over_images_in_any_chunks(phi, chunk_elements):
    x = add_noise(IMAGES[:5], normal(5, 1, 3, 3), phi)
    close(FiniteSetDenoiser(IMAGES, chunk_elements)(x, phi).x0, soft_mean(IMAGES, x, phi), 1e-9)


def test_finite_set_is_the_limit_of_a_mixture_with_vanishing_covariance():
    points = IMAGES.flatten(1)
    mixture = Mixture(torch.full((23,), 1 / 23, dtype=torch.float64), points, torch.full_like(points, 1e-12), (1, 3, 3))
    x = normal(5, 1, 3, 3)
    for phi in (0.3, 1.0):
        close(FiniteSetDenoiser(IMAGES)(x, phi).x0, MixtureDenoiser(mixture)(x, phi).x0, 1e-8)


def test_near_data_the_finite_set_gives_back_its_own_image():
    x = add_noise(IMAGES, normal(*IMAGES.shape), 1e-3)
    close(FiniteSetDenoiser(IMAGES)(x, 1e-3).x0, IMAGES)


def test_float32_images_are_weighed_in_float64():
    # At a small angle a float32 distance errs by more than the logits differ by; what is left is the rounding of x itself.
    images = (IMAGES[:1] + 3e-4 * normal(9, 1, 3, 3)).float()
    x = images[:4] + 1e-3 * normal(4, 1, 3, 3).float()
    exact = soft_mean(images.double(), x.double(), 2e-3)
    torch.testing.assert_close(FiniteSetDenoiser(images)(x, 2e-3).x0, exact.float(), rtol=0, atol=1e-6)


def test_finite_set_makes_no_tensor_larger_than_its_chunk():
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for part in result if isinstance(result, list | tuple) else [result]:
                # Views of the images cost nothing.
                if isinstance(part, torch.Tensor) and part.untyped_storage().data_ptr() != images.untyped_storage().data_ptr():
                    largest = max(largest, part.numel())
            return result

    images, x = normal(5_000, 1, 3, 3), normal(4, 1, 3, 3)
    denoiser = FiniteSetDenoiser(images, chunk_elements=600)
    with Watch():
        denoiser(x, 0.5)
    assert 0 < largest <= 600  # in one go the logits alone would be 20,000
    with Watch():
        FiniteSetDenoiser(images)(x, 0.5)
    assert largest > 20_000


# ---- where a denoiser is defined


@pytest.mark.parametrize("phi", [0.0, 0.09, HALF_PI, math.nan, torch.tensor([0.5, 1.51])])
def test_an_angle_outside_the_declared_range_is_refused(phi):
    denoiser = FunctionDenoiser(lambda x, phi: x, "v", phi_lo=0.1, phi_hi=1.5)
    with pytest.raises(SferdError, match=r"phi runs from .*; this FunctionDenoiser is defined from 0.1 to 1.5$"):
        denoiser(normal(2, 3), phi)
    assert denoiser.nfe() == {"teacher": 0}


def test_the_ends_of_the_range_are_inside_also_in_float32():
    denoiser = FunctionDenoiser(lambda x, phi: x, "v")
    denoiser(normal(2, 3).float(), torch.tensor([0.0, HALF_PI], dtype=torch.float32))  # float32's pi/2 lies above pi/2


def test_finite_set_refuses_data_itself():
    with pytest.raises(SferdError, match=r"phi runs from 0 to 0; this FiniteSetDenoiser is defined from 0.001 to 1.5708"):
        FiniteSetDenoiser(IMAGES)(IMAGES, 0.0)


def test_predicted_x0_and_eps_must_say_where_they_are_defined():
    with pytest.raises(SferdError, match=r"predicts = 'x0' with phi_lo = 0, .*; allowed: x0 above 0, eps below pi/2"):
        FunctionDenoiser(lambda x, phi: x, "x0")
    with pytest.raises(SferdError, match=r"predicts = 'eps' with phi_lo = 0, phi_hi = 1.5708; allowed: x0 above 0, eps below pi/2"):
        FunctionDenoiser(lambda x, phi: x, "eps")


def test_an_unknown_kind_of_prediction_is_refused():
    with pytest.raises(SferdError, match="predicts = 'noise'; allowed: x0, eps, v"):
        FunctionDenoiser(lambda x, phi: x, "noise")


@pytest.mark.parametrize(
    ("denoiser", "allowed"),
    [(MixtureDenoiser(two_dimensional_mixture()), r"\(B, 2\), the mixture's"), (FiniteSetDenoiser(IMAGES), r"\(B, 1, 3, 3\), the images'")],
    ids=["mixture", "finite set"],
)
def test_x_of_another_shape_is_refused(denoiser, allowed):
    with pytest.raises(SferdError, match=rf"x has shape \(4, 3\); allowed: {allowed}"):
        denoiser(normal(4, 3), 0.5)


@pytest.mark.parametrize("images", [torch.zeros(0, 1, 2, 2), torch.zeros(3)])
def test_a_finite_set_needs_images(images):
    with pytest.raises(SferdError, match=r"images have shape .* allowed: \(N, \.\.\.\) with N of 1 or more"):
        FiniteSetDenoiser(images)


def test_an_unknown_attention_layer_is_refused():
    with pytest.raises(SferdError, match="attention layer 'middle'; allowed: none"):
        MixtureDenoiser(two_dimensional_mixture())(normal(2, 2), 0.5, ["middle"])
    denoiser = NetworkDenoiser(unet())
    with pytest.raises(SferdError, match=r"attention layer 'top'; allowed: .*middle"):
        denoiser(normal(2, 1, 4, 4), 0.5, ["top"])


# ---- networks


def test_a_network_predicts_velocity():
    network, x, phi = unet(), normal(3, 1, 4, 4), tensor(0.2, 0.9, 1.5)
    prediction = NetworkDenoiser(network)(x, phi)
    close(prediction.v, network(x, phi))
    close(add_noise(prediction.x0, prediction.eps, phi), x)


def test_asking_for_attention_gives_those_maps_and_the_same_prediction():
    denoiser, x = NetworkDenoiser(unet()), normal(3, 1, 4, 4)
    asked = denoiser(x, 0.9, ["middle"])
    assert set(asked.attention) == {"middle"}
    close(asked.v, denoiser(x, 0.9).v)


def test_guidance_scale_one_is_the_labelled_network_and_zero_the_unlabelled():
    base, x, labels = NetworkDenoiser(unet(classes=3)), normal(3, 1, 4, 4), torch.tensor([0, 1, 2])
    labelled, unlabelled = base(x, 0.9, labels=labels), base(x, 0.9)
    assert float((labelled.v - unlabelled.v).abs().amax((1, 2, 3)).min()) > 1e-3  # or the test would say nothing
    for scale, expected in ((1.0, labelled), (0.0, unlabelled)):
        guided = ClassifierFree(base, scale)(x, 0.9, labels=labels)
        close(guided.v, expected.v)
        close(guided.x0, expected.x0)
    close(ClassifierFree(base, 3.0)(x, 0.9, labels=labels).v, 3 * labelled.v - 2 * unlabelled.v)


def test_guidance_hands_out_the_labelled_passs_attention():
    base, x, labels = NetworkDenoiser(unet(classes=3)), normal(3, 1, 4, 4), torch.tensor([0, 1, 2])
    guided = ClassifierFree(base, 2.0)
    assert guided.attention_layers == base.attention_layers
    maps = [denoiser(x, 0.9, ["middle"], labels=labels).attention["middle"].weights for denoiser in (guided, base)]
    close(*maps)


def test_guidance_needs_a_network_with_classes():
    with pytest.raises(SferdError, match="needs a UNet made with classes > 0; this one has no label for none"):
        ClassifierFree(NetworkDenoiser(unet()), 2.0)


# ---- what has been evaluated


def test_evaluations_are_counted_under_their_role():
    x, labels = normal(4, 1, 4, 4), torch.tensor([0, 1, 2, 0])
    network = NetworkDenoiser(unet(classes=3), role="student")
    network(x, 0.5, labels=labels)
    network(x, 0.5)
    assert network.nfe() == Counter(student=2)
    guided = ClassifierFree(network, 2.0)
    guided(x, 0.5, labels=labels)
    assert guided.nfe() == Counter(student=4)  # with a label and without: two
    function = FunctionDenoiser(lambda x, phi: x, "v")
    function(x, 0.5)
    assert function.nfe() == Counter(teacher=1)
    for exact, point in (
        (MixtureDenoiser(two_dimensional_mixture()), normal(4, 2)),
        (FiniteSetDenoiser(IMAGES, chunk_elements=1), normal(4, 1, 3, 3)),
    ):
        exact(point, 0.5)
        assert exact.nfe() == Counter(exact=1)


def test_a_functions_conditions_reach_it():
    denoiser = FunctionDenoiser(lambda x, phi, z: x * z, "v")
    close(denoiser(normal(2, 3), 0.5, z=tensor(2.0, 3.0)[:, None]).v, normal(2, 3) * tensor(2.0, 3.0)[:, None])


def test_the_base_class_computes_nothing():
    with pytest.raises(NotImplementedError):
        Denoiser("teacher")(normal(2, 3), 0.5)
