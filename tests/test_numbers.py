"""Numbers that cannot be used are an error in words or a stated value, and never a NaN that slips into a table."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch

from sferd_lab.analysis.bias_variance import decompose, nested_variance
from sferd_lab.analysis.spatial import (
    attention_test,
    auroc,
    by_pixel,
    control_maps,
    error_map,
    mean_interval,
    radial_power,
    share_inside,
    spearman,
)
from sferd_lab.data import Split
from sferd_lab.denoiser import NetworkDenoiser
from sferd_lab.distill import ProgressiveTarget
from sferd_lab.errors import SferdError
from sferd_lab.guidance import MASKS, GuidedDenoiser, gaussian_blur, guidance_mask
from sferd_lab.metrics import (
    FeatureNetwork,
    Scorer,
    accuracy,
    extract,
    frechet_distance,
    kid,
    known_bad,
    memorisation_ratio,
    precision_recall_density_coverage,
    save_feature_network,
    train_feature_network,
)
from sferd_lab.semantic import MixturePrior
from sferd_lab.train import TrainSettings, train
from sferd_lab.unet import AttentionMap, UNet, UNetSettings

RNG = np.random.default_rng(0)
REAL, OTHER, THIRD = (RNG.normal(size=(count, 4)) for count in (9, 8, 10))
ALIKE = np.zeros((8, 4))
SETS: dict[str, Callable[[np.ndarray], Any]] = {
    "frechet_distance": lambda x: frechet_distance(x, REAL),
    "kid": lambda x: kid(x, REAL),
    "precision to coverage": lambda x: precision_recall_density_coverage(REAL, x, 2),
    "memorisation_ratio": lambda x: memorisation_ratio(x, THIRD, REAL, resamples=5),
}
BAD = {
    "none": OTHER[:0],
    "one": OTHER[:1],
    "NaN": np.full((8, 4), math.nan),
    "infinity": np.full((8, 4), math.inf),
    "too large for squares": np.full((8, 4), 1e200),
    "whole numbers": np.ones((8, 4), int),
    "no features": np.zeros((8, 0)),
}


@pytest.mark.parametrize("values", BAD.values(), ids=BAD)
@pytest.mark.parametrize("metric", SETS)
def test_a_metric_refuses_features_that_it_cannot_use(metric: str, values: np.ndarray) -> None:
    with pytest.raises(SferdError, match=r"allowed: floating-point \(N, dim\), N >= 2, all finite"):
        SETS[metric](values)


@pytest.mark.parametrize("metric", SETS)
def test_images_that_are_all_alike_have_finite_scores(metric: str) -> None:
    found = SETS[metric](ALIKE)
    values = found.values() if isinstance(found, dict) else found if isinstance(found, tuple) else [found]
    assert all(math.isfinite(value) for value in values)


def test_two_sets_of_one_same_image_have_no_distance_and_no_memorisation_ratio() -> None:
    assert frechet_distance(ALIKE, ALIKE) == 0
    assert kid(ALIKE, ALIKE)[0] == kid(ALIKE, ALIKE.copy())[0] == pytest.approx(0, abs=1e-12)
    assert set(precision_recall_density_coverage(ALIKE, ALIKE, 2).values()) == {0.0}
    with pytest.raises(SferdError, match="fake images equal a reference image"):
        memorisation_ratio(ALIKE, ALIKE, ALIKE)


def test_a_set_against_itself_is_the_same_as_against_its_copy() -> None:
    assert kid(REAL, REAL) == kid(REAL, REAL.copy())


def test_fewer_images_than_features_have_no_frechet_distance() -> None:
    with pytest.raises(SferdError, match="allowed: more than 4 images in each"):
        frechet_distance(OTHER[:4], REAL)


def test_an_error_that_no_resample_gives_is_none_and_no_nan() -> None:
    value, error = memorisation_ratio(OTHER, THIRD, REAL, resamples=1)
    assert math.isfinite(value)
    assert error is None


NETWORK = FeatureNetwork(1, 2, dim=4, width=4).requires_grad_(False)
IMAGES = torch.rand(30, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
CONSTANT, NAN = torch.zeros(8, 1, 8, 8), torch.full((8, 1, 8, 8), math.nan)
LABELS = torch.arange(8) % 2


def diverged() -> FeatureNetwork:
    network = train_feature_network(IMAGES[:8], LABELS, 2, steps=8, lr=1e30)
    assert not all(bool(parameter.isfinite().all()) for parameter in network.parameters())
    return network


def scorer(reference: torch.Tensor = IMAGES[:20], train: torch.Tensor = IMAGES) -> Scorer:
    return Scorer(NETWORK, "digest", "net", reference, train, k=2, floor_splits=2)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: scorer().scores(NAN), "512 values are not finite"),
        (lambda: scorer().scores(IMAGES[:1]), "1 of them; allowed: 2 or more"),
        (lambda: scorer().scores(IMAGES[:0]), "0 of them; allowed: 2 or more"),
        (lambda: scorer().scores(IMAGES[:4]), "more than 4 images in each"),
        (lambda: scorer().scores_of(np.full((8, 4), math.nan)), "all finite"),
        (lambda: scorer(IMAGES[:4]), "4 reference images; allowed: more than 4"),
        (lambda: scorer(NAN), "values are not finite"),
        (lambda: scorer(train=NAN), "values are not finite"),
        (lambda: scorer(CONSTANT).scores(CONSTANT), "fake images equal a reference image"),
        (lambda: accuracy(NETWORK, NAN, LABELS), "values are not finite"),
        (lambda: accuracy(NETWORK, CONSTANT[:0], LABELS[:0]), "0 of them"),
        (lambda: accuracy(NETWORK, CONSTANT, LABELS[:3]), r"labels \(3,\); allowed: \(8,\)"),
        (lambda: extract(NETWORK, NAN), "values are not finite"),
        (lambda: train_feature_network(NAN, LABELS, 2, steps=4), "values are not finite"),
        (lambda: train_feature_network(IMAGES[:8], LABELS, 2, steps=4, lr=math.nan), "lr = nan; allowed: .* lr finite above 0"),
        (lambda: save_feature_network("never.safetensors", diverged(), {}), "holds NaN or infinity; allowed: finite weights"),
        (lambda: known_bad(NAN, LABELS, 4), "values are not finite"),
        (lambda: known_bad(CONSTANT[:0], LABELS[:0], 0), "0 of them"),
    ],
)
def test_images_that_cannot_be_scored_are_refused(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(SferdError, match=words):
        call()


def test_all_constant_images_have_finite_scores_and_floors() -> None:
    for score in scorer().scores(CONSTANT):
        assert all(math.isfinite(value) for value in (score.value, score.floor, score.floor_sd)), score.metric
        assert score.error is None or math.isfinite(score.error)
    bad = known_bad(CONSTANT, torch.zeros(8, dtype=torch.long), 4)
    assert all(bool(images.isfinite().all()) for images, _ in bad.values())


# Maps of error and attention

MAPS = RNG.normal(size=(3, 4, 4))
X = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "call",
    [
        lambda: error_map(X * math.nan, X),
        lambda: error_map(X, X / 0),
        lambda: error_map(X[:0], X[:0]),
        lambda: control_maps(X * math.nan),
        lambda: control_maps(X[:0]),
        lambda: radial_power(X * math.inf),
        lambda: radial_power(X[:0]),
        lambda: by_pixel({"a": MAPS * math.nan}),
        lambda: by_pixel({"a": MAPS[:0]}),
        lambda: spearman(MAPS * math.nan, MAPS),
        lambda: auroc(MAPS, MAPS / 0),
        lambda: attention_test(MAPS * math.nan, MAPS, X),
        lambda: attention_test(MAPS, MAPS * math.inf, X),
        lambda: attention_test(MAPS, MAPS, X * math.nan),
        lambda: mean_interval(np.array([1.0, 2.0, math.inf])),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_maps_that_are_not_finite_or_of_no_image_are_refused(call: Callable[[], Any]) -> None:
    with pytest.raises(SferdError, match="allowed"):
        call()


def test_maps_that_are_constant_say_that_no_image_has_a_value() -> None:
    constant = np.zeros((3, 4, 4))
    assert np.isnan(spearman(constant, MAPS)).all()
    assert np.isnan(share_inside(constant, np.ones_like(constant))).all()
    assert (auroc(MAPS, constant) == 0.5).all()
    table = attention_test(constant, MAPS, X)
    assert (table["value"].isna() == (table["images"] == 0)).all()
    assert mean_interval(np.array([math.nan]))[3] == mean_interval(np.array([]))[3] == 0


# Bias and variance

STUDENTS, TEACHERS, M = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) for shape in ((3, 2, 4, 5), (3, 4, 5), (4, 5)))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: decompose(STUDENTS * math.nan, TEACHERS, M), "students .* NaN or infinity"),
        (lambda: decompose(STUDENTS, TEACHERS * math.inf, M), "teachers .* NaN or infinity"),
        (lambda: decompose(STUDENTS, TEACHERS, M * math.nan), "m .* NaN or infinity"),
        (lambda: decompose(STUDENTS, TEACHERS, None, M * math.inf), "x0 .* NaN or infinity"),
        (lambda: decompose(STUDENTS[:, :, :0], TEACHERS[:, :0], M[:0]), "students .* are empty"),
        (lambda: nested_variance(torch.ones(1, 3), 1), "2 or more of each"),
    ],
)
def test_trainings_without_numbers_are_not_decomposed(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(SferdError, match=words):
        call()


def test_trainings_that_are_all_alike_have_no_variance_and_no_bias() -> None:
    found = decompose(0 * STUDENTS, 0 * TEACHERS, 0 * M)
    assert {found[term] for term in found.maps} == {0.0}


# Guidance, prior, training


def attention(value: float | None = None) -> AttentionMap:
    weights = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(2)).softmax(-1)
    if value is not None:
        weights[0] = value
    return AttentionMap(weights, 4, 4)


def teacher() -> NetworkDenoiser:
    return NetworkDenoiser(UNet(UNetSettings(1, (4, 8), 1, (1,), 2)))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: guidance_mask(attention(1 / 16), torch.zeros(2, 1, 4, 4), math.nan), "marks nothing"),
        (lambda: gaussian_blur(X, 3, math.inf), "blur sigma = inf"),
        (lambda: gaussian_blur(X, 3, 1e-30), "blur sigma = 1e-30"),
        (lambda: gaussian_blur(X, 3.0, 1.0), "blur kernel = 3.0"),
        (lambda: GuidedDenoiser(teacher(), math.nan), "guidance weight = nan"),
        (lambda: GuidedDenoiser(teacher(), math.inf), "guidance weight = inf"),
        (lambda: GuidedDenoiser(teacher(), 0.3, threshold=math.nan), "threshold = nan"),
        (lambda: MixturePrior.fit(torch.full((10, 2), math.nan), 2, 0), "the codes hold NaN or infinity"),
        (lambda: MixturePrior.fit(torch.zeros(1, 2), 1, 0), "for 1 codes; allowed: .* of two or more"),
    ],
)
def test_guidance_and_prior_refuse_what_is_no_number(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(SferdError, match=words):
        call()


def test_attention_that_is_nan_marks_nothing_in_its_image_and_leaves_the_others_alone() -> None:
    mask, sound = (guidance_mask(map_, X[:2]) for map_ in (attention(math.nan), attention()))
    assert not mask[0].any()
    assert sound[0].any()
    assert torch.equal(mask[1], sound[1])


@pytest.mark.parametrize("mask", MASKS)
def test_a_guided_teacher_that_has_diverged_teaches_nothing(mask: str) -> None:
    # Its mask may be anything, since what it is applied to is NaN as well.
    source, student = teacher(), teacher()
    for parameter in source.parameters():
        torch.nn.init.constant_(parameter, math.nan)
    target = ProgressiveTarget(GuidedDenoiser(source.requires_grad_(False), 0.3, mask=mask, blur_kernel=3, blur_sigma=1.0), 1)
    training = train(student, target, Split(IMAGES, None), TrainSettings(steps=3, batch_size=8, device="cpu"))
    with pytest.raises(SferdError, match=r"the loss became nan at step 1|marks nothing"):
        next(training)
    assert all(bool(parameter.isfinite().all()) for parameter in student.parameters())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["lr", "clip", "weight_decay", "z_noise", "label_dropout", "ema_decay", "target_decay"])
def test_training_settings_are_finite_but_for_the_largest_norm_of_a_gradient(name: str, value: float) -> None:
    allowed = (name, value) == ("clip", math.inf)  # gradients of any norm
    with nullcontext() if allowed else pytest.raises(SferdError, match=f"{name} = .*; allowed"):
        assert getattr(TrainSettings(steps=3, **{name: value}), name) == value
