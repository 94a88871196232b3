"""The notebooks' exercises: ``check_<name>(your_function)`` tries it on fresh random inputs and says "passed", or in words what is wrong.

A check compares with a reference that shares no code with the library, in float64. Where an answer is off, it is held against the usual
mistakes first: a wrong answer that equals one of them gets its name.
"""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Exercise:
    """What an answer is held against: ``inputs`` draws arguments, ``mistakes`` are wrong answers by what to say of them."""

    reference: Function
    inputs: Callable[[torch.Generator], tuple[object, ...]]
    mistakes: dict[str, Function]

    def verdict(self, function: Function, trials: int = 5, seed: int = 0) -> str:
        """Say "passed", or in a sentence that begins with "not yet" what is wrong: the same of the same answer, each time."""
        generator = torch.Generator().manual_seed(seed)
        answers = []
        for _ in range(trials):
            given = self.inputs(generator)
            wanted = self.reference(*given)
            try:
                got = function(*given)
            except Exception as error:  # whatever a learner's function raises is news for the learner
                return f"not yet: your function raised {type(error).__name__}: {error}"
            if got is None or got is ...:
                return "not yet: your function returns nothing. Write its body, and end it with return."
            if not isinstance(got, Tensor):
                return f"not yet: your function returns a {type(got).__name__}; it should return a tensor."
            if got.shape != wanted.shape:
                return f"not yet: your result has shape {tuple(got.shape)}; it should have {tuple(wanted.shape)}."
            answers.append((given, wanted, got))
        if not all(_close(got, wanted) for _, wanted, got in answers):
            for words, mistake in self.mistakes.items():
                # In every trial: on a single draw two mistakes can look alike.
                if all(_close(got, mistake(*given)) for given, _, got in answers):
                    return f"not yet: {words}"
            worst = max((got.to(wanted) - wanted).abs().max().item() for _, wanted, got in answers)
            return f"not yet: your result differs from the right one by up to {worst:.3g}. Try a case you can work out by hand."
        return "passed"


def _close(got: Tensor, wanted: Tensor) -> bool:
    return bool(torch.allclose(got.to(wanted), wanted, rtol=1e-4, atol=1e-5))


def _images(generator: torch.Generator) -> Tensor:
    return torch.randn(3, 1, 4, 4, generator=generator, dtype=torch.float64)


def _angle(generator: torch.Generator, low: float = 0.2, high: float = 1.4) -> float:
    return low + (high - low) * torch.rand((), generator=generator).item()


def _turned(real: Tensor, imaginary: Tensor, angle: float) -> Tensor:
    """The real part of real + i imaginary, turned by ``angle``: a rotation without a sine or a cosine written down."""
    return ((real + 1j * imaginary) * cmath.exp(1j * angle)).real


def _two_images_and_an_angle(generator: torch.Generator) -> tuple[object, ...]:
    return _images(generator), _images(generator), _angle(generator)


def _a_step(generator: torch.Generator) -> tuple[object, ...]:
    phi = _angle(generator, 0.6, 1.5)
    return _images(generator), _images(generator), phi, _angle(generator, 0.0, phi - 0.2)


