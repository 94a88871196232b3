"""What an experiment will cost, before anyone pays for it: parameters, FLOPs, memory and hours of every stage, on a named device.

    python -m sferd_lab.plan preset=fashion16 device=A100 batch_size=256
    python -m sferd_lab.plan check

The first prints ``plan`` for a preset and any settings; ``device=here`` (the default) times a few steps on this machine. The second
trains a few steps of every kind of stage here and writes predicted beside measured times to ``data/results/plan.csv``.

The stages are those of ``Run``, because ``Run`` itself is asked for them, on tensors that have a shape but no values (torch's "meta"
device): nothing is computed, nothing is read but a shipped or foreign teacher, and a network too large for this machine is counted too.
"""

from __future__ import annotations

import copy
import os
import statistics
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from sferd_lab.artifacts import shipped_folder
from sferd_lab.config import Settings, make_settings, parse_literals
from sferd_lab.data import SIZES, Split
from sferd_lab.denoiser import Denoiser, NetworkDenoiser
from sferd_lab.distill import Batch, denoising_target, distillation_loss
from sferd_lab.errors import SferdError, command
from sferd_lab.experiment import Row, Run
from sferd_lab.files import replacing
from sferd_lab.sample import Prior, SampleNoise
from sferd_lab.semantic import DiffusionPrior, KernelPrior, MixturePrior, SemanticDenoiser
from sferd_lab.train import MakeTarget, TrainSettings, parts_of, train
from sferd_lab.unet import UNet, UNetSettings, set_gradient_checkpointing

# Channels, classes, training and reference images of each data set, so that it need not be on this machine. What is in a folder of one's
# own is not looked at: colour, ten classes and enough images are assumed.
SHAPES = {
    "digits": (1, 10, 847, 500),
    "fashion-mnist": (1, 10, 50_000, 10_000),
    "patches": (3, 2, 2_800, 1_400),
    "mixture": (1, 10, 10_000, 5_000),
    "cifar10": (3, 10, 40_000, 10_000),
    "imagenet64": (3, 1000, 1_182_615, 50_000),
    "folder": (3, 10, 10**6, 10**5),
}
META = torch.device("meta")
FLOAT = 4  # bytes
# More steps than anyone waits for: a training that is only timed goes on as long as it is asked to.
FOREVER = 10**6
STREAMS = 100
_aten = torch.ops.aten


# Devices ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Accelerator:
    """A product's data sheet: peak TFLOP/s without sparsity in float32, TF32 and bfloat16 (float16 is as fast), and memory in GB."""

    fp32: float
    tf32: float
    bf16: float
    memory: float


# NVIDIA's data sheets. Those of H100, H200 and L4 state TF32 and bfloat16 "with sparsity", twice what dense matrices can reach.
ACCELERATORS = {
    "A100": Accelerator(19.5, 156, 312, 80),  # SXM
    "A100-40GB": Accelerator(19.5, 156, 312, 40),
    "H100": Accelerator(67, 989 / 2, 1979 / 2, 80),  # SXM
    "H200": Accelerator(67, 989 / 2, 1979 / 2, 141),  # SXM
    "L4": Accelerator(30.3, 120 / 2, 242 / 2, 24),
}


@dataclass(frozen=True)
class Speed:
    """FLOPs a second, in attention and in all else, and what every operation takes beside them, in seconds.

    ``launch`` is what the host of a GPU takes for every operation, in seconds, while the GPU still computes those before: the slower of the
    two sets the pace.
    """

    flops: float
    attention: float
    operation: float = 0.0
    launch: float = 0.0

    def seconds(self, work: Work) -> float:
        """How long ``work`` takes."""
        computing = self.operation * work.operations + work.attention / self.attention + (work.flops - work.attention) / self.flops
        return max(computing, self.launch * work.operations)


