"""Models as files: save them, load them, and find the ones that are shipped with the package."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sferd_lab.denoiser import Denoiser, NetworkDenoiser
from sferd_lab.errors import SferdError
from sferd_lab.files import is_file, load_tensors, save_tensors
from sferd_lab.rebuild import rebuild
from sferd_lab.sample import Prior, sample
from sferd_lab.semantic import DiffusionPrior, KernelPrior, LatentDenoiser, MixturePrior, SemanticDenoiser, semantic_info
from sferd_lab.unet import UNet, UNetSettings, unet_info

Model = NetworkDenoiser | SemanticDenoiser | LatentDenoiser | DiffusionPrior | MixturePrior | KernelPrior
# A network's file bounds the network, and nothing in it the images that one asks of it but this.
MAX_SIDE = 1024


def shipped_folder() -> Path:
    """The folder of shipped files: ``data/`` in a clone, ``_shipped`` inside an installed package."""
    package = Path(__file__).parent
    return package / "_shipped" if (package / "_shipped").is_dir() else package.parent / "data"


def seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A module with the initial weights that ``seed`` gives, leaving torch's own random state alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def network_info(network: nn.Module) -> dict[str, Any]:
    """What ``build_network`` needs to build a denoiser's network again, as JSON-able values."""
    return {"unet": unet_info(network)} if isinstance(network, UNet) else {"diffusers": network.configuration()}


def build_network(info: dict[str, Any]) -> nn.Module:
    """The network that ``network_info`` tells of, with initial weights."""
    if "diffusers" in info:
        from sferd_lab.foreign import DiffusersUNet  # diffusers takes seconds to import, and few need it

        return DiffusersUNet.from_configuration(info["diffusers"])
    return UNet(UNetSettings(**info["unet"]))


def save_model(path: Path | str, model: Model, info: dict[str, Any]) -> None:
    """Write the model's weights and everything that rebuilds it; ``info`` (JSON-able) travels along under the same names."""
    if isinstance(model, NetworkDenoiser):
        kind = {"kind": "network", "role": model.role, **network_info(model.network)}
    elif isinstance(model, SemanticDenoiser):
        kind = {"kind": "semantic", "role": model.base.role, **network_info(model.base.network), "semantic": semantic_info(model)}
    elif isinstance(model, LatentDenoiser):
        kind = {"kind": "latent", "latent": model.settings}
    elif isinstance(model, DiffusionPrior):
        kind = {"kind": "diffusion prior", "latent": model.denoiser.settings, "steps": model.steps}
    else:
        kind = {"kind": "kernel prior" if isinstance(model, KernelPrior) else "mixture prior"}
    save_tensors(path, model.state_dict(), {**info, **kind})


def load_model(path: Path | str) -> tuple[Model, dict[str, Any]]:
    """The model of a file written by ``save_model``, in evaluation mode, and its info. Raises SferdError for any other file.

    Weights stored in half precision, as shipped students are, come back in single.
    """
    tensors, info = load_tensors(path)
    tensors = {name: tensor.float() if tensor.dtype == torch.float16 else tensor for name, tensor in tensors.items()}
    return rebuild(lambda: _build(info, tensors), tensors, path).eval(), info


def _build(info: dict[str, Any], tensors: dict[str, Tensor]) -> Model:
    kind = info["kind"]
    if kind in ("network", "semantic") and not isinstance(info["role"], str):
        raise SferdError(f"its role is {info['role']!r}; expected text")
    if kind == "network":
        return NetworkDenoiser(build_network(info), info["role"])
    if kind == "semantic":
        return SemanticDenoiser(NetworkDenoiser(build_network(info), info["role"]), **info["semantic"])
    if kind == "latent":
        return LatentDenoiser(**info["latent"])
    if kind == "diffusion prior":
        size = info["latent"]["z_dim"]
        return DiffusionPrior(LatentDenoiser(**info["latent"]), torch.zeros(size), torch.ones(size), info["steps"])
    if kind == "mixture prior":
        return MixturePrior(tensors["weights"], tensors["means"], tensors["covariances"])
    if kind == "kernel prior":
        return KernelPrior(tensors["codes"], tensors["bandwidth"])
    raise SferdError(f"it holds a {kind!r}; expected a network, a semantic denoiser, a latent network or a prior")


@dataclass(frozen=True)
class Pretrained:
    """A trained denoiser with what it was made from: its image ``shape`` (C, H, W), ``info``, and the ``prior`` of its codes, if any."""

    denoiser: Denoiser
    shape: tuple[int, int, int]
    info: dict[str, Any]
    prior: Prior | None = None

    def sample(self, n: int, steps: int = 16, seed: int = 0, **options: Any) -> Tensor:
        """``n`` images (n, C, H, W), nominally in [-1, 1], by DDIM in ``steps`` steps; ``options`` go to ``sample.sample``.

        Codes come from the model's own prior, unless ``options`` give a ``prior``, or a ``condition`` with a code or an image.
        """
        told = options.get("condition") or {}
        prior = None if {"z", "image"} & told.keys() else self.prior
        return sample(self.denoiser, n, self.shape, steps, seed=seed, **{"prior": prior, **options}).images


def load(name: str | Path) -> Pretrained:
    """A shipped model by name ("digits/teacher") or any saved one by path. Raises SferdError listing what there is.

    For a semantic denoiser the prior of its codes is looked for beside it, in ``<name>-prior.safetensors``.
    """
    folder = shipped_folder()
    path = Path(name) if str(name).endswith(".safetensors") else folder / f"{name}.safetensors"
    if not is_file(path):
        shipped = [str(file.relative_to(folder).with_suffix("")) for file in sorted(folder.rglob("*.safetensors"))]
        shipped = [name for name in shipped if not name.endswith(("features", "reference", "-prior"))]
        raise SferdError(f"no model '{name}'; allowed: {', '.join(shipped) or 'nothing is shipped'}, or the path of a .safetensors file")
    model, info = load_model(path)
    if not isinstance(model, NetworkDenoiser | SemanticDenoiser):
        raise SferdError(f"{path} holds a {info['kind']}, which has no images of its own; load it with load_model and pass it to sample")
    channels, shape = (model.base if isinstance(model, SemanticDenoiser) else model).network.channels, info.get("shape")
    whole = isinstance(shape, list) and len(shape) == 3 and all(type(side) is int for side in shape)
    if not whole or shape[0] != channels or not all(1 <= side <= MAX_SIDE for side in shape[1:]):
        raise SferdError(
            f"{path} does not say the shape of its images: shape = {shape!r}; allowed: files saved with info that has "
            f"shape = [{channels}, H, W], H and W at most {MAX_SIDE}"
        )
    beside = path.with_name(f"{path.stem}-prior.safetensors")
    prior = load_model(beside)[0] if isinstance(model, SemanticDenoiser) and beside.is_file() else None
    return Pretrained(model, tuple(info["shape"]), info, prior)