ROOT_MEAN_SQUARE = Exercise(
    lambda a, b: torch.linalg.vector_norm(a - b) / a.numel() ** 0.5,
    lambda generator: (_images(generator), _images(generator)),
    {
        "the root is missing: this is in squared gray values.": lambda a, b: (a - b).square().mean(),
        "this adds the squares up. The mean does not grow with the number of pixels.": lambda a, b: (a - b).square().sum().sqrt(),
        "this is the mean absolute difference: square first, then average, then take the root.": lambda a, b: (a - b).abs().mean(),
        "differences up and down cancel: square them first.": lambda a, b: (a - b).mean(),
    },
)
TO_PIXELS = Exercise(
    lambda images: 127.5 + 127.5 * torch.where(images.abs() > 1, images.sign(), images),
    lambda generator: (_images(generator),),
    {
        "values outside [-1, 1] are not cut off: they have no gray.": lambda images: (images + 1) * 127.5,
        "these run from 0 to 1: the brightest pixel should be 255.": lambda images: (images.clamp(-1, 1) + 1) / 2,
        "-1 does not become 0: shift before you scale.": lambda images: images.clamp(-1, 1) * 255,
        "all that is darker than middle gray is lost: -1 should become 0, and 0 the middle.": lambda images: images.clamp(0, 1) * 255,
    },
)
ADD_NOISE = Exercise(
    lambda x0, eps, phi: _turned(x0, eps, -phi),
    _two_images_and_an_angle,
    {
        "sine and cosine are exchanged. At phi = 0 the result should be x0 itself.": lambda x0, eps, phi: _turned(eps, x0, -phi),
        "this mixes x0 and eps along a straight line. With weights that add up to 1 the variance shrinks on the way: "
        "their squares should add up to 1.": lambda x0, eps, phi: torch.lerp(x0, eps, phi / (math.pi / 2)),
        "the noise is subtracted. As noise it is as good, but then v points the other way.": lambda x0, eps, phi: _turned(x0, eps, phi),
        "there is no noise in it.": lambda x0, eps, phi: _turned(x0, torch.zeros_like(eps), phi),
    },
)
X0_FROM_V = Exercise(
    lambda x, v, phi: _turned(x, v, phi),
    _two_images_and_an_angle,
    {
        "your x0 has the sign of v flipped.": lambda x, v, phi: _turned(x, v, -phi),
        "this is eps, not x0: at phi = 0 it should be x itself.": lambda x, v, phi: _turned(v, x, -phi),
        "this divides by cos(phi), which is right for the noise in place of v.": lambda x, v, phi: (x - math.sin(phi) * v) / math.cos(phi),
    },
)
DDIM_STEP = Exercise(
    lambda x, v, phi, psi: _turned(x, v, phi - psi),
    _a_step,
    {
        "you turn by psi - phi: that goes up, towards noise.": lambda x, v, phi, psi: _turned(x, v, psi - phi),
        "this lands on x0, whatever psi is: you turn by phi, all the way.": lambda x, v, phi, psi: _turned(x, v, phi),
        "this goes straight along the tangent. A step turns, or it leaves the circle.": lambda x, v, phi, psi: x - (phi - psi) * v,
    },
)
ANGLE_OF_ALPHA_BAR = Exercise(
    lambda alpha_bar: torch.atan2((1 - alpha_bar).sqrt(), alpha_bar.sqrt()),
    lambda generator: (torch.rand(6, generator=generator, dtype=torch.float64) * 0.98 + 0.01,),
    {
        "the root is missing: alpha_bar is the square of the signal's weight.": lambda alpha_bar: alpha_bar.acos(),
        "this is the angle from the other end: at alpha_bar = 1 there is no noise and phi should be 0.": lambda alpha_bar: (
            alpha_bar.sqrt().asin()
        ),
    },
)


PD_TARGET = Exercise(
    # The same formula by cotangent and cosecant.
    lambda x, x_psi, phi, psi: x / math.tan(phi - psi) - x_psi / math.cos(math.pi / 2 - phi + psi),
    _a_step,
    {
        "the sign is the other way round: with it the student would step away from x_psi.": lambda x, x_psi, phi, psi: (
            (x_psi - math.cos(phi - psi) * x) / math.sin(phi - psi)
        ),
        "the cosine is missing: x shrinks as it turns.": lambda x, x_psi, phi, psi: (x - x_psi) / math.sin(phi - psi),
        "you divide by the angle, not by its sine: that is a straight line, not a turn.": lambda x, x_psi, phi, psi: (
            (math.cos(phi - psi) * x - x_psi) / (phi - psi)
        ),
    },
)
TRUNCATED_SNR = Exercise(
    lambda phi: torch.where(phi < math.pi / 4, 1 / phi.sin().square() - 1, 1.0),
    lambda generator: (torch.rand(6, generator=generator, dtype=torch.float64) * 1.3 + 0.1,),
    {
        "it is not truncated: near pure noise the weight should stay at 1.": lambda phi: (phi.cos() / phi.sin()) ** 2,
        "the squares are missing: SNR is a ratio of variances.": lambda phi: (phi.cos() / phi.sin()).clamp_min(1),
        "it is cut at 1 from above: the smallest weight should be 1, not the largest.": lambda phi: (
            (phi.cos() / phi.sin()).square().clamp_max(1)
        ),
        "signal and noise are exchanged.": lambda phi: phi.tan().square().clamp_min(1),
    },
)


def _a_consistency_step(generator: torch.Generator) -> tuple[object, ...]:
    x, v, phi, psi = _a_step(generator)
    scale, shift = _images(generator), _images(generator)
    return x, v, lambda place, angle: scale * place * math.cos(angle) + shift * math.sin(angle), phi, psi


