"""Maps against naive loops, statistics of an image against scipy and scikit-learn; intervals that keep their level on planted truths."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.ndimage import gaussian_filter
from sklearn.metrics import roc_auc_score

from sferd_lab.analysis import spatial
from sferd_lab.analysis.spatial import (
    CONTROLS,
    attention_maps,
    attention_test,
    auroc,
    by_pixel,
    control_maps,
    error_map,
    mean_interval,
    partial_spearman,
    radial_power,
    share_inside,
    spearman,
    to_grid,
)
from sferd_lab.data import image_mixture
from sferd_lab.denoiser import MixtureDenoiser, NetworkDenoiser
from sferd_lab.errors import SferdError
from sferd_lab.unet import UNet, UNetSettings

PLAIN, PAIRED, PARTIAL = ("spearman", "auroc"), "spearman less attention's", "spearman given controls"
STATISTICS = {
    **dict.fromkeys(CONTROLS, (*PLAIN, PAIRED)),
    "attention": (*PLAIN, PARTIAL),
    **dict.fromkeys(("attention of another image", "shuffled attention"), (*PLAIN, PAIRED, PARTIAL)),
}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def smooth(*shape, seed=0):
    """Noise blurred over its last two axes, of unit variance: neighbouring pixels agree, as in real maps."""
    blurred = gaussian_filter(normal(*shape, seed=seed), 1.0, mode="wrap", axes=(-2, -1))
    return blurred / blurred.std()


def tied(*shape, seed=0):
    """Whole numbers from 0 to 6: many positions are equal."""
    return np.random.default_rng(seed).integers(0, 7, shape).astype(float)


def kron(maps, factor):
    """Every position repeated ``factor`` times each way."""
    return np.kron(maps, np.ones((1, factor, factor)))


def mixed(control, own, share, seed):
    """``control`` at a random ``share`` of the positions and ``own`` at the others.

    Its rank then depends on the control's along a straight line, so ranks regressed on ranks remove all that the control explains.
    """
    return np.where(np.random.default_rng(seed).random(control.shape) < share, control, own)


def close(a, b, tolerance=1e-12):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


# ---- maps


def test_an_error_map_is_the_squared_difference_averaged_over_channels_in_float64():
    predicted, reference = (torch.from_numpy(normal(2, 3, 4, 5, seed=seed)).float() for seed in (0, 1))
    found = error_map(predicted, reference)
    assert found.dtype == np.float64
    naive = np.zeros((2, 4, 5))
    for n, c, i, j in np.ndindex(2, 3, 4, 5):
        naive[n, i, j] += (reference[n, c, i, j].item() - predicted[n, c, i, j].item()) ** 2 / 3
    # float32 arithmetic would be off by 1e-7.
    close(found, naive, 1e-14)


@pytest.mark.parametrize(("predicted", "reference"), [((2, 1, 4, 4), (2, 3, 4, 4)), ((1, 1, 4, 4), (2, 1, 4, 4)), ((2, 4, 4), (2, 4, 4))])
def test_an_error_map_needs_two_batches_of_one_shape(predicted, reference):
    with pytest.raises(SferdError, match=r"predicted \(.*\) and reference \(.*\); allowed: the same \(N, C, H, W\)"):
        error_map(torch.zeros(predicted), torch.zeros(reference))


def teacher(**settings):
    """A small network with random weights throughout."""
    torch.manual_seed(0)
    network = UNet(UNetSettings(**{"widths": (8, 8), "blocks": 1, "heads": 2} | settings))
    for parameter in network.parameters():
        # Drawn in the order of the indices: normal_ fills in that of memory, which is another with channels last.
        parameter.data.copy_(0.3 * torch.randn(parameter.shape))
    return NetworkDenoiser(network.requires_grad_(False))


def test_attention_maps_average_1_at_each_layers_own_size_for_every_layer():
    denoiser, x = teacher(), torch.from_numpy(normal(3, 1, 4, 8)).float()
    maps = attention_maps(denoiser, x, 0.8)
    assert tuple(maps) == denoiser.attention_layers
    assert {name: values.shape for name, values in maps.items()} == {
        name: (3, 4, 8) if ".0." in name else (3, 2, 4) for name in denoiser.attention_layers
    }
    weights = denoiser(x, 0.8, denoiser.attention_layers).attention
    for name, values in maps.items():
        assert values.dtype == np.float64
        # The softmax is float32.
        close(values.mean((1, 2)), 1, 1e-6)
        assert values.std() > 0.01
        # Over heads the mean, over queries the sum.
        close(values.reshape(3, -1), weights[name].weights.double().mean(1).sum(1).numpy(), 1e-6)


def test_attention_maps_are_those_of_the_layers_asked_for_under_the_condition_given():
    denoiser, x = teacher(classes=3), torch.from_numpy(normal(2, 1, 4, 4)).float()
    maps = attention_maps(denoiser, x, 0.8, ["middle"], labels=torch.tensor([2, 0]))
    assert set(maps) == {"middle"}
    assert np.abs(maps["middle"] - attention_maps(denoiser, x, 0.8, ["middle"])["middle"]).max() > 1e-3


def test_attention_maps_of_an_unknown_layer_are_refused_and_a_denoiser_without_attention_has_none():
    x = torch.from_numpy(normal(2, 1, 4, 4)).float()
    with pytest.raises(SferdError, match=r"attention layer 'decoder\.9\.9'; allowed: encoder\.0\.0"):
        attention_maps(teacher(), x, 0.8, ["decoder.9.9"])
    assert attention_maps(MixtureDenoiser(image_mixture(4)), x.double(), 0.8) == {}


def test_a_finer_grid_repeats_every_position():
    maps = normal(3, 2, 4)
    assert np.array_equal(to_grid(maps, (6, 12)), kron(maps, 3))
    assert np.array_equal(to_grid(maps, (2, 4)), maps)


def test_a_coarser_grid_averages_blocks_and_undoes_the_finer_one():
    maps = normal(3, 6, 12)
    naive = np.array([[[image[3 * i : 3 * i + 3, 3 * j : 3 * j + 3].mean() for j in range(4)] for i in range(2)] for image in maps])
    close(to_grid(maps, (2, 4)), naive)
    close(to_grid(to_grid(maps, (12, 24)), (6, 12)), maps)


@pytest.mark.parametrize("size", [(2, 4), (6, 12), (12, 24)])
def test_another_grid_keeps_each_maps_mean(size):
    maps = normal(3, 6, 12)
    close(to_grid(maps, size).mean((1, 2)), maps.mean((1, 2)))


@pytest.mark.parametrize(
    ("shape", "size"), [((4, 4), (6, 6)), ((6, 6), (4, 4)), ((4, 4), (8, 4)), ((4, 4), (2, 4)), ((2, 4), (4, 4)), ((4, 2), (4, 4))]
)
def test_a_grid_whose_sides_are_not_one_multiple_is_refused(shape, size):
    message = f"a map of {shape[0]}x{shape[1]} cannot become {size[0]}x{size[1]}; allowed: whole multiples or whole parts of its sides"
    with pytest.raises(SferdError, match=message):
        to_grid(np.zeros((1, *shape)), size)


def test_maps_that_are_not_a_batch_are_refused():
    with pytest.raises(SferdError, match=r"maps of shape \(4, 4\); allowed: \(N, h, w\)"):
        to_grid(np.zeros((4, 4)), (8, 8))


def test_control_maps_are_those_of_naive_loops_image_by_image():
    images = normal(3, 2, 5, 6)
    gradient, variance, size = np.zeros((3, 3, 5, 6))
    for n, c, i, j in np.ndindex(images.shape):
        image = images[n, c]

        def at(row, column, image=image):
            """A pixel, the border's repeated outside."""
            return image[min(max(row, 0), 4), min(max(column, 0), 5)]

        gradient[n, i, j] += ((at(i, j + 1) - at(i, j - 1)) / 2) ** 2 + ((at(i + 1, j) - at(i - 1, j)) / 2) ** 2
        variance[n, i, j] += np.var([at(i + a, j + b) for a in (-1, 0, 1) for b in (-1, 0, 1)]) / 2
        size[n, i, j] += abs(image[i, j]) / 2
    maps = control_maps(torch.from_numpy(images))
    assert tuple(maps) == CONTROLS == ("gradient energy", "local variance", "|x0|")
    for name, naive in zip(CONTROLS, (gradient, variance, size), strict=True):
        close(maps[name], naive)
        # An image's map does not depend on its batch.
        close(control_maps(torch.from_numpy(images[1:2]))[name], naive[1:2])


