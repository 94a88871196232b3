"""Teacher attention guidance: compare the teacher with itself on an image blurred where it attends most.

Self-Attention Guidance (Hong et al. 2023), as SFERD (Zhou et al. 2024) applies it to the teacher of a distillation:

    1. the teacher at (x, phi) gives x0_hat, eps_hat and an attention map a
    2. mask = [a > threshold]; x0_bar = mask blur(x0_hat) + (1 - mask) x0_hat; x_bar = cos(phi) x0_bar + sin(phi) eps_hat
    3. the teacher at (x_bar, phi) gives x0_hat(x_bar), eps_bar
    4. form "eps":  eps_guided = eps_hat + w (eps_hat - eps_bar), which is x0_guided = x0_hat + w (x0_bar - x0_hat(x_bar))
       form "x0":   x0_guided = x0_hat + w (x0_hat - x0_hat(x_bar))

The first form is SAG's and that of the authors' code; the second is what the paper's figure shows, as we read it. They differ by
exactly w mask (x0_hat - blur(x0_hat)).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sferd_lab.denoiser import Denoiser, Prediction
from sferd_lab.diffusion import Angle, add_noise, velocity
from sferd_lab.errors import SferdError
from sferd_lab.unet import AttentionMap, check_layers

FORMS = ("eps", "x0")
MASKS = ("attention", "random", "inverse", "edge", "full")


def gaussian_blur(images: Tensor, kernel: int, sigma: float) -> Tensor:
    """Blur (B, C, H, W) with a Gaussian of ``sigma`` pixels, cut to ``kernel`` taps a side, borders reflected.

    Raises SferdError unless the kernel is odd, at most 2 min(H, W) - 1 (what reflection can fill), and sigma is positive.
    """
    largest = 2 * min(images.shape[-2:]) - 1
    if type(kernel) is not int or kernel < 1 or kernel % 2 == 0 or kernel > largest:
        raise SferdError(f"blur kernel = {kernel}; allowed: odd, 1 to {largest} for {images.shape[-2]}x{images.shape[-1]} images")
    # Its square must not vanish in single precision.
    if not 1e-6 < sigma < math.inf:
        raise SferdError(f"blur sigma = {sigma}; allowed: above 0 (by 1e-6), finite")
    radius, channels = kernel // 2, images.shape[1]
    taps = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype) / sigma) ** 2)
    taps = (taps / taps.sum()).repeat(channels, 1, 1, 1)
    padded = F.pad(images, (radius,) * 4, mode="reflect")
    return F.conv2d(F.conv2d(padded, taps, groups=channels), taps.mT, groups=channels)


def edge_energy(images: Tensor) -> Tensor:
    """Squared image gradient by central differences, summed over channels: (B, C, H, W) to (B, 1, H, W)."""
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    horizontal = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2
    vertical = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2
    return (horizontal.square() + vertical.square()).sum(1, keepdim=True)


def guidance_mask(attention: AttentionMap, x0: Tensor, threshold: float = 1.0, kind: str = "attention", seed: int = 0) -> Tensor:
    """Where to blur: (B, 1, H, W) of zeros and ones, at the size of ``x0`` (B, C, H, W).

    "attention" marks the positions that receive more than ``threshold`` times the average attention. The controls mark equally many in
    each image, at the same resolution: "random" moves the attention mask by one fixed permutation of positions drawn from ``seed``,
    "inverse" takes those that receive least, "edge" those of highest gradient energy in x0; "full" marks everything. Upsampled by nearest
    neighbour. Attention that is NaN marks nothing in its image, whose prediction is NaN itself. Raises SferdError for an unknown kind, or a
    threshold that marks nothing or everything in the whole batch.
    """
    if kind not in MASKS:
        raise SferdError(f"guidance mask = '{kind}'; allowed: {', '.join(MASKS)}")
    if kind == "full":
        return torch.ones_like(x0[:, :1])
    received = attention.received()
    size = received.shape[1:]
    marked = (received > threshold).flatten(1)
    if not bool(marked.any()) or bool(marked.all()):
        raise SferdError(
            f"guidance threshold = {threshold} marks {'everything' if bool(marked.all()) else 'nothing'}; "
            f"allowed: between {received.min().item():.4g} and {received.max().item():.4g}, the least and most attention received here"
        )
    if kind == "random":
        order = torch.randperm(marked.shape[1], generator=torch.Generator().manual_seed(seed))
        marked = marked[:, order.to(marked.device)]
    elif kind in ("inverse", "edge"):
        score = -received if kind == "inverse" else F.adaptive_avg_pool2d(edge_energy(x0), size)[:, 0]
        rank = score.flatten(1).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        marked = rank < marked.sum(1, keepdim=True)
    return F.interpolate(marked.to(x0.dtype).reshape(-1, 1, *size), size=x0.shape[-2:], mode="nearest")


def default_layer(layers: Sequence[str]) -> str:
    """The first decoder layer, which has the lowest resolution, else the last layer of all. Raises SferdError if there is none."""
    if not layers:
        raise SferdError("attention guidance needs a denoiser with self-attention; this one has no attention layers")
    return next((layer for layer in layers if layer.startswith(("decoder", "up_blocks"))), layers[-1])


class GuidedDenoiser(Denoiser):
    """A teacher with attention guidance of weight ``weight``: 0 is the teacher itself, bit for bit; otherwise two evaluations.

    The authors' scale 1.3 is ``weight`` 0.3. ``form`` is "x0", that of the paper's figure, or "eps", that of the authors' code, which
    ``Settings`` begin with. ``layer`` None is ``default_layer``.
    """

    def __init__(
        self,
        teacher: Denoiser,
        weight: float,
        *,
        form: str = "x0",
        threshold: float = 1.0,
        blur_kernel: int = 5,
        blur_sigma: float = 1.0,
        layer: str | None = None,
        mask: str = "attention",
        seed: int = 0,
    ) -> None:
        super().__init__(teacher.role)
        if form not in FORMS:
            raise SferdError(f"guidance form = '{form}'; allowed: {', '.join(FORMS)}")
        if mask not in MASKS:
            raise SferdError(f"guidance mask = '{mask}'; allowed: {', '.join(MASKS)}")
        if not math.isfinite(weight) or not math.isfinite(threshold):
            raise SferdError(f"guidance weight = {weight}, threshold = {threshold}; allowed: finite")
        self.teacher, self.weight, self.form, self.threshold, self.mask, self.seed = teacher, weight, form, threshold, mask, seed
        self.blur_kernel, self.blur_sigma = blur_kernel, blur_sigma
        self.layer = layer if layer is not None else default_layer(teacher.attention_layers)
        check_layers([self.layer], teacher.attention_layers)
        self.phi_lo, self.phi_hi = teacher.phi_lo, teacher.phi_hi
        if form == "x0" and weight != 0:
            # It moves x0 at every angle, which at phi = 0, where x0 is x, no velocity can express.
            self.phi_lo = max(teacher.phi_lo, 1e-3)

    @property
    def attention_layers(self) -> tuple[str, ...]:
        """The teacher's."""
        return self.teacher.attention_layers

    def nfe(self) -> Counter[str]:
        """The teacher's count."""
        return self.teacher.nfe()

    def predict(self, x: Tensor, phi: Angle, layers: Sequence[str] = (), **condition: Tensor) -> Prediction:
        """The guided prediction, with the attention of the first pass."""
        if self.weight == 0:
            return self.teacher(x, phi, layers, **condition)
        first = self.teacher(x, phi, {*layers, self.layer}, **condition)
        mask = guidance_mask(first.attention[self.layer], first.x0, self.threshold, self.mask, self.seed)
        guided = guide(self.teacher, first, x, phi, mask, self.weight, self.form, self.blur_kernel, self.blur_sigma, **condition)
        return Prediction(guided.x0, guided.eps, guided.v, {name: first.attention[name] for name in layers})


def guide(
    teacher: Denoiser,
    first: Prediction,
    x: Tensor,
    phi: Angle,
    mask: Tensor,
    weight: float,
    form: str,
    blur_kernel: int,
    blur_sigma: float,
    **condition: Tensor,
) -> Prediction:
    """Steps 2 to 4 of the module's docstring from the first evaluation on, for a given ``mask``; exact denoisers included."""
    x0_bar = mask * gaussian_blur(first.x0, blur_kernel, blur_sigma) + (1 - mask) * first.x0
    second = teacher(add_noise(x0_bar, first.eps, phi), phi, **condition)
    if form == "x0":
        return Prediction.from_x0(x, first.x0 + weight * (first.x0 - second.x0), phi)
    # x0_bar - x0_hat(x_bar) = sin(phi) (v_hat(x_bar) - v_bar), with v_bar the velocity of (x0_bar, eps_hat): no division by sin or cos.
    return Prediction.from_v(x, first.v - weight * (second.v - velocity(x0_bar, first.eps, phi)), phi)