CONSISTENCY_TARGET = Exercise(
    lambda x, teacher_v, f, phi, psi: f(_turned(x, teacher_v, phi - psi), psi),
    _a_consistency_step,
    {
        "the student is asked where you stand, not where the teacher's step leads.": lambda x, teacher_v, f, phi, psi: f(x, phi),
        "the student is asked at the new place, but told the old angle.": lambda x, teacher_v, f, phi, psi: f(
            _turned(x, teacher_v, phi - psi), phi
        ),
        "the student is told the new angle, but asked at the old place: the teacher's step is missing.": lambda x, teacher_v, f, phi, psi: (
            f(x, psi)
        ),
        "this is where the teacher's step leads; the student has not been asked.": lambda x, teacher_v, f, phi, psi: _turned(
            x, teacher_v, phi - psi
        ),
    },
)
PSEUDO_HUBER = Exercise(
    lambda d, c: torch.hypot(torch.linalg.vector_norm(d, dim=(1, 2, 3)), torch.tensor(c, dtype=d.dtype)) - c,
    lambda generator: (_images(generator), _angle(generator)),
    {
        "c is not taken off at the end: the distance of equal images should be 0.": lambda d, c: (d.square().sum((1, 2, 3)) + c**2).sqrt(),
        "c is not squared under the root.": lambda d, c: (d.square().sum((1, 2, 3)) + c).sqrt() - c,
        "it averages over the numbers of a row; the norm adds up their squares.": lambda d, c: (
            (d.square().mean((1, 2, 3)) + c**2).sqrt() - c
        ),
        "the root of each number is taken before they are added up: it belongs around the whole sum.": lambda d, c: (
            (d.square() + c**2).sqrt() - c
        ).sum((1, 2, 3)),
    },
)


def _attention(generator: torch.Generator) -> tuple[object, ...]:
    return (torch.randn(2, 6, 6, generator=generator, dtype=torch.float64).softmax(-1),)


def _images_and_a_mask(generator: torch.Generator) -> tuple[object, ...]:
    return _images(generator), _images(generator), (_images(generator) > 0).double()


def _two_images_and_a_weight(generator: torch.Generator) -> tuple[object, ...]:
    return _images(generator), _images(generator), _angle(generator)


ATTENTION_RECEIVED = Exercise(
    lambda weights: torch.einsum("hqk->k", weights) / len(weights),
    _attention,
    {
        "this adds up each row, which is 1 for every position: add up over the queries, who ask, not over the keys, who are asked.": (
            lambda weights: weights.mean(0).sum(1)
        ),
        "this averages over the queries: the mean of the map should be 1, whatever the number of positions.": (
            lambda weights: weights.mean((0, 1))
        ),
        "this adds up over the heads, too: they are averaged.": lambda weights: weights.sum((0, 1)),
    },
)
BLEND = Exercise(
    lambda x0, blurred, mask: torch.where(mask > 0.5, blurred, x0),
    _images_and_a_mask,
    {
        "mask and rest are exchanged: blur where the mask is 1.": lambda x0, blurred, mask: torch.where(mask > 0.5, x0, blurred),
        "outside the mask the guess is missing.": lambda x0, blurred, mask: mask * blurred,
        "inside the mask the guess shines through: blur and guess are added.": lambda x0, blurred, mask: x0 + mask * blurred,
    },
)
GUIDED_X0 = Exercise(
    lambda x0, x0_from_blurred, w: torch.lerp(x0_from_blurred, x0, 1 + w),
    _two_images_and_a_weight,
    {
        "this moves towards the blurred image's guess. Guidance moves away from it.": lambda x0, x0_from_blurred, w: torch.lerp(
            x0, x0_from_blurred, w
        ),
        "this is the authors' scale, 1 + w. Here w = 0 should leave the teacher's guess as it is.": lambda x0, x0_from_blurred, w: (
            torch.lerp(x0_from_blurred, x0, w)
        ),
    },
)


def _modulation(generator: torch.Generator) -> tuple[object, ...]:
    parts = torch.randn(4, 3, 2, generator=generator, dtype=torch.float64)
    return torch.randn(3, 2, 4, 4, generator=generator, dtype=torch.float64), *parts


