import ast
import copy
import itertools
import math
import platform
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import sferd_lab
from sferd_lab.data import Split
from sferd_lab.denoiser import NetworkDenoiser
from sferd_lab.diffusion import HALF_PI
from sferd_lab.distill import ConsistencyTarget, DataTarget, ProgressiveTarget, denoising_target
from sferd_lab.errors import SferdError
from sferd_lab.files import load_tensors, save_tensors
from sferd_lab.semantic import LatentDenoiser, SemanticDenoiser
from sferd_lab.train import Steering, TrainSettings, draw_batch, load_checkpoint, load_part, save_checkpoint, step_flops, train
from sferd_lab.unet import UNet, UNetSettings


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


POINTS = Split(normal(40, 2), None)
IMAGES = Split(normal(20, 1, 4, 4).clamp(-1, 1), torch.arange(20) % 3)
denoise = denoising_target(0.0, HALF_PI)


def small(seed=0, dim=2):
    """A network of 8 units on points in the plane: the loop is the same for it as for images."""
    torch.manual_seed(seed)
    return LatentDenoiser(dim, width=8, depth=2)


def unet(seed=0, std=0.2, **settings):
    torch.manual_seed(seed)
    network = UNet(UNetSettings(**{"widths": (8, 8), "blocks": 1} | settings))
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=std)
    return NetworkDenoiser(network)


def options(**changes):
    return TrainSettings(**{"steps": 6, "batch_size": 8, "warmup": 2, "device": "cpu"} | changes)


def run(model, make_target, data, settings, checkpoint=None, stop=None):
    """The states' last after ``stop`` steps, the generator closed there as an interrupted notebook would."""
    states = train(model, make_target, data, settings, checkpoint)
    *_, last = itertools.islice(states, stop)
    states.close()
    return last


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


# ---- going on


def teacher_stage(seed):
    settings = options(steps=7, label_dropout=0.3, null_label=3, checkpoint_every=2)
    return unet(seed, classes=3), denoise, IMAGES, settings


def consistency_stage(seed):
    target = ConsistencyTarget(unet(9).requires_grad_(False), 4, solver="heun")
    settings = options(steps=7, target_decay=0.9, loss="pseudo_huber", anneal="linear", weight_decay=0.01, checkpoint_every=2)
    return unet(seed), target, Split(IMAGES.images, None), settings


def semantic_stage(seed):
    model = SemanticDenoiser(unet(9).requires_grad_(False), 2, encoder_width=8)
    torch.manual_seed(seed)
    for parameter in itertools.chain(model.gradient.parameters(), model.encoder.parameters()):
        nn.init.normal_(parameter, std=0.2)
    target = DataTarget(model.base, 2, lambda batch: {"image": batch.x0, "z_noise": batch.z_noise})
    return model, target, Split(IMAGES.images, None), options(steps=7, z_dim=2, z_noise=0.1, checkpoint_every=2)


STAGES = [teacher_stage, consistency_stage, semantic_stage]


@pytest.fixture(scope="module", params=STAGES, ids=lambda stage: stage.__name__)
def stage(request, tmp_path_factory):
    """A stage and its checkpoint when nothing stops it."""
    path = tmp_path_factory.mktemp("whole") / "checkpoint.safetensors"
    last = run(*request.param(seed=1), path)
    assert last.step == 7
    return request.param, path.read_bytes()


@pytest.mark.parametrize("stops", [[1], [2], [3], [6], [2, 1, 1, 2]], ids=str)
def test_a_run_that_was_stopped_ends_in_the_same_bytes_as_one_that_was_not(stage, stops, tmp_path):
    # The file holds the weights, their averages, the target network, the optimiser's moments and every loss.
    build, whole = stage
    path = tmp_path / "checkpoint.safetensors"
    for number, stop in enumerate(stops):
        torch.manual_seed(100 + number)  # whatever else the process draws
        # Where there is a checkpoint, the weights that the run starts with are of no consequence.
        run(*build(seed=1 if not path.exists() else 50 + number), path, stop)
    assert run(*build(seed=1 if not path.exists() else 2), path).step == 7
    assert path.read_bytes() == whole


