"""The decomposition against its formulas written out in loops, its truths in closed form, and the predictions it is made from."""

import itertools
import math

import pandas as pd
import pytest
import torch

from sferd_lab.analysis import proof
from sferd_lab.analysis.bias_variance import decompose, nested_variance, predict
from sferd_lab.artifacts import shipped_folder
from sferd_lab.data import Mixture
from sferd_lab.denoiser import FiniteSetDenoiser, FunctionDenoiser, MixtureDenoiser
from sferd_lab.diffusion import HALF_PI, add_noise
from sferd_lab.errors import SferdError

TWO, THREE = ("teacher", "student"), ("data", "teacher", "student")
POINT = (3, 1, 2, 2)  # 3 points, 4 pixels


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def trainings(*counts, seed=0):
    """Students (*counts, *POINT), teachers of all levels but the last with whom they share an error, m and x0."""
    teachers = 0.5 + normal(*counts[:-1], *POINT, seed=seed)
    students = 0.8 * teachers.unsqueeze(len(counts) - 1) + 0.3 * normal(*counts, *POINT, seed=seed + 1) - 0.2
    return students, teachers, normal(*POINT, seed=seed + 2), normal(*POINT, seed=seed + 3)


def mean(values):
    return sum(values) / len(values)


def covariance(a, b):
    return sum((x - mean(a)) * (y - mean(b)) for x, y in zip(a, b, strict=True)) / (len(a) - 1)


# ---- the terms


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("levels", [TWO, THREE])
@pytest.mark.parametrize("references", ["m", "x0", "m x0"])
def test_the_terms_add_up_to_the_students_mean_squared_error_at_every_pixel(references, levels, unbiased):
    students, teachers, m, x0 = trainings(*(4, 3, 2)[: len(levels)])
    given = {name: value for name, value in (("m", m), ("x0", x0)) if name in references.split()}
    found = decompose(students, teachers, **given, levels=levels, unbiased=unbiased)
    assert next(iter(found.maps)) == "total"
    close(sum(part for term, part in found.maps.items() if term != "total"), found.maps["total"])
    goal, total = (x0 if "x0" in given else m), torch.zeros(POINT, dtype=torch.float64)
    runs = list(itertools.product(*map(range, (4, 3, 2)[: len(levels)])))
    for run in runs:
        total += (goal - students[run]) ** 2 / len(runs)
    close(found.maps["total"], total)


@pytest.mark.parametrize("unbiased", [True, False])
def test_every_term_is_its_formula_written_out(unbiased):
    students, teachers, m, x0 = trainings(4, 3)
    found = decompose(students, teachers, m, x0, unbiased=unbiased)
    for place in itertools.product(*map(range, POINT)):
        t = [float(teachers[k][place]) for k in range(4)]
        s = [[float(students[k, i][place]) for i in range(3)] for k in range(4)]
        means, m_here, x0_here = [mean(row) for row in s], float(m[place]), float(x0[place])
        t_all, s_all = mean(t), mean(means)
        within = sum((value - mean(row)) ** 2 for row in s for value in row) / (4 * 2)
        between, s_t, s_ts = covariance(means, means), covariance(t, t), covariance(t, means)
        expected = {
            "irreducible": (x0_here - m_here) ** 2,
            "chance": 2 * (x0_here - m_here) * (m_here - s_all),
            "teacher_bias": (m_here - t_all) ** 2 - s_t / 4,
            "distillation_bias": (t_all - s_all) ** 2 - (s_t + between - 2 * s_ts) / 4,
            "bias_cross": 2 * ((m_here - t_all) * (t_all - s_all) + (s_t - s_ts) / 4),
            "teacher_variance": between - within / 3,
            "student_variance": within,
        }
        if not unbiased:
            expected["teacher_bias"] = (m_here - t_all) ** 2
            expected["distillation_bias"] = (t_all - s_all) ** 2
            expected["bias_cross"] = 2 * (m_here - t_all) * (t_all - s_all)
            expected["teacher_variance"], expected["student_variance"] = between * 3 / 4, within * 2 / 3
        assert {term: float(part[place]) for term, part in found.maps.items() if term != "total"} == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("upper", [1, 2])
def test_with_three_levels_the_biases_come_from_the_first_levels_means(upper):
    students, teachers, m, _ = trainings(4, 3, 2)
    found = decompose(students, teachers if upper == 2 else teachers.mean(1), m, levels=("teacher", "z", "student"))
    averaged = decompose(students.mean(2), teachers.mean(1), m)
    for term in ("teacher_bias", "distillation_bias", "bias_cross"):
        close(found.maps[term], averaged.maps[term])
    assert list(found.maps)[-3:] == ["teacher_variance", "z_variance", "student_variance"]


