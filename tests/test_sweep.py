"""Sweeps: every run is done exactly once, whatever fails or dies, and what cannot be run is refused before anything is.

The notebooks are made here and import nothing heavy. They note in their run folder what they have come to, so that starts and completions
can be counted.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from sferd_lab.errors import SferdError
from sferd_lab.files import read_json, write_json
from sferd_lab.sweep import Sweep, _execute_notebook, main, read_sweep, run_name, run_sweep

PATIENCE = 600  # seconds: a loaded machine takes minutes to start a few processes
# Every way in which text could break out of a literal.
SPELL = """'"; raise SystemExit  # \\" \\' \\\\ \n {run_folder} %s é"""
PARAMETERS = 'text: str = "none"\nspell: str = ""\nnumbers: list = None\nrun_folder: str = None'
NOTE = """
import json, os
from pathlib import Path

def note(word):
    with (Path(run_folder) / "notes").open("a") as file:
        file.write(f"{word} {os.getpid()}\\n")

note("started")
"""
FAIL = """
if text == "bad":
    raise ValueError("bad on purpose")
if text == "late" and (Path(run_folder) / "notes").read_text().count("started") == 1:
    raise RuntimeError("only the first time")
"""
FINISH = """
names = ("OMP_NUM_THREADS", "SFERD_LAB_WIDGETS")
seen = {"text": text, "spell": spell, "numbers": numbers, "environment": {name: os.environ[name] for name in names}, "cwd": os.getcwd()}
(Path(run_folder) / "seen.json").write_text(json.dumps(seen))
(Path(run_folder) / "metrics.csv").write_text("metric,value\\nfd,1.5\\nkid,2.5\\n")
note("completed")
"""
# Until the test lets it, for no longer than the test would wait.
WAIT = f"""
import time
for _ in range({PATIENCE * 10}):
    if (Path(run_folder).parent / "go").exists():
        break
    time.sleep(0.1)
"""


def make_notebook(path: Path, *cells: str, parameters: str = PARAMETERS, tags: Sequence[str] = ("parameters",)) -> Path:
    made = new_notebook(cells=[new_code_cell(parameters, metadata={"tags": list(tags)}), *map(new_code_cell, cells)])
    made.metadata["kernelspec"] = {"name": "python3", "language": "python", "display_name": "Python 3"}
    nbformat.write(made, path)
    return path


def notes(run: Path) -> list[str]:
    """The words that a run has noted."""
    path = run / "notes"
    return [line.split()[0] for line in path.read_text().splitlines()] if path.exists() else []


def has_ended(process: psutil.Process) -> bool:
    """Whether it is gone, or would be if somebody asked for its exit status."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_until(condition: Callable[[], Any]) -> Any:
    end = time.monotonic() + PATIENCE
    while not (result := condition()):
        assert time.monotonic() < end, "nothing came"
        time.sleep(0.1)
    return result


