"""Scores of generated images, on the features of a small classifier trained in this project.

A Frechet distance on such features is "FD-<network>", never "FID". Every score of a ``Scorer`` stands beside its floor: the same
metric between disjoint sets of real images, at the same numbers of images. Feature arrays are (N, dim) float64.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sferd_lab.data import StoredImages
from sferd_lab.errors import SferdError
from sferd_lab.files import load_tensors, read_record, save_tensors, sha256
from sferd_lab.rebuild import rebuild

METRICS = ("fd", "kid", "precision", "recall", "density", "coverage", "memorisation_ratio")
KIND = "feature network"
# Distances and kernels are taken a block of rows at a time; a block has about this many entries (8 MiB), which a cache may hold.
BLOCK = 2**20
# Of a feature: KID's error takes squares of cubes of products.
LARGEST = 1e20


class FeatureNetwork(nn.Module):
    """A small convolutional classifier whose penultimate activations are the features.

    Images (N, channels, H, W) in [-1, 1] with H, W >= 8; logits (N, classes); features (N, dim). No layer depends on the batch.
    Raises SferdError for channels < 1, classes < 2, dim outside 1 to 64 or width outside 4 to 256 or not a multiple of 4.
    """

    def __init__(self, channels: int, classes: int, dim: int = 64, width: int = 32) -> None:
        super().__init__()
        self.settings = {"channels": channels, "classes": classes, "dim": dim, "width": width}
        if any(type(value) is not int for value in self.settings.values()):
            raise SferdError(f"feature network settings {self.settings}; allowed: integers")
        if channels < 1 or classes < 2 or not 1 <= dim <= 64 or not 4 <= width <= 256 or width % 4:
            raise SferdError(
                f"feature network settings {self.settings}; allowed: channels >= 1, classes >= 2, dim 1 to 64, width 4 to 256 in fours"
            )
        layers: list[nn.Module] = []
        for inside, outside, stride in ((channels, width, 1), (width, 2 * width, 2), (2 * width, 2 * width, 1)):
            layers += [nn.Conv2d(inside, outside, 3, stride, padding=1), nn.GroupNorm(4, outside), nn.SiLU()]
        # 2 x 2 cells, not one: where a stroke lies tells a 6 from a 9.
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(8 * width, dim), nn.SiLU())
        self.head = nn.Linear(dim, classes)

    def features(self, images: Tensor) -> Tensor:
        """Penultimate activations, (N, dim)."""
        return self.body(images)

    def forward(self, images: Tensor) -> Tensor:
        """Logits, (N, classes)."""
        return self.head(self.features(images))


def _check_images(name: str, images: Tensor | StoredImages, real: bool) -> Tensor | StoredImages:
    """``images`` clamped to [-1, 1]; SferdError unless (N >= 2, C, H, W), floating, finite and, for real ones, inside [-1, 1].

    Images on disk come back as they are: bytes can be neither infinite nor out of range.
    """
    known = isinstance(images, Tensor | StoredImages)
    if not known or not images.dtype.is_floating_point or images.ndim != 4 or min(images.shape[2:]) < 8:
        got = f"{images.dtype} {tuple(images.shape)}" if known else type(images).__name__
        raise SferdError(f"{name} images: {got}; allowed: a floating-point tensor (N, C, H, W) with H, W >= 8")
    if len(images) < 2:
        raise SferdError(f"{name} images: {len(images)} of them; allowed: 2 or more")
    if isinstance(images, StoredImages):
        return images
    if not bool(images.isfinite().all()):
        raise SferdError(f"{name} images: {int((~images.isfinite()).sum())} values are not finite")
    # Real images out of range mean a wrong scale (0 to 255?), which clamping would hide.
    if real and images.abs().max() > 1 + 1e-4:
        raise SferdError(f"{name} images run from {images.min().item():.6g} to {images.max().item():.6g}; allowed: -1 to 1")
    return images.clamp(-1, 1)


def _check_features(**arrays: np.ndarray) -> None:
    """SferdError unless all are finite (N >= 2, dim) floating-point arrays of one dim, none beyond ``LARGEST``."""
    for name, array in arrays.items():
        sound = array.ndim == 2 and len(array) >= 2 and array.shape[1] > 0 and np.issubdtype(array.dtype, np.floating)
        if not sound or not (np.abs(array) <= LARGEST).all():
            raise SferdError(f"{name}: features {array.dtype} of shape {array.shape}; allowed: floating-point (N, dim), N >= 2, all finite")
    dims = {name: array.shape[1] for name, array in arrays.items()}
    if len(set(dims.values())) > 1:
        raise SferdError(f"features of different dims: {dims}; allowed: one dim for all")


def train_feature_network(
    images: Tensor | StoredImages,
    labels: Tensor,
    classes: int,
    *,
    dim: int = 64,
    seed: int = 0,
    steps: int = 400,
    batch_size: int = 64,
    lr: float = 2e-3,
) -> FeatureNetwork:
    """A ``FeatureNetwork`` trained to name the ``labels`` (N,) in 0 .. classes - 1 of ``images`` (N, C, H, W) in [-1, 1].

    AdamW, one-cycle learning rate, label smoothing 0.1, random shifts by up to an eighth of the side. On a CPU it is a function of its
    arguments alone, and leaves the global random state as it was. Train it on images that no scored model trains on and that are not
    the reference, so that training and reference images are alike to it. Raises SferdError for bad images, labels, steps or batch size.
    """
    images = _check_images("feature-training", images, real=True)
    if labels.shape != (len(images),) or labels.is_floating_point() or labels.min() < 0 or labels.max() >= classes:
        raise SferdError(f"labels: {labels.dtype} {tuple(labels.shape)}; allowed: {len(images)} integers from 0 to {classes - 1}")
    # One-cycle's warm-up is 30% of the steps less one: negative below 4.
    if steps < 4 or batch_size < 1 or not 0 < lr < math.inf:
        raise SferdError(f"steps = {steps}, batch_size = {batch_size}, lr = {lr}; allowed: steps >= 4, batch_size >= 1, lr finite above 0")
    with torch.random.fork_rng(devices=[]):
        # The CPU's generator only: torch.manual_seed would reseed every GPU too, which this fork does not undo.
        torch.default_generator.manual_seed(seed)
        network = FeatureNetwork(images.shape[1], classes, dim).to(images.device)
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(network.parameters(), lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=steps)
    height, width = images.shape[2:]
    reach = max(1, min(height, width) // 8)
    each = torch.arange(batch_size)
    for _ in range(steps):
        pick = torch.randint(len(images), (batch_size,), generator=generator)
        rows, columns = torch.randint(2 * reach + 1, (2, batch_size, 1), generator=generator)
        rows, columns = rows + torch.arange(height), columns + torch.arange(width)
        # The batch alone is padded: all images at once may not fit the memory.
        padded = F.pad(images[pick], [reach] * 4, mode="replicate")
        # The slice between the index tensors puts the channels last.
        batch = padded[each[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
        optimiser.zero_grad()
        F.cross_entropy(network(batch), labels[pick].to(images.device), label_smoothing=0.1).backward()
        optimiser.step()
        schedule.step()
    return network.requires_grad_(False)


@torch.inference_mode()
def accuracy(network: FeatureNetwork, images: Tensor | StoredImages, labels: Tensor) -> float:
    """Share of ``images`` (N, C, H, W) in [-1, 1], N >= 2, that the network gives their ``labels`` (N,). Raises SferdError for others."""
    images = _check_images("labelled", images, real=True)
    if labels.shape != (len(images),):
        raise SferdError(f"labels {tuple(labels.shape)}; allowed: ({len(images)},), one an image")
    return float(torch.cat([network(part).argmax(1) for part in images.split(1000)]).eq(labels).float().mean())


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def save_feature_network(path: Path | str, network: FeatureNetwork, info: Mapping[str, Any]) -> None:
    """Write ``network`` with its settings, a digest of its weights and the JSON-able ``info`` to one safetensors file.

    Raises SferdError, and writes nothing, for weights that are not finite: its training has diverged.
    """
    state = network.state_dict()
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise SferdError(f"the feature network's '{name}' holds NaN or infinity; allowed: finite weights, from a smaller lr")
    save_tensors(path, state, {"kind": KIND, "settings": network.settings, "weights": _digest(state), "info": dict(info)})


def load_feature_network(path: Path | str) -> tuple[FeatureNetwork, str]:
    """The network in a file of ``save_feature_network``, frozen, and the SHA-256 of the file in hexadecimal.

    Raises SferdError when the file is missing, of another kind, or its weights are not those that were saved.
    """
    state, info = load_tensors(path)
    if info.get("kind") != KIND or not isinstance(info.get("settings"), dict):
        raise SferdError(f"{path} holds {info.get('kind')!r}; expected {KIND!r} with its settings")
    # Before the digest, which is of a network's single-precision numbers.
    network = rebuild(lambda: FeatureNetwork(**info["settings"]), state, path)
    if _digest(state) != info.get("weights"):
        raise SferdError(f"{path} was altered: its weights do not have the digest that was saved with them")
    return network.requires_grad_(False), sha256(path)


@torch.no_grad()
def extract(network: FeatureNetwork, images: Tensor | StoredImages, batch_size: int = 1000) -> np.ndarray:
    """Features (N, dim), float64, of ``images`` (N, C, H, W), which are clamped to [-1, 1] first: a viewer would clamp them too.

    Raises SferdError for images that are not floating-point, finite, at least two, or of the network's channels.
    """
    images = _check_images("scored", images, real=False)
    if images.shape[1] != network.settings["channels"]:
        raise SferdError(f"scored images have {images.shape[1]} channels; allowed: the network's {network.settings['channels']}")
    parameter = next(network.parameters())
    return np.concatenate([network.features(batch.to(parameter)).double().cpu().numpy() for batch in images.split(batch_size)])


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """|mean_a - mean_b|^2 + tr(S_a + S_b - 2 (S_a^1/2 S_b S_a^1/2)^1/2) of features (N, dim) and (M, dim) (Dowson & Landau 1982).

    Biased upwards, by a constant over N: compare at one N. With S = R'R from a QR of the centred features, the last trace is the sum of the
    singular values of R_a R_b': real whatever the rank, with no root of a rounded zero. Raises SferdError when N or M <= dim.
    """
    from scipy import linalg

    _check_features(a=a, b=b)
    dim = a.shape[1]
    if min(len(a), len(b)) <= dim:
        raise SferdError(f"Frechet distance of {len(a)} and {len(b)} images on {dim} features; allowed: more than {dim} images in each")
    root_a, root_b = (linalg.qr(x - x.mean(0), mode="r")[0][:dim] / math.sqrt(len(x) - 1) for x in (a, b))
    cross = linalg.svdvals(root_a @ root_b.T).sum()
    return max(0.0, float(((a.mean(0) - b.mean(0)) ** 2).sum() + (root_a**2).sum() + (root_b**2).sum() - 2 * cross))


def _blocks(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, BLOCK // columns)
    return (slice(start, start + step) for start in range(0, rows, step))


def _kernel_sums(x: np.ndarray, y: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, float]:
    """Row sums, column sums and sum of squares of (x.y/dim + 1)^3; without ``y`` of the kernel of x with itself, less its diagonal."""
    own, y = y is None, x if y is None else y
    rows, columns, squares = np.zeros(len(x)), np.zeros(len(y)), 0.0
    for block in _blocks(len(x), len(y)):
        # Of a symmetric kernel the part from the diagonal on: what is right of its square stands for what is below too.
        first = block.start if own else 0
        kernel = x[block] @ y[first:].T
        kernel /= x.shape[1]
        kernel += 1
        kernel *= kernel * kernel  # numpy's ** 3 takes several times as long
        if own:
            square = kernel[:, : len(kernel)]
            np.fill_diagonal(square, 0)
            rows[first + len(kernel) :] += kernel[:, len(kernel) :].sum(0)
            squares += float(np.vdot(kernel, kernel) - np.vdot(square, square))
        else:
            columns += kernel.sum(0)
        rows[block] += kernel.sum(1)
        squares += float(np.vdot(kernel, kernel))
    return rows, rows if own else columns, squares


def kid(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Kernel distance and its standard error: unbiased MMD^2 with the kernel (x.y/dim + 1)^3 (Binkowski et al. 2018, section 3).

    Features (N, dim) and (M, dim), N, M >= 4. All pairs are used, a block of rows at a time; the value may be negative.
    The error is the jackknife over images, from the kernel's row sums. A jackknife counts the part of the variance that comes from
    pairs (all of it where both distributions are equal) twice (Efron & Stein 1981), so that part, taken from what the row and
    column means leave of the kernel, is counted once. What remains is kept >= 0, which leaves the error about a fifth too large
    between equal distributions. Raises SferdError for fewer than 4 images.
    """
    _check_features(a=a, b=b)
    if min(len(a), len(b)) < 4:
        raise SferdError(f"KID of {len(a)} and {len(b)} images; allowed: 4 or more in each")
    rows, columns, squares = _kernel_sums(a, b)
    count, cross = len(a) * len(b), rows.sum()
    leftover = squares - (rows**2).sum() / len(b) - (columns**2).sum() / len(a) + cross**2 / count
    value, jackknife = -2 * cross / count, 0.0
    pairs = 4 * leftover / ((len(a) - 1) * (len(b) - 1)) / count
    for x, other, sums in ((a, b, rows), (b, a, columns)):
        n = len(x)
        inner, _, squares = _kernel_sums(x)
        total = inner.sum()
        value += total / (n * (n - 1))
        # The value without image i, up to a constant.
        without = (total - 2 * inner) / ((n - 1) * (n - 2)) - 2 * (cross - sums) / ((n - 1) * len(other))
        jackknife += (n - 1) * without.var()
        # Residual of k_ij = mean + g_i + g_j over i != j, on n (n - 3) degrees of freedom.
        leftover = squares - 2 * (inner**2).sum() / (n - 2) + total**2 / ((n - 1) * (n - 2))
        pairs += 2 * leftover / (n * (n - 3)) / (n * (n - 1))
    return float(value), math.sqrt(max(0.0, jackknife - 2 * pairs) + max(0.0, pairs))