def test_control_maps_of_float32_images_are_float64_and_a_flat_image_has_no_negative_variance():
    maps = control_maps(torch.full((1, 1, 4, 4), 0.1))
    assert all(values.dtype == np.float64 for values in maps.values())
    assert (maps["local variance"] >= 0).all()
    close(maps["local variance"], 0, 1e-15)


def test_by_pixel_averages_maps_over_images_one_row_a_position():
    table = by_pixel({"a": normal(4, 2, 3), "b": normal(4, 1, 2, seed=1)})
    assert list(table.columns) == ["map", "row", "column", "value"]
    assert table["map"].tolist() == ["a"] * 6 + ["b"] * 2
    a = table[table["map"] == "a"].pivot(index="row", columns="column", values="value")
    close(a.to_numpy(), normal(4, 2, 3).mean(0))


# ---- one number an image


@pytest.mark.parametrize("make", [normal, tied])
def test_spearman_is_scipys_within_each_image(make):
    a, b = make(9, 4, 5), make(9, 4, 5, seed=1) + make(9, 4, 5)
    close(spearman(a, b), [stats.spearmanr(x.ravel(), y.ravel()).statistic for x, y in zip(a, b, strict=True)])


def test_spearman_of_a_constant_image_is_nan_and_leaves_the_others_alone():
    a, b = normal(3, 4, 4), normal(3, 4, 4, seed=1)
    # 0.1 summed 16 times is not 1.6: a mean that rounds must not pass for a direction.
    a[1] = 0.1
    found = spearman(a, b)
    assert np.isnan(found).tolist() == [False, True, False]
    assert np.isnan(spearman(b, a)).tolist() == [False, True, False]
    close(found[[0, 2]], spearman(a[[0, 2]], b[[0, 2]]))


