"""How much faster many toy networks train at once than one after another; ``data/results/ensemble_speed.csv`` keeps the numbers.

    python tests/benchmarks/ensemble.py

Both do the same work by the same ``train``: every network takes every step on a batch of its own. They alternate, so that what else the
machine does falls on both.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

import pandas as pd
import torch
from common import write

from sferd_lab.analysis.ensemble import EnsembleDenoiser, stacked_data
from sferd_lab.artifacts import seeded
from sferd_lab.data import Split, two_dimensional_mixture
from sferd_lab.denoiser import Denoiser
from sferd_lab.diffusion import HALF_PI
from sferd_lab.distill import denoising_target
from sferd_lab.semantic import LatentDenoiser
from sferd_lab.train import TrainSettings, train

MEMBERS, WIDTH, DEPTH = 64, 64, 3
# What is saved is the fixed cost of a step, so small batches gain most.
BATCHES = (16, 32, 64)
# Enough that the clock's resolution does not matter, few enough that all 64 can be timed one after another rather than a few of them.
STEPS = 10
REPETITIONS = 5
# A member's training images. Their number changes no time: a batch is drawn from them by index.
POINTS = 1000


def seconds_per_step(model: Denoiser, data: Split, members: int, batch: int) -> float:
    """Time of a training step, without what is built before the first one; that first step, slower than the others, is left out too."""
    settings = TrainSettings(steps=STEPS + 1, batch_size=members * batch, members=members, clip=1e9, device="cpu")
    states = train(model, denoising_target(0.0, HALF_PI), data, settings)
    next(states)
    started = time.perf_counter()
    for _ in states:
        pass
    return (time.perf_counter() - started) / STEPS


def measure(batch: int, repetitions: int = REPETITIONS, members: int = MEMBERS) -> Iterator[dict[str, str | int | float]]:
    """The rows of the table: for each repetition one step of all ``members`` at once, then one step of all one after another."""
    mixture = two_dimensional_mixture("ring")
    data = [Split(mixture.sample(POINTS, torch.Generator().manual_seed(index))[0].float(), None) for index in range(members)]
    about = {"members": members, "batch": batch, "width": WIDTH}
    for repetition in range(1, repetitions + 1):
        networks = [seeded(lambda: LatentDenoiser(2, width=WIDTH, depth=DEPTH), index) for index in range(members)]
        together = seconds_per_step(EnsembleDenoiser(networks), stacked_data(data), members, batch)
        yield {"what": "at once", "repetition": repetition, "seconds_per_step_of_all": together, **about}
        one_by_one = sum(seconds_per_step(network, own, 1, batch) for network, own in zip(networks, data, strict=True))
        yield {"what": "one after another", "repetition": repetition, "seconds_per_step_of_all": one_by_one, **about}


def describe(table: pd.DataFrame) -> str:
    """Median and range of both, and of their ratio within a repetition."""
    times = table.pivot(index="repetition", columns="what", values="seconds_per_step_of_all")
    ratio = times["one after another"] / times["at once"]
    columns = itertools.chain(((what, 1000 * times[what], "ms") for what in times), [("ratio", ratio, "times")])
    return "\n".join(
        f"{what}: median {values.median():.3g} {unit}, {values.min():.3g} to {values.max():.3g}" for what, values, unit in columns
    )


if __name__ == "__main__":
    found = write(list(itertools.chain.from_iterable(measure(batch) for batch in BATCHES)), "ensemble_speed")
    for batch, part in found.groupby("batch"):
        print(f"a step of all {MEMBERS} networks, batch {batch}, {REPETITIONS} repetitions\n{describe(part)}")
