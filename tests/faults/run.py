"""Kill a run at random moments, start it again, and compare what it ends with, byte for byte, with a run that was never disturbed.

    .venv/bin/python tests/faults/run.py [kills=30] [table=FILE] [case ...]

Six cases: the ones of ``FORKED`` are calls on a run folder, each in a process forked from this one, which has imported everything and
computed nothing: so a kill costs a second and not the imports. Those of ``COMMANDS`` are the commands themselves. A kill is SIGKILL for
the whole process tree, at a moment drawn uniformly from the time that the undisturbed run takes (a command's from its config.json on);
where the run is faster than its moment, that is not counted and another one is drawn. A checkpoint's write takes milliseconds, which no
other process can aim at: there the kernel ends the process, by a timer that the process itself has set as it began to write (SIGALRM, as
deadly as SIGKILL while nobody handles it), after a time drawn from that of a write.

After a kill every file must be whole. Then the same call must end well and leave the reference's weights, samples, ``training.csv`` and
``metrics.csv`` (of a sweep also ``table.csv``), without the rows of ``sampling_ms_per_image``; ``stages.csv``, a record of time, and
figures are not compared. Weights that were there at the kill must be the same file still: a finished stage is not trained again. Nothing
may be left of half-written files.

The tally goes to ``data/results/reliability.csv`` after every case. Exit status 0: every kill ended with the same bytes.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import statistics
import sys
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import psutil
import torch

import sferd_lab.train as training
from sferd_lab.config import make_settings
from sferd_lab.errors import SferdError
from sferd_lab.experiment import Run, read_table
from sferd_lab.files import load_tensors, read_json, replacing

ROOT = Path(__file__).resolve().parent.parent.parent
TABLE = ROOT / "data" / "results" / "reliability.csv"
# Beside SFERD_LAB_TINY: stages long enough to be killed within, and checkpoints close enough that most kills find one.
SMALL = {
    "widths": [8, 8], "blocks": 1, "device": "cpu", "retrain": True, "checkpoint_every": 4, "methods": ["pd"], "guided": [False],
    "teacher_steps": 40, "pd_start_steps": 4, "pd_stage_steps": [20, 20], "sgp_steps": 30, "sgp_distil_steps": 10, "sampling_steps": [1],
    "teacher_sampling_steps": [1, 2],
}  # fmt: skip
TIMEOUT = 600  # seconds for one call
# What a run imports on its way, so that a forked one need not.
ON_THE_WAY = ("accelerate", "torch._dynamo", "scipy.linalg", "scipy.ndimage", "sklearn.datasets", "sklearn.mixture", "sklearn.neighbors")


# ---- what is called


def run_in(folder: Path, **given: object) -> Run:
    return Run(make_settings("digits", run_folder=str(folder), **{**SMALL, **given}), progress=False)


def train_teacher(folder: Path) -> None:
    run_in(folder).teacher()


def distil(folder: Path) -> None:
    run = run_in(folder)
    run.progressive(run.teacher(), guided=False)
    for _ in run.evaluate_students():
        pass


def train_predictor(folder: Path) -> None:
    run = run_in(folder)
    run.prior("teacher-sgp", run.semantic_teacher(run.teacher()))


def checkpoint_every_step(folder: Path) -> None:
    run_in(folder, checkpoint_every=1, teacher_steps=30).teacher()


# The call, and whether its folder begins with a finished teacher.
FORKED: dict[str, tuple[Callable[[Path], None], bool]] = {
    "teacher training": (train_teacher, False),
    "PD stages and their scores": (distil, True),
    "SGP training and its prior": (train_predictor, True),
    "checkpoint write": (checkpoint_every_step, False),
}


def notebook(folder: Path) -> list[str]:
    parameters = json.dumps({**SMALL, "run_folder": str(folder)})
    command = [sys.executable, "-m", "papermill", str(ROOT / "notebooks" / "experiment.ipynb"), str(folder / "executed.ipynb")]
    return [*command, "--no-progress-bar", "-y", parameters]


def sweep(folder: Path) -> list[str]:
    file = folder.with_suffix(".yaml")
    file.write_text(json.dumps({"parameters": {**SMALL, "sgp": False}, "grid": {"seed": [1, 2]}}), encoding="utf-8")
    return [sys.executable, "-m", "sferd_lab.sweep", str(file), str(folder), "workers=2", "retries=0"]


COMMANDS = {"experiment notebook": notebook, "sweep": sweep}


# ---- starting and killing


class Call:
    """A case's call in ``folder``, running: forked, or a command. ``aim``: it ends so many seconds after the start of its write number."""

    def __init__(self, case: str, folder: Path, aim: tuple[int, float] | None = None) -> None:
        self.folder, self.log = folder, folder.with_suffix(".log")
        self.marks = -1
        # For each write of a checkpoint the seconds that it took, "" for one that was begun and not finished; known at the end.
        self.writes: list[str] = []
        folder.mkdir(exist_ok=True)
        if case in COMMANDS:
            with self.log.open("ab") as log:
                self.process = psutil.Popen(COMMANDS[case](folder), stdout=log, stderr=log, cwd=folder.parent, start_new_session=True)
            return
        self.marks, end = os.pipe()
        if (pid := os.fork()) == 0:
            _child(FORKED[case][0], folder, self.log, end, aim)
        os.close(end)
        self.process = psutil.Process(pid)

    def wait(self) -> int:
        """The exit status, negative for a signal's. Raises psutil.TimeoutExpired."""
        status = self.process.wait(TIMEOUT)
        if self.marks >= 0:
            with os.fdopen(self.marks) as marks:
                self.writes = marks.read().split("(")[1:]
        return status

    def ended_within(self, seconds: float) -> bool:
        """Whether it ended by itself before that time was over."""
        with suppress(psutil.TimeoutExpired):
            self.process.wait(seconds)
            return True
        return False

    def has_begun(self) -> bool:
        """Wait until the work has, for a command: the configuration of a run is there."""
        while not any(self.folder.rglob("config.json")):
            if self.ended_within(0.02):
                return False
        return True

    def kill(self) -> None:
        """SIGKILL to the whole tree; a command's is stopped first, so that none starts another meanwhile."""
        if self.marks >= 0:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            return
        tree: list[psutil.Process] = []
        while True:
            with suppress(psutil.NoSuchProcess):
                found = [process for process in [self.process, *self.process.children(recursive=True)] if process not in tree]
                if not found:
                    break
                for process in found:
                    tree.append(process)
                    with suppress(psutil.NoSuchProcess):
                        process.suspend()
                continue
            break
        for process in tree:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(tree, timeout=30)


