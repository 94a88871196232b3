"""Bias and variance of a distilled student, split into what its teacher brings and what distillation adds.

Fix a noisy image x_phi. Let m = E[x0 | x_phi], T the prediction of a teacher and S that of its student, both random through their training
(data, order, initial weights). Per pixel, x0 and S being independent given x_phi,

    E (x0 - S)^2 = E (x0 - m)^2  +  (m - E S)^2          +  Var S
                   irreducible      bias^2                  variance
    m - E S      = (m - E T) + (E T - E S)                  the teacher's bias and distillation's; their cross term is kept
    Var S        = Var_T E[S | T] + E_T Var[S | T]          inherited from the teacher, and the student's own

``decompose`` estimates every term without bias from K >= 2 teachers with M >= 2 students each. Estimates of terms that are small may be
negative: they are never clipped, since clipping would bias them. A bias and a variance of distillation appear in Menon et al. (2021);
this nested form, for denoisers, is the project's own reading of the SFERD paper's analysis.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

from sferd_lab.denoiser import Denoiser
from sferd_lab.diffusion import angle_grid
from sferd_lab.errors import SferdError
from sferd_lab.sample import sampler_by_name

Models = Denoiser | Sequence["Models"]
DETERMINISTIC = ("ddim", "heun")


@torch.inference_mode()
def predict(models: Models, x: Tensor, phi: float, steps: int | None = None, sampler: str = "ddim", **condition: Tensor) -> Tensor:
    """What ``models`` make of ``x`` (N, ...) at ``phi``: (N, ...) for one denoiser, and a leading axis for each nesting of lists.

    ``steps`` None: x0 of a single evaluation. Otherwise the end of a walk of so many equal steps from phi to 0. The endpoint Phi of an
    exact denoiser's ODE, the reference for walks and few-step students, is its walk by "heun" in many steps. Raises SferdError for a
    sampler that draws noise, which no training put there, and for lists that are empty or not equally long.
    """
    if not isinstance(models, Denoiser):
        parts = [predict(model, x, phi, steps, sampler, **condition) for model in models]
        if len({part.shape for part in parts}) != 1:
            lengths = [len(model) for model in models if not isinstance(model, Denoiser)]
            raise SferdError(
                f"a list of {len(parts)} models, themselves lists of {lengths}; allowed: lists that are equally long, not empty"
            )
        return torch.stack(parts)
    if steps is None:
        return models(x, phi, **condition).x0
    if sampler not in DETERMINISTIC:
        raise SferdError(f"sampler = '{sampler}'; allowed: {', '.join(DETERMINISTIC)}, which draw no noise")
    *_, last = sampler_by_name(sampler)(models, x, angle_grid(steps, phi), None, **condition)
    return last.x


@dataclass(frozen=True)
class Decomposition:
    """``maps``: each term per point and pixel, (N, ...), in an order that adds up to "total", which is first.

    ``se`` is each term's standard error over trainings: a jackknife over the first level (teachers), NaN for fewer than 3 of them.
    """

    maps: dict[str, Tensor]
    se: dict[str, float]
    trainings: int

    def __getitem__(self, term: str) -> float:
        """The term's mean over points and pixels."""
        return float(self.maps[term].mean())

    def map(self, term: str) -> Tensor:
        """The term's mean over points, per pixel."""
        return self.maps[term].mean(0)

    def table(self, level: float = 0.95) -> pd.DataFrame:
        """A line a term: ``value``, ``se`` and a t interval over trainings (``low``, ``high``), and ``se_points``, that over points.

        The interval is for these points; whoever wants to speak of others adds the variance over points. As ``proof`` measures, it covers
        less than it says where trainings differ along one direction only, and more for the square of a bias that is close to zero.
        """
        from scipy import stats

        quantile = stats.t.ppf(0.5 + level / 2, self.trainings - 1)
        lines = []
        for term, values in self.maps.items():
            value, half, points = self[term], quantile * self.se[term], values.flatten(1).mean(1)
            spread = float(points.std()) / math.sqrt(len(points)) if len(points) > 1 else math.nan
            lines.append((term, value, self.se[term], value - half, value + half, spread))
        return pd.DataFrame(lines, columns=["term", "value", "se", "low", "high", "se_points"])


def nested_variance(values: Tensor, levels: int, unbiased: bool = True) -> list[Tensor]:
    """Variance that each of the first ``levels`` axes of ``values`` adds, from the first down: balanced nested analysis of variance.

    ``values`` (L1, ..., Ln, ...), each level nested in the one before. Level i's estimate is the mean variance of the level's means less
    what the levels below put into them. ``unbiased=False`` is the plug-in version, which divides by counts and subtracts nothing.
    Raises SferdError for fewer than 2 of a level, which have no variance.
    """
    if min(values.shape[:levels], default=2) < 2:
        raise SferdError(f"values {tuple(values.shape)} of {levels} levels; allowed: 2 or more of each, since a variance needs two")
    components: list[Tensor] = []
    below: Tensor | float = 0.0
    for axis in reversed(range(levels)):
        spread = values.var(dim=axis, correction=int(unbiased))
        spread = spread.flatten(0, axis - 1).mean(0) if axis else spread
        components.insert(0, spread - below if unbiased else spread)
        below = spread / values.shape[axis]  # what these values put into the variance of their means, one level up
        values = values.mean(axis)
    return components