def precision_recall_density_coverage(real: np.ndarray, fake: np.ndarray, k: int = 5) -> dict[str, float]:
    """Precision and recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020) of features (N, dim), (M, dim).

    A ball reaches from an image to its k-th nearest neighbour in its own set. Precision: share of fakes in a real ball; density: number
    of real balls a fake lies in, over k; recall: share of reals in a fake's ball; coverage: share of real balls with a fake inside. All
    in [0, 1] but density, >= 0. Memory is bounded: a block of distances at a time. Raises SferdError unless 1 <= k < N, M.
    """
    from sklearn.metrics.pairwise import euclidean_distances
    from sklearn.neighbors import NearestNeighbors

    _check_features(real=real, fake=fake)
    if not 1 <= k < min(len(real), len(fake)):
        raise SferdError(f"k = {k} with {len(real)} real and {len(fake)} fake images; allowed: 1 to {min(len(real), len(fake)) - 1}")
    # kneighbors() without an argument leaves out the image itself.
    reach, fake_reach = (NearestNeighbors(n_neighbors=k, algorithm="brute").fit(x).kneighbors()[0][:, -1] for x in (real, fake))
    balls, recalled, covered = np.zeros(len(fake)), 0, 0
    for block in _blocks(len(real), len(fake)):
        distances = euclidean_distances(real[block], fake)
        inside = distances < reach[block, None]
        balls += inside.sum(0)
        covered += int(inside.any(1).sum())
        recalled += int((distances < fake_reach).any(1).sum())
    return {
        "precision": float((balls > 0).mean()),
        "recall": recalled / len(real),
        "density": float(balls.mean() / k),
        "coverage": covered / len(real),
    }


