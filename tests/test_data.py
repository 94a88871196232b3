"""Data sets, the IDX reader and Gaussian mixtures."""

import email
import gzip
import hashlib
import io
import math
import struct
import threading
import urllib.request
import urllib.response
from http.server import BaseHTTPRequestHandler, HTTPServer
from urllib.request import HTTPSHandler

import numpy as np
import pytest
import sklearn.datasets
import torch

from sferd_lab import data, files
from sferd_lab.data import ImageData, Mixture, Split, check_images, image_mixture, load_images, read_idx, resize, two_dimensional_mixture
from sferd_lab.errors import SferdError

COUNTS = {
    "digits": (450, 847, 500),
    "fashion-mnist": (10_000, 50_000, 10_000),
    "patches": (1_400, 2_800, 1_400),
    "mixture": (2_000, 10_000, 5_000),
}
ALWAYS_HERE = ["digits", "patches", "mixture"]


def parts(loaded: ImageData) -> tuple[Split, Split, Split]:
    return loaded.features, loaded.train, loaded.reference


def rows(images: torch.Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


def idx_bytes(values: np.ndarray) -> bytes:
    return bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


@pytest.fixture
def no_files(monkeypatch, tmp_path):
    """No Fashion-MNIST on disk and no network; returns the empty data folder."""

    def refuse(*_args, **_kwargs):
        raise OSError("no network in tests")

    folder = tmp_path / "data" / "fashion-mnist"
    monkeypatch.setattr(data, "fashion_folder", lambda: folder)
    monkeypatch.setattr(data, "DEBIAN_FOLDER", tmp_path / "nowhere")
    monkeypatch.setattr(data, "urlopen", refuse)
    return folder


# Data sets


@pytest.mark.parametrize("name", ALWAYS_HERE)
def test_sizes_and_classes(name):
    loaded = load_images(name)
    native = data.SIZES[name][0]
    assert loaded.name == name
    assert loaded.shape == ({"patches": 3}.get(name, 1), native, native)
    assert tuple(len(split.images) for split in parts(loaded)) == COUNTS[name]
    for split in parts(loaded):
        assert split.labels.unique().tolist() == list(range(loaded.classes))


@pytest.mark.parametrize("name", ALWAYS_HERE)
def test_the_same_arguments_give_the_same_data_whatever_the_global_seed(name):
    first = load_images(name)
    torch.manual_seed(123)
    np.random.seed(123)
    for one, two in zip(parts(first), parts(load_images(name)), strict=True):
        assert torch.equal(one.images, two.images)
        assert torch.equal(one.labels, two.labels)


@pytest.mark.parametrize("name", ["digits", "mixture"])
def test_no_image_is_in_two_parts_and_none_is_there_twice(name):
    every = [row for split in parts(load_images(name)) for row in rows(split.images)]
    assert len(set(every)) == len(every) == sum(COUNTS[name])


def test_digits_are_all_of_scikit_learns_and_span_the_range():
    loaded = load_images("digits")
    images = torch.cat([split.images for split in parts(loaded)])
    original = torch.from_numpy(sklearn.datasets.load_digits().images)[:, None]
    assert rows(images) == rows((original / 8 - 1).float())
    assert (images.min(), images.max()) == (-1, 1)


def test_digits_keep_their_labels():
    known = {image.tobytes(): label for image, label in zip(*sklearn.datasets.load_digits(return_X_y=True), strict=True)}
    for split in parts(load_images("digits")):
        original = ((split.images.double() + 1) * 8).flatten(1).numpy()
        assert [known[image.tobytes()] for image in original] == split.labels.tolist()


def test_the_digits_split_is_the_published_one():
    # Results are compared across machines and years: another permutation would make them incomparable.
    labels = torch.cat([split.labels for split in parts(load_images("digits"))]).to(torch.uint8)
    assert hashlib.sha256(labels.numpy()).hexdigest()[:16] == "0f9ffd7948cafb39"


@pytest.mark.parametrize("split", ["features", "train", "reference"])
def test_digit_classes_are_balanced(split):
    # A fair draw of n from ten even classes has a count of n/10 with a standard deviation below sqrt(0.09 n); 4 of them.
    labels = getattr(load_images("digits"), split).labels
    counts, n = labels.bincount().double(), len(labels)
    assert (counts - n / 10).abs().max() < 4 * math.sqrt(0.09 * n)


def test_patches_of_different_parts_share_no_pixel(monkeypatch):
    # Photographs whose every pixel holds its own address: photograph, then row * 640 + column in base 256.
    def addressed(photograph):
        address = np.arange(427 * 640).reshape(427, 640)
        return np.stack([photograph * 128 + address // 65536, address // 256 % 256, address % 256], axis=-1).astype(np.uint8)

    bunch = sklearn.datasets.load_sample_images()
    bunch.images = [addressed(0), addressed(1)]
    monkeypatch.setattr(sklearn.datasets, "load_sample_images", lambda: bunch)
    seen = []
    for split in parts(load_images("patches")):
        channels = ((split.images.double() + 1) * 127.5).round().long()
        assert torch.equal(channels[:, 0, 0, 0] // 128, split.labels)
        # A patch is 32 x 32 neighbouring pixels, in the photograph's order.
        address = (channels[:, 0] % 128) * 65536 + channels[:, 1] * 256 + channels[:, 2]
        corner = address[:, :1, :1]
        assert torch.equal(address - corner, (torch.arange(32)[:, None] * 640 + torch.arange(32)).expand_as(address))
        used = torch.zeros(256**3, dtype=torch.bool)
        used[(channels[:, 0] * 65536 + channels[:, 1] * 256 + channels[:, 2]).flatten()] = True
        seen.append(used.int())
    assert sum(seen).max() == 1


def test_the_first_patches_are_of_both_photographs_and_neighbours_share_little():
    for split in parts(load_images("patches")):
        assert 0.4 < split.labels[:200].double().mean() < 0.6
        shares = [torch.equal(one[:, :, 8:], other[:, :, :-8]) for one, other in zip(split.images[1:201], split.images[:200], strict=True)]
        shares += [torch.equal(one[:, :, 8:], other[:, :, :-8]) for one, other in zip(split.images[:200], split.images[1:201], strict=True)]
        assert sum(shares) < 10


@pytest.mark.parametrize(("name", "size"), [("digits", 4), ("patches", 16)])
def test_a_smaller_size_is_the_area_average_of_the_native_images(name, size):
    native, small = load_images(name), load_images(name, size)
    assert small.name == f"{name}-{size}"
    assert small.shape == (native.shape[0], size, size)
    for one, two in zip(parts(native), parts(small), strict=True):
        # The two orders of averaging and scaling differ by float32 rounding of values up to 1.
        torch.testing.assert_close(two.images, resize(one.images, size), atol=1e-6, rtol=0)
        assert torch.equal(one.labels, two.labels)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(
        SferdError, match="'cifar' is unknown; allowed: digits, fashion-mnist, patches, mixture, cifar10, imagenet64, folder"
    ):
        load_images("cifar")


@pytest.mark.parametrize(("name", "size"), [("digits", 3), ("digits", 16), ("fashion-mnist", 20), ("patches", 0), ("mixture", 32)])
def test_a_size_that_makes_no_sense_is_refused(name, size):
    with pytest.raises(SferdError, match=rf"size = {size} for data set '{name}'; allowed: \d+, \d+"):
        load_images(name, size)


# Validation and resizing


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, 1, 4, 4)), "users: images are a ndarray; expected a torch.Tensor"),
        (torch.zeros(2, 4, 4), r"users: images have shape \(2, 4, 4\); expected \(N, C, H, W\)"),
        (torch.zeros(0, 1, 4, 4), r"shape \(0, 1, 4, 4\)"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.float64), "torch.float64; expected torch.float32"),
        (torch.full((2, 1, 4, 4), 255.0), r"run from 255 to 255; expected finite values in \[-1, 1\]"),
        (torch.tensor([0.0, -1.01]).view(2, 1, 1, 1), "from -1.01 to 0"),
        (torch.tensor([0.0, math.nan]).view(2, 1, 1, 1), "nan"),
        (torch.tensor([0.0, math.inf]).view(2, 1, 1, 1), "inf"),
    ],
)
def test_bad_images_are_named(images, message):
    with pytest.raises(SferdError, match=message):
        check_images(images, "users")