def test_a_finished_run_is_not_trained_again(stage, tmp_path):
    build, whole = stage
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(whole)
    states = list(train(*build(seed=2), path))
    assert [state.step for state in states] == [7]
    assert states[0].losses.shape == (7,)
    assert states[0].losses.isfinite().all()
    load_part(build(seed=3)[0], load_tensors(path)[0], "model.", path)
    saved = {name: tensor for name, tensor in load_tensors(path)[0].items() if name.startswith("model.")}
    assert all(torch.equal(tensor, saved[f"model.{name}"]) for name, tensor in states[0].model.state_dict().items())


def test_training_neither_reads_nor_changes_torchs_own_random_state():
    outcomes = []
    for seed in (1, 2):
        model = small()
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        run(model, denoise, POINTS, options())
        assert torch.equal(torch.get_rng_state(), before)
        outcomes.append(weights(model))
    assert torch.equal(*outcomes)


def test_another_seed_is_another_run():
    outcomes = [run(small(), denoise, POINTS, options(seed=seed)).losses for seed in (0, 1)]
    assert not torch.equal(*outcomes)


# ---- checkpoints


def test_without_an_interval_the_checkpoint_is_written_at_the_end_alone(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    written = [path.exists() for _ in train(small(), denoise, POINTS, options(steps=3), path)]
    assert written == [False, False, True]


def test_a_failure_while_writing_leaves_the_old_checkpoint_whole_and_nothing_else(tmp_path, monkeypatch):
    path, whole = tmp_path / "checkpoint.safetensors", tmp_path / "whole.safetensors"
    settings = options(checkpoint_every=2)
    run(small(), denoise, POINTS, settings, whole)
    run(small(), denoise, POINTS, settings, path, 2)
    good = path.read_bytes()

    def disk_full(self, data):
        with self.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", disk_full)
        with pytest.raises(OSError, match="no space left"):
            run(small(), denoise, POINTS, settings, path)
    assert path.read_bytes() == good
    assert sorted(file.name for file in tmp_path.iterdir()) == ["checkpoint.safetensors", "whole.safetensors"]
    run(small(seed=5), denoise, POINTS, settings, path)
    assert path.read_bytes() == whole.read_bytes()


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint after 2 of 6 steps, with a target network."""
    path = tmp_path / "checkpoint.safetensors"
    run(small(), denoise, POINTS, options(checkpoint_every=2, target_decay=0.9), path, 2)
    return path


def resume(path, model=None, **changes):
    return run(model or small(), denoise, POINTS, options(**{"checkpoint_every": 2, "target_decay": 0.9} | changes), path)


@pytest.mark.parametrize(
    ("name", "value", "made_with"),
    [
        ("steps", 8, 6),
        ("batch_size", 4, 8),
        ("lr", 0.5, 0.001),
        ("seed", 3, 0),
        ("loss", "l2", "v"),
        ("anneal", "linear", "cosine"),
        ("target_decay", 0.0, 0.9),
        ("ema_decay", 0.5, 0.99),
        ("precision", "bf16", "no"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused_with_the_settings_name(checkpoint, name, value, made_with):
    with pytest.raises(SferdError, match=rf"made with {name} = {made_with}, this run has {name} = {value}; delete the file"):
        resume(checkpoint, **{name: value})


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, tensor):
    return lambda tensors: tensors.update({name: tensor})


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (drop("model.network.head.weight"), "tensor 'model.network.head.weight' is missing"),
        (drop("ema.module.network.head.weight"), "tensor 'ema.module.network.head.weight' is missing"),
        (drop("target.n_averaged"), "tensor 'target.n_averaged' is missing"),
        (drop("optimizer.0.exp_avg"), "tensor 'optimizer.0.exp_avg' is missing"),
        (drop("losses"), "tensor 'losses' is missing"),
        (put("model.more", torch.zeros(1)), "tensor 'model.more' is not one of this model"),
        (put("optimizer.99.exp_avg", torch.zeros(1)), "tensor 'optimizer.99.exp_avg' is not one of this model"),
        (put("other.weight", torch.zeros(1)), "tensor 'other.weight' is not one of this model"),
        (
            put("model.network.head.bias", torch.zeros(3)),
            r"head.bias' is \(3,\) torch.float32; expected \(2,\) torch.float32",
        ),
        (
            put("model.network.head.bias", torch.zeros(2).double()),
            r"head.bias' is \(2,\) torch.float64; expected \(2,\) torch.float32",
        ),
        (put("optimizer.0.exp_avg_sq", torch.zeros(1)), r"'optimizer.0.exp_avg_sq' is \(1,\)"),
        (put("losses", torch.zeros(1).double()), r"'losses' is \(1,\) torch.float64; expected \(2,\)"),
    ],
)
def test_a_checkpoint_whose_tensors_do_not_fit_is_refused_with_the_tensors_name(checkpoint, alter, message):
    tensors, info = load_tensors(checkpoint)
    alter(tensors)
    save_tensors(checkpoint, tensors, info)
    with pytest.raises(SferdError, match=message):
        resume(checkpoint)


def test_a_checkpoint_of_another_model_is_refused(checkpoint):
    torch.manual_seed(0)
    with pytest.raises(SferdError, match=r"tensor 'model\.[\w.]+' is \(8"):
        resume(checkpoint, LatentDenoiser(2, width=16, depth=2))


def test_a_checkpoint_of_a_run_that_trained_other_parts_is_refused(checkpoint):
    model = small()
    model.network.time.requires_grad_(False)
    with pytest.raises(SferdError, match=r"made training 14 tensors of the model, this run trains 10"):
        resume(checkpoint, model)


@pytest.mark.parametrize("info", [{"kind": "network"}, {"kind": "checkpoint", "version": 99}])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, info):
    path = tmp_path / "file.safetensors"
    save_tensors(path, {"a": torch.zeros(1)}, info)
    with pytest.raises(SferdError, match="is not a checkpoint of version 2"):
        resume(path)


# ---- what stops a run


def poisoned(step, value):
    """Ordinary targets, but ``value`` in one of them at training step ``step`` (from 1)."""
    calls = itertools.count(1)

    def make_target(batch, student):
        target = denoise(batch, student)
        if next(calls) == step:
            target.v[3, 1] = value
        return target

    return make_target


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_at_its_step_and_keeps_the_last_good_checkpoint(tmp_path, value):
    path, good = tmp_path / "checkpoint.safetensors", tmp_path / "good.safetensors"
    settings = options(checkpoint_every=2)
    run(small(), denoise, POINTS, settings, good, 4)
    with pytest.raises(SferdError, match=rf"the loss became {value} at step 5 of 6 .*the last good state is in {path}"):
        run(small(), poisoned(5, value), POINTS, settings, path)
    assert path.read_bytes() == good.read_bytes()
    assert load_tensors(path)[1]["step"] == 4


def test_a_loss_that_is_not_finite_before_any_checkpoint_says_so(tmp_path):
    with pytest.raises(SferdError, match=r"the loss became nan at step 1 of 6 .*no checkpoint was written"):
        run(small(), poisoned(1, math.nan), POINTS, options(), tmp_path / "checkpoint.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_bad_image_stops_the_run_at_the_step_that_draws_it():
    images = POINTS.images.clone()
    images[7] = math.nan
    settings = options(steps=50)
    step = next(step for step in range(50) if draw_batch(Split(images, None), settings, step).x0.isnan().any())
    with pytest.raises(SferdError, match=rf"the loss became nan at step {step + 1} of 50"):
        run(small(), denoise, Split(images, None), settings)


def test_a_model_without_parameters_to_train_is_refused():
    with pytest.raises(SferdError, match="there is nothing to train"):
        run(small().requires_grad_(False), denoise, POINTS, options())


def test_no_images_are_refused():
    with pytest.raises(SferdError, match="there are no training images; allowed: 1 or more"):
        run(small(), denoise, Split(torch.zeros(0, 2), None), options())


# ---- averages


def averages(history, decay):
    """The exponential moving averages of a history of weights; the first is the first."""
    mean = history[0]
    yield mean
    for now in history[1:]:
        mean = decay * mean + (1 - decay) * now
        yield mean


def test_the_moving_average_of_the_weights_is_exponential():
    states = train(small(), denoise, POINTS, options(ema_decay=0.8, lr=0.01))
    now, ema = zip(*((weights(state.model), weights(state.ema)) for state in states), strict=True)
    for expected, found in zip(averages(now, 0.8), ema, strict=True):
        torch.testing.assert_close(found, expected)
    assert (now[-1] - ema[-1]).abs().max() > 1e-3


def test_batch_statistics_are_copied_to_the_average_not_averaged():
    model, target, data, settings = semantic_stage(1)
    last = run(model, target, data, settings)
    assert last.model.encoder.standardise.running_mean.abs().max() > 0
    assert torch.equal(last.ema.encoder.standardise.running_mean, last.model.encoder.standardise.running_mean)


def test_the_target_network_is_the_moving_average_of_the_steps_before_and_gets_no_gradient():
    given = []

    def make_target(batch, student):
        given.append((student, weights(student)))
        return denoise(batch, student)

    model = small()
    start = weights(model)
    history = [weights(state.model) for state in train(model, make_target, POINTS, options(target_decay=0.5, lr=0.01))]
    assert torch.equal(given[0][1], start)
    for expected, (student, seen) in zip(averages(history, 0.5), given[1:], strict=False):
        assert student is not model
        torch.testing.assert_close(seen, expected)
    assert all(parameter.grad is None for parameter in given[-1][0].parameters())


def test_without_a_decay_the_target_network_is_the_student_itself():
    model, given = small(), []
    run(model, lambda batch, student: given.append(student) or denoise(batch, student), POINTS, options())
    assert all(student is model for student in given)


# ---- the optimiser


def test_the_learning_rate_rises_linearly_over_the_warm_up():
    settings = options(steps=100, warmup=4, anneal="constant")
    assert [settings.lr_factor(step) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert options(steps=100, warmup=0, anneal="constant").lr_factor(0) == 1


@pytest.mark.parametrize(("anneal", "quarter"), [("linear", 0.75), ("cosine", (1 + math.cos(math.pi / 4)) / 2)])
def test_the_learning_rate_falls_to_zero(anneal, quarter):
    settings = options(steps=100, warmup=0, anneal=anneal)
    factors = [settings.lr_factor(step) for step in range(101)]
    assert factors[0] == 1
    assert factors[25] == pytest.approx(quarter)
    assert factors[50] == pytest.approx(0.5)
    assert factors[100] == pytest.approx(0, abs=1e-12)
    assert all(after < before for before, after in itertools.pairwise(factors))


def test_each_step_is_taken_at_its_learning_rate():
    settings = options(steps=5, warmup=2, anneal="linear", lr=0.02)
    model = small()
    before = weights(model)
    for state in train(model, denoise, POINTS, settings):
        assert state.lr == pytest.approx(0.02 * settings.lr_factor(state.step - 1))
        now = weights(model)
        # Adam's first step moves every weight that has a gradient by the learning rate exactly.
        if state.step == 1:
            assert (now - before).abs().max().item() == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("clip", [1e-3, 1e3])
def test_gradients_are_clipped_to_their_norm(clip):
    model = small()
    run(model, denoise, POINTS, options(clip=clip), stop=1)
    norm = torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).norm().item()
    if clip < 1:
        assert norm == pytest.approx(clip, rel=1e-3)
    else:
        assert 0.01 < norm < 100


def test_the_optimiser_holds_only_what_is_trained_and_the_rest_stays(tmp_path):
    model, path = small(), tmp_path / "checkpoint.safetensors"
    model.network.time.requires_grad_(False)
    frozen = [parameter.clone() for parameter in model.network.time.parameters()]
    run(model, denoise, POINTS, options(weight_decay=0.5, lr=0.1), path)
    assert all(torch.equal(now, then) for now, then in zip(model.network.time.parameters(), frozen, strict=True))
    tensors, info = load_tensors(path)
    trained = [tuple(parameter.shape) for parameter in model.parameters() if parameter.requires_grad]
    assert info["trained"] == len(trained)
    assert [tuple(tensors[f"optimizer.{index}.exp_avg"].shape) for index in range(len(trained))] == trained
    assert f"optimizer.{len(trained)}.exp_avg" not in tensors


@pytest.mark.parametrize(
    "target",
    [lambda t: ProgressiveTarget(t, 2), lambda t: ConsistencyTarget(t, 4, "heun"), lambda t: DataTarget(t, 2)],
    ids=["pd", "cd", "data"],
)
def test_the_teacher_gets_no_gradient_even_when_its_weights_could_take_one(target):
    teacher = unet(3)
    before = weights(teacher)
    student = unet(1)
    run(student, target(teacher), Split(IMAGES.images, None), options(steps=2))
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert torch.equal(weights(teacher), before)
    assert all(parameter.grad is not None for parameter in student.parameters())


def test_training_learns():
    # Nearly one point, so that the velocity can be told from x and phi almost exactly.
    losses = run(small(), denoise, Split(0.5 + 0.1 * POINTS.images, None), options(steps=150, batch_size=40, lr=0.02)).losses
    assert losses[-20:].mean() < 0.5 * losses[:5].mean()


# ---- the batch


@pytest.fixture
def labelled():
    """60 images, each of the one value that is its label."""
    labels = torch.arange(60) % 5
    return Split(labels[:, None, None, None] * torch.ones(60, 1, 2, 2), labels)


def parts(batch):
    return [batch.x0, batch.eps, batch.uniform, batch.labels, batch.z_noise]


def test_a_batch_depends_on_seed_and_step_alone(labelled):
    settings = options(z_dim=3, z_noise=0.1, label_dropout=0.4)
    first = draw_batch(labelled, settings, 17)
    torch.manual_seed(99)
    draw_batch(labelled, settings, 3)
    again = draw_batch(labelled, replace(settings, lr=0.5, steps=1000, anneal="linear", clip=7), 17)
    assert all(torch.equal(a, b) for a, b in zip(parts(first), parts(again), strict=True))


@pytest.mark.parametrize("change", ["step", "seed"])
def test_another_step_or_seed_is_another_batch(labelled, change):
    first = draw_batch(labelled, options(), 17)
    other = draw_batch(labelled, options(seed=1), 17) if change == "seed" else draw_batch(labelled, options(), 18)
    for name in ("x0", "eps", "uniform"):
        assert not torch.equal(getattr(first, name), getattr(other, name))


def test_seed_and_step_are_not_interchangeable(labelled):
    assert not torch.equal(draw_batch(labelled, options(seed=2), 5).eps, draw_batch(labelled, options(seed=5), 2).eps)


@pytest.mark.parametrize("size", [1, 7, 64])
def test_the_angles_are_stratified_one_in_each_part_of_the_range(labelled, size):
    for step in range(20):
        uniform = draw_batch(labelled, options(batch_size=size), step).uniform
        assert (uniform * size).long().tolist() == list(range(size))
    assert draw_batch(labelled, options(batch_size=size), 0).uniform.dtype == torch.float32


def test_uniform_stays_below_one_when_rounding_would_reach_it(labelled, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.full(shape, 1 - 2**-53, dtype=torch.float64))
    uniform = draw_batch(labelled, options(batch_size=16), 0).uniform
    assert uniform.max() < 1
    # What would go wrong: the last angle's index on a grid.
    assert (uniform * 1000).long().max() == 999


def test_a_label_belongs_to_its_image(labelled):
    batch = draw_batch(labelled, options(batch_size=50), 0)
    assert torch.equal(batch.x0[:, 0, 0, 0].long(), batch.labels)
    assert len(batch.labels.unique()) == 5


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_labels_are_dropped_at_the_stated_rate(labelled, rate):
    n = 5000
    batch = draw_batch(labelled, options(batch_size=n, label_dropout=rate, null_label=5), 0)
    dropped = (batch.labels == 5).double().mean().item()
    assert abs(dropped - rate) <= 4 * (rate * (1 - rate) / n) ** 0.5
    kept = batch.labels != 5
    assert torch.equal(batch.labels[kept], batch.x0[kept, 0, 0, 0].long())


def test_the_noise_is_standard_and_the_codes_noise_has_its_own_size(labelled):
    batch = draw_batch(labelled, options(batch_size=4000, z_dim=5, z_noise=0.2), 0)
    assert batch.eps.shape == batch.x0.shape
    assert batch.z_noise.shape == (4000, 5)
    for noise, std in ((batch.eps, 1.0), (batch.z_noise, 0.2)):
        assert abs(noise.mean().item()) < 4 * std / noise.numel() ** 0.5
        assert noise.std().item() == pytest.approx(std, rel=4 / (2 * noise.numel()) ** 0.5)
    assert draw_batch(labelled, options(), 0).z_noise is None


# ---- precision and device


def test_bf16_runs_on_a_cpu_in_bf16_and_leaves_a_float32_model_behind():
    model, seen = unet(std=0.1), set()
    hook = model.network.stem.register_forward_hook(lambda module, args, out: seen.add(out.dtype))
    last = run(model, denoise, Split(IMAGES.images, None), options(steps=3, precision="bf16"))
    hook.remove()
    assert last.losses.isfinite().all()
    assert seen == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    model.network.stem.register_forward_hook(lambda module, args, out: seen.add(out.dtype))
    model(IMAGES.images, 0.5)
    assert seen == {torch.bfloat16, torch.float32}


def test_one_process_can_train_at_one_precision_after_another():
    exact = run(small(), denoise, POINTS, options(precision="no")).losses
    rounded = run(small(), denoise, POINTS, options(precision="bf16")).losses
    again = run(small(), denoise, POINTS, options(precision="no")).losses
    assert torch.equal(exact, again)
    assert not torch.equal(exact, rounded)
    torch.testing.assert_close(exact, rounded, rtol=0.1, atol=0.1)


# ---- settings


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("steps", 0, "1 or more"),
        ("batch_size", 0, "1 or more"),
        ("lr", 0.0, "above 0"),
        ("lr", math.nan, "above 0"),
        ("clip", -1.0, "above 0"),
        ("ema_decay", 1.0, "0 to below 1"),
        ("target_decay", -0.1, "0 to below 1"),
        ("label_dropout", 1.5, "0 to 1"),
        ("seed", -1, "0 or more"),
        ("checkpoint_every", -5, "0 or more"),
        ("z_noise", -0.1, "0 or more"),
        ("anneal", "step", "constant, linear, cosine"),
        ("precision", "fp8", "no, tf32, bf16, fp16"),
        ("device", "cuda", "auto, cpu"),
        ("loss", "l1", "v, x0_snr, l2, pseudo_huber"),
    ],
)
def test_a_setting_out_of_range_is_refused_with_its_name_value_and_what_is_allowed(name, value, allowed):
    with pytest.raises(SferdError, match=rf"{name} = '?{value}'?; allowed: {allowed}"):
        options(**{name: value})


# ---- no pickles


def test_nothing_in_the_package_can_load_a_pickle():
    sources = sorted(Path(sferd_lab.__file__).parent.rglob("*.py"))
    assert len(sources) > 10
    for source in sources:
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            where = f"{source.name}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import | ast.ImportFrom):
                modules = {alias.name.split(".")[0] for alias in node.names} | {(getattr(node, "module", "") or "").split(".")[0]}
                assert not modules & {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}, where
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in {("torch", "load"), ("pd", "read_pickle"), ("jit", "load"), ("hub", "load")}, where
            if isinstance(node, ast.keyword):
                assert not (node.arg == "allow_pickle" and getattr(node.value, "value", True)), where
                assert not (node.arg == "weights_only" and not getattr(node.value, "value", False)), where


FAULTS = """
import resource, sys, torch
from sferd_lab.train import keep_memory
if sys.argv[1] == "keep":
    keep_memory()
block = torch.zeros(2**24)
for _ in range(40):  # until the holes left by aligned blocks have joined
    block.clone()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    block.clone()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have settings of their own")
def test_kept_memory_is_used_again_instead_of_being_asked_for_page_by_page():
    # A process of its own, since the setting cannot be taken back.
    faults = {
        how: int(subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True).stdout)
        for how in ("keep", "default")
    }
    pages = 5 * 2**26 // 4096  # of five copies of 64 MiB
    assert faults["keep"] < 0.01 * pages
    assert faults["default"] > 10 * faults["keep"]