def _scale_shift(n: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return torch.einsum("bchw,bc->bchw", n, 1 + scale) + shift[..., None, None]


GRADIENT_FROM_SHIFT = Exercise(
    lambda h, phi: -h / math.tan(phi),
    lambda generator: (_images(generator), _angle(generator)),
    {
        "the sign is missing: a shift of v upwards moves the image downwards.": lambda h, phi: h / math.tan(phi),
        "this is how far the image moves, not the gradient.": lambda h, phi: -math.sin(phi) * h,
        "the factor is upside down.": lambda h, phi: -math.tan(phi) * h,
    },
)
MODULATE = Exercise(
    lambda n, t_s, t_b, z_s, z_b: _scale_shift(_scale_shift(n, t_s, t_b), z_s, z_b),
    _modulation,
    {
        "the ones are missing: with all scales at 0 the activation should pass unchanged.": lambda n, t_s, t_b, z_s, z_b: _scale_shift(
            _scale_shift(n, t_s - 1, t_b), z_s - 1, z_b
        ),
        "code and angle are exchanged: the angle's scale and shift come first.": lambda n, t_s, t_b, z_s, z_b: _scale_shift(
            _scale_shift(n, z_s, z_b), t_s, t_b
        ),
        "the code is not used.": lambda n, t_s, t_b, z_s, z_b: _scale_shift(n, t_s, t_b),
    },
)


def _heun(generator: torch.Generator) -> tuple[object, ...]:
    return _images(generator), _images(generator), _images(generator), _angle(generator, 0.2, 1.2)


HEUN_VELOCITY = Exercise(
    lambda v1, v2, x_mid, delta: (v1 + _turned(v2, x_mid, delta)) / 2,
    _heun,
    {
        "this is the plain mean: v2 is measured in a frame that has turned by delta, and must be turned back first.": (
            lambda v1, v2, x_mid, delta: (v1 + v2) / 2
        ),
        "v2 is turned the wrong way.": lambda v1, v2, x_mid, delta: (v1 + _turned(v2, x_mid, -delta)) / 2,
        "this is the second velocity; the mean with the first is missing.": lambda v1, v2, x_mid, delta: _turned(v2, x_mid, delta),
        "this is the sum of both, not the mean.": lambda v1, v2, x_mid, delta: v1 + _turned(v2, x_mid, delta),
    },
)
ANGLES_OF_A_WALK = Exercise(
    lambda steps: (math.pi / 2) * (1 - torch.arange(steps + 1, dtype=torch.float64) / steps),
    lambda generator: (int(torch.randint(2, 9, (), generator=generator)),),
    {
        "these go up: a walk starts at noise, pi/2, and ends at 0.": lambda steps: torch.linspace(0, math.pi / 2, steps + 1),
        "these run from 1 to 0: angles run from pi/2.": lambda steps: torch.linspace(1, 0, steps + 1),
    },
)


VELOCITY = Exercise(
    lambda x0, eps, phi: _turned(eps, x0, phi),
    _two_images_and_an_angle,
    {
        "this is the noised image itself, not how it changes.": lambda x0, eps, phi: _turned(x0, eps, -phi),
        "the sign of x0 is wrong: as noise grows, the image fades.": lambda x0, eps, phi: _turned(eps, x0, -phi),
        "this is the velocity back towards the image: signs are exchanged.": lambda x0, eps, phi: -_turned(eps, x0, phi),
        "this is eps - x0, the velocity along a straight line. On the circle it depends on the angle.": lambda x0, eps, phi: eps - x0,
    },
)
MOVING_AVERAGE = Exercise(
    lambda average, weights, decay: torch.lerp(weights, average, decay),
    lambda generator: (_images(generator), _images(generator), 0.6 + 0.35 * torch.rand((), generator=generator).item()),
    {
        "average and weights are exchanged: with decay near 1 the average should hardly move.": lambda average, weights, decay: torch.lerp(
            average, weights, decay
        ),
        "the shares do not add up to 1: the average would grow.": lambda average, weights, decay: decay * average + weights,
    },
)


def _trainings(generator: torch.Generator) -> tuple[object, ...]:
    """Predictions (K, points) of trainings without a bias, and what is true: the unbiased estimate is negative at many points."""
    return torch.randn(4, 12, generator=generator, dtype=torch.float64), torch.zeros(12, dtype=torch.float64)


def _nested(generator: torch.Generator) -> tuple[object, ...]:
    """Students (K, M, points): what their teachers share is small beside their own, so the estimate is negative at many points."""
    draw = torch.randn(5, 4, 12, generator=generator, dtype=torch.float64)
    return (3 * draw + 0.3 * draw[:, :1] + torch.randn(5, 1, 12, generator=generator, dtype=torch.float64),)


def _pairwise_variance(values: Tensor) -> Tensor:
    """The variance over the first axis as half the mean squared difference of two different ones: no mean is taken."""
    count = len(values)
    return (values[:, None] - values[None]).square().sum((0, 1)) / (2 * count * (count - 1))


def _own(students: Tensor) -> Tensor:
    return _pairwise_variance(students.transpose(0, 1)).mean(0)


UNBIASED_SQUARED_BIAS = Exercise(
    # Products of two different trainings' errors: no training meets itself, so no variance gets in.
    lambda predictions, m: (
        ((m - predictions).sum(0).square() - (m - predictions).square().sum(0)) / (len(predictions) * (len(predictions) - 1))
    ),
    _trainings,
    {
        "this is the plug-in estimate: the mean of a few trainings is off by chance, and that is charged as bias.": lambda predictions, m: (
            m - predictions.mean(0)
        ).square(),
        "you clip at zero. An estimate that is right on average must be negative at times.": lambda predictions, m: (
            (m - predictions.mean(0)).square() - predictions.var(0) / len(predictions)
        ).clamp_min(0),
        "you take off the variance of one training; the mean of K of them varies K times less.": lambda predictions, m: (
            (m - predictions.mean(0)).square() - predictions.var(0)
        ),
        "your variance divides by K; from a sample it is K - 1.": lambda predictions, m: (
            (m - predictions.mean(0)).square() - predictions.var(0, correction=0) / len(predictions)
        ),
        "the sign is wrong: chance makes the plug-in too large.": lambda predictions, m: (
            (m - predictions.mean(0)).square() + predictions.var(0) / len(predictions)
        ),
    },
)
OWN_VARIANCE = Exercise(
    _own,
    _nested,
    {
        "this is the variance over all students: what they have from different teachers is in it.": lambda students: students.flatten(
            0, 1
        ).var(0),
        "this is the variance of the teachers' means, not that of students of one teacher.": lambda students: students.mean(1).var(0),
        "it divides by M; from a sample it is M - 1.": lambda students: students.var(1, correction=0).mean(0),
        "these are standard deviations: variances are averaged, not their roots.": lambda students: students.std(1).mean(0),
    },
)
INHERITED_VARIANCE = Exercise(
    lambda students: _pairwise_variance(students.mean(1)) - _own(students) / students.shape[1],
    _nested,
    {
        "the students' own variance is still in it: a mean over M of them varies by chance.": lambda students: students.mean(1).var(0),
        "you take off all of the students' own variance; a mean over M of them has the M-th part.": lambda students: (
            students.mean(1).var(0) - students.var(1).mean(0)
        ),
        "you clip at zero. An estimate that is right on average must be negative at times.": lambda students: (
            students.mean(1).var(0) - students.var(1).mean(0) / students.shape[1]
        ).clamp_min(0),
    },
)


def _colour_images(generator: torch.Generator) -> tuple[object, ...]:
    return tuple(torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64) for _ in range(2))


