"""What the speed comparisons share: calls that take turns, one tidy table each, and its summary as ratios within a repetition."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from sferd_lab.files import replacing

RESULTS = Path(__file__).resolve().parent.parent.parent / "data" / "results"


def alternate(calls: Mapping[str, Callable[[], object]], repetitions: int, **about: Any) -> Iterator[dict[str, Any]]:
    """Time ``calls`` in turn, A B A B, after one unrecorded round: a row for each call and repetition, with ``about`` beside it."""
    for repetition in range(repetitions + 1):
        for what, call in calls.items():
            started = time.perf_counter()
            call()
            seconds = time.perf_counter() - started
            if repetition:
                yield about | {"what": what, "repetition": repetition, "seconds": seconds}


def write(rows: list[dict[str, Any]], name: str) -> pd.DataFrame:
    """Write the table ``name`` with what it was measured on."""
    table = pd.DataFrame(rows).assign(threads=torch.get_num_threads(), torch=torch.__version__)
    with replacing(RESULTS / f"{name}.csv") as temporary:
        table.to_csv(temporary, index=False, float_format="%.6g")
    return table


def ratios(table: pd.DataFrame) -> pd.DataFrame:
    """For each comparison and case, the first call's seconds over each other one's within a repetition: median, least and most."""
    rows = []
    for (comparison, case), part in table.groupby(["comparison", "case"], sort=False):
        wide = part.pivot(index="repetition", columns="what", values="seconds")[list(dict.fromkeys(part["what"]))]
        first = wide.columns[0]
        for what in wide.columns[1:]:
            ratio = wide[first] / wide[what]
            rows.append(
                {"comparison": comparison, "case": case, "what": what, "over": first, "ratio": ratio.median()}
                | {"low": ratio.min(), "high": ratio.max(), "milliseconds": 1000 * wide[what].median()}
            )
    return pd.DataFrame(rows)


def describe(table: pd.DataFrame) -> str:
    """The ratios in words, a line each."""
    return "\n".join(
        f"{row.comparison}, {row.case}: {row.over} takes {row.ratio:.2f} times ({row.low:.2f} to {row.high:.2f}) "
        f"as long as {row.what} ({row.milliseconds:.4g} ms)"
        for row in ratios(table).itertuples()
    )


def in_a_process(script: str, *arguments: str, threads: int | None = None, processes: int = 1) -> Any:
    """The last line that ``script`` prints, as JSON, when called with ``arguments`` in a process of its own, or in several by torchrun."""
    environment = os.environ | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else []
    done = subprocess.run([sys.executable, *torchrun, script, *arguments], capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def median_seconds(call: Callable[[], object], warm_up: int = 4, timed: int = 9) -> float:
    """Of ``timed`` calls, after a few to warm up."""
    seconds = []
    for _ in range(warm_up + timed):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return sorted(seconds[warm_up:])[timed // 2]
