"""The semantic gradient predictor (SGP): an encoder, a predictor of the student's correction given its code, and a prior over codes.

    z = E(x0),   h = G(student's features at (x_phi, phi), z),   v <- v_student + h

In PDAE (Zhang et al. 2022) a predictor learns G = grad log p(z | x_phi), and x0_hat gains (sin^2/cos)(phi) G by Tweedie's formula. Its
coefficient is 2e4 near pure noise, so the predictor here speaks velocity: x0_hat gains -sin(phi) h, with G = -(cos/sin)(phi) h. The same
functions, a bounded coefficient.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sferd_lab import processes
from sferd_lab.data import Mixture
from sferd_lab.denoiser import Denoiser, NetworkDenoiser, Prediction
from sferd_lab.diffusion import Angle, angle_grid, as_angle
from sferd_lab.errors import SferdError
from sferd_lab.sample import ddim
from sferd_lab.unet import Capture, Decoder, Features, Middle, UNet, UNetSettings, angle_embedding, group_norm

SGP_TARGETS = ("walk", "data", "conditional")


class Standardise(nn.BatchNorm1d):
    """Codes (B, z_dim) to mean 0 and variance 1 over the batch: over that of all processes, where there are several."""

    def __init__(self, z_dim: int) -> None:
        super().__init__(z_dim, affine=False)

    def forward(self, codes: Tensor) -> Tensor:
        """The standardised codes."""
        if not self.training or processes.count() == 1:
            return super().forward(codes)
        # torch's own SyncBatchNorm does the same on GPUs alone.
        return super().forward(processes.Everyone.apply(codes)).chunk(processes.count())[processes.rank()]


class Encoder(nn.Module):
    """E: images (B, C, H, W) to codes z (B, z_dim), standardised over the training distribution by a batch norm without parameters.

    The standardisation is what gives a noise of given size on z a meaning.
    """

    def __init__(self, channels: int, z_dim: int, width: int = 32) -> None:
        super().__init__()
        self.settings = {"channels": channels, "z_dim": z_dim, "width": width}
        self.convolutions = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            group_norm(width),
            nn.SiLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            group_norm(2 * width),
            nn.SiLU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            group_norm(2 * width),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(4),
        )
        self.code = nn.Linear(2 * width * 16, z_dim)
        self.standardise = Standardise(z_dim)

    @property
    def z_dim(self) -> int:
        """Size of a code."""
        return self.code.out_features

    def forward(self, images: Tensor) -> Tensor:
        """The codes of ``images``."""
        return self.standardise(self.code(self.convolutions(images).flatten(1)))


class GradientPredictor(nn.Module):
    """G: the student's features and a code z to a velocity shift h; its own middle and decoder, told z by AdaGN, its head zero at first."""

    def __init__(self, shape: UNetSettings, z_dim: int) -> None:
        super().__init__()
        self.middle = Middle("semantic.middle", shape.widths[-1], shape.emb_dim, shape.heads, z_dim)
        self.decoder = Decoder(shape, z_dim)

    def forward(self, features: Features, z: Tensor) -> Tensor:
        """The shift h (B, C, H, W)."""
        return self.decoder(features, self.middle(features.middle, features.emb, z), z)