def test_a_steps_flops_are_those_of_its_passes():
    model, teacher = unet(), unet(seed=1).requires_grad_(False)
    data, x, phi = Split(IMAGES.images, None), normal(8, 1, 4, 4), torch.rand(8)

    def count(call):
        with FlopCounterMode(display=False) as counter:
            call()
        return counter.get_total_flops()

    forward = count(lambda: teacher(x, phi))
    learning = count(lambda: unet()(x, phi).v.square().mean().backward())
    assert step_flops(copy.deepcopy(model), denoise, data, options()) == learning
    # Two sub-steps of the teacher for each step of a progressive student.
    assert step_flops(copy.deepcopy(model), ProgressiveTarget(teacher, 4), data, options()) == learning + 2 * forward


# ---- less memory, more speed


def trained(model, target, data, **changes):
    return run(model, target, data, options(**changes))


def test_a_batch_in_parts_has_the_whole_one_s_losses_and_weights():
    # To rounding, which Adam blows up where a gradient is near zero: by less than the learning rate, 1e-3, a step.
    for target, data, changes in (
        (denoise, IMAGES, {"label_dropout": 0.3, "null_label": 3}),
        (ConsistencyTarget(unet(9), 4), Split(IMAGES.images, None), {"loss": "pseudo_huber", "target_decay": 0.9}),
    ):
        classes = 3 if data.labels is not None else 0
        whole, parts = (trained(unet(1, classes=classes), target, data, accumulate=count, **changes) for count in (1, 4))
        torch.testing.assert_close(parts.losses, whole.losses, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(weights(parts.ema), weights(whole.ema), rtol=0, atol=1e-3)


def test_gradient_checkpointing_changes_what_is_kept_and_nothing_else():
    kept = {}
    for on in (False, True):
        count = 0

        def pack(tensor):
            nonlocal count
            count += tensor.numel()
            return tensor

        model = unet(1)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            last = trained(model, ProgressiveTarget(unet(2), 2), Split(IMAGES.images, None), gradient_checkpointing=on, steps=2)
        kept[on] = (count, last.losses, weights(last.model))
    assert kept[True][0] < kept[False][0] / 2
    assert torch.equal(kept[True][1], kept[False][1])
    assert torch.equal(kept[True][2], kept[False][2])


def test_tf32_is_for_whoever_asks_for_less_than_single_precision():
    for precision, words, cudnn in (("tf32", "high", True), ("bf16", "high", True), ("no", "highest", False)):
        trained(small(), denoise, POINTS, precision=precision, steps=1)
        assert torch.get_float32_matmul_precision() == words
        assert torch.backends.cudnn.allow_tf32 is cudnn


@pytest.mark.skipif(not shutil.which("c++"), reason="torch.compile on a CPU needs a C++ compiler")
def test_compiling_is_accelerate_s_and_off_by_default(monkeypatch):
    import accelerate

    asked = []

    class Spy(accelerate.Accelerator):
        def __init__(self, *arguments, dynamo_backend, **rest):
            asked.append(dynamo_backend)
            super().__init__(*arguments, **rest)

    monkeypatch.setattr(accelerate, "Accelerator", Spy)
    for on in (False, True):
        trained(small(), denoise, POINTS, compile=on, steps=1)
    assert asked == [None, "inductor"]


def test_half_precision_on_a_cpu_is_refused_in_words():
    with pytest.raises(SferdError, match="precision = 'fp16' on a CPU; allowed: no, tf32, bf16"):
        trained(small(), denoise, POINTS, precision="fp16")


def test_the_scaler_of_the_loss_goes_on_where_it_was(tmp_path):
    path, settings, losses = tmp_path / "checkpoint.safetensors", options(), torch.zeros(6, dtype=torch.float64)
    kept = {}
    for scale in (8.0, 65536.0):  # a fresh one has lost what it has learned
        model = small()
        optimizer = torch.optim.AdamW(model.parameters())
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, settings.lr_factor)
        steering = Steering(optimizer, scheduler, torch.amp.GradScaler("cpu", init_scale=scale))
        if not path.exists():
            save_checkpoint(path, {"model": model}, steering, settings, losses[:2])
        load_checkpoint(path, {"model": model}, steering, settings, losses)
        kept[scale] = steering.scaler.get_scale()
    assert kept == {8.0: 8.0, 65536.0: 8.0}