def test_negative_estimates_are_kept():
    # Teachers at -1 and 1 around m = 0: their mean is right and its expected square is s_T^2 / K = 1. All their students have mean 0.
    ones = torch.ones(1, 1, dtype=torch.float64)
    students, teachers = torch.stack([-ones, ones]).expand(2, 2, 1, 1), torch.stack([-ones, ones])
    found = decompose(students, teachers, 0 * ones)
    # B = 0 and W = 2, s_TS = 0.
    values = {"teacher_bias": -1, "distillation_bias": -1, "bias_cross": 2, "teacher_variance": -1, "student_variance": 2, "total": 1}
    assert {term: found[term] for term in found.maps} == values


def test_without_m_the_first_term_is_irreducible_and_teacher_bias_together():
    # x0 has variance 0.25 around m = 0 and teachers have a bias of 0.3. Every point is a draw of its own, hence the error over points.
    n = 20_000
    x0, teachers = 0.5 * normal(n, 1), 0.3 + 0.4 * normal(5, n, 1, seed=1)
    students = 0.1 + 0.7 * teachers[:, None] + 0.2 * normal(5, 2, n, 1, seed=2)
    found = decompose(students, teachers, x0=x0)
    assert list(found.maps) == [
        "total", "irreducible_and_teacher_bias", "distillation_bias", "bias_cross", "teacher_variance", "student_variance",
    ]  # fmt: skip
    lines = found.table().set_index("term")
    expected = {"irreducible_and_teacher_bias": 0.25 + 0.09, "distillation_bias": 0.01**2, "bias_cross": 2 * -0.3 * -0.01}
    for term, value in expected.items():
        assert abs(lines["value"][term] - value) < 4 * lines["se_points"][term], term


def test_a_terms_map_is_its_mean_over_points_and_its_value_over_pixels_too():
    students, teachers, m, _ = trainings(4, 3)
    found = decompose(students, teachers, m)
    assert found.map("teacher_bias").shape == (1, 2, 2)
    close(found.map("teacher_bias"), found.maps["teacher_bias"].sum(0) / 3)
    assert found["teacher_bias"] == pytest.approx(float(found.maps["teacher_bias"].sum()) / 12, rel=1e-12)


def test_float32_trainings_are_decomposed_in_float64():
    # Around 1,000, float32 squares are off by 0.06, more than the variances are.
    students, teachers, m, x0 = (0.01 * part.float() + 1000 for part in trainings(4, 3))
    found, exact = decompose(students, teachers, m, x0), decompose(students.double(), teachers.double(), m.double(), x0.double())
    for term, part in exact.maps.items():
        assert torch.equal(found.maps[term], part)
    close(decompose(students, teachers, m).maps["total"], (m.double() - students.double()).square().mean((0, 1)))


# ---- variances of nested levels


def test_nested_variance_is_the_balanced_analysis_of_variance():
    a, b, n = 4, 3, 5
    values = normal(a, b, n)
    rows = values.tolist()
    cells = [[mean(cell) for cell in row] for row in rows]
    tops = [mean(row) for row in cells]
    # Mean squares, as in a textbook's table: among the first level, among the second within it, within.
    among_a = b * n * sum((top - mean(tops)) ** 2 for top in tops) / (a - 1)
    among_b = n * sum((cell - mean(row)) ** 2 for row in cells for cell in row) / (a * (b - 1))
    within = sum((value - mean(cell)) ** 2 for row in rows for cell in row for value in cell) / (a * b * (n - 1))
    expected = [(among_a - among_b) / (b * n), (among_b - within) / n, within]
    assert [float(part) for part in nested_variance(values, 3)] == pytest.approx(expected, rel=1e-12)
    plug_in = [among_a * (a - 1) / (a * b * n), among_b * (b - 1) / (b * n), within * (n - 1) / n]
    assert [float(part) for part in nested_variance(values, 3, unbiased=False)] == pytest.approx(plug_in, rel=1e-12)


def test_nested_variance_finds_the_variances_of_three_levels():
    # 20,000 experiments of 4 x 3 x 2 at once, as the axis that is not a level.
    n = 20_000
    values = 1.0 * normal(4, 1, 1, n) + 0.7 * normal(4, 3, 1, n, seed=1) + 0.4 * normal(4, 3, 2, n, seed=2)
    for estimates, truth in zip(nested_variance(values, 3), (1.0, 0.49, 0.16), strict=True):
        assert estimates.shape == (n,)
        assert abs(float(estimates.mean()) - truth) < 4 * float(estimates.std()) / n**0.5


