"""What must run on any device: every way to train, sample and look inside, on networks of a few weights.

A case takes a device and gives the numbers that came out, on the CPU: losses of the first steps, samples, maps. Each is made of the
library's own functions; training is ``sferd_lab.train.train`` itself: batch, target, loss, clipping, optimiser, schedule, averages.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sferd_lab.config import make_settings
from sferd_lab.data import Mixture, Split
from sferd_lab.denoiser import ClassifierFree, Denoiser, FiniteSetDenoiser, FunctionDenoiser, MixtureDenoiser, NetworkDenoiser
from sferd_lab.diffusion import HALF_PI
from sferd_lab.distill import ConsistencyTarget, DataTarget, ProgressiveTarget, denoising_target
from sferd_lab.experiment import Row, Run, as_student, on_codes, on_images
from sferd_lab.guidance import FORMS, MASKS, GuidedDenoiser
from sferd_lab.metrics import FeatureNetwork, accuracy, extract, train_feature_network
from sferd_lab.sample import SAMPLERS, Prior, sample
from sferd_lab.semantic import DiffusionPrior, KernelPrior, LatentDenoiser, MixturePrior, SemanticDenoiser
from sferd_lab.train import MakeTarget, TrainSettings, train
from sferd_lab.unet import UNet, UNetSettings

CLASSES, Z_DIM, SHAPE = 3, 2, (1, 8, 8)
# A fake device has no values to drift: one step goes through everything. The second is the first with moments behind it.
STEPS = {"fakegpu": 1}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


IMAGES = Split(normal(20, *SHAPE).clamp(-1, 1), None)
CODES = Split(normal(20, Z_DIM), None)
LABELLED = Split(IMAGES.images, torch.arange(20) % CLASSES)
denoise = denoising_target(0.0, HALF_PI)


def weighted(module: nn.Module, seed: int = 0) -> nn.Module:
    """``module`` with normal weights: those that start at zero would hide what lies before them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return module


def teacher(classes: int = 0, seed: int = 0, widths: tuple[int, ...] = (8,)) -> NetworkDenoiser:
    """A network with attention in encoder, middle and decoder of its lowest level."""
    shape = UNetSettings(1, widths, blocks=1, attention=(len(widths) - 1,), heads=2, classes=classes)
    return NetworkDenoiser(weighted(UNet(shape), seed))


def frozen(denoiser: Denoiser, device: torch.device) -> Denoiser:
    return denoiser.requires_grad_(False).eval().to(device)


def pair(seed: int = 0) -> SemanticDenoiser:
    """A semantic gradient predictor on a frozen base."""
    return weighted(SemanticDenoiser(teacher(seed=seed), Z_DIM, encoder_width=8), seed + 1)


def named(device: torch.device) -> str:
    """The name of ``device`` in settings."""
    return "cpu" if device.type == "cpu" else "auto"


def losses(device: torch.device, model: Denoiser, target: MakeTarget, data: Split = IMAGES, **options: Any) -> Tensor:
    """The losses of the first steps of ``train``."""
    steps = STEPS.get(device.type, 3)
    settings = TrainSettings(
        **{"steps": steps, "batch_size": 4, "warmup": 0, "anneal": "linear", "clip": 0.5, "device": named(device)} | options
    )
    *_, last = train(model, target, data, settings)
    assert {parameter.device.type for part in (last.model, last.ema) for parameter in part.state_dict().values()} == {device.type}
    return last.losses


# Teachers


def plain_teacher(device: torch.device) -> Tensor:
    return losses(device, teacher(widths=(8, 8)), denoise)


def conditional_teacher(device: torch.device) -> Tensor:
    return losses(device, teacher(CLASSES), denoise, LABELLED, label_dropout=0.3, null_label=CLASSES, weight_decay=0.01)


def latent(seed: int = 0) -> LatentDenoiser:
    return weighted(LatentDenoiser(Z_DIM, width=8, depth=2), seed)


def latent_prior(device: torch.device) -> Tensor:
    return losses(device, latent(), denoise, CODES)