def _error_and_mask(generator: torch.Generator) -> tuple[object, ...]:
    error = torch.rand(3, 4, 4, generator=generator, dtype=torch.float64)
    # Each image has another area, and neither none nor all of it.
    area = torch.arange(16).view(1, 4, 4).expand(3, 4, 4) < torch.tensor([3, 6, 11])[:, None, None]
    return error, area.double()


def _two_maps(generator: torch.Generator) -> tuple[object, ...]:
    first, second = torch.randn(2, 12, generator=generator, dtype=torch.float64)
    return first.exp(), (first + second).exp()  # of one order to some degree, and far from a straight line


def _ranks(values: Tensor) -> Tensor:
    return (values[:, None] > values[None]).sum(1).double()


def _pearson(a: Tensor, b: Tensor) -> Tensor:
    return torch.corrcoef(torch.stack([a, b]))[0, 1]


SPATIAL_ERROR = Exercise(
    lambda guess, x0: torch.einsum("nchw,nchw->nhw", guess - x0, guess - x0) / guess.shape[1],
    _colour_images,
    {
        "this adds up the channels: take their mean.": lambda guess, x0: (guess - x0).square().sum(1),
        "the square is missing: errors up and down would cancel.": lambda guess, x0: (x0 - guess).mean(1),
        "this is the absolute error: it is the square that splits into bias and variance.": lambda guess, x0: (guess - x0).abs().mean(1),
        "the mean over the channels comes first in yours: their errors would cancel.": lambda guess, x0: (guess - x0).mean(1).square(),
    },
)
ERROR_SHARE = Exercise(
    lambda error, mask: torch.einsum("nhw,nhw->n", error, mask) / error.mean((1, 2)) / mask.sum((1, 2)),
    _error_and_mask,
    {
        "this is the share of the error. A mask of half the image holds half of it by chance: divide by the share of the area.": (
            lambda error, mask: (error * mask).sum((1, 2)) / error.sum((1, 2))
        ),
        "this compares inside with outside; compare with the image.": lambda error, mask: (
            ((error * mask).sum((1, 2)) / mask.sum((1, 2))) / ((error * (1 - mask)).sum((1, 2)) / (1 - mask).sum((1, 2)))
        ),
        "the ratio is upside down.": lambda error, mask: mask.mean((1, 2)) * error.sum((1, 2)) / (error * mask).sum((1, 2)),
    },
)
RANK_CORRELATION = Exercise(
    lambda a, b: 1 - 6 * (_ranks(a) - _ranks(b)).square().sum() / (len(a) * (len(a) ** 2 - 1)),
    _two_maps,
    {
        "this correlates the values, not their ranks.": lambda a, b: _pearson(a, b),
        "argsort says which pixel comes at each place, not the place of each pixel: apply it twice.": lambda a, b: _pearson(
            a.argsort().double(), b.argsort().double()
        ),
        "one of the two is ranked downwards: the sign is wrong.": lambda a, b: -_pearson(_ranks(a), _ranks(b)),
    },
)