@dataclass(frozen=True)
class Device:
    """Something to run on: its ``memory`` in bytes, its speed without gradients (targets, samples) and in the update of a training step.

    ``stream`` is what a random stream takes, in seconds: each sample has one of its own, made on the CPU, and one more for its code.
    """

    name: str
    memory: float
    inference: Speed
    training: Speed
    stream: float = 0.0

    def seconds(self, stage: Stage) -> float:
        """How long one of the stage's repeats takes."""
        return self.inference.seconds(stage.inference) + self.training.seconds(stage.update) + self.stream * stage.streams


# What an H200 reached with the teachers of three presets (data/results/gpu_speed.csv): shares of its data sheet's peak by arithmetic, and
# the seconds that its host, a virtual machine, took to launch an operation; in passes and in training steps.
PASS_SHARES, STEP_SHARES = {"fp32": 0.29, "tf32": 0.21}, {"fp32": 0.43, "tf32": 0.18, "bf16": 0.12}
PASS_LAUNCH, STEP_LAUNCH = 39e-6, 75e-6


def accelerator(name: str, precision: str = "no", efficiency: float | None = None) -> Device:
    """A named product at the shares of its peak that an H200 reached, or at ``efficiency`` times its peak with everything else free.

    **For another product than the H200 that is an inference.** ``precision`` "no" is float32 throughout, anything else TF32
    (``train.set_precision``), and bf16 or fp16 in the student's passes of a training step, for targets and samples are made in single
    precision. Raises SferdError for an unknown name or an efficiency that is not above 0 and at most 1.
    """
    if name not in ACCELERATORS:
        raise SferdError(f"device = {name!r}; allowed: here, {', '.join(ACCELERATORS)}")
    if efficiency is not None and not 0 < efficiency <= 1:
        raise SferdError(f"efficiency = {efficiency}; allowed: above 0, at most 1")
    passes = "fp32" if precision == "no" else "tf32"
    steps = passes if precision in ("no", "tf32") else "bf16"

    def speed(kind: str, share: float, launch: float) -> Speed:
        share, launch = (share, launch) if efficiency is None else (efficiency, 0.0)
        rate = 1e12 * share * getattr(ACCELERATORS[name], kind)
        return Speed(rate, rate, launch=launch)

    inference = speed(passes, PASS_SHARES[passes], PASS_LAUNCH)
    return Device(name, 1e9 * ACCELERATORS[name].memory, inference, speed(steps, STEP_SHARES[steps], STEP_LAUNCH))


# Counting without computing -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """What some calls take: ``flops``, those of fused ``attention`` among them, ``operations`` that make a tensor, and bytes.

    ``peak`` is the most that their tensors hold at a time, ``kept`` what they hold before the last call.
    """

    flops: float = 0
    attention: float = 0
    operations: float = 0
    peak: int = 0
    kept: int = 0

    def plus(self, other: Work, times: float) -> Work:
        """The sum with ``times`` times the ``other``, one after another."""
        counts = (getattr(self, name) + times * getattr(other, name) for name in ("flops", "attention", "operations"))
        return Work(*counts, max(self.peak, other.peak), max(self.kept, other.kept))


# The formulas of other devices' fused attention, for the kernel of a CPU, which torch's counter passes over.
_ATTENTION = {
    _aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda out, q, k, v, *_, **__: sdpa_backward_flop_count(out, q, k, v),
}


def _fused_attention(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
    """The kernel of a CPU: by itself torch would take tensors without values another way.

    It stands in for torch's function, since a mode would not reach into the backward pass, where checkpointed blocks are computed again.
    """
    return _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]


class _Shapes(TorchFunctionMode):
    """Lets the library run on tensors without values, where it would look at one."""

    def __torch_function__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (Tensor.any, Tensor.all) and args[0].is_meta:
            return torch.tensor(function is Tensor.any)  # a mask marks something, but not everything
        if function is Tensor.cpu and args[0].is_meta:
            return args[0]
        return function(*args, **(kwargs or {}))


class _Meter(TorchDispatchMode):
    """Counts FLOPs by torch's formulas and operations that make a tensor, and follows the storages of tensors without values: how many
    bytes are held now, how many at most.

    Not ``FlopCounterMode``: its hooks on modules hold on to what checkpointed blocks compute again, and the peak would be wrong.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = self.operations = self.flops = self.attention = 0
        self.inside = False
        self.known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind, made, outermost = function._overloadpacket, NotImplemented, not self.inside
        if kind not in _ATTENTION and kind not in flop_registry:
            # In inference mode an operation may come whole that consists of others. Their FLOPs count, the tensors between them do not:
            # a device has a kernel for the whole.
            self.inside = True
            with self:
                made = function.decompose(*args, **(kwargs or {}))
            self.inside = not outermost
        if made is NotImplemented:
            made = function(*args, **(kwargs or {}))
        if kind in _ATTENTION:
            self.attention += _ATTENTION[kind](*(part.shape for part in args if isinstance(part, Tensor)))
        elif kind in flop_registry:
            self.flops += flop_registry[kind](*args, **(kwargs or {}), out_val=made)
        if not outermost:
            return made
        storages = {leaf.untyped_storage() for leaf in tree_leaves(made) if isinstance(leaf, Tensor) and leaf.is_meta}
        fresh = [storage for storage in storages if storage not in self.known]
        self.operations += bool(fresh)
        for storage in fresh:
            self.known.add(storage)
            self.held += storage.nbytes()
            weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.held)
        return made

    def _free(self, size: int) -> None:
        self.held -= size


