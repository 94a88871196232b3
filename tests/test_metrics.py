import hashlib
import math
import sys
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from prdc import compute_prdc
from sklearn.datasets import load_digits
from torch import nn

from sferd_lab import metrics
from sferd_lab.errors import SferdError
from sferd_lab.files import load_tensors, save_tensors
from sferd_lab.metrics import (
    METRICS,
    FeatureNetwork,
    Scorer,
    extract,
    frechet_distance,
    inception_fid,
    kid,
    known_bad,
    load_feature_network,
    memorisation_ratio,
    precision_recall_density_coverage,
    save_feature_network,
    train_feature_network,
)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


@pytest.fixture(scope="module")
def digits():
    """(features split, training split, reference split), each (images, labels): 450, 900 and 447 of the 1,797 digits."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return [(images[part], torch.tensor(data.target)[part]) for part in order.split([450, 900, 447])]


@pytest.fixture(scope="module")
def network(digits):
    return train_feature_network(*digits[0], 10)


@pytest.fixture(scope="module")
def scorer(network, digits):
    return Scorer(network, "0" * 64, "digits-net", digits[2][0], digits[1][0])


# ---- the feature network


def test_the_network_learns_to_tell_digits_apart(network, digits):
    images, labels = digits[2]
    assert (network(images).argmax(1) == labels).double().mean() > 0.95


def test_training_is_a_function_of_its_seed_and_leaves_the_global_generator_alone(digits):
    images, labels = digits[0]
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, torch_draw, again, other = (
        train_feature_network(images, labels, 10, seed=0, steps=5).state_dict(),
        torch.rand(1),
        train_feature_network(images, labels, 10, seed=0, steps=5).state_dict(),
        train_feature_network(images, labels, 10, seed=1, steps=5).state_dict(),
    )
    torch.set_rng_state(before)
    assert torch.equal(torch.rand(1), torch_draw)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_shifts_reach_one_pixel_each_way_and_keep_every_image_whole(monkeypatch):
    # One lit pixel at (4, 4): a shift by at most 1 leaves it lit, once, within the 3 x 3 around (4, 4).
    image = torch.full((2, 1, 8, 8), -1.0)
    image[:, :, 4, 4] = 1
    seen = []
    forward = FeatureNetwork.forward
    monkeypatch.setattr(FeatureNetwork, "forward", lambda self, x: (seen.append(x), forward(self, x))[1])
    train_feature_network(image, torch.tensor([0, 1]), 2, steps=4)
    lit = torch.cat(seen)[:, 0] > 0
    assert torch.equal(lit.sum((1, 2)), torch.ones(len(lit), dtype=torch.long))
    places = {tuple(place) for place in lit.nonzero()[:, 1:].tolist()}
    assert places == {(row, column) for row in (3, 4, 5) for column in (3, 4, 5)}


@pytest.mark.parametrize("size", [(8, 8), (9, 13), (32, 32)])
def test_features_have_the_stated_shape_at_any_size_and_feed_the_logits(size):
    network = FeatureNetwork(3, 5, dim=16)
    images = torch.rand(2, 3, *size)
    assert network.features(images).shape == (2, 16)
    assert torch.equal(network(images), network.head(network.features(images)))


@pytest.mark.parametrize("bad", [{"channels": 0}, {"classes": 1}, {"dim": 65}, {"dim": 0}, {"width": 6}, {"dim": 8.0}, {"width": 10**6}])
def test_network_settings_out_of_range_are_named(bad):
    with pytest.raises(SferdError, match="feature network settings"):
        FeatureNetwork(**{"channels": 1, "classes": 10, **bad})


def test_training_refuses_bad_labels_and_steps(digits):
    images, labels = digits[0]
    for bad in (labels[:-1], labels.double(), labels + 1, labels - 1):
        with pytest.raises(SferdError, match="labels"):
            train_feature_network(images, bad, 10)
    with pytest.raises(SferdError, match="steps = 3"):
        train_feature_network(images, labels, 10, steps=3)
    train_feature_network(images, labels, 10, steps=4)


def test_a_saved_network_comes_back_whole_with_the_hash_of_its_file(tmp_path, network, digits):
    path = tmp_path / "network.safetensors"
    save_feature_network(path, network, {"data": "digits"})
    back, digest = load_feature_network(path)
    assert back.settings == network.settings
    assert np.array_equal(extract(back, digits[2][0]), extract(network, digits[2][0]))
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()


def test_an_altered_or_foreign_network_file_is_refused(tmp_path, network):
    path = tmp_path / "network.safetensors"
    save_feature_network(path, network, {})
    tensors, info = load_tensors(path)
    # Loaded tensors are views of the file, which is about to be changed in place.
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1
    path.write_bytes(raw)
    with pytest.raises(SferdError, match="altered"):
        load_feature_network(path)
    save_tensors(path, tensors, {**info, "kind": "denoiser"})
    with pytest.raises(SferdError, match="'denoiser'"):
        load_feature_network(path)
    for settings in ({**info["settings"], "dim": 32}, {**info["settings"], "depth": 3}, {"channels": 1}):
        save_tensors(path, tensors, {**info, "settings": settings})
        with pytest.raises(SferdError, match=r"expected \(32, 256\)|lacks what rebuilds its model"):
            load_feature_network(path)
    with pytest.raises(SferdError, match="missing"):
        load_feature_network(tmp_path / "nowhere")


def test_extraction_clamps_and_does_not_depend_on_the_batch_size(network, digits):
    images = digits[2][0]
    assert np.array_equal(extract(network, images * 1.5), extract(network, (images * 1.5).clamp(-1, 1)))
    one = extract(network, images, batch_size=7)
    assert one.dtype == np.float64
    assert one.shape == (447, 64)
    np.testing.assert_allclose(one, extract(network, images), atol=1e-5)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(0, 1, 8, 8), "0 of them"),
        (torch.zeros(1, 1, 8, 8), "1 of them"),
        (torch.zeros(3, 8, 8), r"\(3, 8, 8\)"),
        (torch.zeros(3, 1, 7, 8), r"\(3, 1, 7, 8\)"),
        (torch.zeros(3, 1, 8, 8, dtype=torch.uint8), "uint8"),
        (torch.full((3, 1, 8, 8), math.nan), "192 values are not finite"),
        (torch.zeros(3, 3, 8, 8), "3 channels"),
        (np.zeros((3, 1, 8, 8)), "ndarray"),
    ],
)
def test_bad_images_are_named(network, images, message):
    with pytest.raises(SferdError, match=message):
        extract(network, images)


# ---- Frechet distance


def test_frechet_distance_of_gaussians_is_the_closed_form():
    # Samples moved to have exactly the means and covariances of the closed form; commuting covariances, so the roots are elementwise.
    def exactly(mean, deviation, n, seed):
        x = normal(n, 3, seed=seed)
        x -= x.mean(0)
        x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T
        return x * deviation @ turn.T + mean

    turn = np.linalg.qr(normal(3, 3))[0]
    mean_a, mean_b, dev_a, dev_b = np.array([1.0, 0, -2]), np.array([0.5, 3, 0]), np.array([1.0, 2, 0.1]), np.array([3.0, 0.5, 0.7])
    expected = ((mean_a - mean_b) ** 2).sum() + ((dev_a - dev_b) ** 2).sum()
    assert frechet_distance(exactly(mean_a, dev_a, 50, 1), exactly(mean_b, dev_b, 80, 2)) == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_agrees_with_torchmetrics(network, digits):
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Identity(nn.Module):
        num_features = 64

        def forward(self, x):
            return x

    a, b = extract(network, digits[1][0]), extract(network, digits[2][0])
    other = FrechetInceptionDistance(feature=Identity(), normalize=False).set_dtype(torch.float64)
    other.update(torch.from_numpy(a), real=True)
    other.update(torch.from_numpy(b), real=False)
    assert frechet_distance(a, b) == pytest.approx(other.compute().item(), rel=1e-6)


def test_frechet_distance_of_a_set_with_itself_is_zero_whatever_its_rank():
    x = normal(100, 8)
    x[:, 5:] = x[:, :3]  # rank 5
    x[:, 7] = 0
    assert frechet_distance(x, x[::-1]) == pytest.approx(0, abs=1e-12)


def test_frechet_distance_needs_more_images_than_dimensions():
    with pytest.raises(SferdError, match="8 and 20 images on 8 features"):
        frechet_distance(normal(8, 8), normal(20, 8))
    with pytest.raises(SferdError, match="20 and 8 images"):
        frechet_distance(normal(20, 8), normal(8, 8))
    frechet_distance(normal(9, 8), normal(9, 8))


# ---- KID


def direct_kid(a, b):
    xx, yy, xy = ((x @ y.T / a.shape[1] + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))
    off = [(k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in (xx, yy)]
    return off[0] + off[1] - 2 * xy.mean()


def test_kid_agrees_with_torchmetrics(network, digits):
    from torchmetrics.image.kid import KernelInceptionDistance

    class Identity(nn.Module):
        num_features = 64

        def forward(self, x):
            return x

    a, b = extract(network, digits[1][0][:400]), extract(network, digits[2][0][:400])
    other = KernelInceptionDistance(feature=Identity(), subsets=1, subset_size=400, normalize=False).set_dtype(torch.float64)
    other.update(torch.from_numpy(a), real=True)
    other.update(torch.from_numpy(b), real=False)
    assert kid(a, b)[0] == pytest.approx(other.compute()[0].item(), rel=1e-6, abs=1e-9)


def test_kid_in_blocks_is_kid_at_once(monkeypatch):
    a, b = normal(57, 4), normal(90, 4, seed=1) + 0.3
    whole = kid(a, b)
    assert whole[0] == pytest.approx(direct_kid(a, b), rel=1e-12)
    monkeypatch.setattr(metrics, "BLOCK", 300)  # three or five rows a block, the last one short
    assert kid(a, b) == pytest.approx(whole, rel=1e-12)


def test_kid_is_unbiased():
    # Equal distributions: the exact value is 0. With the diagonal kept, the mean would be off by about 100 standard errors.
    values = [kid(normal(20, 4, seed=2 * i), normal(30, 4, seed=2 * i + 1))[0] for i in range(2000)]
    assert abs(np.mean(values)) < 3 * np.std(values) / math.sqrt(len(values))


@pytest.mark.parametrize(("shift", "n", "m"), [(0.0, 100, 100), (0.0, 60, 200), (0.2, 100, 100), (0.5, 60, 200)])
def test_kid_standard_error_is_the_spread_over_repeated_draws(shift, n, m):
    # From equal distributions (a jackknife alone would be 1.41 times too large) to far apart.
    draws = np.array([kid(normal(n, 4, seed=2 * i), normal(m, 4, seed=2 * i + 1) + shift) for i in range(600)])
    assert math.sqrt((draws[:, 1] ** 2).mean()) == pytest.approx(draws[:, 0].std(ddof=1), rel=0.25)


def test_kid_needs_four_images_and_one_dim():
    with pytest.raises(SferdError, match="3 and 9 images"):
        kid(normal(3, 2), normal(9, 2))
    with pytest.raises(SferdError, match="different dims"):
        kid(normal(9, 2), normal(9, 3))
    with pytest.raises(SferdError, match="all finite"):
        kid(normal(9, 2), np.full((9, 2), np.nan))


# ---- precision, recall, density, coverage


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize(("n", "m", "block"), [(150, 150, 2**22), (150, 220, 1000), (220, 90, 1000)])
def test_the_four_agree_with_their_authors_package(monkeypatch, capsys, k, n, m, block):
    monkeypatch.setattr(metrics, "BLOCK", block)
    real, fake = normal(n, 5), 0.8 * normal(m, 5, seed=1) + 0.3
    ours = precision_recall_density_coverage(real, fake, k)
    assert ours == pytest.approx(compute_prdc(real, fake, k), rel=1e-12)
    assert 0 < ours["recall"] < 1
    assert 0 < ours["precision"] < 1


def test_k_must_be_below_both_set_sizes():
    precision_recall_density_coverage(normal(6, 2), normal(9, 2), 5)
    for real, fake, k in ((5, 9, 5), (9, 5, 5), (9, 9, 0)):
        with pytest.raises(SferdError, match=f"k = {k}"):
            precision_recall_density_coverage(normal(real, 2), normal(fake, 2), k)


# ---- memorisation


@pytest.mark.parametrize("train_size", [100, 300, 450, 1500])
def test_copies_of_training_images_have_ratio_zero_however_large_the_training_set(train_size):
    # A median would miss them from twice the reference's size on: under half of a block's distances are zeros.
    train, reference = normal(train_size, 4), normal(300, 4, seed=1)
    copies = train[np.random.default_rng(2).integers(train_size, size=400)]
    assert memorisation_ratio(copies, train, reference) == (0, 0)


def test_every_training_image_counts():
    # Also in the last, filled-up block of 450 = 300 + 150.
    train, reference = normal(450, 4), normal(300, 4, seed=1)
    assert all(memorisation_ratio(np.repeat(train[i : i + 1], 10, 0), train, reference, resamples=2)[0] == 0 for i in range(0, 450, 15))


@pytest.mark.parametrize(("train_size", "reference_size"), [(100, 300), (300, 300), (450, 300), (1500, 300)])
@pytest.mark.parametrize("spread", [1.0, 0.5, 3.0])
def test_images_that_know_no_training_set_have_ratio_one(train_size, reference_size, spread):
    # Also far worse images than real ones (spread 3) and blander ones (0.5): the ratio must not measure quality.
    ratios = [
        memorisation_ratio(
            spread * normal(200, 4, seed=3 * i),
            normal(train_size, 4, seed=3 * i + 1),
            normal(reference_size, 4, seed=3 * i + 2),
            resamples=2,
        )[0]
        for i in range(60)
    ]
    assert np.mean(ratios) == pytest.approx(1, abs=0.01 + 3 * np.std(ratios) / math.sqrt(60))
    assert np.std(ratios) < 0.2


def test_the_ratio_is_below_one_near_the_training_set_and_above_near_the_reference():
    train, reference = normal(300, 4), normal(300, 4, seed=1)
    near = train[:200] + 0.1 * normal(200, 4, seed=2)
    value, error = memorisation_ratio(near, train, reference)
    assert value + 5 * error < 1
    inverse, _ = memorisation_ratio(near, reference, train)
    assert inverse == pytest.approx(1 / value, rel=1e-12)


def test_the_ratios_error_is_the_spread_over_draws_of_fakes():
    train, reference = normal(600, 4), normal(200, 4, seed=1)
    draws = np.array([memorisation_ratio(normal(200, 4, seed=i), train, reference) for i in range(2, 62)])
    assert draws[:, 1].mean() == pytest.approx(draws[:, 0].std(ddof=1), rel=0.3)
    assert memorisation_ratio(normal(9, 4), train, reference, seed=3) == memorisation_ratio(normal(9, 4), train, reference, seed=3)


def test_copies_of_the_reference_are_an_error():
    reference = normal(50, 4)
    with pytest.raises(SferdError, match="equal a reference image"):
        memorisation_ratio(reference, normal(50, 4, seed=1), reference)


# ---- scores and floors


def test_every_score_names_its_network_and_stands_beside_its_floor(scorer, digits):
    scores = scorer.scores(digits[1][0][:300])
    assert [score.metric for score in scores] == list(METRICS)
    assert {(score.n, score.features, score.features_sha256) for score in scores} == {(300, "digits-net", "0" * 64)}
    assert {score.metric for score in scores if score.error is None} == {"fd", "precision", "recall", "density", "coverage"}
    assert {score.metric: (score.floor, score.floor_sd) for score in scores} == scorer.floors(300)
    assert all(set(asdict(score)) >= {"value", "error", "floor", "floor_sd"} for score in scores)


def test_scores_compare_fakes_with_the_reference_and_only_the_ratio_with_the_training_set(scorer, network, digits):
    images = digits[0][0][:300] * 0.9
    fake, train, reference = (extract(network, x) for x in (images, digits[1][0], digits[2][0]))
    expected = {"fd": (frechet_distance(fake, reference), None), "kid": kid(fake, reference)}
    expected |= {name: (value, None) for name, value in precision_recall_density_coverage(reference, fake, 5).items()}
    expected["memorisation_ratio"] = memorisation_ratio(fake, train, reference)
    assert {score.metric: (score.value, score.error) for score in scorer.scores(images)} == expected


def test_floors_are_what_real_images_score(scorer):
    floors = scorer.floors(300)
    assert abs(floors["kid"][0]) < floors["kid"][1]
    for metric in ("precision", "recall", "density", "coverage", "memorisation_ratio"):
        assert floors[metric][0] == pytest.approx(1, abs=0.15)


def test_a_floor_is_the_mean_over_disjoint_sets_of_the_stated_sizes(scorer, monkeypatch):
    sizes, fresh = [], Scorer(scorer.network, "", "net", torch.zeros(447, 1, 8, 8), torch.zeros(900, 1, 8, 8), floor_splits=3)
    fresh.train, fresh.reference = np.arange(900.0)[:, None], np.arange(900.0, 1347)[:, None]

    def values(self, fake, reference, train, held_out):
        assert not set(fake.ravel()) & set(reference.ravel())
        assert not set(fake.ravel()) & set(train.ravel())
        assert not set(fake.ravel()) & set(held_out.ravel())
        assert not set(train.ravel()) & set(held_out.ravel())
        sizes.append((len(fake), len(reference), len(train), len(held_out)))
        return dict.fromkeys(METRICS, (float(len(sizes)), None))

    monkeypatch.setattr(Scorer, "_values", values)
    assert fresh.floors(500) == dict.fromkeys(METRICS, (2.0, 1.0))
    # 847 images are left, and 847 x 447 / 1347 = 281.1, so 282 of them, are held out.
    assert sizes == [(500, 447, 565, 282)] * 3
    fresh.floors(500)
    assert len(sizes) == 3


def test_floors_are_a_function_of_the_seed(network, digits):
    def floors(seed):
        return Scorer(network, "", "net", digits[2][0], digits[1][0], floor_splits=2, seed=seed).floors(100)

    assert floors(0) == floors(0)
    # The ratio draws its own blocks; the distance has no randomness but the splits'.
    assert floors(0)["fd"] != floors(1)["fd"]


def test_the_metrics_catch_what_is_known_to_be_bad(scorer, digits):
    for name, (images, metric) in known_bad(*digits[1], 450).items():
        assert images.shape == (450, 1, 8, 8)
        scores = {score.metric: score for score in scorer.scores(images)}
        beyond = (scores[metric].value - scores[metric].floor) / scores[metric].floor_sd
        assert (beyond > 5) if metric == "fd" else (beyond < -5), f"{name}: {metric} is {beyond:.1f} spreads from its floor"


def test_known_bad_images_are_what_they_say(digits):
    images, labels = digits[1]
    bad = known_bad(images, labels, 450, seed=3)
    rows = {image.numpy().tobytes(): label.item() for image, label in zip(images, labels, strict=True)}
    assert len({rows[image.numpy().tobytes()] for image in bad["one class"][0]}) == 1
    copies = [image.numpy().tobytes() for image in bad["copies of training images"][0]]
    assert set(copies) <= set(rows)
    assert len(set(copies)) == 450
    assert (bad["blurred real"][0].diff().square().mean() < 0.5 * images.diff().square().mean()).item()
    with pytest.raises(SferdError, match="n = 901"):
        known_bad(images, labels, 901)


def test_too_many_too_few_or_misshapen_images_are_refused(scorer, network, digits):
    with pytest.raises(SferdError, match=r"n = 1000 images.*900 training \+ 447 reference"):
        scorer.scores(torch.zeros(1000, 1, 8, 8) + 0.1 * torch.randn(1000, 1, 8, 8))
    with pytest.raises(SferdError, match="64 and 447 images on 64 features"):
        scorer.scores(digits[1][0][:64])
    with pytest.raises(SferdError, match=r"\(1, 16, 16\)"):
        scorer.scores(torch.zeros(100, 1, 16, 16))
    with pytest.raises(SferdError, match="64 reference images; allowed: more than 64"):
        Scorer(network, "", "net", digits[2][0][:64], digits[1][0])
    with pytest.raises(SferdError, match="training images run from -255 to 255"):
        Scorer(network, "", "net", digits[2][0], digits[1][0] * 255)
    with pytest.raises(SferdError, match=r"training images have shape \(1, 16, 16\)"):
        Scorer(network, "", "net", digits[2][0], torch.zeros(100, 1, 16, 16))
    with pytest.raises(SferdError, match="floor_splits = 1"):
        Scorer(network, "", "net", digits[2][0], digits[1][0], floor_splits=1)


def test_inception_fid_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(SferdError, match=r"pip install sferd-lab\[fid\].*torchvision"):
        inception_fid(torch.zeros(4, 1, 8, 8), torch.zeros(4, 1, 8, 8))


def test_inception_fid_hands_over_eight_bit_colour_images(monkeypatch):
    # A stand-in for torch-fidelity, which is not among the test requirements: this shows what it is given, not that it works.
    given = {}
    stub = SimpleNamespace(calculate_metrics=lambda **settings: given.update(settings) or {"frechet_inception_distance": 7.0})
    monkeypatch.setitem(sys.modules, "torch_fidelity", stub)
    ramp = torch.linspace(-1, 1, 256).reshape(1, 1, 16, 16).repeat(3, 1, 1, 1)
    assert inception_fid(ramp * 2, ramp) == 7
    assert isinstance(given["input2"], torch.utils.data.Dataset)
    assert len(given["input2"]) == 3
    assert torch.equal(given["input2"][1], torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16).expand(3, -1, -1))
    assert given["input1"][0].min() == 0
    assert given["input1"][0].max() == 255

    def unreachable(**settings):
        raise OSError("no route to host")

    stub.calculate_metrics = unreachable
    with pytest.raises(SferdError, match=r"weights.*no route to host"):
        inception_fid(ramp, ramp)


def test_a_scorer_takes_what_it_is_asked_and_floors_it_is_told(digits, network):
    known = {100: {"fd": [0.25, 0.05], "kid": [0.0, 0.001], "precision": [0.9, 0.01]}}
    scorer = Scorer(network, "", "net", digits[2][0], digits[1][0], metrics=("kid", "fd"), known_floors=known)
    found = scorer.scores(digits[1][0][:100])
    assert [(score.metric, score.floor, score.floor_sd) for score in found] == [("fd", 0.25, 0.05), ("kid", 0.0, 0.001)]
    whole = Scorer(network, "", "net", digits[2][0], digits[1][0], floor_splits=2).scores(digits[1][0][:100])
    assert [score.value for score in found] == [score.value for score in whole if score.metric in ("fd", "kid")]
    with pytest.raises(SferdError, match="metric 'fid'; allowed: fd, kid"):
        Scorer(network, "", "net", digits[2][0], digits[1][0], metrics=("fid",))