# ---- checkpoints that say what they should not, with the right hash


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"settings": [1]}, "is not a checkpoint of version 2"),
        ({"settings": None}, "is not a checkpoint of version 2"),
        ({"version": "2"}, "is not a checkpoint of version 2"),
        ({"version": 1}, "is not a checkpoint of version 2"),
        ({"step": -1}, "after step -1; allowed: 1 to 6"),
        ({"step": 2.0}, "after step 2.0; allowed: 1 to 6"),
        ({"step": 7}, "after step 7; allowed: 1 to 6"),
        ({"step": True}, "after step True; allowed: 1 to 6"),
        ({"step": 10**30}, "after step 1000.*; allowed: 1 to 6"),
        ({"step": None}, "after step None; allowed: 1 to 6"),
        ({"step": 3}, r"tensor 'losses' is \(2,\) .*; expected \(3,\)"),
        ({"trained": 3}, "made training 3 tensors of the model, this run trains 14"),
        ({"trained": "14"}, "made training '14' tensors"),
        ({"trained": None}, "made training None tensors"),
    ],
)
def test_a_checkpoint_that_contradicts_its_settings_is_refused_in_words(checkpoint, change, words):
    tensors, info = load_tensors(checkpoint)
    save_tensors(checkpoint, tensors, info | change)
    with pytest.raises(SferdError, match=words):
        resume(checkpoint)


