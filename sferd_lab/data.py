"""Data sets as tensors, and Gaussian mixtures whose denoiser is known exactly.

Every data set comes in three disjoint parts, so that no number is measured on what it was fitted to: ``features`` trains the
classifier whose features the metrics use, ``train`` trains teachers and students, ``reference`` is what samples are compared with.
Images are float32 (N, C, H, W) in [-1, 1], in memory or, where they are too many for it, on disk (``StoredImages``).
"""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from http.client import HTTPException
from pathlib import Path
from typing import IO, BinaryIO
from urllib.request import (
    HTTPDefaultErrorHandler,
    HTTPErrorProcessor,
    HTTPRedirectHandler,
    HTTPSHandler,
    OpenerDirector,
    ProxyHandler,
    UnknownHandler,
)

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sferd_lab.errors import SferdError
from sferd_lab.files import project_folder, replacing

# The sides that each data set comes in, its native one first.
SIZES = {
    "digits": (8, 4),
    "fashion-mnist": (28, 32, 16, 14, 8, 7),
    "patches": (32, 16, 8, 4),
    "mixture": (8, 4, 16),
    "cifar10": (32, 16, 8),
    "imagenet64": (64, 32, 16),
}

# SHA-256 of the decompressed files: the same images packed again by a distributor still pass.
FASHION_SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
FASHION_URL = "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/b2617bb6d3ffa2e429640350f613e3291e10b141/data/fashion"
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
REMEDY = (
    "To get Fashion-MNIST: delete any bad copy and load it again with a network connection, or install Debian's dataset-fashion-mnist, "
    "or put the four IDX files of github.com/zalandoresearch/fashion-mnist into data/fashion-mnist/"
)
# Above the largest file of the data set (47 MB unpacked, 26 MB packed) and far below what would fill a memory.
MAX_BYTES = 1 << 26


def https_opener() -> OpenerDirector:
    """An opener that can speak HTTPS and nothing else: what redirects to another protocol is an error."""
    opener = OpenerDirector()
    for handler in (ProxyHandler, HTTPSHandler, HTTPRedirectHandler, HTTPErrorProcessor, HTTPDefaultErrorHandler, UnknownHandler):
        opener.add_handler(handler())
    return opener


def urlopen(url: str, timeout: float) -> IO[bytes]:
    """What lies at ``url``, as ``https_opener`` opens it. Raises OSError."""
    return https_opener().open(url, timeout=timeout)


class StoredImages:
    """Images (N, C, H, W) that stay on disk as bytes; what is asked for is read, and given as float32 in [-1, 1], byte / 127.5 - 1.

    It stands where a tensor of images does, as far as it goes: an int, a slice, a tensor of rows or a mask over the images as an index;
    ``split``, ``len``, ``shape``, ``dtype``, ``ndim``, ``device``. ``path`` is a .npy file of uint8 (M, C, H, W), which is mapped into
    memory; ``rows`` (N,) int64 are those of its images that are meant, all by default. Raises SferdError for another file, for rows that
    it does not have, and for an index of another kind.
    """

    dtype, ndim, device = torch.float32, 4, torch.device("cpu")

    def __init__(self, path: Path | str, rows: Tensor | None = None) -> None:
        try:
            self._pixels = np.lib.format.open_memmap(path, mode="r")
        except (OSError, ValueError) as error:
            raise SferdError(f"{path} cannot be mapped ({error}); allowed: a whole .npy file of images") from None
        if self._pixels.dtype != np.uint8 or self._pixels.ndim != 4:
            raise SferdError(f"{path} holds {self._pixels.dtype} {self._pixels.shape}; allowed: uint8 (N, C, H, W)")
        self.path, self.rows = path, torch.arange(len(self._pixels)) if rows is None else rows
        if len(self.rows) and not 0 <= self.rows.min() <= self.rows.max() < len(self._pixels):
            raise SferdError(f"rows {int(self.rows.min())} to {int(self.rows.max())} of {path}; allowed: 0 to {len(self._pixels) - 1}")

    @property
    def shape(self) -> torch.Size:
        """(N, C, H, W)."""
        return torch.Size((len(self.rows), *self._pixels.shape[1:]))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | slice | Tensor) -> Tensor:
        if not isinstance(index, int | slice | Tensor):
            raise SferdError(f"images on disk at {index!r}; allowed: an int, a slice, a tensor of rows or a mask")
        return torch.from_numpy(self._pixels[self.rows[index].numpy()]).float() / 127.5 - 1

    def split(self, size: int) -> Iterator[Tensor]:
        """The images in order, ``size`` at a time; the last part may be smaller."""
        return (self[first : first + size] for first in range(0, len(self), size))

    def select(self, index: slice | Tensor) -> StoredImages:
        """The images at ``index``, on disk as well: nothing is read."""
        return StoredImages(self.path, self.rows[index])


