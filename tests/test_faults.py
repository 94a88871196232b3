"""Whatever happens to a run, the last checkpoint is whole, an error says what happened, and the same call goes on to the same bytes.

``tests/faults/run.py`` kills whole runs at random moments; here a short version of it, and the machine's other faults.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pandas as pd
import pytest
import torch

from sferd_lab.config import make_settings
from sferd_lab.data import Split
from sferd_lab.distill import denoising_target
from sferd_lab.errors import SferdError
from sferd_lab.experiment import Run
from sferd_lab.files import load_tensors, write_text
from sferd_lab.semantic import LatentDenoiser
from sferd_lab.train import TrainSettings, TrainState, train

ROOT = Path(__file__).parent.parent
POINTS = Split(torch.randn(40, 2, generator=torch.Generator().manual_seed(0)), None)
SETTINGS = TrainSettings(steps=12, batch_size=8, warmup=2, checkpoint_every=4, device="cpu")


def walk(path: Path, settings: TrainSettings = SETTINGS) -> Iterator[TrainState]:
    """A training of milliseconds; the checkpoint in ``path`` says from where."""
    torch.manual_seed(0)
    target = denoising_target(LatentDenoiser.phi_lo, LatentDenoiser.phi_hi)
    return train(LatentDenoiser(2, width=8, depth=1), target, POINTS, settings, path)


def go_on(path: Path, steps: int | None = None, settings: TrainSettings = SETTINGS) -> None:
    """Train until the end, or for so many steps more."""
    states = walk(path, settings)
    for _ in itertools.islice(states, steps):
        pass
    states.close()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The last checkpoint of a training that nothing happened to."""
    path = tmp_path_factory.mktemp("whole") / "checkpoint.safetensors"
    go_on(path)
    return path.read_bytes()


def step(path: Path) -> int:
    return load_tensors(path)[1]["step"]


# ---- kills


@pytest.fixture(scope="module")
def tally(tmp_path_factory: pytest.TempPathFactory) -> tuple[pd.Series, str]:
    """What came of two kills in each case that a fork can do, by case and outcome, and what was said; other rows were there before."""
    table = tmp_path_factory.mktemp("tally") / "reliability.csv"
    table.write_text("part,case,outcome,count\nfuzz,IDX file,SferdError,7\nfaults,teacher training,an old row,3\n")
    cases = ["teacher training", "PD stages and their scores", "SGP training and its prior", "checkpoint write"]
    command = [sys.executable, str(ROOT / "tests" / "faults" / "run.py"), "kills=2", f"table={table}", *cases]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    return pd.read_csv(table).set_index(["part", "case", "outcome"])["count"], f"status {done.returncode}: {done.stdout}{done.stderr}"


@pytest.mark.parametrize("case", ["teacher training", "PD stages and their scores", "SGP training and its prior", "checkpoint write"])
def test_a_killed_run_ends_with_the_same_bytes(tally: tuple[pd.Series, str], case: str) -> None:
    counts, said = tally[0].loc["faults", case], tally[1]
    assert said.startswith("status 0"), said
    assert counts["same bytes"] == 2
    assert {outcome for outcome in counts.index if not outcome.startswith("(")} == {"same bytes"}


def test_the_tally_keeps_the_rows_of_others(tally: tuple[pd.Series, str]) -> None:
    assert tally[0]["fuzz", "IDX file", "SferdError"] == 7
    assert ("faults", "teacher training", "an old row") not in tally[0].index


# ---- the disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB, where one may be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system takes root's rights")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_is_named_with_what_is_free_and_the_training_goes_on_once_there_is_room(small_disk: Path, undisturbed: bytes) -> None:
    path, filler = small_disk / "run" / "checkpoint.safetensors", small_disk / "filler"
    go_on(path, 5)
    kept = path.read_bytes()
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    with pytest.raises(
        SferdError,
        match=rf"^cannot write {path}: No space left on device \(0\.0 MiB free in {path.parent}\); what was there before is as it was$",
    ):
        go_on(path)
    assert path.read_bytes() == kept
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert step(path) == 4
    filler.unlink()
    go_on(path)
    assert path.read_bytes() == undisturbed


def test_a_read_only_folder_can_be_read_and_is_refused_for_work(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFERD_LAB_TINY", "1")
    settings = make_settings("digits", run_folder=str(small_disk / "run"), widths=[8, 8], blocks=1, retrain=True, device="cpu")
    Run(settings, progress=False).teacher()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    run = Run(settings, progress=False)
    teacher = run.teacher()
    before = sorted(small_disk.rglob("*"))
    with pytest.raises(SferdError, match=r"cannot write .*\.working\.lock: Read-only file system .*; allowed: a folder to write to"):
        run.progressive(teacher, guided=False)
    assert sorted(small_disk.rglob("*")) == before
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    run.progressive(teacher, guided=False)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO])
@pytest.mark.parametrize("call", ["mkstemp", "write_text", "fsync", "replace"])
def test_whatever_the_disk_refuses_is_an_error_that_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, call: str
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    path = tmp_path / "config.json"
    path.write_text("old")
    owner = {"mkstemp": "tempfile", "fsync": "os"}.get(call, "pathlib.Path")
    monkeypatch.setattr(f"{owner}.{call}", refuse)
    with pytest.raises(SferdError) as caught:
        write_text(path, "new")
    assert str(caught.value).startswith(f"cannot write {path}: {os.strerror(number)} (")
    assert str(caught.value).endswith(f" MiB free in {tmp_path}); what was there before is as it was")
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]
    assert path.read_text() == "old"