def _scores(generator: torch.Generator, count: int) -> tuple[object, ...]:
    return tuple(0.2 + 3 * torch.rand(5, generator=generator, dtype=torch.float64) for _ in range(count))


RATIO_OVER_SEEDS = Exercise(
    lambda method, baseline: (method.prod() / baseline.prod()) ** (1 / len(method)),
    lambda generator: _scores(generator, 2),
    {
        "this is the mean of the ratios. A ratio of 2 and one of 1/2 should cancel: average their logarithms.": lambda method, baseline: (
            method / baseline
        ).mean(),
        "this is the ratio of the means: the seed with the largest score decides it.": lambda method, baseline: (
            method.mean() / baseline.mean()
        ),
        "the ratio is upside down: below 1 should mean that the method is better.": lambda method, baseline: (
            (baseline / method).log().mean().exp()
        ),
        "this is still a logarithm.": lambda method, baseline: (method / baseline).log().mean(),
    },
)
GAP_CLOSED = Exercise(
    lambda student, improved, teacher: 1 + (teacher - improved) / (student - teacher),
    lambda generator: _scores(generator, 3),
    {
        "this is the share of the student's score that is gone; ask for the share of its distance to the teacher.": (
            lambda student, improved, teacher: 1 - improved / student
        ),
        "this is what is left of the gap.": lambda student, improved, teacher: (improved - teacher) / (student - teacher),
        "the sign is wrong: a better student should close a positive share.": lambda student, improved, teacher: (
            (improved - student) / (student - teacher)
        ),
    },
)


def _three_sets(generator: torch.Generator) -> tuple[object, ...]:
    return tuple(torch.randn(count, 6, generator=generator, dtype=torch.float64) for count in (4, 9, 7))


def _nearest(samples: Tensor, others: Tensor) -> Tensor:
    return torch.stack([(others - one).square().sum(1).sqrt().amin() for one in samples])


