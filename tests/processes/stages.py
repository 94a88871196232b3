"""Train a few small stages, in one process or several, and keep what came out: ``stages.py FOLDER [steps before a stop]``."""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from pathlib import Path

import torch
from torch import nn

import sferd_lab.train as training
from sferd_lab import processes
from sferd_lab.data import Split
from sferd_lab.denoiser import NetworkDenoiser
from sferd_lab.diffusion import HALF_PI
from sferd_lab.distill import ConsistencyTarget, ProgressiveTarget, denoising_target
from sferd_lab.experiment import on_images
from sferd_lab.files import save_tensors
from sferd_lab.semantic import SemanticDenoiser
from sferd_lab.train import TrainSettings, train
from sferd_lab.unet import UNet, UNetSettings


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


IMAGES = Split(normal(24, 1, 4, 4).clamp(-1, 1), torch.arange(24) % 3)
PLAIN = Split(IMAGES.images, None)
BASE = {"steps": 6, "batch_size": 8, "warmup": 2, "checkpoint_every": 2}  # and the default device


def unet(seed: int, **shape: object) -> NetworkDenoiser:
    torch.manual_seed(seed)
    network = UNet(UNetSettings(**{"channels": 1, "widths": (8, 8), "attention": (0,)} | shape))
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    return NetworkDenoiser(network)


def semantic() -> SemanticDenoiser:
    torch.manual_seed(4)
    model = SemanticDenoiser(unet(3).requires_grad_(False), 2)
    for parameter in model.gradient.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


# Name: model, target, data, settings. The semantic one's encoder standardises over the whole batch, whoever holds which part of it.
STAGES = {
    "teacher": (lambda: unet(1, classes=3), denoising_target(0.0, HALF_PI), IMAGES, {"label_dropout": 0.3, "null_label": 3}),
    "progressive": (lambda: unet(1), ProgressiveTarget(unet(2), 2), PLAIN, {"anneal": "linear"}),
    "consistency": (lambda: unet(1), ConsistencyTarget(unet(2), 4), PLAIN, {"target_decay": 0.9, "loss": "pseudo_huber"}),
    "semantic": (semantic, denoising_target(0.0, HALF_PI, on_images), PLAIN, {"z_dim": 2, "z_noise": 0.1}),
}


def main(folder: Path, stop: int | None) -> None:
    processes.connect(processes.on_cpu("auto"))
    saved = Counter()
    keep, training.save_checkpoint = training.save_checkpoint, lambda path, *rest: (saved.update([path.stem]), keep(path, *rest))
    for name, (build, target, data, options) in STAGES.items():
        states = train(build(), target, data, TrainSettings(**BASE | options), folder / f"{name}-checkpoint.safetensors")
        *_, last = itertools.islice(states, stop)
        states.close()
        tensors = {"losses": last.losses, **{f"ema.{key}": value for key, value in last.ema.state_dict().items()}}
        # Each process writes its own: they must have the same.
        info = {"processes": processes.count(), "checkpoints": saved[f"{name}-checkpoint"]}
        save_tensors(folder / f"{name}-{processes.rank()}.safetensors", tensors, info)
    training.save_checkpoint = keep


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None)