@dataclass(frozen=True, eq=False)
class Split:
    """One part of a data set: images (N, C, H, W) float32 in [-1, 1] and labels (N,) int64, or None."""

    images: Tensor | StoredImages
    labels: Tensor | None


@dataclass(frozen=True, eq=False)
class ImageData:
    """A data set in its three parts. ``classes`` is 0 when there are no labels.

    Raises SferdError when an image tensor fails ``check_images``, the parts differ in shape, or a label is not in 0..classes - 1.
    """

    name: str
    features: Split
    train: Split
    reference: Split
    classes: int

    def __post_init__(self) -> None:
        for part in ("features", "train", "reference"):
            split: Split = getattr(self, part)
            what = f"{self.name}, {part}"
            check_images(split.images, what)
            if split.images.shape[1:] != self.train.images.shape[1:]:
                raise SferdError(f"{what}: images are {tuple(split.images.shape[1:])}; expected {self.shape} as in train")
            _check_labels(split.labels, len(split.images), self.classes, what)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width


def bootstrap(split: Split, seed: int) -> Split:
    """As many images (and their labels) drawn from ``split`` with replacement: the training set that another sample would have given.

    Of images on disk only the choice is drawn: they stay there.
    """
    index = torch.randint(len(split.images), (len(split.images),), generator=torch.Generator().manual_seed(seed))
    images = split.images.select(index) if isinstance(split.images, StoredImages) else split.images[index]
    return Split(images, None if split.labels is None else split.labels[index])


def check_images(images: Tensor | StoredImages, what: str) -> None:
    """Raise SferdError, naming ``what``, unless ``images`` is a float32 tensor (N, C, H, W), not empty, finite, within [-1, 1].

    Images on disk are not read: a byte cannot leave the range.
    """
    if not isinstance(images, Tensor | StoredImages):
        raise SferdError(f"{what}: images are a {type(images).__name__}; expected a torch.Tensor")
    if images.ndim != 4 or 0 in images.shape:
        raise SferdError(f"{what}: images have shape {tuple(images.shape)}; expected (N, C, H, W), none of them 0")
    if images.dtype != torch.float32:
        raise SferdError(f"{what}: images are {images.dtype}; expected torch.float32 in [-1, 1]")
    if isinstance(images, StoredImages):
        return
    low, high = (value.item() for value in images.aminmax())
    # Written so that NaN, which aminmax passes on, is refused too.
    if not (low >= -1 and high <= 1):
        raise SferdError(f"{what}: pixel values run from {low:.6g} to {high:.6g}; expected finite values in [-1, 1]")


def _check_labels(labels: Tensor | None, count: int, classes: int, what: str) -> None:
    if (labels is None) != (classes == 0):
        raise SferdError(f"{what}: classes = {classes} but labels are {'missing' if labels is None else 'given'}; allowed: both or neither")
    if labels is None:
        return
    if labels.dtype != torch.int64 or labels.shape != (count,):
        raise SferdError(f"{what}: labels are {labels.dtype} {tuple(labels.shape)}; expected torch.int64 ({count},)")
    low, high = (value.item() for value in labels.aminmax())
    if low < 0 or high >= classes:
        raise SferdError(f"{what}: labels run from {low} to {high}; expected 0 to {classes - 1}")