COPYING = Exercise(
    lambda samples, training, held_out: _nearest(samples, training) / _nearest(samples, held_out),
    _three_sets,
    {
        "the ratio is upside down: a copy of a training image should have 0.": lambda samples, training, held_out: (
            _nearest(samples, held_out) / _nearest(samples, training)
        ),
        "these distances are still squared.": lambda samples, training, held_out: (
            _nearest(samples, training) / _nearest(samples, held_out)
        ).square(),
        "this is the mean distance to all. Ask for the nearest: a copy is close to one image only.": lambda samples, training, held_out: (
            torch.cdist(samples, training).mean(1) / torch.cdist(samples, held_out).mean(1)
        ),
    },
)
LEAST_ATTENDED = Exercise(
    lambda attention, threshold: (attention[None] < attention[:, None]).sum(1).lt((attention > threshold).sum()).double(),
    # An odd number of positions, so that the mask and its complement never have the same area; the last of them is always
    # attended to and the first never, so that neither is empty.
    lambda generator: (
        torch.cat([torch.tensor([0.5]), -torch.rand(9, generator=generator, dtype=torch.float64).log(), torch.tensor([1.5])]),
        1.0,
    ),
    {
        "this is everything that is not attended to: its area is another one, and a larger blur does more. Match the area.": (
            lambda attention, threshold: (attention <= threshold).double()
        ),
        "these are the positions attended to most, the mask itself.": lambda attention, threshold: (attention > threshold).double(),
        "these are the smallest values themselves. Return a mask of zeros and ones.": lambda attention, threshold: torch.where(
            attention <= attention.sort().values[int((attention > threshold).sum()) - 1], attention, 0.0
        ),
    },
)
COMMON_SHARE = Exercise(
    lambda differences: (
        (differences.sum(0).square() - differences.square().sum(0)).sum() / (len(differences) - 1) / differences.square().sum()
    ),
    lambda generator: (
        0.5 + torch.rand(6, generator=generator, dtype=torch.float64) + torch.randn(4, 6, generator=generator, dtype=torch.float64),
    ),
    {
        "the squared mean still holds a part of chance: take the variance over trainings, divided by their number, off it.": (
            lambda differences: differences.mean(0).square().sum() / differences.square().mean(0).sum()
        ),
        "this is the share that each training has of its own.": lambda differences: (
            differences.var(0).sum() / differences.square().mean(0).sum()
        ),
        "the variance needs K - 1 in its denominator.": lambda differences: (
            (differences.mean(0).square() - differences.var(0, correction=0) / len(differences)).sum() / differences.square().mean(0).sum()
        ),
    },
)
STEPS_FOR_THE_PRICE = Exercise(
    lambda pair, plain: torch.div(pair, plain, rounding_mode="floor"),
    lambda generator: (
        1 + 4 * torch.rand(6, generator=generator, dtype=torch.float64),
        0.2 + 0.6 * torch.rand(6, generator=generator, dtype=torch.float64),
    ),
    {
        "you round up: that many steps cost more than the pair does.": lambda pair, plain: (pair / plain).ceil(),
        "you round to the nearest: where that is up, the plain student costs more than the pair.": lambda pair, plain: (
            pair / plain
        ).round(),
        "a part of a step cannot be taken: round down.": lambda pair, plain: pair / plain,
        "the ratio is upside down.": lambda pair, plain: plain / pair,
    },
)


def check_root_mean_square(function: Function) -> None:
    """``root_mean_square(a, b)``: two batches of images (N, C, H, W) to how far they differ, a tensor without axes."""
    print(ROOT_MEAN_SQUARE.verdict(function))


def check_to_pixels(function: Function) -> None:
    """``to_pixels(images)``: images in [-1, 1] (N, C, H, W), with some values beyond, to gray values from 0 to 255."""
    print(TO_PIXELS.verdict(function))


def check_add_noise(function: Function) -> None:
    """``add_noise(x0, eps, phi)``: images (B, ...), noise of the same shape and an angle, to the noised images."""
    print(ADD_NOISE.verdict(function))


def check_x0_from_v(function: Function) -> None:
    """``x0_from_v(x, v, phi)``: noised images, their velocity and the angle, to the images."""
    print(X0_FROM_V.verdict(function))


def check_ddim_step(function: Function) -> None:
    """``ddim_step(x, v, phi, psi)``: one deterministic step from the angle phi down to psi."""
    print(DDIM_STEP.verdict(function))


def check_angle_of_alpha_bar(function: Function) -> None:
    """``angle_of_alpha_bar(alpha_bar)``: DDPM's cumulative products (K,) to angles (K,)."""
    print(ANGLE_OF_ALPHA_BAR.verdict(function))


def check_pd_target(function: Function) -> None:
    """``pd_target(x, x_psi, phi, psi)``: where the student stands and where the teacher landed, to the velocity that leads there."""
    print(PD_TARGET.verdict(function))


def check_truncated_snr(function: Function) -> None:
    """``truncated_snr(phi)``: angles (B,) to weights (B,)."""
    print(TRUNCATED_SNR.verdict(function))


def check_consistency_target(function: Function) -> None:
    """``consistency_target(x, teacher_v, f, phi, psi)``: what the student f should say at (x, phi)."""
    print(CONSISTENCY_TARGET.verdict(function))


def check_pseudo_huber(function: Function) -> None:
    """``pseudo_huber(d, c)``: differences (B, ...) and a constant to distances (B,)."""
    print(PSEUDO_HUBER.verdict(function))


def check_attention_received(function: Function) -> None:
    """``attention_received(weights)``: softmax weights (heads, queries, keys) to the attention that each key receives (keys,)."""
    print(ATTENTION_RECEIVED.verdict(function))