def _child(work: Callable[[Path], None], folder: Path, log: Path, marks: int, aim: tuple[int, float] | None) -> None:
    """What a forked process does, and no more."""
    status, count = 1, 0
    try:
        os.setsid()
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        save = training.save_checkpoint

        def marked(*arguments: object) -> None:
            nonlocal count
            count += 1
            os.write(marks, b"(")
            if aim is not None and aim[0] == count:
                signal.setitimer(signal.ITIMER_REAL, aim[1])
            began = time.monotonic()
            save(*arguments)
            os.write(marks, f"{time.monotonic() - began:.6f}".encode())

        training.save_checkpoint = marked
        work(folder)
        status = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


# ---- what is there


def contents(folder: Path) -> dict[str, bytes]:
    """What must be the same bytes: weights, samples and tables, without measured times."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".safetensors":
            found[name] = path.read_bytes()
        elif path.name in ("metrics.csv", "training.csv", "table.csv"):
            lines = path.read_bytes().splitlines(keepends=True)
            found[name] = b"".join(line for line in lines if b",sampling_ms_per_image," not in line)
    return found


def half_written(folder: Path) -> str:
    """The first file that cannot be read as a whole one, with the reason; empty if all can."""
    readers: dict[str, Callable[[Path], object]] = {".safetensors": load_tensors, ".json": read_json, ".csv": _whole_table}
    for path in sorted(folder.rglob("*")):
        if path.suffix in readers and not path.name.startswith("."):
            try:
                readers[path.suffix](path)
            except (SferdError, ValueError) as error:
                return f"{path.relative_to(folder)}: {error}"
    return ""


def _whole_table(path: Path) -> None:
    read_table(path)
    if not path.read_bytes().endswith(b"\n"):
        raise ValueError("its last line is cut")


def stamps(folder: Path) -> dict[Path, tuple[int, int]]:
    """Which files the weights are."""
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.rglob("weights/*.safetensors")}


def left_over(folder: Path) -> list[Path]:
    """Checkpoints of finished stages, and what a killed process was writing."""
    written = (path for path in folder.rglob(".*.tmp") if path.parent.name != "figures" and not path.name.startswith(".executed"))
    return [*folder.rglob("checkpoints/*.safetensors"), *written]


# ---- a case


class Trials:
    """One case: its reference, and what came of every kill."""

    def __init__(self, case: str, scratch: Path) -> None:
        self.case, self.scratch = case, scratch / case.replace(" ", "-")
        self.scratch.mkdir()
        self.random = np.random.default_rng(zlib.crc32(case.encode()))
        self.prepared: Path | None = None
        if case in FORKED and FORKED[case][1]:
            self.prepared = self.scratch / "prepared"
            self._end(Call("teacher training", self.prepared))
        call = self._start("reference")
        if case in COMMANDS and not call.has_begun():
            raise RuntimeError(f"{case} did not begin: {call.log.read_text(errors='replace')[-2000:]}")
        started = time.monotonic()
        self._end(call)
        self.seconds = time.monotonic() - started
        self.writes = [float(seconds) for seconds in call.writes]
        self.reference = contents(call.folder)
        self.tally: Counter[str] = Counter()

    def _start(self, name: str, aim: tuple[int, float] | None = None) -> Call:
        folder = self.scratch / name
        if self.prepared is not None and not folder.exists():
            shutil.copytree(self.prepared, folder)
        return Call(self.case, folder, aim)

    @staticmethod
    def _end(call: Call) -> None:
        if status := call.wait():
            raise RuntimeError(f"an undisturbed call ended with {status}: {call.log.read_text(errors='replace')[-2000:]}")

    def kill_one(self, number: int) -> None:
        """Start in a fresh folder, kill, start again, compare; nothing is counted if it ended before its moment."""
        started = time.monotonic()
        if self.case == "checkpoint write":
            aim = (int(self.random.integers(len(self.writes))) + 1, self.random.uniform(1e-6, statistics.median(self.writes)))
            call = self._start(f"trial-{number}", aim)
        else:
            call = self._start(f"trial-{number}")
            if self.case in FORKED or call.has_begun():
                call.ended_within(self.random.uniform(0, self.seconds))
            call.kill()
        if call.wait() not in (-signal.SIGKILL, -signal.SIGALRM):
            self.seconds = min(self.seconds, time.monotonic() - started)  # the machine is faster than it was
            return
        inside = call.writes[-1:] == [""]
        damage, finished = half_written(call.folder), stamps(call.folder)
        waiting = any(call.folder.rglob("checkpoints/*.safetensors"))
        again = self._start(f"trial-{number}")
        outcome = f"half-written file read: {damage}" if damage else self._outcome(again, finished)
        self.tally[outcome] += 1
        self.tally["(with a checkpoint to go on from)"] += waiting
        self.tally["(inside the writing of a checkpoint)"] += inside
        self.tally["(with finished stages)"] += bool(finished)
        if outcome == "same bytes":
            shutil.rmtree(call.folder)

    def _outcome(self, again: Call, finished: dict[Path, tuple[int, int]]) -> str:
        if status := again.wait():
            return f"the same call ended with {status}: {again.log.read_text(errors='replace').strip().splitlines()[-1]}"
        found = contents(again.folder)
        if differing := sorted(name for name in found.keys() | self.reference.keys() if found.get(name) != self.reference.get(name)):
            return f"other bytes: {', '.join(differing)}"
        now = stamps(again.folder)
        if repeated := sorted(path.name for path, stamp in finished.items() if now[path] != stamp):
            return f"finished and made again: {', '.join(repeated)}"
        if left := left_over(again.folder):
            return f"left over: {', '.join(path.name for path in left)}"
        return "same bytes"


def record(part: str, case: str, tally: dict[str, int], table: Path) -> None:
    """Put a case's counts into the table in place of those that it had."""
    rows = pd.DataFrame([{"part": part, "case": case, "outcome": outcome, "count": count} for outcome, count in tally.items()])
    if table.exists():
        old = pd.read_csv(table)
        rows = pd.concat([old[(old["part"] != part) | (old["case"] != case)], rows], ignore_index=True)
    with replacing(table) as temporary:
        rows.to_csv(temporary, index=False)


