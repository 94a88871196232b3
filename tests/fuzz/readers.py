"""What is fuzzed: for each reader of files and parameters, a strategy of inputs around valid ones, and the call that must take them.

A call gives a value or raises SferdError; ``run.py`` treats anything else as a bug. Valid inputs are tiny and made here, so that a call
takes milliseconds. Files of tensors are altered within, in names, shapes, types and words, and hashed again: the hash would stop
the others at the door.
"""

from __future__ import annotations

import copy
import gzip
import io
import json
import math
import os
import tarfile
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pandas as pd
import safetensors.torch
import torch
from hypothesis import strategies as st
from nbformat.v4 import new_code_cell, new_notebook, writes
from PIL import Image
from torch import Tensor

from sferd_lab import archives
from sferd_lab.artifacts import load, load_model, save_model
from sferd_lab.config import Settings, make_settings, notebook_parameters, parse_literals, read_parameters
from sferd_lab.data import read_idx
from sferd_lab.denoiser import NetworkDenoiser
from sferd_lab.experiment import Row, read_table
from sferd_lab.files import METADATA_KEY, content_sha256, load_tensors, read_json, read_record, sha256
from sferd_lab.metrics import FeatureNetwork, load_feature_network, read_floors, save_feature_network
from sferd_lab.semantic import DiffusionPrior, LatentDenoiser, MixturePrior, SemanticDenoiser
from sferd_lab.sweep import read_sweep
from sferd_lab.train import Steering, TrainSettings, load_checkpoint, save_checkpoint
from sferd_lab.unet import UNet, UNetSettings

CIFAR_IMAGES = 1
# Values that a careless reader would index, allocate, divide by, format or run.
SPITEFUL = [
    *(None, True, False, 0, -1, 1, 2, 10**6, 10**9, 2**31, 2**63, -(2**63), 10**12, 10**30, 0.0, -0.5, 1e-320, 1e308),
    *("", "a", "é", "\x00", "\ud800", "../../etc/passwd", "/dev/zero", "nan", "1e999", '__import__("os").getcwd()', "0" * 5000),
    *([], {}, [[]], [0], [1] * 50, [10**9], [None], ["a"], {"a": 1}, {"": []}, {"settings": {}}, [[1, 2], [3]]),
]


@dataclass(frozen=True)
class Reader:
    """A case of the table: inputs, the call, and its share of all inputs."""

    name: str
    inputs: st.SearchStrategy[Any]
    call: Callable[[Any], Any]
    share: float


# Inputs: functions of a random generator, since drawing every byte by hypothesis takes ten times as long as reading it


def value(rng: Random, depth: int = 2) -> Any:
    """Anything that JSON or a cell of parameters can hold, and a few things that they can not."""
    kind = rng.randrange(9 if depth else 6)
    if kind < 3:
        return copy.deepcopy(rng.choice(SPITEFUL))
    if kind == 3:
        return rng.choice([rng.randrange(-5, 300), rng.getrandbits(70), rng.gauss(0, 10), -rng.random(), math.nan, math.inf])
    if kind < 6:
        return text(rng)
    if kind == 6:
        return {text(rng): value(rng, depth - 1) for _ in range(rng.randrange(3))}
    return [value(rng, depth - 1) for _ in range(rng.randrange(4))]


def text(rng: Random) -> str:
    """A few characters, most of them of a kind that means something to a parser."""
    return "".join(rng.choice("ab1 09.-+e_[](){}<>,:;=#%&*!|'\"\\\n\t\x00é\ud800\U0001f600") for _ in range(rng.randrange(8)))