def memorisation_ratio(
    fake: np.ndarray, train: np.ndarray, reference: np.ndarray, *, seed: int = 0, resamples: int = 200
) -> tuple[float, float | None]:
    """How near generated images lie to training images, over how near to equally many held-out ones; and its standard error.

    Features (N, dim), (T, dim), (R, dim). 1: no nearer than to held-out images; below 1: nearer to the training set; 0: copies.
    Equal size: a larger reference is cut to T random images. A larger training set is shuffled into B = ceil(T/R) blocks of R images
    (the last is filled up from the first; B = 1 for T <= R), and the nearest distances to every block are pooled. A copy has its
    original in one block, so 1/B of a memoriser's pooled distances are zeros, which a median misses for B >= 2: both sides are taken
    at the quantile 1/(2B), the median for B = 1. Whatever the fakes, if they do not depend on which images were trained on, blocks and
    reference are alike and the ratio is 1 but for sampling. The error is a bootstrap over the fakes: it leaves out the choice of
    training and reference images, which the floor's spread has, and is None where fewer than two resamples have a ratio. Raises SferdError
    when the reference's quantile is 0.
    """
    from sklearn.metrics import pairwise_distances_argmin

    _check_features(fake=fake, train=train, reference=reference)
    rng = np.random.default_rng(seed)
    size = min(len(train), len(reference))
    blocks = math.ceil(len(train) / size)
    level = 1 / (2 * blocks)
    # resize starts again from the first where the images run out.
    order = np.resize(rng.permutation(len(train)), (blocks, size))
    held_out = reference[rng.permutation(len(reference))[:size]]

    def nearest(images: np.ndarray) -> np.ndarray:
        # Measured again from the index: the search's own distance of a copy is a rounded, not an exact, zero.
        return np.linalg.norm(fake - images[pairwise_distances_argmin(fake, images)], axis=1)

    to_train = np.stack([nearest(train[block]) for block in order])
    to_held_out = nearest(held_out)

    def ratio(pick: np.ndarray | slice) -> float:
        below = np.quantile(to_held_out[pick], level)
        return float(np.quantile(to_train[:, pick], level) / below) if below > 0 else math.nan

    value = ratio(slice(None))
    if math.isnan(value):
        raise SferdError(
            f"memorisation ratio: at least {level:.0%} of the {len(fake)} fake images equal a reference image; allowed: fewer. "
            "Are reference images among the generated or training images?"
        )
    resampled = np.array([ratio(rng.integers(len(fake), size=len(fake))) for _ in range(resamples)])
    return value, float(np.nanstd(resampled, ddof=1)) if np.isfinite(resampled).sum() > 1 else None