def main(words: list[str]) -> int:
    options = dict(word.split("=", 1) for word in words if "=" in word)
    cases = [word for word in words if "=" not in word] or [*FORKED, *COMMANDS]
    if unknown := [*(set(options) - {"kills", "table"}), *(set(cases) - {*FORKED, *COMMANDS})]:
        raise SystemExit(f"{unknown[0]}; allowed: kills=..., table=..., {', '.join([*FORKED, *COMMANDS])}")
    kills, table = int(options.get("kills", "30")), Path(options.get("table", TABLE))
    for module in ON_THE_WAY:
        importlib.import_module(module)
    torch.set_num_threads(1)  # a forked process has none of its parent's threads
    bad = 0
    with TemporaryDirectory(prefix="sferd-faults-") as name:
        scratch = Path(name)
        os.environ |= {
            "SFERD_LAB_TINY": "1", "SFERD_LAB_WIDGETS": "0", "OMP_NUM_THREADS": "1", "TQDM_MININTERVAL": "10",
            "JUPYTER_RUNTIME_DIR": str(scratch / "jupyter"), "DASK_TEMPORARY_DIRECTORY": str(scratch / "dask"),
        }  # fmt: skip
        for case in cases:
            began = time.monotonic()
            trials = Trials(case, scratch)
            for number in range(20 * kills):
                if sum(count for outcome, count in trials.tally.items() if not outcome.startswith("(")) == kills:
                    break
                trials.kill_one(number)
            tally = {outcome: count for outcome, count in trials.tally.items() if count}
            record("faults", case, tally, table)
            bad += sum(count for outcome, count in tally.items() if outcome != "same bytes" and not outcome.startswith("("))
            bad += tally.get("same bytes", 0) == 0
            print(f"{case}: {tally}, {time.monotonic() - began:.0f} s (undisturbed {trials.seconds:.1f} s)", flush=True)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