# ---- what is refused


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return make_notebook(tmp_path / "small.ipynb")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("parameters: {text: a}", "has no 'grid'; allowed: grid, parameters, notebook"),
        ("[1, 2]", "has no 'grid'"),
        ("grid: {text: [a]}\nworkers: 3", "unknown key 'workers'; allowed: grid, parameters, notebook"),
        ("grid: {text: [a]}\nnotebook: 3", "notebook = 3; allowed: the path of a notebook"),
        ("grid: {text: [a]}\nnotebook: none.ipynb", "notebook none.ipynb is missing"),
        ("grid: {text: [a", "cannot be read as YAML"),
        ("grid: !!python/object/apply:os.getcwd []", "cannot be read as YAML"),
        ("grid: [text]", r"grid = \['text'\]; allowed: names with their values"),
        ("grid: {text: [a]}\nparameters: 3", "parameters = 3; allowed: names with their values"),
        ("grid: {}", "grid is empty; allowed: one parameter or more"),
        ("grid: {text: []}", r"grid: text = \[\]; allowed: a list of one value or more"),
        ("grid: {text: abc}", "grid: text = 'abc'; allowed: a list of one value or more"),
        ("grid: {text: [a, b, a]}", "grid: text = .*; allowed: different values"),
        ("grid: {txt: [a]}", "parameter 'txt' of small.ipynb; allowed: numbers, spell, text"),
        ("grid: {text: [a]}\nparameters: {spel: b}", "parameter 'spel' of small.ipynb; allowed: numbers, spell, text"),
        ("grid: {3: [a]}", "parameter 3 of small.ipynb; allowed: numbers, spell, text"),
        ("grid: {run_folder: [a]}", "parameter 'run_folder' of small.ipynb; allowed: numbers, spell, text"),
        ("grid: {text: [a]}\nparameters: {text: b}", "'text' is in parameters and in grid; allowed: one of them"),
        ("grid: {text: [{a: 1}]}", "text = {'a': 1}; allowed: text, finite numbers, booleans, null, and lists of these"),
        ("grid: {text: [[[1]]]}", r"text = \[\[1\]\]; allowed: text, finite numbers"),
        ("grid: {text: [2026-01-01]}", "text = datetime.date.*; allowed: text, finite numbers"),
        ("grid: {text: [a]}\nparameters: {spell: .nan}", "spell = nan; allowed: text, finite numbers"),
        ("grid: {text: [1e-3]}", "text = '1e-3', which YAML reads as text; allowed: a number with a point, as 1.0e-3"),
    ],
)
def test_a_file_that_is_no_sweep_is_refused(small: Path, monkeypatch: pytest.MonkeyPatch, text: str, words: str) -> None:
    monkeypatch.chdir(small.parent)
    path = Path("sweep.yaml")
    path.write_text(text if "notebook" in text else f"{text}\nnotebook: small.ipynb" if "grid:" in text else text)
    with pytest.raises(SferdError, match=words):
        read_sweep(path)


def test_files_that_are_missing_or_no_notebooks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SferdError, match=r"sweep.yaml is missing"):
        read_sweep(tmp_path / "sweep.yaml")
    path = tmp_path / "text.ipynb"
    for content in ("no JSON", "[]", "{}"):
        path.write_text(content)
        with pytest.raises(SferdError, match=r"text.ipynb"):
            Sweep({"text": ["a"]}, notebook=path)
    make_notebook(path, tags=[])
    with pytest.raises(SferdError, match=r"parameter 'text' of text.ipynb; allowed: none, no cell of it is tagged 'parameters'"):
        Sweep({"text": ["a"]}, notebook=path)


def test_every_combination_of_an_experiments_settings_is_checked_first() -> None:
    # Each value alone is allowed: 3 heads divide 24 channels, and not 32.
    assert len(Sweep({"heads": [2, 4], "widths": [[32, 32], [24, 24]]}).runs) == 4
    with pytest.raises(SferdError, match="heads = 3; allowed: common divisors of widths"):
        Sweep({"heads": [2, 3], "widths": [[24, 24], [32, 32]]})
    with pytest.raises(SferdError, match="parameter 'guidance_weight' = 99"):
        Sweep({"seed": [1], "guidance_weight": [0.3, 99]}, {"preset": "digits"})
    with pytest.raises(SferdError, match="preset = 'digit'; allowed: digits"):
        Sweep({"seed": [1]}, {"preset": "digit"})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"workers": 0}, "workers = 0; allowed: 1 or more"),
        ({"workers": True}, "workers = True; allowed: 1 or more"),
        ({"retries": -1}, "retries = -1; allowed: 0 or more"),
        ({"retries": "2"}, "retries = '2'; allowed: 0 or more"),
        ({"time_limit": 0}, "time_limit = 0; allowed: None or seconds above 0"),
        ({"scheduler": "nowhere"}, "scheduler = 'nowhere' does not answer: .*; allowed: an address"),
    ],
)
def test_options_out_of_range_are_refused(small: Path, tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(SferdError, match=words):
        run_sweep(Sweep({"text": ["a"]}, notebook=small), tmp_path / "out", **options)
    assert not list(tmp_path.glob("out/*/*.ipynb"))


# ---- runs and their names


def test_runs_are_all_combinations(small: Path) -> None:
    sweep = Sweep({"text": ["a", "b"], "numbers": [[1], None]}, notebook=small)
    assert list(sweep.runs.values()) == [{"text": text, "numbers": numbers} for text, numbers in itertools.product("ab", ([1], None))]


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"seed": 1, "guidance_weight": 0.3}, "seed=1,guidance_weight=0.3"),
        ({"sgp": True, "prior": "mixture", "guidance_layer": None}, "sgp=true,prior=mixture,guidance_layer=null"),
    ],
)
def test_a_name_says_the_values_where_a_file_name_can(values: dict[str, Any], name: str) -> None:
    assert run_name(values) == name