def read_floors(path: Path | str, features_sha256: str, k: int) -> dict[int, dict[str, tuple[float, float]]]:
    """The known floors on a feature network, at ``k`` neighbours, in a JSON file: by n and metric, mean and standard deviation.

    Raises SferdError for a file that holds anything else.
    """
    entries = read_record(path).get(features_sha256, [])
    try:
        known = {entry["n"]: entry["floors"] for entry in entries if entry["k"] == k}
        floors = {n: {name: (float(mean), float(spread)) for name, (mean, spread) in found.items()} for n, found in known.items()}
        sound = all(type(n) is int and all(map(_is_floor, found.values())) for n, found in floors.items())
    except (AttributeError, LookupError, OverflowError, TypeError, ValueError) as error:
        raise SferdError(f"{path} holds no floors for {features_sha256}: {error}") from None
    if not sound:
        raise SferdError(f"{path}: a floor for {features_sha256} is no finite mean with a standard deviation of 0 or more")
    return floors


def _is_floor(floor: tuple[float, float]) -> bool:
    return all(map(math.isfinite, floor)) and floor[1] >= 0


@dataclass(frozen=True)
class Score:
    """One metric of ``n`` generated images: its value, standard error (None: no sound one), and its floor on real images.

    ``floor`` and ``floor_sd``: mean and standard deviation of the metric over splits of real images. ``features`` names the network:
    a table shows the metric fd on digits-net as FD-digits-net.
    """

    metric: str
    value: float
    error: float | None
    n: int
    floor: float
    floor_sd: float
    features: str
    features_sha256: str


