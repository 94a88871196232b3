"""Data sets of one's own, and the paper's: a folder of images, CIFAR-10's binary archive, ImageNet 64x64's npz files. No pickle is read.

``data.load_images`` is the way in; here is how the files are read.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import os
import shutil
import struct
import tarfile
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from sferd_lab.config import NOT_A_LITERAL
from sferd_lab.data import resize
from sferd_lab.errors import SferdError
from sferd_lab.files import load_tensors, read_json, replacing, save_tensors, sha256, write_json

# Pillow's own name for each, and no other of its readers: the one for EPS starts a program, whatever the file is called.
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF")
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

IMAGENET_FILES = {"train": [f"train_data_batch_{number}.npz" for number in range(1, 11)], "val": ["val_data.npz"]}
IMAGENET_IMAGES = {"train": 1_281_167, "val": 50_000}
IMAGENET_SIDE, IMAGENET_CLASSES = 64, 1000
# Images taken from an archive at a time: 3 MB as bytes, 13 MB as the floats that are averaged.
IMAGENET_CHUNK = 256
INTEGERS = ("int64", "int32", "int16", "uint64", "uint32", "uint16")
IMAGENET_REMEDY = (
    "To get ImageNet 64x64: log in at image-net.org, accept its terms, take the npz version of the downsampled images (64x64), and put "
    "train_data_batch_1.npz to train_data_batch_10.npz and val_data.npz into data/imagenet64/. The version of pickles is not read"
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
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise SferdError(f"{path} has {image.width}x{image.height} pixels; allowed: {MAX_PIXELS} in all")
            pixels = np.asarray(square(image.convert("L" if grey else "RGB"), size))
    except SferdError:
        raise
    except Exception as error:  # whatever a decoder meets in a damaged file: struct, zlib, index and type errors among them
        raise SferdError(f"{path} cannot be read as an image ({error}); allowed: whole files of {', '.join(SUFFIXES)}") from None
    return torch.from_numpy(pixels.copy()).reshape(size, size, -1).permute(2, 0, 1)


def read_folder(folder: Path | str, size: int) -> tuple[dict[str, tuple[Tensor, Tensor | None]], int]:
    """The images in ``folder`` by part, uint8 (N, C, size, size) with labels, and the number of classes (0 without labels).

    Subfolders are classes, in the order of their names; images right in the folder have no label. Each image is cropped and averaged as
    ``square`` says; grey if all files are. Which part a file belongs to follows from its name alone (a fifth features, a fifth
    reference, the rest train), so more files change nothing for the others; so does a part's order, which mixes the classes. Raises
    SferdError where images lie both in the folder and in subfolders, or a part would be empty.
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

    def place(path: Path) -> int:
        # The name's own bytes, which need not be text.
        return int.from_bytes(hashlib.sha256(os.fsencode(path.relative_to(folder).as_posix())).digest()[:8], "big")

    for path in sorted(files, key=place):
        part = FIFTHS[place(path) % 5]
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
        with Image.open(path, formats=FORMATS) as image:
            return image.mode in ("1", "L", "LA", "I;16")
    except Exception:
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
        # The six files, their headers, and 1 MiB for the two small ones beside them.
        most = 6 * images * CIFAR_RECORD + (1 << 20)
        with gzip.open(archive) as packed, tarfile.open(fileobj=io.BytesIO(_at_most(packed, most)), mode="r:") as tar:
            for part, files in names.items():
                records = torch.cat([_cifar_file(tar, f"cifar-10-batches-bin/{name}", archive, images) for name in files])
                parts[part] = (records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0].long())
    except SferdError:
        raise
    # A header may hold anything: numbers that are none, text in no encoding, one header within another.
    except (tarfile.TarError, zlib.error, OSError, EOFError, ValueError, RecursionError, LookupError, OverflowError) as error:
        raise SferdError(f"{archive} is no whole tar.gz archive ({error}). {CIFAR_REMEDY}") from None
    return parts


def _at_most(stream: IO[bytes], size: int) -> bytes:
    """What ``stream`` holds. Raises SferdError beyond ``size`` bytes, of which one more is unpacked."""
    content = stream.read(size + 1)
    if len(content) > size:
        raise SferdError(f"the archive unpacks to more than {size} bytes; expected CIFAR-10 as it was published. {CIFAR_REMEDY}")
    return content


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


