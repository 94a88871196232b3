"""What a run is: one flat, validated settings model. Every field is a papermill parameter of ``notebooks/experiment.ipynb``.

A preset gives every value; parameters override it; an unknown name or a value out of range is a ``SferdError`` that names the parameter,
the value and what is allowed. The environment variable SFERD_LAB_TINY=1 shrinks whatever is not given explicitly, to test a notebook
in seconds.

A parameter is a value and never code. Where to read and write (``PLACES``) is the word of whoever types a command; a *file* of parameters
may come from someone else, so it can name places inside the current folder only: ``python -m sferd_lab.config FILE`` checks one, as
``make experiment file=FILE`` does first. papermill itself would run whatever such a file has in place of a parameter's name.
"""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sferd_lab.distill import halving_schedule
from sferd_lab.errors import SferdError, command
from sferd_lab.files import read_yaml

Count = Annotated[int, Field(ge=1, le=10**9)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Counts = Annotated[tuple[Count, ...], Field(min_length=1, max_length=16)]

# What ast.literal_eval may raise, by its documentation.
NOT_A_LITERAL = (SyntaxError, ValueError, TypeError, MemoryError, RecursionError)

# The settings that say where to read or write.
PLACES = ("run_folder", "data_folder", "teacher_from")


class Settings(BaseModel):
    """All settings of an experiment. The description of each field is its documentation; ``presets()`` lists the presets."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    preset: str = Field(description="which preset the other values default to")
    seed: int = Field(ge=0, lt=2**31, description="seed of all training and sampling")
    run_folder: str | None = Field(None, description="where the run is kept; None: runs/<preset>-seed<seed>")

    data: Literal["digits", "fashion-mnist", "patches", "mixture", "cifar10", "imagenet64", "folder"] = Field(description="data set")
    data_folder: str | None = Field(None, description="with data = folder: images, or one folder of images a class")
    image_size: Count | None = Field(None, description="resize images to this height and width; None: native")
    bootstrap: Annotated[int, Field(ge=0, lt=2**31)] | None = Field(
        None, description="seed of a bootstrap sample of the training images, teacher included; None: each once"
    )
    class_conditional: bool = Field(False, description="give labels to teacher and students")

    widths: Counts = Field(description="channels of the U-Net's levels, from the image's resolution down")
    blocks: Count = Field(1, description="residual blocks a level")
    attention: tuple[Annotated[int, Field(ge=0)], ...] = Field(description="levels with self-attention; 0 is the image's resolution")
    heads: Count = Field(2, description="attention heads")

    retrain: bool = Field(False, description="train the teacher anew instead of taking the shipped one")
    teacher_from: str | None = Field(
        None, description="a teacher from elsewhere: the folder (or Hub name) of a diffusers pipeline, or a saved teacher's .safetensors"
    )
    batch_size: Count = Field(64, description="images a training step")
    ema_decay: Fraction = Field(0.99, description="decay of the weights' moving average in distillation stages")
    teacher_steps: Count = Field(description="training steps of the teacher")
    teacher_lr: Positive = Field(2e-3, description="learning rate of the teacher, annealed by a cosine")
    teacher_ema_decay: Fraction = Field(0.998, description="decay of the teacher's moving average")
    label_dropout: Fraction = Field(0.1, description="share of labels hidden in training, for classifier-free guidance")

    classifier_free: Annotated[float, Field(ge=0, le=20)] = Field(
        1.0, description="scale of the teacher's classifier-free guidance, with class_conditional; 1: none"
    )

    methods: tuple[Literal["pd", "cd"], ...] = Field(("pd", "cd"), description="progressive and/or consistency distillation")
    guided: tuple[bool, ...] = Field((False, True), description="without and/or with attention guidance of the teacher")
    sgp: bool = Field(True, description="train the semantic gradient predictor and its prior")
    pd_start_steps: Count = Field(8, description="teacher steps that progressive distillation starts from")
    pd_stage_steps: Counts = Field(description="training steps of each halving stage")
    pd_lr: Positive = Field(1e-3, description="learning rate of a stage, annealed linearly to 0")
    pd_loss: Literal["v", "x0_snr"] = Field("v", description="compare v (SNR+1 weight) or x0 (truncated SNR weight)")
    cd_boundaries: Count = Field(16, description="intervals of the consistency grid")
    cd_steps: Count = Field(description="training steps of consistency distillation")
    cd_lr: Positive = Field(1e-3, description="learning rate of consistency distillation, annealed linearly to 0")
    cd_solver: Literal["ddim", "heun"] = Field("ddim", description="teacher's step between neighbouring angles")
    cd_loss: Literal["l2", "pseudo_huber", "v"] = Field(
        "v", description="distance of x0: plain, pseudo-Huber, or (1+SNR)-weighted, which is v's"
    )
    cd_target_decay: Fraction = Field(0.0, description="EMA decay of the target network; 0: the student without gradient")

    guidance_weight: Annotated[float, Field(ge=-2, le=10)] = Field(0.3, description="w; the authors' scale 1.3 is 0.3")
    guidance_form: Literal["x0", "eps"] = Field("eps", description="the paper's figure (x0) or SAG and the authors' code (eps)")
    guidance_threshold: Positive = Field(1.0, description="blur where attention exceeds this multiple of the average")
    guidance_layer: str | None = Field(None, description="attention layer; None: first of the decoder")
    guidance_mask: Literal["attention", "random", "inverse", "edge", "full"] = Field("attention", description="mask, or a control")
    guide_every_stage: bool = Field(False, description="guide the teacher in every stage of progressive distillation, not only the first")
    blur_kernel: Count = Field(description="taps of the blur, odd")
    blur_sigma: Positive = Field(description="standard deviation of the blur in pixels")

    sgp_target: Literal["walk", "data", "conditional"] = Field("conditional", description="where the predictor's target comes from")
    sgp_sampling_steps: Counts = Field((1,), description="step counts that get a semantic gradient predictor")
    sgp_steps: Count = Field(description="training steps of encoder and predictor")
    sgp_start_steps: Count = Field(2, description="teacher steps that progressive distillation of the conditional pair starts from")
    sgp_distil_steps: Count = Field(description="training steps of each distillation stage of the conditional pair")
    sgp_lr: Positive = Field(1e-3, description="learning rate of encoder and predictor")
    sgp_joint: bool = Field(False, description="train the student together with encoder and predictor (walk and data targets)")
    sgp_blind: bool = Field(False, description="control: the predictor is told zeros instead of a code")
    z_dim: Count = Field(description="size of the semantic code, at most 1/8 of the pixels")
    z_noise: Annotated[float, Field(ge=0, le=2)] = Field(0.1, description="standard deviation of noise on the code in training")
    prior: Literal["diffusion", "mixture", "kernel"] = Field(
        "mixture", description="latent diffusion, scikit-learn's Gaussian mixture, or training codes with the noise of z_noise on them"
    )
    prior_steps: Count = Field(1000, description="training steps of the diffusion prior")
    prior_sampling_steps: Annotated[int, Field(ge=1, le=10_000)] = Field(20, description="DDIM steps of the diffusion prior")
    prior_components: Count = Field(10, description="components of the mixture prior")

    n_samples: Annotated[int, Field(ge=2, le=10**6)] = Field(description="images behind every score")
    sampling_steps: Counts = Field((1, 2, 4), description="step counts of the students")
    teacher_sampling_steps: Counts = Field((1, 2, 4, 8, 64), description="step counts of the teacher; the last is the yardstick")
    teacher_samplers: Annotated[tuple[Literal["ddim", "heun"], ...], Field(min_length=1)] = Field(
        ("ddim",), description="samplers of the teacher; ddim is the yardstick's and always among them"
    )
    sampling_batch: Count = Field(250, description="images sampled at once")
    neighbours: Count = Field(5, description="k of precision, recall, density and coverage")
    contrast: Annotated[float, Field(gt=0, le=10)] = Field(
        1.0, description="control: students' images are scored that many times as far from black"
    )

    device: Literal["auto", "cpu"] = Field("auto", description="auto: accelerate's choice (CUDA or MPS when there)")
    processes: Count = Field(1, description="processes that a notebook starts, one a GPU; torchrun's number counts instead of it")
    precision: Literal["no", "tf32", "bf16", "fp16"] = Field("no", description="of training: single, with TF32 products, or mixed")
    accumulate: Count = Field(1, description="parts in which a batch goes through the network, one after another, to save memory")
    gradient_checkpointing: bool = Field(False, description="compute blocks twice rather than keep them for the backward pass")
    compile: bool = Field(False, description="torch.compile the trained network")
    checkpoint_every: Annotated[int, Field(ge=0)] = Field(200, description="training steps between checkpoints; 0: only at the end")

    def model_post_init(self, _: Any) -> None:
        """Checks between fields."""
        try:
            stages = halving_schedule(self.pd_start_steps)
        except SferdError as error:
            raise SferdError(f"pd_start_steps = {self.pd_start_steps}: {error}") from None
        if len(self.pd_stage_steps) != len(stages):
            raise SferdError(
                f"pd_stage_steps = {self.pd_stage_steps}; allowed: {len(stages)} numbers, "
                f"since {self.pd_start_steps} teacher steps halve to {stages}"
            )
        try:
            sgp_stages = halving_schedule(self.sgp_start_steps)
        except SferdError as error:
            raise SferdError(f"sgp_start_steps = {self.sgp_start_steps}: {error}") from None
        if self.sgp_target == "conditional" and not set(self.sgp_sampling_steps) <= set(sgp_stages):
            raise SferdError(f"sgp_sampling_steps = {self.sgp_sampling_steps}; allowed: among {sgp_stages}, what sgp_start_steps halves to")
        for name in ("sampling_steps", "sgp_sampling_steps"):
            for steps in getattr(self, name):
                if "pd" in self.methods and steps not in stages:
                    raise SferdError(f"{name} = {getattr(self, name)}; allowed: step counts among {stages}, what pd_start_steps halves to")
        if "ddim" not in self.teacher_samplers:
            raise SferdError(f"teacher_samplers = {self.teacher_samplers}; allowed: ddim, alone or with heun")
        if self.blur_kernel % 2 == 0:
            raise SferdError(f"blur_kernel = {self.blur_kernel}; allowed: odd numbers")
        if max(self.attention, default=0) >= len(self.widths):
            raise SferdError(f"attention = {self.attention}; allowed: levels 0 to {len(self.widths) - 1}")
        if any(width % self.heads for width in self.widths):
            raise SferdError(f"heads = {self.heads}; allowed: common divisors of widths = {self.widths}")
        if self.classifier_free != 1 and (self.sgp or not self.class_conditional):
            raise SferdError(
                f"classifier_free = {self.classifier_free} with class_conditional = {self.class_conditional} and sgp = {self.sgp}; "
                "allowed: a scale other than 1 with labels and without sgp, whose samples have a code in place of a label"
            )
        if self.sgp and self.batch_size < 2:
            raise SferdError(f"batch_size = {self.batch_size}; allowed: 2 or more with sgp, whose encoder standardises codes over a batch")


_DIGITS: dict[str, Any] = {
    "seed": 1,
    "data": "digits",
    "widths": (32, 32),
    "attention": (0, 1),
    "teacher_steps": 5000,
    "pd_stage_steps": (200, 400, 400),
    "cd_steps": 800,
    "blur_kernel": 5,
    "blur_sigma": 1.0,
    "sgp_steps": 1000,
    "sgp_distil_steps": 250,
    "z_dim": 8,
    "n_samples": 500,
}

# For data at the paper's sizes: never run whole by this project. Sources: PD, the configuration files of google-research's
# diffusion_distillation (Salimans & Ho 2022); CM, those of openai's consistency_models and consistency_models_cifar10 (Song et al. 2023);
# SFERD, its paper or its code (Zhou et al. 2024). "Ours" is a guess, by scaling the small presets. PD's and CM's dropout, flips of images
# and rectified Adam are not in this library.
_PAPER: dict[str, Any] = {
    "seed": 1,
    "blocks": 3,  # PD and CM
    "teacher_ema_decay": 0.9999,  # PD
    "pd_loss": "x0_snr",  # PD: truncated SNR
    "cd_solver": "heun",  # CM
    "cd_loss": "pseudo_huber",  # SFERD
    "guidance_weight": 0.3,  # SFERD's code: a scale of 1.3
    "blur_kernel": 15,  # SFERD's code
    "blur_sigma": 3.0,  # SFERD's code
    "sgp_steps": 100_000,  # ours, as the three below
    "sgp_start_steps": 16,
    "sgp_distil_steps": 100_000,
    "sgp_sampling_steps": (1, 2),
    "sgp_lr": 1e-4,  # ours
    "prior": "diffusion",  # SFERD
    "prior_steps": 200_000,  # ours
    "n_samples": 10_000,
    "sampling_batch": 500,
    "precision": "bf16",  # ours
    "checkpoint_every": 5000,
}

PRESETS: dict[str, dict[str, Any]] = {
    "digits": _DIGITS,
    "fashion16": _DIGITS
    | {
        "data": "fashion-mnist",
        "image_size": 16,
        "widths": (32, 32, 64),
        "attention": (1, 2),
        "teacher_steps": 40_000,
        "teacher_ema_decay": 0.999,
        "pd_start_steps": 16,
        "pd_stage_steps": (1000, 1000, 2000, 2000),
        "cd_steps": 4000,
        "blur_kernel": 7,
        "blur_sigma": 1.5,
        "sgp_steps": 4000,
        "sgp_distil_steps": 1500,
        "sgp_sampling_steps": (1, 2, 4),
        "sgp_start_steps": 16,
        "z_dim": 32,
        "prior_components": 50,
        "n_samples": 10_000,
    },
    "patches": _DIGITS
    | {
        "data": "patches",
        "widths": (32, 64, 64),
        "attention": (1, 2),
        "teacher_steps": 10_000,
        "pd_start_steps": 32,  # at 16x16 the teacher's FD is 9 times that of its 64 steps in 16, 45 times in 8
        "pd_stage_steps": (200, 200, 200, 400, 400),
        "blur_kernel": 15,
        "blur_sigma": 3.0,
        "sgp_start_steps": 32,
        "z_dim": 64,
        "n_samples": 1000,
    },
    "mixture": _DIGITS | {"data": "mixture", "teacher_steps": 3000, "retrain": True},
    "cifar10": _PAPER
    | {
        "data": "cifar10",
        "widths": (256, 256, 256),  # PD: ch 256, multipliers (1, 1, 1)
        "attention": (1, 2),  # PD: resolutions 16 and 8
        "heads": 1,  # PD
        "batch_size": 128,  # PD; CM: 512
        "teacher_steps": 800_000,  # ours: PD's configuration gives none
        "teacher_lr": 2e-4,  # PD
        "ema_decay": 0.9999,  # CM; PD averages no student
        "pd_start_steps": 8192,  # PD
        "pd_stage_steps": (50_000,) * 11 + (100_000,) * 2,  # PD, its paper's section on the last two
        "pd_lr": 5e-5,  # PD
        "cd_boundaries": 18,  # CM
        "cd_steps": 800_000,  # CM
        "cd_lr": 4e-4,  # CM
        "z_dim": 256,  # ours
    },
    "imagenet64": _PAPER
    | {
        "data": "imagenet64",
        "class_conditional": True,  # PD and CM
        "widths": (192, 384, 576, 768),  # PD: ch 192, multipliers (1, 2, 3, 4)
        "attention": (1, 2, 3),  # PD and CM: resolutions 32, 16 and 8
        "heads": 6,  # ours; PD and CM: as many as there are 64 channels
        "batch_size": 2048,  # PD and CM
        "teacher_steps": 550_000,  # ours: PD's configuration gives none
        "teacher_lr": 3e-4,  # PD
        "ema_decay": 0.9999432189950708,  # CM; PD averages no student
        "pd_start_steps": 1024,  # PD
        "pd_stage_steps": (50_000,) * 8 + (100_000,) * 2,  # PD, its paper's section on the last two
        "pd_lr": 1e-4,  # PD
        "cd_boundaries": 40,  # CM
        "cd_steps": 600_000,  # CM
        "cd_lr": 8e-6,  # CM, constant
        "cd_target_decay": 0.95,  # CM and SFERD
        "sgp_sampling_steps": (1, 2, 4),
        "z_dim": 512,  # ours; Diff-AE's and PDAE's size
    },
}

# What SFERD_LAB_TINY=1 sets: every stage runs, none of them long enough to learn.
TINY: dict[str, Any] = {
    "batch_size": 8,
    "teacher_steps": 4,
    "pd_start_steps": 8,
    "pd_stage_steps": (2, 2, 2),
    "sampling_steps": (1, 2),
    "cd_boundaries": 4,
    "cd_steps": 2,
    "sgp_steps": 2,
    "sgp_start_steps": 2,
    "sgp_sampling_steps": (1,),
    "sgp_distil_steps": 2,
    "prior_steps": 2,
    "prior_sampling_steps": 2,
    "prior_components": 2,
    "n_samples": 80,
    "teacher_sampling_steps": (1, 2, 4),
}


def presets() -> tuple[str, ...]:
    """The names that ``preset`` may have."""
    return tuple(PRESETS)


def make_settings(preset: str = "digits", **parameters: Any) -> Settings:
    """The settings of ``preset`` with ``parameters`` in place of its values; a parameter that is None keeps the preset's value.

    Raises SferdError that names the parameter, the value and what is allowed.
    """
    if not isinstance(preset, str) or preset not in PRESETS:
        raise SferdError(f"preset = {preset!r}; allowed: {', '.join(PRESETS)}")
    unknown = sorted(set(parameters) - set(Settings.model_fields))
    if unknown:
        raise SferdError(f"unknown parameter '{unknown[0]}' = {parameters[unknown[0]]!r}; allowed: {', '.join(Settings.model_fields)}")
    # Papermill passes a list given on the command line as text.
    given = {
        name: _literal(value) if isinstance(value, str) and value.startswith(("[", "(")) else value
        for name, value in parameters.items()
        if value is not None
    }
    tiny = TINY if os.environ.get("SFERD_LAB_TINY") == "1" else {}
    try:
        return Settings.model_validate({"preset": preset, **PRESETS[preset], **tiny, **given})
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "value_error":  # a check between fields, already in words
            raise SferdError(str(first["ctx"]["error"])) from None
        name = str(first["loc"][0])
        raise SferdError(f"parameter '{name}' = {given.get(name, first['input'])!r}: {first['msg'][0].lower()}{first['msg'][1:]}") from None


def notebook_parameters(namespace: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that a notebook's cells have just assigned, for ``make_settings``: call it with ``globals()`` in the next cell.

    Papermill writes whatever it is given into a cell of assignments and only warns when a notebook has no such parameter. So the names
    are read from the cells executed right before the calling one that assign literals and do nothing else: the notebook's own
    parameters cell and the injected one.
    """
    names: set[str] = set()
    for source in reversed(list(namespace.get("In", []))[:-1]):
        assigned = _assigned_literals(source)
        if assigned is None:
            break
        names |= assigned
    # A cell that failed, or a name deleted since, has left none.
    return {name: namespace[name] for name in sorted((names | set(Settings.model_fields)) & set(namespace))}


def parse_literals(arguments: Sequence[str]) -> dict[str, Any]:
    """Command-line words ``name=value`` as parameters; a value that is no Python literal is text. Nothing is evaluated as code."""
    parameters = {}
    for argument in arguments:
        name, separator, value = argument.partition("=")
        if not separator:
            raise SferdError(f"argument '{argument}'; allowed: name=value")
        parameters[name] = _literal(value)
    return parameters


def read_parameters(path: Path | str) -> dict[str, Any]:
    """The parameters in a YAML file, for ``make_settings``.

    Raises SferdError for what is no mapping of settings' names to values, and for a place outside the current folder.
    """
    parameters = read_yaml(path)
    if not isinstance(parameters, dict):
        raise SferdError(f"{path} holds a {type(parameters).__name__}; allowed: names of settings with their values")
    for name, value in parameters.items():
        if name not in Settings.model_fields:
            raise SferdError(f"{path}: unknown parameter {name!r}; allowed: {', '.join(Settings.model_fields)}")
        if name in PLACES:
            check_inside(path, name, value)
    return parameters


def check_inside(path: Path | str, name: str, value: Any) -> None:
    """Raise SferdError where the file ``path`` has a ``value`` for ``name`` that is a place outside the current folder, links followed."""
    try:
        inside = value is None or (Path.cwd() / value).resolve().is_relative_to(Path.cwd().resolve())
    except (OSError, RuntimeError, TypeError, ValueError):  # a loop of links, a number, a zero byte
        inside = False
    if not inside:
        raise SferdError(f"{path}: {name} = {value!r}; allowed in a file: a place inside the current folder. Another is for you to say")


def _literal(text: str) -> Any:
    """The Python literal that ``text`` spells, or the text itself."""
    try:
        return ast.literal_eval(text)
    except NOT_A_LITERAL:
        return text


def _assigned_literals(source: str) -> set[str] | None:
    """The names a cell assigns literals to, or None when it does anything else or nothing."""
    names: set[str] = set()
    try:
        for statement in ast.parse(source).body:
            targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
            if not isinstance(statement, ast.Assign | ast.AnnAssign) or not all(isinstance(target, ast.Name) for target in targets):
                return None
            ast.literal_eval(statement.value)
            names |= {target.id for target in targets}
    except NOT_A_LITERAL:
        return None
    return names or None


@command
def main(arguments: Sequence[str]) -> None:
    """The command of this module: whether all files are what ``read_parameters`` takes."""
    for path in arguments:
        read_parameters(path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
