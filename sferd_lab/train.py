"""One training loop for teacher, student, semantic predictor and prior: a generator that yields its state after every step.

What a stage learns is its ``make_target`` (see ``distill``). Everything random in step k is a function of (seed, k), so the whole random
state of a run is two integers, and a run that was stopped goes on to the same bytes on a CPU as one that was not.
"""

from __future__ import annotations

import copy
import ctypes
import functools
import json
import math
import platform
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sferd_lab import processes
from sferd_lab.data import Split
from sferd_lab.denoiser import Denoiser
from sferd_lab.distill import LOSSES, Batch, Target, distillation_loss
from sferd_lab.errors import SferdError
from sferd_lab.files import load_tensors, save_tensors
from sferd_lab.unet import set_gradient_checkpointing

ANNEALS = ("constant", "linear", "cosine")
PRECISIONS = ("no", "tf32", "bf16", "fp16")
DEVICES = ("auto", "cpu")
CHECKPOINT_VERSION = 2


@dataclass(frozen=True)
class TrainSettings:
    """How a stage is trained. ``target_decay`` 0 is a stop-gradient target, otherwise the EMA decay of consistency's target network.

    ``batch_size`` is that of a step, whatever the number of processes; ``accumulate`` takes it in that many parts, one after another, and
    ``gradient_checkpointing`` computes blocks twice, both to save memory. ``precision`` "no" is single, "tf32" single with TF32's products
    on GPUs that have them, "bf16" and "fp16" are accelerate's mixed precision, with TF32 where single is left.

    ``null_label`` replaces each label with probability ``label_dropout``; ``z_noise`` is the standard deviation of the noise on ``z_dim``
    numbers that ``Batch.z_noise`` holds; ``checkpoint_every`` counts steps, 0 for none. With ``members`` above 1 the model is an ensemble:
    data and batch are that many equal parts in a row, one a member (``analysis.ensemble``).
    """

    steps: int
    batch_size: int = 64
    lr: float = 1e-3
    warmup: int = 50
    anneal: str = "cosine"
    weight_decay: float = 0.0
    clip: float = 1.0
    ema_decay: float = 0.99
    target_decay: float = 0.0
    loss: str = "v"
    label_dropout: float = 0.0
    null_label: int = 0
    z_dim: int = 0
    z_noise: float = 0.0
    members: int = 1
    accumulate: int = 1
    checkpoint_every: int = 0
    seed: int = 0
    precision: str = "no"
    gradient_checkpointing: bool = False
    compile: bool = False
    device: str = "auto"

    def __post_init__(self) -> None:
        for name, allowed in (("anneal", ANNEALS), ("precision", PRECISIONS), ("device", DEVICES), ("loss", LOSSES)):
            if getattr(self, name) not in allowed:
                raise SferdError(f"{name} = '{getattr(self, name)}'; allowed: {', '.join(allowed)}")
        for name in ("steps", "batch_size", "members", "accumulate"):
            if getattr(self, name) < 1:
                raise SferdError(f"{name} = {getattr(self, name)}; allowed: 1 or more")
        for name in ("warmup", "weight_decay", "null_label", "z_dim", "z_noise", "checkpoint_every", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise SferdError(f"{name} = {getattr(self, name)}; allowed: 0 or more")
        if not 0 <= self.label_dropout <= 1:
            raise SferdError(f"label_dropout = {self.label_dropout}; allowed: 0 to 1")
        for name in ("ema_decay", "target_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise SferdError(f"{name} = {getattr(self, name)}; allowed: 0 to below 1")
        for name, most in (("lr", sys.float_info.max), ("clip", math.inf)):
            if not 0 < getattr(self, name) <= most:
                raise SferdError(f"{name} = {getattr(self, name)}; allowed: above 0")

    def lr_factor(self, step: int) -> float:
        """Multiplier of the learning rate at ``step`` (from 0): linear warm-up, then constant, or linear or cosine down to 0."""
        rise = min(1.0, (step + 1) / max(1, self.warmup))
        remaining = 1 - step / self.steps
        return rise * {"constant": 1.0, "linear": remaining, "cosine": 0.5 - 0.5 * math.cos(math.pi * remaining)}[self.anneal]


@dataclass(frozen=True)
class TrainState:
    """After ``step`` steps: the ``loss`` of each so far, the last ``lr``, the ``model`` being trained and its moving average ``ema``."""

    step: int
    losses: Tensor
    lr: float
    model: Denoiser
    ema: Denoiser


MakeTarget = Callable[[Batch, Denoiser], Target]


@functools.cache
def keep_memory() -> None:
    """Have the process keep the memory it frees for its next use, where the C library is glibc.

    By default glibc gives blocks above 32 MiB, and what lies at the heap's end, back to the system after every step and asks for it again
    in the next, page by page (what that costs: tests/benchmarks/NOTES.md). The price: the process stays as large as it once was.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
        mallopt(m_trim_threshold, 2**31 - 1)
        mallopt(m_mmap_threshold, 2**30)


def set_precision(precision: str) -> None:
    """Have a GPU multiply single-precision numbers as TF32 (10 bits of mantissa), unless ``precision`` is "no": then exactly."""
    torch.set_float32_matmul_precision("highest" if precision == "no" else "high")
    torch.backends.cudnn.allow_tf32 = precision != "no"


def step_generator(seed: int, step: int) -> torch.Generator:
    """The random stream of one training step.

    It is also that of sample ``step``'s later noises (``SampleNoise``) where both have one seed; a run's stages have seeds of their own.
    """
    return torch.Generator().manual_seed(int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0]) >> 1)


def draw_batch(data: Split, settings: TrainSettings, step: int, device: torch.device | str = "cpu") -> Batch:
    """The batch of training step ``step``: images drawn with replacement, noise, and angles stratified over the batch (of each member)."""
    generator, size = step_generator(settings.seed, step), settings.batch_size
    share, images = size // settings.members, len(data.images) // settings.members
    member = torch.arange(size) // share
    index = member * images + torch.randint(images, (size,), generator=generator)
    x0 = data.images[index]
    eps = torch.randn(x0.shape, generator=generator, dtype=x0.dtype)
    # One angle in each of as many equal strata as there are images lowers the loss's variance; the clamp keeps rounding below 1.
    uniform = (torch.arange(size) % share + torch.rand(size, generator=generator, dtype=torch.float64)) / share
    uniform = uniform.to(x0.dtype).clamp_max(1 - torch.finfo(x0.dtype).eps)
    labels = None
    if data.labels is not None:
        dropped = torch.rand(size, generator=generator) < settings.label_dropout
        labels = data.labels[index].masked_fill(dropped, settings.null_label).to(device)
    z_noise = settings.z_noise * torch.randn(size, settings.z_dim, generator=generator, dtype=x0.dtype) if settings.z_dim else None
    return Batch(x0.to(device), eps.to(device), uniform.to(device), labels, None if z_noise is None else z_noise.to(device))


def parts_of(settings: TrainSettings, count: int) -> int:
    """In how many equal parts a batch is taken by ``count`` processes. Raises SferdError when it cannot be."""
    parts = count * settings.accumulate
    if settings.batch_size % parts or (settings.members > 1 and parts > 1):
        raise SferdError(
            f"batch_size = {settings.batch_size} in {count} processes x accumulate = {settings.accumulate} parts; "
            "allowed: equal parts, and for an ensemble one"
        )
    return parts


def train(
    model: Denoiser, make_target: MakeTarget, data: Split, settings: TrainSettings, checkpoint: Path | None = None
) -> Iterator[TrainState]:
    """Train the parameters of ``model`` that require a gradient; yield the state after every step.

    ``make_target(batch, target_network)`` says what to learn. If the file ``checkpoint`` exists, training goes on from it; it is
    rewritten every ``checkpoint_every`` steps and at the end. Devices, precision and processes are ``accelerate``'s: each of several
    processes takes its part of the same batch, so their number changes rounding only. Raises SferdError when there is nothing to train,
    when a batch cannot be parted, when the checkpoint was made with other settings, and, naming the step, when the loss stops being
    finite, or when a checkpoint cannot be written.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState

    if not len(data.images):
        raise SferdError("there are no training images; allowed: 1 or more")
    for name, count in (("batch_size", settings.batch_size), ("the number of training images", len(data.images))):
        if count % settings.members:
            raise SferdError(f"{name} = {count}; allowed: multiples of members = {settings.members}")
    parts_of_a_batch = parts_of(settings, processes.count())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise SferdError("no parameter of the model requires a gradient: there is nothing to train")
    if settings.precision == "fp16" and processes.on_cpu(settings.device):
        raise SferdError("precision = 'fp16' on a CPU; allowed: no, tf32, bf16")
    keep_memory()
    # accelerate keeps device and precision for the whole process and refuses others later; here every stage may choose its own.
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(
        cpu=processes.on_cpu(settings.device),
        mixed_precision="no" if settings.precision == "tf32" else settings.precision,
        dynamo_backend="inductor" if settings.compile else None,
        # A blind predictor's encoder has no part in the loss.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=getattr(model, "blind", False))],
    )
    set_precision(settings.precision)
    optimizer = torch.optim.AdamW(trained, lr=settings.lr, betas=(0.9, 0.99), weight_decay=settings.weight_decay, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, settings.lr_factor)
    model.to(accelerator.device).train()
    set_gradient_checkpointing(model, settings.gradient_checkpointing)
    # Buffers (batch statistics) are copied, parameters averaged.
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(settings.ema_decay)).eval()
    target = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(settings.target_decay)) if settings.target_decay else None
    parts: dict[str, nn.Module] = {"model": model, "ema": ema} | ({"target": target} if target else {})
    losses = torch.zeros(settings.steps, dtype=torch.float64)
    steering = Steering(optimizer, scheduler, accelerator.scaler)
    if checkpoint:
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
    step = load_checkpoint(checkpoint, parts, steering, settings, losses) if checkpoint and checkpoint.exists() else 0
    # A shallow copy, same tensors: for mixed precision accelerate overwrites `forward`, which would outlive the training.
    prepared, prepared_optimizer = accelerator.prepare(copy.copy(model), optimizer)
    if step == settings.steps:
        yield TrainState(step, losses[:step], scheduler.get_last_lr()[0], model, ema.module)
    while step < settings.steps:
        batch = draw_batch(data, settings, step, accelerator.device)
        prepared_optimizer.zero_grad()
        shares = []
        for index in range(settings.accumulate):
            part = batch.part(processes.rank() * settings.accumulate + index, parts_of_a_batch)
            # Processes exchange gradients once a step, with the last part's.
            with accelerator.no_sync(prepared) if index < settings.accumulate - 1 else nullcontext():
                goal = make_target(part, target.module if target else model)
                prediction = prepared(goal.x, goal.phi, **goal.condition)
                loss = distillation_loss(prediction, goal, settings.loss).mean() / settings.accumulate
                shares.append(loss.detach())
                accelerator.backward(loss * settings.members)  # so that each member's gradient is that of its own mean
        losses[step] = accelerator.reduce(torch.stack(shares).sum(), "mean").item()
        if not losses[step].isfinite():
            kept = (
                f"the last good state is in {checkpoint}" if checkpoint and checkpoint.exists() else "no checkpoint was written before it"
            )
            raise SferdError(f"the loss became {losses[step].item()} at step {step + 1} of {settings.steps} (lr = {settings.lr}); {kept}")
        accelerator.clip_grad_norm_(trained, settings.clip)
        lr = scheduler.get_last_lr()[0]
        prepared_optimizer.step()
        scheduler.step()
        ema.update_parameters(model)
        if target:
            target.update_parameters(model)
        step += 1
        if checkpoint and (step == settings.steps or (settings.checkpoint_every and step % settings.checkpoint_every == 0)):
            processes.once(lambda step=step: save_checkpoint(checkpoint, parts, steering, settings, losses[:step]))
        yield TrainState(step, losses[:step], lr, model, ema.module)


