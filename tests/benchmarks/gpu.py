"""How fast a GPU trains the teachers of three presets and passes through them, against its data sheet's peak.

    python tests/benchmarks/gpu.py

``data/results/gpu_speed.csv`` keeps the numbers. ``peak_share`` is the rate over the data sheet's peak for the arithmetic used: what
``sferd_lab.plan`` needs for a device that it cannot time. ``memory_gb`` is the most that a training step held, beside what the plan says.
The networks are untrained and the images noise, which time does not depend on.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pandas as pd
import torch
from common import RESULTS

from sferd_lab.config import make_settings
from sferd_lab.data import Split
from sferd_lab.denoiser import NetworkDenoiser
from sferd_lab.distill import denoising_target
from sferd_lab.files import replacing
from sferd_lab.plan import ACCELERATORS, FOREVER, META, SHAPES, accelerator, count, image_shape, plan, step_work
from sferd_lab.train import TrainSettings, set_precision, train
from sferd_lab.unet import UNet, UNetSettings

# Of the presets' batch sizes ImageNet's 2,048 does not fit one GPU.
BATCHES = {"fashion16": 64, "cifar10": 128, "imagenet64": 64}
PRECISIONS = ("no", "tf32", "bf16")
REPETITIONS = 3


def timed(call: Callable[[], object], seconds: float) -> list[float]:
    """Seconds a call, ``REPETITIONS`` times: of as many in a row as fill about so many ``seconds``, with nothing else waiting."""

    def several(number: int) -> float:
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(number):
            call()
        torch.cuda.synchronize()
        return (time.perf_counter() - started) / number

    several(3)  # chooses kernels
    number = max(1, round(seconds / several(3)))
    return [several(number) for _ in range(REPETITIONS)]


def teacher(preset: str, precision: str, seconds: float = 0.4) -> Iterator[dict[str, Any]]:
    """Rows of a training step of that preset's teacher, and of a pass of its network as samplers and targets make it."""
    settings = make_settings(
        preset, precision=precision, batch_size=BATCHES[preset], methods=["cd"], guided=[False], sgp=False, retrain=True
    )
    shape, classes = image_shape(settings), SHAPES[settings.data][1] if settings.class_conditional else 0
    network = UNetSettings(shape[0], settings.widths, settings.blocks, settings.attention, settings.heads, classes)
    target = denoising_target(NetworkDenoiser.phi_lo, NetworkDenoiser.phi_hi)
    training = TrainSettings(FOREVER, settings.batch_size, precision=precision)

    def data(device: torch.device | str) -> Split:
        labels = torch.zeros(256, dtype=torch.long, device=device) if classes else None
        return Split(torch.randn(256, *shape, device=device).clamp(-1, 1), labels)

    with META:
        counted = NetworkDenoiser(UNet(network))
    _, update = step_work(counted.train(), target, data(META), training)
    x = data("cuda").images[: settings.batch_size]
    labels = {"labels": torch.zeros(len(x), dtype=torch.long, device="cuda")} if classes else {}
    with torch.inference_mode():
        some = {name: rows.to(META) for name, rows in labels.items()}
        inference = count(lambda: counted(x.to(META), 1.0, **some))
    with torch.device("cuda"):
        model = NetworkDenoiser(UNet(network))
    steps = train(model, target, data("cpu"), training)

    @torch.inference_mode()
    def draw() -> None:
        set_precision(precision)
        model(x, 1.0, **labels)

    (line,) = plan(settings, next(iter(ACCELERATORS))).query("stage == 'teacher'").to_dict("records")
    device = torch.cuda.get_device_name()
    for what, call, work in (("training step", lambda: next(steps), update), ("pass", draw, inference)):
        trains = what == "training step"
        torch.cuda.reset_peak_memory_stats()
        for repetition, taken in enumerate(timed(call, seconds), 1):
            yield {
                "preset": preset,
                "what": what,
                "precision": precision,
                "batch": settings.batch_size,
                "repetition": repetition,
                "ms": 1000 * taken,
                "tflop": work.flops / 1e12,
                "memory_gb": torch.cuda.max_memory_allocated() / 1e9 if trains else None,
                "planned_gb": line["memory"] if trains else None,
                "peak_share": work.flops / taken / peak(device, precision, trains),
                "device": device,
                "torch": torch.__version__,
            }


def peak(device: str, precision: str, trains: bool) -> float:
    """The data sheet's FLOPs a second for the arithmetic of a training step, or of a pass; NaN for an unknown product."""
    names = [name for name in ACCELERATORS if name in device]
    if not names:
        return float("nan")
    named = accelerator(names[0], precision, efficiency=1.0)
    return (named.training if trains else named.inference).flops


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("torch.cuda.is_available() is False: there is no GPU to time")
    table = pd.DataFrame([row for preset in BATCHES for precision in PRECISIONS for row in teacher(preset, precision)])
    with replacing(RESULTS / "gpu_speed.csv") as temporary:
        table.to_csv(temporary, index=False, float_format="%.4g")
    sys.stdout.write(f"{table.to_string(index=False, float_format='{:.3g}'.format)}\n")