def test_good_images_pass_including_both_ends_of_the_range():
    check_images(torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1), "users")


@pytest.mark.parametrize(
    ("labels", "classes", "message"),
    [
        (torch.tensor([0, 3]), 3, "mine, reference: labels run from 0 to 3; expected 0 to 2"),
        (torch.tensor([-1, 0]), 3, "from -1 to 0"),
        (torch.tensor([0, 1, 2]), 3, r"labels are torch.int64 \(3,\); expected torch.int64 \(2,\)"),
        (torch.tensor([0, 1], dtype=torch.int32), 3, "torch.int32"),
        (None, 3, "labels are missing"),
        (torch.tensor([0, 1]), 0, "labels are given"),
    ],
)
def test_bad_labels_are_named(labels, classes, message):
    images = torch.zeros(2, 1, 4, 4)
    good = Split(images, torch.zeros(2, dtype=torch.int64) if classes else None)
    with pytest.raises(SferdError, match=message):
        ImageData("mine", good, good, Split(images, labels), classes)


def test_parts_of_different_shape_are_refused():
    small, large = (Split(torch.zeros(2, 1, side, side), None) for side in (4, 8))
    with pytest.raises(SferdError, match=r"mine, reference: images are \(1, 8, 8\); expected \(1, 4, 4\) as in train"):
        ImageData("mine", small, small, large, 0)