def resize(images: Tensor, size: int) -> Tensor:
    """Square images (N, C, H, H) of a floating dtype, area averaged to (N, C, size, size).

    Every new pixel is the mean of the block of old pixels that it covers. Blocks do not overlap, hence ``size`` must divide H; such a box
    filter cannot alias at a block's scale, keeps the image's mean, and never leaves the input's range. Raises SferdError otherwise.
    """
    height, width = images.shape[-2:]
    if height != width or size < 1 or height % size:
        raise SferdError(f"images of {height}x{width} cannot be averaged to size = {size}; allowed: square images, size a divisor of H")
    return images if size == height else F.avg_pool2d(images, height // size)


def _to_images(pixels: Tensor, top: int, size: int) -> Tensor:
    """Whole numbers 0..top (N, C, H, H) to float32 in [-1, 1]; averaged before scaling, where block sums are exact."""
    return resize(pixels.float(), size) / (top / 2) - 1


def load_images(name: str, size: int | None = None, folder: Path | str | None = None) -> ImageData:
    """One of the data sets in ``SIZES``, at a side of ``size`` pixels (None: native); always the same for the same arguments.

    The name "folder" stands for the images in ``folder``, at any ``size``, which must be given (``archives.read_folder``).

    - "digits", 8x8 grey, 10 classes: scikit-learn's 1,797 handwritten digits (Alpaydin & Kaynak 1998), values 0..16. A fixed permutation
      (seed 0) gives 450 features, 847 train, 500 reference. No two of the 1,797 images are the same.
    - "fashion-mnist", 28x28 grey, 10 classes (Xiao et al. 2017): train is the first 50,000 training images, features the last 10,000,
      reference the 10,000 test images; no image is in two of them. 14 and 7 are averages of the 28x28 image; 32, 16 and 8 of the
      image padded with 2 black pixels on each side, so that a U-Net can halve it. Read from ``fashion_folder()``, else Debian's
      package, else downloaded.
    - "patches", 32x32 colour, 2 classes: scikit-learn's two sample photographs (china 0, flower 1), a patch every 8 pixels. The parts
      are interleaved bands of columns that share no pixel: 1,400 features, 2,800 train, 1,400 reference, each in a
      fixed random order. Patches of one part overlap, so they are far fewer independent images than their number says.
    - "mixture", 8x8 grey, 10 classes: draws (seed 1) from ``image_mixture(size)``, whose exact denoiser is known: 2,000 features, 10,000
      train, 5,000 reference; the label is the component. Clipped to [-1, 1], at least 5 standard deviations from any component's mean:
      about one pixel in ten million is touched, far below what any metric here can see.
    - "cifar10", 32x32 colour, 10 classes (Krizhevsky 2009): train is the first 40,000 training images, features the last 10,000, reference
      the 10,000 test images. Read from ``data/cifar10/cifar-10-binary.tar.gz``, which is not downloaded by itself.
    - "imagenet64", 64x64 colour, 1,000 classes (Chrabaszcz et al. 2017): every 13th of the 1,281,167 training images is in features
      (98,552, about a hundred of each class), the others are train, and reference is the 50,000 validation images. Not the last 100,000,
      since an order by class would then leave features with few classes. All three are ``StoredImages``: they stay on disk. Read from
      the eleven npz files in ``data/imagenet64/``, which are not downloaded by themselves, and are turned once for each size into files
      of 16.4 GB (4.1 GB at 32, 1.0 GB at 16) beside them, where averages are rounded to whole grey levels (``archives.read_imagenet``).

    A size other than the native one is an area average (``resize``), save for the mixture, and is added to the name: "fashion-mnist-16".
    Raises SferdError for an unknown name or size, and for files that are missing, altered or cannot be had.
    """
    if (name == "folder") != (folder is not None):
        raise SferdError(f"data set {name!r} with the folder {folder}; allowed: a folder with the name 'folder', and no other")
    if name == "folder":
        return _own_folder(Path(folder), size)
    if name not in SIZES:
        raise SferdError(f"data set {name!r} is unknown; allowed: {', '.join(SIZES)}, folder")
    size = SIZES[name][0] if size is None else size
    if size not in SIZES[name]:
        raise SferdError(f"size = {size} for data set '{name}'; allowed: {', '.join(map(str, sorted(SIZES[name])))}")
    features, train, reference, classes = _LOADERS[name](size)
    return ImageData(name if size == SIZES[name][0] else f"{name}-{size}", features, train, reference, classes)


_Parts = tuple[Split, Split, Split, int]


def _digits(size: int) -> _Parts:
    # scikit-learn takes a second to import, which other data sets should not pay for.
    from sklearn.datasets import load_digits

    digits = load_digits()
    # The legacy generator, since NumPy promises never to change its stream: the split outlives upgrades.
    order = torch.from_numpy(np.random.RandomState(0).permutation(len(digits.images)))
    images = _to_images(torch.from_numpy(digits.images)[order, None], 16, size)
    labels = torch.from_numpy(digits.target)[order].long()
    features, train, reference = map(Split, images.split([450, 847, 500]), labels.split([450, 847, 500]))
    return features, train, reference, 10


def _patches(size: int) -> _Parts:
    from sklearn.datasets import load_sample_images

    photographs = [torch.tensor(image).permute(2, 0, 1) for image in load_sample_images().images]

    def part(bands: tuple[int, ...]) -> Split:
        images, labels = [], []
        for label, photograph in enumerate(photographs):
            for band in bands:
                # Interleaved bands rather than three large regions, so that the parts see the same mix of sky, roofs and petals.
                windows = photograph[:, :, 80 * band : 80 * (band + 1)].unfold(1, 32, 8).unfold(2, 32, 8)
                images.append(windows.permute(1, 2, 0, 3, 4).flatten(0, 1))
                labels.append(torch.full((len(images[-1]),), label))
        # In a fixed random order, so that any first few are of both photographs and neighbours do not overlap.
        order = torch.from_numpy(np.random.RandomState(0).permutation(sum(map(len, images))))
        return Split(_to_images(torch.cat(images)[order], 255, size), torch.cat(labels)[order])

    return part((1, 5)), part((0, 2, 4, 6)), part((3, 7)), 2


def _fashion(size: int) -> _Parts:
    def pixels(kind: str) -> Tensor:
        images = _fashion_file(f"{kind}-images-idx3-ubyte")[:, None]
        return F.pad(images, (2, 2, 2, 2)) if 32 % size == 0 else images

    train, train_labels = pixels("train"), _fashion_file("train-labels-idx1-ubyte").long()
    test, test_labels = pixels("t10k"), _fashion_file("t10k-labels-idx1-ubyte").long()
    return (
        Split(_to_images(train[50_000:], 255, size), train_labels[50_000:]),
        Split(_to_images(train[:50_000], 255, size), train_labels[:50_000]),
        Split(_to_images(test, 255, size), test_labels),
        10,
    )


def _cifar10(size: int) -> _Parts:
    from sferd_lab.archives import read_cifar10

    parts = read_cifar10(project_folder() / "data" / "cifar10" / "cifar-10-binary.tar.gz")
    (train, train_labels), (test, test_labels) = parts["train"], parts["test"]
    return (
        Split(_to_images(train[40_000:], 255, size), train_labels[40_000:]),
        Split(_to_images(train[:40_000], 255, size), train_labels[:40_000]),
        Split(_to_images(test, 255, size), test_labels),
        10,
    )


def _imagenet64(size: int) -> _Parts:
    from sferd_lab.archives import IMAGENET_CLASSES, read_imagenet

    parts = read_imagenet(project_folder() / "data" / "imagenet64", size)
    (train, train_labels), (validation, reference_labels) = parts["train"], parts["val"]
    held_out = torch.arange(len(train_labels)) % 13 == 0

    def part(chosen: Tensor) -> Split:
        return Split(StoredImages(train, chosen.nonzero()[:, 0]), train_labels[chosen])

    return part(held_out), part(~held_out), Split(StoredImages(validation), reference_labels), IMAGENET_CLASSES


def _own_folder(folder: Path, size: int | None) -> ImageData:
    from sferd_lab.archives import read_folder

    if size is None or not 4 <= size <= 512:
        raise SferdError(f"image_size = {size} for a folder of images; allowed: 4 to 512")
    parts, classes = read_folder(folder, size)
    splits = {part: Split(_to_images(images, 255, size), labels) for part, (images, labels) in parts.items()}
    return ImageData(f"folder-{folder.resolve().name}-{size}", **splits, classes=classes)


def fashion_folder() -> Path:
    """Where Fashion-MNIST is kept: ``data/fashion-mnist`` in a clone, else in the current folder."""
    return project_folder() / "data" / "fashion-mnist"


def _fashion_file(name: str) -> Tensor:
    """One of the four files as uint8, its content checked: a copy on disk first, else a download that is kept."""
    for folder in (fashion_folder(), DEBIAN_FOLDER):
        for path in (folder / f"{name}.gz", folder / name):
            if path.is_file():
                values = read_idx(path)
                _check_content(values, FASHION_SHA256[name], path)
                return values
    target, url = fashion_folder() / f"{name}.gz", f"{FASHION_URL}/{name}.gz"
    try:
        with urlopen(url, timeout=60) as response:
            packed = response.read(MAX_BYTES)
    except (OSError, HTTPException) as error:
        raise SferdError(f"{target} is missing, and {url} could not be downloaded: {error}. {REMEDY}") from None
    # Checked in memory, so that a bad download never reaches the disk.
    values = _parse_idx(io.BytesIO(packed), url)
    _check_content(values, FASHION_SHA256[name], url)
    with replacing(target) as temporary:
        temporary.write_bytes(packed)
    return values


def read_idx(path: Path | str) -> Tensor:
    """The unsigned bytes in an IDX file, plain or gzipped, as a uint8 tensor of the shape its header states.

    The format (LeCun's MNIST): two zero bytes, type code 0x08 (unsigned byte), the number of dimensions, each dimension as a
    big-endian 32-bit number, then the values. Never unpacks more than 64 MiB, nor more than the header announces.
    Raises SferdError, naming the file, what was expected and the remedy, when it is missing, of another type, damaged, cut short
    or too long.
    """
    try:
        with Path(path).open("rb") as file:
            return _parse_idx(file, path)
    except OSError as error:
        raise SferdError(f"{path}: cannot be read ({error.strerror}); expected an IDX file. {REMEDY}") from None


def _parse_idx(file: BinaryIO, source: Path | str) -> Tensor:
    def bad(found: str, expected: str) -> SferdError:
        return SferdError(f"{source}: {found}; expected {expected}. {REMEDY}")

    packed = file.read(2) == b"\x1f\x8b"
    file.seek(0)
    stream = gzip.GzipFile(fileobj=file) if packed else file
    try:
        magic = stream.read(4)
        if len(magic) < 4 or magic[:3] != b"\x00\x00\x08" or not 1 <= magic[3] <= 4:
            raise bad(f"starts with the bytes '{magic.hex(' ')}'", "an IDX file of unsigned bytes: '00 00 08' and 1 to 4 dimensions")
        sizes = stream.read(4 * magic[3])
        if len(sizes) < 4 * magic[3]:
            raise bad("ends inside its header", f"{magic[3]} dimensions of 4 bytes each")
        shape = struct.unpack(f">{magic[3]}I", sizes)
        length = math.prod(shape)
        if not 1 <= length <= MAX_BYTES:
            raise bad(f"its header announces {' x '.join(map(str, shape))} values", f"1 to {MAX_BYTES}")
        # One byte more than announced: it shows what follows, and makes gzip reach the end and check its CRC.
        values = stream.read(length + 1)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise bad(f"is not a whole gzip file ({error})", "an IDX file, plain or gzipped") from None
    if len(values) != length:
        raise bad(f"holds {'more than ' if len(values) > length else ''}{min(len(values), length)} values", f"{length}, as its header says")
    return torch.frombuffer(bytearray(values), dtype=torch.uint8).reshape(shape)


def _check_content(values: Tensor, expected: str, source: Path | str) -> None:
    """Compare with the SHA-256 of the unpacked file, whose strict header is a function of the shape."""
    digest = hashlib.sha256(struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape))
    digest.update(values.numpy())
    if digest.hexdigest() != expected:
        raise SferdError(f"{source}: the unpacked content has SHA-256 {digest.hexdigest()}; expected {expected}. {REMEDY}")