def altered(valid: list[bytes], rng: Random) -> bytes:
    """One of the ``valid`` byte strings after up to four changes, or any bytes at all."""
    if rng.randrange(20) == 0:
        return rng.randbytes(rng.randrange(64))
    content = bytearray(rng.choice(valid))
    for _ in range(rng.randrange(5)):
        # Headers are where the beginning is, and the end of zip files.
        start = rng.choice(
            [rng.randrange(len(content) + 1), rng.randrange(min(len(content), 64) + 1), max(0, len(content) - rng.randrange(99))]
        )
        kind = rng.choice(["flip", "flip", "number", "cut", "drop", "insert", "repeat", "splice"])
        if kind == "flip" and start < len(content):
            content[start] ^= 1 << rng.randrange(8)
        elif kind == "number":
            word = rng.choice([b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x80\x00", b"\xff", b"\0", b"9", b"-"])
            content[start : start + len(word)] = word
        elif kind == "cut":
            del content[start:]
        elif kind == "drop":
            del content[start : start + rng.randrange(1, 64)]
        elif kind == "insert":
            content[start:start] = rng.randbytes(rng.randrange(1, 8))
        elif kind == "repeat":
            content[start:start] = content[start : start + rng.randrange(1, 600)]
        elif kind == "splice":
            other = rng.choice(valid)
            content[start:] = other[rng.randrange(len(other)) :]
    return bytes(content)


def altered_value(valid: Any, rng: Random) -> Any:
    """A JSON-like value with one or two places in it replaced, taken out, or added to."""
    whole = json.loads(json.dumps(valid))
    for _ in range(rng.randrange(1, 3)):
        parent, key, here = None, None, whole
        while isinstance(here, dict | list) and here and rng.randrange(4):
            parent, key = here, rng.choice(list(here) if isinstance(here, dict) else range(len(here)))
            here = parent[key]
        if parent is None and isinstance(whole, dict) and rng.randrange(9):
            whole[text(rng)] = value(rng)
        elif parent is None:
            whole = value(rng)
        elif rng.randrange(5) == 0:
            del parent[key]
        else:
            parent[key] = value(rng)
    return whole


def altered_json(valid: Any, rng: Random) -> bytes:
    """The JSON of an ``altered_value``."""
    return json.dumps(altered_value(valid, rng)).encode()


def tensor_file(tensors: dict[str, Tensor], info: Any, hashed: bool) -> bytes:
    """A file as ``save_tensors`` writes it, also of words that it would refuse."""
    words = json.dumps(info)
    if hashed and isinstance(info, dict):
        with suppress(ValueError):  # NaN has no hash
            words = json.dumps([content_sha256(tensors, info), info])
    return safetensors.torch.save(tensors, {METADATA_KEY: words})


def altered_tensors(valid: list[Path], rng: Random) -> bytes:
    """A file of tensors that is altered as bytes, or within: in a tensor or two, in its words, or in safetensors' own header."""
    path = rng.choice(valid)
    how = rng.choice(["bytes", "tensors", "words", "words", "words", "both", "header"])
    whole = path.read_bytes()
    if how == "bytes":
        return altered([whole], rng)
    if how == "header":
        size = int.from_bytes(whole[:8], "little")
        header = altered_json(json.loads(whole[8 : 8 + size]), rng)
        return len(header).to_bytes(8, "little") + header + whole[8 + size :]
    tensors, info = load_tensors(path)
    for _ in range(rng.randrange(1, 3) if how != "words" else 0):
        name = rng.choice(sorted(tensors))
        tensor = tensors.pop(name)
        change = rng.choice(["drop", "rename", "dtype", "shape", "flat", "values", "empty", "scale"])
        if change == "rename":
            tensors[rng.choice(["", "model", "optimizer", "ema.", "a.b", "optimizer.x.y", "losses", "é", "../x"])] = tensor
        elif change == "dtype":
            tensors[name] = tensor.to(rng.choice([torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool]))
        elif change == "shape":
            tensors[name] = torch.zeros([rng.randrange(5) for _ in range(rng.randrange(5))], dtype=tensor.dtype)
        elif change == "flat":
            tensors[name] = tensor.reshape(-1)
        elif change == "values":
            bad = rng.choice([math.nan, math.inf, -1.0, 0.0] if tensor.is_floating_point() else [-1, 0])
            tensors[name] = torch.full_like(tensor, bad)
        elif change == "scale":
            tensors[name] = tensor * rng.choice([-1, 0, 10**6])
        elif change == "empty":
            tensors[name] = tensor.reshape(-1)[:0]
    info = altered_value(info, rng) if how != "tensors" else info
    return tensor_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, info, rng.randrange(4) > 0)


def packed_again(valid: bytes, rng: Random) -> bytes:
    """A gzipped file, altered packed or unpacked; at times far longer than it should be."""
    if rng.randrange(2):
        return altered([gzip.compress(valid, 1, mtime=0)], rng)
    content = altered([valid], rng)
    return gzip.compress(content if rng.randrange(200) else content + bytes(5_000_000), 1, mtime=0)


def altered_npz(valid: bytes, rng: Random) -> bytes:
    """An npz file altered as bytes or, where its checksums are made anew, in one of its arrays."""
    if rng.randrange(2):
        return altered([valid], rng)
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(valid)) as old, zipfile.ZipFile(packed, "w") as new:
        for member in old.namelist():
            content = old.read(member)
            changed = altered([content[: rng.choice([160, len(content)])]], rng) if rng.randrange(2) else content
            new.writestr(member, changed, rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]))
    return packed.getvalue()