def count(first: Callable[[], Any], then: Callable[[Any], Any] | None = None) -> Work:
    """The work of ``first()``, and of ``then`` on its result, on tensors without values."""
    with patch.object(F, "scaled_dot_product_attention", _fused_attention), _Shapes(), _Meter() as meter:
        result = first()
        kept = meter.held
        if then:
            then(result)
    return Work(meter.flops + meter.attention, meter.attention, meter.operations, meter.peak, kept)


def _numbers(module: nn.Module | None, trained: bool = False) -> int:
    """Parameters of ``module``: all, or those that require a gradient."""
    return sum(part.numel() for part in module.parameters() if part.requires_grad or not trained) if module else 0


def image_shape(settings: Settings) -> tuple[int, int, int]:
    """(C, H, W) of the images that ``settings`` are about. Raises SferdError for a data set without known shape, or a size it lacks."""
    if settings.data not in SHAPES:
        raise SferdError(f"data = '{settings.data}' cannot be planned; allowed: {', '.join(SHAPES)}")
    sizes = SIZES.get(settings.data)
    size = settings.image_size or (sizes[0] if sizes else None)
    if size is None or (sizes and size not in sizes):
        raise SferdError(
            f"image_size = {size} for data = '{settings.data}'; allowed: {', '.join(map(str, sizes)) if sizes else 'a number'}"
        )
    return SHAPES[settings.data][0], size, size


@dataclass(frozen=True)
class Stage:
    """A line of the plan. Each of its ``repeats`` (updates, or batches of images) is an ``inference`` and an ``update`` part.

    ``batch`` is how many images are in a pass; the work is that of all processes, of which ``at_once`` share it.
    """

    name: str
    kind: str  # train, prior, sample
    batch: int
    repeats: float
    parameters: int
    inference: Work
    update: Work = Work()
    trained: int = 0
    copies: int = 0  # moving averages of the model
    others: int = 0  # parameters of the teacher
    streams: int = 0  # random streams of a batch of samples
    at_once: int = 1


