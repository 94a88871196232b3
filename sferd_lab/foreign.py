"""Teachers from elsewhere: a ``diffusers`` ``UNet2DModel`` as a network of ours, and EDM-style functions as denoisers.

``DiffusersUNet`` speaks angle and velocity like ``UNet``, so ``NetworkDenoiser(DiffusersUNet(...))`` is a teacher like any other: guidance,
distillation, the semantic gradient predictor and all instruments run on it, and its student can be written back for a stock pipeline.
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from sferd_lab.denoiser import Denoiser, NetworkDenoiser, Prediction
from sferd_lab.diffusion import HALF_PI, Angle, as_angle, phi_from_alpha_bar, v_from_eps, v_from_x0
from sferd_lab.errors import SferdError
from sferd_lab.files import read_record
from sferd_lab.rebuild import at_most
from sferd_lab.unet import AttentionMap, Capture, Features

PREDICTIONS = ("epsilon", "sample", "v_prediction")
MOST_STEPS = 100_000  # of a scheduler; a hundred times the usual number


class _Recorder:
    """An attention processor that leaves the work to ``plain`` and notes the weights of the layers that are asked for."""

    def __init__(self, name: str, plain: Callable[..., Tensor], capture: Capture) -> None:
        self.name, self.plain, self.capture = name, plain, capture

    def __call__(self, attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
                 attention_mask: Tensor | None = None, temb: Tensor | None = None) -> Tensor:  # fmt: skip
        """What ``plain`` returns."""
        if self.name in self.capture:
            batch, _, height, width = hidden_states.shape
            positions = hidden_states.flatten(2).mT
            if attn.group_norm is not None:
                positions = attn.group_norm(positions.mT).mT
            query, key = (attn.head_to_batch_dim(layer(positions)) for layer in (attn.to_q, attn.to_k))
            weights = attn.get_attention_scores(query, key).unflatten(0, (batch, attn.heads))
            self.capture[self.name] = AttentionMap(weights, height, width)
        return self.plain(attn, hidden_states, encoder_hidden_states, attention_mask, temb)


@dataclass(frozen=True)
class DiffusersFeatures(Features):
    """The features of a ``DiffusersUNet``, and the velocity that its own decoder made of them."""

    v: Tensor


def _with_gradient(h: Tensor) -> Tensor:
    """``h``, so that a gradient reaches it: without, GroupNorm's backward crashes on a CPU (``unet.GroupNorm``)."""
    return h.detach().requires_grad_() if torch.is_grad_enabled() and not h.requires_grad else h


class DiffusersGradient(nn.Module):
    """G on a ``DiffusersUNet``: a copy of its middle and decoder whose head is zero at first; the code joins the time embedding."""

    def __init__(self, unet: nn.Module, z_dim: int) -> None:
        super().__init__()
        if unet.mid_block is None or any(hasattr(block, "skip_conv") for block in unet.up_blocks):
            raise SferdError(
                f"up_block_types = {unet.config.up_block_types}, mid_block_type = {unet.config.mid_block_type}; allowed with a semantic "
                "gradient predictor: networks with a middle block and without skip convolutions"
            )
        parts = (unet.mid_block, unet.up_blocks, unet.conv_norm_out, unet.conv_out)
        self.middle, self.up_blocks, self.norm, self.head = copy.deepcopy(parts)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.code = nn.Linear(z_dim, unet.time_embedding.linear_2.out_features)
        self.requires_grad_(True)

    def forward(self, features: Features, z: Tensor) -> Tensor:
        """The shift h (B, C, H, W)."""
        emb, skips = features.emb + self.code(z), [_with_gradient(skip) for skip in features.skips]
        h = self.middle(_with_gradient(features.middle), emb)
        for block in self.up_blocks:
            count = len(block.resnets)
            h = block(h, tuple(skips[-count:]), emb)
            del skips[-count:]
        return self.head(F.silu(self.norm(h)))


