"""Many runs of one parameterised notebook: papermill on Dask.

A sweep is a YAML file. Every combination of the values under ``grid`` is a run, ``parameters`` are the same for all:

    notebook: notebooks/experiment.ipynb    # the default
    parameters: {preset: digits}
    grid: {seed: [1, 2, 3], guidance_weight: [0.1, 0.3]}

``python -m sferd_lab.sweep sweep.yaml FOLDER [workers=2] [scheduler=tcp://127.0.0.1:8786] [retries=1] [time_limit=7200]
[allow_outside=true]`` runs it: on processes of this machine, or on the workers of any Dask scheduler, which must see FOLDER under the same
path and have this package. A sweep file may be someone else's: the notebook, ``data_folder`` and ``teacher_from`` that it names must lie
inside the current folder, unless ``allow_outside`` says that they need not. Its values are data and never code; a notebook is code. The
same command again, after an interruption or with more values, runs what is missing. Exit status: 0 when all runs are done, 1 when one
failed, 2 when the sweep is refused, 130 when it was interrupted (Ctrl-C).

A run's folder, ``FOLDER/seed=1,guidance_weight=0.1/``, is the notebook's ``run_folder``. It holds ``run.json`` (what the run is),
``executed.ipynb`` (of a failed run too), ``run.log`` and, written last, ``done.json`` or ``failed.json``: the one file that says that a run
is done is ``done.json``. ``FOLDER/runs.csv`` has a line for every run that ended, ``FOLDER/table.csv`` all rows of their ``metrics.csv``.

A run is executed by a process of its own, which holds the lock on the run's folder while it executes and writes ``done.json``, and which
ends, its kernel with it, when its Dask worker does. So of two workers with the same run the second waits and then finds it done, and a run
that has lost its worker starts again elsewhere. Locks are the operating system's: a folder shared by machines must support them.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nbformat
import pandas as pd
from filelock import FileLock
from tqdm import tqdm

from sferd_lab.config import PLACES, Settings, check_inside, make_settings, parse_literals
from sferd_lab.errors import SferdError, command
from sferd_lab.files import is_file, project_folder, read_record, read_yaml, replacing, write_json, write_text

if TYPE_CHECKING:
    from distributed import Client

# Text that is a folder's name as it stands and that no other value has for a name.
PLAIN = re.compile(r"(?!(true|false|null|nan|inf)\b)[a-z_][a-z0-9_.-]*")
# YAML 1.1 reads 1e-3 as text, without a word.
NEARLY_A_NUMBER = re.compile(r"[-+]?\d+[eE][-+]?\d+")
LONGEST_NAME = 120  # of a run's folder; file systems take 255 bytes
MOST_RUNS = 10_000  # twenty lines of a grid make more than there is time for
LOCK = ".lock"
KERNEL_START = 600  # seconds that a run's kernel may take to start: on a loaded machine papermill's 60 are not enough

_stopping = threading.Event()  # this process is being ended by ``_stop``


@dataclass(frozen=True)
class Sweep:
    """Which runs there are: a notebook, parameters that all runs share, and values to combine.

    Raises SferdError for a parameter that the notebook does not have, that is given twice or that a sweep decides (``run_folder``), for
    values that are no literals (text, a finite number, a bool, None, or a list of these), for empty or repeated values, for more than
    10,000 runs, and, if the notebook's parameters are the experiment's settings, for a combination that ``make_settings`` refuses.
    """

    grid: Mapping[str, list[Any]]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    notebook: Path = field(default_factory=lambda: project_folder() / "notebooks" / "experiment.ipynb")

    def __post_init__(self) -> None:
        for part in ("grid", "parameters"):
            if not isinstance(getattr(self, part), Mapping):
                raise SferdError(f"{part} = {getattr(self, part)!r}; allowed: names with their values")
        known = notebook_parameters(self.notebook)
        for name in (*self.parameters, *self.grid):
            if name not in known or name == "run_folder":
                allowed = ", ".join(sorted(known - {"run_folder"})) or "none, no cell of it is tagged 'parameters'"
                raise SferdError(f"parameter {name!r} of {self.notebook.name}; allowed: {allowed}")
        if twice := [name for name in self.grid if name in self.parameters]:
            raise SferdError(f"'{twice[0]}' is in parameters and in grid; allowed: one of them")
        if not self.grid:
            raise SferdError("grid is empty; allowed: one parameter or more, each with a list of values")
        for name, value in self.parameters.items():
            _check_literal(name, value)
        for name, values in self.grid.items():
            if not isinstance(values, list) or not values:
                raise SferdError(f"grid: {name} = {values!r}; allowed: a list of one value or more")
            for value in values:
                _check_literal(name, value)
            if len({json.dumps(value) for value in values}) != len(values):
                raise SferdError(f"grid: {name} = {values!r}; allowed: different values")
        if (count := math.prod(map(len, self.grid.values()))) > MOST_RUNS:
            raise SferdError(f"the grid has {count} combinations; allowed: up to {MOST_RUNS} runs")
        if set(Settings.model_fields) <= known:
            for values in self.runs.values():
                make_settings(**self.parameters, **values)

    @property
    def runs(self) -> dict[str, dict[str, Any]]:
        """The grid's values of every run under the run's name, the last parameter varying fastest."""
        combinations = (dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values()))
        return {run_name(values): values for values in combinations}


def read_sweep(path: Path | str, allow_outside: bool = False) -> Sweep:
    """The sweep in a YAML file; its ``notebook`` is relative to the current folder.

    Raises SferdError as ``Sweep`` does, for keys it does not know and, unless ``allow_outside``, for a notebook, ``data_folder`` or
    ``teacher_from`` outside the current folder.
    """
    content = read_yaml(path)
    allowed = tuple(Sweep.__dataclass_fields__)
    if not isinstance(content, dict) or "grid" not in content:
        raise SferdError(f"{path} has no 'grid'; allowed: {', '.join(allowed)}")
    if unknown := [key for key in content if key not in allowed]:
        raise SferdError(f"{path}: unknown key {unknown[0]!r}; allowed: {', '.join(allowed)}")
    if "notebook" in content:
        if not isinstance(content["notebook"], str):
            raise SferdError(f"{path}: notebook = {content['notebook']!r}; allowed: the path of a notebook")
        if not allow_outside:
            check_inside(path, "notebook", content["notebook"])
        content["notebook"] = Path(content["notebook"])
    sweep = Sweep(**content)
    for name in PLACES if not allow_outside else ():
        for value in [sweep.parameters.get(name), *sweep.grid.get(name, [])]:
            check_inside(path, name, value)
    return sweep


def notebook_parameters(path: Path) -> set[str]:
    """The names in the cell tagged ``parameters``. Raises SferdError for what is no notebook."""
    from papermill.exceptions import PapermillException
    from papermill.inspection import inspect_notebook

    if not is_file(path):
        raise SferdError(f"notebook {path} is missing")
    try:
        return set(inspect_notebook(_verbatim(path)))
    except (ValueError, KeyError, AttributeError, TypeError, nbformat.ValidationError, PapermillException) as error:
        raise SferdError(f"{path} is not a notebook that papermill reads: {error}") from None


def run_name(values: Mapping[str, Any]) -> str:
    """A name for the run with these grid values, e.g. "seed=1,prior=mixture": a file name, different for different values."""
    text = json.dumps(values, sort_keys=True)
    parts = [value if isinstance(value, str) else json.dumps(value) for value in values.values()]
    name = ",".join(f"{key}={part}" for key, part in zip(values, parts, strict=True))
    plain = all(PLAIN.fullmatch(value) if isinstance(value, str) else not isinstance(value, list) for value in values.values())
    # Capitals are not enough of a difference on some file systems.
    if plain and name == name.lower() and len(name) <= LONGEST_NAME:
        return name
    short = re.sub(r"[^A-Za-z0-9_.=,+-]+", "-", name)[:LONGEST_NAME]
    return f"{short}-{sha256(text.encode()).hexdigest()[:8]}"


def run_sweep(
    sweep: Sweep,
    folder: Path | str,
    workers: int = 2,
    scheduler: str | None = None,
    retries: int = 1,
    time_limit: float | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Run what is not done yet and return a line for every run: "run", the grid's values, "state", "attempts", "seconds" and "error".

    The state is "done" or "failed". ``workers`` processes on this machine share its cores, unless OMP_NUM_THREADS says how many each takes;
    with the address of a Dask ``scheduler`` its workers do the work instead. The current folder and variables SFERD_LAB_... go along. A run
    that fails, unless it was interrupted, is tried ``retries`` times more, and the others go on; ``time_limit`` in seconds ends an attempt
    that takes longer. Attempts are those of the call that ended the run, seconds those of the last attempt. Raises SferdError, before
    anything runs, for a folder that holds other runs of the same names and for a scheduler that does not answer.
    """
    for name, value, least in (("workers", workers, 1), ("retries", retries, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise SferdError(f"{name} = {value!r}; allowed: {least} or more")
    if time_limit is not None and (not isinstance(time_limit, int | float) or not 0 < time_limit < math.inf):
        raise SferdError(f"time_limit = {time_limit!r}; allowed: None or seconds above 0")
    folder = Path(folder).resolve()
    notebook = nbformat.read(sweep.notebook, as_version=4)
    for cell in notebook.cells:  # it travels with every run, its old pictures need not
        if cell.cell_type == "code":
            cell.outputs = []
    common = {"notebook": nbformat.writes(notebook), "time_limit": time_limit, "directory": str(Path.cwd())}
    common["has_folder"] = "run_folder" in notebook_parameters(sweep.notebook)
    jobs = {name: common | {"folder": str(folder / name), "what": what} for name, what in _claim(sweep, folder).items()}
    undone = {name: job for name, job in jobs.items() if not _is_done(job)}
    if undone:
        workers = min(workers, len(undone))
        with _client(workers, scheduler) as client, tqdm(total=len(jobs), initial=len(jobs) - len(undone), disable=not progress) as bar:
            environment = {name: value for name, value in os.environ.items() if name.startswith("SFERD_LAB_")}
            if scheduler is None:
                from dask.system import CPU_COUNT

                environment["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(max(1, CPU_COUNT // workers)))
            _work_on(client, undone, retries, environment, bar)
    runs = _collect(folder)
    return runs.set_index("run").loc[list(jobs)].reset_index()


@command
def main(arguments: Sequence[str]) -> int:
    """The command of this module; returns its exit status."""
    if len(arguments) < 2:
        raise SferdError("usage: python -m sferd_lab.sweep SWEEP.yaml FOLDER [name=value ...]")
    options = parse_literals(arguments[2:])
    if unknown := sorted(set(options) - {"workers", "scheduler", "retries", "time_limit", "allow_outside"}):
        raise SferdError(f"option '{unknown[0]}'; allowed: workers, scheduler, retries, time_limit, allow_outside")
    if str(allow := options.pop("allow_outside", False)).lower() not in ("true", "false"):
        raise SferdError(f"allow_outside = {allow!r}; allowed: true, false")
    try:
        runs = run_sweep(read_sweep(arguments[0], str(allow).lower() == "true"), arguments[1], **options)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the same command goes on\n")
        return 130  # as a shell has it
    sys.stdout.write(f"{runs.to_string(index=False, float_format='{:.4g}'.format, na_rep='')}\n")
    return int((runs["state"] != "done").any())


def _execute() -> None:
    """Execute one run in this process; the first line of its input says which, and the end of its input that its worker has gone."""
    job = json.loads(sys.stdin.readline())
    threading.Thread(target=_stop_with_worker, daemon=True).start()
    folder = Path(job["folder"])
    with FileLock(folder / LOCK):
        if _is_done(job):
            return
        with (folder / "run.log").open("a", encoding="utf-8") as log:
            for stream in (1, 2):  # the kernel's too, and what libraries in C write
                os.dup2(log.fileno(), stream)
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
        started, limit = time.perf_counter(), job["time_limit"]
        timer = threading.Timer(limit or 0, _stop, [f"not finished after {limit} s, the time_limit"])
        timer.daemon = True
        if limit is not None:
            timer.start()
        try:
            _execute_notebook(job, folder)
        except Exception:
            traceback.print_exc()
            if _stopping.is_set():
                threading.Event().wait()  # ``_stop`` has the last word
            sys.exit(1)
        timer.cancel()
        seconds, host = time.perf_counter() - started, platform.node()
        write_json(folder / "done.json", {**job["what"], "attempts": job["attempt"], "seconds": round(seconds, 2), "host": host})
        (folder / "failed.json").unlink(missing_ok=True)


def _execute_notebook(job: Mapping[str, Any], folder: Path) -> None:
    from papermill import execute_notebook

    parameters = job["what"]["parameters"] | ({"run_folder": str(folder)} if job["has_folder"] else {})
    path = folder / "executed.ipynb"
    write_text(path, job["notebook"])
    options = {"cwd": job["directory"], "start_timeout": KERNEL_START, "progress_bar": False, "log_output": True}
    execute_notebook(_verbatim(path), _verbatim(path), parameters, **options)


def _stop_with_worker() -> None:
    # Not through sys.stdin, whose lock would still be held at the interpreter's exit.
    os.read(0, 1)
    _stop("its worker has gone")


def _stop(reason: str) -> None:
    """End this process and its kernel, which must be gone before the lock is."""
    import psutil

    _stopping.set()
    children = psutil.Process().children(recursive=True)
    for child in children:
        with suppress(psutil.NoSuchProcess):
            child.kill()
    psutil.wait_procs(children, timeout=10)
    sys.stderr.write(f"{reason}\n")  # after whatever the main thread has to say of a kernel that is gone
    sys.stderr.flush()
    os._exit(1)


def _work(job: Mapping[str, Any], retries: int, environment: Mapping[str, str]) -> dict[str, Any]:
    """What a Dask worker does with a run; returns "attempts", "seconds" and "error", which is empty if the run is done."""
    # A worker that says nothing of threads gets one: workers do not know of each other.
    environment = {"OMP_NUM_THREADS": "1", "TQDM_MININTERVAL": "10", **os.environ, **environment, "SFERD_LAB_WIDGETS": "0"}
    command = [sys.executable, "-c", f"from {__name__} import _execute; _execute()"]
    result: dict[str, Any] = {"attempts": 0, "error": ""}
    while not _is_done(job) and result["attempts"] <= retries:
        result["attempts"] += 1
        started = time.perf_counter()
        line = json.dumps({**job, "attempt": result["attempts"]}) + "\n"
        # Its input stays open while it runs, and is closed for it if this process dies.
        with suppress(BrokenPipeError), subprocess.Popen(command, stdin=subprocess.PIPE, text=True, env=environment) as process:
            process.stdin.write(line)
            process.stdin.flush()
            process.wait()
        result["seconds"] = round(time.perf_counter() - started, 2)
        result["error"] = _last_words(Path(job["folder"]), process.returncode)
        if process.returncode == -signal.SIGINT:
            break  # Ctrl-C reaches the runs too, and a run may feel it before its worker has gone
    return result


def _last_words(folder: Path, status: int) -> str:
    """Why a run's process ended with this exit status, in a line; empty for 0."""
    if status <= 0:
        return f"ended by signal {-status}" if status else ""
    log = folder / "run.log"
    text = re.sub(r"\x1b\[[0-9;]*m", "", log.read_text(encoding="utf-8", errors="replace")) if log.exists() else ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else f"exit status {status}"


def _claim(sweep: Sweep, folder: Path) -> dict[str, dict[str, Any]]:
    """What every run is, under its name, written to its ``run.json``; refuses a folder in which one of them is something else."""
    what = {
        name: {"notebook": sweep.notebook.name, "parameters": {**sweep.parameters, **values}, "grid": values}
        for name, values in sweep.runs.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / LOCK):
        for name, mine in what.items():
            path = folder / name / "run.json"
            if path.exists() and (theirs := read_record(path)) != mine:
                raise SferdError(f"{path} says {theirs}, this sweep {mine}; allowed: the same, or another folder")
        for name, mine in what.items():
            if not (folder / name / "run.json").exists():
                write_json(folder / name / "run.json", mine)
    return what


def _is_done(job: Mapping[str, Any]) -> bool:
    """Whether the run's ``done.json`` is there. Raises SferdError when it is another run's."""
    path = Path(job["folder"]) / "done.json"
    if not path.exists():
        return False
    record = read_record(path)
    if any(record.get(key) != value for key, value in job["what"].items()):
        raise SferdError(f"{path} is of a run with {record.get('parameters')}; allowed: {job['what']['parameters']}")
    return True


@contextmanager
def _client(workers: int, scheduler: str | None) -> Iterator[Client]:
    try:
        import dask
        from distributed import Client, LocalCluster
    except ImportError:
        raise SferdError('a sweep needs Dask: pip install "sferd-lab[sweep]"') from None
    if scheduler is not None:
        try:
            client = Client(scheduler, timeout=60)  # seconds: a busy one may not answer at once
        except (OSError, ValueError, TypeError) as error:
            raise SferdError(f"scheduler = {scheduler!r} does not answer: {error}; allowed: an address as tcp://127.0.0.1:8786") from None
        with client:
            yield client
        return
    settings = {"processes": True, "threads_per_worker": 1, "dashboard_address": None, "host": "127.0.0.1"}
    # No run waits behind a worker that is busy while another is free.
    saturation = dask.config.set({"distributed.scheduler.worker-saturation": 1.0})
    with saturation, LocalCluster(n_workers=workers, **settings) as cluster, Client(cluster) as client:
        yield client


def _work_on(client: Client, jobs: Mapping[str, Mapping[str, Any]], retries: int, environment: Mapping[str, str], bar: tqdm) -> None:
    """Have the runs done, and write down which failed and, after each, the tables."""
    from distributed import as_completed

    # Not pure: the same run may be another sweep's too, and Dask would take both for one.
    futures = {client.submit(_work, job, retries, environment, pure=False): name for name, job in jobs.items()}
    for future in as_completed(futures):
        job = jobs[futures[future]]
        try:
            result = future.result()
        except Exception as error:  # a worker's, or that the scheduler has gone, whatever it is: the others go on
            result = {"attempts": None, "seconds": None, "error": f"{type(error).__name__}: {error}".splitlines()[0]}
        if not _is_done(job):
            error = result["error"] or f"no done.json in {job['folder']}, which the worker says is done: it must see the same folder"
            write_json(Path(job["folder"]) / "failed.json", {**job["what"], **result, "error": error})
        _collect(Path(job["folder"]).parent)
        bar.update()


def _collect(folder: Path) -> pd.DataFrame:
    """Write ``runs.csv`` and ``table.csv`` of all runs in ``folder`` that ended, and return the former.

    Both begin with the run's name and its grid values. A column that a run's own table has too, with other content, is called ``grid_...``.
    A list is written as JSON.
    """
    from sferd_lab.experiment import read_table

    lines, keys, tables = [], [], []
    with FileLock(folder / LOCK):  # or the older of two collections might be written last
        for path in sorted(path.parent for path in folder.glob("*/run.json")):
            state = next((state for state in ("done", "failed") if (path / f"{state}.json").exists()), None)
            if state is None:
                continue
            record = read_record(path / f"{state}.json", "grid", "attempts", "seconds")
            numbers = all(isinstance(record[name], int | float | None) for name in ("attempts", "seconds"))
            if not numbers or not isinstance(record["grid"], dict):
                raise SferdError(f"{path / state}.json does not say what a run was; delete it, and the run is done again")
            grid = {name: json.dumps(value) if isinstance(value, list) else value for name, value in record["grid"].items()}
            key = {"run": path.name, **grid}
            line = {"state": state, "attempts": record["attempts"], "seconds": record["seconds"], "error": record.get("error", "")}
            if state == "done" and (path / "metrics.csv").exists():
                try:
                    tables.append(read_table(path / "metrics.csv"))
                    keys.append(key)
                except SferdError as error:
                    line["error"] = str(error)
            lines.append({name if name == "run" or name not in line else f"grid_{name}": value for name, value in key.items()} | line)
        runs = pd.DataFrame(lines).astype({"attempts": "Int64"})
        _write_table(runs, folder / "runs.csv")
        if tables:
            _write_table(_joined(keys, tables), folder / "table.csv")
    return runs


def _joined(keys: list[dict[str, Any]], tables: list[pd.DataFrame]) -> pd.DataFrame:
    """The rows of all ``tables``, each with its key before it."""

    def clashes(name: str) -> bool:
        return any(name in table and not (table[name] == key.get(name)).all() for key, table in zip(keys, tables, strict=True))

    names = {name: f"grid_{name}" if clashes(name) else name for name in dict.fromkeys(itertools.chain(*keys))}
    frames = []
    for key, table in zip(keys, tables, strict=True):
        first = pd.DataFrame({names[name]: [value] * len(table) for name, value in key.items()})
        frames.append(pd.concat([first, table[[column for column in table if column not in first]]], axis=1))
    return pd.concat(frames, ignore_index=True)


def _write_table(table: pd.DataFrame, path: Path) -> None:
    with replacing(path) as temporary:
        table.to_csv(temporary, index=False)


def _check_literal(name: str, value: Any) -> None:
    for item in value if isinstance(value, list) else [value]:
        if not isinstance(item, str | int | float | None) or (isinstance(item, float) and not math.isfinite(item)):
            raise SferdError(f"{name} = {value!r}; allowed: text, finite numbers, booleans, null, and lists of these")
        if isinstance(item, str) and NEARLY_A_NUMBER.fullmatch(item):
            raise SferdError(f"{name} = {value!r}, which YAML reads as text; allowed: a number with a point, as 1.0e-3")


def _verbatim(path: Path) -> str:
    """The path for papermill, which would fill parameters into braces."""
    return str(path).replace("{", "{{").replace("}", "}}")


if __name__ == "__main__":
    # Imported under its own name, since workers must find its functions there.
    from sferd_lab.sweep import main as command

    sys.exit(command(sys.argv[1:]))
