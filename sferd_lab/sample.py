"""Samplers: generators that walk a denoiser from noise to data, yield every state and count what it cost.

``sample`` runs one of them for any number of images, in batches. Image i depends on its own seed alone: its noise, at every step,
comes from its own random stream, so the batch size changes nothing but rounding.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sferd_lab.denoiser import Denoiser, Prediction
from sferd_lab.diffusion import add_noise, angle_grid, check_descending, ddim_step, ddpm_step, heun_velocity
from sferd_lab.errors import SferdError


class SampleNoise:
    """Standard normal noise in which row i comes from a stream of its own, set by ``(seed, first + i)``."""

    def __init__(self, seed: int, count: int, first: int = 0, purpose: int = 0) -> None:
        if seed < 0 or first < 0 or count < 1:
            raise SferdError(f"seed = {seed}, first = {first}, count = {count}; allowed: 0 or more, and at least one sample")
        streams = (np.random.SeedSequence([seed, first + i, purpose]).generate_state(1, np.uint64)[0] for i in range(count))
        self.generators = [torch.Generator().manual_seed(int(stream) >> 1) for stream in streams]

    def draw(self, shape: Sequence[int], like: Tensor | None = None) -> Tensor:
        """The next noise (count, *shape), of the dtype and device of ``like``."""
        dtype = torch.get_default_dtype() if like is None else like.dtype
        noise = torch.stack([torch.randn(tuple(shape), generator=generator, dtype=dtype) for generator in self.generators])
        return noise if like is None else noise.to(like.device)


@dataclass(frozen=True)
class State:
    """A sampler after ``step`` steps: ``x`` (B, ...) at the angle ``phi``, and the ``prediction`` that led there (None at the start)."""

    step: int
    x: Tensor
    phi: float
    prediction: Prediction | None = None


def ddim(denoiser: Denoiser, x: Tensor, grid: Tensor, noise: SampleNoise | None = None, **condition: Tensor) -> Iterator[State]:
    """Deterministic DDIM (Song et al. 2021): one evaluation a step, no noise. ``grid`` descends from the angle of ``x``."""
    yield State(0, x, float(grid[0]))
    for step, (phi, psi) in enumerate(itertools.pairwise(grid), start=1):
        prediction = denoiser(x, phi, **condition)
        x = ddim_step(x, prediction.v, phi, psi)
        yield State(step, x, float(psi), prediction)


def heun(denoiser: Denoiser, x: Tensor, grid: Tensor, noise: SampleNoise | None = None, **condition: Tensor) -> Iterator[State]:
    """Heun's second-order method on the angle: two evaluations a step, one for a last step to 0 (Karras et al. 2022, algorithm 1)."""
    yield State(0, x, float(grid[0]))
    for step, (phi, psi) in enumerate(itertools.pairwise(grid), start=1):
        prediction = denoiser(x, phi, **condition)
        v = prediction.v
        if psi > 0:
            x_middle = ddim_step(x, v, phi, psi)
            v = heun_velocity(v, denoiser(x_middle, psi, **condition).v, x_middle, phi, psi)
        x = ddim_step(x, v, phi, psi)
        yield State(step, x, float(psi), prediction)


def ddpm(denoiser: Denoiser, x: Tensor, grid: Tensor, noise: SampleNoise, **condition: Tensor) -> Iterator[State]:
    """Ancestral sampling (Ho et al. 2020): one evaluation a step, fresh noise at each but the last."""
    yield State(0, x, float(grid[0]))
    for step, (phi, psi) in enumerate(itertools.pairwise(grid), start=1):
        prediction = denoiser(x, phi, **condition)
        x = ddpm_step(x, prediction.x0, noise.draw(x.shape[1:], x), phi, psi)
        yield State(step, x, float(psi), prediction)