def going_on_from_a_checkpoint(device: torch.device) -> Tensor:
    """Interrupted after its first step, and continued from the file."""
    settings = TrainSettings(steps=2, batch_size=4, target_decay=0.9, checkpoint_every=1, device=named(device))
    target = ConsistencyTarget(frozen(latent(seed=9), device), 4)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.safetensors"
        states = train(latent(), target, CODES, settings, path)
        next(states)
        states.close()
        *_, last = train(latent(seed=5), target, CODES, settings, path)
    assert last.step == 2
    return last.losses


# Distillation


def progressive(device: torch.device) -> Tensor:
    source = frozen(teacher(CLASSES, seed=9), device)
    return losses(device, as_student(source), ProgressiveTarget(source, 2), LABELLED, loss="x0_snr", null_label=CLASSES)


def consistency(solver: str, target_decay: float, loss: str, guided: bool = False) -> Callable[[torch.device], Tensor]:
    def case(device: torch.device) -> Tensor:
        source = frozen(teacher(seed=9), device)
        target = ConsistencyTarget(GuidedDenoiser(source, 0.3) if guided else source, 4, solver)
        return losses(device, teacher(), target, target_decay=target_decay, loss=loss)

    return case


def guided_progressive(device: torch.device) -> Tensor:
    source = frozen(teacher(seed=9), device)
    return losses(device, as_student(source), ProgressiveTarget(GuidedDenoiser(source, 0.3, form="eps"), 2))


# The semantic gradient predictor


def semantic(make_target: Callable[[Denoiser], MakeTarget], joint: bool = False) -> Callable[[torch.device], Tensor]:
    def case(device: torch.device) -> Tensor:
        model = pair()
        model.base.requires_grad_(joint)
        return losses(device, model, make_target(frozen(teacher(seed=9), device)), z_dim=Z_DIM, z_noise=0.1)

    return case


def distilled_pair(make_target: Callable[..., MakeTarget]) -> Callable[[torch.device], Tensor]:
    def case(device: torch.device) -> Tensor:
        source = frozen(pair(), device)
        told = on_codes(source)
        return losses(device, as_student(source), make_target(GuidedDenoiser(source, 0.3), told), z_dim=Z_DIM, z_noise=0.1)

    return case


# Sampling and looking inside


def samples(denoiser: Denoiser, device: torch.device, method: str = "ddim", steps: int = 2, **told: Any) -> Tensor:
    images = sample(frozen(denoiser, device), 3, SHAPE, steps, method=method, batch_size=2, device=device, **told).images
    assert images.device.type == "cpu"
    return images


def sampler(method: str) -> Callable[[torch.device], Tensor]:
    return lambda device: samples(teacher(), device, method)


def classifier_free(device: torch.device) -> Tensor:
    return samples(ClassifierFree(teacher(CLASSES), 1.5), device, condition={"labels": torch.arange(3)})


def with_codes(make_prior: Callable[[], nn.Module]) -> Callable[[torch.device], Tensor]:
    def case(device: torch.device) -> Tensor:
        prior: Prior = make_prior().eval().to(device)
        return samples(pair(), device, "consistency", prior=prior)

    return case


def mixture_prior() -> MixturePrior:
    return MixturePrior(torch.tensor([0.25, 0.75]), normal(2, Z_DIM), 0.5 * torch.eye(Z_DIM).repeat(2, 1, 1))


def kernel_prior() -> KernelPrior:
    return KernelPrior(normal(5, Z_DIM), 0.1)


def diffusion_prior() -> DiffusionPrior:
    return DiffusionPrior(latent(), normal(Z_DIM), torch.full((Z_DIM,), 2.0), steps=2)


def guidance(device: torch.device) -> Tensor:
    """Every mask in both forms, with and without angles of their own."""
    source, x = frozen(teacher(), device), normal(2, *SHAPE).to(device)
    phi = torch.tensor([0.4, 1.2], device=device)
    parts = [GuidedDenoiser(source, 0.3, form=form, mask=mask)(x, phi).x0 for form, mask in itertools.product(FORMS, MASKS)]
    return torch.stack(parts).cpu()


def attention(device: torch.device) -> Tensor:
    source = frozen(teacher(widths=(8, 8)), device)
    maps = source(normal(2, *SHAPE).to(device), 0.7, source.attention_layers).attention
    assert list(maps) == ["encoder.1.0", "middle", "decoder.1.0"]
    return torch.stack([map_.received() for map_ in maps.values()]).cpu()