def check_blend(function: Function) -> None:
    """``blend(x0, blurred, mask)``: the guess, its blur and a mask of zeros and ones to the image that is blurred where masked."""
    print(BLEND.verdict(function))


def check_guided_x0(function: Function) -> None:
    """``guided_x0(x0, x0_from_blurred, w)``: the teacher's two guesses and a weight, 0 for none, to the guided guess."""
    print(GUIDED_X0.verdict(function))


def check_gradient_from_shift(function: Function) -> None:
    """``gradient_from_shift(h, phi)``: the shift of the velocity (B, ...) and an angle to the gradient of log p(z | x)."""
    print(GRADIENT_FROM_SHIFT.verdict(function))


def check_modulate(function: Function) -> None:
    """``modulate(n, t_s, t_b, z_s, z_b)``: activations (B, C, H, W), scales and shifts (B, C), to activations."""
    print(MODULATE.verdict(function))


def check_heun_velocity(function: Function) -> None:
    """``heun_velocity(v1, v2, x_mid, delta)``: two velocities (B, ...), the place of the second, and the step's length."""
    print(HEUN_VELOCITY.verdict(function))


def check_angles_of_a_walk(function: Function) -> None:
    """``angles_of_a_walk(steps)``: a number of steps to angles (steps + 1,)."""
    print(ANGLES_OF_A_WALK.verdict(function))


def check_velocity(function: Function) -> None:
    """``velocity(x0, eps, phi)``: images (B, ...), noise and an angle, to the derivative of the noised image by the angle."""
    print(VELOCITY.verdict(function))


def check_moving_average(function: Function) -> None:
    """``moving_average(average, weights, decay)``: the average so far and new weights to the new average."""
    print(MOVING_AVERAGE.verdict(function))


def check_unbiased_squared_bias(function: Function) -> None:
    """``unbiased_squared_bias(predictions, m)``: K trainings' predictions (K, points) and the truth to an estimate (points,)."""
    print(UNBIASED_SQUARED_BIAS.verdict(function))


def check_own_variance(function: Function) -> None:
    """``own_variance(students)``: predictions (K, M, points) of M students of each of K teachers to an estimate (points,)."""
    print(OWN_VARIANCE.verdict(function))


def check_inherited_variance(function: Function) -> None:
    """``inherited_variance(students)``: predictions (K, M, points) of M students of each of K teachers to an estimate (points,)."""
    print(INHERITED_VARIANCE.verdict(function))


def check_spatial_error(function: Function) -> None:
    """``spatial_error(guess, x0)``: two batches of images (N, C, H, W) to maps (N, H, W)."""
    print(SPATIAL_ERROR.verdict(function))


def check_error_share(function: Function) -> None:
    """``error_share(error, mask)``: error maps and masks of zeros and ones (N, H, W) to a number an image (N,)."""
    print(ERROR_SHARE.verdict(function))


def check_rank_correlation(function: Function) -> None:
    """``rank_correlation(a, b)``: two maps as vectors (pixels,) without ties to a correlation, a tensor without axes."""
    print(RANK_CORRELATION.verdict(function))


def check_ratio_over_seeds(function: Function) -> None:
    """``ratio_over_seeds(method, baseline)``: two methods' scores (seeds,), lower is better, to a ratio, a tensor without axes."""
    print(RATIO_OVER_SEEDS.verdict(function))


def check_gap_closed(function: Function) -> None:
    """``gap_closed(student, improved, teacher)``: three scores to the share of the gap to the teacher that is closed."""
    print(GAP_CLOSED.verdict(function))


def check_copying(function: Function) -> None:
    """``copying(samples, training, held_out)``: three sets of features (N, d), (T, d), (H, d) to a ratio for each sample (N,)."""
    print(COPYING.verdict(function))


def check_steps_for_the_price(function: Function) -> None:
    """``steps_for_the_price(pair, plain)``: FLOPs of the pair's one step and of a plain one (N,) to whole numbers of steps (N,)."""
    print(STEPS_FOR_THE_PRICE.verdict(function))


def check_least_attended(function: Function) -> None:
    """``least_attended(attention, threshold)``: attention (positions,) and a number to a control mask (positions,) of zeros and ones."""
    print(LEAST_ATTENDED.verdict(function))


def check_common_share(function: Function) -> None:
    """``common_share(differences)``: students less teachers, (trainings, pixels), to a share, a tensor without axes."""
    print(COMMON_SHARE.verdict(function))