def test_different_values_have_different_names_that_any_file_system_takes() -> None:
    values = [1, 1.0, "1", True, "true", "True", None, "null", "None", "a", "A", "a/b", "a-b", "a b", "..", "", "é", "x" * 300, "x" * 301]
    values += [["a"], ["a", "b"], "[a]", [1, 2], [12], "a,b=c", 1e-9, -1, SPELL, "nan"]
    runs = [{"value": value} for value in values] + [{"a": "b", "c": "d"}, {"a": "b,c=d"}]
    names = [run_name(run) for run in runs]
    assert len({name.lower() for name in names}) == len(runs)
    assert all(re.fullmatch(r"[A-Za-z0-9_.=,+-]{1,150}", name) for name in names)


# ---- one sweep: a run that is done, one that fails once, one that fails always


@dataclass
class Mixed:
    """What a sweep over ``texts`` with the command and one retry has left."""

    folder: Path
    yaml: Path
    command: subprocess.CompletedProcess[str]

    def run(self, text: str) -> Path:
        return self.folder / f"text={text}"


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Mixed:
    place = tmp_path_factory.mktemp("mixed")
    folder = place / "out {here}"  # papermill would fill the braces
    make_notebook(place / "notebook.ipynb", NOTE, FAIL, FINISH)
    path = place / "sweep.yaml"
    parameters = {"spell": SPELL, "numbers": [1, 0.1, None, True, "a"]}
    path.write_text(json.dumps({"notebook": "notebook.ipynb", "parameters": parameters, "grid": {"text": ["good", "late", "bad"]}}))
    # What an interruption has left: an executed notebook, even a whole one, does not say that its run is done.
    (folder / "text=good").mkdir(parents=True)
    make_notebook(folder / "text=good" / "executed.ipynb", FINISH)
    words = [sys.executable, "-m", "sferd_lab.sweep", "sweep.yaml", folder.name, "workers=2", "retries=1"]
    environment = os.environ | {"OMP_NUM_THREADS": "3"}  # not what it would be by itself
    command = subprocess.run(words, cwd=place, env=environment, capture_output=True, text=True, check=False)
    assert (folder / "runs.csv").exists(), command.stderr
    return Mixed(folder, path, command)


def test_a_failed_run_is_tried_again_and_leaves_the_others_going(mixed: Mixed) -> None:
    assert notes(mixed.run("good")) == ["started", "completed"]
    assert notes(mixed.run("late")) == ["started", "started", "completed"]
    assert notes(mixed.run("bad")) == ["started", "started"]
    runs = pd.read_csv(mixed.folder / "runs.csv", keep_default_na=False).set_index("text")
    assert runs["state"].to_dict() == {"good": "done", "late": "done", "bad": "failed"}
    assert runs["attempts"].to_dict() == {"good": 1, "late": 2, "bad": 2}
    assert runs["error"].to_dict() == {"good": "", "late": "", "bad": "ValueError: bad on purpose"}
    assert runs["run"].to_dict() == {text: f"text={text}" for text in ("good", "late", "bad")}
    assert (runs["seconds"] > 0).all()