class Plan(Run):
    """A ``Run`` that notes in ``stages`` what it would train and sample, in its order, with tensors that have no values.

    Raises SferdError where ``Run`` would before its first training step.
    """

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings, self.progress, self.folder, self.device = settings, False, folder, META
        self.shape = image_shape(settings)
        _, classes, train_images, reference_images = SHAPES[settings.data]
        size, native = self.shape[1], SIZES.get(settings.data, (None,))[0]
        self.data = SimpleNamespace(
            name=settings.data if size == native else f"{settings.data}-{size}",
            classes=classes,
            train=self._images(train_images),
            reference=self._images(reference_images),
        )
        classes = classes if settings.class_conditional else 0
        self.unet = UNetSettings(self.shape[0], settings.widths, settings.blocks, settings.attention, settings.heads, classes)
        self.train_split = Split(self.data.train.images, self.data.train.labels if classes else None)
        self.stages: dict[str, Stage] = {}
        self.models: dict[str, nn.Module] = {}
        self._works: dict[str, tuple[Work, Work]] = {}
        with nullcontext() if settings.teacher_from else META:
            self._check_fit()

    def _images(self, number: int) -> Split:
        return Split(torch.empty(number, *self.shape, device=META), torch.empty(number, dtype=torch.long, device=META))

    def train_stage(
        self, name: str, build: Callable[[], Denoiser], make_target: MakeTarget, data: Split, seed_of: str | None = None, **options: Any
    ) -> Denoiser:
        """Note what training the stage would take; its model, without values."""
        if name in self.models:
            return self.models[name]
        settings = self.settings
        training = TrainSettings(batch_size=settings.batch_size, accumulate=settings.accumulate, **options)
        parts = parts_of(training, settings.processes)
        training = replace(training, batch_size=training.batch_size // parts)
        with META:
            model = build().train()
        set_gradient_checkpointing(model, settings.gradient_checkpointing)
        teacher, trained = getattr(make_target, "teacher", None), _numbers(model, trained=True)
        inference, update = self._once(
            lambda: step_work(model, make_target, data, training),
            # What two stages with the same work have in common; with one step the data target has no teacher to ask.
            *(type(make_target), getattr(make_target, "steps", 0) == 1, teacher, model, trained, data.images.shape[1:]),
        )
        self.stages[name] = Stage(
            *(name, "train", training.batch_size, training.steps, _numbers(model)),
            *(Work().plus(part, parts) for part in (inference, update)),
            trained,
            copies=2 if training.target_decay else 1,
            others=_numbers(teacher),
            at_once=settings.processes,
        )
        return self._keep(name, model)

    def _keep(self, name: str, model: nn.Module) -> nn.Module:
        self.models[name] = model.to(META).eval().requires_grad_(False)
        return self.models[name]

    def _work(self) -> None:
        """Nothing is written, so nobody is kept out of the folder."""

    def _save(self, path: Path, model: nn.Module, info: dict[str, Any]) -> None:
        self._keep(path.stem, model)

    def _once(self, works: Callable[[], tuple[Work, Work]], *parts: Any) -> tuple[Work, Work]:
        """``works()``, or what it gave before for ``parts`` of the same description: counting takes a second, and stages repeat."""
        key = repr(parts)
        if key not in self._works:
            self._works[key] = works()
        return self._works[key]

    def codes(self, model: SemanticDenoiser, images: Tensor) -> Tensor:
        """The shape of codes (N, z_dim)."""
        return torch.empty(len(images), self.settings.z_dim, device=META)

    def prior(self, name: str, model: SemanticDenoiser) -> Prior:
        """Note what encoding the training images takes; the fit of a mixture, on the CPU by scikit-learn, is not counted."""
        stage, settings, images = f"{name}-prior", self.settings, self.train_split.images[:1000]
        if stage not in self.models:
            k, z = settings.prior_components, settings.z_dim
            if settings.prior == "kernel":
                self._keep(stage, KernelPrior(torch.zeros(1, z).expand(len(self.train_split.images), z), settings.z_noise))
            elif settings.prior == "mixture":
                self._keep(stage, MixturePrior(torch.full((k,), 1 / k), torch.zeros(k, z), torch.eye(z).expand(k, z, z)))
            else:
                codes = self.codes(model, self.train_split.images)
                latent = self.train_latent(f"{name}-latent", codes)
                self._keep(stage, DiffusionPrior(latent, codes[0], codes[0], settings.prior_sampling_steps))
            with torch.inference_mode():
                encoding = count(lambda: model.encoder(images))
            numbers = sum(part.numel() for part in self.models[stage].state_dict().values())
            repeats = len(self.train_split.images) / len(images)
            self.stages[stage] = Stage(stage, "prior", len(images), repeats, numbers, encoding, others=_numbers(model))
        return self.models[stage]

    def evaluate(self, row: Row, denoiser: Denoiser, prior: Prior | None = None, **condition: Tensor) -> pd.DataFrame:
        """Note what sampling the row would take."""
        number = self.settings.n_samples
        batch = min(self.settings.sampling_batch, number)

        def steps(steps: int) -> Work:
            told = {name: values[:batch] for name, values in condition.items()}
            return count(lambda: self.draw(replace(row, steps=steps), denoiser, range(batch), prior, **told))

        # As in a run's own count: a fixed amount for the first step and another for each further one.
        one, two = self._once(lambda: (steps(1), steps(2)), row.sampler, denoiser, prior, list(condition))
        work = one.plus(two.plus(one, -1), row.steps - 1)
        self.stages[row.label] = Stage(
            *(row.label, "sample", batch, number / batch, _numbers(denoiser), work),
            streams=batch * (1 if prior is None else 2),
            at_once=self.settings.processes,
        )
        return pd.DataFrame()

    def code_errors(self, row: Row, model: SemanticDenoiser, prior: Prior) -> pd.DataFrame:
        """Note what the comparison of four kinds of code would take: each is a pass over the reference images, a thousand at a time."""
        images, name = self.data.reference.images[:1000], replace(row, z="code errors").label
        z = self.codes(model, images)
        with torch.inference_mode():
            work, _ = self._once(lambda: (count(lambda: model(images, model.phi_hi, z=z)), Work()), "codes", model)
        repeats = 4 * len(self.data.reference.images) / len(images)
        self.stages[name] = Stage(name, "sample", len(images), repeats, _numbers(model), work)
        return pd.DataFrame()


def step_work(model: Denoiser, make_target: MakeTarget, data: Split, training: TrainSettings) -> tuple[Work, Work]:
    """Of one part of a training step as in ``train``: the work of making its target, and of the model's forward and backward pass.

    The second one's ``kept`` is what the forward pass leaves for the backward. Model and data are without values.
    """
    size = training.batch_size
    x0, uniform = torch.empty(size, *data.images.shape[1:], device=META), torch.empty(size, device=META)
    labels = None if data.labels is None else torch.empty(size, dtype=torch.long, device=META)
    batch = Batch(x0, x0, uniform, labels, torch.empty(size, training.z_dim, device=META) if training.z_dim else None)
    goals = []
    inference = count(lambda: goals.append(make_target(batch, copy.deepcopy(model) if training.target_decay else model)))
    goal = goals[0]
    update = count(
        lambda: distillation_loss(model(goal.x, goal.phi, **goal.condition), goal, training.loss).mean(), lambda loss: loss.backward()
    )
    model.zero_grad()
    return inference, update


def plan(settings: Settings, device: Device | str = "here", efficiency: float | None = None) -> pd.DataFrame:
    """One line for each stage that a fresh ``Run`` with ``settings`` would train, and each row that it would sample, in its order.

    ``device`` is one of ``ACCELERATORS``, at the shares of its peak that an H200 reached or at an assumed ``efficiency`` (see
    ``accelerator``), or "here", this machine as ``calibrate`` measures it. Columns:

    - ``parameters``, ``trained``: numbers in the model, and those trained.
    - ``updates`` and ``images``: how many of either; ``batch``: images in each pass.
    - ``gflop``: of one update, its target included, or of one image sampled. ``tflop``, ``attention_tflop``: of the stage, the sum apart
      from and in fused attention. The first is what ``stages.csv`` and ``metrics.csv`` of a run on a CPU hold: torch's counter passes over
      that kernel there. Not counted: element by element operations, the optimiser, scores, codes of real images to sample with.
    - in GB (10^9 bytes), of each process, without mixed precision (which takes less): ``weights``, the teacher's included, ``gradients``,
      ``optimiser`` state, ``averages``, ``activations``: the most that a pass holds beside them, above all what the forward leaves for the
      backward. ``memory`` is the sum, without the images of the data set and what a library needs for itself, as the buckets in which
      several processes exchange gradients; ``fits`` says whether the device has as much. An H200 held up to 1.4 times as much.
    - ``hours``: by FLOPs, or by launches where they take longer; with an ``efficiency`` by FLOPs alone; "here" by FLOPs and operations and,
      for samples, by random streams. With ``processes`` each is on a device of
      its own, and the exchange of gradients is free.

    ``accumulate`` and ``gradient_checkpointing`` are counted as they are trained: smaller passes, and blocks computed twice. Raises
    SferdError for an unknown device or efficiency, for several processes "here" without an accelerator, and where ``Run`` would.
    """
    if device == "here" and settings.processes > 1 and _where(settings).type == "cpu":
        raise SferdError(f"processes = {settings.processes} with device = here, whose cores they share; allowed: 1, or a named device")
    if isinstance(device, str):
        device = calibrate(settings) if device == "here" else accelerator(device, settings.precision, efficiency)
    return pd.DataFrame([_line(stage, device) for stage in planned_stages(settings).values()])


def planned_stages(settings: Settings) -> dict[str, Stage]:
    """The stages behind ``plan``, by name."""
    with tempfile.TemporaryDirectory() as folder:
        planned = Plan(settings, Path(folder))
        for _ in planned.rows():
            pass
    return planned.stages


def _line(stage: Stage, device: Device) -> dict[str, Any]:
    inference, update, trains = stage.inference, stage.update, stage.kind == "train"
    attention = stage.repeats * (inference.attention + update.attention)
    flops = stage.repeats * (inference.flops + update.flops)
    gradients = FLOAT * stage.trained
    memory = {
        "weights": FLOAT * (stage.parameters + stage.others),
        "gradients": gradients,
        "optimiser": 2 * gradients,
        "averages": FLOAT * stage.copies * stage.parameters,
        # A step's peak is after its forward pass, beside the gradients of the step before, or within the backward, new gradients included.
        "activations": max(inference.peak, update.kept, update.peak - gradients),
    }
    return {
        "stage": stage.name,
        "kind": stage.kind,
        "parameters": stage.parameters,
        "trained": stage.trained,
        "batch": stage.batch,
        "updates": stage.repeats if trains else 0,
        "images": 0 if trains else round(stage.repeats * stage.batch),
        "gflop": (inference.flops + update.flops) / (1 if trains else stage.batch) / 1e9,
        "tflop": (flops - attention) / 1e12,
        "attention_tflop": attention / 1e12,
        **{name: size / 1e9 for name, size in memory.items()},
        "memory": sum(memory.values()) / 1e9,
        "fits": sum(memory.values()) <= device.memory,
        "hours": stage.repeats * device.seconds(stage) / stage.at_once / 3600,
    }


# This machine ------------------------------------------------------------------------------------------------------------


def memory_here(device: torch.device) -> int:
    """Bytes of memory of a CUDA device, or of this machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def alternate(calls: dict[str, Callable[[], object]], turns: int, clock: Callable[[], float] = time.perf_counter) -> dict[str, float]:
    """The median time of each call. They take turns, so that what else the machine does meets all alike; each turn's first is not timed."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(turns):
        for name, call in calls.items():
            call()
            started = clock()
            call()
            times[name].append(clock() - started)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


@dataclass(frozen=True)
class Trial:
    """Real calls on the settings' network and their work: two kinds at two batch sizes, to tell the rate of each from what is fixed."""

    calls: dict[str, Callable[[], object]]
    works: dict[str, Work]

    def device(self, seconds: dict[str, float], memory: int) -> Device:
        """The device on which the calls took so many ``seconds``."""

        def speed(kind: str) -> Speed:
            (large, long), (small, short) = ((self.works[f"{kind}, {part}"], seconds[f"{kind}, {part}"]) for part in ("batch", "part"))
            slope = (long - short) / (large.flops - small.flops)
            # A noisy clock may put it below zero, or all of a step into it.
            fixed = min(max(0.0, long - slope * large.flops), long / 2)
            rate = large.flops / (long - fixed)
            return Speed(rate, rate, fixed / large.operations)

        return Device("here", memory, speed("inference"), speed("training"), seconds["streams"] / STREAMS)


def _where(settings: Settings) -> torch.device:
    if settings.device == "auto" and torch.accelerator.is_available():
        return torch.accelerator.current_accelerator()
    return torch.device("cpu")


def trial(settings: Settings) -> Trial:
    """The calls that ``calibrate`` times: a pass of the U-Net in inference mode and a whole training step of a teacher, at the batch size
    and at a quarter of it, and the noise of ``STREAMS`` samples.
    """
    shape, where = image_shape(settings), _where(settings)
    classes = SHAPES[settings.data][1] if settings.class_conditional else 0
    network = UNetSettings(shape[0], settings.widths, settings.blocks, settings.attention, settings.heads, classes)
    target = denoising_target(NetworkDenoiser.phi_lo, NetworkDenoiser.phi_hi)
    calls: dict[str, Callable[[], object]] = {"streams": lambda: SampleNoise(0, STREAMS).draw(shape)}
    works = {}

    def data(number: int, device: torch.device | str) -> Split:
        labels = torch.zeros(number, dtype=torch.long, device=device) if classes else None
        return Split(torch.zeros(number, *shape, device=device), labels)

    def infer(model: Denoiser, x: Tensor) -> None:
        with torch.inference_mode():
            model(x, 1.0).v.sum().item()  # a GPU answers when it is done

    for part, batch in (("batch", settings.batch_size), ("part", settings.batch_size // 4)):
        training = TrainSettings(FOREVER, batch, precision=settings.precision, device=settings.device)
        calls[f"inference, {part}"] = partial(infer, NetworkDenoiser(UNet(network)).to(where), data(batch, where).images)
        calls[f"training, {part}"] = partial(next, train(NetworkDenoiser(UNet(network)), target, data(batch, "cpu"), training))
        with META:
            model = NetworkDenoiser(UNet(network))
        with torch.inference_mode():
            works[f"inference, {part}"] = count(partial(model, data(batch, META).images, 1.0))
        _, works[f"training, {part}"] = step_work(model.train(), target, data(batch, META), training)
    return Trial(calls, works)


def calibrate(settings: Settings, turns: int = 5) -> Device:
    """What the clock says of this machine in ``turns`` turns of a few passes and training steps of the settings' own network.

    Raises SferdError for a batch size below 4.
    """
    if settings.batch_size < 4:
        raise SferdError(f"batch_size = {settings.batch_size} with device = here; allowed: 4 or more, since a quarter of it is timed too")
    some = trial(settings)
    return some.device(alternate(some.calls, turns), memory_here(_where(settings)))


# Is it true? ---------------------------------------------------------------------------------------------------------------


class _Begun(Run):
    """A run whose stages are begun and whose rows are only drawn for one batch: ``calls`` does the next training step, or draws one."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings, progress=False)
        self.calls: dict[str, Callable[[], object]] = {}
        self.models: dict[str, Denoiser] = {}

    def train_stage(
        self, name: str, build: Callable[[], Denoiser], make_target: MakeTarget, data: Split, seed_of: str | None = None, **options: Any
    ) -> Denoiser:
        if name not in self.models:
            training = TrainSettings(
                **{**options, "steps": FOREVER, "batch_size": self.settings.batch_size, "device": self.settings.device}
            )
            self.models[name] = build().eval().requires_grad_(False)
            self.calls[name] = partial(next, train(build(), make_target, data, training))
        return self.models[name]

    def evaluate(self, row: Row, denoiser: Denoiser, prior: Prior | None = None, **condition: Tensor) -> pd.DataFrame:
        if row.z in ("", "prior"):
            self.calls[row.label] = partial(self.draw, row, denoiser, range(self.settings.sampling_batch), prior)
        return pd.DataFrame()

    def code_errors(self, row: Row, model: SemanticDenoiser, prior: Prior) -> pd.DataFrame:
        return pd.DataFrame()


def check(preset: str, turns: int, clock: Callable[[], float] = time.process_time, **parameters: Any) -> pd.DataFrame:
    """Predicted and measured time of one step, or one batch of samples, of every kind of stage of a preset, in milliseconds.

    Calibration and stages take turns. The time is the processor's, which other work on the machine disturbs less than the clock's; with one
    thread they are the same on an idle machine. ``ratio`` is predicted over measured, ``ratio_flops`` what it would be by FLOPs alone.
    """
    short = {"retrain": True, "pd_start_steps": 2, "pd_stage_steps": [1], "sampling_steps": [1], "teacher_sampling_steps": [4]}
    short |= {"sgp_start_steps": 2, "sgp_sampling_steps": [1], "prior": "diffusion", "device": "cpu"}
    with tempfile.TemporaryDirectory() as folder:
        settings = make_settings(preset, run_folder=folder, **short, **parameters)
        some, run, stages = trial(settings), _Begun(settings), planned_stages(settings)
        for _ in run.rows():
            pass
        seconds = alternate({**some.calls, **run.calls}, turns, clock)
    here = some.device(seconds, memory_here(torch.device("cpu")))
    rate = {kind: some.works[f"{kind}, batch"].flops / seconds[f"{kind}, batch"] for kind in ("inference", "training")}
    lines = []
    for name in run.calls:
        stage, measured = stages[name], seconds[name]
        predicted = here.seconds(stage)
        by_flops = stage.inference.flops / rate["inference"] + stage.update.flops / rate["training"]
        lines.append([preset, name, stage.kind, 1000 * measured, 1000 * predicted, predicted / measured, by_flops / measured])
    return pd.DataFrame(lines, columns=["preset", "stage", "kind", "measured_ms", "predicted_ms", "ratio", "ratio_flops"])


@command
def main(arguments: Sequence[str]) -> None:
    """Print a plan, with sums; or, with "check", make the table of predicted and measured times."""
    if list(arguments) == ["check"]:
        torch.set_num_threads(1)
        table = pd.concat([check("digits", 12), check("fashion16", 6)], ignore_index=True)
        with replacing(shipped_folder() / "results" / "plan.csv") as temporary:
            table.assign(threads=1, torch=torch.__version__).to_csv(temporary, index=False, float_format="%.4g")
        near = int(((table["ratio"] - 1).abs() <= 0.25).sum())
        sys.stdout.write(f"{table.to_string(index=False, float_format='{:.3g}'.format)}\n{near} of {len(table)} within 25%\n")
        return
    parameters = parse_literals(arguments)
    device, efficiency = parameters.pop("device", "here"), parameters.pop("efficiency", None)
    settings = make_settings(**parameters)
    table = plan(settings, device, efficiency)
    columns = [
        "stage",
        "parameters",
        "trained",
        "batch",
        "updates",
        "images",
        "gflop",
        "tflop",
        "attention_tflop",
        "memory",
        "fits",
        "hours",
    ]
    text = table[columns].to_string(index=False, float_format="{:.3g}".format)
    total = table.groupby("kind", sort=False)["hours"].sum()
    words = ", ".join(f"{hours:.3g} h to {kind}" for kind, hours in total.items())
    assumed = "the shares of its peak that an H200 reached" if efficiency is None else f"{efficiency:.0%} of its peak, an assumption"
    how = "timed here" if device == "here" else f"{device} at {assumed}"
    devices = f" on {settings.processes} devices each" if settings.processes > 1 else ""
    sys.stdout.write(f"{text}\n\n{words}{devices}; {table['memory'].max():.3g} GB at most. {how}. Scores are not counted.\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
