"""ImageNet 64x64 from its npz files: what is read, in how much memory, what is refused, and a whole run on images that stay on disk."""

from __future__ import annotations

import functools
import io
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sferd_lab import archives, data, experiment
from sferd_lab.analysis.ensemble import stacked_data
from sferd_lab.archives import read_imagenet
from sferd_lab.config import make_settings
from sferd_lab.data import Split, StoredImages, bootstrap, check_images, load_images
from sferd_lab.denoiser import FiniteSetDenoiser, NetworkDenoiser
from sferd_lab.distill import denoising_target
from sferd_lab.errors import SferdError
from sferd_lab.experiment import Run
from sferd_lab.files import read_json
from sferd_lab.metrics import FeatureNetwork, accuracy, extract, known_bad, train_feature_network
from sferd_lab.train import TrainSettings, draw_batch, train
from sferd_lab.unet import UNet, UNetSettings

# The last file is larger than the others, as in the real set; the scores need more than 65 reference images.
SIZES = {f"train_data_batch_{number}.npz": 20 + (number == 10) for number in range(1, 11)} | {"val_data.npz": 80}
TRAIN = 201


def arrays(name: str) -> dict[str, np.ndarray]:
    """An archive's content: random pixels and labels, and a mean that nobody reads."""
    rng = np.random.default_rng(list(SIZES).index(name))
    labels = rng.integers(1, 1001, SIZES[name])
    labels[:2] = 1, 1000
    content = {"data": rng.integers(0, 256, (SIZES[name], 12_288), dtype=np.uint8), "labels": labels}
    return content | ({} if name == "val_data.npz" else {"mean": np.zeros(12_288)})


def write_archives(folder: Path, save: Callable = np.savez) -> Path:
    folder.mkdir(parents=True)
    for name in SIZES:
        save(folder / name, **arrays(name))
    return folder


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "IMAGENET_IMAGES", {"train": TRAIN, "val": SIZES["val_data.npz"]})
    monkeypatch.setattr(archives, "IMAGENET_CHUNK", 7)  # divides none of the numbers of images


