"""Teachers from elsewhere say what diffusers' own modules say, can be taught, and go back into a stock pipeline."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import Tensor

from sferd_lab.artifacts import load_model, save_model, seeded
from sferd_lab.config import make_settings
from sferd_lab.data import Mixture, Split
from sferd_lab.denoiser import MixtureDenoiser, NetworkDenoiser
from sferd_lab.diffusion import HALF_PI
from sferd_lab.distill import ConsistencyTarget, ProgressiveTarget, denoising_target
from sferd_lab.errors import SferdError
from sferd_lab.experiment import Row, Run, as_student, on_codes, on_images
from sferd_lab.foreign import DiffusersUNet, EDMDenoiser, load_diffusers, save_diffusers
from sferd_lab.guidance import GuidedDenoiser, default_layer
from sferd_lab.sample import SampleNoise, sample
from sferd_lab.semantic import SemanticDenoiser
from sferd_lab.train import TrainSettings, train

SMALL: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
MODELS: dict[str, dict[str, Any]] = {
    "small": {},
    "colour, two blocks, scale and shift": {
        "in_channels": 3, "out_channels": 3, "layers_per_block": 2, "resnet_time_scale_shift": "scale_shift", "attention_head_dim": 8
    },
    "labels, attention everywhere": {
        "num_class_embeds": 5, "down_block_types": ("AttnDownBlock2D",) * 2, "up_block_types": ("AttnUpBlock2D",) * 2
    },
    "skip convolutions": {"in_channels": 3, "out_channels": 3, "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
                          "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"), "block_out_channels": (32, 64),
                          "norm_num_groups": 8, "attention_head_dim": 16},
}  # fmt: skip
SCHEDULERS: dict[str, dict[str, Any]] = {
    "epsilon, linear": {"prediction_type": "epsilon"},
    "v, cosine": {"prediction_type": "v_prediction", "beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 300},
    "x0, scaled linear": {"prediction_type": "sample", "beta_schedule": "scaled_linear", "timestep_spacing": "trailing"},
    "v, down to pure noise": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
}


def foreign(model: dict[str, Any] | None = None, scheduler: dict[str, Any] | None = None) -> tuple[UNet2DModel, DDIMScheduler]:
    """A model with random weights everywhere, in double precision, and its scheduler."""
    unet = seeded(lambda: UNet2DModel(**{**SMALL, **(model or {})}), 0).double().eval()
    return unet, DDIMScheduler(**{"clip_sample": False, **(scheduler or {})})


def adapted(model: dict[str, Any] | None = None, scheduler: dict[str, Any] | None = None) -> NetworkDenoiser:
    unet, theirs = foreign(model, scheduler)
    return NetworkDenoiser(DiffusersUNet(unet, dict(theirs.config))).eval()


def images(denoiser: NetworkDenoiser, count: int = 3, seed: int = 0) -> Tensor:
    shape = (count, *denoiser.network.image_shape)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(denoiser: NetworkDenoiser, count: int = 3) -> dict[str, Tensor]:
    return {"labels": torch.arange(count) % denoiser.network.classes} if denoiser.network.classes else {}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_predictions_are_those_of_diffusers(model: str, scheduler: str) -> None:
    unet, theirs = foreign(MODELS[model], SCHEDULERS[scheduler])
    denoiser = adapted(MODELS[model], SCHEDULERS[scheduler])
    x, told = images(denoiser), labels(denoiser)
    theirs.set_timesteps(theirs.config.num_train_timesteps)
    for step in (3, 150, 280):
        with torch.inference_mode():
            said = unet(x, step, class_labels=told.get("labels")).sample
            ours = denoiser(x, float(denoiser.network.phis[step]), **told)
        wanted = theirs.step(said, step, x).pred_original_sample
        torch.testing.assert_close(ours.x0, wanted, rtol=1e-5, atol=1e-5)  # its angles are in single precision
        alpha_bar = theirs.alphas_cumprod[step].double()
        torch.testing.assert_close(ours.eps, (x - alpha_bar.sqrt() * wanted) / (1 - alpha_bar).sqrt(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_walk_of_ddim_is_that_of_diffusers(model: str, scheduler: str) -> None:
    unet, theirs = foreign(MODELS[model], SCHEDULERS[scheduler])
    denoiser = adapted(MODELS[model], SCHEDULERS[scheduler])
    noise = SampleNoise(1, 4).draw(denoiser.network.image_shape)
    told = labels(denoiser, 4)
    # A number that divides the training steps: otherwise diffusers' "trailing" steps end one training step beside where the next begins.
    theirs.set_timesteps(5)
    x = noise.double()
    with torch.inference_mode():
        for step in theirs.timesteps:
            x = theirs.step(unet(x, step, class_labels=told.get("labels")).sample, step, x).prev_sample
    grid = denoiser.network.grid(5)
    ours = sample(denoiser.float(), 4, noise.shape[1:], 5, seed=1, grid=grid, condition=told).images
    torch.testing.assert_close(ours.double(), x, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("model", MODELS)
def test_attention_maps_are_those_of_diffusers(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    unet, _ = foreign(MODELS[model])
    denoiser = adapted(MODELS[model])
    x, told = images(denoiser), labels(denoiser)
    theirs: list[Tensor] = []
    for module in unet.modules():
        if isinstance(module, Attention):
            module.set_processor(AttnProcessor())  # which makes the weights
    scores = Attention.get_attention_scores

    def noting(self: Attention, *given: Tensor) -> Tensor:
        theirs.append(scores(self, *given))
        return theirs[-1]

    with torch.inference_mode():
        with monkeypatch.context() as patched:
            patched.setattr(Attention, "get_attention_scores", noting)
            unet(x, 500, class_labels=told.get("labels"))
        prediction = denoiser(x, float(denoiser.network.phis[500]), denoiser.attention_layers, **told)
        plain = denoiser(x, float(denoiser.network.phis[500]), **told)
    assert list(prediction.attention) == list(denoiser.attention_layers)
    assert len(theirs) == len(denoiser.attention_layers) > 1
    for ours, weights in zip(prediction.attention.values(), theirs, strict=True):
        torch.testing.assert_close(ours.weights.flatten(0, 1), weights)
        torch.testing.assert_close(ours.weights.sum(-1), torch.ones_like(ours.weights[..., 0]))
        assert ours.height * ours.width == ours.weights.shape[-1]
    assert plain.attention == {}
    torch.testing.assert_close(plain.v, prediction.v)  # that maps are noted changes nothing


def test_a_layer_of_the_decoder_guides_by_default() -> None:
    assert default_layer(adapted().attention_layers) == "up_blocks.0.attentions.0"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_angles_and_steps_are_each_others_inverse(dtype: torch.dtype, scheduler: str) -> None:
    network = adapted(scheduler=SCHEDULERS[scheduler]).network
    steps = network.step_of(network.phis.to(dtype))
    torch.testing.assert_close(steps, torch.arange(len(network.phis)).float(), rtol=0, atol=0)
    between = network.step_of((network.phis[100:101] + network.phis[101:102]) / 2)
    torch.testing.assert_close(between, torch.tensor([100.5]))


def test_pure_noise_is_left_out_where_noise_is_all_that_is_predicted() -> None:
    zero = {"rescale_betas_zero_snr": True}
    assert adapted(scheduler=zero | {"prediction_type": "v_prediction"}).phi_hi == pytest.approx(HALF_PI)
    assert adapted(scheduler=zero | {"prediction_type": "epsilon"}).phi_hi < HALF_PI - 1e-5


def a_step(denoiser: Any, target: Any, data: Tensor, **options: Any) -> Any:
    settings = TrainSettings(steps=2, batch_size=4, warmup=1, device="cpu", **options)
    *_, state = train(denoiser, target, Split(data, None), settings)
    assert state.losses.isfinite().all()
    return state.model


def test_it_guides_and_teaches_like_any_other() -> None:
    teacher = adapted(scheduler=SCHEDULERS["v, cosine"]).float()
    data = images(teacher, 8).float()
    guided = GuidedDenoiser(teacher, 0.3, blur_kernel=3)
    kept = copy.deepcopy(teacher.state_dict())
    for target in (ProgressiveTarget(guided, 2), ConsistencyTarget(guided, 4)):
        student = a_step(as_student(teacher), target, data)
        assert student.role == "student"
        moved = [name for name, weight in student.state_dict().items() if not torch.equal(weight, kept[name])]
        assert len(moved) > len(kept) / 2
    for name, weight in teacher.state_dict().items():
        assert torch.equal(weight, kept[name])


def test_gradient_checkpointing_can_be_had_and_left_again() -> None:
    student, kept = as_student(adapted(scheduler=SCHEDULERS["v, cosine"]).float()), {}
    data = Split(images(student, 8).float(), None)
    start = copy.deepcopy(student.state_dict())
    for turn, on in enumerate((False, True, False)):
        count = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal count
            count += tensor.numel()
            return tensor

        student.load_state_dict(start)
        settings = TrainSettings(steps=1, batch_size=4, device="cpu", gradient_checkpointing=on)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            *_, last = train(student, denoising_target(student.phi_lo, student.phi_hi), data, settings)
        kept[turn] = (count, last.losses.item())
    assert kept[1][0] < kept[0][0]
    assert kept[2] == kept[0]
    assert kept[1][1] == pytest.approx(kept[0][1], rel=1e-6)


def test_the_gradient_predictor_starts_as_nothing_and_learns_to_use_the_code() -> None:
    teacher = adapted(MODELS["colour, two blocks, scale and shift"], SCHEDULERS["v, cosine"]).float().requires_grad_(False)
    pair = seeded(lambda: SemanticDenoiser(copy.deepcopy(teacher), 4), 0)
    data = images(teacher, 8).float()
    x, z = data[:3], torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        torch.testing.assert_close(pair(x, 1.0, z=z[0]).v, teacher(x, 1.0).v, rtol=0, atol=0)
    target = denoising_target(teacher.phi_lo, teacher.phi_hi, on_images)
    trained = a_step(pair, target, data, z_dim=4, lr=1e-2)
    for name, weight in trained.base.state_dict().items():
        assert torch.equal(weight, teacher.state_dict()[name])
    trained.eval()
    with torch.inference_mode():
        first, other = (trained(x, 1.0, trained.attention_layers[:1], z=code) for code in z)
    assert not torch.equal(first.v, teacher(x, 1.0).v)
    assert not torch.equal(first.v, other.v)
    # The maps are the base's, not those of the copy inside G.
    torch.testing.assert_close(first.attention[teacher.attention_layers[0]].weights,
                               teacher(x, 1.0, teacher.attention_layers[:1]).attention[teacher.attention_layers[0]].weights)  # fmt: skip
    assert first.attention.keys() == set(teacher.attention_layers[:1])
    told = on_codes(trained)
    a_step(as_student(trained), ProgressiveTarget(trained, 1, told, told), data, z_dim=4)


def test_no_gradient_predictor_on_skip_convolutions() -> None:
    with pytest.raises(SferdError, match=r"up_block_types = .*AttnSkipUpBlock2D.*; allowed with a semantic gradient predictor"):
        SemanticDenoiser(adapted(MODELS["skip convolutions"]), 4)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_student_goes_back_into_a_stock_pipeline(scheduler: str, tmp_path: Path) -> None:
    teacher = adapted(scheduler=SCHEDULERS[scheduler]).float()
    student = a_step(as_student(teacher), ProgressiveTarget(teacher, 2), images(teacher, 8).float()).eval()
    save_diffusers(student, tmp_path / "student")
    assert not [path for path in (tmp_path / "student").rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]
    pipeline = DDIMPipeline.from_pretrained(tmp_path / "student")
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler.register_to_config(clip_sample=False)
    drawn = pipeline(4, generator=torch.Generator().manual_seed(3), num_inference_steps=2, output_type="np").images
    noise = torch.randn(4, *student.network.image_shape, generator=torch.Generator().manual_seed(3))
    x, grid = noise, student.network.grid(2)
    with torch.inference_mode():
        for phi, psi in zip(grid[:-1].tolist(), grid[1:].tolist(), strict=True):
            x = math.cos(phi - psi) * x - math.sin(phi - psi) * student(x, phi).v
    torch.testing.assert_close(torch.from_numpy(drawn).permute(0, 3, 1, 2), (x / 2 + 0.5).clamp(0, 1), rtol=1e-3, atol=1e-3)
    again = load_diffusers(tmp_path / "student")
    with torch.inference_mode():
        torch.testing.assert_close(again(noise, 1.0).v, student(noise, 1.0).v)


def test_a_pipeline_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = adapted().float(), adapted({"block_out_channels": (8, 24)}).float()
    save_diffusers(first, tmp_path / "theirs")
    with monkeypatch.context() as patched:
        patched.setattr(DDIMScheduler, "save_pretrained", lambda *_args, **_options: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            save_diffusers(second, tmp_path / "theirs")
    assert load_diffusers(tmp_path / "theirs").network.unet.config.block_out_channels == [8, 16]
    save_diffusers(second, tmp_path / "theirs")
    assert load_diffusers(tmp_path / "theirs").network.unet.config.block_out_channels == [8, 24]
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(SferdError, match="mine holds something other than a pipeline; allowed"):
        save_diffusers(first, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_the_projects_own_files_hold_it_too(tmp_path: Path) -> None:
    teacher = adapted().float()
    pair = SemanticDenoiser(copy.deepcopy(teacher), 4)
    x, z = images(teacher).float(), torch.zeros(3, 4)
    for name, model, told in (("teacher", teacher, {}), ("pair", pair.eval(), {"z": z})):
        save_model(tmp_path / f"{name}.safetensors", model, {"shape": [1, 8, 8]})
        again, _ = load_model(tmp_path / f"{name}.safetensors")
        with torch.inference_mode():
            torch.testing.assert_close(again(x, 1.0, **told).v, model(x, 1.0, **told).v, rtol=0, atol=0)


def test_an_experiment_runs_on_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFERD_LAB_TINY", "1")
    save_diffusers(adapted(scheduler=SCHEDULERS["v, cosine"]).float(), tmp_path / "theirs")
    run = Run(make_settings(teacher_from=str(tmp_path / "theirs"), run_folder=str(tmp_path / "run")), progress=False)
    assert isinstance(run.teacher().network, DiffusersUNet)
    for rows in (run.evaluate_teacher(), run.evaluate_students(), run.evaluate_semantic()):
        assert list(rows)
    table = run.table()
    assert table[(table["method"] == "cd") & (table["sgp"] == "conditional") & (table["metric"] == "fd")]["value"].notna().all()
    assert run.yardstick_row in {Row(*key) for key in table[list(Row.__dataclass_fields__)].itertuples(index=False)}
    (tmp_path / "theirs").rename(tmp_path / "moved")  # the run has its own copy, and goes on without the source
    assert isinstance(Run(run.settings, progress=False).teacher().network, DiffusersUNet)
    again = Run(
        make_settings(teacher_from=str(run.folder / "weights" / "pd-1.safetensors"), run_folder=str(tmp_path / "on")), progress=False
    )
    assert isinstance(again.teacher().network, DiffusersUNet)


def test_an_edm_network_is_a_denoiser() -> None:
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    exact = MixtureDenoiser(
        Mixture(torch.full((3,), 1 / 3, dtype=torch.float64), means, torch.full((3, 4), 0.05, dtype=torch.float64), (4,))
    )

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        # The posterior mean in the variance-exploding form, written down anew.
        variance = 0.05 + sigma[:, None, None] ** 2
        logits = -((x[:, None] - means) ** 2 / (2 * variance)).sum(-1)
        posterior = means + 0.05 / variance * (x[:, None] - means)
        return (logits.softmax(-1)[..., None] * posterior).sum(1)

    edm = EDMDenoiser(denoise)
    assert (edm.phi_lo, edm.phi_hi) == (math.atan(0.002), math.atan(80))
    x = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    for phi in (edm.phi_lo, 0.3, 1.2, edm.phi_hi):
        ours, wanted = edm(x, phi), exact(x, phi)
        for part in ("x0", "eps", "v"):
            torch.testing.assert_close(getattr(ours, part), getattr(wanted, part), rtol=1e-6, atol=1e-6)
    angles = torch.linspace(0.1, 1.5, 5, dtype=torch.float64)
    torch.testing.assert_close(edm(x, angles).x0, exact(x, angles).x0)
    shrinking = EDMDenoiser(lambda x, sigma: x / (1 + sigma.view(-1, 1) ** 2))  # exact for standard normal data
    assert sample(shrinking, 2000, (4,), 64).images.std().item() == pytest.approx(1, abs=0.05)
    with pytest.raises(SferdError, match=r"this EDMDenoiser is defined from 0.002"):
        edm(x, 0.0)
    with pytest.raises(SferdError, match=r"sigma_min = 2, sigma_max = 1; allowed"):
        EDMDenoiser(denoise, 2, 1)


@pytest.mark.parametrize(
    ("model", "scheduler", "words"),
    [
        ({}, {"prediction_type": "flow"}, r"prediction_type = 'flow'; allowed: epsilon, sample, v_prediction"),
        ({"time_embedding_type": "fourier"}, {}, r"time_embedding_type = 'fourier'; allowed: positional"),
        ({"out_channels": 2}, {}, r"in_channels = 1, out_channels = 2; allowed: the same"),
        ({"class_embed_type": "timestep"}, {}, r"class_embed_type = 'timestep'; allowed: None"),
    ],
)
def test_what_cannot_be_adapted_is_refused_in_words(model: dict[str, Any], scheduler: dict[str, Any], words: str) -> None:
    unet = UNet2DModel(**{**SMALL, **model})
    with pytest.raises(SferdError, match=words):
        DiffusersUNet(unet, dict(DDIMScheduler().config) | scheduler)


def test_wrong_images_labels_and_angles_are_refused_in_words() -> None:
    denoiser, labelled = adapted(), adapted(MODELS["labels, attention everywhere"])
    with pytest.raises(SferdError, match=r"images have shape \(2, 3, 8, 8\); allowed: \(B, 1, H, W\)"):
        denoiser(torch.zeros(2, 3, 8, 8).double(), 1.0)
    with pytest.raises(SferdError, match="labels were given; this model has 0 classes"):
        denoiser(images(denoiser), 1.0, labels=torch.zeros(3, dtype=torch.long))
    with pytest.raises(SferdError, match="labels are missing; this model has 5 classes"):
        labelled(images(labelled), 1.0)
    with pytest.raises(SferdError, match=r"phi runs from 0 to 0; this NetworkDenoiser is defined from 0.01"):
        denoiser(images(denoiser), 0.0)
    with pytest.raises(SferdError, match=r"attention layer 'decoder.0.0'; allowed: down_blocks.1.attentions.0"):
        denoiser(images(denoiser), 1.0, ["decoder.0.0"])
    with pytest.raises(SferdError, match="no sample_size"):
        _ = adapted({"sample_size": None}).network.image_shape


def test_a_folder_that_holds_no_teacher_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(SferdError, match=r"has no unet/config.json; allowed: a folder written by save_pretrained"):
        load_diffusers(tmp_path)
    save_diffusers(adapted(), tmp_path / "good")
    (tmp_path / "good" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(SferdError, match="no diffusers teacher in"):
        load_diffusers(tmp_path / "good")
    with pytest.raises(SferdError, match="a MixtureDenoiser of a NoneType; allowed: a NetworkDenoiser of a DiffusersUNet"):
        save_diffusers(MixtureDenoiser(Mixture(torch.ones(1), torch.zeros(1, 2), torch.ones(1, 2), (2,))), tmp_path / "no")  # type: ignore[arg-type]
    assert not (tmp_path / "no").exists()


def test_an_experiment_refuses_a_teacher_that_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFERD_LAB_TINY", "1")
    save_diffusers(adapted(MODELS["colour, two blocks, scale and shift"]), tmp_path / "colour")
    with pytest.raises(SferdError, match=r"images have shape \(1, 1, 8, 8\); allowed: \(B, 3, H, W\)"):
        Run(make_settings(teacher_from=str(tmp_path / "colour"), run_folder=str(tmp_path / "run")), progress=False)
    for name, value in (("retrain", True), ("bootstrap", 0)):
        with pytest.raises(SferdError, match=f"{name} = {value} with teacher_from = 'x'; allowed: one of them"):
            Run(make_settings(teacher_from="x", run_folder=str(tmp_path / "run"), **{name: value}), progress=False)
    assert not (tmp_path / "run").exists()