def consistency(denoiser: Denoiser, x: Tensor, grid: Tensor, noise: SampleNoise, **condition: Tensor) -> Iterator[State]:
    """Multistep consistency sampling (Song et al. 2023, algorithm 1): denoise to 0, add fresh noise for the next angle, and again."""
    yield State(0, x, float(grid[0]))
    for step, (phi, psi) in enumerate(itertools.pairwise(grid), start=1):
        check_descending(phi, psi)
        prediction = denoiser(x, phi, **condition)
        x = prediction.x0 if psi == 0 else add_noise(prediction.x0, noise.draw(x.shape[1:], x), psi)
        yield State(step, x, float(psi), prediction)


Sampler = Callable[..., Iterator[State]]
SAMPLERS: dict[str, Sampler] = {"ddim": ddim, "heun": heun, "ddpm": ddpm, "consistency": consistency}


class Prior(Protocol):
    """Where semantic codes come from: a map from standard normal noise (B, noise_dim) to codes z (B, z_dim)."""

    noise_dim: int

    def from_noise(self, noise: Tensor) -> Tensor:
        """The codes."""
        ...

    def nfe(self) -> Counter[str]:
        """Evaluations of the prior's network so far."""
        ...


@dataclass(frozen=True)
class Samples:
    """``images`` (N, C, H, W) and what each took: network evaluations by role."""

    images: Tensor
    nfe: dict[str, int]


def sampler_by_name(name: str) -> Sampler:
    """One of ``SAMPLERS``; raises SferdError that lists them."""
    if name not in SAMPLERS:
        raise SferdError(f"sampler = '{name}'; allowed: {', '.join(SAMPLERS)}")
    return SAMPLERS[name]


@torch.inference_mode()
def sample(
    denoiser: Denoiser,
    n: int,
    shape: Sequence[int],
    steps: int,
    *,
    method: str = "ddim",
    seed: int = 0,
    first: int = 0,
    batch_size: int = 250,
    condition: dict[str, Tensor] | None = None,
    prior: Prior | None = None,
    grid: Tensor | None = None,
    device: torch.device | str = "cpu",
    progress: str | None = None,
) -> Samples:
    """``n`` images of ``shape`` (C, H, W) in ``steps`` steps on ``grid`` (default: equal angles from phi_hi to 0).

    They are the images ``first`` to ``first + n - 1`` of those that ``seed`` gives, of which other processes may draw the others.
    ``condition`` holds tensors with one row an image; a ``prior`` adds the condition ``z``, drawn from streams of its own. ``progress``
    names a progress bar. Raises SferdError for a count below 1, an unknown method, a condition with another number of rows, or a grid
    that has not ``steps + 1`` descending angles.
    """
    if n < 1:
        raise SferdError(f"n = {n} samples; allowed: 1 or more")
    if batch_size < 1:
        raise SferdError(f"batch_size = {batch_size}; allowed: 1 or more")
    for name, rows in (condition or {}).items():
        if len(rows) != n:
            raise SferdError(f"condition '{name}' has {len(rows)} rows for {n} samples; allowed: one row each")
    walk = sampler_by_name(method)
    grid = angle_grid(steps, denoiser.phi_hi) if grid is None else grid
    if len(grid) != steps + 1:
        raise SferdError(f"the grid has {len(grid)} angles for steps = {steps}; allowed: steps + 1")
    images, batches = [], range(0, n, batch_size)
    before = _count(denoiser, prior)
    for start in tqdm(batches, desc=progress, disable=progress is None, leave=False):
        count = min(batch_size, n - start)
        told = {name: rows[start : start + count].to(device) for name, rows in (condition or {}).items()}
        if prior is not None:
            told["z"] = prior.from_noise(SampleNoise(seed, count, first + start, purpose=1).draw((prior.noise_dim,)).to(device))
        noise = SampleNoise(seed, count, first + start)
        state = None
        for state in walk(denoiser, noise.draw(shape).to(device), grid, noise, **told):  # noqa: B007 (the last state is the result)
            pass
        images.append(state.x.cpu())
    spent = _count(denoiser, prior) - before
    return Samples(torch.cat(images), {role: calls // len(batches) for role, calls in sorted(spent.items())})


def _count(denoiser: Denoiser, prior: Prior | None) -> Counter[str]:
    return denoiser.nfe() + (prior.nfe() if prior is not None else Counter())
