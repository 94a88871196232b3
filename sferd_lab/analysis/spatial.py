"""Spatial fitting error: where in the image a denoiser is wrong, and whether its attention says so.

The SFERD paper's observation is that error is large where the teacher's self-attention is. Here it is a hypothesis: per image a rank
correlation between the two maps, averaged over images with a bootstrap interval, next to maps that need no attention at all, and once
more with those maps' share removed.

A map is an array (N, h, w) of float64, one an image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor

from sferd_lab.denoiser import Denoiser
from sferd_lab.diffusion import Angle
from sferd_lab.errors import SferdError
from sferd_lab.guidance import edge_energy
from sferd_lab.unet import AttentionMap

# The maps that need no attention.
CONTROLS = ("gradient energy", "local variance", "|x0|")
# Numbers in all attention maps of a pass: 256 MiB.
MAP_NUMBERS = 2**26


def _check_finite(what: str, values: Tensor | np.ndarray) -> None:
    if 0 in values.shape or not np.isfinite(values.cpu().numpy() if isinstance(values, Tensor) else values).all():
        raise SferdError(f"{what} {tuple(values.shape)} are empty or hold NaN or infinity; allowed: finite values of one image or more")


def error_map(predicted: Tensor, reference: Tensor) -> np.ndarray:
    """e = mean over channels of (reference - predicted)^2: two (N, C, H, W) to (N, H, W).

    The reference says what error it is: x0 (total), the posterior mean m (fitting error), the teacher's target (distillation error).
    """
    if predicted.shape != reference.shape or predicted.ndim != 4:
        raise SferdError(f"predicted {tuple(predicted.shape)} and reference {tuple(reference.shape)}; allowed: the same (N, C, H, W)")
    _check_finite("predicted images", predicted)
    _check_finite("reference images", reference)
    return (reference.double() - predicted.double()).square().mean(1).cpu().numpy()


@torch.inference_mode()
def attention_maps(denoiser: Denoiser, x: Tensor, phi: Angle, layers: Sequence[str] = (), **condition: Tensor) -> dict[str, np.ndarray]:
    """Attention received at each position of ``layers`` (all, when none is named), each (N, h, w) of that layer; its mean is 1.

    ``x`` (N, C, H, W), N of 1 or more. A network's maps have heads x positions^2 numbers an image and layer: as many images go through it
    at a time as keep all maps below ``MAP_NUMBERS``, and one where one has more.
    """
    wanted = layers or denoiser.attention_layers

    def one_pass(rows: slice) -> dict[str, AttentionMap]:
        told = {name: values[rows] for name, values in condition.items()}
        return denoiser(x[rows], phi[rows] if isinstance(phi, Tensor) and phi.ndim else phi, wanted, **told).attention

    numbers = sum(attention.weights.numel() for attention in one_pass(slice(1)).values())  # of one image
    count = max(1, MAP_NUMBERS // max(1, numbers))
    parts = [
        {name: attention.received().double().cpu().numpy() for name, attention in one_pass(slice(first, first + count)).items()}
        for first in range(0, len(x), count)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def to_grid(maps: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Maps (N, h, w) at another resolution (N, *size): repeated (nearest) to a finer grid, averaged over blocks to a coarser one.

    Neither invents a value between two positions. Raises SferdError unless one grid's sides are the same multiple of the other's.
    """
    if maps.ndim != 3:
        raise SferdError(f"maps of shape {maps.shape}; allowed: (N, h, w)")
    height, width = maps.shape[1:]
    if size[0] % height == 0 and size[1] * height == width * size[0]:
        return maps.repeat(size[0] // height, axis=1).repeat(size[1] // width, axis=2)
    if height % size[0] or width * size[0] != size[1] * height:
        raise SferdError(
            f"a map of {height}x{width} cannot become {size[0]}x{size[1]}; allowed: whole multiples or whole parts of its sides"
        )
    block = height // size[0]
    return maps.reshape(len(maps), size[0], block, size[1], block).mean((2, 4))


def control_maps(x0_hat: Tensor) -> dict[str, np.ndarray]:
    """Maps of a predicted image (N, C, H, W) that need no attention: its gradient energy, variance in 3x3 windows, and mean |x0|."""
    _check_finite("predicted images", x0_hat)
    images = x0_hat.double()
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    mean, square = (F.avg_pool2d(part, 3, stride=1) for part in (padded, padded.square()))
    maps = (edge_energy(images)[:, 0], (square - mean.square()).clamp_min(0).mean(1), images.abs().mean(1))
    return {name: values.cpu().numpy() for name, values in zip(CONTROLS, maps, strict=True)}


def _flat(*maps: np.ndarray) -> list[np.ndarray]:
    shape = maps[0].shape
    for values in maps:
        if values.shape != shape or values.ndim < 2 or 0 in shape or values[0].size < 3:
            raise SferdError(f"maps of shapes {[values.shape for values in maps]}; allowed: one shape (N, h, w) of 3 positions or more")
        if not np.isfinite(values).all():
            raise SferdError("a map holds NaN or infinity; allowed: finite values")
    return [values.reshape(shape[0], -1).astype(np.float64) for values in maps]


def _ranks(flat: np.ndarray) -> np.ndarray:
    """Ranks within each image, ties averaged, less their mean."""
    ranks = stats.rankdata(flat, axis=1)
    return ranks - ranks.mean(1, keepdims=True)


def _correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Pearson's, row by row, of centred rows; NaN where a row is constant."""
    norm = np.sqrt((a**2).sum(1) * (b**2).sum(1))
    return np.divide((a * b).sum(1), norm, out=np.full(len(a), np.nan), where=norm > 0)


def spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Spearman's rank correlation between two maps, within each image: (N,). NaN for an image where either map is constant."""
    return _correlation(*(_ranks(flat) for flat in _flat(a, b)))


def partial_spearman(a: np.ndarray, b: np.ndarray, given: Sequence[np.ndarray]) -> np.ndarray:
    """Spearman's correlation left between ``a`` and ``b`` once the ranks of the maps ``given`` are regressed out of both: (N,).

    NaN for an image where ``given`` leaves nothing of one of them. The regression is linear in ranks, so what follows a control along a
    curve stays: two Gaussian maps that share nothing but a correlation of 0.7 with the control keep 0.012, and smooth maps that both
    follow |x0| kept up to 0.06 in trials. A remainder this small is no evidence, however narrow its interval.
    """
    rank_a, rank_b, *others = (_ranks(flat) for flat in _flat(a, b, *given))
    if not others:
        return _correlation(rank_a, rank_b)
    design = np.stack(others, axis=2)  # (N, positions, controls)
    inverse = np.linalg.pinv(design)

    def residual(ranks: np.ndarray) -> np.ndarray:
        rest = ranks - (design @ (inverse @ ranks[..., None]))[..., 0]
        # What is zero but for rounding has no direction. Rounding leaves 1e-28 of the squares; one pair of ranks exchanged in an image of
        # 256 x 256 leaves 1e-13.
        rounding = (rest**2).sum(1, keepdims=True) < 1e-20 * (ranks**2).sum(1, keepdims=True)
        return np.where(rounding, 0, rest)

    return _correlation(residual(rank_a), residual(rank_b))


def auroc(score: np.ndarray, error: np.ndarray, top: float = 0.2) -> np.ndarray:
    """Chance that a position among the ``top`` share of an image's error has a higher ``score`` than one that is not, ties half: (N,).

    Where equal errors straddle the cut, the average over the ways to choose among them; so 0.5 for an image whose error is constant.
    """
    if not 0 < top < 1:
        raise SferdError(f"top = {top}; allowed: between 0 and 1, exclusive")
    score, error = _flat(score, error)
    count = min(max(1, round(top * error.shape[1])), error.shape[1] - 1)
    cut = np.sort(error, axis=1)[:, -count, None]
    above, tied = error > cut, error == cut
    # The area is linear in who is positive, so each of the tied may be so in part.
    positive = above + tied * (count - above.sum(1, keepdims=True)) / tied.sum(1, keepdims=True)
    ranks = stats.rankdata(score, axis=1)
    return ((ranks * positive).sum(1) - count * (count + 1) / 2) / (count * (error.shape[1] - count))


def mean_interval(values: np.ndarray, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> tuple[float, float, float, int]:
    """Mean over images, a bias-corrected accelerated bootstrap interval over images (Efron 1987), and how many have a value.

    NaN values are left out; with fewer than 3 others, or all of them equal, the interval is NaN, and with none the mean too.
    """
    if not 0 < level < 1:
        raise SferdError(f"level = {level}; allowed: between 0 and 1, exclusive")
    if np.isinf(values).any():
        raise SferdError(f"{int(np.isinf(values).sum())} of {len(values)} values are infinite; allowed: finite ones, or NaN for none")
    values = values[~np.isnan(values)]
    if len(values) < 3 or np.ptp(values) == 0:
        return float(values.mean()) if len(values) else np.nan, np.nan, np.nan, len(values)
    rng = np.random.default_rng(seed)
    found = stats.bootstrap((values,), np.mean, confidence_level=level, n_resamples=resamples, method="BCa", batch=200, rng=rng)
    return float(values.mean()), float(found.confidence_interval.low), float(found.confidence_interval.high), len(values)


def attention_test(error: np.ndarray, attention: np.ndarray, x0_hat: Tensor, level: float = 0.95, seed: int = 0) -> pd.DataFrame:
    """Does error sit where attention is? A tidy table with a mean over images and its bootstrap interval in each row.

    ``error`` (N, H, W) from ``error_map``, ``attention`` (N, h, w) of one layer, ``x0_hat`` (N, C, H, W) the prediction. Columns:
    ``resolution`` ("image": attention repeated to H x W; "layer": everything averaged to h x w, where attention competes on even terms),
    ``map``, ``statistic``, ``value``, ``low``, ``high``, ``images``: how many images have a value. Where it is 0, as for error that is
    constant in every image, the others are NaN (``mean_interval``).

    Maps: "attention", the ``CONTROLS``, "attention of another image" (what all images of a layer share, such as a bright centre) and
    "shuffled attention" (positions permuted: nothing is left). Statistics: "spearman" and "auroc" (of the top fifth of error) with the
    error; "spearman given controls", the partial correlation; "spearman less attention's", a paired difference: above 0, the map says
    more than attention.
    """
    shapes = (tuple(values.shape) for values in (error, attention, x0_hat))
    same = error.ndim == attention.ndim == x0_hat.ndim - 1 == 3 and (x0_hat.shape[0], *x0_hat.shape[2:]) == error.shape
    if not same or len(attention) != len(error) or len(error) < 2:
        raise SferdError(
            "error {}, attention {} and x0_hat {}; allowed: (N, H, W), (N, h, w) and (N, C, H, W) of one N of 2 or more".format(*shapes)
        )
    rng = np.random.default_rng(seed)
    size, grid = error.shape[1:], attention.shape[1:]
    controls = control_maps(x0_hat)
    shuffled = rng.permuted(attention.reshape(len(attention), -1), axis=1).reshape(attention.shape)
    maps = {"attention": attention, **controls, "attention of another image": np.roll(attention, 1, axis=0), "shuffled attention": shuffled}
    lines = []
    for resolution, target in (("image", size), ("layer", grid)):
        goal = to_grid(error, target)
        resized = {name: to_grid(values, target) for name, values in maps.items()}
        given = [resized[name] for name in CONTROLS]
        own = spearman(resized["attention"], goal)
        for name, values in resized.items():
            correlation = spearman(values, goal)
            found = {"spearman": correlation, "auroc": auroc(values, goal)}
            if name not in CONTROLS:
                found["spearman given controls"] = partial_spearman(values, goal, given)
            if name != "attention":
                found["spearman less attention's"] = correlation - own
            for statistic, per_image in found.items():
                lines.append((resolution, name, statistic, *mean_interval(per_image, level, seed=seed)))
    return pd.DataFrame(lines, columns=["resolution", "map", "statistic", "value", "low", "high", "images"])


def share_inside(error: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Share of each image's squared error inside ``mask`` (N, H, W) of zeros and ones, over the mask's share of the area: (N,).

    1 is what chance gives. NaN for an image whose mask is empty or that has no error.
    """
    error, mask = _flat(error, mask)
    if not np.isin(mask, (0, 1)).all():
        raise SferdError("the mask holds values other than 0 and 1; allowed: those two")
    area, total = mask.mean(1), error.sum(1)
    known = (area > 0) & (total > 0)
    return np.divide((error * mask).sum(1), total * area, out=np.full(len(error), np.nan), where=known)


def radial_power(residual: Tensor) -> pd.DataFrame:
    """Power of a signed error (N, C, H, W) by spatial frequency: columns ``frequency`` (cycles an image) and ``power``.

    The squared 2-D Fourier transform, averaged over images and channels and summed over rings of whole frequency. By Parseval's theorem
    the powers add up to the mean squared error.
    """
    if residual.ndim != 4:
        raise SferdError(f"residual {tuple(residual.shape)}; allowed: (N, C, H, W)")
    _check_finite("residuals", residual)
    height, width = residual.shape[-2:]
    power = torch.fft.fft2(residual.double(), norm="forward").abs().square().mean((0, 1)).cpu().numpy()
    radius = np.hypot(np.fft.fftfreq(height, 1 / height)[:, None], np.fft.fftfreq(width, 1 / width)[None])
    ring = np.rint(radius).astype(int)
    return pd.DataFrame({"frequency": np.arange(ring.max() + 1), "power": np.bincount(ring.ravel(), power.ravel())})


def by_pixel(maps: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """Maps averaged over images, as a tidy table with the columns map, row, column, value."""
    parts = []
    for name, values in maps.items():
        _check_finite(f"maps '{name}'", values)
        mean = values.mean(0)
        rows, columns = np.indices(mean.shape)
        parts.append(pd.DataFrame({"map": name, "row": rows.ravel(), "column": columns.ravel(), "value": mean.ravel()}))
    return pd.concat(parts, ignore_index=True)