def test_resize_by_hand():
    image = torch.tensor([[0.0, 1, 8, 8], [2, 3, 8, 8], [1, 1, -1, 0], [1, 1, 0, -3]]).view(1, 1, 4, 4)
    # (0 + 1 + 2 + 3) / 4, 8, 1, (-1 + 0 + 0 - 3) / 4
    assert resize(image, 2).tolist() == [[[[1.5, 8.0], [1.0, -1.0]]]]
    assert torch.equal(resize(image, 4), image)


@pytest.mark.parametrize(("shape", "size"), [((1, 1, 4, 4), 3), ((1, 1, 4, 4), 8), ((1, 1, 4, 4), 0), ((1, 1, 4, 8), 4)])
def test_resize_refuses_what_is_not_a_whole_block_average(shape, size):
    with pytest.raises(SferdError, match=f"size = {size}; allowed: square images, size a divisor"):
        resize(torch.zeros(shape), size)


# Fashion-MNIST: the reader


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_idx_values_and_shape_survive(tmp_path, pack):
    values = np.arange(2 * 3 * 5, dtype=np.uint8).reshape(2, 3, 5)
    path = tmp_path / "values"
    path.write_bytes(pack(idx_bytes(values)))
    read = read_idx(path)
    assert read.dtype == torch.uint8
    assert read.tolist() == values.tolist()


