"""The network: a small U-Net that predicts the velocity v from (x_phi, phi), and can hand out its attention maps.

    stem -> encoder (levels of blocks, each level half the size of the one before) -> middle -> decoder (the same levels back) -> head

A block is a residual pair of convolutions told the angle by adaptive group normalisation (AdaGN), then self-attention at the levels that
have it. ``UNet.encode`` and ``UNet.decoder`` are separate so that the semantic gradient predictor can read the features of the first and
bring a decoder of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sferd_lab.diffusion import HALF_PI, Angle, as_angle
from sferd_lab.errors import SferdError


@dataclass(frozen=True)
class AttentionMap:
    """What one self-attention layer looked at: ``weights`` (B, heads, queries, keys), rows over keys sum to 1.

    Queries and keys are the ``height`` x ``width`` positions of the layer's own feature map, row by row. A map is as large as the batch
    that is passed makes it: of many images ``analysis.spatial.attention_maps`` passes a few at a time.
    """

    weights: Tensor
    height: int
    width: int

    def received(self) -> Tensor:
        """Attention that each position receives, (B, height, width): summed over queries, averaged over heads.

        Its mean over positions is exactly 1, so 1 is "as much as the average position" (Hong et al. 2023, section 4.2).
        """
        return self.weights.mean(dim=1).sum(dim=1).unflatten(-1, (self.height, self.width))


# The layers asked for, each with its map once the network has passed it.
Capture = dict[str, AttentionMap | None]


def angle_embedding(phi: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding (B, dim) of 1000 t with t = phi / (pi/2): the range in which its frequencies can tell angles apart."""
    frequencies = torch.exp(-math.log(10_000) / (dim // 2) * torch.arange(dim // 2, device=phi.device, dtype=phi.dtype))
    arguments = (1000 / HALF_PI) * phi[:, None] * frequencies
    return torch.cat([arguments.cos(), arguments.sin()], dim=1)


class GroupNorm(nn.GroupNorm):
    """torch's, made safe: with channels last, its backward on a CPU crashes where the weights need a gradient and the input none (2.13)."""

    def forward(self, h: Tensor) -> Tensor:
        """``h`` (B, C, ...) normalised."""
        trained = torch.is_grad_enabled() and self.weight is not None and self.weight.requires_grad
        return super().forward(h.detach().requires_grad_() if trained and not h.requires_grad else h)


def group_norm(channels: int, affine: bool = True) -> GroupNorm:
    """Group normalisation with 8 groups, or as many of them as divide ``channels``."""
    return GroupNorm(math.gcd(8, channels), channels, affine=affine)


def zeroed(layer: nn.Conv2d | nn.Linear) -> nn.Conv2d | nn.Linear:
    """The layer with weights and bias set to zero: a residual branch or head that starts as nothing."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class AdaGN(nn.Module):
    """Adaptive group normalisation: h <- (1 + z_s) ((1 + t_s) GN(h) + t_b) + z_b.

    The time embedding gives (t_s, t_b) as in Dhariwal & Nichol (2021); a semantic code, where there is one, gives (z_s, z_b) as in
    PDAE (Zhang et al. 2022). ``h`` (B, C, H, W), ``emb`` (B, emb_dim), ``z`` (B, z_dim).
    """

    def __init__(self, channels: int, emb_dim: int, z_dim: int = 0) -> None:
        super().__init__()
        self.norm = group_norm(channels, affine=False)
        self.time = nn.Linear(emb_dim, 2 * channels)
        self.semantic = nn.Linear(z_dim, 2 * channels) if z_dim else None

    def forward(self, h: Tensor, emb: Tensor, z: Tensor | None) -> Tensor:
        """The normalised, scaled and shifted ``h``."""
        scale, shift = self.time(emb).chunk(2, dim=1)
        scale = 1 + scale
        if self.semantic is not None:
            z_scale, z_shift = self.semantic(z).chunk(2, dim=1)
            scale, shift = (1 + z_scale) * scale, (1 + z_scale) * shift + z_shift
        return torch.addcmul(shift[..., None, None], self.norm(h), scale[..., None, None])


class SelfAttention(nn.Module):
    """Multi-head self-attention over the positions of a feature map, added to it."""

    def __init__(self, name: str, channels: int, heads: int) -> None:
        super().__init__()
        if channels % heads:
            raise SferdError(f"heads = {heads}; allowed: a divisor of the {channels} channels of attention layer '{name}'")
        self.name, self.heads = name, heads
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, h: Tensor, capture: Capture | None = None) -> Tensor:
        """``h`` (B, C, H, W) plus what attention adds. Fills ``capture[name]`` when that key is present."""
        batch, channels, height, width = h.shape
        # Channels lie last in memory, so positions and heads are views and nothing is copied.
        qkv = self.qkv(self.norm(h)).permute(0, 2, 3, 1).reshape(batch, height * width, 3, self.heads, channels // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if capture is not None and self.name in capture:
            weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(dim=-1)  # over keys: each query's weights sum to 1
            capture[self.name] = AttentionMap(weights, height, width)
            attended = weights @ v
        else:
            attended = F.scaled_dot_product_attention(q, k, v)
        return h + self.out(attended.transpose(1, 2).reshape(batch, height, width, channels).permute(0, 3, 1, 2))


class Block(nn.Module):
    """Residual block with AdaGN, then self-attention if the block has a layer ``name``."""

    def __init__(self, name: str | None, c_in: int, c_out: int, emb_dim: int, heads: int, z_dim: int = 0) -> None:
        super().__init__()
        self.norm = group_norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.adagn = AdaGN(c_out, emb_dim, z_dim)
        self.conv2 = zeroed(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)
        self.attention = SelfAttention(name, c_out, heads) if name else None
        self.recompute = False

    def forward(self, h: Tensor, emb: Tensor, z: Tensor | None = None, capture: Capture | None = None) -> Tensor:
        """``h`` (B, c_in, H, W) to (B, c_out, H, W). With ``recompute``, nothing within is kept for the backward pass: it is done again."""
        if self.recompute and torch.is_grad_enabled() and capture is None:
            return checkpoint(self._block, h, emb, z, use_reentrant=False)
        return self._block(h, emb, z, capture)

    def _block(self, h: Tensor, emb: Tensor, z: Tensor | None, capture: Capture | None = None) -> Tensor:
        residual = self.conv1(F.silu(self.norm(h)))
        residual = self.conv2(F.silu(self.adagn(residual, emb, z)))
        h = self.skip(h) + residual
        return h if self.attention is None else self.attention(h, capture)


class Middle(nn.Module):
    """Two blocks at the lowest resolution, with the attention layer ``name`` between them."""

    def __init__(self, name: str, channels: int, emb_dim: int, heads: int, z_dim: int = 0) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(layer, channels, channels, emb_dim, heads, z_dim) for layer in (name, None))

    def forward(self, h: Tensor, emb: Tensor, z: Tensor | None = None, capture: Capture | None = None) -> Tensor:
        """``h`` (B, C, H, W) to the same shape."""
        for block in self.blocks:
            h = block(h, emb, z, capture)
        return h


@dataclass(frozen=True)
class Features:
    """What ``UNet.encode`` hands to a decoder: embedding (B, emb_dim), the skips in order of computation, the middle's output."""

    emb: Tensor
    skips: tuple[Tensor, ...]
    middle: Tensor


@dataclass(frozen=True)
class UNetSettings:
    """The shape of a ``UNet``; ``attention`` lists the levels (0 is the image's own resolution) that have self-attention."""

    channels: int = 1
    widths: tuple[int, ...] = (32, 32)
    blocks: int = 2
    attention: tuple[int, ...] = (0, 1)
    heads: int = 2
    classes: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(self.widths))
        object.__setattr__(self, "attention", tuple(self.attention))
        for name, value in self.__dict__.items():
            if any(type(number) is not int for number in (value if isinstance(value, tuple) else (value,))):
                raise SferdError(f"{name} = {value!r}; allowed: whole numbers")
        for name, value in (
            ("channels", self.channels),
            ("blocks", self.blocks),
            ("heads", self.heads),
            ("widths", min(self.widths, default=0)),
        ):
            if value < 1:
                raise SferdError(f"{name} = {getattr(self, name)}; allowed: 1 or more")
        if self.classes < 0:
            raise SferdError(f"classes = {self.classes}; allowed: 0 (no labels) or more")
        if not set(self.attention) <= set(range(len(self.widths))):
            raise SferdError(
                f"attention = {self.attention}; allowed: levels 0 to {len(self.widths) - 1}, since there are {len(self.widths)} widths"
            )

    @property
    def emb_dim(self) -> int:
        """Size of the time embedding."""
        return 4 * self.widths[0]

    @property
    def factor(self) -> int:
        """The image's height and width must divide by this."""
        return 2 ** (len(self.widths) - 1)

    def layer(self, part: str, level: int, block: int) -> str | None:
        """Name of the attention layer of that block, or None where the level has none."""
        return f"{part}.{level}.{block}" if level in self.attention else None


class Decoder(nn.Module):
    """Middle features and skips back to an image: the U-Net's own, or the semantic gradient predictor's (``z_dim`` > 0)."""

    def __init__(self, shape: UNetSettings, z_dim: int = 0) -> None:
        super().__init__()
        widths, width = shape.widths, shape.widths[-1]
        self.levels = nn.ModuleList()
        self.upsamples = nn.ModuleList()
        for level in reversed(range(len(widths))):
            blocks = nn.ModuleList()
            for block in range(shape.blocks):
                name = shape.layer("decoder", level, block)
                blocks.append(Block(name, width + widths[level], widths[level], shape.emb_dim, shape.heads, z_dim))
                width = widths[level]
            self.levels.append(blocks)
            if level:
                self.upsamples.append(nn.Conv2d(width, width, 3, padding=1))
        self.norm = group_norm(width)
        self.head = zeroed(nn.Conv2d(width, shape.channels, 3, padding=1))

    def forward(self, features: Features, h: Tensor, z: Tensor | None = None, capture: Capture | None = None) -> Tensor:
        """The image (B, C, H, W) decoded from the middle features ``h`` and the skips."""
        skips = list(features.skips)
        for index, blocks in enumerate(self.levels):
            if index:
                h = self.upsamples[index - 1](F.interpolate(h, scale_factor=2, mode="nearest"))
            for block in blocks:
                h = block(torch.cat([h, skips.pop()], dim=1), features.emb, z, capture)
        return self.head(F.silu(self.norm(h)))


class UNet(nn.Module):
    """(x_phi, phi) to the velocity v, both (B, C, H, W).

    Any image size that divides by 2^(levels - 1). With ``classes`` > 0 it takes labels (B,) in [0, classes]; the last, ``classes``,
    means "no label" and is what unlabelled calls use, so one network serves classifier-free guidance (Ho & Salimans 2022).
    """

    phi_lo, phi_hi = 0.0, HALF_PI

    def __init__(self, shape: UNetSettings) -> None:
        super().__init__()
        self.shape = shape
        widths, width, emb_dim = shape.widths, shape.widths[0], shape.emb_dim
        self.time = nn.Sequential(nn.Linear(emb_dim, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim))
        self.label = nn.Embedding(shape.classes + 1, emb_dim) if shape.classes else None
        self.stem = nn.Conv2d(shape.channels, width, 3, padding=1)
        self.encoder = nn.ModuleList()
        self.downsamples = nn.ModuleList()
        for level, level_width in enumerate(widths):
            if level:
                self.downsamples.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
            blocks = nn.ModuleList()
            for block in range(shape.blocks):
                blocks.append(Block(shape.layer("encoder", level, block), width, level_width, emb_dim, shape.heads))
                width = level_width
            self.encoder.append(blocks)
        self.middle = Middle("middle", width, emb_dim, shape.heads)
        self.decoder = Decoder(shape)
        self.to(memory_format=torch.channels_last)  # a pixel's channels side by side, which convolutions read fastest

    @property
    def channels(self) -> int:
        """Channels of an image."""
        return self.shape.channels

    @property
    def attention_layers(self) -> tuple[str, ...]:
        """Names of the self-attention layers, in order of computation."""
        return tuple(module.name for module in self.modules() if isinstance(module, SelfAttention))

    def encode(self, x: Tensor, phi: Angle, labels: Tensor | None = None, capture: Capture | None = None) -> Features:
        """Embedding, skips and middle features of ``x`` (B, C, H, W) at ``phi``.

        Raises SferdError for an image of the wrong size or channels, and for labels that the network does not know.
        """
        self._check(x, labels)
        phi = as_angle(phi, x).flatten().expand(x.shape[0])
        emb = self.time(angle_embedding(phi, self.shape.emb_dim))
        if self.label is not None:
            labels = torch.full(phi.shape, self.shape.classes, device=x.device) if labels is None else labels
            emb = emb + self.label(labels)
        emb = F.silu(emb)
        h = self.stem(x.contiguous(memory_format=torch.channels_last))
        skips = []
        for level, blocks in enumerate(self.encoder):
            if level:
                h = self.downsamples[level - 1](h)
            for block in blocks:
                h = block(h, emb, None, capture)
                skips.append(h)
        return Features(emb, tuple(skips), self.middle(h, emb, None, capture))

    def forward(self, x: Tensor, phi: Angle, labels: Tensor | None = None, capture: Capture | None = None) -> Tensor:
        """The velocity (B, C, H, W)."""
        features = self.encode(x, phi, labels, capture)
        return self.decoder(features, features.middle, None, capture)

    def _check(self, x: Tensor, labels: Tensor | None) -> None:
        if x.ndim != 4 or x.shape[1] != self.shape.channels:
            raise SferdError(f"images have shape {tuple(x.shape)}; allowed: (B, {self.shape.channels}, H, W)")
        if x.shape[2] % self.shape.factor or x.shape[3] % self.shape.factor:
            raise SferdError(
                f"image size {x.shape[2]}x{x.shape[3]}; allowed: multiples of {self.shape.factor}, for {len(self.shape.widths)} levels"
            )
        if labels is not None and self.label is None:
            raise SferdError("labels were given to an unconditional network; allowed: labels=None, or a network made with classes > 0")
        if labels is not None and (
            labels.shape != x.shape[:1]
            or labels.dtype not in (torch.int64, torch.int32)
            or (labels.is_cpu and not bool(((labels >= 0) & (labels <= self.shape.classes)).all()))
        ):
            values = f" with values {labels.min().item()} to {labels.max().item()}" if labels.numel() else ""
            raise SferdError(
                f"labels are {labels.dtype} of shape {tuple(labels.shape)}{values}; "
                f"allowed: integers ({x.shape[0]},) with 0 to {self.shape.classes} (the last: no label)"
            )


def set_gradient_checkpointing(model: nn.Module, on: bool) -> None:
    """Have the blocks of every U-Net in ``model`` compute their insides twice rather than keep them for the backward pass, or not."""
    for module in model.modules():
        if isinstance(module, Block):
            module.recompute = on
        elif hasattr(module, "enable_gradient_checkpointing"):  # a network of diffusers
            (module.enable_gradient_checkpointing if on else module.disable_gradient_checkpointing)()


def check_layers(layers: Sequence[str], available: Sequence[str]) -> None:
    """Raise SferdError when a layer is asked for that the network does not have."""
    for layer in layers:
        if layer not in available:
            raise SferdError(f"attention layer '{layer}'; allowed: {', '.join(available) or 'none, this denoiser has no attention'}")


def unet_info(network: UNet) -> dict[str, Any]:
    """What ``UNet(UNetSettings(**info))`` needs to build the same network, as JSON-able values."""
    shape = network.shape
    return {**shape.__dict__, "widths": list(shape.widths), "attention": list(shape.attention)}
