"""Every solution passes, every empty stub fails, and typical wrong answers fail with the right words."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch

from sferd_lab import exercises
from sferd_lab.exercises import Exercise

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"


def in_the_notebooks() -> list[tuple[str, str, str]]:
    """For each exercise: its notebook, its solution's code and its stub cell's."""
    found = []
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        cells = nbformat.read(path, as_version=4).cells
        for told, stub in itertools.pairwise(cells):
            if stub.cell_type == "code" and "exercises.check_" in stub.source:
                solution = re.search(r"<summary>Solution</summary>\s*```python\n(.*?)```", told.source, re.DOTALL)
                found.append((path.stem, solution[1] if solution else "", stub.source))
    return found


CASES = in_the_notebooks()


@pytest.mark.parametrize(("notebook", "solution", "stub"), CASES, ids=[re.search(r"check_(\w+)", case[2])[1] for case in CASES])
def test_the_empty_stub_fails_and_the_solution_passes(notebook: str, solution: str, stub: str, capsys: pytest.CaptureFixture[str]) -> None:
    space: dict[str, Any] = {"exercises": exercises, "torch": torch}
    exec(stub, space)
    assert capsys.readouterr().out == "not yet: your function returns nothing. Write its body, and end it with return.\n"
    check = stub.strip().splitlines()[-1]
    assert check.startswith("exercises.check_")
    assert solution, f"{notebook}: no solution above {check}"
    exec(solution, space)
    exec(check, space)
    assert capsys.readouterr().out == "passed\n"


def test_every_check_is_used_in_a_notebook() -> None:
    used = {name for case in CASES for name in re.findall(r"exercises\.(check_\w+)", case[2])}
    assert used == {name for name in dir(exercises) if name.startswith("check_")}


cos, sin = math.cos, math.sin


def spread(part: torch.Tensor) -> torch.Tensor:
    return part[:, :, None, None]


WRONG = {
    "root_mean_square": [
        (lambda a, b: ((a - b) ** 2).mean(), "the root is missing"),
        (lambda a, b: (a - b).norm(), "this adds the squares up"),
        (lambda a, b: (b - a).abs().mean(), "the mean absolute difference"),
        (lambda a, b: ((a - b) ** 2).mean((1, 2, 3)).sqrt(), r"your result has shape \(3,\)"),
    ],
    "to_pixels": [
        (lambda images: 127.5 * images + 127.5, "are not cut off"),
        (lambda images: (images.clamp(-1, 1) + 1) / 2, "these run from 0 to 1"),
        (lambda images: 255 * images.clamp(-1, 1), "shift before you scale"),
        (lambda images: 255 * images.clamp(0, 1), "darker than middle gray is lost"),
    ],
    "copying": [
        (lambda s, t, h: torch.cdist(s, h).amin(1) / torch.cdist(s, t).amin(1), "upside down"),
        (lambda s, t, h: torch.cdist(s, t).amin(1) ** 2 / torch.cdist(s, h).amin(1) ** 2, "still squared"),
        (lambda s, t, h: torch.cdist(s, t).mean(1) / torch.cdist(s, h).mean(1), "the mean distance to all"),
        (lambda s, t, h: (torch.cdist(s, t).amin(1) / torch.cdist(s, h).amin(1)).median(), "your result has shape"),
    ],
    "steps_for_the_price": [
        (lambda pair, plain: (pair / plain).ceil(), "you round up"),
        (lambda pair, plain: (pair / plain).round(), "you round to the nearest"),
        (lambda pair, plain: pair / plain, "a part of a step"),
        (lambda pair, plain: plain / pair, "upside down"),
    ],
    "add_noise": [
        (lambda x0, eps, phi: sin(phi) * x0 + cos(phi) * eps, "sine and cosine are exchanged"),
        (lambda x0, eps, phi: (1 - phi / (math.pi / 2)) * x0 + phi / (math.pi / 2) * eps, "their squares should add up to 1"),
        (lambda x0, eps, phi: cos(phi) * x0 - sin(phi) * eps, "the noise is subtracted"),
        (lambda x0, eps, phi: cos(phi) * x0, "there is no noise in it"),
        (lambda x0, eps, phi: cos(phi) * x0 + sin(phi), "differs from the right one by up to"),
    ],
    "x0_from_v": [
        (lambda x, v, phi: cos(phi) * x + sin(phi) * v, "your x0 has the sign of v flipped"),
        (lambda x, v, phi: sin(phi) * x + cos(phi) * v, "this is eps, not x0"),
        (lambda x, v, phi: (x - sin(phi) * v) / cos(phi), "right for the noise in place of v"),
    ],
    "ddim_step": [
        (lambda x, v, phi, psi: cos(psi - phi) * x - sin(psi - phi) * v, "you turn by psi - phi"),
        (lambda x, v, phi, psi: cos(phi) * x - sin(phi) * v, "this lands on x0"),
        (lambda x, v, phi, psi: x - (phi - psi) * v, "this goes straight along the tangent"),
        (lambda x, v, phi, psi: (cos(phi - psi) * x - sin(phi - psi) * v)[0], r"shape \(1, 4, 4\); it should have \(3, 1, 4, 4\)"),
    ],
    "pd_target": [
        (lambda x, x_psi, phi, psi: (x_psi - cos(phi - psi) * x) / sin(phi - psi), "the sign is the other way round"),
        (lambda x, x_psi, phi, psi: (x - x_psi) / sin(phi - psi), "the cosine is missing"),
        (lambda x, x_psi, phi, psi: (cos(phi - psi) * x - x_psi) / (phi - psi), "not by its sine"),
    ],
    "truncated_snr": [
        (lambda phi: phi.tan() ** -2, "it is not truncated"),
        (lambda phi: (phi.cos() / phi.sin()).clamp(min=1), "the squares are missing"),
        (lambda phi: (phi.tan() ** -2).clamp(max=1), "it is cut at 1 from above"),
        (lambda phi: phi.tan().square().clamp(min=1), "signal and noise are exchanged"),
    ],
    "consistency_target": [
        (lambda x, teacher_v, f, phi, psi: f(x, phi), "the student is asked where you stand"),
        (lambda x, teacher_v, f, phi, psi: f(x, psi), "the teacher's step is missing"),
        (lambda x, teacher_v, f, phi, psi: f(cos(phi - psi) * x - sin(phi - psi) * teacher_v, phi), "but told the old angle"),
        (lambda x, teacher_v, f, phi, psi: cos(phi - psi) * x - sin(phi - psi) * teacher_v, "the student has not been asked"),
    ],
    "pseudo_huber": [
        (lambda d, c: (d.flatten(1).square().sum(1) + c**2).sqrt(), "c is not taken off"),
        (lambda d, c: (d.flatten(1).square().mean(1) + c**2).sqrt() - c, "it averages over the numbers of a row"),
        (lambda d, c: (d.square() + c**2).sqrt() - c, r"shape \(3, 1, 4, 4\); it should have \(3,\)"),
    ],
    "attention_received": [
        (lambda weights: weights.mean(0).sum(-1), "this adds up each row"),
        (lambda weights: weights.mean(0).mean(0), "this averages over the queries"),
        (lambda weights: weights.sum(0).sum(0), "this adds up over the heads, too"),
        (lambda weights: weights.sum(1), r"shape \(2, 6\); it should have \(6,\)"),
    ],
    "blend": [
        (lambda x0, blurred, mask: mask * x0 + (1 - mask) * blurred, "mask and rest are exchanged"),
        (lambda x0, blurred, mask: mask * blurred, "outside the mask the guess is missing"),
        (lambda x0, blurred, mask: x0 + mask * blurred, "the guess shines through"),
    ],
    "guided_x0": [
        (lambda x0, x0_from_blurred, w: x0 + w * (x0_from_blurred - x0), "this moves towards"),
        (lambda x0, x0_from_blurred, w: x0_from_blurred + w * (x0 - x0_from_blurred), "this is the authors' scale"),
    ],
    "gradient_from_shift": [
        (lambda h, phi: cos(phi) / sin(phi) * h, "the sign is missing"),
        (lambda h, phi: -sin(phi) * h, "this is how far the image moves"),
        (lambda h, phi: -sin(phi) / cos(phi) * h, "the factor is upside down"),
    ],
    "modulate": [
        (lambda n, t_s, t_b, z_s, z_b: spread(z_s) * (spread(t_s) * n + spread(t_b)) + spread(z_b), "the ones are missing"),
        (lambda n, t_s, t_b, z_s, z_b: (1 + spread(t_s)) * ((1 + spread(z_s)) * n + spread(z_b)) + spread(t_b), "exchanged"),
        (lambda n, t_s, t_b, z_s, z_b: (1 + spread(t_s)) * n + spread(t_b), "the code is not used"),
        (lambda n, t_s, t_b, z_s, z_b: (1 + t_s) * n, "your function raised RuntimeError"),
    ],
    "heun_velocity": [
        (lambda v1, v2, x_mid, delta: (v1 + v2) / 2, "this is the plain mean"),
        (lambda v1, v2, x_mid, delta: (v1 + cos(delta) * v2 + sin(delta) * x_mid) / 2, "v2 is turned the wrong way"),
        (lambda v1, v2, x_mid, delta: cos(delta) * v2 - sin(delta) * x_mid, "the mean with the first is missing"),
        (lambda v1, v2, x_mid, delta: v1 + cos(delta) * v2 - sin(delta) * x_mid, "this is the sum of both"),
    ],
    "angles_of_a_walk": [
        (lambda steps: torch.linspace(0, math.pi / 2, steps + 1), "these go up"),
        (lambda steps: torch.linspace(1, 0, steps + 1), "these run from 1 to 0"),
        (lambda steps: torch.linspace(math.pi / 2, 0, steps), "your result has shape"),
    ],
    "velocity": [
        (lambda x0, eps, phi: cos(phi) * x0 + sin(phi) * eps, "this is the noised image itself"),
        (lambda x0, eps, phi: cos(phi) * eps + sin(phi) * x0, "the sign of x0 is wrong"),
        (lambda x0, eps, phi: sin(phi) * x0 - cos(phi) * eps, "signs are exchanged"),
        (lambda x0, eps, phi: eps - x0, "along a straight line"),
    ],
    "moving_average": [
        (lambda average, weights, decay: (1 - decay) * average + decay * weights, "average and weights are exchanged"),
        (lambda average, weights, decay: decay * average + weights, "the shares do not add up to 1"),
    ],
    "angle_of_alpha_bar": [
        (lambda alpha_bar: torch.acos(alpha_bar), "the root is missing"),
        (lambda alpha_bar: torch.asin(alpha_bar.sqrt()), "the angle from the other end"),
        (lambda alpha_bar: math.acos(alpha_bar[0] ** 0.5), "returns a float; it should return a tensor"),
        (lambda alpha_bar: alpha_bar.sqroot().acos(), "your function raised AttributeError: .*sqroot"),
    ],
    "unbiased_squared_bias": [
        (lambda predictions, m: (m - predictions.mean(0)) ** 2, "this is the plug-in estimate"),
        (lambda predictions, m: ((m - predictions.mean(0)) ** 2 - predictions.var(0) / len(predictions)).relu(), "you clip at zero"),
        (lambda predictions, m: (m - predictions.mean(0)) ** 2 - predictions.var(0), "varies K times less"),
        (lambda predictions, m: (m - predictions.mean(0)) ** 2 - predictions.var(0, correction=0) / len(predictions), "it is K - 1"),
        (lambda predictions, m: (m - predictions.mean(0)) ** 2 + predictions.var(0) / len(predictions), "the sign is wrong"),
        (lambda predictions, m: ((m - predictions.mean(0)) ** 2).mean(), "your result has shape"),
    ],
    "own_variance": [
        (lambda students: students.reshape(-1, students.shape[-1]).var(0), "different teachers is in it"),
        (lambda students: students.mean(1).var(0), "the variance of the teachers' means"),
        (lambda students: students.var(1, correction=0).mean(0), "it is M - 1"),
        (lambda students: students.std(1).mean(0), "these are standard deviations"),
    ],
    "inherited_variance": [
        (lambda students: students.mean(1).var(0), "own variance is still in it"),
        (lambda students: students.mean(1).var(0) - students.var(1).mean(0), "has the M-th part"),
        (lambda students: (students.mean(1).var(0) - students.var(1).mean(0) / students.shape[1]).relu(), "you clip at zero"),
    ],
    "spatial_error": [
        (lambda guess, x0: ((guess - x0) ** 2).sum(1), "adds up the channels"),
        (lambda guess, x0: (x0 - guess).mean(1), "the square is missing"),
        (lambda guess, x0: (x0 - guess).abs().mean(1), "the absolute error"),
        (lambda guess, x0: (guess - x0).mean(1) ** 2, "comes first in yours"),
        (lambda guess, x0: ((guess - x0) ** 2).mean(), "your result has shape"),
    ],
    "error_share": [
        (lambda error, mask: (error * mask).sum((1, 2)) / error.sum((1, 2)), "divide by the share of the area"),
        (
            lambda error, mask: (error * mask).sum((1, 2)) / mask.sum((1, 2)) / (error * (1 - mask)).sum((1, 2)) * (1 - mask).sum((1, 2)),
            "compares inside with outside",
        ),
        (lambda error, mask: mask.mean((1, 2)) / ((error * mask).sum((1, 2)) / error.sum((1, 2))), "upside down"),
    ],
    "rank_correlation": [
        (lambda a, b: torch.corrcoef(torch.stack([a, b]))[0, 1], "correlates the values"),
        (lambda a, b: torch.corrcoef(torch.stack([a.argsort(), b.argsort()]).double())[0, 1], "apply it twice"),
        (lambda a, b: torch.corrcoef(torch.stack([a.argsort().argsort(), (-b).argsort().argsort()]).double())[0, 1], "ranked downwards"),
    ],
    "ratio_over_seeds": [
        (lambda method, baseline: (method / baseline).mean(), "average their logarithms"),
        (lambda method, baseline: method.mean() / baseline.mean(), "the ratio of the means"),
        (lambda method, baseline: (baseline / method).log().mean().exp(), "upside down"),
        (lambda method, baseline: (method / baseline).log().mean(), "still a logarithm"),
    ],
    "gap_closed": [
        (lambda student, improved, teacher: (student - improved) / student, "its distance to the teacher"),
        (lambda student, improved, teacher: (improved - teacher) / (student - teacher), "what is left of the gap"),
        (lambda student, improved, teacher: (improved - student) / (student - teacher), "the sign is wrong"),
    ],
    "least_attended": [
        (lambda attention, threshold: 1 - (attention > threshold).double(), "Match the area"),
        (lambda attention, threshold: (attention > threshold).double(), "the mask itself"),
        (lambda attention, threshold: attention * (attention.argsort().argsort() < (attention > threshold).sum()), "zeros and ones"),
    ],
    "common_share": [
        (lambda d: d.mean(0).square().mean() / d.square().mean(), "a part of chance"),
        (lambda d: d.var(0).mean() / d.square().mean(), "of its own"),
        (lambda d: (d.mean(0).square() - d.var(0, correction=0) / len(d)).mean() / d.square().mean(), "K - 1"),
    ],
}


@pytest.mark.parametrize(("name", "answer", "words"), [(name, *case) for name, cases in WRONG.items() for case in cases])
def test_a_wrong_answer_is_told_what_is_wrong(name: str, answer: Any, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    getattr(exercises, f"check_{name}")(answer)
    assert re.search(f"^not yet: .*{words}", capsys.readouterr().out)
    for seed in range(1, 10):  # whatever is drawn
        assert re.search(f"^not yet: .*{words}", getattr(exercises, name.upper()).verdict(answer, seed=seed))


def test_every_exercise_has_two_wrong_answers_or_more() -> None:
    assert WRONG.keys() == {name.removeprefix("check_") for name in dir(exercises) if name.startswith("check_")}
    assert all(len(answers) >= 2 for answers in WRONG.values())


def test_right_answers_pass_in_single_precision_too() -> None:
    for exercise in (value for value in vars(exercises).values() if isinstance(value, Exercise)):
        answer = exercise.reference
        assert exercise.verdict(lambda *given, answer=answer: answer(*given).float()) == "passed"


def test_every_trial_draws_new_inputs_and_every_check_the_same_ones() -> None:
    seen = []
    exercise = Exercise(lambda x: x, lambda generator: (torch.rand(2, generator=generator),), {})
    for seed in (0, 0, 1):
        exercise.verdict(lambda x: seen.append(x) or x, trials=3, seed=seed)
    assert len(torch.stack(seen).unique(dim=0)) == 6
    assert torch.equal(torch.stack(seen[:3]), torch.stack(seen[3:6]))
