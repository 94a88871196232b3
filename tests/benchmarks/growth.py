"""How time and memory grow, and whether two processes beat one; ``data/results/growth.csv`` keeps the numbers.

    python tests/benchmarks/growth.py

A training step of the 16x16 network of network.py against the batch and against the image size, and of an ensemble of toy networks against
its size, each in a process of its own, whose peak memory it is. Then one process of two threads against two data-parallel processes of one
thread (torchrun, gloo), the batch shared out between them: the same images a step.
"""

from __future__ import annotations

import json
import os
import resource
import sys

import pandas as pd
import torch
from common import in_a_process, median_seconds, write
from ensemble import DEPTH, WIDTH
from loops import network

from sferd_lab.analysis.ensemble import EnsembleDenoiser
from sferd_lab.artifacts import seeded
from sferd_lab.data import Split
from sferd_lab.diffusion import HALF_PI
from sferd_lab.distill import denoising_target
from sferd_lab.semantic import LatentDenoiser
from sferd_lab.train import TrainSettings, keep_memory, train

GROWTH = {
    "batch": (16, 32, 64, 128, 256),
    "image size": (8, 16, 24, 32, 48),
    "ensemble size": (1, 4, 16, 64, 256),
}
REPETITIONS = 3
BATCH, SIZE = 64, 16


def grown(axis: str, value: int) -> dict[str, float]:
    """Seconds of a training step at ``value`` of ``axis``, and the this process's peak memory in MiB, at the end and after importing."""
    imported = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if axis == "ensemble size":
        model = EnsembleDenoiser([seeded(lambda: LatentDenoiser(2, width=WIDTH, depth=DEPTH), index) for index in range(value)])
        data, batch, members = Split(torch.randn(1000 * value, 2), None), 16 * value, value
    else:
        size, batch, members = (value, BATCH, 1) if axis == "image size" else (SIZE, value, 1)
        model, data = network(SIZE), Split(torch.randn(1000, 1, size, size), None)
    steps = train(model, denoising_target(0.0, HALF_PI), data, TrainSettings(10**6, batch, members=members, device="cpu"))
    seconds = median_seconds(lambda: next(steps))
    return {"seconds": seconds, "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "imported_mib": imported}


def data_parallel() -> dict[str, float]:
    """Seconds of a training step on this process's share of the batch, gradients averaged over the processes, if there are several."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    keep_memory()
    model: torch.nn.Module = network(SIZE)
    if processes > 1:
        torch.distributed.init_process_group("gloo")
        model = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    x, goal = torch.randn(2, BATCH // processes, 1, SIZE, SIZE)
    phi = 1.5 * torch.rand(len(x))

    def step() -> None:
        optimizer.zero_grad()
        (model(x, phi).v - goal).square().mean().backward()
        optimizer.step()

    return {"seconds": median_seconds(step)}


def describe(table: pd.DataFrame) -> str:
    """Medians over the repetitions; and two processes over one, within a repetition."""
    lines = []
    for (axis, value), part in table[table["axis"] != "processes"].groupby(["axis", "value"], sort=False):
        memory = (part["peak_mib"] - part["imported_mib"]).median()
        lines.append(f"{axis} {value}: a step {1000 * part['seconds'].median():.4g} ms, {memory:.0f} MiB above what importing takes")
    times = table[table["axis"] == "processes"].pivot(index="repetition", columns="value", values="seconds")
    ratio = times[2] / times[1]
    lines.append(f"two processes of one thread: {ratio.median():.2f} times ({ratio.min():.2f} to {ratio.max():.2f}) one process of two")
    return "\n".join(lines)


def main() -> None:
    """Measure, write the table, print its summary."""
    rows = []
    for repetition in range(1, REPETITIONS + 1):
        for axis, value in ((axis, value) for axis, values in GROWTH.items() for value in values):
            rows.append({"axis": axis, "value": value, "repetition": repetition} | in_a_process(__file__, axis, str(value)))
        for processes in (1, 2):
            found = in_a_process(__file__, "data parallel", threads=2 // processes, processes=processes)
            rows.append({"axis": "processes", "value": processes, "repetition": repetition} | found)
    print(describe(write(rows, "growth")))


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        found = data_parallel() if sys.argv[1] == "data parallel" else grown(sys.argv[1], int(sys.argv[2]))
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(found))