GOOD = idx_bytes(np.arange(6, dtype=np.uint8).reshape(2, 3))
PACKED = gzip.compress(GOOD, mtime=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected an IDX file of unsigned bytes"),
        (GOOD[:3], "expected an IDX file of unsigned bytes"),
        (b"\x00\x01" + GOOD[2:], "starts with the bytes '00 01 08 02'; expected an IDX file"),
        (b"\x00\x00\x0d\x02" + GOOD[4:], "'00 00 0d 02'"),
        (b"\x00\x00\x08\x00" + GOOD[4:], "1 to 4 dimensions"),
        (b"\x00\x00\x08\x05" + GOOD[4:], "1 to 4 dimensions"),
        (GOOD[:9], "ends inside its header; expected 2 dimensions"),
        (GOOD[:-1], "holds 5 values; expected 6, as its header says"),
        (GOOD + b"\x00", "holds more than 6 values; expected 6"),
        (gzip.compress(GOOD + b"\x00", mtime=0), "holds more than 6 values; expected 6"),
        (b"\x00\x00\x08\x01\x00\x00\x00\x00", "announces 0 values"),
        (b"\x00\x00\x08\x02\xff\xff\xff\xff\xff\xff\xff\xff", "announces 4294967295 x 4294967295 values; expected 1 to 67108864"),
        (PACKED[:-9], "not a whole gzip file"),
        (PACKED[:-8] + b"\x00" + PACKED[-7:], "not a whole gzip file .*CRC"),
        (PACKED[:12] + b"\xff" + PACKED[13:], "not a whole gzip file"),
        (PACKED + b"tail", "not a whole gzip file"),
    ],
)
def test_a_bad_idx_file_is_an_error_that_names_it_and_the_remedy(tmp_path, content, message):
    path = tmp_path / "bad.idx"
    path.write_bytes(content)
    with pytest.raises(SferdError, match=message) as error:
        read_idx(path)
    assert str(path) in str(error.value)
    assert "dataset-fashion-mnist" in str(error.value)


def test_a_missing_idx_file_is_an_error_that_names_it_and_the_remedy(tmp_path):
    with pytest.raises(SferdError, match=r"none\.idx: cannot be read .*To get Fashion-MNIST"):
        read_idx(tmp_path / "none.idx")


@pytest.mark.parametrize("announced", [6, 1 << 30])
def test_a_gzip_bomb_is_not_unpacked(tmp_path, monkeypatch, announced):
    path = tmp_path / "bomb.gz"
    path.write_bytes(gzip.compress(b"\x00\x00\x08\x01" + struct.pack(">I", announced) + bytes(1 << 26), compresslevel=1))
    taken = []
    read = gzip.GzipFile.read
    monkeypatch.setattr(gzip.GzipFile, "read", lambda self, size=-1: taken.append(size) or read(self, size))
    with pytest.raises(SferdError, match=r"holds more than 6 values|announces 1073741824 values"):
        read_idx(path)
    # It asked for the 8 header bytes and, at most, one byte more than announced.
    assert min(taken) > 0
    assert sum(taken) <= 8 + 7


# Fashion-MNIST: finding, checking and downloading


def small_files(monkeypatch) -> dict[str, bytes]:
    """Tiny stand-ins for the four files, with the package's hashes set to theirs."""
    numbers = np.random.RandomState(0)
    contents = {
        f"{kind}-{what}": idx_bytes(numbers.randint(0, top, size=(3, *shape)).astype(np.uint8))
        for kind in ("train", "t10k")
        for what, top, shape in (("images-idx3-ubyte", 256, (28, 28)), ("labels-idx1-ubyte", 10, ()))
    }
    monkeypatch.setattr(data, "FASHION_SHA256", {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()})
    return contents


class Response:
    def __init__(self, content: bytes) -> None:
        self.content = content

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False

    def read(self, limit: int) -> bytes:
        return self.content[:limit]


def test_a_download_comes_over_https_from_the_authors_repository_and_is_kept(no_files, monkeypatch):
    contents, asked = small_files(monkeypatch), []

    def urlopen(url, timeout):
        asked.append(url)
        return Response(gzip.compress(contents[url.rsplit("/", 1)[1].removesuffix(".gz")]))

    monkeypatch.setattr(data, "urlopen", urlopen)
    name = "t10k-labels-idx1-ubyte"
    first = data._fashion_file(name)
    assert first.tolist() == list(contents[name][8:])
    assert [path.name for path in no_files.iterdir()] == [f"{name}.gz"]
    assert torch.equal(data._fashion_file(name), first)
    assert len(asked) == 1
    assert asked[0].startswith("https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/")
    assert asked[0].endswith(f"/data/fashion/{name}.gz")


