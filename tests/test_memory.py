"""Memory is bounded by what is stated, however long a run or large a set is."""

from __future__ import annotations

import re
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sferd_lab.analysis import spatial
from sferd_lab.analysis.spatial import attention_maps
from sferd_lab.denoiser import FiniteSetDenoiser, NetworkDenoiser
from sferd_lab.metrics import kid, memorisation_ratio, precision_recall_density_coverage
from sferd_lab.unet import UNet, UNetSettings

FAULTS = Path(__file__).parent / "faults"
MIB = 2**20


class Largest(TorchDispatchMode):
    """Notes how many numbers the largest new tensor has."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **kwargs or {})
        storages = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in storages:
                self.numbers = max(self.numbers, leaf.numel())
        return result


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of the memory from Linux")
def test_a_ten_times_longer_training_has_the_same_peak(tmp_path: Path) -> None:
    table = tmp_path / "reliability.csv"
    command = [sys.executable, str(FAULTS / "memory.py"), "steps=1500", f"table={table}", "prior"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    short, long = map(float, re.findall(r"([\d.]+) MiB", done.stdout))
    assert long - short < 4
    rows = pd.read_csv(table)
    assert rows["outcome"].tolist() == ["peak MiB at 150 steps", "peak MiB at 1,500 steps"]
    assert (rows["count"] > 100).all()


def test_the_ideal_denoiser_s_largest_tensor_is_its_chunk_whatever_the_number_of_images() -> None:
    images = torch.rand(3000, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    x = torch.randn(50, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    whole = FiniteSetDenoiser(images)(x, 0.7).x0
    for chunk in (2**12, 2**14):
        with Largest() as largest:
            parted = FiniteSetDenoiser(images, chunk_elements=chunk)(x, 0.7).x0
        assert largest.numbers <= chunk
        torch.testing.assert_close(parted, whole)
    with Largest() as largest:
        FiniteSetDenoiser(images)(x, 0.7)
    assert largest.numbers == 50 * 3000, "the measurement sees what a single chunk takes"


METRICS: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], object]] = {
    "kid": lambda a, b, _: kid(a, b),
    "precision to coverage": lambda a, b, _: precision_recall_density_coverage(a, b),
    "memorisation": lambda a, b, c: memorisation_ratio(a, b, c, resamples=10),
}


@pytest.mark.parametrize("name", METRICS)
def test_a_pairwise_metric_never_holds_all_pairs(name: str) -> None:
    random = np.random.default_rng(0)
    a, b, c = (random.normal(size=(4000, 8)) for _ in range(3))
    METRICS[name](a[:100], b[:100], c[:100])  # imports what it needs
    tracemalloc.start()
    try:
        METRICS[name](a, b, c)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # All pairs as float64 are 122 MiB; a block of them is 8, and a few are at work at once.
    assert peak < 40 * MIB


def test_attention_maps_of_many_images_are_taken_a_bounded_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network = UNet(UNetSettings(widths=(8, 8), blocks=1, classes=3))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    denoiser = NetworkDenoiser(network)
    x = torch.randn(11, 1, 8, 8)
    condition = {"labels": torch.arange(11) % 3}
    # Of an image, in all layers.
    each = sum(map_.weights[0].numel() for map_ in denoiser(x, 0.8, denoiser.attention_layers, **condition).attention.values())
    predict, taken = denoiser.predict, []

    def counted(x: Tensor, *rest: Any, **told: Tensor) -> Any:
        taken.append(len(x))
        return predict(x, *rest, **told)

    for phi in (0.8, torch.linspace(0.2, 1.4, 11)):
        whole = attention_maps(denoiser, x, phi, **condition)
        with monkeypatch.context() as patch:
            patch.setattr(spatial, "MAP_NUMBERS", 3 * each + 1)
            patch.setattr(denoiser, "predict", counted)
            taken.clear()
            parted = attention_maps(denoiser, x, phi, **condition)
        assert taken == [1, 3, 3, 3, 2]
        assert parted.keys() == whole.keys() == set(denoiser.attention_layers)
        for name, values in whole.items():
            np.testing.assert_allclose(parted[name], values, rtol=1e-5, atol=1e-6)