class SemanticDenoiser(Denoiser):
    """A network denoiser corrected by G. Conditions: a code ``z`` (B, z_dim), or an ``image`` to encode, with ``z_noise`` added if given.

    Base and predictor share one pass of the base's encoder. ``blind`` is a control: whatever the code, G is told zeros, so that what it
    gains is its capacity's and its training's.
    """

    def __init__(self, base: NetworkDenoiser, z_dim: int, encoder_width: int = 32, blind: bool = False) -> None:
        super().__init__("gradient")
        if type(z_dim) is not int or z_dim < 1:
            raise SferdError(f"z_dim = {z_dim!r}; allowed: 1 or more")
        if not isinstance(blind, bool):
            raise SferdError(f"blind = {blind!r}; allowed: True, False")
        self.base, self.blind = base, blind
        is_foreign = not isinstance(base.network, UNet)
        self.gradient = base.network.gradient_predictor(z_dim) if is_foreign else GradientPredictor(base.network.shape, z_dim)
        self.encoder = Encoder(base.network.channels, z_dim, encoder_width)
        self.phi_lo, self.phi_hi = base.phi_lo, base.phi_hi

    @property
    def attention_layers(self) -> tuple[str, ...]:
        """The base network's."""
        return self.base.attention_layers

    def nfe(self) -> Counter[str]:
        """The base network's count and G's."""
        return self.base.nfe() + Counter({self.role: self.evaluations})

    def codes(self, z: Tensor | None, image: Tensor | None, z_noise: Tensor | None) -> Tensor:
        """The codes from whichever was given; raises SferdError when neither or both were, or z has another size."""
        if (z is None) == (image is None):
            raise SferdError("a semantic denoiser needs exactly one of the conditions z and image")
        if z is None:
            z = self.encoder(image)
            z = z if z_noise is None else z + z_noise
        if z.ndim != 2 or z.shape[1] != self.encoder.z_dim:
            raise SferdError(f"z has shape {tuple(z.shape)}; allowed: (B, {self.encoder.z_dim})")
        return torch.zeros_like(z) if self.blind else z

    def predict(
        self,
        x: Tensor,
        phi: Angle,
        layers: Sequence[str] = (),
        labels: Tensor | None = None,
        z: Tensor | None = None,
        image: Tensor | None = None,
        z_noise: Tensor | None = None,
    ) -> Prediction:
        """The base's velocity plus h."""
        z = self.codes(z, image, z_noise)
        capture: Capture | None = dict.fromkeys(layers) if layers else None
        network = self.base.network
        features = network.encode(x, phi, labels, capture)
        v = network.decoder(features, features.middle, None, capture) + self.gradient(features, z)
        self.base.evaluations += 1
        self.evaluations += 1
        return Prediction.from_v(x, v, phi, {name: map_ for name, map_ in (capture or {}).items() if map_ is not None})


class SkipMLP(nn.Module):
    """(x_phi, phi) to v for vectors x (B, dim): an MLP whose every layer sees x again (Diff-AE's MLPSkipNet, Preechakul et al. 2022)."""

    def __init__(self, dim: int, width: int = 256, depth: int = 4) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(64, width), nn.SiLU(), nn.Linear(width, width))
        self.layers = nn.ModuleList(nn.Linear(dim + (width if index else 0), width) for index in range(depth))
        self.scales = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.head = nn.Linear(dim + width, dim)

    def forward(self, x: Tensor, phi: Tensor) -> Tensor:
        """The velocity (B, dim) at the angles ``phi`` (B,)."""
        emb = F.silu(self.time(angle_embedding(phi, 64)))
        h = x
        for index, (layer, scale) in enumerate(zip(self.layers, self.scales, strict=True)):
            h = layer(torch.cat([h, x], 1) if index else h)
            h = F.silu(F.layer_norm(h, h.shape[1:]) * (1 + scale(emb)))
        return self.head(torch.cat([h, x], 1))


class LatentDenoiser(Denoiser):
    """The latent prior's denoiser, and that of any small vector: a ``SkipMLP``."""

    def __init__(self, z_dim: int, width: int = 256, depth: int = 4, role: str = "prior") -> None:
        super().__init__(role)
        self.settings = {"z_dim": z_dim, "width": width, "depth": depth}
        self.network = SkipMLP(z_dim, width, depth)

    def predict(self, x: Tensor, phi: Angle, layers: Sequence[str] = ()) -> Prediction:
        """One pass; ``x`` (B, z_dim) is a noised code."""
        self.evaluations += 1
        return Prediction.from_v(x, self.network(x, as_angle(phi, x).flatten().expand(len(x))), phi)


class DiffusionPrior(nn.Module):
    """Codes by a small diffusion model: DDIM in ``steps`` steps over standardised codes, then back to z's own mean and scale.

    Raises SferdError unless ``steps`` is 1 to 10,000.
    """

    def __init__(self, denoiser: LatentDenoiser, mean: Tensor, std: Tensor, steps: int = 20) -> None:
        super().__init__()
        if type(steps) is not int or not 1 <= steps <= 10_000:
            raise SferdError(f"steps = {steps!r} of the diffusion prior; allowed: 1 to 10000")
        self.denoiser, self.steps = denoiser, steps
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.noise_dim = len(mean)

    def from_noise(self, noise: Tensor) -> Tensor:
        """Codes (B, z_dim) from standard normal noise (B, z_dim)."""
        *_, last = ddim(self.denoiser, noise.to(self.mean.device), angle_grid(self.steps), None)
        return last.x * self.std + self.mean

    def nfe(self) -> Counter[str]:
        """The latent network's evaluations so far."""
        return self.denoiser.nfe()