def test_nested_variance_of_one_level_is_the_variance():
    values = normal(5, 3)
    close(nested_variance(values, 1)[0], values.var(0))


# ---- intervals


@pytest.mark.parametrize("levels", [TWO, THREE])
def test_the_standard_error_is_a_jackknife_over_the_first_level(levels):
    students, teachers, m, x0 = trainings(*(5, 3, 2)[: len(levels)])
    found = decompose(students, teachers, m, x0, levels=levels)
    without = []
    for left_out in range(5):
        keep = torch.tensor([other for other in range(5) if other != left_out])
        without.append(decompose(students[keep], teachers[keep], m, x0, levels=levels))
    for term in found.maps:
        values = [part[term] for part in without]
        assert found.se[term] == pytest.approx(math.sqrt(4 / 5 * sum((value - mean(values)) ** 2 for value in values)), rel=1e-9, abs=1e-15)


def test_for_a_plain_mean_over_teachers_the_jackknife_is_its_usual_standard_error():
    students, teachers, m, _ = trainings(5, 3)
    found = decompose(students, teachers, m)
    per_teacher = {"student_variance": students.var(1).flatten(1).mean(1), "total": (m - students).square().flatten(1).mean(1)}
    for term, values in per_teacher.items():
        assert found.se[term] == pytest.approx(float(values.std()) / 5**0.5, rel=1e-12)


# Quantiles as printed in tables of Student's t, at one degree of freedom fewer than teachers.
@pytest.mark.parametrize(("teachers", "level", "quantile"), [(3, 0.95, 4.3027), (10, 0.95, 2.2622), (6, 0.9, 2.0150), (5, 0.99, 4.6041)])
def test_the_interval_is_students_t_around_the_estimate(teachers, level, quantile):
    students, predictions, m, _ = trainings(teachers, 2)
    found = decompose(students, predictions, m)
    table = found.table(level) if level != 0.95 else found.table()
    assert list(table.columns) == ["term", "value", "se", "low", "high", "se_points"]
    assert list(table["term"]) == list(found.maps)
    for line in table.itertuples():
        assert (line.value, line.se) == (found[line.term], found.se[line.term])
        assert line.value - line.low == pytest.approx(quantile * line.se, rel=1e-4)
        assert line.high - line.value == pytest.approx(quantile * line.se, rel=1e-4)
        per_point = [float(values.mean()) for values in found.maps[line.term]]
        assert line.se_points == pytest.approx(math.sqrt(covariance(per_point, per_point) / 3), rel=1e-9)


def test_two_teachers_give_values_without_an_error_and_one_point_none_over_points():
    students, teachers, m, _ = (part[..., :1, :, :, :] for part in trainings(2, 3))
    table = decompose(students, teachers, m).table()
    assert table["value"].notna().all()
    assert table[["se", "low", "high", "se_points"]].isna().all(axis=None)


# ---- what is refused


@pytest.mark.parametrize(
    ("students", "teachers", "settings", "words"),
    [
        ((1, 3, 5, 2), (1, 5, 2), {}, "1 of level 'teacher'; allowed: 2 or more"),
        ((4, 1, 5, 2), (4, 5, 2), {}, "1 of level 'student'; allowed: 2 or more"),
        ((4, 3, 1, 5, 2), (4, 3, 5, 2), {"levels": THREE}, "1 of level 'student'"),
        ((4, 3, 5, 2), (4, 5, 2), {"levels": ("teacher",)}, r"levels = \('teacher',\); allowed: two or more different names"),
        ((4, 3, 5, 2), (4, 5, 2), {"levels": ("a", "a")}, r"levels = \('a', 'a'\); allowed: two or more different names"),
        ((4, 3, 5), (4, 5), {}, r"students have shape \(4, 3, 5\); allowed: \(teacher, student, points, ...\)"),
        ((4, 3, 5, 2), (3, 5, 2), {}, r"teachers have shape \(3, 5, 2\), students \(4, 3, 5, 2\); allowed: .* then \(5, 2\)"),
        ((4, 3, 5, 2), (4, 3, 5, 2), {}, r"teachers have shape \(4, 3, 5, 2\)"),
        ((4, 3, 5, 2), (5, 2), {}, r"teachers have shape \(5, 2\)"),
        ((4, 3, 5, 2), (4, 5, 3), {}, r"teachers have shape \(4, 5, 3\)"),
        ((4, 3, 2, 5, 2), (4, 2, 5, 2), {"levels": THREE}, r"teachers have shape \(4, 2, 5, 2\)"),
        ((4, 3, 5, 2), (4, 5, 2), {"m": None}, "neither m nor x0 was given; allowed: one or both"),
        ((4, 3, 5, 2), (4, 5, 2), {"m": torch.zeros(1, 2)}, r"m has shape \(1, 2\); allowed: \(5, 2\), one a point"),
        ((4, 3, 5, 2), (4, 5, 2), {"x0": torch.zeros(5, 1)}, r"x0 has shape \(5, 1\); allowed: \(5, 2\), one a point"),
    ],
)
def test_what_cannot_be_decomposed_is_named(students, teachers, settings, words):
    with pytest.raises(SferdError, match=words):
        decompose(normal(*students), normal(*teachers), **{"m": torch.zeros(5, 2, dtype=torch.float64)} | settings)