def test_spearman_looks_at_order_alone_and_runs_from_minus_1_to_1():
    a = normal(4, 5, 5)
    close(spearman(a, np.exp(a)), 1)
    close(spearman(a, -(a**3)), -1)


@pytest.mark.parametrize("make", [normal, tied])
def test_the_partial_correlation_given_one_map_is_the_textbook_formula(make):
    a, b, c = make(9, 4, 5), make(9, 4, 5, seed=1) + make(9, 4, 5), make(9, 4, 5, seed=2) + make(9, 4, 5)
    ab, ac, bc = spearman(a, b), spearman(a, c), spearman(b, c)
    close(partial_spearman(a, b, [c]), (ab - ac * bc) / np.sqrt((1 - ac**2) * (1 - bc**2)))


@pytest.mark.parametrize("controls", [2, 3, 5])
def test_the_partial_correlation_given_several_maps_is_that_of_least_squares_residuals_of_ranks(controls):
    shared = tied(controls, 6, 4, 5, seed=5)
    a, b = tied(6, 4, 5) + shared.sum(0), tied(6, 4, 5, seed=1) + shared[0]
    found = partial_spearman(a, b, list(shared))
    for n in range(6):
        ranks = [stats.rankdata(values[n]) for values in (a, b, *shared)]
        design = np.column_stack([np.ones(20), *ranks[2:]])
        rest = [values - design @ np.linalg.lstsq(design, values)[0] for values in ranks[:2]]
        close(found[n], np.corrcoef(rest)[0, 1])


def test_given_nothing_or_constants_or_a_map_twice_the_partial_correlation_changes_nothing():
    a, b, c = normal(5, 4, 4), normal(5, 4, 4, seed=1), normal(5, 4, 4, seed=2)
    close(partial_spearman(a, b, []), spearman(a, b))
    close(partial_spearman(a, b, [np.ones_like(a)]), spearman(a, b))
    close(partial_spearman(a, b, [c, np.exp(c), -c]), partial_spearman(a, b, [c]))


@pytest.mark.parametrize("size", [4, 16, 28, 64])
def test_nothing_is_left_of_a_map_given_itself_at_any_size(size):
    # The residual of ranks up to size^2 is zero but for rounding, which grows with them.
    a, b, c = normal(3, size, size), normal(3, size, size, seed=1), normal(3, size, size, seed=2)
    assert np.isnan(partial_spearman(a, b, [a, c])).all()
    assert np.isnan(partial_spearman(a, b, [c, np.exp(b)])).all()


def test_what_two_neighbouring_ranks_exchanged_leave_is_more_than_rounding():
    a = np.arange(64.0 * 64).reshape(1, 64, 64)
    b = a.copy()
    b[0, 10, 10], b[0, 10, 11] = a[0, 10, 11], a[0, 10, 10]
    close(partial_spearman(b, -b, [a]), -1, 1e-6)


@pytest.mark.parametrize("top", [0.05, 0.2, 0.5, 0.8])
@pytest.mark.parametrize("make", [normal, tied])
def test_auroc_is_scikit_learns_for_the_top_share_of_each_images_error(make, top):
    score, error = make(9, 5, 6), normal(9, 5, 6, seed=1)
    score += make(9, 5, 6, seed=2) * (error > 0)
    count = round(top * 30)
    expected = []
    for own, wrong in zip(score.reshape(9, -1), error.reshape(9, -1), strict=True):
        expected.append(roc_auc_score(np.isin(np.arange(30), np.argsort(wrong)[-count:]), own))
    close(auroc(score, error, top), expected)


def test_auroc_marks_the_top_fifth_by_default():
    score, error = normal(4, 5, 6), normal(4, 5, 6, seed=1)
    close(auroc(score, error), auroc(score, error, 0.2))


def test_auroc_runs_from_0_to_1_and_is_one_half_for_a_constant_score():
    error = normal(4, 5, 5)
    close(auroc(error, error), 1)
    close(auroc(-error, error), 0)
    close(auroc(np.ones_like(error), error), 0.5)


def test_among_equal_errors_auroc_averages_over_the_ways_to_choose_the_top():
    # 10 positions, top 3: one error of 2, then five of 1 for two places.
    error, score = np.array([1, 1, 2, 0, 1, 0, 1, 0, 1, 0.0]).reshape(1, 2, 5), tied(1, 2, 5)
    pairs = itertools.combinations(np.flatnonzero(error == 1), 2)
    ways = [roc_auc_score(np.isin(np.arange(10), [2, *chosen]), score.ravel()) for chosen in pairs]
    assert np.ptp(ways) > 0.1
    close(auroc(score, error, 0.3), np.mean(ways))
    # Where nothing is above anything, position must not decide.
    close(auroc(score, np.zeros_like(error)), 0.5)