class DiffusersUNet(nn.Module):
    """A ``diffusers.UNet2DModel`` with its scheduler's configuration, as (x_phi, phi) to the velocity v.

    alpha_bar_k of the scheduler is cos(phi_k)^2. At those angles the model is told the step k, between them what lies between, so
    trajectories on any grid can be walked. ``phi_lo`` and ``phi_hi`` are its first and last angle. What a scheduler does to samples
    (clipping, thresholding) is no part of a denoiser and is left out. Raises SferdError for a model whose output is no prediction of one
    image, whose time embedding knows whole steps only, and for kinds of prediction other than epsilon, sample and v_prediction.
    """

    def __init__(self, unet: nn.Module, scheduler: dict[str, Any]) -> None:
        super().__init__()
        from diffusers import DDIMScheduler
        from diffusers.models.attention_processor import Attention

        self.predicts = scheduler.get("prediction_type", "epsilon")
        if self.predicts not in PREDICTIONS:
            raise SferdError(f"the scheduler's prediction_type = '{self.predicts}'; allowed: {', '.join(PREDICTIONS)}")
        if unet.config.time_embedding_type != "positional":
            raise SferdError(f"the model's time_embedding_type = '{unet.config.time_embedding_type}'; allowed: positional")
        if unet.config.out_channels != unet.config.in_channels:
            raise SferdError(
                f"the model has in_channels = {unet.config.in_channels}, out_channels = {unet.config.out_channels}; allowed: the same"
            )
        if unet.config.class_embed_type is not None:
            raise SferdError(f"the model's class_embed_type = '{unet.config.class_embed_type}'; allowed: None, with or without classes")
        steps = scheduler.get("num_train_timesteps", 1000)
        if type(steps) is not int or not 1 <= steps <= MOST_STEPS:
            raise SferdError(f"the scheduler's num_train_timesteps = {steps!r}; allowed: 1 to {MOST_STEPS}")
        # A schedule is numbers, wherever the network is built, be it without memory.
        with torch.device("cpu"):
            self.unet, self.scheduler = unet, DDIMScheduler.from_config(scheduler)
        phis = phi_from_alpha_bar(self.scheduler.alphas_cumprod.double())
        # With a last step of pure noise, noise is all that x tells: x0 does not follow from it.
        usable = phis[phis < HALF_PI - 1e-6] if self.predicts == "epsilon" else phis
        self.phi_lo, self.phi_hi = float(usable[0]), float(usable[-1])
        # A buffer in double precision would be cast with the weights.
        self.phis = phis
        self.capture: Capture = {}
        for name, module in unet.named_modules():
            if isinstance(module, Attention):
                plain = module.processor.plain if isinstance(module.processor, _Recorder) else module.processor
                module.set_processor(_Recorder(name, plain, self.capture))

    @property
    def channels(self) -> int:
        """Channels of an image."""
        return self.unet.config.in_channels

    @property
    def classes(self) -> int:
        """Number of labels that the model knows, 0 for none."""
        return self.unet.config.num_class_embeds or 0

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images that the model was made for. Raises SferdError where its configuration does not say."""
        size = self.unet.config.sample_size
        if size is None:
            raise SferdError("the model's configuration has no sample_size; allowed: a size, or a pair of height and width")
        height, width = (size, size) if isinstance(size, int) else size
        return self.channels, height, width

    @property
    def attention_layers(self) -> tuple[str, ...]:
        """Names of the self-attention layers, as the model has them, in order of computation."""
        order = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}
        names = [name for name, module in self.unet.named_modules() if isinstance(getattr(module, "processor", None), _Recorder)]
        return tuple(sorted(names, key=lambda name: order[name.split(".")[0]]))

    def step_of(self, phi: Tensor) -> Tensor:
        """The scheduler's step (B,) at the angles ``phi`` (B,): a whole number at its own angles, linear between them."""
        dtype = torch.float32 if phi.device.type == "mps" else torch.float64
        phi, phis = phi.to(dtype), self.phis.to(phi.device, dtype)
        above = torch.searchsorted(phis, phi).clamp(1, len(phis) - 1)
        step = above - 1 + (phi - phis[above - 1]) / (phis[above] - phis[above - 1])
        # Angles in single precision are off by up to a few thousandths of a step, near pure noise.
        return torch.where((step - step.round()).abs() < 0.01, step.round(), step).clamp(0, len(phis) - 1).float()

    def grid(self, steps: int) -> Tensor:
        """The angles (steps + 1,) that the scheduler itself would visit in ``steps`` steps, down to 0: a ``grid`` for ``sample``."""
        self.scheduler.set_timesteps(steps)
        return torch.cat([self.phis[self.scheduler.timesteps], torch.zeros(1, dtype=self.phis.dtype)])

    def forward(self, x: Tensor, phi: Angle, labels: Tensor | None = None, capture: Capture | None = None) -> Tensor:
        """The velocity (B, C, H, W). Fills the keys of ``capture``. Raises SferdError for images or labels that do not fit."""
        if x.ndim != 4 or x.shape[1] != self.channels:
            raise SferdError(f"images have shape {tuple(x.shape)}; allowed: (B, {self.channels}, H, W)")
        if (labels is None) != (self.classes == 0):
            raise SferdError(f"labels {'are missing' if labels is None else 'were given'}; this model has {self.classes} classes")
        self.capture.clear()
        self.capture.update(capture or {})
        step = self.step_of(as_angle(phi, x).flatten()).expand(len(x))
        said = self.unet(x, step, class_labels=labels).sample
        if capture is not None:
            capture.update(self.capture)
        self.capture.clear()
        if self.predicts == "v_prediction":
            return said
        return v_from_eps(x, said, phi) if self.predicts == "epsilon" else v_from_x0(x, said, phi)

    def encode(self, x: Tensor, phi: Angle, labels: Tensor | None = None, capture: Capture | None = None) -> DiffusersFeatures:
        """One pass, with the features on the way noted: embedding, skips, middle, and the velocity at its end."""
        noted: dict[str, Any] = {"skips": []}
        unet = self.unet
        hooks = [
            unet.conv_in.register_forward_hook(lambda _module, _given, out: noted["skips"].append(out)),
            unet.mid_block.register_forward_hook(lambda _module, given, out: noted.update(emb=given[1], middle=out)),
            *(block.register_forward_hook(lambda _module, _given, out: noted["skips"].extend(out[1])) for block in unet.down_blocks),
        ]
        try:
            v = self(x, phi, labels, capture)
        finally:
            for hook in hooks:
                hook.remove()
        return DiffusersFeatures(noted["emb"], tuple(noted["skips"]), noted["middle"], v)

    def decoder(self, features: DiffusersFeatures, h: Tensor, z: Tensor | None = None, capture: Capture | None = None) -> Tensor:
        """The velocity, which ``encode`` has already."""
        return features.v

    def gradient_predictor(self, z_dim: int) -> DiffusersGradient:
        """A semantic gradient predictor for this network."""
        return DiffusersGradient(self.unet, z_dim)

    def configuration(self) -> dict[str, Any]:
        """What rebuilds model and scheduler, as JSON-able values."""
        return {"unet": dict(self.unet.config), "scheduler": dict(self.scheduler.config)}

    @classmethod
    def from_configuration(cls, configuration: dict[str, Any]) -> DiffusersUNet:
        """A network of that shape, with initial weights."""
        from diffusers import UNet2DModel

        return cls(UNet2DModel.from_config(configuration["unet"]), configuration["scheduler"])


