"""The speed comparisons compare like with like."""

import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sferd_lab.unet import UNet

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
network = pytest.importorskip("network")
peer = pytest.importorskip("peer")


def flops(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("size", network.SHAPES)
def test_the_peer_has_our_arrangement_parameters_and_work(size):
    shape = network.SHAPES[size]
    ours, theirs = UNet(shape), peer.matched_peer(shape, size)
    counts = [sum(parameter.numel() for parameter in model.parameters()) for model in (ours, theirs)]
    assert counts[1] == pytest.approx(counts[0], rel=0.02)
    x, phi = torch.randn(2, shape.channels, size, size), torch.rand(2)
    with torch.no_grad():
        assert theirs(x, phi).sample.shape == ours(x, phi).shape
        assert flops(lambda: theirs(x, phi)) == pytest.approx(flops(lambda: ours(x, phi)), rel=0.01)


def test_the_summary_takes_ratios_within_a_repetition():
    lines = [
        {"size": 8, "network": name, "repetition": repetition, "step_seconds": seconds, "forward_seconds": seconds / 4, "step_gflop": 2.0}
        for repetition, scale in ((1, 1.0), (2, 3.0), (3, 2.0))
        for name, seconds in (("sferd_lab", 0.01 * scale), ("diffusers, stock", 0.015 * scale))
    ]
    text = network.describe(pd.DataFrame(lines).assign(convolution_gflops=400.0))
    assert "8x8: a step 20.0 ms, 100 GFLOP/s, 25% of a large convolution's" in text
    assert "step, diffusers, stock: 1.50 times ours, 1.50 to 1.50" in text