@dataclass(frozen=True, eq=False)
class Mixture:
    """A Gaussian mixture over points of ``shape`` (D,) or images (C, H, W), with D = prod(shape).

    weights (K,) positive with sum 1; means (K, D); covariance (K, D, D), full, or (K, D), the diagonal. All float32 or all float64,
    which is kept. Raises SferdError when sizes or dtypes disagree, a value is not finite, the weights are not as above, or a
    covariance is not symmetric and positive semi-definite (up to rounding); the message gives the smallest eigenvalue.
    """

    weights: Tensor
    means: Tensor
    covariance: Tensor
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        k, d = self.weights.numel(), math.prod(self.shape)
        if k < 1 or d < 1:
            raise SferdError(f"mixture over {self.shape} of {k} components; expected 1 component or more, and points of 1 number or more")
        tensors = (self.weights, self.means, self.covariance)
        dtype = self.weights.dtype
        if self.weights.shape != (k,) or self.means.shape != (k, d) or self.covariance.shape not in ((k, d), (k, d, d)):
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
            expected = f"(K,), (K, {d}), and (K, {d}) or (K, {d}, {d})"
            raise SferdError(f"mixture over {self.shape}: weights, means, covariance have shapes {shapes}; expected {expected}")
        if dtype not in (torch.float32, torch.float64) or any(tensor.dtype != dtype for tensor in tensors):
            raise SferdError(f"mixture: dtypes are {[tensor.dtype for tensor in tensors]}; expected all float32 or all float64")
        if not all(bool(tensor.isfinite().all()) for tensor in tensors):
            raise SferdError("mixture: weights, means or covariance hold NaN or infinity; expected finite values")
        total = self.weights.sum().item()
        if bool((self.weights <= 0).any()) or abs(total - 1) > 1e-6:
            raise SferdError(f"mixture: weights are {self.weights.tolist()} with sum {total:.6g}; expected positive weights with sum 1")
        # What rounding alone can do to a symmetric matrix and to its eigenvalues.
        slack = 10 * d * torch.finfo(dtype).eps * self.covariance.abs().max().item()
        if self.covariance.ndim == 3 and (asymmetry := (self.covariance - self.covariance.mT).abs().max().item()) > slack:
            raise SferdError(f"mixture: a covariance differs from its transpose by {asymmetry:.6g}; expected symmetric matrices")
        values = self.covariance if self.covariance.ndim == 2 else torch.linalg.eigvalsh(self.covariance)
        if (smallest := values.min().item()) < -slack:
            raise SferdError(f"mixture: the smallest eigenvalue of a covariance is {smallest:.6g}; expected 0 or more")

    @cached_property
    def _root(self) -> Tensor:
        """The symmetric square root of each covariance: unlike Cholesky's factor, it exists for a singular one."""
        if self.covariance.ndim == 2:
            return self.covariance.clamp(min=0).sqrt()
        values, vectors = torch.linalg.eigh(self.covariance)
        return vectors * values.clamp(min=0).sqrt()[:, None] @ vectors.mT

    def sample(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """``n`` draws: points (n, *shape) and the component (n,) int64 that each came from. Raises SferdError when n < 1."""
        if n < 1:
            raise SferdError(f"n = {n} draws; allowed: 1 or more")
        component = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        points = torch.randn(n, self.means.shape[1], generator=generator, dtype=self.means.dtype, device=self.means.device)
        # Component by component: gathering a D x D matrix for each draw would need gigabytes.
        for k, (mean, root) in enumerate(zip(self.means, self._root, strict=True)):
            chosen = component == k
            points[chosen] = mean + (points[chosen] @ root if root.ndim == 2 else points[chosen] * root)
        return points.reshape(n, *self.shape), component


def two_dimensional_mixture(name: str = "ring", std: float = 0.1) -> Mixture:
    """A float64 mixture in the plane, about [-1, 1] wide, for pictures one can check by eye.

    "ring": 8 equal round components on the unit circle. "grid": 9 on {-1, 0, 1}^2. "two": unequal weights 0.3 and 0.7 at (-0.8, 0) and
    (0.8, 0), with full covariances tilted by +45 and -45 degrees whose long axis is 3 ``std``. ``std`` is the standard deviation of a
    round component. Raises SferdError for another name or std <= 0.
    """
    if not (std > 0 and math.isfinite(std)):
        raise SferdError(f"std = {std}; allowed: finite and above 0")
    if name == "two":
        tilt = torch.tensor([[[5.0, 4.0], [4.0, 5.0]], [[5.0, -4.0], [-4.0, 5.0]]], dtype=torch.float64)  # eigenvalues 9 and 1
        means = torch.tensor([[-0.8, 0.0], [0.8, 0.0]], dtype=torch.float64)
        return Mixture(torch.tensor([0.3, 0.7], dtype=torch.float64), means, std**2 * tilt, (2,))
    if name == "ring":
        angles = torch.arange(8, dtype=torch.float64) * (math.pi / 4)
        means = torch.stack([angles.cos(), angles.sin()], dim=1)
    elif name == "grid":
        side = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
        means = torch.cartesian_prod(side, side)
    else:
        raise SferdError(f"two-dimensional mixture {name!r} is unknown; allowed: ring, grid, two")
    return Mixture(torch.full((len(means),), 1 / len(means), dtype=torch.float64), means, torch.full_like(means, std**2), (2,))


def image_mixture(size: int = 8, components: int = 10, seed: int = 0) -> Mixture:
    """A float64 mixture of grey images (1, size, size) with spatial structure, drawn from a generator of its own with ``seed``.

    Each mean is a soft blob or bar, -0.5 (ground) to 0.5. Each covariance is 0.01 (0.9 F F^T + 0.1 I): F (D, 6) mixes smooth cosines
    (up to one wave across the image) and has rows of norm 1, so within a component every pixel has a standard deviation of exactly
    0.1 and a mean that lies 5 of them inside [-1, 1]. The same seed is the same scene at every size. Raises SferdError unless size is
    4 to 16 and components >= 1.
    """
    if not 4 <= size <= 16 or components < 1:
        raise SferdError(f"size = {size}, components = {components}; allowed: size 4 to 16, components 1 or more")
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(components, 1, generator=generator, dtype=torch.float64)

    axis = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    dy, dx, angle = y.flatten() - uniform(0.25, 0.75), x.flatten() - uniform(0.25, 0.75), uniform(0, math.pi)
    along, across = dx * angle.cos() + dy * angle.sin(), dy * angle.cos() - dx * angle.sin()
    means = torch.exp(-((along / uniform(0.15, 0.6)) ** 2 + (across / uniform(0.1, 0.15)) ** 2) / 2) - 0.5
    waves = torch.cos(math.pi * axis * torch.arange(3)[:, None])
    basis = torch.einsum("py,qx->yxpq", waves, waves).reshape(size * size, 9)
    factor = F.normalize(basis @ torch.randn(components, 9, 6, generator=generator, dtype=torch.float64), dim=-1)
    covariance = 0.01 * (0.9 * factor @ factor.mT + 0.1 * torch.eye(size * size, dtype=torch.float64))
    weights = uniform(1, 2)[:, 0]
    return Mixture(weights / weights.sum(), means, covariance, (1, size, size))


def _mixture(size: int) -> _Parts:
    points, component = image_mixture(size).sample(17_000, torch.Generator().manual_seed(1))
    parts = [2_000, 10_000, 5_000]
    features, train, reference = map(Split, points.float().clamp(-1, 1).split(parts), component.split(parts))
    return features, train, reference, 10


_LOADERS: dict[str, Callable[[int], _Parts]] = {"digits": _digits, "fashion-mnist": _fashion, "patches": _patches, "mixture": _mixture,
            "cifar10": _cifar10, "imagenet64": _imagenet64}  # fmt: skip
