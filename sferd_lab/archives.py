"""Data sets of one's own, and the paper's: a folder of images, and CIFAR-10's binary archive. No pickle, nothing unpacked to disk.

``data.load_images`` is the way in; here is how the files are read.
"""

from __future__ import annotations

import hashlib
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from sferd_lab.errors import SferdError
from sferd_lab.files import sha256

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
# 64 megapixels: a camera's photograph passes, a file made to fill the memory does not.
MAX_PIXELS = 1 << 26
# The parts of a folder, in fifths of a file name's hash: (features, train, reference).
FIFTHS = {0: "features", 1: "reference", 2: "train", 3: "train", 4: "train"}

CIFAR_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
CIFAR_RECORD, CIFAR_IMAGES = 3073, 10_000
CIFAR_REMEDY = (
    "To get CIFAR-10: put cifar-10-binary.tar.gz, the binary version of www.cs.toronto.edu/~kriz/cifar.html, into data/cifar10/. "
    "The Python version holds pickles and is not read"
)


def square(image: Image.Image, size: int) -> Image.Image:
    """The largest centred square of ``image``, area averaged to ``size`` x ``size`` (enlarged where it is smaller)."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.resize((size, size), Image.Resampling.BOX, box=(left, top, left + side, top + side))


def _image_files(folder: Path) -> list[Path]:
    """The folder's image files and those of its subfolders, sorted. Raises SferdError for links that lead out of it."""
    files = sorted(path for pattern in ("*", "*/*") for path in folder.glob(pattern) if path.suffix.lower() in SUFFIXES and path.is_file())
    for path in files:
        if not path.resolve().is_relative_to(folder.resolve()):
            raise SferdError(f"{path} is a link to {path.resolve()}; allowed: files inside {folder}")
    return files


def read_image(path: Path, size: int, grey: bool) -> Tensor:
    """One file as uint8 (C, size, size), C 1 if ``grey`` else 3. Raises SferdError for what is no image, or one beyond 64 megapixels."""
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise SferdError(f"{path} has {image.width}x{image.height} pixels; allowed: {MAX_PIXELS} in all")
            pixels = np.asarray(square(image.convert("L" if grey else "RGB"), size))
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise SferdError(f"{path} cannot be read as an image ({error}); allowed: whole files of {', '.join(SUFFIXES)}") from None
    return torch.from_numpy(pixels.copy()).reshape(size, size, -1).permute(2, 0, 1)


def read_folder(folder: Path | str, size: int) -> tuple[dict[str, tuple[Tensor, Tensor | None]], int]:
    """The images in ``folder`` by part, uint8 (N, C, size, size) with labels, and the number of classes (0 without labels).

    Subfolders are classes, in the order of their names; images right in the folder have no label. Each image is cropped and averaged as
    ``square`` says; grey if all files are. Which part a file belongs to follows from its name alone (a fifth features, a fifth
    reference, the rest train), so more files change nothing for the others. Raises SferdError where images lie both in the folder and in
    subfolders, or a part would be empty.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise SferdError(f"data_folder = {folder} is no folder; allowed: a folder of images, or of one folder of images a class")
    files = _image_files(folder)
    classes = sorted({path.parent.name for path in files if path.parent != folder})
    if classes and any(path.parent == folder for path in files):
        loose = next(path for path in files if path.parent == folder)
        raise SferdError(f"{folder} has images both in subfolders and beside them ({loose.name}); allowed: one or the other")
    grey = all(_is_grey(path) for path in files)
    parts: dict[str, list[tuple[Tensor, int]]] = {"features": [], "train": [], "reference": []}
    for path in files:
        name = path.relative_to(folder).as_posix()
        part = FIFTHS[int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % 5]
        parts[part].append((read_image(path, size, grey), classes.index(path.parent.name) if classes else 0))
    for part, found in parts.items():
        if not found:
            raise SferdError(f"{folder} has {len(files)} images, and none for the part '{part}'; allowed: more images (some hundreds)")
    return {
        part: (torch.stack([image for image, _ in found]), torch.tensor([label for _, label in found]) if classes else None)
        for part, found in parts.items()
    }, len(classes)


def _is_grey(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            return image.mode in ("1", "L", "LA", "I;16")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False  # ``read_image`` will say what is wrong


def read_cifar10(archive: Path, digest: str = CIFAR_SHA256, images: int = CIFAR_IMAGES) -> dict[str, tuple[Tensor, Tensor]]:
    """CIFAR-10's binary archive (Krizhevsky 2009): "train" (50,000) and "test" (10,000), images uint8 (N, 3, 32, 32) and labels.

    Six files of 10,000 records of one label byte and 3,072 pixels, channel by channel. The archive's SHA-256 must be ``digest``; its
    files are read by name, so none is written anywhere. Raises SferdError, naming file and remedy, for one that is missing or altered.
    """
    if not archive.is_file():
        raise SferdError(f"{archive} is missing. {CIFAR_REMEDY}")
    if (found := sha256(archive)) != digest:
        raise SferdError(f"{archive} has SHA-256 {found}; expected {digest}. {CIFAR_REMEDY}")
    names = {"train": [f"data_batch_{number}.bin" for number in range(1, 6)], "test": ["test_batch.bin"]}
    parts = {}
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for part, files in names.items():
                records = torch.cat([_cifar_file(tar, f"cifar-10-batches-bin/{name}", archive, images) for name in files])
                parts[part] = (records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0].long())
    except (tarfile.TarError, OSError, EOFError) as error:
        raise SferdError(f"{archive} is no whole tar.gz archive ({error}). {CIFAR_REMEDY}") from None
    return parts


def _cifar_file(tar: tarfile.TarFile, name: str, archive: Path, images: int) -> Tensor:
    try:
        member = tar.getmember(name)
    except KeyError:
        raise SferdError(f"{archive} has no {name}. {CIFAR_REMEDY}") from None
    if not member.isfile() or member.size != images * CIFAR_RECORD:
        raise SferdError(f"{name} in {archive} has {member.size} bytes; expected {images} records of {CIFAR_RECORD}. {CIFAR_REMEDY}")
    records = torch.frombuffer(bytearray(tar.extractfile(member).read()), dtype=torch.uint8).reshape(images, CIFAR_RECORD)
    if int(records[:, 0].max()) > 9:
        raise SferdError(f"{name} in {archive} has a label {int(records[:, 0].max())}; expected 0 to 9. {CIFAR_REMEDY}")
    return records