class Scorer:
    """Scores generated images against ``reference``, real images (R, C, H, W) in [-1, 1] that neither model nor network trained on.

    ``train`` (T, C, H, W) are the images that the scored model trained on; ``network``, ``sha256`` and ``name`` come from a feature
    network's file; ``metrics`` are those to take, of ``METRICS``. ``known_floors`` are floors computed before, by n. Raises SferdError
    for images out of range, an unknown metric, R <= the network's dim, R <= k or fewer than 2 floor splits.
    """

    def __init__(
        self,
        network: FeatureNetwork,
        sha256: str,
        name: str,
        reference: Tensor | StoredImages,
        train: Tensor | StoredImages,
        k: int = 5,
        floor_splits: int = 20,
        seed: int = 0,
        *,
        metrics: Sequence[str] = METRICS,
        known_floors: Mapping[int, Mapping[str, Sequence[float]]] | None = None,
    ) -> None:
        if unknown := [name for name in metrics if name not in METRICS]:
            raise SferdError(f"metric '{unknown[0]}'; allowed: {', '.join(METRICS)}")
        self.metrics = tuple(name for name in METRICS if name in metrics)
        if floor_splits < 2:
            raise SferdError(f"floor_splits = {floor_splits}; allowed: 2 or more, for a spread")
        self.name, self.sha256, self.k, self.floor_splits, self.seed = name, sha256, k, floor_splits, seed
        reference, train = _check_images("reference", reference, real=True), _check_images("training", train, real=True)
        self.network, self.shape = network, tuple(reference.shape[1:])
        if train.shape[1:] != reference.shape[1:]:
            raise SferdError(f"training images have shape {tuple(train.shape[1:])}; allowed: the reference's {self.shape}")
        self.reference, self.train = extract(network, reference), extract(network, train)
        least = max(k, self.reference.shape[1])
        if len(self.reference) <= least:
            raise SferdError(f"{len(self.reference)} reference images; allowed: more than {least}, the larger of k and the network's dim")
        for n, floor in (known_floors or {}).items():
            if missing := [name for name in self.metrics if name not in floor]:
                raise SferdError(f"the known floors at n = {n} have none of '{missing[0]}'; allowed: all of {', '.join(self.metrics)}")
        self._floors = {n: {name: tuple(floor[name]) for name in self.metrics} for n, floor in (known_floors or {}).items()}

    def _values(
        self, fake: np.ndarray, reference: np.ndarray, train: np.ndarray, held_out: np.ndarray
    ) -> dict[str, tuple[float, float | None]]:
        wanted, values = set(self.metrics), {}
        if "fd" in wanted:
            values["fd"] = (frechet_distance(fake, reference), None)
        if "kid" in wanted:
            values["kid"] = kid(fake, reference)
        if wanted & {"precision", "recall", "density", "coverage"}:
            four = precision_recall_density_coverage(reference, fake, self.k)
            values |= {name: (value, None) for name, value in four.items() if name in wanted}
        if "memorisation_ratio" in wanted:
            values["memorisation_ratio"] = memorisation_ratio(fake, train, held_out, seed=self.seed)
        return values

    def floors(self, n: int) -> dict[str, tuple[float, float]]:
        """Mean and standard deviation of every metric over random splits of the real images, ``n`` of them playing fakes.

        A split shuffles training and reference images together: ``n`` fakes, then R reference images. For the memorisation ratio
        what is left after the fakes is parted as T : R into a training set and held-out images, so its three sets are disjoint as well,
        if smaller than the real ones: its spread is, if anything, too wide. Splits share images, so the spread is that of choosing among
        these images. A floor at a smaller n would not be this score's floor, so n > T is an error. Computed once for each n, unless known.
        """
        sizes = {"train": len(self.train), "reference": len(self.reference)}
        if n > sizes["train"]:
            raise SferdError(
                f"no floor for n = {n} images: it takes {n} + {sizes['reference']} disjoint real images, and there are "
                f"{sizes['train']} training + {sizes['reference']} reference; allowed: n up to {sizes['train']}"
            )
        if n not in self._floors:
            rng = np.random.default_rng([self.seed, n])
            pool = np.concatenate([self.train, self.reference])
            splits = []
            for _ in range(self.floor_splits):
                order = pool[rng.permutation(len(pool))]
                rest = order[n:]
                # Rounded up: T : R must not grow, nor with it the number of blocks.
                cut = max(2, math.ceil(len(rest) * sizes["reference"] / len(pool)))
                splits.append(self._values(order[:n], rest[: sizes["reference"]], rest[cut:], rest[:cut]))
            table = {name: np.array([split[name][0] for split in splits]) for name in self.metrics}
            self._floors[n] = {name: (float(column.mean()), float(column.std(ddof=1))) for name, column in table.items()}
        return self._floors[n]

    def scores(self, fake: Tensor) -> list[Score]:
        """One ``Score`` for each of ``metrics``, in the order of ``METRICS``, of generated images (N, C, H, W), clamped to [-1, 1].

        Raises SferdError for images of another shape than the reference's or not finite, and unless max(dim, k) < N <= T.
        """
        return self.scores_of(self.features(fake))

    def features(self, fake: Tensor) -> np.ndarray:
        """The features (N, dim) of generated images (N, C, H, W), clamped to [-1, 1]. Raises SferdError as ``scores`` does."""
        fake = _check_images("generated", fake, real=False)
        if tuple(fake.shape[1:]) != self.shape:
            raise SferdError(f"generated images have shape {tuple(fake.shape[1:])}; allowed: the reference's {self.shape}")
        return extract(self.network, fake)

    def scores_of(self, fake: np.ndarray) -> list[Score]:
        """``scores`` from the generated images' features (N, dim), which several processes may have made."""
        floors = self.floors(len(fake))
        values = self._values(fake, self.reference, self.train, self.reference)
        return [Score(metric, *values[metric], len(fake), *floors[metric], self.name, self.sha256) for metric in self.metrics]