SETTINGS = make_settings("digits").model_dump(mode="json")
SPELLED = ["[1, 2]", "(", "[" * 300, "walk", "digits", "folder", "pd", "auto", "(1,)", "True", "1e-3"]
WORDS = ["seed=1", "a=[1,", "x", "=", "a=" + "(" * 300, "a=" + "9" * 5000, "a=1if 1else 2", "a=b'\\xff'", "a={1: {2}}", "a=\x00", "a=[]()"]
SOURCES = [
    "a = 1",
    "a: int = None",
    "a, b = 1, 2",
    "import os",
    "x = open('x')",
    "a = " + "(" * 300,
    "a = '\x00'",
    "",
    "a = -",
    "é = 1e999",
]


def parameters(rng: Random) -> dict[str, Any]:
    """A few settings, or names that are none, with values that may be right."""
    names = [*Settings.model_fields, "sed", "__class__"]
    return {rng.choice(names): value(rng) if rng.randrange(3) else rng.choice(SPELLED) for _ in range(rng.randrange(5))}


def words(choice: list[str], rng: Random) -> list[str]:
    """Some of the words, and others."""
    return [rng.choice(choice) if rng.randrange(2) else text(rng) + "=" + text(rng) for _ in range(rng.randrange(4))]


YAMLS = [
    b"notebook: small.ipynb\nparameters: {preset: digits}\ngrid: {seed: [1, 2], text: [a]}\n",
    b"notebook: small.ipynb\ngrid:\n  text: [a, b]\n  seed: [1.5, null, true]\n",
    b"a: &a [1, 2]\nb: *a\nc: !!binary aGFsbG8=\nd: 2026-01-01 10:00:00\ne: !!set {a}\nf: 0o17\ng: 1:20\nh: !!python/name:os.system\n",
]
STUDY = b"preset: digits\nmethods: [pd]\nseed: 3\nwidths: [8, 8]\ndata_folder: images\nteacher_from: a/b\n"


def written(path: Path, read: Callable[[Path], Any]) -> Callable[[bytes], Any]:
    """Put the input into ``path`` and ``read`` it."""

    def call(content: bytes) -> Any:
        path.write_bytes(content)
        return read(path)

    return call


