"""Several processes do what one does: the same losses, weights, images and tables, to rounding; every file is written once.

Two processes over gloo stand for two GPUs over NCCL: the same code, but for the network between them.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch

from sferd_lab import processes
from sferd_lab.config import make_settings
from sferd_lab.errors import SferdError
from sferd_lab.experiment import launch, read_table
from sferd_lab.files import load_tensors, work_in
from sferd_lab.train import TrainSettings, train

sys.path.insert(0, str(Path(__file__).parent / "processes"))
import stages as work

STAGES = list(work.STAGES)
# Losses of two halves added up differ from the whole's by rounding. Adam divides by the gradient's size, which blows rounding up where
# the gradient is near zero: by less than the learning rate (1e-3) a step.
LOSS, WEIGHT = 1e-5, 1e-3


def run(count: int, *command: str) -> str:
    """What ``command`` prints in ``count`` processes of one thread each."""
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"] if count > 1 else []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "SFERD_LAB_TINY": "1", "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen(
        [sys.executable, *several, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            out, errors = process.communicate(timeout=900)
        except subprocess.TimeoutExpired:
            for child in psutil.Process(process.pid).children(recursive=True):  # which would outlive the launcher
                child.kill()
            process.kill()
            raise
    assert process.returncode == 0, errors[-20_000:]
    return out


def results(folder: Path, rank: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    return {name: load_tensors(folder / f"{name}-{rank}.safetensors")[0] for name in STAGES}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    """All stages in one process, never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    work.main(folder, None)
    return results(folder)


