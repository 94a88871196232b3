"""One process works in a run's folder, and any number read what is finished there."""

from __future__ import annotations

import errno
import fcntl
import functools
import gc
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sferd_lab import experiment, processes
from sferd_lab.config import make_settings
from sferd_lab.errors import SferdError
from sferd_lab.experiment import Run, launch
from sferd_lab.files import load_tensors, work_in
from sferd_lab.metrics import Scorer

# A process that has trained a teacher, says so, and lives until its input ends.
HOLDER = """
import sys
from sferd_lab.config import make_settings
from sferd_lab.experiment import Run
run = Run(make_settings("digits", run_folder=sys.argv[1], widths=[8, 8], retrain=True, device="cpu"), progress=False)
run.teacher()
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFERD_LAB_TINY", "1")
    monkeypatch.setattr(experiment, "Scorer", functools.partial(Scorer, floor_splits=2))


def start(folder: Path, **given: object) -> Run:
    return Run(
        make_settings("digits", run_folder=str(folder), **{"widths": [8, 8], "retrain": True, "device": "cpu", **given}), progress=False
    )


def is_free(folder: Path) -> bool:
    """Whether a stranger could have the lock: this process's own does not open it for another file of the same process."""
    handle = os.open(folder / ".working.lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(handle)
    return True


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process, at work in ``tmp_path / "run"``."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


def test_a_second_process_reads_what_is_finished_is_refused_work_and_has_it_once_the_first_is_killed(
    holder: subprocess.Popen[str], tmp_path: Path
) -> None:
    run = start(tmp_path / "run")
    teacher = run.teacher()
    before = sorted(tmp_path.rglob("*"))
    for work in (lambda: run.progressive(teacher, False), run.evaluate_known_bad, lambda: next(run.evaluate_teacher())):
        with pytest.raises(SferdError) as caught:
            work()
        assert str(caught.value) == (
            f"process {holder.pid} on {platform.node()} is working in {tmp_path / 'run'}; allowed: one process at a time. Wait until it "
            "has ended, end it (if it is a notebook's, shut its kernel down), or take another run_folder"
        )
    assert sorted(tmp_path.rglob("*")) == before
    holder.kill()
    holder.wait()
    run.progressive(teacher, False)
    assert json.loads((tmp_path / "run" / ".working.json").read_text()) == {"pid": os.getpid(), "host": platform.node()}


def test_the_lock_is_taken_by_the_first_work_and_kept_while_a_run_of_the_process_lives(tmp_path: Path) -> None:
    first = start(tmp_path)
    assert is_free(tmp_path)
    first.teacher()
    assert not is_free(tmp_path)
    second = start(tmp_path)
    second.evaluate_known_bad()
    del first
    gc.collect()
    assert not is_free(tmp_path)
    second.teacher()
    del second
    gc.collect()
    assert is_free(tmp_path)
    third = start(tmp_path)
    third.teacher()
    third.evaluate_known_bad()
    assert is_free(tmp_path), "what only reads takes none"


def test_a_fork_has_no_lock_of_its_parent_s(tmp_path: Path) -> None:
    lock = work_in(tmp_path)
    child = os.fork()
    if child == 0:
        try:
            held = lock.held
            try:
                work_in(tmp_path)
            except SferdError as error:
                os._exit(0 if f"process {os.getppid()} on" in str(error) and not held else 1)
            os._exit(2)
        finally:
            os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert not is_free(tmp_path), "the child's end is not the parent's"


def test_a_launch_leaves_the_folder_to_the_new_processes_and_has_it_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = start(tmp_path)
    teacher = run.teacher()
    free: list[bool] = []
    monkeypatch.setattr(processes, "launch", lambda *_: free.append(is_free(tmp_path)))
    launch(run.settings.model_copy(update={"processes": 2}))
    assert free == [True]
    run.progressive(teacher, False)
    assert not is_free(tmp_path)


def test_who_is_at_work_without_a_name_is_another_process(tmp_path: Path) -> None:
    with (tmp_path / ".working.lock").open("w") as stranger:
        fcntl.flock(stranger, fcntl.LOCK_EX)
        for content in (None, "[]", "{"):
            if content is not None:
                (tmp_path / ".working.json").write_text(content)
            with pytest.raises(SferdError, match=r"^another process is working in"):
                work_in(tmp_path)
    assert work_in(tmp_path).held


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
@pytest.mark.filterwarnings("ignore")
def test_a_file_system_without_locks_is_refused_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    run = start(tmp_path)
    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(SferdError, match=f"the file system of {tmp_path} has no locks, .*allowed: a run_folder on a local disk"):
        run.teacher()
    assert not (tmp_path / "weights").exists()
    monkeypatch.undo()
    monkeypatch.setenv("SFERD_LAB_TINY", "1")
    run.teacher()


def test_a_folder_removed_underneath_is_noticed_and_a_new_run_begins_again(tmp_path: Path) -> None:
    run = start(tmp_path / "run")
    teacher = run.teacher()
    weights = (tmp_path / "run" / "weights" / "teacher.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "run")
    for work in (lambda: run.progressive(teacher, False), run.evaluate_known_bad, run.teacher):
        with pytest.raises(SferdError, match=rf"{tmp_path / 'run'} was removed or replaced while process {os.getpid()} was working in it"):
            work()
        assert not (tmp_path / "run").exists()
    again = start(tmp_path / "run")
    again.teacher()
    assert (tmp_path / "run" / "weights" / "teacher.safetensors").read_bytes() == weights
    assert not is_free(tmp_path / "run")
    with pytest.raises(SferdError, match="was removed or replaced"):
        run.evaluate_known_bad()  # the old one's folder is not this


def test_of_two_that_began_at_once_in_a_new_folder_the_one_whose_settings_were_overwritten_ends(tmp_path: Path) -> None:
    one = start(tmp_path, seed=1)
    (tmp_path / "config.json").unlink()  # the other looked before it was there
    two = start(tmp_path, seed=2)
    with pytest.raises(SferdError, match=f"run folder {tmp_path} was made with seed = 2, these settings have 1"):
        one.teacher()
    two.teacher()


def test_what_a_killed_process_was_writing_is_cleared_by_the_next_that_works_there_and_by_no_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(tmp_path).teacher()
    left = [tmp_path / part / ".teacher.safetensors.x1y2.tmp" for part in ("weights", "checkpoints", "samples")]
    left.append(tmp_path / ".metrics.csv.x1y2.tmp")
    # Figures are drawn without the lock: this one may be another's, who is at it.
    drawn = tmp_path / "figures" / ".fd.png.x1y2.tmp"
    for path in (*left, drawn):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"half")
    gc.collect()
    run = start(tmp_path)
    run.teacher()
    assert all(path.exists() for path in left)
    run.evaluate_known_bad()
    assert not any(path.exists() for path in left)
    assert drawn.exists()
    assert load_tensors(tmp_path / "weights" / "teacher.safetensors")