def readers(folder: Path) -> list[Reader]:
    """All readers, their valid files and their inputs in ``folder``, which becomes the current one."""
    os.chdir(folder)
    idx = [bytes([0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 3]) + bytes(range(18)), bytes([0, 0, 8, 1, 0, 0, 0, 5, 9, 8, 7, 6, 5])]
    packed = [*idx, *(gzip.compress(content, mtime=0) for content in idx)]
    model_files, sweep = (
        models(folder),
        {"notebook": "small.ipynb", "parameters": {"preset": "digits"}, "grid": {"seed": [1, 2], "text": ["a"]}},
    )
    # A name, an input, a call, and the share of all inputs: less where a call takes long.
    cases: list[tuple[str, Callable[[Random], Any], Callable[[Any], Any], float]] = [
        ("IDX file", partial(altered, packed), written(folder / "idx", read_idx), 0.16),
        ("image file", partial(altered, pictures()), written(folder / "x.png", partial(archives.read_image, size=4, grey=False)), 0.16),
        ("folder of images", partial(altered, pictures()), partial(image_folder, folder / "images"), 0.01),
        ("CIFAR-10 archive", partial(packed_again, cifar()), written(folder / "cifar.tar.gz", read_cifar), 0.09),
        ("ImageNet npz", partial(altered_npz, npz()), written(folder / "batch.npz", read_npz), 0.08),
        ("checkpoint", partial(altered_tensors, [checkpoint(folder)]), written(folder / "checkpoint", Resume()), 0.05),
        ("model file", partial(altered_tensors, model_files), written(folder / "m.safetensors", load_model), 0.03),
        ("model by its path", partial(altered_tensors, model_files[:2]), written(folder / "p.safetensors", load), 0.01),
        ("feature network", partial(altered_tensors, [features(folder)]), written(folder / "f.safetensors", load_feature_network), 0.02),
        ("tensor file", partial(altered_tensors, model_files), written(folder / "t.safetensors", load_tensors), 0.03),
        ("settings", parameters, lambda given: make_settings(**given), 0.1),
        ("settings of a run", partial(altered_value, SETTINGS), make_from, 0.02),
        ("command-line words", partial(words, WORDS), parse_literals, 0.08),
        ("notebook parameters", partial(words, SOURCES), read_cells, 0.05),
        ("parameter file", partial(altered, [STUDY, *YAMLS]), written(folder / "study.yaml", read_parameters), 0.02),
        ("sweep file", partial(altered, YAMLS), written(folder / "sweep.yaml", read_sweep), 0.02),
        ("sweep of other values", partial(altered_json, sweep), written(folder / "sweep2.yaml", read_sweep), 0.02),
        ("JSON file", partial(altered, [json.dumps(SETTINGS).encode()]), written(folder / "a.json", read_json), 0.02),
        ("JSON record", partial(altered_json, {"settings": SETTINGS}), written(folder / "b.json", read_settings), 0.01),
        (
            "known floors",
            partial(altered_json, FLOORS),
            written(folder / "floors.json", partial(read_floors, features_sha256="a", k=5)),
            0.01,
        ),
        (
            "table of a run",
            partial(altered, [table()]),
            written(folder / "metrics.csv", partial(read_table, columns=tuple(asdict(Row("a"))))),
            0.01,
        ),
    ]
    everything = [Reader(name, st.randoms(use_true_random=True).map(make), call, share) for name, make, call, share in cases]
    small = new_notebook(cells=[new_code_cell("text = 'a'\nseed = 1\npreset = 'digits'", metadata={"tags": ["parameters"]})])
    small.metadata["kernelspec"] = {"name": "python3", "language": "python", "display_name": "Python 3"}
    (folder / "small.ipynb").write_text(writes(small))
    return everything


# Valid inputs, and calls that take more than a line


FLOORS = {"a": [{"n": 500, "k": 5, "floors": {"fd": [1.0, 0.1], "kid": [0.0, 0.2]}}, {"n": 80, "k": 4, "floors": {}}], "b": []}


def pictures() -> list[bytes]:
    """The same 9 x 7 pixels in every format, in some modes."""
    found = []
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 4), dtype=np.uint8)
    for kind in archives.FORMATS:
        for mode, picture in (
            ("RGB", Image.fromarray(pixels[..., :3])),
            ("L", Image.fromarray(pixels[..., 0])),
            ("RGBA", Image.fromarray(pixels)),
        ):
            if (kind, mode) not in (("JPEG", "RGBA"), ("BMP", "RGBA")):
                packed = io.BytesIO()
                picture.save(packed, kind)
                found.append(packed.getvalue())
    return found


def image_folder(folder: Path, content: bytes) -> Any:
    folder.mkdir(exist_ok=True)
    if not (folder / "19.png").exists():
        for place in range(20):
            Image.fromarray(np.full((4, 4), place, np.uint8)).save(folder / f"{place}.png")
    (folder / "3.png").write_bytes(content)
    return archives.read_folder(folder, 4)