def read_imagenet(folder: Path, size: int) -> dict[str, tuple[Path, Tensor]]:
    """ImageNet 64x64 (Chrabaszcz et al. 2017): "train" and "val", each a .npy file of uint8 (N, 3, size, size) and labels (N,), 0 to 999.

    The first call for a ``size``, a divisor of 64, makes the files in ``folder/cache-<size>`` from the eleven npz files in ``folder``, in
    archive order: 16.4 GB at 64, 4.1 GB at 32, 1.0 GB at 16, and minutes. Averages are rounded to whole grey levels, ties to the even
    one, which keeps the mean. No more than 64 MiB is held on the way. ``made.json`` is written last and marks the cache as whole: an
    interrupted call starts again. It names size and time of change of each archive; a change of either makes the cache anew. Not a
    SHA-256, since the question is asked whenever a run starts, and 12 GB take a minute to hash; damage within an archive is
    found by the zip format's own CRC. Archives may be deleted once the cache is there. Raises SferdError, naming file and remedy, for
    archives that are missing, damaged, pickled or of another format, for another number of images, and for too little disk.
    """
    cache = folder / f"cache-{size}"
    labels = _imagenet_cache(folder, cache)
    if labels is None:
        labels = _make_imagenet_cache(folder, cache, size)
    return {part: (cache / f"{part}.npy", labels[part]) for part in IMAGENET_FILES}


def _imagenet_cache(folder: Path, cache: Path) -> dict[str, Tensor] | None:
    """The labels in a cache that is whole and made from the archives as they are; None where it has to be made."""
    try:
        made = read_json(cache / "made.json")
        shapes = {part: list(np.lib.format.open_memmap(cache / f"{part}.npy", mode="r").shape) for part in IMAGENET_FILES}
        labels, _ = load_tensors(cache / "labels.safetensors")
        # Archives that are no longer there are taken as unchanged.
        current = made["archives"] == {**made["archives"], **_states(folder)} and made["shapes"] == shapes
        current = current and {part: [len(found), *shapes[part][1:]] for part, found in labels.items()} == shapes
    except (OSError, ValueError, LookupError, TypeError):  # SferdError among them
        return None
    return labels if current else None


def _states(folder: Path) -> dict[str, list[int]]:
    """Bytes and time of change, in nanoseconds, of the archives that are there."""
    paths = [folder / name for names in IMAGENET_FILES.values() for name in names]
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in paths if path.is_file()}


def _make_imagenet_cache(folder: Path, cache: Path, size: int) -> dict[str, Tensor]:
    # Before the images are read, so that a change in the meantime is noticed the next time.
    states = _states(folder)
    # All labels and the beginning of every file first: what is wrong is said before minutes of work.
    labels = {part: torch.cat([_imagenet_labels(folder / name) for name in names]) for part, names in IMAGENET_FILES.items()}
    for part, found in labels.items():
        if len(found) != IMAGENET_IMAGES[part]:
            raise SferdError(f"{folder}: {len(found)} images for {part}; expected {IMAGENET_IMAGES[part]}. {IMAGENET_REMEDY}")
    shapes = {part: (len(found), 3, size, size) for part, found in labels.items()}
    needed, free = sum(map(math.prod, shapes.values())), shutil.disk_usage(folder).free
    if free < needed:
        raise SferdError(f"{cache} takes {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB of its disk are free; allowed: as much or more")
    (cache / "made.json").unlink(missing_ok=True)  # what is replaced from here on is no longer what it says
    with tqdm(total=sum(map(len, labels.values())), desc=f"ImageNet to {size}x{size}", unit="images", leave=False) as bar:
        for part, names in IMAGENET_FILES.items():
            with replacing(cache / f"{part}.npy") as temporary, temporary.open("wb") as file:
                header = {"descr": "|u1", "fortran_order": False, "shape": shapes[part]}
                np.lib.format.write_array_header_1_0(file, header)
                for path in (folder / name for name in names):
                    for images in _imagenet_images(path, None):
                        pixels = resize(images.float(), size).round().to(torch.uint8) if size < IMAGENET_SIDE else images
                        file.write(pixels.numpy())
                        bar.update(len(images))
    save_tensors(cache / "labels.safetensors", labels, {"kind": "ImageNet labels"})
    write_json(cache / "made.json", {"archives": states, "shapes": shapes})
    return labels


def _imagenet_labels(path: Path) -> Tensor:
    """An archive's labels, 0 to 999, once its images are seen to be as many and of the right format."""
    labels = np.concatenate(list(_npz_rows(path, "labels", (None,), INTEGERS)))
    low, high = int(labels.min()), int(labels.max())
    if low < 1 or high > IMAGENET_CLASSES:
        raise SferdError(f"labels in {path} run from {low} to {high}; expected 1 to {IMAGENET_CLASSES}. {IMAGENET_REMEDY}")
    next(_imagenet_images(path, len(labels)))
    return torch.from_numpy(labels.astype(np.int64)) - 1