def test_auroc_has_a_position_on_either_side_however_small_the_image():
    score = np.array([[[1.0, 2.0], [3.0, 4.0]]])
    assert auroc(score, score, 0.01) == auroc(score, score, 0.99) == 1


@pytest.mark.parametrize("top", [0.0, 1.0, -0.2, math.nan])
def test_a_top_share_is_between_0_and_1(top):
    with pytest.raises(SferdError, match=rf"top = {top}; allowed: between 0 and 1, exclusive"):
        auroc(normal(2, 4, 4), normal(2, 4, 4), top)


COMPARE = {
    "spearman": spearman,
    "partial": lambda a, b: partial_spearman(a, b, [b]),
    "given": lambda a, b: partial_spearman(a, a, [b]),
    "auroc": auroc,
    "share": share_inside,
}


@pytest.mark.parametrize("compare", COMPARE.values(), ids=list(COMPARE))
def test_maps_of_two_shapes_too_few_positions_no_images_or_nan_are_refused(compare):
    good = (normal(2, 4, 4) > 0).astype(float)
    with pytest.raises(SferdError, match=r"maps of shapes .*; allowed: one shape \(N, h, w\) of 3 positions or more"):
        compare(good, good[:, :2])
    for shape in ((2, 1, 2), (0, 4, 4), (16,)):
        with pytest.raises(SferdError, match=r"maps of shapes .*; allowed: one shape \(N, h, w\) of 3 positions or more"):
            compare(np.ones(shape), np.ones(shape))
    for value in (np.nan, np.inf):
        bad = good.copy()
        bad[1, 0, 0] = value
        for pair in ((bad, good), (good, bad)):
            with pytest.raises(SferdError, match="a map holds NaN or infinity; allowed: finite values"):
                compare(*pair)


# ---- share of the error inside a mask


def test_uniform_error_has_its_fair_share_inside_any_mask():
    mask = (normal(5, 4, 6) > 0.5).astype(float)
    close(share_inside(np.full((5, 4, 6), 0.3), mask), 1)


@pytest.mark.parametrize("inside", [1, 6, 24])
def test_error_wholly_inside_a_mask_has_one_over_its_area(inside):
    mask = np.zeros((3, 24))
    mask[:, :inside] = 1
    mask = np.random.default_rng(0).permuted(mask, axis=1).reshape(3, 4, 6)
    error = normal(3, 4, 6) ** 2
    close(share_inside(error * mask, mask), 24 / inside)
    close(share_inside(error * (1 - mask) + 1e-300, mask), 0 if inside < 24 else 1)


def test_a_share_is_the_mean_error_inside_over_the_mean_error():
    error, mask = normal(5, 4, 6) ** 2, normal(5, 4, 6, seed=1) > 0
    close(share_inside(error, mask), [e[m].mean() / e.mean() for e, m in zip(error, mask, strict=True)])


def test_an_empty_mask_or_an_image_without_error_has_no_share():
    error, mask = normal(3, 4, 4) ** 2, np.ones((3, 4, 4))
    mask[0], error[2] = 0, 0
    found = share_inside(error, mask)
    assert np.isnan(found).tolist() == [True, False, True]
    close(found[1], 1)


def test_a_mask_of_other_values_than_0_and_1_is_refused():
    with pytest.raises(SferdError, match="the mask holds values other than 0 and 1; allowed: those two"):
        share_inside(normal(2, 4, 4) ** 2, np.full((2, 4, 4), 0.5))


# ---- power by frequency

SIZES = [(8, 8), (7, 7), (6, 9), (5, 8), (1, 7)]


@pytest.mark.parametrize("size", SIZES)
def test_the_powers_add_up_to_the_mean_squared_error(size):
    residual = normal(4, 3, *size) + 0.5
    table = radial_power(torch.from_numpy(residual).float())
    assert list(table.columns) == ["frequency", "power"]
    assert table["frequency"].tolist() == list(range(len(table)))
    close(table["power"].sum(), np.square(residual).mean(), 1e-6)


@pytest.mark.parametrize("size", [(16, 16), (15, 17)])
@pytest.mark.parametrize("cycles", [(0, 0), (0, 3), (5, 0), (3, -4), (3, 3), (7, 7)])
def test_a_plane_wave_lands_at_its_number_of_cycles_with_half_its_amplitude_squared(size, cycles):
    row, column = (np.arange(length) / length for length in size)
    wave = 0.6 * np.cos(2 * np.pi * (cycles[0] * row[:, None] + cycles[1] * column) + 0.3)
    power = radial_power(torch.from_numpy(wave)[None, None].repeat(2, 1, 1, 1))["power"].to_numpy()
    # (3, 3) is 4.24 cycles along its own direction, (7, 7) 9.90.
    expected = np.zeros(len(power))
    expected[round(math.hypot(*cycles))] = (0.6 * math.cos(0.3)) ** 2 if cycles == (0, 0) else 0.6**2 / 2
    close(power, expected)


