"""Every case on this machine's accelerator gives what it gives on the CPU, to float32's rounding; and how fast training is there.

Without an accelerator the CPU's second set of kernels stands in for one.
"""

from __future__ import annotations

import itertools
import sys
import time
from pathlib import Path

import pytest
import torch
from cases import CASES, IMAGES, denoise, weighted
from fake import ACCELERATOR

from sferd_lab.artifacts import seeded
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
@pytest.mark.parametrize("options", [{"precision": "tf32"}, {"precision": "bf16"}, {"precision": "fp16"}, {"compile": True}], ids=str)
def test_faster_arithmetic_learns_what_single_precision_does(options: dict[str, object]) -> None:
    slopes = Split(torch.linspace(-1, 1, 20)[:, None, None, None] * torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8), None)

    def learned(**more: object) -> torch.Tensor:
        network = NetworkDenoiser(seeded(lambda: UNet(UNetSettings(1, (8, 8), blocks=1, attention=(1,), heads=2)), 0))
        *_, last = train(network, denoise, slopes, TrainSettings(steps=150, batch_size=16, lr=2e-3, warmup=10, **more))
        return last.losses

    single, faster = learned(), learned(**options)
    assert single[-20:].mean() < 0.5 * single[:20].mean()
    torch.testing.assert_close(faster[0], single[0], rtol=0.02, atol=0)
    torch.testing.assert_close(faster[-20:].mean(), single[-20:].mean(), rtol=0.05, atol=0)


@needs_accelerator
def test_a_training_in_half_precision_goes_on_with_its_scaler(tmp_path: Path) -> None:
    settings = TrainSettings(steps=6, batch_size=8, checkpoint_every=3, precision="fp16")

    def network() -> NetworkDenoiser:
        return NetworkDenoiser(weighted(UNet(UNetSettings(1, (8,), blocks=1, attention=(0,), heads=2)), 0))

    *_, whole = train(network(), denoise, IMAGES, settings)
    states = train(network(), denoise, IMAGES, settings, tmp_path / "checkpoint.safetensors")
    for _ in range(4):
        next(states)
    states.close()
    *_, resumed = train(network(), denoise, IMAGES, settings, tmp_path / "checkpoint.safetensors")
    torch.testing.assert_close(resumed.losses, whole.losses, rtol=1e-3, atol=1e-4)


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
