"""What a model's file says of itself is never believed beyond what the file holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from sferd_lab.artifacts import Model, load_model, save_model
from sferd_lab.denoiser import NetworkDenoiser
from sferd_lab.errors import SferdError
from sferd_lab.files import METADATA_KEY, load_tensors, save_tensors
from sferd_lab.foreign import DiffusersUNet, load_diffusers
from sferd_lab.metrics import FeatureNetwork, load_feature_network, save_feature_network
from sferd_lab.rebuild import rebuild
from sferd_lab.semantic import DiffusionPrior, LatentDenoiser, MixturePrior, SemanticDenoiser
from sferd_lab.unet import UNet, UNetSettings


def network() -> NetworkDenoiser:
    return NetworkDenoiser(UNet(UNetSettings(1, (4, 8), 1, (1,), 2)), "student")


def foreign() -> NetworkDenoiser:
    from diffusers import UNet2DModel

    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(4,), layers_per_block=1, norm_num_groups=2, attention_head_dim=2,
        down_block_types=("AttnDownBlock2D",), up_block_types=("AttnUpBlock2D",),
    )  # fmt: skip
    return NetworkDenoiser(DiffusersUNet(unet, {"num_train_timesteps": 10}))


MODELS: dict[str, Callable[[], Model]] = {
    "network": network,
    "semantic": lambda: SemanticDenoiser(network(), 2, encoder_width=8),
    "latent": lambda: LatentDenoiser(2, width=4, depth=1),
    "diffusion prior": lambda: DiffusionPrior(LatentDenoiser(2, width=4, depth=1), torch.zeros(2), torch.ones(2), 3),
    "mixture prior": lambda: MixturePrior(torch.ones(1), torch.zeros(1, 2), torch.eye(2)[None]),
    "foreign": foreign,
}


def changed(info: dict[str, Any], where: str, value: Any) -> dict[str, Any]:
    *path, last = where.split(".")
    here = info
    for name in path:
        here = here[name]
    here[last] = value
    return info


@pytest.mark.parametrize(
    ("kind", "where", "value", "words"),
    [
        ("network", "unet.widths", [4, 10**6], r"expected \(.*1000000"),
        ("network", "unet.widths", [4, 10**30], "lacks what rebuilds"),
        ("network", "unet.widths", [4] * 1000, "takes more than"),
        ("network", "unet.widths", "48", "widths = .*; allowed: whole numbers"),
        ("network", "unet.blocks", 10**9, "takes more than"),
        ("network", "unet.blocks", True, "blocks = True; allowed: whole numbers"),
        ("network", "unet.heads", 2.0, "heads = 2.0; allowed: whole numbers"),
        ("network", "unet.heads", 0, "heads = 0; allowed: 1 or more"),
        ("network", "unet.classes", 10**12, "tensor 'network.label.weight' is missing"),
        ("network", "unet.attention", [0.5], "attention = .*; allowed: whole numbers"),
        ("network", "unet", [1], "lacks what rebuilds"),
        ("network", "role", ["student"], r"its role is \['student'\]; expected text"),
        ("network", "kind", {"a": 1}, "it holds a {'a': 1}; expected a network"),
        ("semantic", "semantic.z_dim", 10**12, r"is \(.*; expected \(.*1000000000000"),
        ("semantic", "semantic.z_dim", 2.0, "z_dim = 2.0; allowed: 1 or more"),
        ("semantic", "semantic.encoder_width", 10**6, r"expected \(.*1000000"),
        ("semantic", "semantic.blind", "no", "blind = 'no'; allowed: True, False"),
        ("latent", "latent.depth", 10**6, "takes more than"),
        ("latent", "latent.width", 10**9, r"expected \(.*1000000000"),
        ("latent", "latent.z_dim", -1, "lacks what rebuilds"),
        ("diffusion prior", "steps", 10**12, "steps = 1000000000000 of the diffusion prior; allowed: 1 to 10000"),
        ("diffusion prior", "steps", "3", "steps = '3'"),
        ("diffusion prior", "latent.z_dim", 10**7, r"expected \(.*10000000"),
        ("foreign", "diffusers.unet.layers_per_block", 10**9, "takes more than"),
        ("foreign", "diffusers.unet.block_out_channels", [10**9], "expected|lacks what rebuilds"),
        ("foreign", "diffusers.unet.down_block_types", ["os.system"], "lacks what rebuilds"),
        ("foreign", "diffusers.scheduler.num_train_timesteps", 10**12, "num_train_timesteps = 1000000000000; allowed: 1 to 100000"),
        ("foreign", "diffusers", None, "lacks what rebuilds"),
    ],
)
def test_words_that_ask_for_more_or_make_no_model_are_refused(tmp_path: Path, kind: str, where: str, value: Any, words: str) -> None:
    path = tmp_path / "model.safetensors"
    save_model(path, MODELS[kind](), {})
    tensors, info = load_tensors(path)
    assert type(load_model(path)[0]) is type(MODELS[kind]())
    save_tensors(path, tensors, changed(info, where, value))
    with pytest.raises(SferdError, match=rf"model\.safetensors.*({words})"):
        load_model(path)


def test_nothing_is_allocated_before_every_shape_is_seen_to_be_the_files() -> None:
    where = []

    def build(width: int) -> nn.Module:
        where.append(torch.empty(0).device.type)
        return nn.Linear(width, 2)

    tensors = nn.Linear(3, 2).state_dict()
    with pytest.raises(SferdError, match=r"file: tensor 'weight' is \(2, 3\) torch.float32; expected \(2, 1000000000000\)"):
        rebuild(lambda: build(10**12), tensors, "file")
    assert where == ["meta"]
    made = rebuild(lambda: build(3), tensors, "file")
    assert where == ["meta", "meta", "cpu"]
    assert torch.equal(made.weight, tensors["weight"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["network", "mixture prior"])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, kind: str, value: float) -> None:
    path = tmp_path / "model.safetensors"
    save_model(path, MODELS[kind](), {})
    tensors, info = load_tensors(path)
    name = next(iter(tensors))
    save_tensors(path, {**tensors, name: torch.full_like(tensors[name], value)}, info)
    with pytest.raises(SferdError, match=f"tensor '{name}' holds NaN or infinity"):
        load_model(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"covariances": torch.ones(1, 2)}, r"covariances \(1, 2\) are diagonal or singular"),
        ({"covariances": torch.ones(1, 2, 2)}, "diagonal or singular"),
        ({"weights": torch.ones(0), "means": torch.zeros(0, 2), "covariances": torch.zeros(0, 2, 2)}, "0 components; expected 1 component"),
        ({"means": torch.zeros(1, 0), "covariances": torch.zeros(1, 0, 0)}, "points of 1 number or more"),
        ({"means": torch.zeros(1)}, "mixture over"),
        ({"weights": torch.ones(1).int()}, "dtypes"),
    ],
)
def test_a_prior_that_cannot_be_drawn_from_is_refused(tmp_path: Path, change: dict[str, Tensor], words: str) -> None:
    path = tmp_path / "prior.safetensors"
    save_model(path, MODELS["mixture prior"](), {})
    tensors, info = load_tensors(path)
    save_tensors(path, tensors | change, info)
    with pytest.raises(SferdError, match=rf"prior\.safetensors.*{words}"):
        load_model(path)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"kind": "latent", "kind": "network"}', '{"kind": NaN}', '{"kind": 1e999}'])
def test_words_that_are_no_plain_json_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(1)}, path, {METADATA_KEY: text})
    with pytest.raises(SferdError, match="metadata is not JSON"):
        load_model(path)


@pytest.mark.parametrize(("name", "value"), [("channels", 10**12), ("classes", 10**12), ("dim", "2"), ("width", 10**9), ("depth", 3)])
def test_a_feature_network_is_no_larger_than_its_file(tmp_path: Path, name: str, value: Any) -> None:
    path = tmp_path / "features.safetensors"
    save_feature_network(path, FeatureNetwork(1, 2, dim=2, width=4), {})
    tensors, info = load_tensors(path)
    save_tensors(path, tensors, changed(info, f"settings.{name}", value))
    with pytest.raises(SferdError, match=r"features\.safetensors"):
        load_feature_network(path)


def test_a_pickle_in_place_of_a_diffusers_models_weights_is_refused_without_being_run(tmp_path: Path) -> None:
    from sferd_lab.foreign import save_diffusers

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.mkdir, (tmp_path / "ran",)

    save_diffusers(foreign(), tmp_path / "teacher")
    assert load_diffusers(tmp_path / "teacher").network.channels == 1
    weights = tmp_path / "teacher" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    torch.save({"conv_in.weight": Evil()}, weights.with_suffix(".bin"))
    with pytest.raises(SferdError, match="no diffusers teacher in"):
        load_diffusers(tmp_path / "teacher")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("unet/config.json", '"layers_per_block": 1000000000', "takes more than"),
        ("unet/config.json", '"block_out_channels": [1000000000]', "no diffusers teacher"),
        ("unet/config.json", '"down_block_types": ["os.system"]', "no diffusers teacher"),
        ("unet/config.json", "[", "is not JSON"),
        ("scheduler/scheduler_config.json", '"num_train_timesteps": 1000000000000', "allowed: 1 to 100000"),
        ("scheduler/scheduler_config.json", '"beta_start": "x"', "no diffusers teacher"),
    ],
)
def test_a_diffusers_folder_that_asks_for_more_than_it_holds_is_refused(tmp_path: Path, part: str, change: str, words: str) -> None:
    import json

    from sferd_lab.foreign import save_diffusers

    save_diffusers(foreign(), tmp_path)
    path = tmp_path / part
    text = json.dumps(json.loads(path.read_text()) | json.loads("{" + change + "}")) if ":" in change else change
    path.write_text(text)
    with pytest.raises(SferdError, match=words):
        load_diffusers(tmp_path)