def test_the_highest_frequency_of_an_even_side_is_half_of_it():
    stripes = torch.tensor([1.0, -1.0]).repeat(4).expand(1, 1, 8, 8)
    close(radial_power(stripes)["power"], [0, 0, 0, 0, 1, 0, 0])


@pytest.mark.parametrize("size", [(12, 12), (9, 11)])
def test_white_noise_has_the_same_power_in_every_coefficient(size):
    power = radial_power(torch.from_numpy(normal(2000, 1, *size)))["power"].to_numpy()
    count = np.zeros(len(power))
    for u, v in itertools.product(*(range(-(length // 2), (length + 1) // 2) for length in size)):
        count[round(math.hypot(u, v))] += 1
    # The mean of 2000 or more squares; the zero frequency is one real coefficient, of relative deviation sqrt(2 / 2000) = 0.03.
    close(power / count * math.prod(size), 1, 0.13)


# ---- mean and interval over images


def test_the_interval_of_many_values_is_the_normal_one_at_each_level():
    values = normal(2000)
    for level in (0.5, 0.9, 0.99):
        mean, low, high, images = mean_interval(values, level, resamples=5000)
        assert (mean, images) == (values.mean(), 2000)
        arm = stats.norm.ppf((1 + level) / 2) * values.std() / math.sqrt(2000)
        # 5000 resamples know the 99.5% quantile of a normal to within 3% (its standard error).
        close((mean - low, high - mean), arm, 0.1)


def test_the_interval_is_efrons_corrected_for_bias_and_skew():
    values = np.exp(1.5 * normal(40))
    means = np.random.default_rng(9).choice(values, (40_000, 40)).mean(1)
    bias = stats.norm.ppf((means < values.mean()).mean())
    # For a mean the acceleration is its skewness over 6 sqrt(n).
    acceleration = stats.skew(values) / 6 / math.sqrt(40)
    z = bias + stats.norm.ppf([0.025, 0.975])
    expected = np.quantile(means, stats.norm.cdf(bias + z / (1 - acceleration * z)))
    percentile = np.quantile(means, [0.025, 0.975])
    _, low, high, _ = mean_interval(values, resamples=20_000)
    assert np.abs(np.array([low, high]) / expected - 1).max() < 0.02
    assert (np.array([low, high]) > 1.05 * percentile).all()


def test_the_interval_is_fixed_by_its_seed():
    values = normal(30)
    assert mean_interval(values, seed=3) == mean_interval(values, seed=3)
    assert mean_interval(values, seed=3) != mean_interval(values, seed=4)


def test_nan_is_left_out_and_the_rest_counted():
    values = normal(30)
    assert mean_interval(np.insert(values, [0, 7, 30], np.nan)) == mean_interval(values)
    assert mean_interval(values)[3] == 30


@pytest.mark.parametrize("values", [[0.3] * 40, [np.nan, 0.1, 0.2], [0.4]], ids=["constant", "two", "one"])
def test_too_few_values_or_equal_ones_have_a_mean_and_no_interval(values):
    mean, low, high, images = mean_interval(np.array(values))
    close(mean, np.nanmean(values))
    assert np.isnan([low, high]).all()
    assert images == np.sum(~np.isnan(values))


def test_no_values_have_no_mean():
    mean, low, high, images = mean_interval(np.full(5, np.nan))
    assert np.isnan([mean, low, high]).all()
    assert images == 0


@pytest.mark.parametrize("level", [0.0, 1.0, 95, math.nan])
def test_a_level_is_between_0_and_1(level):
    with pytest.raises(SferdError, match=rf"level = {level}; allowed: between 0 and 1, exclusive"):
        mean_interval(normal(30), level)


# ---- what is there is found, and nothing else

STUDIES, IMAGES = 400, 40
# A bootstrap of a mean of 40 takes the normal quantile for Student's and divides the variance by 40 and not 39: at 95%, 6.0% of them miss.
MISSES = 2 * stats.t.sf(stats.norm.ppf(0.975) * math.sqrt((IMAGES - 1) / IMAGES), IMAGES - 1)


def missed(per_image, truth):
    """How many studies, of 40 images each, have an interval that leaves out the truth."""
    intervals = (mean_interval(study) for study in per_image.reshape(STUDIES, IMAGES))
    return sum(not low <= truth <= high for _, low, high, _ in intervals)


def assert_missed_as_often_as_stated(per_image, truth):
    # The bounds that a binomial count leaves once in 1000 runs.
    fewest, most = stats.binom.interval(0.999, STUDIES, MISSES)
    assert fewest <= missed(per_image, truth) <= most


def assert_unbiased(per_image, truth):
    # 4 standard errors of the mean over the images of all studies.
    assert abs(per_image.mean() - truth) < 4 * per_image.std() / math.sqrt(len(per_image))


@pytest.mark.parametrize("make", [normal, smooth])
def test_independent_maps_show_a_correlation_as_rarely_as_the_level_says(make):
    a, b = make(2, STUDIES * IMAGES, 8, 8, seed=3)
    assert_missed_as_often_as_stated(spearman(a, b), 0)
    assert_unbiased(spearman(a, b), 0)


def test_independent_maps_show_an_auroc_other_than_one_half_as_rarely_as_the_level_says():
    a, b = smooth(2, STUDIES * IMAGES, 8, 8, seed=4)
    assert_missed_as_often_as_stated(auroc(a, b), 0.5)
    assert_unbiased(auroc(a, b), 0.5)


def test_a_map_that_follows_a_control_shows_no_partial_correlation_with_one_that_does_not():
    # Along whatever curve: the map that does not is as often upside down.
    control, own, b = smooth(3, STUDIES * IMAGES, 8, 8, seed=8)
    a = control**3 + own
    assert_missed_as_often_as_stated(partial_spearman(a, b, [control]), 0)
    assert_unbiased(partial_spearman(a, b, [control]), 0)


def test_maps_that_share_a_control_alone_show_a_partial_correlation_as_rarely_as_the_level_says():
    control, a, b = smooth(3, STUDIES * IMAGES, 8, 8, seed=5)
    a, b = mixed(control, a, 0.6, 1), mixed(control, b, 0.6, 2)
    # Both follow it in almost every image, and that goes.
    assert (spearman(a, b) > 0).mean() > 0.9
    found = partial_spearman(a, b, [control, smooth(STUDIES * IMAGES, 8, 8, seed=6)])
    assert_missed_as_often_as_stated(found, 0)
    # Smooth maps of 64 positions are few independent ones, which leaves 0.003.
    assert abs(found.mean()) < 0.01


@pytest.mark.parametrize("rho", [0.2, -0.7])
def test_a_planted_correlation_is_found_and_lies_in_the_interval_as_often_as_the_level_says(rho):
    a, other = normal(2, STUDIES * IMAGES, 8, 8, seed=7)
    b = np.exp(rho * a + math.sqrt(1 - rho**2) * other)
    # 6/pi asin(rho/2) for infinitely many positions; with n of them, Moran (1948).
    n = 64
    truth = 6 / math.pi / (n + 1) * (math.asin(rho) + (n - 2) * math.asin(rho / 2))
    assert abs(truth - 6 / math.pi * math.asin(rho / 2)) < 0.02
    found = spearman(a, b)
    assert_missed_as_often_as_stated(found, truth)
    assert_unbiased(found, truth)
    # 40 images of 64 positions are enough: correlation 0.2, standard error 0.02.
    assert missed(found, 0) == STUDIES


def test_gaussian_maps_that_share_a_control_alone_keep_a_partial_correlation_of_a_hundredth():
    # What regression on ranks cannot remove: the rank of one Gaussian given another's follows a curve.
    rho = 0.7
    control, a, b = normal(3, 800, 32, 32)
    a, b = (rho * control + math.sqrt(1 - rho**2) * part for part in (a, b))
    ab, ac = (6 / math.pi * math.asin(r / 2) for r in (rho**2, rho))
    left = (ab - ac**2) / (1 - ac**2)
    assert round(left, 3) == 0.012
    # 800 images of 1024 positions: a standard error of 0.0011.
    assert abs(partial_spearman(a, b, [control]).mean() - left) < 0.0045


# ---- the test of attention


def row(table, resolution, name, statistic):
    found = table[(table["resolution"] == resolution) & (table["map"] == name) & (table["statistic"] == statistic)]
    assert len(found) == 1
    return found.iloc[0]


def contains(line, value):
    return line["low"] <= value <= line["high"]


def positive(maps):
    """Maps above 0 that average 1 in every image, as attention does."""
    return np.exp(maps) / np.exp(maps).mean((1, 2), keepdims=True)


def images(n=IMAGES, size=16, seed=10):
    return torch.from_numpy(smooth(n, 1, size, size, seed=seed))


@pytest.fixture(scope="module")
def planted():
    """Error that follows attention and nothing else."""
    attention = smooth(IMAGES, 8, 8, seed=11)
    error = np.exp(kron(attention, 2) + smooth(IMAGES, 16, 16, seed=12))
    return attention_test(error, positive(attention), images())


@pytest.fixture(scope="module")
def control_only():
    """Error and attention of one resolution, each of which follows |x0| at a part of its positions and nothing elsewhere."""
    x0 = images(size=8)
    size = x0.abs()[:, 0].numpy()
    error, attention = (mixed(size, np.abs(smooth(IMAGES, 8, 8, seed=seed)), 0.8, seed) for seed in (13, 14))
    return attention_test(error, positive(attention), x0)


def test_the_table_has_a_row_for_each_resolution_map_and_statistic(planted):
    assert list(planted.columns) == ["resolution", "map", "statistic", "value", "low", "high", "images"]
    expected = {(resolution, name, one) for resolution in ("image", "layer") for name, each in STATISTICS.items() for one in each}
    assert set(planted[["resolution", "map", "statistic"]].itertuples(index=False, name=None)) == expected
    assert len(planted) == len(expected) == 40
    assert (planted["images"] == IMAGES).all()
    assert (planted["low"] < planted["value"]).all()
    assert (planted["value"] < planted["high"]).all()


def test_each_row_is_the_mean_over_images_of_the_statistic_of_the_map_it_names():
    error, attention, x0 = np.exp(smooth(12, 8, 8)), positive(smooth(12, 4, 4, seed=1)), images(12, 8)
    table = attention_test(error, attention, x0)
    maps = {**control_maps(x0), "attention": attention, "attention of another image": attention[np.arange(12) - 1]}
    for resolution, size in (("image", (8, 8)), ("layer", (4, 4))):
        goal = to_grid(error, size)
        resized = {name: to_grid(values, size) for name, values in maps.items()}
        given = [resized[name] for name in CONTROLS]
        own = spearman(resized["attention"], goal)
        for name, values in resized.items():
            expected = {
                "spearman": spearman(values, goal),
                "auroc": auroc(values, goal, 0.2),
                "spearman given controls": partial_spearman(values, goal, given),
                "spearman less attention's": spearman(values, goal) - own,
            }
            for statistic in STATISTICS[name]:
                line = row(table, resolution, name, statistic)
                close(line["value"], expected[statistic].mean())
                close(list(line[["value", "low", "high", "images"]]), mean_interval(expected[statistic]))


def test_shuffled_attention_has_each_images_own_values_in_an_order_of_its_own(monkeypatch):
    seen = []
    monkeypatch.setattr(spatial, "spearman", lambda a, b: seen.append(a) or spearman(a, b))
    attention = np.tile(np.arange(16.0).reshape(1, 4, 4), (6, 1, 1)) + 100 * np.arange(6)[:, None, None]
    attention_test(normal(6, 4, 4) ** 2, attention, images(6, 4))
    # Attention's own comes first at either resolution, then one for each of the maps, the shuffled last.
    shuffled = seen[len(STATISTICS)]
    assert np.array_equal(np.sort(shuffled.reshape(6, -1)), attention.reshape(6, -1))
    orders = (shuffled - attention[:, :1, :1]).reshape(6, -1)
    assert len({tuple(order) for order in (*orders, np.arange(16.0))}) == 7


@pytest.mark.parametrize("resolution", ["image", "layer"])
def test_planted_attention_wins_over_every_control(planted, resolution):
    own = row(planted, resolution, "attention", "spearman")
    assert own["low"] > 0.5
    assert row(planted, resolution, "attention", "spearman given controls")["low"] > 0.5
    assert row(planted, resolution, "attention", "auroc")["low"] > 0.7
    for name in CONTROLS:
        assert row(planted, resolution, name, "spearman")["high"] < own["low"]
        assert contains(row(planted, resolution, name, "spearman"), 0)
        # "less attention's": below 0, the map says less than attention.
        assert row(planted, resolution, name, "spearman less attention's")["high"] < -0.4


@pytest.mark.parametrize("resolution", ["image", "layer"])
@pytest.mark.parametrize("name", ["attention of another image", "shuffled attention"])
def test_attention_of_the_wrong_image_or_place_says_nothing_where_each_image_has_its_own(planted, resolution, name):
    for statistic, chance in (("spearman", 0), ("spearman given controls", 0), ("auroc", 0.5)):
        assert contains(row(planted, resolution, name, statistic), chance)
        assert abs(row(planted, resolution, name, statistic)["value"] - chance) < 0.05


def test_error_that_follows_a_control_leaves_attention_nothing_of_its_own(control_only):
    assert row(control_only, "image", "attention", "spearman")["low"] > 0.4
    partial = row(control_only, "image", "attention", "spearman given controls")
    assert contains(partial, 0)
    assert abs(partial["value"]) < 0.05
    # The control that error follows says more than attention does; a shuffled map says less.
    assert row(control_only, "image", "|x0|", "spearman less attention's")["low"] > 0.05
    assert row(control_only, "image", "shuffled attention", "spearman less attention's")["high"] < -0.4


def test_at_the_layers_own_resolution_the_two_resolutions_agree(control_only):
    image, layer = (control_only[control_only["resolution"] == name].drop(columns="resolution") for name in ("image", "layer"))
    assert image.reset_index(drop=True).equals(layer.reset_index(drop=True))


@pytest.mark.parametrize("resolution", ["image", "layer"])
def test_smooth_maps_that_both_follow_a_control_along_a_curve_keep_less_than_a_tenth(resolution):
    x0 = images()
    size = x0.abs()[:, 0].numpy()
    error = np.exp(2 * size + 0.5 * smooth(IMAGES, 16, 16, seed=13))
    table = attention_test(error, positive(to_grid(size, (8, 8)) + 0.3 * smooth(IMAGES, 8, 8, seed=14)), x0)
    assert row(table, resolution, "attention", "spearman")["low"] > 0.4
    assert abs(row(table, resolution, "attention", "spearman given controls")["value"]) < 0.1


@pytest.mark.parametrize("resolution", ["image", "layer"])
def test_a_template_that_all_images_share_shows_in_the_attention_of_another_image(resolution):
    # Attention and error both sit in the centre; what else an image's attention does has nothing to do with its error.
    row_, column = np.indices((8, 8)) - 3.5
    template = 2 * np.exp(-(row_**2 + column**2) / 8)[None]
    attention = positive(template + 0.5 * smooth(IMAGES, 8, 8, seed=15))
    error = np.exp(kron(template, 2) + 0.5 * smooth(IMAGES, 16, 16, seed=16))
    table = attention_test(error, attention, images())
    assert row(table, resolution, "attention", "spearman")["low"] > 0.2
    assert row(table, resolution, "attention of another image", "spearman")["low"] > 0.2
    assert contains(row(table, resolution, "attention of another image", "spearman less attention's"), 0)
    assert contains(row(table, resolution, "shuffled attention", "spearman"), 0)


def test_the_difference_is_paired_so_what_makes_an_image_hard_for_both_maps_drops_out():
    # How well any map does varies from image to image; |x0| is always a little better than attention.
    x0 = images(size=8)
    size = x0.abs()[:, 0].numpy()
    noise = np.linspace(0.05, 1.2, IMAGES)[:, None, None] * smooth(IMAGES, 8, 8, seed=17)
    table = attention_test(np.exp(size + noise), positive(size + 0.3 * smooth(IMAGES, 8, 8, seed=18)), x0)
    own, other = (row(table, "layer", name, "spearman") for name in ("attention", "|x0|"))
    assert other["low"] < own["high"]
    difference = row(table, "layer", "|x0|", "spearman less attention's")
    assert difference["low"] > 0
    close(difference["value"], other["value"] - own["value"])


def test_an_image_whose_attention_is_constant_is_left_out_of_the_correlations_that_need_it():
    attention = positive(smooth(6, 4, 4))
    attention[2] = 1
    table = attention_test(np.exp(smooth(6, 4, 4, seed=1)), attention, images(6, 4))
    for name, statistic, count in (
        ("attention", "spearman", 5),
        ("attention of another image", "spearman", 5),
        ("attention of another image", "spearman less attention's", 4),
        ("|x0|", "spearman", 6),
        ("|x0|", "spearman less attention's", 5),
        ("attention", "auroc", 6),
    ):
        assert row(table, "layer", name, statistic)["images"] == count


def test_level_and_seed_reach_the_intervals_and_the_shuffling():
    inputs = np.exp(smooth(12, 4, 4)), positive(smooth(12, 4, 4, seed=1)), images(12, 4)
    table, wide, other = attention_test(*inputs), attention_test(*inputs, level=0.99), attention_test(*inputs, seed=1)
    assert table.equals(attention_test(*inputs))
    assert (wide["high"] - wide["low"] > table["high"] - table["low"]).all()
    changed = table["value"] != other["value"]
    assert set(table["map"][changed]) == {"shuffled attention"}
    assert (table["low"] != other["low"]).all()


@pytest.mark.parametrize(
    ("error", "attention", "x0"),
    [
        ((1, 8, 8), (1, 4, 4), (1, 1, 8, 8)),
        ((4, 8, 8), (3, 4, 4), (4, 1, 8, 8)),
        ((4, 8, 8), (4, 4, 4), (3, 1, 8, 8)),
        # Twice the size of the error: averaged to its grid without a word, were it not refused.
        ((4, 8, 8), (4, 4, 4), (4, 1, 16, 16)),
        ((4, 8, 8), (4, 4, 4), (4, 8, 8)),
        ((4, 8, 8), (4, 2, 4, 4), (4, 1, 8, 8)),
        ((4, 1, 8, 8), (4, 4, 4), (4, 1, 8, 8)),
    ],
)
def test_error_attention_and_prediction_that_do_not_belong_together_are_refused(error, attention, x0):
    with pytest.raises(SferdError, match=r"error \(.*\), attention \(.*\) and x0_hat \(.*\); allowed: \(N, H, W\), \(N, h, w\) and"):
        attention_test(np.ones(error), np.ones(attention), torch.zeros(x0))


def test_attention_whose_grid_does_not_divide_the_images_is_refused():
    with pytest.raises(SferdError, match="cannot become"):
        attention_test(normal(4, 8, 8) ** 2, positive(normal(4, 3, 3)), images(4, 8))


def test_values_that_are_not_finite_and_a_level_out_of_range_are_refused():
    error, attention, x0 = normal(4, 8, 8) ** 2, positive(normal(4, 4, 4)), images(4, 8)
    with pytest.raises(SferdError, match=r"level = 1\.5;"):
        attention_test(error, attention, x0, level=1.5)
    error[1, 2, 3] = np.nan
    with pytest.raises(SferdError, match="a map holds NaN or infinity"):
        attention_test(error, attention, x0)
