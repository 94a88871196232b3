"""Proof by simulation that the estimators of ``decompose`` are unbiased and that their intervals cover.

Real trainings never tell their true bias and variance. Here teachers and students are made of random functions whose bias and variance
are known in closed form, at noisy points of random Gaussian mixtures whose posterior mean is exact.

``python -m sferd_lab.analysis.proof`` measures 2,000 problems for each of ``CASES`` and writes data/results/bias_variance_proof.csv.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from sferd_lab.analysis.bias_variance import decompose
from sferd_lab.artifacts import shipped_folder
from sferd_lab.data import Mixture
from sferd_lab.denoiser import MixtureDenoiser
from sferd_lab.diffusion import add_noise
from sferd_lab.errors import SferdError
from sferd_lab.files import replacing

# Fewer teachers than 10 show what few teachers do to an interval. The last two are where a jackknife is known to be off: it is too short
# for a variance that lives in one direction (a skewed chi-squared) and too long for the square of a bias that is zero.
CASES: dict[str, dict[str, Any]] = {
    "general": {"teachers": 10},
    "5 teachers": {"teachers": 5},
    "3 teachers": {"teachers": 3},
    "one direction": {"teachers": 10, "directions": (1, 1)},
    "no bias": {"teachers": 10, "bias": (0.0, 0.0)},
}


@dataclass(frozen=True)
class Problem:
    """One draw of ``teachers`` (K, N, D) and ``students`` (K, M, N, D) at N points, their exact ``m`` and one ``x0`` (N, D) a point.

    ``truth``: each term's expectation over trainings and x0. ``given_x0``: over trainings alone, which is what an interval over
    trainings speaks of. ``excess``: by how much the plug-in estimate is expected to be off. All are means over points and pixels;
    "total" is against m, "total_x0" against x0.
    """

    teachers: Tensor
    students: Tensor
    m: Tensor
    x0: Tensor
    truth: dict[str, float]
    given_x0: dict[str, float]
    excess: dict[str, float]


def random_problem(
    generator: torch.Generator,
    teachers: int,
    students: int,
    directions: tuple[int, int] = (4, 16),
    bias: tuple[float, float] = (0.2, 0.6),
    points: int = 16,
) -> Problem:
    """Trainings around the exact denoiser of a random mixture of 1 to 4 components in 2 to 6 dimensions, at a random angle.

        T_k  = m + b_T + sum_j a_kj psi_j
        S_km = m + b_T + b_D + rho sum_j a_kj psi_j + sum_j c_kmj chi_j         a, c independent standard normal

    b_T, b_D (root mean square within ``bias``), psi_j and chi_j (0.2 to 0.6 for their sum, and a number of them within ``directions``)
    are smooth random functions of x_phi. So E S = m + b_T + b_D, Var_T E[S | T] = rho^2 sum psi_j^2 and E Var[S | T] = sum chi_j^2.
    """

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    def whole(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    dim, components = whole(2, 6), whole(1, 4)
    weights, root = normal(components).exp(), normal(components, dim, dim) / dim**0.5
    covariance = 0.5 * root @ root.mT + 0.05 * torch.eye(dim, dtype=torch.float64)
    mixture = Mixture(weights / weights.sum(), normal(components, dim), covariance, (dim,))
    phi = uniform(0.1, 1.5)
    x0, _ = mixture.sample(points, generator)
    x = add_noise(x0, normal(points, dim), phi)
    denoiser = MixtureDenoiser(mixture)
    m = denoiser(x, phi).x0

    def smooth(count: int, scale: float) -> Tensor:
        """(count, N, D): cosine waves of x with random direction, length and phase, whose squares add up to about scale^2."""
        phase = 2 * math.pi * torch.rand(count, 1, dim, generator=generator, dtype=torch.float64)
        return scale * math.sqrt(2 / count) * torch.cos(x @ normal(count, dim, dim) + phase)

    b_t, b_d = smooth(1, uniform(*bias))[0], smooth(1, uniform(*bias))[0]
    psi, chi = (smooth(whole(*directions), uniform(0.2, 0.6)) for _ in range(2))
    rho = uniform(0.5, 1)
    from_teacher = torch.tensordot(normal(teachers, len(psi)), psi, 1)
    own = torch.tensordot(normal(teachers, students, len(chi)), chi, 1)

    def mean(values: Tensor) -> float:
        return float(values.mean())

    var_t, var_own = mean(psi.square().sum(0)), mean(chi.square().sum(0))
    truth = {"teacher_bias": mean(b_t**2), "distillation_bias": mean(b_d**2), "bias_cross": mean(2 * b_t * b_d)}
    truth |= {"teacher_variance": rho**2 * var_t, "student_variance": var_own}
    truth["total"] = sum(truth.values())
    # Var(x0 | x): each component's own variance, and how far the components' means spread around m.
    probabilities, x0_k, _ = denoiser.posterior(x, phi)
    precision = covariance.inverse() + (math.cos(phi) / math.sin(phi)) ** 2 * torch.eye(dim, dtype=torch.float64)
    second = x0_k.square() + precision.inverse().diagonal(dim1=1, dim2=2)
    irreducible, residual = mean((probabilities[..., None] * second).sum(1) - m.square()), x0 - m
    given_x0 = truth | {"irreducible": mean(residual**2), "chance": mean(2 * residual * -(b_t + b_d))}
    given_x0["total_x0"] = truth["total"] + given_x0["irreducible"] + given_x0["chance"]
    truth |= {"irreducible": irreducible, "chance": 0.0, "total_x0": irreducible + truth["total"]}
    # Variances and covariances of the means over K teachers: T., and S.. - T. = b_D - (1 - rho) (T. - E T) + own.
    mean_t, mean_own = var_t / teachers, var_own / (teachers * students)
    excess = {
        "total": 0.0,
        "teacher_bias": mean_t,
        "distillation_bias": (1 - rho) ** 2 * mean_t + mean_own,
        "bias_cross": -2 * (1 - rho) * mean_t,
        "teacher_variance": var_own / students - rho**2 * mean_t - mean_own,
        "student_variance": -var_own / students,
    }
    students_ = m + b_t + b_d + rho * from_teacher[:, None] + own
    return Problem(m + b_t + from_teacher, students_, m, x0, truth, given_x0, excess)


def prove(problems: int, teachers: int = 10, students: int = 3, seed: int = 0, **kind: tuple[float, float]) -> pd.DataFrame:
    """A line a term over ``problems`` random ones (``kind``: ranges for ``random_problem``), each with its own training draw.

    - ``truth``, its mean; ``bias`` = mean of estimate - truth with its standard error ``bias_se``; ``z``, their ratio.
    - ``coverage`` of the 95% interval of ``Decomposition.table``, and its binomial ``coverage_se``. Two intervals in common use:
      ``coverage_2se``, estimate +- 2 of the same standard errors; ``coverage_students``, for totals alone, mean +- 2 standard errors
      over K M students taken for independent. NaN for "irreducible", in which no training takes part.
    - ``plug_in_bias`` of ``unbiased=False``, what theory says it is, and ``plug_in_z`` of their difference.
    """
    if problems < 2:
        raise SferdError(f"problems = {problems}; allowed: 2 or more, since a standard error needs two")
    generator = torch.Generator().manual_seed(seed)
    lines = []
    for _ in range(problems):
        problem = random_problem(generator, teachers, students, **kind)
        given = (problem.students, problem.teachers, problem.m)
        plug_in = decompose(*given, unbiased=False)
        # Against m for every term that has no x0 in it, then the three that have.
        for goal, x0, totals in ((problem.m, None, "total"), (problem.x0, problem.x0, "total_x0")):
            each = (goal - problem.students).square().mean((2, 3)).flatten()
            for line in decompose(*given, x0).table().to_dict("records"):
                term = totals if line["term"] == "total" else line["term"]
                if x0 is not None and term in problem.excess:
                    continue
                fixed = problem.given_x0[term]
                found = {"term": term, "truth": problem.truth[term], "bias": line["value"] - problem.truth[term]}
                if term != "irreducible":
                    found["coverage"] = float(line["low"] <= fixed <= line["high"])
                    found["coverage_2se"] = float(abs(line["value"] - fixed) <= 2 * line["se"])
                if term == totals:
                    found["coverage_students"] = float(abs(line["value"] - fixed) <= 2 * float(each.std()) / len(each) ** 0.5)
                if term in problem.excess:
                    found |= {"plug_in_bias": plug_in[term] - problem.truth[term], "plug_in_theory": problem.excess[term]}
                    found["difference"] = found["plug_in_bias"] - found["plug_in_theory"]
                lines.append(found)
    groups = pd.DataFrame(lines).groupby("term", sort=False)
    table, se = groups.mean(), groups.sem()
    table.insert(2, "bias_se", se["bias"])
    table.insert(3, "z", table["bias"] / se["bias"])
    table.insert(5, "coverage_se", (table["coverage"] * (1 - table["coverage"]) / problems) ** 0.5)
    table["plug_in_z"] = table.pop("difference") / se["difference"]
    return table.reset_index().assign(problems=problems, teachers=teachers, students=students, seed=seed)


if __name__ == "__main__":
    table = pd.concat({name: prove(2000, **case) for name, case in CASES.items()}, names=["case", None]).reset_index("case")
    with replacing(shipped_folder() / "results" / "bias_variance_proof.csv") as temporary:
        table.to_csv(temporary, index=False, float_format="%.5g")
    print(table.drop(columns=["problems", "students", "seed"]).round(4).to_string(index=False))
