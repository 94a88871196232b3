"""Everything is a ``Denoiser``: (x_phi, phi) to a ``Prediction`` of x0, eps and v.

Networks, exact posterior means and foreign models all look alike from here on, so every sampler, distiller and analysis runs on a closed
form as well as on a network, and can be tested against it without training.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sferd_lab.data import Mixture
from sferd_lab.diffusion import HALF_PI, Angle, as_angle, eps_from_v, v_from_eps, v_from_x0, x0_from_v
from sferd_lab.errors import SferdError
from sferd_lab.unet import AttentionMap, Capture, UNet, check_layers

if TYPE_CHECKING:
    from sferd_lab.foreign import DiffusersUNet


@dataclass(frozen=True)
class Prediction:
    """One denoiser evaluation, three ways to say the same: ``x0``, ``eps`` and ``v``, each of x's shape.

    ``attention`` holds the maps of the layers that were asked for.
    """

    x0: Tensor
    eps: Tensor
    v: Tensor
    attention: dict[str, AttentionMap] = field(default_factory=dict)

    @classmethod
    def from_v(cls, x: Tensor, v: Tensor, phi: Angle, attention: dict[str, AttentionMap] | None = None) -> Prediction:
        """From a predicted velocity; finite at every angle."""
        return cls(x0_from_v(x, v, phi), eps_from_v(x, v, phi), v, attention or {})

    @classmethod
    def from_x0(cls, x: Tensor, x0: Tensor, phi: Angle, attention: dict[str, AttentionMap] | None = None) -> Prediction:
        """From a predicted image; eps and v are not finite at phi = 0."""
        v = v_from_x0(x, x0, phi)
        return cls(x0, eps_from_v(x, v, phi), v, attention or {})

    @classmethod
    def from_eps(cls, x: Tensor, eps: Tensor, phi: Angle, attention: dict[str, AttentionMap] | None = None) -> Prediction:
        """From predicted noise; x0 and v are not finite at phi = pi/2."""
        v = v_from_eps(x, eps, phi)
        return cls(x0_from_v(x, v, phi), eps, v, attention or {})


class Denoiser(nn.Module):
    """Base of all denoisers. ``denoiser(x, phi)`` gives a ``Prediction``; ``nfe()`` says what has been evaluated so far.

    ``phi_lo`` and ``phi_hi`` bound the angles at which it is defined; ``role`` is the name its evaluations are counted under. Conditions
    such as ``labels`` or ``z`` are keyword arguments, tensors with one row for each row of x.
    """

    phi_lo: float = 0.0
    phi_hi: float = HALF_PI

    def __init__(self, role: str) -> None:
        super().__init__()
        self.role = role
        self.evaluations = 0

    @property
    def attention_layers(self) -> tuple[str, ...]:
        """Names of the layers whose attention can be asked for."""
        return ()

    def nfe(self) -> Counter[str]:
        """Network function evaluations so far, by role. One evaluation is one pass over a batch."""
        return Counter({self.role: self.evaluations})

    def forward(self, x: Tensor, phi: Angle, layers: Sequence[str] = (), **condition: Tensor) -> Prediction:
        """Denoise ``x`` (B, ...) at ``phi``, a number or (B,), with the attention maps of ``layers``.

        Raises SferdError when phi lies outside [phi_lo, phi_hi] or a layer does not exist.
        """
        angles = torch.as_tensor(phi)
        # float32 angles round by 1e-7. On a GPU, looking at the values would make it wait.
        if angles.is_cpu and not bool(((angles >= self.phi_lo - 1e-6) & (angles <= self.phi_hi + 1e-6)).all()):
            raise SferdError(
                f"phi runs from {angles.min().item():.6g} to {angles.max().item():.6g}; "
                f"this {type(self).__name__} is defined from {self.phi_lo:.6g} to {self.phi_hi:.6g}"
            )
        check_layers(layers, self.attention_layers)
        return self.predict(x, phi, layers, **condition)

    def predict(self, x: Tensor, phi: Angle, layers: Sequence[str], **condition: Tensor) -> Prediction:
        """What a subclass computes. It counts its own evaluations."""
        raise NotImplementedError


class NetworkDenoiser(Denoiser):
    """A ``UNet``, or another network with its interface, as a denoiser. Condition: ``labels`` (B,) for a network with classes."""

    def __init__(self, network: UNet | DiffusersUNet, role: str = "teacher") -> None:
        super().__init__(role)
        self.network = network
        self.phi_lo, self.phi_hi = network.phi_lo, network.phi_hi

    @property
    def attention_layers(self) -> tuple[str, ...]:
        """The network's own."""
        return self.network.attention_layers

    def predict(self, x: Tensor, phi: Angle, layers: Sequence[str] = (), labels: Tensor | None = None) -> Prediction:
        """One pass of the network."""
        self.evaluations += 1
        capture: Capture | None = dict.fromkeys(layers) if layers else None
        v = self.network(x, phi, labels, capture)
        return Prediction.from_v(x, v, phi, {name: map_ for name, map_ in (capture or {}).items() if map_ is not None})