# ---- what models make of a noisy image

MEAN, SPREAD = torch.tensor([0.4, -0.3, 0.1], dtype=torch.float64), torch.tensor([0.5, 1.5, 0.04], dtype=torch.float64)


def gaussian():
    """The exact denoiser of one Gaussian, whose every step is linear, and noisy points at phi = 1.3."""
    mixture = Mixture(torch.ones(1, dtype=torch.float64), MEAN[None], SPREAD[None], (3,))
    return MixtureDenoiser(mixture), add_noise(mixture.sample(6, torch.Generator().manual_seed(0))[0], normal(6, 3), 1.3), 1.3


def test_a_single_evaluation_is_the_predicted_x0():
    denoiser, x, phi = gaussian()
    assert torch.equal(predict(denoiser, x, phi), denoiser(x, phi).x0)


@pytest.mark.parametrize("steps", [1, 3, 8])
def test_a_ddim_walk_of_one_gaussian_is_a_product_of_factors(steps):
    denoiser, x, phi = gaussian()
    angles = [phi * (1 - step / steps) for step in range(steps + 1)]
    factor = torch.ones(3, dtype=torch.float64)
    for a, b in itertools.pairwise(angles):
        factor *= (math.cos(a) * math.cos(b) * SPREAD + math.sin(a) * math.sin(b)) / (math.cos(a) ** 2 * SPREAD + math.sin(a) ** 2)
    close(predict(denoiser, x, phi, steps), MEAN + factor * (x - math.cos(phi) * MEAN), 1e-10)


def test_a_heun_walk_of_one_gaussian_converges_to_the_odes_endpoint_at_second_order():
    denoiser, x, phi = gaussian()
    c, s = math.cos(phi), math.sin(phi)
    endpoint = MEAN + SPREAD.sqrt() / (c**2 * SPREAD + s**2).sqrt() * (x - c * MEAN)
    errors = [float((predict(denoiser, x, phi, steps, "heun") - endpoint).abs().max()) for steps in (40, 80, 160)]
    assert errors[0] < 1e-2
    # Twice the steps, a quarter of the error.
    assert [a / b for a, b in itertools.pairwise(errors)] == pytest.approx([4, 4], rel=0.1)


@pytest.mark.parametrize("sampler", ["ddim", "heun"])
def test_from_little_noise_the_walk_of_a_finite_set_ends_on_the_image_it_started_from(sampler):
    images = normal(9, 1, 3, 3, seed=4)
    x = add_noise(images, normal(*images.shape), 0.05)
    close(predict(FiniteSetDenoiser(images), x, 0.05, 4, sampler), images, 1e-9)


def test_from_pure_noise_the_walk_of_a_finite_set_ends_on_some_image_of_it():
    images, noise = normal(9, 1, 3, 3, seed=4), normal(20, 1, 3, 3)
    ends = predict(FiniteSetDenoiser(images), noise, HALF_PI, 100, "heun")
    distances = (ends[:, None] - images).flatten(2).abs().amax(2).amin(1)
    assert float(distances.max()) < 1e-6


def test_lists_of_models_become_axes_and_conditions_reach_every_model():
    def model(scale):
        return FunctionDenoiser(lambda x, phi, labels: scale * x + labels[:, None], "x0", phi_lo=0.1)

    x, labels = normal(2, 3), torch.tensor([1.0, 2.0], dtype=torch.float64)
    found = predict([[model(10 * k + i) for i in range(3)] for k in range(2)], x, 0.5, labels=labels)
    assert found.shape == (2, 3, 2, 3)
    for k, i in itertools.product(range(2), range(3)):
        close(found[k, i], (10 * k + i) * x + labels[:, None])
    close(predict([model(4)], x, 0.5, 1, labels=labels)[0], 4 * x + labels[:, None])


def test_predictions_are_no_part_of_a_gradient():
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    assert not predict(FunctionDenoiser(lambda x, phi: scale * x, "v"), normal(2, 3), 0.5, 2).requires_grad