def test_the_command_says_by_its_exit_status_that_a_run_failed_and_prints_the_table(mixed: Mixed) -> None:
    assert mixed.command.returncode == 1
    header, *lines = mixed.command.stdout.splitlines()
    assert header.split() == ["run", "text", "state", "attempts", "seconds", "error"]
    assert [line.split()[:4] for line in lines] == [
        ["text=good", "good", "done", "1"],
        ["text=late", "late", "done", "2"],
        ["text=bad", "bad", "failed", "2"],
    ]
    assert "3/3" in mixed.command.stderr  # the progress bar's end


def test_parameters_arrive_as_data(mixed: Mixed) -> None:
    seen = read_json(mixed.run("good") / "seen.json")
    assert (seen["text"], seen["spell"], seen["numbers"]) == ("good", SPELL, [1, 0.1, None, True, "a"])
    assert [type(value) for value in seen["numbers"]] == [int, float, type(None), bool, str]


def test_workers_keep_to_their_cores_show_no_widgets_and_run_where_the_sweep_was_called(mixed: Mixed) -> None:
    seen = read_json(mixed.run("good") / "seen.json")
    assert seen["environment"] == {"OMP_NUM_THREADS": "3", "SFERD_LAB_WIDGETS": "0"}
    assert Path(seen["cwd"]) == mixed.folder.parent


def test_the_marker_says_what_was_done(mixed: Mixed) -> None:
    record = read_json(mixed.run("late") / "done.json")
    assert record["parameters"] == {"spell": SPELL, "numbers": [1, 0.1, None, True, "a"], "text": "late"}
    assert (record["notebook"], record["grid"], record["attempts"]) == ("notebook.ipynb", {"text": "late"}, 2)
    assert record["seconds"] > 0
    assert record["host"]
    assert not (mixed.run("bad") / "done.json").exists()


def test_a_failed_runs_notebook_and_log_are_kept(mixed: Mixed) -> None:
    cells = nbformat.read(mixed.run("bad") / "executed.ipynb", as_version=4).cells
    outputs = [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]
    assert [(output.ename, output.evalue) for output in outputs] == [("ValueError", "bad on purpose")]
    log = (mixed.run("late") / "run.log").read_text()
    assert log.count("RuntimeError: only the first time") >= 1
    assert log.count("Executing notebook with kernel") == 2