def step_flops(model: Denoiser, make_target: MakeTarget, data: Split, settings: TrainSettings) -> int:
    """FLOPs of one training step, target and all processes included, counted on a step that ``model`` takes: give it a copy.

    Not on a step of the training itself: under the counter other kernels run, and the weights would differ by rounding.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        next(train(model, make_target, data, settings))
    return processes.count() * counter.get_total_flops()


@dataclass(frozen=True)
class Steering:
    """What moves the weights: optimiser, schedule and, in fp16 alone, the scaler of the loss."""

    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LambdaLR
    scaler: torch.amp.GradScaler | None = None


def save_checkpoint(path: Path, parts: dict[str, nn.Module], steering: Steering, settings: TrainSettings, losses: Tensor) -> None:
    """Write weights, averages, the optimiser's moments, settings and losses so far to one safetensors file, atomically.

    The rest follows from settings and step, and is not written: learning rate, schedule and random state. Raises SferdError when the
    folder is not there any more, or cannot be written to.
    """
    if not path.parent.is_dir():
        raise SferdError(f"{path.parent} was removed during the training, and its checkpoints with it: start the run again")
    tensors = {f"{part}.{name}": tensor for part, module in parts.items() for name, tensor in module.state_dict().items()}
    for index, state in steering.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in state.items()}
    tensors["losses"] = losses
    info = {
        "kind": "checkpoint",
        "version": CHECKPOINT_VERSION,
        "step": len(losses),
        "settings": asdict(settings),
        "trained": len(steering.optimizer.param_groups[0]["params"]),
        "scaler": steering.scaler.state_dict() if steering.scaler else None,
    }
    save_tensors(path, tensors, info)


def load_checkpoint(path: Path, parts: dict[str, nn.Module], steering: Steering, settings: TrainSettings, losses: Tensor) -> int:
    """Restore what ``save_checkpoint`` wrote, the first ``losses`` included, and give the step.

    Raises SferdError when the file is of other settings or another model, or was altered.
    """
    optimizer, scheduler = steering.optimizer, steering.scheduler
    tensors, info = load_tensors(path)
    if info.get("kind") != "checkpoint" or info.get("version") != CHECKPOINT_VERSION or not isinstance(info.get("settings"), dict):
        raise SferdError(f"{path} is not a checkpoint of version {CHECKPOINT_VERSION}")
    wanted = json.loads(json.dumps(asdict(settings)))
    differing = {name: (info["settings"].get(name), value) for name, value in wanted.items() if info["settings"].get(name) != value}
    if differing:
        name, (found, value) = next(iter(differing.items()))
        raise SferdError(f"{path} was made with {name} = {found}, this run has {name} = {value}; delete the file or use the same settings")
    step, trained = info.get("step"), optimizer.param_groups[0]["params"]
    if type(step) is not int or not 1 <= step <= settings.steps:
        raise SferdError(f"{path} was made after step {step!r}; allowed: 1 to {settings.steps}; delete the file")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise SferdError(f"{path}: tensor '{name}' holds NaN or infinity; delete the file")
    if info.get("trained") != len(trained):
        raise SferdError(
            f"{path} was made training {info.get('trained')!r} tensors of the model, this run trains {len(trained)}; delete the file"
        )
    for part, module in parts.items():
        load_part(module, tensors, f"{part}.", path)
    # A parameter that never had a gradient has no state.
    moments = {
        f"{index}.{name}": torch.zeros(()) if name == "step" else parameter
        for index, parameter in enumerate(trained)
        for name in ("step", "exp_avg", "exp_avg_sq")
        if f"optimizer.{index}.step" in tensors
    }
    state: dict[int, dict[str, Any]] = {}
    for key, tensor in matching(moments, tensors, "optimizer.", path).items():
        index, name = key.split(".")
        # In the parameter's own layout in memory: the fused optimiser walks all of a parameter's tensors side by side.
        state.setdefault(int(index), {})[name] = torch.empty_like(moments[key]).copy_(tensor)
    others = {name: tensor for name, tensor in tensors.items() if not name.startswith((*(f"{part}." for part in parts), "optimizer."))}
    matching({"losses": losses[:step]}, others, "", path)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    scheduler.last_epoch, scheduler._last_lr = step, [settings.lr * settings.lr_factor(step)]
    optimizer.param_groups[0]["lr"] = scheduler._last_lr[0]
    if steering.scaler:
        _load_scaler(steering.scaler, info.get("scaler"), path)
    losses[:step] = tensors["losses"]
    return step


def _load_scaler(scaler: torch.amp.GradScaler, state: Any, path: Path) -> None:
    own = scaler.state_dict()
    numbers = isinstance(state, dict) and state.keys() == own.keys() and all(type(value) in (int, float) for value in state.values())
    # The scale and its factors multiply; the interval and the tracker count.
    if not numbers or any(value <= 0 for name, value in state.items() if name != "_growth_tracker"):
        raise SferdError(f"{path}: the scaler is {str(state)[:80]}; expected positive numbers under {', '.join(own)}; delete the file")
    scaler.load_state_dict(state)


def load_part(module: nn.Module, tensors: dict[str, Tensor], prefix: str, path: Path | str) -> None:
    """Load the tensors whose names begin with ``prefix`` into ``module``. Raises SferdError for a missing, extra or misshapen one."""
    module.load_state_dict(matching(module.state_dict(), tensors, prefix, path))


def matching(wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor], prefix: str, path: Path | str) -> dict[str, Tensor]:
    """The tensors whose names begin with ``prefix``, without it. Raises SferdError unless they have the names, shapes and dtypes wanted."""
    found = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    for name in dict.fromkeys([*wanted, *found]):
        if name not in found or name not in wanted:
            raise SferdError(f"{path}: tensor '{prefix}{name}' is {'missing' if name not in found else 'not one of this model'}")
        if found[name].shape != wanted[name].shape or found[name].dtype != wanted[name].dtype:
            raise SferdError(
                f"{path}: tensor '{prefix}{name}' is {tuple(found[name].shape)} {found[name].dtype}; "
                f"expected {tuple(wanted[name].shape)} {wanted[name].dtype}"
            )
    return found