def _terms(
    students: Tensor, teachers: Tensor, m: Tensor | None, x0: Tensor | None, levels: Sequence[str], unbiased: bool
) -> dict[str, Tensor]:
    """The terms per point and pixel, without their total; ``teachers`` (K, N, ...) averaged over all levels but the first."""
    reference = x0 if m is None else m
    # Everything but the variances needs the independent units alone: the first level, averaged over the others.
    student, teacher, count = students.flatten(1, len(levels) - 1).mean(1), teachers, len(teachers)
    s, t = student.mean(0), teacher.mean(0)
    var_t = var_s = cov = torch.zeros_like(s)
    if unbiased:
        var_t, var_s = teacher.var(0), student.var(0)
        cov = ((teacher - t) * (student - s)).sum(0) / (count - 1)
    terms = {}
    if m is not None and x0 is not None:
        terms = {"irreducible": (x0 - m).square(), "chance": 2 * (x0 - m) * (m - s)}
    terms["teacher_bias" if m is not None else "irreducible_and_teacher_bias"] = (reference - t).square() - var_t / count
    terms["distillation_bias"] = (t - s).square() - (var_t + var_s - 2 * cov) / count
    terms["bias_cross"] = 2 * ((reference - t) * (t - s) + (var_t - cov) / count)
    return terms | {f"{level}_variance": part for level, part in zip(levels, nested_variance(students, len(levels), unbiased), strict=True)}


def decompose(
    students: Tensor,
    teachers: Tensor,
    m: Tensor | None = None,
    x0: Tensor | None = None,
    levels: Sequence[str] = ("teacher", "student"),
    unbiased: bool = True,
) -> Decomposition:
    """Split the squared error of ``students`` (K, M, N, ...), M students of each of K ``teachers`` (K, N, ...), at N points.

    The terms, all unbiased for finite K and M; with e = mean over students, W and B the variances within and between teachers' students:

    - "irreducible": (x0 - m)^2, and "chance": 2 (x0 - m)(m - e), zero on average, which makes the sum exact. Only with x0 and m.
    - "teacher_bias": (m - T.)^2 - s_T^2 / K. Without m, x0 takes its place, and "irreducible_and_teacher_bias" is what one can know.
    - "distillation_bias": (T. - e)^2 - (s_T^2 + B - 2 s_TS) / K
    - "bias_cross": 2 [(m - T.)(T. - e) + (s_T^2 - s_TS) / K]
    - "teacher_variance", B - W / M: what students inherit from their teachers; "student_variance", W: their own.

    They add up to "total", the mean of (x0 - S)^2, or of (m - S)^2 when x0 is not given. For a walk or a few-step student ``m`` is the
    exact endpoint Phi, not the posterior mean, against which a perfect student would be charged Var(x0 | x_phi).

    ``levels`` names the axes of ``students`` before N, from the first; each is nested in the one before and ``teachers`` has all but the
    last (or, with a level "z" of codes drawn from a prior, all but the last two). ("data", "teacher", "student") separates the bootstrap
    sample from the seed. The first level's units must be independent. ``unbiased=False`` is the plug-in estimate, which charges variance
    as bias: teacher_bias too large by s_T^2 / K. Raises SferdError for fewer than 2 of anything, for values not finite, and for
    shapes that do not fit.
    """
    depth, point = len(levels), students.shape[len(levels) :]
    if depth < 2 or len(set(levels)) < depth:
        raise SferdError(f"levels = {tuple(levels)}; allowed: two or more different names, such as teacher and student")
    for name, count in zip(levels, students.shape, strict=False):
        if count < 2:
            raise SferdError(f"{count} of level '{name}'; allowed: 2 or more, since a variance needs two")
    if len(point) < 2:
        raise SferdError(f"students have shape {tuple(students.shape)}; allowed: ({', '.join(levels)}, points, ...)")
    upper = teachers.ndim - len(point)
    if not 1 <= upper < depth or teachers.shape != (*students.shape[:upper], *point):
        raise SferdError(
            f"teachers have shape {tuple(teachers.shape)}, students {tuple(students.shape)}; "
            f"allowed: the students' upper levels, then {tuple(point)}"
        )
    for name, values in {"students": students, "teachers": teachers, "m": m, "x0": x0}.items():
        if values is not None and (not values.numel() or not bool(values.isfinite().all())):
            raise SferdError(f"{name} {tuple(values.shape)} are empty or hold NaN or infinity; allowed: finite values at one point or more")
    if m is None and x0 is None:
        raise SferdError("neither m nor x0 was given; allowed: one or both, to measure errors against")
    for name, reference in (("m", m), ("x0", x0)):
        if reference is not None and reference.shape != point:
            raise SferdError(f"{name} has shape {tuple(reference.shape)}; allowed: {tuple(point)}, one a point")
    # Differences of squares: float32 would lose small terms.
    students, teachers = students.double(), teachers.double().flatten(1, upper - 1).mean(1) if upper > 1 else teachers.double()
    m, x0 = (None if reference is None else reference.double() for reference in (m, x0))

    def terms(students: Tensor, teachers: Tensor) -> dict[str, Tensor]:
        parts = _terms(students, teachers, m, x0, levels, unbiased)
        goal = m if x0 is None else x0
        return {"total": (goal - students).square().flatten(0, depth - 1).mean(0)} | parts

    maps, count = terms(students, teachers), len(students)
    se = dict.fromkeys(maps, math.nan)
    if count > 2:
        keep = [[other for other in range(count) if other != left_out] for left_out in range(count)]
        without = [{name: part.mean() for name, part in terms(students[rows], teachers[rows]).items()} for rows in keep]
        for name in maps:
            estimates = torch.stack([part[name] for part in without])
            se[name] = float(((count - 1) / count * (estimates - estimates.mean()).square().sum()).sqrt())
    return Decomposition(maps, se, count)