@pytest.mark.parametrize("sampler", ["ddpm", "consistency", "euler"])
def test_walks_that_draw_noise_and_unknown_ones_are_refused(sampler):
    denoiser, x, phi = gaussian()
    with pytest.raises(SferdError, match=f"sampler = '{sampler}'; allowed: ddim, heun"):
        predict(denoiser, x, phi, 2, sampler)


def test_lists_that_are_empty_or_not_equally_long_are_refused():
    denoiser, x, phi = gaussian()
    with pytest.raises(SferdError, match="a list of 0 models"):
        predict([], x, phi)
    with pytest.raises(SferdError, match=r"a list of 2 models, themselves lists of \[2, 1\]; allowed: lists that are equally long"):
        predict([[denoiser, denoiser], [denoiser]], x, phi)


# ---- the proof


def test_the_truths_of_a_random_problem_are_what_very_many_trainings_give():
    many = 20_000
    problem = proof.random_problem(torch.Generator().manual_seed(5), many, 2, points=8)
    t, s = problem.teachers.mean(0), problem.students.mean((0, 1))
    own = problem.students.var(1).mean(0)
    found = {
        "teacher_bias": (problem.m - t).square(),
        "distillation_bias": (t - s).square(),
        "bias_cross": 2 * (problem.m - t) * (t - s),
        "teacher_variance": problem.students.mean(1).var(0) - own / 2,
        "student_variance": own,
        "total": (problem.m - problem.students).square().mean((0, 1)),
    }
    for term, values in found.items():
        assert float(values.mean()) == pytest.approx(problem.truth[term], abs=0.01), term
        assert abs(problem.truth[term]) > 0.02, term
    with_x0 = (problem.x0 - problem.students).square().mean()
    assert float(with_x0) == pytest.approx(problem.given_x0["total_x0"], abs=0.02)


def test_what_the_plug_in_estimates_are_off_by_adds_up_to_nothing():
    # The total is what it is: plug-in estimates move error between the terms.
    for seed in range(5):
        problem = proof.random_problem(torch.Generator().manual_seed(seed), 4, 3)
        assert sum(problem.excess.values()) == pytest.approx(0, abs=1e-12)
        assert problem.excess["total"] == 0
        with_x0 = sum(problem.given_x0[term] for term in ("total", "irreducible", "chance"))
        assert with_x0 == pytest.approx(problem.given_x0["total_x0"], rel=1e-12)


def test_the_proof_finds_no_bias_the_plug_in_bias_of_theory_and_intervals_that_cover():
    found = proof.prove(150, seed=3).set_index("term")
    assert len(found) == 9
    assert (found["z"].abs() <= 4).all()
    against_m = found.loc["total":"student_variance"]
    assert (against_m["plug_in_z"].abs() <= 4).all()
    # So much bias would not have passed unseen: three plug-in estimates are off by more than the proof allows.
    biased = against_m.loc[["teacher_bias", "teacher_variance", "student_variance"]]
    assert ((biased["plug_in_bias"] / biased["bias_se"]).abs() > 4).all()
    # 4 binomial standard errors below the least that is allowed of many problems.
    coverage = found["coverage"].dropna()
    assert len(coverage) == 8
    assert (coverage >= 0.92 - 4 * (0.92 * 0.08 / 150) ** 0.5).all()
    assert (found["coverage"] >= found["coverage_2se"]).drop("irreducible").all()
    assert found["coverage_students"].dropna().max() < coverage[["total", "total_x0"]].min()


def test_the_proof_is_a_function_of_its_seed():
    pd.testing.assert_frame_equal(proof.prove(3, 3, 2, seed=1), proof.prove(3, 3, 2, seed=1))
    assert not proof.prove(3, 3, 2, seed=1)["bias"].equals(proof.prove(3, 3, 2, seed=2)["bias"])


def test_the_proof_needs_two_problems():
    with pytest.raises(SferdError, match="problems = 1; allowed: 2 or more"):
        proof.prove(1)


def test_the_recorded_proof_passes_and_names_its_settings():
    table = pd.read_csv(shipped_folder() / "results" / "bias_variance_proof.csv")
    assert list(dict.fromkeys(table["case"])) == list(proof.CASES)
    assert set(table["problems"]) == {2000}
    assert (table["z"].abs().dropna() <= 4).all()
    general = table[table["case"] == "general"].set_index("term")
    assert set(general["teachers"]) == {10}
    assert (general["z"].abs() <= 3).all()
    assert (general["plug_in_z"].abs().dropna() <= 3).all()
    assert general["coverage"].dropna().between(0.92, 0.98).all()