def features(device: torch.device) -> Tensor:
    network = weighted(FeatureNetwork(1, CLASSES, dim=4, width=4)).to(device)
    return torch.from_numpy(extract(network, IMAGES.images, batch_size=8))


def feature_network(device: torch.device) -> Tensor:
    """Training one on images that lie on the device."""
    network = train_feature_network(IMAGES.images.to(device), LABELLED.labels, CLASSES, dim=4, steps=4, batch_size=4)
    assert accuracy(network, IMAGES.images.to(device), LABELLED.labels.to(device)) >= 0
    return torch.from_numpy(extract(network, IMAGES.images))


def exact(device: torch.device) -> Tensor:
    """The denoisers in closed form, and a function."""
    x, phi = normal(3, *SHAPE).to(device), torch.tensor([0.3, 0.8, 1.4], device=device)
    weights, means = torch.tensor([0.4, 0.6]), normal(2, 64)
    full = torch.eye(64).repeat(2, 1, 1) * torch.tensor([0.5, 2.0])[:, None, None]
    denoisers = [
        MixtureDenoiser(Mixture(weights, means, full, SHAPE)),
        MixtureDenoiser(Mixture(weights, means, torch.full((2, 64), 0.5), SHAPE)),
        FiniteSetDenoiser(IMAGES.images, chunk_elements=512),
        FunctionDenoiser(lambda x, phi: 0.5 * x, "x0", phi_lo=0.1),
    ]
    return torch.stack([denoiser.to(device)(x, phi).v for denoiser in denoisers]).cpu()


def experiment(device: torch.device) -> Tensor:
    """Stages of a run as the notebook calls them: a teacher, its conditional pair, the prior over its codes, samples; all read again."""
    options = dict.fromkeys(("teacher_steps", "sgp_steps", "prior_steps", "prior_sampling_steps", "blocks"), 1)
    options |= {
        "batch_size": 4,
        "widths": [8],
        "attention": [0],
        "z_dim": Z_DIM,
        "prior": "diffusion",
        "retrain": True,
        "device": named(device),
    }
    drawn = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(2):
            run = Run(make_settings("digits", run_folder=folder, **options), progress=False)
            assert run.device.type == device.type
            model = run.semantic_teacher(run.teacher())
            prior = run.prior("teacher-sgp", model)
            drawn.append(run.draw(Row("teacher", sampler="ddim", steps=1), model, range(4), prior).images)
    torch.testing.assert_close(*drawn)
    return drawn[0]


CASES: dict[str, Callable[[torch.device], Tensor]] = {
    "teacher": plain_teacher,
    "teacher, class-conditional": conditional_teacher,
    "latent diffusion prior": latent_prior,
    "resumed": going_on_from_a_checkpoint,
    "pd": progressive,
    "pd, guided": guided_progressive,
    "cd, ddim": consistency("ddim", 0.0, "v"),
    "cd, ddim, target network": consistency("ddim", 0.9, "l2"),
    "cd, heun": consistency("heun", 0.0, "pseudo_huber"),
    "cd, heun, target network, guided": consistency("heun", 0.9, "x0_snr", guided=True),
    "sgp, walk, pd": semantic(lambda source: ProgressiveTarget(source, 2, on_images)),
    "sgp, walk, cd": semantic(lambda source: ConsistencyTarget(source, 4, "ddim", on_images)),
    "sgp, data": semantic(lambda source: DataTarget(source, 2, on_images), joint=True),
    "sgp, conditional": semantic(lambda source: denoising_target(0.0, HALF_PI, on_images)),
    "pair, pd": distilled_pair(lambda source, told: ProgressiveTarget(source, 1, told, told)),
    "pair, cd": distilled_pair(lambda source, told: ConsistencyTarget(source, 4, "heun", told, told)),
    **{f"sampler {method}": sampler(method) for method in SAMPLERS},
    "classifier-free guidance": classifier_free,
    "codes from a mixture": with_codes(mixture_prior),
    "codes of training images, with noise": with_codes(kernel_prior),
    "codes from latent diffusion": with_codes(diffusion_prior),
    "guidance, every mask and form": guidance,
    "attention": attention,
    "features": features,
    "training of a feature network": feature_network,
    "exact denoisers": exact,
    "experiment": experiment,
}