class EDMDenoiser(Denoiser):
    """An EDM-style network D(x_VE, sigma) to x0 (Karras et al. 2022), preconditioning included, as a denoiser.

    sigma = tan(phi) and x_phi = cos(phi) x_VE. ``denoise`` takes images (B, C, H, W) and noise levels (B,); it is defined on
    [sigma_min, sigma_max]. Conditions are passed on.
    """

    def __init__(self, denoise: Callable[..., Tensor], sigma_min: float = 0.002, sigma_max: float = 80.0, role: str = "teacher") -> None:
        super().__init__(role)
        if not 0 < sigma_min < sigma_max < math.inf:
            raise SferdError(f"sigma_min = {sigma_min}, sigma_max = {sigma_max}; allowed: 0 < sigma_min < sigma_max, finite")
        self.denoise = denoise
        self.phi_lo, self.phi_hi = math.atan(sigma_min), math.atan(sigma_max)

    def predict(self, x: Tensor, phi: Angle, layers: Sequence[str] = (), **condition: Tensor) -> Prediction:
        """One call of the network."""
        self.evaluations += 1
        angle = as_angle(phi, x)
        return Prediction.from_x0(x, self.denoise(x / angle.cos(), angle.tan().flatten().expand(len(x)), **condition), phi)


def load_diffusers(source: str | Path) -> NetworkDenoiser:
    """The teacher in ``source``: a folder in the Hub's format (``unet/`` and ``scheduler/``), or a repository's name when online.

    Only safetensors are read. Raises SferdError when a part is missing or the model is not a ``UNet2DModel``.
    """
    try:
        from diffusers import DDIMScheduler, UNet2DModel
    except ImportError:
        raise SferdError(
            f'the teacher in {source} needs the package diffusers, which is not installed; pip install "sferd-lab[diffusers]"'
        ) from None
    folder = Path(source)
    for part in ("unet/config.json", "scheduler/scheduler_config.json") if folder.is_dir() else ():
        if not (folder / part).is_file():
            raise SferdError(f"{folder} has no {part}; allowed: a folder written by save_pretrained of a diffusers pipeline")
        read_record(folder / part)
    try:
        with at_most(_tensors_in(folder / "unet")) if folder.is_dir() else nullcontext():
            unet = UNet2DModel.from_pretrained(source, subfolder="unet", use_safetensors=True)
        scheduler = DDIMScheduler.load_config(source, subfolder="scheduler")
        network = NetworkDenoiser(DiffusersUNet(unet, scheduler))
    except SferdError as error:
        raise SferdError(f"{source}: {error}") from None
    except Exception as error:  # whatever diffusers makes of a configuration that it was never meant to be given
        raise SferdError(f"no diffusers teacher in {source}: {error}") from error
    return network.eval()