class MixturePrior(nn.Module):
    """Codes from a Gaussian mixture, fitted by scikit-learn: no network evaluation at all.

    weights (K,), means (K, z_dim), covariances (K, z_dim, z_dim). Raises SferdError as ``Mixture`` does, and for a singular covariance.
    """

    def __init__(self, weights: Tensor, means: Tensor, covariances: Tensor) -> None:
        super().__init__()
        Mixture(weights, means, covariances, tuple(means.shape[1:]))  # validates
        if covariances.ndim != 3 or bool(torch.linalg.cholesky_ex(covariances).info.any()):
            raise SferdError(f"mixture prior: covariances {tuple(covariances.shape)} are diagonal or singular; expected full ones")
        self.register_buffer("weights", weights)
        self.register_buffer("means", means)
        self.register_buffer("covariances", covariances)
        self.noise_dim = means.shape[1] + 1

    @classmethod
    def fit(cls, codes: Tensor, components: int, seed: int) -> MixturePrior:
        """Maximum likelihood on ``codes`` (N, z_dim), N >= 2. Raises SferdError for fewer codes than components, or codes not finite."""
        from sklearn.mixture import GaussianMixture

        if len(codes) < 2 or not 1 <= components <= len(codes):
            raise SferdError(f"prior_components = {components} for {len(codes)} codes; allowed: 1 to one component a code, of two or more")
        if not bool(codes.isfinite().all()):
            raise SferdError("the codes hold NaN or infinity; allowed: finite values")
        fitted = GaussianMixture(components, random_state=seed, reg_covar=1e-3, max_iter=500).fit(codes.cpu().double().numpy())
        return cls(*(torch.from_numpy(np.asarray(part)).float() for part in (fitted.weights_, fitted.means_, fitted.covariances_)))

    def from_noise(self, noise: Tensor) -> Tensor:
        """Codes (B, z_dim) from noise (B, z_dim + 1): the first number picks the component, the others place z within it."""
        noise = noise.to(self.means.device)
        uniform = 0.5 * (1 + torch.erf(noise[:, 0] / math.sqrt(2)))
        component = torch.searchsorted(self.weights.cumsum(0), uniform).clamp_max(len(self.weights) - 1)
        factor = torch.linalg.cholesky(self.covariances)[component]
        return self.means[component] + torch.einsum("bij,bj->bi", factor, noise[:, 1:])

    def nfe(self) -> Counter[str]:
        """Nothing is evaluated."""
        return Counter()


class KernelPrior(nn.Module):
    """Codes of training images, each with fresh normal noise of standard deviation ``bandwidth``: a kernel density estimate (Parzen 1962).

    With the noise that codes had in training (``z_noise``) it is the very distribution of codes that predictor and pair have learned from.
    It can be nothing but near the training set: judge it together with the memorisation ratio of the images.
    """

    def __init__(self, codes: Tensor, bandwidth: Tensor | float) -> None:
        super().__init__()
        bandwidth = bandwidth if isinstance(bandwidth, Tensor) else torch.tensor(bandwidth, dtype=codes.dtype)
        if codes.ndim != 2 or not len(codes) or bandwidth.ndim or not 0 <= bandwidth < math.inf or not bool(codes.sum().isfinite()):
            raise SferdError(
                f"kernel prior of codes {tuple(codes.shape)}, bandwidth {bandwidth.tolist()}; "
                "allowed: finite codes (N, z_dim), N 1 or more, and a finite number from 0"
            )
        self.register_buffer("codes", codes)
        self.register_buffer("bandwidth", bandwidth)
        self.noise_dim = codes.shape[1] + 1

    def from_noise(self, noise: Tensor) -> Tensor:
        """Codes (B, z_dim) from noise (B, z_dim + 1): the first number picks the training code, the others are the noise on it."""
        noise = noise.to(self.codes.device)
        uniform = 0.5 * (1 + torch.erf(noise[:, 0] / math.sqrt(2)))
        picked = (uniform * len(self.codes)).long().clamp_max(len(self.codes) - 1)
        return self.codes[picked] + self.bandwidth * noise[:, 1:]

    def nfe(self) -> Counter[str]:
        """Nothing is evaluated."""
        return Counter()


def semantic_info(model: SemanticDenoiser) -> dict[str, Any]:
    """What rebuilds E and G beside their base network."""
    return {"z_dim": model.encoder.z_dim, "encoder_width": model.encoder.settings["width"], "blind": model.blind}
