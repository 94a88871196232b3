"""Metrics at 10,000 images against torchmetrics and prdc, on the same features; ``data/results/metric_speed.csv`` keeps the numbers.

    python tests/benchmarks/scores.py

Every call measures the same two sets. Peak memory is that of a process of its own that does nothing else.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable

import numpy as np
import torch
from common import alternate, describe, in_a_process, write
from prdc import compute_prdc
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from sferd_lab.artifacts import seeded
from sferd_lab.metrics import FeatureNetwork, extract, frechet_distance, kid, precision_recall_density_coverage

N, REPETITIONS, NEIGHBOURS = 10_000, 5, 5


class Features(nn.Module):
    """What torchmetrics takes for an Inception network: our feature network, or none for features that are there already."""

    def __init__(self, network: FeatureNetwork | None, dim: int) -> None:
        super().__init__()
        self.network, self.num_features = network, dim

    def forward(self, x: Tensor) -> Tensor:
        """(N, dim)."""
        return x if self.network is None else self.network.features(x)


@torch.inference_mode()
def calls(comparison: str) -> dict[str, Callable[[], object]]:
    """The peer's call and ours."""
    rng = np.random.default_rng(0)
    network = seeded(lambda: FeatureNetwork(1, 10), 0).requires_grad_(False)
    dim = network.settings["dim"]
    # Two clouds that overlap in part, so that no metric sits at an end of its range.
    real, fake = rng.normal(size=(N, dim)), 0.9 * rng.normal(size=(N, dim)) + 0.3
    tensors = torch.from_numpy(real), torch.from_numpy(fake)
    images = torch.from_numpy(rng.uniform(-1, 1, (N, 1, 16, 16)).astype(np.float32))

    def fid(network: FeatureNetwork | None, batches: list[tuple[Tensor, bool]]) -> FrechetInceptionDistance:
        metric = FrechetInceptionDistance(Features(network, dim))
        for batch, is_real in batches:
            metric.update(batch, real=is_real)
        return metric

    def torchmetrics_kid() -> object:
        metric = KernelInceptionDistance(Features(None, dim))
        metric.update(tensors[0], real=True)
        metric.update(tensors[1], real=False)
        return metric.compute()

    return {
        "features": {
            "torchmetrics": lambda: fid(network, [(batch, True) for batch in images.split(1000)]),
            "sferd_lab": lambda: extract(network, images),
        },
        "Frechet distance": {
            "torchmetrics": lambda: fid(None, [(tensors[0], True), (tensors[1], False)]).compute(),
            "sferd_lab": lambda: frechet_distance(real, fake),
        },
        "kernel distance": {"torchmetrics": torchmetrics_kid, "sferd_lab": lambda: kid(real, fake)},
        "precision, recall, density, coverage": {
            "prdc": lambda: compute_prdc(real, fake, NEIGHBOURS),
            "sferd_lab": lambda: precision_recall_density_coverage(real, fake, NEIGHBOURS),
        },
    }[comparison]


COMPARISONS = ("features", "Frechet distance", "kernel distance", "precision, recall, density, coverage")


def main() -> None:
    """Measure, write the table, print its summary."""
    rows = []
    for comparison in COMPARISONS:
        peaks = {what: in_a_process(__file__, comparison, what) for what in calls(comparison)}
        timed = alternate(calls(comparison), REPETITIONS, comparison=comparison, case=f"{N} images")
        rows += [row | {"peak_mib": peaks[row["what"]]} for row in timed]
    table = write(rows, "metric_speed")
    print(describe(table))
    for (comparison, what), peak in table.groupby(["comparison", "what"], sort=False)["peak_mib"].first().items():
        print(f"{comparison}, {what}: peak memory of the process {peak:.0f} MiB")


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        calls(sys.argv[1])[sys.argv[2]]()
        print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))