def test_a_folder_removed_during_the_training_ends_it_in_words(tmp_path: Path, undisturbed: bytes) -> None:
    path = tmp_path / "run" / "checkpoint.safetensors"
    states = walk(path)
    for _ in range(5):
        next(states)
    shutil.rmtree(path.parent)
    assert [next(states).step, next(states).step] == [6, 7]
    with pytest.raises(SferdError, match=f"{path.parent} was removed during the training, and its checkpoints with it"):
        next(states)
    assert not path.parent.exists()
    go_on(path)
    assert path.read_bytes() == undisturbed


# ---- the clock


def test_nothing_asks_when_a_file_was_written_or_what_time_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: bytes
) -> None:
    # An hour earlier at every look, and files from any time.
    monkeypatch.setattr(time, "time", (2e9 - 3600 * hours for hours in itertools.count()).__next__)
    monkeypatch.setenv("SFERD_LAB_TINY", "1")
    path, dice = tmp_path / "checkpoint.safetensors", random.Random(0)
    for _ in range(3):
        go_on(path, 5)
        os.utime(path, (dice.uniform(0, 4e9),) * 2)
    go_on(path)
    assert path.read_bytes() == undisturbed
    settings = make_settings("digits", run_folder=str(tmp_path / "run"), widths=[8, 8], blocks=1, retrain=True, device="cpu")
    Run(settings, progress=False).teacher()
    files = [file for file in (tmp_path / "run").rglob("*") if file.is_file()]
    for file in files:
        os.utime(file, (dice.uniform(0, 4e9),) * 2)
    stamps = {file: file.stat().st_mtime_ns for file in files}
    Run(settings, progress=False).teacher()
    assert {file: file.stat().st_mtime_ns for file in files} == stamps


# ---- signals

ENDLESS = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import dataclasses
from test_faults import SETTINGS, go_on
go_on(Path(sys.argv[2]), None, dataclasses.replace(SETTINGS, steps=10**6))
"""


def test_a_terminated_training_leaves_its_last_checkpoint_whole(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    with subprocess.Popen([sys.executable, "-c", ENDLESS, str(ROOT / "tests"), str(path)], cwd=ROOT) as process:
        while not path.exists():
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(0.2)
        process.terminate()
    assert process.returncode == -signal.SIGTERM
    reached = step(path)
    assert reached % 4 == 0
    assert reached > 0
    # Where it stopped is where another one would have been.
    long = TrainSettings(**load_tensors(path)[1]["settings"])
    again = tmp_path / "again.safetensors"
    go_on(again, reached, long)
    assert again.read_bytes() == path.read_bytes()


CELL = """
from sferd_lab.config import make_settings
from sferd_lab.experiment import Run
run = Run(make_settings("digits", run_folder={folder!r}, widths=[8, 8], blocks=1, retrain=True, device="cpu", teacher_steps={steps},
                        checkpoint_every=10), progress=False)
run.teacher()
"""


def test_an_interrupted_cell_goes_on_when_it_is_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from jupyter_client.manager import start_new_kernel

    monkeypatch.setenv("SFERD_LAB_TINY", "1")
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "jupyter"))
    manager, client = start_new_kernel(kernel_name="python3", cwd=str(ROOT), startup_timeout=600)
    try:

        def run(name: str) -> dict[str, object]:
            return client.execute_interactive(CELL.format(folder=str(tmp_path / name), steps=120), timeout=300, output_hook=lambda _: None)[
                "content"
            ]

        assert run("whole")["status"] == "ok"
        checkpoint = tmp_path / "run" / "checkpoints" / "teacher.safetensors"
        cell = CELL.format(folder=str(tmp_path / "run"), steps=120)
        message = client.execute(cell)
        deadline = time.monotonic() + 300
        while not checkpoint.exists():
            assert time.monotonic() < deadline, "no checkpoint"
            time.sleep(0.005)
        manager.interrupt_kernel()
        while (reply := client.get_shell_msg(timeout=300))["parent_header"]["msg_id"] != message:
            pass
        assert (reply["content"]["status"], reply["content"]["ename"]) == ("error", "KeyboardInterrupt")
        reached = step(checkpoint)
        assert 10 <= reached < 120
        assert not (tmp_path / "run" / "weights").exists()
        assert run("run")["status"] == "ok"
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    for file in ("weights/teacher.safetensors", "training.csv"):
        assert (tmp_path / "run" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == json.loads((tmp_path / "whole" / "config.json").read_text())