@pytest.fixture
def folder(few: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(data, "project_folder", lambda: tmp_path)
    return write_archives(tmp_path / "data" / "imagenet64")


def pixels_of(names: list[str]) -> np.ndarray:
    """By hand: the planes red, green, blue, each row by row."""
    return np.concatenate([arrays(name)["data"].reshape(-1, 3, 64, 64) for name in names])


def stored(folder: Path, pixels: np.ndarray, rows: torch.Tensor | None = None) -> StoredImages:
    np.save(folder / "stored.npy", pixels)
    return StoredImages(folder / "stored.npy", rows)


def in_memory(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels.astype(np.float32)) / 127.5 - 1


# What is read


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_the_parts_hold_every_pixel_and_label_in_archive_order(few: None, tmp_path: Path, save: Callable) -> None:
    parts = read_imagenet(write_archives(tmp_path / "set", save), 64)
    for part, names in archives.IMAGENET_FILES.items():
        path, labels = parts[part]
        assert np.array_equal(np.load(path), pixels_of(names))
        assert labels.dtype == torch.int64
        assert labels.tolist() == [label - 1 for name in names for label in arrays(name)["labels"]]


@pytest.mark.parametrize("size", [32, 16])
def test_smaller_images_are_averages_in_whole_grey_levels(folder: Path, size: int) -> None:
    block, pixels = 64 // size, pixels_of(["val_data.npz"])
    means = pixels.reshape(-1, 3, size, block, size, block).mean((3, 5))
    found = np.load(read_imagenet(folder, size)["val"][0])
    assert np.array_equal(found, np.rint(means))
    # A tie goes up as often as down. A quarter of the averages of 2x2 are ties: rounded up always, they would add 1/8 of a grey level.
    # Rounding is uniform within 1/2, so the mean of n has a standard deviation of 0.29 / sqrt(n); 5 of them.
    assert abs(found.mean() - means.mean()) < 5 * 0.29 / means.size**0.5


def test_the_three_parts_are_disjoint_cover_all_and_keep_their_labels(folder: Path) -> None:
    loaded = load_images("imagenet64", 16)
    assert (loaded.name, loaded.shape, loaded.classes) == ("imagenet64-16", (3, 16, 16), 1000)
    assert load_images("imagenet64").name == "imagenet64"
    train = np.load(folder / "cache-16" / "train.npy")
    labels = np.concatenate([arrays(name)["labels"] for name in archives.IMAGENET_FILES["train"]]) - 1
    held_out = np.arange(TRAIN) % 13 == 0
    for split, chosen in ((loaded.features, held_out), (loaded.train, ~held_out)):
        assert isinstance(split.images, StoredImages)
        assert torch.equal(split.images[:], in_memory(train[chosen]))
        assert split.labels.tolist() == labels[chosen].tolist()
    assert torch.equal(loaded.reference.images[:], in_memory(np.load(folder / "cache-16" / "val.npy")))


def test_the_real_numbers_of_images_make_the_stated_parts() -> None:
    held_out = torch.arange(archives.IMAGENET_IMAGES["train"]) % 13 == 0
    assert int(held_out.sum()) == 98_552
    assert f"({98_552:,}, about" in load_images.__doc__
    # 1,331,167 images of 12,288 bytes.
    assert round(sum(archives.IMAGENET_IMAGES.values()) * 12_288 / 1e9, 1) == 16.4


# The cache


def test_the_cache_is_made_once_and_again_when_an_archive_changes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = read_imagenet(folder, 16)
    made = read_json(folder / "cache-16" / "made.json")
    assert made["archives"]["val_data.npz"][0] == (folder / "val_data.npz").stat().st_size
    before = (folder / "cache-16" / "train.npy").stat().st_mtime_ns
    again = read_imagenet(folder, 16)
    assert torch.equal(again["train"][1], first["train"][1])
    assert (folder / "cache-16" / "train.npy").stat().st_mtime_ns == before
    # Other labels in as many bytes, a moment later.
    content = arrays("val_data.npz")
    content["labels"] = content["labels"][::-1]
    np.savez(folder / "val_data.npz", **content)
    os.utime(folder / "val_data.npz", ns=(0, made["archives"]["val_data.npz"][1] + 1))
    changed = read_imagenet(folder, 16)
    assert torch.equal(changed["val"][1], first["val"][1].flip(0))


def test_archives_may_be_deleted_once_the_cache_is_whole(folder: Path) -> None:
    first = read_imagenet(folder, 16)
    for name in SIZES:
        (folder / name).unlink()
    assert torch.equal(read_imagenet(folder, 16)["train"][1], first["train"][1])
    with pytest.raises(SferdError, match=r"train_data_batch_1.npz is missing. To get ImageNet 64x64"):
        read_imagenet(folder, 32)


def test_an_interrupted_conversion_is_never_taken_as_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped at the validation images, when the training images are already in their place; on a cache of other archives too."""
    rows = archives._npz_rows

    def stop(path: Path, name: str, *rest: Any) -> Any:
        for number, part in enumerate(rows(path, name, *rest)):
            if path.name == "val_data.npz" and name == "data" and number == 3:
                raise KeyboardInterrupt
            yield part

    for _ in range(2):
        monkeypatch.setattr(archives, "_npz_rows", stop)
        with pytest.raises(KeyboardInterrupt):
            read_imagenet(folder, 16)
        assert not (folder / "cache-16" / "made.json").exists()
        assert not list((folder / "cache-16").glob(".*"))
        monkeypatch.setattr(archives, "_npz_rows", rows)
        whole = read_imagenet(folder, 16)
        assert len(np.load(whole["val"][0])) == SIZES["val_data.npz"]
        os.utime(folder / "val_data.npz", ns=(0, 0))


@pytest.mark.parametrize("file", ["made.json", "train.npy", "labels.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"{}", "half"])
def test_a_damaged_cache_is_made_anew(folder: Path, file: str, content: bytes | str | None) -> None:
    first = read_imagenet(folder, 16)
    path = folder / "cache-16" / file
    whole = path.read_bytes()
    path.unlink() if content is None else path.write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    assert torch.equal(read_imagenet(folder, 16)["train"][1], first["train"][1])
    if file == "train.npy":
        assert path.read_bytes() == whole


def test_too_little_disk_is_said_before_the_work(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # (201 + 80) images of 3 x 64 x 64 bytes are 3.45 MB.
    monkeypatch.setattr(archives.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 281 * 12_288 - 1}))
    with pytest.raises(SferdError, match=r"cache-64 takes 0.00 GB and 0.00 GB of its disk are free"):
        read_imagenet(folder, 64)
    read_imagenet(folder, 32)


# What is refused


def with_arrays(**changed: Any) -> Callable[[Path], None]:
    """Write the fourth file with other arrays; None leaves one out."""

    def write(path: Path) -> None:
        content = arrays(path.name) | changed
        np.savez(path, **{name: array for name, array in content.items() if array is not None})

    return write


def with_member(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Write the fourth file with other bytes in one of its members, and a CRC to match."""

    def write(path: Path) -> None:
        with zipfile.ZipFile(path) as old:
            members = {member: old.read(member) for member in old.namelist()}
        with zipfile.ZipFile(path, "w") as new:
            for member, content in members.items():
                new.writestr(member, change(content) if member == name else content)

    return write


def with_bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(change(path.read_bytes())) and None


def flipped(content: bytes) -> bytes:
    """One bit of the last pixels' bytes changed: the zip's own check must see it."""
    last = content.rindex(arrays("train_data_batch_4.npz")["data"][-1].tobytes())
    return content[:last] + bytes([content[last] ^ 1]) + content[last + 1 :]


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


FOURTH = arrays("train_data_batch_4.npz")
OBJECTS = np.array([{"a": "pickle"}] * 20, dtype=object)


@pytest.mark.parametrize(
    ("alter", "words"),
    [
        (Path.unlink, r"is missing\."),
        (with_bytes(lambda _: b""), "is no whole npz archive"),
        (with_bytes(lambda _: b"\x80\x04\x95pickle."), "is no whole npz archive"),
        (with_bytes(lambda content: content[:-3000]), "is no whole npz archive"),
        (with_bytes(lambda content: content[:100]), "is no whole npz archive"),
        (with_arrays(labels=None), "holds data.npy, mean.npy; expected data.npy and labels.npy"),
        (with_arrays(data=None, images=FOURTH["data"]), "holds images.npy, labels.npy, mean.npy; expected data.npy"),
        (with_arrays(data=OBJECTS), "data in .* holds Python objects, which are pickles; expected numbers: a pickle is never read"),
        (with_arrays(labels=OBJECTS), "labels in .* holds Python objects"),
        (with_arrays(data=FOURTH["data"].astype(np.float32)), "data in .* is float32; expected uint8"),
        (with_arrays(data=FOURTH["data"].astype(np.int8)), "data in .* is int8; expected uint8"),
        (with_arrays(labels=FOURTH["labels"].astype(float)), "labels in .* is float64; expected int64 or int32"),
        (with_arrays(labels=FOURTH["labels"].astype(">i8")), "labels in .* is >i8, of the other byte order; expected <i8, this machine's"),
        (with_arrays(data=np.asfortranarray(FOURTH["data"])), r"is stored column by column \(Fortran order\); expected row by row"),
        (with_arrays(data=FOURTH["data"][:, :3072]), r"data in .* has shape \(20, 3072\); expected \(20, 12288,\)"),
        (with_arrays(data=FOURTH["data"].reshape(20, 3, 64, 64)), r"has shape \(20, 3, 64, 64\); expected \(20, 12288,\)"),
        (with_arrays(data=FOURTH["data"][:-1]), r"data in .* has shape \(19, 12288\); expected \(20, 12288,\)"),
        (with_arrays(labels=FOURTH["labels"][:-1]), r"data in .* has shape \(20, 12288\); expected \(19, 12288,\)"),
        (with_arrays(labels=FOURTH["labels"][:, None]), r"labels in .* has shape \(20, 1\); expected \(N,\)"),
        (with_arrays(labels=FOURTH["labels"][:0]), "labels in .* has 0 rows; expected 1 to 201"),
        (with_arrays(labels=np.ones(202, dtype=int)), "labels in .* has 202 rows; expected 1 to 201"),
        (with_arrays(labels=FOURTH["labels"] - 1), "labels in .* run from 0 to 999; expected 1 to 1000"),
        (with_arrays(labels=FOURTH["labels"] + 1), "labels in .* run from 2 to 1001; expected 1 to 1000"),
        (with_arrays(data=FOURTH["data"][:19], labels=FOURTH["labels"][:19]), "imagenet64: 200 images for train; expected 201"),
        (with_member("data.npy", lambda content: content[:-1]), "data in .* has 245759 bytes behind its header; expected 245760"),
        (with_member("data.npy", lambda content: content + b"x"), "has 245761 bytes behind its header; expected 245760"),
        (with_member("data.npy", lambda _: b"GIF89a"), "data in .* is no .npy file"),
        (with_member("labels.npy", lambda content: content.replace(b"'shape': (20,)", b"'shape': ((((,")), "labels in .* is no .npy file"),
        (with_member("labels.npy", lambda content: content[:6] + b"\x03" + content[7:]), "labels in .* is no .npy file"),
    ],
)  # fmt: skip
def test_a_bad_archive_is_refused_by_name_with_the_remedy(folder: Path, alter: Callable[[Path], None], words: str) -> None:
    alter(folder / "train_data_batch_4.npz")
    with pytest.raises(SferdError, match=words) as error:
        load_images("imagenet64", 16)
    assert "train_data_batch_4.npz" in str(error.value) or "200 images" in words
    assert str(error.value).endswith(archives.IMAGENET_REMEDY)
    assert not (folder / "cache-16").exists()  # refused before any image is written


def test_damage_beyond_the_first_images_leaves_no_cache(folder: Path) -> None:
    """What only shows while the images are read, plain (by the zip's CRC) and packed (zlib may notice first)."""
    path = folder / "train_data_batch_4.npz"
    whole = path.read_bytes()
    path.write_bytes(flipped(whole))
    with pytest.raises(SferdError, match=r"train_data_batch_4.npz is no whole npz archive .*CRC-32 for file 'data.npy'"):
        read_imagenet(folder, 16)
    np.savez_compressed(path, **arrays(path.name))
    content = bytearray(path.read_bytes())
    # Random bytes do not shrink: this lies in the last quarter of the 245,760 bytes of images, far behind the first seven.
    content[200_000] ^= 255
    path.write_bytes(content)
    with pytest.raises(SferdError, match=r"train_data_batch_4.npz is no whole npz archive"):
        read_imagenet(folder, 16)
    assert list((folder / "cache-16").iterdir()) == []


def test_bytes_changed_at_random_are_an_error_in_words_or_change_nothing(few: None, tmp_path: Path) -> None:
    path, generator = tmp_path / "train_data_batch_4.npz", np.random.default_rng(0)
    np.savez(path, data=FOURTH["data"][:1], labels=FOURTH["labels"][:1])
    whole, refused = path.read_bytes(), 0
    for _ in range(400):
        changed = bytearray(whole)
        # Near either end: headers, and the table of contents.
        changed[generator.choice([1, -1]) * generator.integers(1, 500)] = generator.integers(256)
        path.write_bytes(changed)
        try:
            labels, images = archives._imagenet_labels(path), list(archives._imagenet_images(path, 1))
        except SferdError:
            refused += 1
        else:
            assert (labels + 1).tolist() == FOURTH["labels"][:1].tolist()
            assert images[0].flatten().tolist() == FOURTH["data"][0].tolist()
    assert refused > 100


# Memory

PEAK = """
import sys
from pathlib import Path
from sferd_lab import archives

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

def convert(folder, train):
    archives.IMAGENET_IMAGES = {"train": train, "val": 1}
    archives.read_imagenet(Path(folder), 32)

convert(sys.argv[1], 10)
before = peak()
convert(sys.argv[2], 9 + 12_000)
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of the memory from Linux")
def test_a_conversion_holds_less_than_64_mib(tmp_path: Path) -> None:
    """Of a file of 147 MB, in a process that has converted a small one already."""
    for folder, most in (("small", 1), ("large", 12_000)):
        (tmp_path / folder).mkdir()
        for name in SIZES:
            count = most if name == "train_data_batch_2.npz" else 1
            np.savez_compressed(
                tmp_path / folder / name, data=np.full((count, 12_288), 9, dtype=np.uint8), labels=np.ones(count, dtype=np.int64)
            )
    script = [sys.executable, "-c", PEAK, str(tmp_path / "small"), str(tmp_path / "large")]
    done = subprocess.run(script, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 64 * 1024
    assert np.load(tmp_path / "large" / "cache-32" / "train.npy", mmap_mode="r").shape == (12_009, 3, 32, 32)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the size of the process from Linux")
def test_a_batch_reads_its_own_images_only(tmp_path: Path) -> None:
    path, count = tmp_path / "large.npy", 200_000_000 // 12_288
    np.lib.format.open_memmap(path, "w+", np.uint8, (count, 3, 64, 64)).flush()  # sparse: no block of it is on the disk

    def resident() -> int:
        return sum(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("Rss"))

    split, settings = Split(StoredImages(path), torch.zeros(count, dtype=torch.int64)), TrainSettings(1, batch_size=16)
    draw_batch(Split(stored(tmp_path, PIXELS), None), settings, 0)  # what the first batch of a process takes besides
    before = resident()
    batch = draw_batch(split, settings, 0)
    assert torch.equal(batch.x0, torch.full((16, 3, 64, 64), -1.0))
    # 16 images of 12 KiB, each with up to 64 KiB of the file that the system maps around a page; the batch takes 1.6 MB.
    assert resident() - before < 20_000


# Images on disk in the place of a tensor

PIXELS = np.random.default_rng(1).integers(0, 256, (90, 3, 16, 16), dtype=np.uint8)


INDICES = [0, -1, slice(3, 9), slice(None, None, 7), slice(40, None)]
INDICES += [torch.tensor([5, 5, 0]), torch.tensor([-1]), torch.arange(39) % 3 == 0]


@pytest.mark.parametrize("index", INDICES)
def test_an_index_gives_what_it_gives_of_a_tensor(tmp_path: Path, index: Any) -> None:
    rows = torch.arange(89, 50, -1)
    images, whole = stored(tmp_path, PIXELS, rows), in_memory(PIXELS)[rows]
    assert torch.equal(images[index], whole[index])
    assert images[index].dtype == images.dtype == whole.dtype
    assert (len(images), images.shape, images.ndim, images.device) == (len(whole), whole.shape, whole.ndim, whole.device)
    for part, wanted in zip(images.split(10), whole.split(10), strict=True):
        assert torch.equal(part, wanted)
    for part, wanted in zip(images, whole, strict=True):  # as a sequence, too, it ends
        assert torch.equal(part, wanted)
    if not isinstance(index, int):
        assert torch.equal(images.select(index)[:], whole[index])


def test_files_rows_and_indices_that_do_not_fit_are_named(tmp_path: Path) -> None:
    images = stored(tmp_path, PIXELS)
    with pytest.raises(SferdError, match=r"rows 0 to 90 of .*stored.npy; allowed: 0 to 89"):
        StoredImages(images.path, torch.arange(91))
    with pytest.raises(SferdError, match=r"rows -1 to 3 of"):
        StoredImages(images.path, torch.tensor([3, -1]))
    for index in (None, ..., (0, 1), "a"):
        with pytest.raises(SferdError, match="allowed: an int, a slice, a tensor of rows or a mask"):
            images[index]
    with pytest.raises(SferdError, match=r"missing.npy cannot be mapped .*; allowed: a whole .npy file of images"):
        StoredImages(tmp_path / "missing.npy")
    for bad in (PIXELS.astype(np.float32), PIXELS[0], OBJECTS):
        with pytest.raises(SferdError, match=r"allowed: uint8 \(N, C, H, W\)|cannot be mapped"):
            stored(tmp_path, bad)
    with pytest.raises(SferdError, match=r"mine: images have shape \(0, 3, 16, 16\)"):
        check_images(stored(tmp_path, PIXELS, torch.arange(0)), "mine")


def test_training_on_images_on_disk_gives_the_same_losses(tmp_path: Path) -> None:
    labels = torch.arange(90) % 4
    settings = TrainSettings(3, batch_size=6, null_label=4, label_dropout=0.5)

    def losses(images: torch.Tensor | StoredImages) -> list[float]:
        torch.manual_seed(0)
        model = NetworkDenoiser(UNet(UNetSettings(3, (8, 8), 1, (1,), 2, 4)))
        *_, last = train(model, denoising_target(model.phi_lo, model.phi_hi), Split(images, labels), settings)
        return last.losses.tolist()

    assert losses(stored(tmp_path, PIXELS)) == losses(in_memory(PIXELS))


def test_scores_are_those_of_the_same_images_in_memory(tmp_path: Path) -> None:
    labels = torch.arange(90) % 4
    on_disk, whole = stored(tmp_path, PIXELS), in_memory(PIXELS)
    first, second = (train_feature_network(images, labels, 4, dim=8, steps=4, batch_size=8) for images in (on_disk, whole))
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))
    network = FeatureNetwork(3, 4, dim=8)
    assert np.array_equal(extract(network, on_disk, 40), extract(network, whole, 40))
    assert accuracy(network, on_disk, labels) == accuracy(network, whole, labels)
    for (a, _), (b, _) in zip(known_bad(on_disk, labels, 20).values(), known_bad(whole, labels, 20).values(), strict=True):
        assert torch.equal(a, b)


def test_a_bootstrap_sample_of_images_on_disk_stays_there(tmp_path: Path) -> None:
    labels = torch.arange(90)
    drawn = bootstrap(Split(stored(tmp_path, PIXELS), labels), 3)
    assert isinstance(drawn.images, StoredImages)
    wanted = bootstrap(Split(in_memory(PIXELS), labels), 3)
    assert torch.equal(drawn.images[:], wanted.images)
    assert torch.equal(drawn.labels, wanted.labels)


def test_what_needs_all_images_in_memory_refuses_them_in_words(tmp_path: Path) -> None:
    images = stored(tmp_path, PIXELS)
    with pytest.raises(SferdError, match="images are StoredImages; allowed: a tensor in memory, since every image counts"):
        FiniteSetDenoiser(images)
    with pytest.raises(SferdError, match="the members' training sets are StoredImages; allowed: tensors in memory"):
        stacked_data([Split(images, None)] * 2)


def test_a_run_goes_all_the_way_on_images_on_disk(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFERD_LAB_TINY", "1")
    monkeypatch.setattr(experiment, "train_feature_network", functools.partial(train_feature_network, steps=4))
    options = {"data": "imagenet64", "image_size": 16, "class_conditional": True, "methods": ["cd"], "guided": [False], "bootstrap": 1}
    options |= {"widths": [8, 8], "attention": [1], "sampling_steps": [1], "teacher_sampling_steps": [1]}
    run = Run(make_settings(**options, run_folder=str(tmp_path / "run")), progress=False)
    assert isinstance(run.train_split.images, StoredImages)
    run.evaluate_known_bad()
    rows = [row for rows in (run.evaluate_teacher(), run.evaluate_students(), run.evaluate_semantic()) for row in rows]
    table = run.table()
    assert table.query("metric == 'fd'")["value"].notna().sum() == 3 + len(rows)  # three known bad sets
    errors = table[table["metric"].str.startswith("reconstruction_mse")]
    assert len(errors) == 8  # four origins of the code, for the teacher's pair and the student's
    assert errors["value"].between(0, 4).all()
    assert set(table["features"].dropna()) >= {"imagenet64-16-net"}