@pytest.fixture(scope="module")
def parted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same by two processes, stopped after step 4, where there is a checkpoint."""
    folder = tmp_path_factory.mktemp("parted")
    run(2, work.__file__, str(folder), "4")
    return folder


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], steps: int) -> None:
    torch.testing.assert_close(found["losses"][:steps], wanted["losses"][:steps], rtol=LOSS, atol=LOSS)
    if steps == len(wanted["losses"]):
        for name, tensor in wanted.items():
            torch.testing.assert_close(found[name].double(), tensor.double(), rtol=0, atol=WEIGHT, msg=name)


@pytest.mark.parametrize("name", STAGES)
def test_two_processes_have_one_process_s_losses(whole: dict, parted: Path, name: str) -> None:
    # The first process alone has written the checkpoints of steps 2 and 4.
    for rank, written in ((0, 2), (1, 0)):
        assert load_tensors(parted / f"{name}-{rank}.safetensors")[1] == {"processes": 2, "checkpoints": written}
    for rank in (0, 1):
        assert_same(results(parted, rank)[name], whole[name], 4)
    first, second = (results(parted, rank)[name] for rank in (0, 1))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_one_process_goes_on_where_two_stopped(whole: dict, parted: Path, tmp_path: Path) -> None:
    for name in STAGES:
        (tmp_path / f"{name}-checkpoint.safetensors").write_bytes((parted / f"{name}-checkpoint.safetensors").read_bytes())
    work.main(tmp_path, None)
    for name in STAGES:
        assert_same(results(tmp_path)[name], whole[name], 6)


def test_two_processes_go_on_where_one_stopped(whole: dict, tmp_path: Path) -> None:
    work.main(tmp_path, 4)
    run(2, work.__file__, str(tmp_path))
    for name in STAGES:
        assert_same(results(tmp_path, 1)[name], whole[name], 6)


SMALL = ["methods=['pd']", "guided=[True]", "sampling_batch=16", "checkpoint_every=2", "pd_start_steps=4", "pd_stage_steps=[2,2]"]


@pytest.fixture(scope="module")
def experiments(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """A whole tiny experiment by one process and by two."""
    folder = tmp_path_factory.mktemp("experiments")
    for count in (1, 2):
        run(count, "-m", "sferd_lab.experiment", "preset=digits", f"run_folder={folder / str(count)}", *SMALL)
    return {count: folder / str(count) for count in (1, 2)}


def test_the_table_has_the_same_rows_and_each_once(experiments: dict[int, Path]) -> None:
    one, two = (read_table(experiments[count] / "metrics.csv") for count in (1, 2))
    key = ["method", "guidance", "sgp", "z", "sampler", "steps", "metric"]
    assert not two.duplicated(key).any()
    both = one.merge(two, on=key, how="outer", suffixes=("", "_two"), indicator=True)
    assert (both["_merge"] == "both").all()
    timed = both["metric"] == "sampling_ms_per_image"
    # The rounding of the weights shows in the scores: by 4e-7 of them where this was written.
    assert both.loc[~timed, "value_two"].to_numpy() == pytest.approx(both.loc[~timed, "value"].to_numpy(), rel=1e-4, abs=1e-6)
    assert (both["n"] == both["n_two"]).all()


def test_the_teacher_s_images_and_scores_do_not_depend_on_the_number_of_processes(experiments: dict[int, Path]) -> None:
    names = [path.name for path in (experiments[1] / "samples").glob("teacher--*.safetensors")]
    assert len(names) >= 3
    for name in names:
        one, two = (load_tensors(experiments[count] / "samples" / name)[0]["images"] for count in (1, 2))
        assert torch.equal(one, two)
        assert len(one) == 64
    one, two = (read_table(experiments[count] / "metrics.csv") for count in (1, 2))
    rows = (one["method"] == "teacher") & (one["sgp"] == "") & one["metric"].isin(["fd", "kid", "recall", "memorisation_ratio"])
    wanted = one[rows].set_index(["steps", "guidance", "metric"])["value"]
    found = two[(two["method"] == "teacher") & (two["sgp"] == "")].set_index(["steps", "guidance", "metric"])["value"]
    pd.testing.assert_series_equal(found.loc[wanted.index], wanted, rtol=1e-9)


def test_a_run_s_students_are_those_of_one_process(experiments: dict[int, Path]) -> None:
    # The default device, "auto": what each process would do alone, on its half of every batch, is not this.
    one, two = (pd.read_csv(experiments[count] / "training.csv") for count in (1, 2))
    assert one["stage"].tolist() == two["stage"].tolist()
    assert two["loss"].to_numpy() == pytest.approx(one["loss"].to_numpy(), rel=1e-4)
    names = {path.name for path in (experiments[1] / "weights").iterdir()}
    assert names == {path.name for path in (experiments[2] / "weights").iterdir()}
    for name in sorted(names):
        if not name.endswith("-prior.safetensors"):
            a, b = (load_tensors(experiments[count] / "weights" / name)[0] for count in (1, 2))
            for key, tensor in a.items():
                torch.testing.assert_close(b[key].double(), tensor.double(), rtol=0, atol=WEIGHT, msg=f"{name}: {key}")


def test_training_flops_count_all_processes(experiments: dict[int, Path]) -> None:
    one, two = (pd.read_csv(experiments[count] / "stages.csv").set_index("stage")["tflop"] for count in (1, 2))
    pd.testing.assert_series_equal(one, two, rtol=1e-9)


def test_a_run_goes_on_with_another_number_of_processes(experiments: dict[int, Path]) -> None:
    before = {path: path.stat().st_mtime_ns for path in sorted(experiments[2].rglob("*")) if path.is_file()}
    run(1, "-m", "sferd_lab.experiment", "preset=digits", f"run_folder={experiments[2]}", *SMALL)
    assert {path: path.stat().st_mtime_ns for path in sorted(experiments[2].rglob("*")) if path.is_file()} == before


def test_a_notebook_s_launch_does_the_run_in_processes_of_its_own(tmp_path: Path) -> None:
    script = (
        "from sferd_lab.config import make_settings; from sferd_lab.experiment import Run, launch; "
        f"settings = make_settings('digits', run_folder={str(tmp_path / 'run')!r}, processes=2, methods=[], sgp=False, guided=[False]); "
        "run = Run(settings); run.teacher(); launch(settings)"  # what this process does first must not keep the others out
    )
    run(1, "-c", script)
    assert set(read_table(tmp_path / "run" / "metrics.csv")["method"]) >= {"teacher", "blurred real"}
    assert json.loads((tmp_path / "run" / "config.json").read_text())["settings"]["processes"] == 1


def test_where_another_process_works_all_processes_end_in_words(tmp_path: Path) -> None:
    lock = work_in(tmp_path)
    with pytest.raises(AssertionError) as caught:  # and not TimeoutExpired
        run(2, "-m", "sferd_lab.experiment", "preset=digits", f"run_folder={tmp_path}", *SMALL)
    assert lock.held
    words = f"process {os.getpid()} on {platform.node()} is working in {tmp_path}"
    lines = [line.strip() for line in str(caught.value).splitlines()]  # pytest indents all but the first
    said = [line for line in lines if line.startswith((words, f"the first of 2 processes failed: SferdError: {words}"))]
    stopped = [line for line in lines if "closing signal SIGTERM" in line]  # the launcher's, if it saw the other end first
    assert said, caught.value
    assert len(said) + len(stopped) >= 2, caught.value
    assert not any("sferd_lab/experiment.py" in line for line in lines), caught.value  # words, and no traceback of ours
    assert not (tmp_path / "weights").exists()


def test_one_process_launches_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "launch", None)
    launch(make_settings("digits"))


def test_shares_are_whole_batches_and_make_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    for n, unit, count in ((1000, 250, 1), (1000, 250, 3), (1000, 250, 4), (1001, 250, 4), (5, 250, 3), (7, 1, 7), (250, 100, 2)):
        monkeypatch.setattr(processes, "count", lambda count=count: count)
        parts = []
        for rank in range(count):
            monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
            parts.append(processes.share(n, unit))
        assert [item for part in parts for item in part] == list(range(n))
        assert all(len(part) for part in parts)
        if -(-n // unit) >= count:
            assert all(part.start % unit == 0 for part in parts)
    monkeypatch.setattr(processes, "count", lambda: 3)
    with pytest.raises(SferdError, match="2 images for 3 processes; allowed: one image a process or more"):
        processes.share(2, 1)


def test_a_batch_that_cannot_be_parted_is_refused() -> None:
    settings = TrainSettings(steps=1, batch_size=8, accumulate=3, device="cpu")
    with pytest.raises(SferdError, match="batch_size = 8 in 1 processes x accumulate = 3 parts; allowed: equal parts"):
        next(train(work.unet(1), work.STAGES["progressive"][1], work.PLAIN, settings))