def known_bad(train: Tensor | StoredImages, labels: Tensor, n: int, seed: int = 0) -> dict[str, tuple[Tensor, str]]:
    """Sets of ``n`` bad images made from real ones, and the metric that must catch each: a check of the metrics themselves.

    ``train`` (T, C, H, W) in [-1, 1] and ``labels`` (T,). "blurred real": Gaussian blur, sigma side/12 pixels, seen by fd. "one class":
    draws with replacement from the commonest label, seen by coverage (recall would fall for the repeats alone). "copies of training
    images": as they are, seen by memorisation_ratio. Raises SferdError unless 2 <= n <= T.
    """
    from scipy.ndimage import gaussian_filter

    train = _check_images("training", train, real=True)
    if labels.shape != (len(train),) or not 2 <= n <= len(train):
        raise SferdError(f"n = {n}, labels {tuple(labels.shape)}; allowed: n from 2 to {len(train)} and a label for each training image")
    generator = torch.Generator().manual_seed(seed)
    drawn, copies = (train[torch.randperm(len(train), generator=generator)[:n]] for _ in range(2))
    same = train[labels == labels.mode().values]
    sigma = min(train.shape[2:]) / 12
    return {
        "blurred real": (torch.from_numpy(gaussian_filter(drawn.cpu().numpy(), (0, 0, sigma, sigma), mode="nearest")), "fd"),
        "one class": (same[torch.randint(len(same), (n,), generator=generator)], "coverage"),
        "copies of training images": (copies, "memorisation_ratio"),
    }