class ClassifierFree(Denoiser):
    """Classifier-free guidance (Ho & Salimans 2022): v = v_null + scale (v_label - v_null). Condition: ``labels``. Two evaluations."""

    def __init__(self, base: NetworkDenoiser, scale: float) -> None:
        super().__init__(base.role)
        if getattr(base.network, "label", None) is None:
            raise SferdError("classifier-free guidance needs a UNet made with classes > 0; this one has no label for none")
        self.base, self.scale = base, scale

    @property
    def attention_layers(self) -> tuple[str, ...]:
        """The network's own."""
        return self.base.attention_layers

    def nfe(self) -> Counter[str]:
        """The network's count."""
        return self.base.nfe()

    def predict(self, x: Tensor, phi: Angle, layers: Sequence[str] = (), *, labels: Tensor) -> Prediction:
        """The guided prediction, with the labelled pass's attention."""
        labelled, null = self.base(x, phi, layers, labels=labels), self.base(x, phi)
        return Prediction.from_v(x, null.v + self.scale * (labelled.v - null.v), phi, labelled.attention)


class FunctionDenoiser(Denoiser):
    """Any function (x, phi, **condition) to a tensor of x's shape that predicts ``x0``, ``eps`` or ``v``.

    x0-predictions have no v at phi = 0 and eps-predictions none at pi/2, so such functions must say where they are defined.
    """

    def __init__(
        self, function: Callable[..., Tensor], predicts: str, phi_lo: float = 0.0, phi_hi: float = HALF_PI, role: str = "teacher"
    ) -> None:
        super().__init__(role)
        if predicts not in ("x0", "eps", "v"):
            raise SferdError(f"predicts = '{predicts}'; allowed: x0, eps, v")
        if (predicts == "x0" and phi_lo <= 0) or (predicts == "eps" and phi_hi >= HALF_PI):
            raise SferdError(
                f"predicts = '{predicts}' with phi_lo = {phi_lo:.6g}, phi_hi = {phi_hi:.6g}; allowed: x0 above 0, eps below pi/2"
            )
        self.function, self.phi_lo, self.phi_hi = function, phi_lo, phi_hi
        self.convert = {"x0": Prediction.from_x0, "eps": Prediction.from_eps, "v": Prediction.from_v}[predicts]

    def predict(self, x: Tensor, phi: Angle, layers: Sequence[str] = (), **condition: Tensor) -> Prediction:
        """One call of the function."""
        self.evaluations += 1
        return self.convert(x, self.function(x, phi, **condition), phi)


