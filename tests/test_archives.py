"""A folder of images and CIFAR-10's archive: what is read, and what is refused in which words."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sferd_lab import archives, data
from sferd_lab.archives import read_cifar10, read_folder, read_image, square
from sferd_lab.config import make_settings
from sferd_lab.data import load_images
from sferd_lab.errors import SferdError
from sferd_lab.experiment import Run
from sferd_lab.files import sha256


def picture(seed: int, size: tuple[int, int] = (9, 7), mode: str = "RGB") -> Image.Image:
    channels = {"RGB": (3,), "L": (), "RGBA": (4,)}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, *channels), dtype=np.uint8)
    return Image.fromarray(pixels, mode)


def folder_of(path: Path, count: int = 30, classes: tuple[str, ...] = ("a", "b"), mode: str = "RGB") -> Path:
    for place in range(count):
        target = path / classes[place % len(classes)] if classes else path
        target.mkdir(parents=True, exist_ok=True)
        picture(place, mode=mode).save(target / f"{place}.png")
    return path


# A folder of images


def test_a_square_from_the_middle_is_averaged() -> None:
    pixels = (10 * np.arange(24, dtype=np.uint8)).reshape(4, 6)
    found = np.asarray(square(Image.fromarray(pixels), 2))
    middle = pixels[:, 1:5]
    wanted = middle.reshape(2, 2, 2, 2).mean((1, 3))
    assert np.abs(found - wanted).max() <= 0.5
    assert square(Image.fromarray(pixels), 8).size == (8, 8)


def test_every_image_is_in_one_part_with_its_class(tmp_path: Path) -> None:
    parts, classes = read_folder(folder_of(tmp_path / "set", 60), 7)
    assert classes == 2
    assert sum(len(images) for images, _ in parts.values()) == 60
    wanted = {read_image(path, 7, False).numpy().tobytes(): path.parent.name for path in (tmp_path / "set").rglob("*.png")}
    for images, labels in parts.values():
        assert images.dtype == torch.uint8
        assert images.shape[1:] == (3, 7, 7)
        for image, label in zip(images, labels, strict=True):
            assert wanted.pop(image.numpy().tobytes()) == "ab"[label]
    assert not wanted
    assert len(parts["train"][0]) > len(parts["reference"][0])


def test_more_files_leave_the_others_where_they_were(tmp_path: Path) -> None:
    def members(parts: dict) -> dict[bytes, str]:
        return {image.numpy().tobytes(): part for part, (images, _) in parts.items() for image in images}

    before = members(read_folder(folder_of(tmp_path / "set", 30), 7)[0])
    parts, _ = read_folder(folder_of(tmp_path / "set", 60), 7)
    after = members(parts)
    assert before.items() <= after.items()
    assert [key for key in after if key in before] == list(before)  # in the same order
    assert parts["train"][1].diff().ne(0).sum() > 5  # which mixes the classes, so that the first few are of all


def test_without_subfolders_there_are_no_labels_and_grey_stays_grey(tmp_path: Path) -> None:
    parts, classes = read_folder(folder_of(tmp_path / "grey", 30, (), "L"), 8)
    assert classes == 0
    assert all(labels is None and images.shape[1:] == (1, 8, 8) for images, labels in parts.values())
    picture(0).save(tmp_path / "grey" / "colour.png")
    assert read_folder(tmp_path / "grey", 8)[0]["train"][0].shape[1] == 3


def test_it_is_a_data_set_like_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFERD_LAB_TINY", "1")
    source = folder_of(tmp_path / "mine", 400, ("x", "y", "z"), "L")
    loaded = load_images("folder", 8, source)
    assert (loaded.name, loaded.classes, loaded.shape) == ("folder-mine-8", 3, (1, 8, 8))
    assert loaded.train.images.aminmax().min < -0.5
    options = {"data": "folder", "data_folder": str(source), "image_size": 8, "retrain": True, "sgp": False, "methods": ["cd"]}
    run = Run(make_settings(**options, run_folder=str(tmp_path / "run")), progress=False)
    for _ in run.evaluate_students():
        pass
    assert run.table().query("metric == 'fd'")["value"].notna().all()


@pytest.mark.parametrize(
    ("name", "size", "folder", "words"),
    [
        ("folder", 8, None, "data set 'folder' with the folder None; allowed: a folder with the name 'folder'"),
        ("digits", 8, "here", "data set 'digits' with the folder here; allowed"),
        ("folder", None, "here", "image_size = None for a folder of images; allowed: 4 to 512"),
        ("folder", 1000, "here", "image_size = 1000 for a folder of images; allowed: 4 to 512"),
        ("folder", 8, "nowhere", "data_folder = nowhere is no folder"),
    ],
)
def test_what_is_asked_for_must_make_sense(name: str, size: int | None, folder: str | None, words: str) -> None:
    with pytest.raises(SferdError, match=words):
        load_images(name, size, folder)


def test_folders_that_cannot_be_used_are_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SferdError, match="has 0 images, and none for the part 'features'; allowed: more images"):
        read_folder(tmp_path / "empty", 8)
    mixed = folder_of(tmp_path / "mixed")
    picture(0).save(mixed / "loose.png")
    with pytest.raises(SferdError, match=r"has images both in subfolders and beside them \(loose.png\)"):
        read_folder(mixed, 8)
    broken = folder_of(tmp_path / "broken", 30)
    whole = (broken / "a" / "0.png").read_bytes()
    for content in (whole[:40], whole[: len(whole) // 2], b"", b"no image"):
        (broken / "a" / "0.png").write_bytes(content)
        with pytest.raises(SferdError, match=r"0.png cannot be read as an image .*; allowed: whole files of .png"):
            read_folder(broken, 8)
    linked = folder_of(tmp_path / "linked", 30)
    picture(1).save(tmp_path / "secret.png")
    (linked / "a" / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(SferdError, match=r"link.png is a link to .*secret.png; allowed: files inside"):
        read_folder(linked, 8)


def test_an_image_too_large_for_the_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(0, (20, 20)).save(tmp_path / "large.png")
    monkeypatch.setattr(archives, "MAX_PIXELS", 399)
    with pytest.raises(SferdError, match="has 20x20 pixels; allowed: 399 in all"):
        read_image(tmp_path / "large.png", 8, False)


# CIFAR-10


def cifar(path: Path, images: int = 20, **changed: bytes | None) -> tuple[Path, dict[str, np.ndarray]]:
    """An archive in CIFAR-10's format with few images; ``changed`` files have other bytes, or are missing where None."""
    records = {}
    with tarfile.open(path, "w:gz") as tar:
        for place, stem in enumerate([f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]):
            rng = np.random.default_rng(place)
            values = rng.integers(0, 256, (images, 3073), dtype=np.uint8)
            values[:, 0] %= 10
            records[stem] = values
            content = changed.get(stem, values.tobytes())
            if content is not None:
                entry = tarfile.TarInfo(f"cifar-10-batches-bin/{stem}.bin")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return path, records


