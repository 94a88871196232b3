"""Every case on this machine's accelerator gives what it gives on the CPU, to float32's rounding; and how fast training is there.

Without an accelerator the CPU's second set of kernels stands in for one.
"""

from __future__ import annotations

import itertools
import sys
import time

import pytest
import torch
from cases import CASES, denoise
from fake import ACCELERATOR

from sferd_lab.data import Split
from sferd_lab.denoiser import NetworkDenoiser
from sferd_lab.train import TrainSettings, train
from sferd_lab.unet import UNet, UNetSettings

needs_accelerator = pytest.mark.skipif(ACCELERATOR is None, reason="torch.accelerator.is_available() is False: no GPU on this machine")
CPU = torch.device("cpu")
# Sums in another order differ by some 1e-6 of their size, and Adam's first steps, which follow the sign of a gradient alone, multiply that.
TOLERANCE = {"rtol": 1e-3, "atol": 1e-4}


# TF32 keeps 10 bits of float32's 23.
torch.backends.cuda.matmul.allow_tf32 = False
torch.backends.cudnn.allow_tf32 = False


@needs_accelerator
@pytest.mark.parametrize("name", CASES)
def test_the_accelerator_computes_what_the_cpu_does(name: str) -> None:
    torch.testing.assert_close(CASES[name](ACCELERATOR), CASES[name](CPU), **TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_other_kernels_of_the_cpu_stay_within_the_tolerance(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = CASES[name](CPU)
    assert expected.isfinite().all()
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    torch.testing.assert_close(CASES[name](CPU), expected, **TOLERANCE)


@needs_accelerator
def test_training_on_images_of_cifars_shape_and_how_fast(capsys: pytest.CaptureFixture[str]) -> None:
    generator = torch.Generator().manual_seed(0)
    images = Split(torch.rand(256, 3, 32, 32, generator=generator) * 2 - 1, None)
    network = NetworkDenoiser(UNet(UNetSettings(3, (64, 128, 128), blocks=2, attention=(1, 2), heads=4)))
    states = train(network, denoise, images, TrainSettings(steps=25, batch_size=128))
    # Every step reads its loss back, so the clock stands where the device does. The first ones choose kernels.
    *_, warm = itertools.islice(states, 5)
    started = time.perf_counter()
    *_, last = states
    torch.accelerator.synchronize()
    rate = (last.step - warm.step) / (time.perf_counter() - started)
    assert last.step == 25
    assert last.losses.isfinite().all()
    with capsys.disabled():
        sys.stdout.write(f"\n3x32x32, batch 128, {ACCELERATOR.type}: {rate:.1f} training steps a second\n")