@pytest.mark.parametrize("spoil", [lambda content: content[:-1] + bytes([content[-1] ^ 1]), lambda _: b"<html>not found</html>"])
def test_a_bad_download_leaves_nothing_behind(no_files, monkeypatch, spoil):
    contents = small_files(monkeypatch)
    name = "t10k-labels-idx1-ubyte"
    monkeypatch.setattr(data, "urlopen", lambda url, timeout: Response(gzip.compress(spoil(contents[name]), mtime=0)))
    with pytest.raises(SferdError, match=r"https://.*t10k-labels.*expected .*To get Fashion-MNIST"):
        data._fashion_file(name)
    assert not no_files.exists()


class Redirect(HTTPSHandler):
    """Answers every request with a redirection."""

    def __init__(self, target):
        super().__init__()
        self.target = target

    def https_open(self, request):
        message = email.message_from_string(f"Location: {self.target}\n\n")
        response = urllib.response.addinfourl(io.BytesIO(), message, request.full_url, 302)
        response.msg = "Found"
        return response


class Seen(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.seen.append(self.path)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def http_server():
    with HTTPServer(("127.0.0.1", 0), Seen) as server:
        server.seen = []
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_only_https_is_spoken_also_where_one_is_sent_on(http_server, monkeypatch, tmp_path):
    monkeypatch.setenv("no_proxy", "*")
    target = f"http://127.0.0.1:{http_server.server_port}/file"
    # Against Python's own opener, which goes wherever it is sent.
    assert urllib.request.build_opener(Redirect(target)).open("https://127.0.0.1/file", timeout=10).status == 200
    assert http_server.seen == ["/file"]
    opener = data.https_opener()
    for url in (target, f"ftp://127.0.0.1:{http_server.server_port}/file", tmp_path.as_uri(), "data:,x"):
        with pytest.raises(OSError, match="unknown url type"):
            opener.open(url, timeout=10)
    opener.handle_open["https"] = [Redirect(target)]
    opener.handle_open["https"][0].add_parent(opener)
    with pytest.raises(OSError, match="unknown url type: http"):
        opener.open("https://127.0.0.1/file", timeout=10)
    assert http_server.seen == ["/file"]


def test_a_download_is_never_read_beyond_its_bound(no_files, monkeypatch):
    small_files(monkeypatch)
    asked = []

    class Endless(Response):
        def read(self, size=-1):
            asked.append(size)
            return bytes(8)

    monkeypatch.setattr(data, "urlopen", lambda url, timeout: Endless(b""))
    with pytest.raises(SferdError, match="expected an IDX file"):
        data._fashion_file("t10k-labels-idx1-ubyte")
    assert asked == [data.MAX_BYTES]
    assert not no_files.exists()


@pytest.mark.parametrize("name", ["t10k-labels-idx1-ubyte", "t10k-labels-idx1-ubyte.gz"])
def test_a_file_in_the_data_folder_is_used_and_an_altered_one_refused(no_files, monkeypatch, name):
    content = small_files(monkeypatch)["t10k-labels-idx1-ubyte"]
    pack = gzip.compress if name.endswith(".gz") else bytes
    no_files.mkdir(parents=True)
    (no_files / name).write_bytes(pack(content))
    assert data._fashion_file("t10k-labels-idx1-ubyte").tolist() == list(content[8:])
    altered = content[:-1] + bytes([content[-1] ^ 1])
    (no_files / name).write_bytes(pack(altered))
    with pytest.raises(SferdError, match=r"has SHA-256 .*; expected .*delete any bad copy") as error:
        data._fashion_file("t10k-labels-idx1-ubyte")
    # The stated digest is that of the whole unpacked file, so that a reader can check it with common tools.
    assert hashlib.sha256(altered).hexdigest() in str(error.value)
    assert str(no_files / name) in str(error.value)


def test_without_files_and_network_the_error_says_where_and_how(no_files):
    with pytest.raises(SferdError, match=r"train-images-idx3-ubyte\.gz is missing.*no network in tests.*dataset-fashion-mnist") as error:
        load_images("fashion-mnist", 16)
    assert str(no_files) in str(error.value)


def test_the_data_folder_is_the_clones_else_the_current_ones(monkeypatch, tmp_path):
    (tmp_path / "clone" / "sferd_lab").mkdir(parents=True)
    monkeypatch.setattr(files, "__file__", str(tmp_path / "clone" / "sferd_lab" / "files.py"))
    monkeypatch.chdir(tmp_path)
    assert data.fashion_folder() == tmp_path / "data" / "fashion-mnist"
    (tmp_path / "clone" / "pyproject.toml").touch()
    assert data.fashion_folder() == tmp_path / "clone" / "data" / "fashion-mnist"


@pytest.fixture
def real_fashion(monkeypatch):
    """The real files, which tests never download."""
    for name in data.FASHION_SHA256:
        paths = [folder / (name + end) for folder in (data.fashion_folder(), data.DEBIAN_FOLDER) for end in ("", ".gz")]
        if not any(path.is_file() for path in paths):
            pytest.skip("Fashion-MNIST is not on this machine: install Debian's dataset-fashion-mnist, or load it once")
    monkeypatch.delattr(data, "urlopen")


def test_fashion_mnist_at_16_is_padded_then_averaged(real_fashion):
    native, small = load_images("fashion-mnist"), load_images("fashion-mnist", 16)
    assert (native.name, native.shape, small.name, small.shape) == ("fashion-mnist", (1, 28, 28), "fashion-mnist-16", (1, 16, 16))
    for one, two, count in zip(parts(native), parts(small), COUNTS["fashion-mnist"], strict=True):
        assert len(one.images) == len(two.images) == count
        assert (one.images.min(), one.images.max()) == (-1, 1)
        # The outer ring is padding alone, and black; the rest are 2x2 means of the native image.
        assert two.images[:, :, 0].eq(-1).all()
        assert two.images[:, :, :, -1].eq(-1).all()
        torch.testing.assert_close(two.images[:200, :, 1:-1, 1:-1], resize(one.images[:200], 14), atol=1e-6, rtol=0)
        assert torch.equal(one.labels, two.labels)
    # The parts are the authors' own order, cut once and put together again.
    for kind, pieces in (("train", [native.train, native.features]), ("t10k", [native.reference])):
        pixels, labels = (data._fashion_file(f"{kind}-{what}-ubyte") for what in ("images-idx3", "labels-idx1"))
        assert torch.equal(torch.cat([(piece.images[:, 0] + 1) * 127.5 for piece in pieces]).round().byte(), pixels)
        assert torch.equal(torch.cat([piece.labels for piece in pieces]), labels.long())
    # The authors' ten classes have 6,000 training and 1,000 test images each.
    assert native.reference.labels.bincount().tolist() == [1_000] * 10
    assert (native.features.labels.bincount() + native.train.labels.bincount()).tolist() == [6_000] * 10


# Mixtures


def spd(k: int, d: int) -> torch.Tensor:
    factor = torch.randn(k, d, d, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return factor @ factor.mT / d


def full_mixture() -> Mixture:
    means = torch.tensor([[1.0, -2, 0], [0, 3, 1]], dtype=torch.float64)
    return Mixture(torch.tensor([0.25, 0.75], dtype=torch.float64), means, spd(2, 3), (3,))


def test_samples_have_the_mixtures_weights_means_and_covariances():
    mixture, n = full_mixture(), 40_000
    points, component = mixture.sample(n, torch.Generator().manual_seed(0))
    assert points.dtype == torch.float64
    for k in range(2):
        weight, chosen = mixture.weights[k], points[component == k]
        assert abs(len(chosen) / n - weight) < 4 * math.sqrt(weight * (1 - weight) / n)
        covariance = mixture.covariance[k]
        variance = covariance.diagonal()
        assert ((chosen.mean(0) - mixture.means[k]).abs() < 4 * (variance / len(chosen)).sqrt()).all()
        # A Gaussian's sample covariance S_ij has variance (C_ii C_jj + C_ij^2) / (n - 1).
        error = ((variance[:, None] * variance + covariance**2) / (len(chosen) - 1)).sqrt()
        assert ((chosen.T.cov() - covariance).abs() < 4 * error).all()


def test_a_diagonal_covariance_is_the_full_one_with_zeros():
    weights, means = torch.tensor([0.5, 0.5], dtype=torch.float64), torch.zeros(2, 4, dtype=torch.float64)
    variances = torch.tensor([[1.0, 4, 9, 0], [0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)
    diagonal, full = (Mixture(weights, means, covariance, (1, 2, 2)) for covariance in (variances, variances.diag_embed()))
    one, two = (mixture.sample(100, torch.Generator().manual_seed(3)) for mixture in (diagonal, full))
    assert one[0].shape == (100, 1, 2, 2)
    torch.testing.assert_close(one[0], two[0], atol=1e-12, rtol=1e-12)
    assert torch.equal(one[1], two[1])


def test_sampling_is_repeatable_and_keeps_the_dtype():
    mixture = Mixture(torch.ones(1), torch.zeros(1, 2), torch.eye(2)[None], (2,))
    one, two = (mixture.sample(10, torch.Generator().manual_seed(7))[0] for _ in range(2))
    assert one.dtype == torch.float32
    assert torch.equal(one, two)
    with pytest.raises(SferdError, match="n = 0 draws; allowed: 1 or more"):
        mixture.sample(0)


def test_a_singular_covariance_is_sampled_on_its_line():
    line = torch.ones(1, 2, 2, dtype=torch.float64)
    points, _ = Mixture(torch.ones(1, dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64), line, (2,)).sample(50)
    torch.testing.assert_close(points[:, 0], points[:, 1], atol=1e-7, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # Eigenvalues 3 and -1.
        ({"covariance": torch.tensor([[[1.0, 2], [2, 1]]] * 2)}, "smallest eigenvalue of a covariance is -1; expected 0 or more"),
        ({"covariance": torch.tensor([[1.0, 1], [1, -0.5]])}, "smallest eigenvalue of a covariance is -0.5"),
        ({"covariance": torch.tensor([[[1.0, 0.5], [0, 1]]] * 2)}, "differs from its transpose by 0.5"),
        ({"covariance": torch.ones(2, 3)}, r"shapes \(2,\), \(2, 2\), \(2, 3\); expected \(K,\), \(K, 2\)"),
        ({"means": torch.zeros(3, 2)}, r"\(3, 2\)"),
        ({"shape": (3,)}, r"mixture over \(3,\)"),
        ({"weights": torch.tensor([0.5, 0.6])}, "sum 1.1; expected positive weights with sum 1"),
        ({"weights": torch.tensor([1.5, -0.5])}, "expected positive weights"),
        ({"weights": torch.tensor([1.0, 0.0])}, "expected positive weights"),
        ({"means": torch.full((2, 2), math.nan)}, "NaN or infinity"),
        ({"means": torch.zeros(2, 2, dtype=torch.float64)}, "expected all float32 or all float64"),
    ],
)
def test_a_bad_mixture_is_refused(change, message):
    good = {"weights": torch.tensor([0.5, 0.5]), "means": torch.zeros(2, 2), "covariance": torch.ones(2, 2), "shape": (2,)}
    Mixture(**good)
    with pytest.raises(SferdError, match=message):
        Mixture(**good | change)


def test_two_dimensional_mixtures():
    ring, grid, two = (two_dimensional_mixture(name, std=0.2) for name in ("ring", "grid", "two"))
    torch.testing.assert_close(ring.means.norm(dim=1), torch.ones(8, dtype=torch.float64))
    assert {tuple(mean) for mean in grid.means.tolist()} == {(x, y) for x in (-1, 0, 1) for y in (-1, 0, 1)}
    assert ring.covariance.unique().tolist() == grid.covariance.unique().tolist() == [0.2**2]
    # Standard deviations 0.2 and 3 x 0.2 along the axes; the first tilted up, the second down.
    torch.testing.assert_close(torch.linalg.eigvalsh(two.covariance).sqrt(), torch.tensor([[0.2, 0.6]] * 2, dtype=torch.float64))
    assert two.covariance[0, 0, 1] > 0 > two.covariance[1, 0, 1]
    with pytest.raises(SferdError, match="'spiral' is unknown; allowed: ring, grid, two"):
        two_dimensional_mixture("spiral")
    for std in (0, -1, math.nan):
        with pytest.raises(SferdError, match=f"std = {std}"):
            two_dimensional_mixture("two", std)


@pytest.mark.parametrize("size", [4, 8, 16])
def test_image_mixture_keeps_its_promises(size):
    mixture = image_mixture(size)
    assert mixture.shape == (1, size, size)
    assert mixture.weights.dtype == torch.float64
    assert mixture.means.abs().max() <= 0.5
    torch.testing.assert_close(mixture.covariance.diagonal(dim1=1, dim2=2), torch.full_like(mixture.means, 0.01))
    # The 0.1 I term is the floor of the spectrum: everything above it is the six smooth directions.
    values = torch.linalg.eigvalsh(mixture.covariance)
    torch.testing.assert_close(values[:, :-6], torch.full_like(values[:, :-6], 0.001))
    assert (values[:, -6:] > 0.001).all()


def test_image_mixture_is_smooth_across_neighbours():
    # Correlation of adjacent pixels beyond what their noise floor (0.1) leaves: far above that of opposite corners.
    correlation = image_mixture(8).covariance / 0.01
    index = torch.arange(64).reshape(8, 8)
    adjacent = correlation[:, index[:, :-1].flatten(), index[:, 1:].flatten()].mean()
    corners = correlation[:, index[0, 0], index[-1, -1]].abs().mean()
    assert adjacent > 0.75
    assert adjacent > corners + 0.2


def test_image_mixture_is_fixed_by_its_seed_and_has_distinct_components():
    assert torch.equal(image_mixture(8, seed=1).means, image_mixture(8, seed=1).means)
    assert not torch.equal(image_mixture(8, seed=1).means, image_mixture(8, seed=2).means)
    # Two components are told apart when their means are several pixel standard deviations (0.1) away in all.
    assert torch.pdist(image_mixture(8).means).min() > 5 * 0.1
    with pytest.raises(SferdError, match="size = 3, components = 10; allowed: size 4 to 16"):
        image_mixture(3)


def test_image_mixture_is_the_same_scene_at_every_size():
    # A mean at 8x8 and the 2x2 average of the one at 16x16 differ by the blob's curvature: at most 1 / 0.1^2 along each axis
    # at distance 1/32, hence 2 x 100 / 32^2 / 2 = 0.098 of the blob's height, 1.
    fine = resize(image_mixture(16).means.view(10, 1, 16, 16), 8).flatten(1)
    assert (fine - image_mixture(8).means).abs().max() < 0.098


def test_clipping_the_mixture_data_is_negligible():
    points, _ = image_mixture(8).sample(50_000, torch.Generator().manual_seed(9))
    # A pixel at the extreme mean leaves [-1, 1] with the Gaussian tail beyond 5: 2.9e-7, here 0.9 expected among 3.2 million at the most.
    assert (points.abs() > 1).sum() <= 5


def test_mixture_data_are_draws_from_image_mixture():
    mixture, loaded = image_mixture(8), load_images("mixture")
    train = loaded.train
    points, component = mixture.sample(17_000, torch.Generator().manual_seed(1))
    assert torch.equal(torch.cat([split.images for split in parts(loaded)]), points.float().clamp(-1, 1))
    assert torch.equal(torch.cat([split.labels for split in parts(loaded)]), component)
    for k in range(10):
        chosen = train.images[train.labels == k].flatten(1).double()
        # 64 pixels x 10 components: the largest of 640 standardised errors stays below 4.5 (probability 0.996).
        assert ((chosen.mean(0) - mixture.means[k]).abs() * math.sqrt(len(chosen)) / 0.1).max() < 4.5