class MixtureDenoiser(Denoiser):
    """The exact posterior mean E[x0 | x_phi] when the data are a Gaussian mixture; closed form, any dimension.

    Given component k, x_phi is N(c mu_k, c^2 S_k + s^2 I) with c = cos(phi), s = sin(phi), so with r = (c^2 S_k + s^2 I)^-1 (x - c mu_k)
    E[x0 | x, k] = mu_k + c S_k r and E[eps | x, k] = s r; the posterior over k weighs them. v comes from those two, finite at every angle
    where the covariance at that angle is invertible.
    """

    def __init__(self, mixture: Mixture, role: str = "exact") -> None:
        super().__init__(role)
        self.mixture = mixture
        means, covariance = mixture.means, mixture.covariance
        if covariance.ndim == 3:
            eigenvalues, basis = torch.linalg.eigh(covariance)
            self.register_buffer("basis", basis)  # (K, D, D), eigenvectors in columns
        else:
            eigenvalues, self.basis = covariance, None
        self.register_buffer("eigenvalues", eigenvalues.clamp_min(0))  # (K, D); eigh may round zero to slightly below
        self.register_buffer("means", means)
        self.register_buffer("log_weights", mixture.weights.log())
        # A singular covariance has no density at phi = 0.
        self.phi_lo = 0.0 if float(eigenvalues.min()) > 1e-9 else 1e-3

    def posterior(self, x: Tensor, phi: Angle) -> tuple[Tensor, Tensor, Tensor]:
        """Component probabilities (B, K), and E[x0 | x, k] and E[eps | x, k], both (B, K, D)."""
        flat = x.flatten(1)
        phi = as_angle(phi, flat)[..., None]
        c, s = phi.cos(), phi.sin()
        means, eigenvalues = self.means.to(x), self.eigenvalues.to(x)
        difference = flat[:, None] - c * means
        if self.basis is not None:
            difference = torch.einsum("bkd,kde->bke", difference, self.basis.to(x))
        variance = c**2 * eigenvalues + s**2
        whitened = difference / variance
        log_density = -0.5 * (difference * whitened + variance.log()).sum(-1)
        probabilities = (self.log_weights.to(x) + log_density).softmax(dim=-1)
        x0_shift, eps = c * eigenvalues * whitened, s * whitened
        if self.basis is not None:
            x0_shift, eps = (torch.einsum("bke,kde->bkd", part, self.basis.to(x)) for part in (x0_shift, eps))
        return probabilities, means + x0_shift, eps

    def predict(self, x: Tensor, phi: Angle, layers: Sequence[str] = ()) -> Prediction:
        """The posterior means of x0, eps and v."""
        self.evaluations += 1
        if tuple(x.shape[1:]) != tuple(self.mixture.shape):
            raise SferdError(f"x has shape {tuple(x.shape)}; allowed: (B, {', '.join(map(str, self.mixture.shape))}), the mixture's")
        probabilities, x0_k, eps_k = self.posterior(x, phi)
        x0, eps = ((probabilities[..., None] * part).sum(1).reshape(x.shape) for part in (x0_k, eps_k))
        phi = as_angle(phi, x)
        return Prediction(x0, eps, phi.cos() * eps - phi.sin() * x0)


class FiniteSetDenoiser(Denoiser):
    """EDM's ideal denoiser (Karras et al. 2022, appendix B.3): E[x0 | x_phi] when the data are exactly the given images.

    The softmax over -||x - cos(phi) x_i||^2 / (2 sin(phi)^2), which is the empirical optimum: it reproduces the training images, so
    distance to it is a fitting error and not a quality score. Memory stays near ``chunk_elements`` numbers, whatever the size of the set.
    """

    phi_lo = 1e-3

    def __init__(self, images: Tensor, chunk_elements: int = 2**24, role: str = "exact") -> None:
        super().__init__(role)
        if not isinstance(images, Tensor):
            raise SferdError(f"images are {type(images).__name__}; allowed: a tensor in memory, since every image counts at every step")
        if images.ndim < 2 or len(images) == 0:
            raise SferdError(f"images have shape {tuple(images.shape)}; allowed: (N, ...) with N of 1 or more")
        self.chunk_elements = chunk_elements
        self.register_buffer("images", images)

    def predict(self, x: Tensor, phi: Angle, layers: Sequence[str] = ()) -> Prediction:
        """The weighted mean of the images, over chunks of them by a running log-sum-exp."""
        self.evaluations += 1
        if x.shape[1:] != self.images.shape[1:]:
            raise SferdError(f"x has shape {tuple(x.shape)}; allowed: (B, {', '.join(map(str, self.images.shape[1:]))}), the images'")
        # Squared distances are differences of large numbers over sin(phi)^2: float32 is too coarse at small angles.
        dtype = torch.float32 if x.device.type == "mps" else torch.float64
        flat = x.flatten(1).to(dtype)
        angle = as_angle(phi, flat)
        c, s = angle.cos(), angle.sin()
        total = torch.full((len(x), 1), -math.inf, dtype=dtype, device=x.device)
        mean = torch.zeros_like(flat)
        rows = max(1, self.chunk_elements // (2 * len(x) + flat.shape[1]))
        for chunk in self.images.flatten(1).split(rows):
            chunk = chunk.to(flat)
            # -||x - c x_i||^2 / (2 s^2), less the term without i.
            logits = (c * (flat @ chunk.T) - c**2 * chunk.square().sum(1) / 2) / s**2
            chunk_total = logits.logsumexp(1, keepdim=True)
            new_total = torch.logaddexp(total, chunk_total)
            mean = mean * (total - new_total).exp() + (logits - new_total).exp() @ chunk
            total = new_total
        return Prediction.from_x0(x, mean.reshape(x.shape).to(x.dtype), phi)