def inception_fid(fake: Tensor, real: Tensor | StoredImages) -> float:
    """FID proper (Heusel et al. 2017), by torch-fidelity's Inception network, of images (N, 1 or 3, H, W) in [-1, 1].

    Clamped, rounded to 8 bits; grey is repeated to three channels. torch-fidelity fetches and reads its own weights.
    Raises SferdError when the optional extra or its weights cannot be had.
    """
    pair = [_check_images(name, images, real=name == "real") for name, images in (("generated", fake), ("real", real))]
    if any(images.shape[1] not in (1, 3) for images in pair):
        raise SferdError(f"images of {[images.shape[1] for images in pair]} channels; allowed: 1 or 3")
    hint = "pip install sferd-lab[fid], with the torchvision that was built for your torch"
    try:
        from torch_fidelity import calculate_metrics
    # A torchvision built for another torch fails as it registers its operators, with a RuntimeError.
    except (ImportError, RuntimeError) as error:
        raise SferdError(f"FID needs torch-fidelity, which cannot be imported ({error}): {hint}") from None

    def eight_bit(images: Tensor | StoredImages) -> torch.utils.data.Subset:
        # As bytes a part at a time: as floats all images may not fit the memory.
        parts = [((part.cpu() + 1) * 127.5).round().to(torch.uint8) for part in images.split(1000)]
        # Subset is only the Dataset that torch-fidelity insists on, around a bare tensor.
        return torch.utils.data.Subset(torch.cat(parts).expand(-1, 3, -1, -1), range(len(images)))

    try:
        result = calculate_metrics(input1=eight_bit(pair[0]), input2=eight_bit(pair[1]), fid=True, cuda=fake.is_cuda, verbose=False)
    except OSError as error:
        raise SferdError(f"FID needs the Inception weights, which torch-fidelity could not get ({error}): {hint}") from None
    return float(result["frechet_inception_distance"])