def test_cifars_records_are_a_label_and_three_planes(tmp_path: Path) -> None:
    archive, records = cifar(tmp_path / "cifar.tar.gz")
    parts = read_cifar10(archive, sha256(archive), 20)
    images, labels = parts["train"]
    assert images.shape == (100, 3, 32, 32)
    second = records["data_batch_2"]
    assert labels[20:40].tolist() == second[:, 0].tolist()
    assert np.array_equal(images[23, 2], second[3, 1 + 2048 :].reshape(32, 32))  # the blue plane comes last
    assert np.array_equal(parts["test"][0].flatten(1), records["test_batch"][:, 1:])


def test_cifar_is_split_as_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real number of images, with fewer pixels each."""
    count = 10_000
    values = {"train": (torch.zeros(5 * count, 3, 8, 8, dtype=torch.uint8), torch.zeros(5 * count, dtype=torch.long)),
              "test": (torch.full((count, 3, 8, 8), 255, dtype=torch.uint8), torch.ones(count, dtype=torch.long))}  # fmt: skip
    values["train"][0][4 * count :] = 128
    monkeypatch.setattr(archives, "read_cifar10", lambda _path: values)
    loaded = load_images("cifar10", 8)
    assert (loaded.name, loaded.shape, loaded.classes) == ("cifar10-8", (3, 8, 8), 10)
    assert [len(part.images) for part in (loaded.features, loaded.train, loaded.reference)] == [count, 4 * count, count]
    assert [part.images.unique().item() for part in (loaded.train, loaded.reference)] == [-1, 1]


def test_an_altered_or_damaged_archive_is_refused_in_words(tmp_path: Path) -> None:
    archive, records = cifar(tmp_path / "whole.tar.gz")
    with pytest.raises(SferdError, match=r"missing.tar.gz is missing. To get CIFAR-10: .* holds pickles and is not read"):
        read_cifar10(tmp_path / "missing.tar.gz")
    with pytest.raises(SferdError, match=f"has SHA-256 {sha256(archive)}; expected {archives.CIFAR_SHA256}"):
        read_cifar10(archive)
    short = records["data_batch_3"].tobytes()[:-1]
    wrong = records["data_batch_1"].copy()
    wrong[5, 0] = 10
    for name, changed, words in (
        ("short", {"data_batch_3": short}, f"data_batch_3.bin in .* has {len(short)} bytes; expected 20 records of 3073"),
        ("label", {"data_batch_1": wrong.tobytes()}, "data_batch_1.bin in .* has a label 10; expected 0 to 9"),
        ("none", {"test_batch": None}, "has no cifar-10-batches-bin/test_batch.bin"),
    ):
        bad, _ = cifar(tmp_path / f"{name}.tar.gz", **changed)
        with pytest.raises(SferdError, match=words):
            read_cifar10(bad, sha256(bad), 20)
    cut = tmp_path / "cut.tar.gz"
    cut.write_bytes(archive.read_bytes()[:-2000])
    with pytest.raises(SferdError, match=r"is no whole tar.gz archive"):
        read_cifar10(cut, sha256(cut), 20)


def test_a_link_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    archive, _ = cifar(tmp_path / "link.tar.gz", data_batch_1=None)
    packed = tmp_path / "evil.tar.gz"
    with tarfile.open(archive) as old, tarfile.open(packed, "w:gz") as new:
        for member in old:
            new.addfile(member, old.extractfile(member))
        entry = tarfile.TarInfo("cifar-10-batches-bin/data_batch_1.bin")
        entry.type, entry.linkname = tarfile.SYMTYPE, "../../../etc/passwd"
        new.addfile(entry)
    with pytest.raises(SferdError, match=r"data_batch_1.bin in .* has 0 bytes"):
        read_cifar10(packed, sha256(packed), 20)


def test_the_archive_is_looked_for_in_the_projects_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "project_folder", lambda: tmp_path)
    with pytest.raises(SferdError, match=r"data/cifar10/cifar-10-binary.tar.gz is missing"):
        load_images("cifar10")


# Bombs, names and formats


def test_a_file_is_opened_by_the_six_formats_readers_alone_whatever_it_is_called(tmp_path: Path) -> None:
    # Pillow's reader of EPS would start Ghostscript on it.
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    path = tmp_path / "picture.png"
    path.write_bytes(postscript)
    with Image.open(path) as opened:
        assert opened.format == "EPS"
    with pytest.raises(SferdError, match=r"picture.png cannot be read as an image .*; allowed: whole files of .png"):
        read_image(path, 8, False)
    for kind in ("PPM", "TGA", "PCX", "ICO"):
        picture(0, (16, 16)).save(path, kind)
        with pytest.raises(SferdError, match="cannot be read as an image"):
            read_image(path, 8, False)


@pytest.mark.parametrize("kind", archives.FORMATS)
def test_each_of_the_formats_is_read(tmp_path: Path, kind: str) -> None:
    picture(0, (8, 8)).save(tmp_path / "a.png", kind)
    assert read_image(tmp_path / "a.png", 8, False).shape == (3, 8, 8)


def test_a_name_that_is_no_text_is_a_name(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "set", 30, ())
    (folder / "0.png").rename(os.fsdecode(os.fsencode(folder) + b"/\xff.png"))
    assert sum(len(images) for images, _ in read_folder(folder, 7)[0].values()) == 30


def test_an_archive_that_unpacks_to_more_than_it_should_is_not_unpacked(tmp_path: Path) -> None:
    archive, _ = cifar(tmp_path / "whole.tar.gz")
    bomb = tmp_path / "bomb.tar.gz"
    with gzip.open(archive) as whole, gzip.open(bomb, "wb", compresslevel=1) as packed:
        packed.write(whole.read())
        for _ in range(64):
            packed.write(bytes(1 << 20))
    assert bomb.stat().st_size < 2**20
    tracemalloc.start()
    try:
        with pytest.raises(SferdError, match=r"unpacks to more than \d+ bytes; expected CIFAR-10 as it was published"):
            read_cifar10(bomb, sha256(bomb), 20)
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["../data_batch_1.bin", "/etc/passwd", "cifar-10-batches-bin/../../data_batch_1.bin"])
def test_names_that_lead_elsewhere_are_not_followed(tmp_path: Path, name: str) -> None:
    archive, records = cifar(tmp_path / "a.tar.gz", data_batch_1=None)
    packed = tmp_path / "inside" / "b.tar.gz"
    packed.parent.mkdir()
    with tarfile.open(archive) as old, tarfile.open(packed, "w:gz") as new:
        for member in old:
            new.addfile(member, old.extractfile(member))
        entry = tarfile.TarInfo(name)
        entry.size = 20 * 3073
        new.addfile(entry, io.BytesIO(records["data_batch_1"].tobytes()))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SferdError, match=r"has no cifar-10-batches-bin/data_batch_1.bin"):
        read_cifar10(packed, sha256(packed), 20)
    assert sorted(tmp_path.rglob("*")) == before


def npz(path: Path, packing: int, version: tuple[int, int] = (1, 0)) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, values in (("data", np.zeros((2, 12_288), np.uint8)), ("labels", np.array([1, 2]))):
            content = io.BytesIO()
            np.lib.format.write_array(content, values, version)
            archive.writestr(f"{name}.npy", content.getvalue(), packing)
    return path


def test_arrays_that_cannot_be_unpacked_a_piece_at_a_time_are_refused(tmp_path: Path) -> None:
    for packing in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        assert len(archives._imagenet_labels(npz(tmp_path / "a.npz", packing))) == 2
    for packing in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        with pytest.raises(SferdError, match=r"labels in .* is packed in another way than numpy's; expected it stored or deflated"):
            archives._imagenet_labels(npz(tmp_path / "a.npz", packing))


def test_a_header_that_may_be_gigabytes_long_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(SferdError, match=r"is no .npy file \(version 2.0\); expected one of version 1.0"):
        archives._imagenet_labels(npz(tmp_path / "a.npz", zipfile.ZIP_DEFLATED, (2, 0)))
    bomb = tmp_path / "bomb.npz"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("labels.npy", b"\x93NUMPY\x02\x00" + (1 << 26).to_bytes(4, "little") + bytes(1 << 26))
    tracemalloc.start()
    try:
        with pytest.raises(SferdError, match=r"is no .npy file"):
            archives._imagenet_labels(bomb)
        assert tracemalloc.get_traced_memory()[1] < 4 * 2**20
    finally:
        tracemalloc.stop()