def cifar() -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for stem in ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"):
            entry = tarfile.TarInfo(f"cifar-10-batches-bin/{stem}.bin")
            entry.size = CIFAR_IMAGES * archives.CIFAR_RECORD
            entry.pax_headers = {"comment": "é"} if stem == "data_batch_2" else {}
            tar.addfile(entry, io.BytesIO(bytes([3]) * entry.size))
    return packed.getvalue()


def read_cifar(path: Path) -> Any:
    return archives.read_cifar10(path, sha256(path), CIFAR_IMAGES)


def npz() -> bytes:
    packed = io.BytesIO()
    np.savez_compressed(packed, data=np.zeros((2, 3 * archives.IMAGENET_SIDE**2), np.uint8), labels=np.array([1, 1000]))
    return packed.getvalue()


def read_npz(path: Path) -> Any:
    labels = archives._imagenet_labels(path)
    return labels, list(archives._imagenet_images(path, len(labels)))


TRAINING = TrainSettings(steps=6, checkpoint_every=2, target_decay=0.9, z_dim=1)


def training() -> tuple[dict[str, torch.nn.Module], Steering]:
    """A tiny model and what steers it, as ``train`` has them after two steps."""
    model = LatentDenoiser(2, width=2, depth=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=TRAINING.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, TRAINING.lr_factor)
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        scheduler.step()
    return {"model": model, "ema": torch.optim.swa_utils.AveragedModel(model)}, Steering(optimizer, scheduler)


def checkpoint(folder: Path) -> Path:
    path = folder / "valid-checkpoint"
    save_checkpoint(path, *training(), TRAINING, torch.tensor([0.5, 0.25], dtype=torch.float64))
    return path


class Resume:
    """Go on from a checkpoint, with the same model and optimiser every time, whatever the one before has left there."""

    def __init__(self) -> None:
        self.training = training()

    def __call__(self, path: Path) -> int:
        return load_checkpoint(path, *self.training, TRAINING, torch.zeros(TRAINING.steps, dtype=torch.float64))


def make_from(given: Any) -> Settings:
    """A run's settings from its ``config.json``; what is no object is another reader's to refuse."""
    return make_settings(**given) if isinstance(given, dict) else make_settings(str(given))


def read_settings(path: Path) -> Any:
    return read_record(path, "settings")


def models(folder: Path) -> list[Path]:
    """A file of each kind of model."""
    network = NetworkDenoiser(UNet(UNetSettings(1, (4,), 1, (0,), 2)), "student")
    covariance = torch.eye(2).expand(2, 2, 2).contiguous()
    made = {
        "network": network,
        "semantic": SemanticDenoiser(network, 2, encoder_width=4),
        "latent": LatentDenoiser(2, width=4, depth=2),
        "diffusion": DiffusionPrior(LatentDenoiser(2, width=4, depth=1), torch.zeros(2), torch.ones(2), 3),
        "mixture": MixturePrior(torch.tensor([0.25, 0.75]), torch.zeros(2, 2), covariance),
    }
    paths = [folder / f"valid-{name}.safetensors" for name in made]
    for path, model in zip(paths, made.values(), strict=True):
        save_model(path, model, {"shape": [1, 8, 8], "data": "digits", "seed": 1})
    return paths


def features(folder: Path) -> Path:
    path = folder / "valid-features.safetensors"
    save_feature_network(path, FeatureNetwork(1, 2, dim=2, width=4), {"data": "digits"})
    return path


def read_cells(sources: list[str]) -> Any:
    return notebook_parameters({"In": ["", *sources, "notebook_parameters(globals())"], "a": 1, "seed": 2, **dict.fromkeys("bxé", 3)})


def table() -> bytes:
    rows = [{**asdict(Row("pd", steps=steps)), "metric": "fd", "value": 1.5, "n": 80} for steps in (1, 2)]
    return pd.DataFrame(rows).to_csv(index=False).encode()