def _tensors_in(folder: Path) -> int:
    count = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            count += len(file.keys())
    return count


def save_diffusers(denoiser: NetworkDenoiser, folder: Path | str) -> None:
    """Write teacher or student as a ``DDIMPipeline`` in the Hub's format, weights as safetensors: the whole folder or nothing.

    An earlier pipeline in ``folder`` is replaced. Raises SferdError for a denoiser that is not of a diffusers model, since nothing else
    can be said in that format, and for a folder that holds something else.
    """
    from diffusers import DDIMPipeline

    network = getattr(denoiser, "network", None)
    if not isinstance(network, DiffusersUNet):
        raise SferdError(f"a {type(denoiser).__name__} of a {type(network).__name__}; allowed: a NetworkDenoiser of a DiffusersUNet")
    folder = Path(folder)
    if folder.exists() and not (folder / "model_index.json").is_file() and (folder.is_file() or any(folder.iterdir())):
        raise SferdError(f"{folder} holds something other than a pipeline; allowed: a new or empty folder, or an earlier pipeline")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        DDIMPipeline(network.unet, network.scheduler).save_pretrained(Path(temporary) / "new", safe_serialization=True)
        if folder.exists():
            folder.rename(Path(temporary) / "old")
        (Path(temporary) / "new").rename(folder)