def test_a_kernel_has_minutes_to_start(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # On a loaded machine one took over a minute, papermill's own limit, and the run was called failed.
    given: dict[str, Any] = {}
    monkeypatch.setattr("papermill.execute_notebook", lambda *_, **options: given.update(options))
    job = {"what": {"parameters": {"text": "a"}}, "has_folder": False, "notebook": small.read_text(), "directory": str(small.parent)}
    _execute_notebook(job, small.parent)
    assert given["start_timeout"] >= 600


STOPPED = """
import sys, time
import psutil
from sferd_lab import sweep

def dies(job, folder):
    sweep._stopping.wait()
    raise RuntimeError("the kernel died")

def slowly(*_, **__):
    time.sleep(1)
    sys.stderr.write("what libraries have to say of it\\n")

sweep._execute_notebook, psutil.wait_procs = dies, slowly
sweep._execute()
"""


def test_a_run_that_is_stopped_ends_its_log_with_the_reason(tmp_path: Path) -> None:
    job = {"folder": str(tmp_path), "time_limit": 0.1, "attempt": 1, "what": {}}
    with subprocess.Popen([sys.executable, "-c", STOPPED], stdin=subprocess.PIPE, text=True) as process:
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        assert process.wait(PATIENCE) == 1
    assert (tmp_path / "run.log").read_text().splitlines()[-1] == "not finished after 0.1 s, the time_limit"


def test_the_table_has_every_row_of_the_runs_that_are_done(mixed: Mixed) -> None:
    table = pd.read_csv(mixed.folder / "table.csv")
    assert list(table.columns) == ["run", "text", "metric", "value"]
    expected = [(f"text={text}", text, metric, value) for text in ("good", "late") for metric, value in (("fd", 1.5), ("kid", 2.5))]
    assert list(table.itertuples(index=False, name=None)) == expected


def test_a_second_call_runs_only_what_is_not_done(
    mixed: Mixed, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(mixed.yaml.parent)
    before = {text: (mixed.run(text) / "done.json").read_bytes() for text in ("good", "late")}
    tried = len(notes(mixed.run("bad")))
    assert main([mixed.yaml.name, mixed.folder.name, "retries=0"]) == 1
    assert notes(mixed.run("bad")) == ["started"] * (tried + 1)
    assert {text: (mixed.run(text) / "done.json").read_bytes() for text in before} == before
    assert notes(mixed.run("late")) == ["started", "started", "completed"]
    # All done: status 0, though the folder has a failed run of a wider sweep.
    fewer = json.loads(mixed.yaml.read_text()) | {"grid": {"text": ["good", "late"]}}
    Path("fewer.yaml").write_text(json.dumps(fewer))
    capsys.readouterr()
    assert main(["fewer.yaml", mixed.folder.name]) == 0
    assert "bad" not in capsys.readouterr().out
    assert set(pd.read_csv(mixed.folder / "runs.csv")["text"]) == {"good", "late", "bad"}


def test_a_folder_with_other_runs_is_refused(mixed: Mixed, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(mixed.yaml.parent)
    Path("other.yaml").write_text(json.dumps({"notebook": "notebook.ipynb", "grid": {"text": ["new", "bad"]}}))
    assert main(["other.yaml", mixed.folder.name]) == 2
    assert re.search(r"text=bad/run.json says .*'spell'.*; allowed: the same, or another folder", capsys.readouterr().err)
    assert not mixed.run("new").exists()


def test_the_command_refuses_what_it_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert main(["a.yaml", "out", "worker=2"]) == 2
    assert "option 'worker'; allowed: workers, scheduler, retries, time_limit" in capsys.readouterr().err


# ---- tables


def finished(folder: Path, sweep: Sweep, tables: list[str]) -> pd.DataFrame:
    """A sweep all runs of which are done, with these tables."""
    for (name, values), table in zip(sweep.runs.items(), tables, strict=True):
        what = {"notebook": sweep.notebook.name, "parameters": {**sweep.parameters, **values}, "grid": values}
        write_json(folder / name / "run.json", what)
        write_json(folder / name / "done.json", what | {"attempts": 1, "seconds": 2.0, "host": "here"})
        (folder / name / "metrics.csv").write_text(table)
    return run_sweep(sweep, folder, progress=False)


def test_a_grid_column_gives_way_to_a_runs_own_of_other_content(tmp_path: Path) -> None:
    path = make_notebook(tmp_path / "notebook.ipynb", parameters="seed = 1\nsgp = True\nstate = 1\nwidths = None")
    sweep = Sweep({"seed": [1, 2], "sgp": [True], "state": [3], "widths": [[8, 8]]}, notebook=path)
    runs = finished(tmp_path, sweep, [f"seed,sgp,value\n{seed},walk,{seed}.5\n" for seed in (1, 2)])
    table = pd.read_csv(tmp_path / "table.csv")
    assert list(table.columns) == ["run", "seed", "grid_sgp", "state", "widths", "sgp", "value"]
    assert table.drop(columns="run").to_numpy().tolist() == [[seed, True, 3, "[8, 8]", "walk", seed + 0.5] for seed in (1, 2)]
    assert list(runs.columns) == ["run", "seed", "sgp", "grid_state", "widths", "state", "attempts", "seconds", "error"]


def test_a_metrics_file_that_is_no_table_is_said_and_spares_the_others(small: Path, tmp_path: Path) -> None:
    runs = finished(tmp_path / "out", Sweep({"text": ["a", "b"]}, notebook=small), ["", "metric,value\nfd,1\n"])
    assert runs["error"].str.startswith("metrics.csv is no table").tolist() == [True, False]
    assert pd.read_csv(tmp_path / "out" / "table.csv")["run"].tolist() == ["text=b"]


def test_a_marker_of_other_parameters_does_not_count(small: Path, tmp_path: Path) -> None:
    sweep = Sweep({"text": ["a"]}, {"spell": "x"}, notebook=small)
    finished(tmp_path, sweep, ["metric\n1\n"])
    marker = tmp_path / "text=a" / "done.json"
    write_json(marker, read_json(marker) | {"parameters": {"text": "a", "spell": "y"}})
    with pytest.raises(SferdError, match=r"done.json is of a run with .*'y'.*; allowed: .*'x'"):
        run_sweep(sweep, tmp_path)


# ---- a scheduler with workers elsewhere: processes of their own


@dataclass
class Cluster:
    address: str
    workers: list[subprocess.Popen[bytes]]

    def worker_of(self, pid: int) -> subprocess.Popen[bytes]:
        above = {process.pid for process in psutil.Process(pid).parents()}
        return next(worker for worker in self.workers if worker.pid in above)

    def busy(self) -> int:
        return sum(bool(psutil.Process(worker.pid).children()) for worker in self.workers)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    place = tmp_path_factory.mktemp("cluster")
    file = place / "scheduler.json"
    dask, common = [sys.executable, "-m", "dask"], ["--scheduler-file", str(file), "--host", "127.0.0.1", "--no-dashboard"]
    with (place / "log").open("w") as log:

        def start(*words: str) -> subprocess.Popen[bytes]:
            return subprocess.Popen([*dask, *words], stdout=log, stderr=log, cwd=place)

        scheduler = start("scheduler", "--port", "0", *common)
        # Without a nanny, so that the process is the worker and nobody starts another in its place.
        workers = [
            start("worker", "--nthreads", "1", "--no-nanny", "--death-timeout", "600", "--local-directory", str(place), *common)
            for _ in range(2)
        ]
        try:
            wait_until(lambda: (place / "log").read_text().count("Registered to") == 2)
            yield Cluster(read_json(file)["address"], workers)
        finally:
            for process in (*workers, scheduler):
                process.terminate()
                process.wait()


def started(run: Path) -> int | None:
    """The kernel of a run that has started."""
    path = run / "notes"
    return int(path.read_text().split()[1]) if path.exists() and path.read_text().endswith("\n") else None


def test_two_sweeps_at_once_run_nothing_twice(cluster: Cluster, tmp_path: Path) -> None:
    notebook = make_notebook(tmp_path / "notebook.ipynb", NOTE, WAIT, FINISH)
    (tmp_path / "sweep.yaml").write_text(f"notebook: {notebook}\ngrid: {{text: [a]}}\n")
    folder = tmp_path / "out"
    # Two processes, as two users are.
    command = [sys.executable, "-m", "sferd_lab.sweep", "sweep.yaml", "out", f"scheduler={cluster.address}"]
    start = partial(subprocess.Popen, command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with start() as one, start() as two:
        sweeps = [one, two]
        try:
            wait_until(lambda: (cluster.busy() == 2 and started(folder / "text=a")) or any(sweep.poll() is not None for sweep in sweeps))
            assert [sweep.communicate()[0] for sweep in sweeps if sweep.poll() is not None] == []
            time.sleep(3)  # the other has begun too, as far as it may
            (folder / "go").touch()
            for sweep in sweeps:
                said, _ = sweep.communicate(timeout=PATIENCE)
                assert (sweep.returncode, "done" in said) == (0, True), said
        finally:
            for sweep in sweeps:
                sweep.kill()
    assert notes(folder / "text=a") == ["started", "completed"]
    assert pd.read_csv(folder / "runs.csv")["state"].tolist() == ["done"]


def test_a_run_whose_worker_dies_is_done_by_another_and_every_run_completes_once(cluster: Cluster, tmp_path: Path) -> None:
    sweep = Sweep({"text": ["a", "b"]}, notebook=make_notebook(tmp_path / "notebook.ipynb", NOTE, WAIT, FINISH))
    folder = tmp_path / "out"
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(run_sweep, sweep, folder, scheduler=cluster.address, retries=0, progress=False)
        kernel = wait_until(lambda: started(folder / "text=a") or call.done())
        assert not call.done(), call.exception()
        worker = cluster.worker_of(kernel)
        os.kill(worker.pid, signal.SIGKILL)
        assert worker.wait() == -signal.SIGKILL
        wait_until(lambda: not psutil.pid_exists(kernel))  # nothing goes on behind the other's back
        assert notes(folder / "text=a")[0] == "started"
        assert "completed" not in notes(folder / "text=a")
        (folder / "go").touch()
        runs = call.result()
    assert runs["state"].tolist() == ["done", "done"]
    assert notes(folder / "text=a") == ["started", "started", "completed"]
    assert notes(folder / "text=b") == ["started", "completed"]
    assert pd.read_csv(folder / "table.csv")["run"].tolist() == ["text=a"] * 2 + ["text=b"] * 2


def test_a_run_that_is_interrupted_is_not_tried_again(cluster: Cluster, tmp_path: Path) -> None:
    interrupt = "import os, signal, time\nos.kill(os.getppid(), signal.SIGINT)\ntime.sleep(60)"
    sweep = Sweep({"text": ["a"]}, notebook=make_notebook(tmp_path / "notebook.ipynb", NOTE, interrupt))
    runs = run_sweep(sweep, tmp_path / "out", scheduler=cluster.address, retries=1, progress=False)
    assert runs[["state", "attempts", "error"]].to_numpy().tolist() == [["failed", 1, "ended by signal 2"]]
    run = tmp_path / "out" / "text=a"
    assert notes(run) == ["started"]
    kernel = started(run)
    wait_until(lambda: not psutil.pid_exists(kernel) or has_ended(psutil.Process(kernel)))


def test_a_run_over_its_time_limit_is_ended_with_its_kernel(cluster: Cluster, tmp_path: Path) -> None:
    sweep = Sweep({"text": ["a"]}, notebook=make_notebook(tmp_path / "notebook.ipynb", NOTE, WAIT))
    # Less than a kernel may take to start, which is then ended before it has.
    runs = run_sweep(sweep, tmp_path / "out", scheduler=cluster.address, retries=0, time_limit=4, progress=False)
    assert runs[["state", "attempts", "error"]].to_numpy().tolist() == [["failed", 1, "not finished after 4 s, the time_limit"]]
    kernel = started(tmp_path / "out" / "text=a")
    assert kernel is None or not psutil.pid_exists(kernel)


def test_a_sweep_that_is_interrupted_takes_its_runs_with_it_and_the_same_command_goes_on(tmp_path: Path) -> None:
    notebook = make_notebook(tmp_path / "notebook.ipynb", NOTE, WAIT, FINISH)
    (tmp_path / "sweep.yaml").write_text(f"notebook: {notebook}\ngrid: {{text: [a]}}\n")
    command = [sys.executable, "-m", "sferd_lab.sweep", "sweep.yaml", "out", "workers=1", "retries=1"]
    run = tmp_path / "out" / "text=a"
    with (tmp_path / "log").open("w") as log:
        # A job that a shell has put into the background has been told to ignore SIGINT, and so would be what is started here.
        heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        sweep = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log, start_new_session=True, preexec_fn=heed)
        try:
            kernel = wait_until(lambda: started(run) or sweep.poll() is not None)
            assert sweep.poll() is None, (tmp_path / "log").read_text()
            family = psutil.Process(sweep.pid).children(recursive=True)
            assert kernel in {process.pid for process in family}
            os.killpg(sweep.pid, signal.SIGINT)  # what a terminal sends to all of them
            assert sweep.wait(PATIENCE) == 130
            wait_until(lambda: all(map(has_ended, family)))
        finally:
            sweep.kill()
    assert "the same command goes on" in (tmp_path / "log").read_text()
    assert notes(run) == ["started"]
    assert not (run / "done.json").exists()
    (tmp_path / "out" / "go").touch()
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "done" in again.stdout
    assert notes(run) == ["started", "started", "completed"]