@pytest.mark.parametrize("anneal", ["constant", "linear", "cosine"])
def test_what_follows_from_settings_and_step_is_not_taken_from_the_file(tmp_path, anneal):
    path, changes = tmp_path / "checkpoint.safetensors", {"anneal": anneal, "warmup": 3, "checkpoint_every": 2}
    whole = [state.lr for state in train(small(), denoise, POINTS, options(**changes))]
    run(small(), denoise, POINTS, options(**changes), path, stop=2)
    tensors, info = load_tensors(path)
    # What a file may say beside is not read.
    save_tensors(path, tensors, info | {"param_groups": [{"lr": 1e9}], "scheduler": {"last_epoch": 5}, "random": {"seed": 9}})
    resumed = list(train(small(), denoise, POINTS, options(**changes), path))
    assert [state.lr for state in resumed] == whole[2:]


@pytest.mark.parametrize("name", ["model.network.head.bias", "optimizer.0.exp_avg_sq", "losses"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_checkpoint_with_numbers_that_are_not_finite_is_refused(checkpoint, name, value):
    tensors, info = load_tensors(checkpoint)
    save_tensors(checkpoint, {**tensors, name: torch.full_like(tensors[name], value)}, info)
    with pytest.raises(SferdError, match=f"tensor '{name}' holds NaN or infinity; delete the file"):
        resume(checkpoint)


@pytest.mark.parametrize("name", ["model", "ema", "optimizer", ""])
def test_a_tensor_with_the_bare_name_of_a_part_is_not_overlooked(checkpoint, name):
    tensors, info = load_tensors(checkpoint)
    save_tensors(checkpoint, {**tensors, name: torch.zeros(1)}, info)
    with pytest.raises(SferdError, match=f"tensor '{name}' is not one of this model"):
        resume(checkpoint)


@pytest.mark.parametrize("state", [None, [], {}, {"scale": -1.0}, "own scale 0", "own growth_factor a"])
def test_a_scaler_that_is_none_is_refused(tmp_path, state):
    path, settings, losses = tmp_path / "checkpoint.safetensors", options(), torch.zeros(6, dtype=torch.float64)
    model = small()
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, settings.lr_factor)
    steering = Steering(optimizer, scheduler, torch.amp.GradScaler("cpu"))
    save_checkpoint(path, {"model": model}, steering, settings, losses[:2])
    tensors, info = load_tensors(path)
    if isinstance(state, str):
        _, name, value = state.split()
        state = info["scaler"] | {name: 0 if value == "0" else value}
    save_tensors(path, tensors, info | {"scaler": state})
    with pytest.raises(SferdError, match=r"the scaler is .*; expected positive numbers under scale, "):
        load_checkpoint(path, {"model": model}, steering, settings, losses)
