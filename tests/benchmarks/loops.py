"""What the method's own code adds to the networks it calls; ``data/results/loop_speed.csv`` keeps the numbers.

    python tests/benchmarks/loops.py

Three comparisons. "sampler": our DDIM loop against diffusers' pipeline, around one and the same network, and around one that does nothing.
"distillation": a training step against the passes it cannot do without, the teacher's forward and the student's forward and backward.
"one step": images of the 64-step teacher against those of one-step students.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from common import alternate, describe, write
from diffusers import DDIMPipeline, DDIMScheduler
from network import SHAPES
from torch import Tensor, nn

from sferd_lab.artifacts import seeded
from sferd_lab.config import make_settings
from sferd_lab.data import Split
from sferd_lab.denoiser import Denoiser, FunctionDenoiser, NetworkDenoiser
from sferd_lab.diffusion import HALF_PI
from sferd_lab.distill import ConsistencyTarget, ProgressiveTarget
from sferd_lab.guidance import GuidedDenoiser
from sferd_lab.sample import sample
from sferd_lab.semantic import MixturePrior, SemanticDenoiser
from sferd_lab.train import TrainSettings, keep_memory, train
from sferd_lab.unet import UNet

# Image sizes, with the preset whose guidance, code size and prior are used; the networks are those of network.py.
CASES = {8: "digits", 16: "fashion16", 32: "patches"}
BATCH, STEPS = 64, 64
REPETITIONS = 5


def network(size: int, seed: int = 0) -> NetworkDenoiser:
    """The network for that size, untrained. Heads that begin at zero are filled, so that attention and predictions are not constant."""
    denoiser = NetworkDenoiser(seeded(lambda: UNet(SHAPES[size]), seed))
    generator = torch.Generator().manual_seed(seed)
    for parameter in denoiser.parameters():
        if not parameter.any():
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    return denoiser


def image_shape(size: int) -> tuple[int, int, int]:
    """(C, H, W)."""
    return SHAPES[size].channels, size, size


class InPipeline(nn.Module):
    """A denoiser as the network of a diffusers pipeline: timesteps become angles."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, denoiser: Denoiser, shape: tuple[int, int, int], scheduler: DDIMScheduler) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.config = SimpleNamespace(sample_size=shape[1], in_channels=shape[0])
        self.angles = scheduler.alphas_cumprod.sqrt().acos()

    def forward(self, x: Tensor, t: Tensor) -> SimpleNamespace:
        """The velocity, where the pipeline looks for it."""
        return SimpleNamespace(sample=self.denoiser(x, self.angles[t].clamp_max(self.denoiser.phi_hi)).v)


def samplers(size: int) -> Iterator[dict[str, Any]]:
    """Rows of the first comparison."""
    shape = image_shape(size)
    scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=False)
    nothing = FunctionDenoiser(lambda x, phi: torch.zeros_like(x), "v", phi_lo=0.0, phi_hi=HALF_PI)
    for name, denoiser in (("a U-Net", network(size)), ("a network that does nothing", nothing)):
        pipeline = DDIMPipeline(InPipeline(denoiser, shape, scheduler), scheduler)
        pipeline.set_progress_bar_config(disable=True)
        calls: dict[str, Callable[[], object]] = {
            "diffusers": lambda pipeline=pipeline: pipeline(BATCH, num_inference_steps=STEPS, output_type="pt"),
            "sferd_lab": lambda denoiser=denoiser: sample(denoiser, BATCH, shape, STEPS, batch_size=BATCH),
        }
        yield from alternate(calls, REPETITIONS, comparison=f"sampler, {name}", case=f"{size}x{size}")


def distillation(size: int) -> Iterator[dict[str, Any]]:
    """Rows of the second comparison; "its passes" adds up passes timed in the same repetition."""
    shape, settings = image_shape(size), make_settings(CASES[size])
    teacher, student = network(size).requires_grad_(False), network(size, 1)
    blur = {"form": settings.guidance_form, "blur_kernel": settings.blur_kernel, "blur_sigma": settings.blur_sigma}
    guided = GuidedDenoiser(teacher, settings.guidance_weight, **blur)
    data = Split(torch.randn(1000, *shape).clamp(-1, 1), None)
    x, phi = torch.randn(BATCH, *shape), 1.5 * torch.rand(BATCH)
    # A target and its forward passes: two sub-steps of the teacher, or one and the target network's; guidance doubles the teacher's.
    targets = {
        "PD": (ProgressiveTarget(teacher, 4), 2),
        "guided PD": (ProgressiveTarget(guided, 4), 4),
        "CD": (ConsistencyTarget(teacher, 16), 2),
        "guided CD": (ConsistencyTarget(guided, 16), 3),
    }
    options = TrainSettings(steps=10**6, batch_size=BATCH, device="cpu")
    training = {name: train(network(size, 1), target, data, options) for name, (target, _) in targets.items()}

    @torch.inference_mode()
    def forward() -> None:
        teacher(x, phi)

    def forward_backward() -> None:
        student.zero_grad()
        student(x, phi).v.square().mean().backward()

    calls: dict[str, Callable[[], object]] = {name: lambda steps=steps: next(steps) for name, steps in training.items()}
    calls |= {"forward": forward, "forward and backward": forward_backward}
    # Steps are short: many rounds, and a median over each few of them.
    rows = list(alternate(calls, 9 * REPETITIONS))
    for repetition in range(1, REPETITIONS + 1):
        part = [row for row in rows if (row["repetition"] - 1) % REPETITIONS == repetition - 1]
        median = {what: sorted(row["seconds"] for row in part if row["what"] == what)[4] for what in calls}
        for name, (_, passes) in targets.items():
            about = {"comparison": f"distillation, {name}", "case": f"{size}x{size}", "repetition": repetition}
            yield about | {"what": "a training step", "seconds": median[name]}
            yield about | {"what": "its passes", "seconds": passes * median["forward"] + median["forward and backward"]}


def one_step(size: int) -> Iterator[dict[str, Any]]:
    """Rows of the third comparison: one full batch of images of each, noise and codes counted."""
    shape, settings = image_shape(size), make_settings(CASES[size])
    teacher = network(size)
    pair = seeded(lambda: SemanticDenoiser(network(size, 1), settings.z_dim), 1).eval()
    codes = torch.randn(1000, settings.z_dim, generator=torch.Generator().manual_seed(0))
    prior = MixturePrior.fit(codes, settings.prior_components, 0)
    n = settings.sampling_batch
    calls: dict[str, Callable[[], object]] = {
        "teacher, 64 steps": lambda: sample(teacher, n, shape, 64),
        "student, 1 step": lambda: sample(teacher, n, shape, 1),
        "student with SGP and prior, 1 step": lambda: sample(pair, n, shape, 1, prior=prior),
    }
    yield from alternate(calls, REPETITIONS, comparison=f"one step, {n} images", case=f"{size}x{size}")


if __name__ == "__main__":
    keep_memory()
    found = list(itertools.chain.from_iterable(part(size) for size in CASES for part in (samplers, distillation, one_step)))
    print(describe(write(found, "loop_speed")))