def _imagenet_images(path: Path, count: int | None) -> Iterator[Tensor]:
    """An archive's images as uint8 (n, 3, 64, 64), n of at most ``IMAGENET_CHUNK``; ``count`` in all, unless None."""
    for rows in _npz_rows(path, "data", (count, 3 * IMAGENET_SIDE**2), ("uint8",)):
        yield torch.from_numpy(rows).reshape(-1, 3, IMAGENET_SIDE, IMAGENET_SIDE)


def _npz_rows(path: Path, name: str, shape: tuple[int | None, ...], dtypes: tuple[str, ...]) -> Iterator[np.ndarray]:
    """The array ``name`` of an npz file, ``IMAGENET_CHUNK`` rows at a time: never more of it in memory, and no pickle.

    Raises SferdError unless it has ``shape`` (None: any length up to that of the training set), one of ``dtypes``, this machine's
    byte order, C order, and as many bytes as its header announces; and for a damaged file.
    """

    def bad(found: str, expected: str) -> SferdError:
        return SferdError(f"{name} in {path} {found}; expected {expected}. {IMAGENET_REMEDY}")

    if not path.is_file():
        raise SferdError(f"{path} is missing. {IMAGENET_REMEDY}")
    try:
        with zipfile.ZipFile(path) as archive:
            if f"{name}.npy" not in (members := archive.namelist()):
                raise SferdError(f"{path} holds {', '.join(sorted(members)[:5])}; expected data.npy and labels.npy. {IMAGENET_REMEDY}")
            if archive.getinfo(f"{name}.npy").compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise bad("is packed in another way than numpy's", "it stored or deflated, which are unpacked a piece at a time")
            with archive.open(f"{name}.npy") as stream:
                found, column_order, dtype = _npy_header(stream, bad)
                length = math.prod(found) * dtype.itemsize
                if dtype.hasobject:
                    raise bad("holds Python objects, which are pickles", "numbers: a pickle is never read")
                if dtype.name not in dtypes:
                    raise bad(f"is {dtype.name}", " or ".join(dtypes))
                if not dtype.isnative:
                    raise bad(f"is {dtype.str}, of the other byte order", f"{dtype.newbyteorder('=').str}, this machine's")
                if len(found) != len(shape) or any(want not in (None, got) for want, got in zip(shape, found, strict=True)):
                    raise bad(f"has shape {found}", f"({', '.join('N' if want is None else str(want) for want in shape)},)")
                if not 1 <= found[0] <= IMAGENET_IMAGES["train"]:
                    raise bad(f"has {found[0]} rows", f"1 to {IMAGENET_IMAGES['train']}")
                if column_order:
                    raise bad("is stored column by column (Fortran order)", "row by row (C order)")
                if (held := archive.getinfo(f"{name}.npy").file_size - stream.tell()) != length:
                    raise bad(f"has {held} bytes behind its header", f"{length}, as the header says")
                for first in range(0, found[0], IMAGENET_CHUNK):
                    rows = min(IMAGENET_CHUNK, found[0] - first)
                    values = bytearray(stream.read(size := rows * length // found[0]))
                    if len(values) < size:
                        raise EOFError(f"{name} ends after {first} rows")
                    yield np.frombuffer(values, dtype).reshape(rows, *found[1:])
    # What zipfile raises for a file that is no zip archive, cut short, altered, encrypted or packed in a way it does not know.
    except SferdError:
        raise
    except (zipfile.BadZipFile, zlib.error, struct.error, OSError, EOFError, RuntimeError, ValueError, OverflowError) as error:
        raise SferdError(f"{path} is no whole npz archive ({error}). {IMAGENET_REMEDY}") from None


def _npy_header(stream: IO[bytes], bad: Callable[[str, str], SferdError]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether in Fortran order, and dtype, from the beginning of a .npy file. No object is made but literals."""
    try:
        # Version 1.0 alone, which numpy writes for numbers: the header of a later one may be 4 GB long.
        if (version := np.lib.format.read_magic(stream)) != (1, 0):
            raise ValueError(f"version {version[0]}.{version[1]}")
        return np.lib.format.read_array_header_1_0(stream)
    except (KeyError, tokenize.TokenError, *NOT_A_LITERAL) as error:
        raise bad(f"is no .npy file ({error})", "one of version 1.0") from None
