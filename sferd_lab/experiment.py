"""The main job as steps on a run folder, which ``notebooks/experiment.ipynb`` calls in order.

A run is a folder: ``config.json`` (settings, versions, commit, hardware), ``weights/*.safetensors``, ``checkpoints/`` of the stage under
way, ``training.csv`` (a loss a row), ``metrics.csv`` (a number a row), ``samples/`` (the first images behind each score) and ``figures/``.
Every step looks into the folder first: what is finished is read, what is not is done or continued. So the same call after an interruption
goes on where it stopped, and ends with the same weights.

One process works in a folder (``files.FolderLock``): from the first thing that it has to train or to score until its ``Run`` is gone or it
ends. Any number of others may read what is finished there.
"""

from __future__ import annotations

import copy
import json
import os
import platform
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from sferd_lab import processes
from sferd_lab.artifacts import Model, load_model, save_model, seeded, shipped_folder
from sferd_lab.config import Settings, make_settings, parse_literals
from sferd_lab.data import ImageData, Split, StoredImages, bootstrap, load_images
from sferd_lab.denoiser import ClassifierFree, Denoiser, NetworkDenoiser
from sferd_lab.diffusion import add_noise
from sferd_lab.distill import Batch, ConsistencyTarget, DataTarget, ProgressiveTarget, denoising_target, halving_schedule, on_labels
from sferd_lab.errors import SferdError, command
from sferd_lab.files import (
    FolderLock,
    is_file,
    leave,
    load_tensors,
    project_folder,
    read_record,
    replacing,
    save_tensors,
    work_in,
    write_json,
)
from sferd_lab.guidance import GuidedDenoiser, default_layer, gaussian_blur
from sferd_lab.metrics import METRICS, Scorer, known_bad, load_feature_network, read_floors, save_feature_network, train_feature_network
from sferd_lab.sample import Prior, SampleNoise, Samples, sample
from sferd_lab.semantic import DiffusionPrior, KernelPrior, LatentDenoiser, MixturePrior, SemanticDenoiser
from sferd_lab.train import MakeTarget, TrainSettings, matching, set_precision, step_flops, train
from sferd_lab.unet import UNet, UNetSettings, check_layers

# Images of each scored set that are kept for figures.
KEPT = 64


@dataclass(frozen=True)
class Row:
    """What a set of scored images is: the identity columns of ``metrics.csv``."""

    method: str  # teacher, pd, cd, or the name of a known-bad set
    guidance: bool = False
    sgp: str = ""  # the predictor's target, empty without one
    z: str = ""  # where its codes come from: prior, encoder, mean
    sampler: str = ""
    steps: int = 0

    @property
    def label(self) -> str:
        """A short name, e.g. "pd+guidance+sgp (prior), 1 step"."""
        name = self.method + ("+guidance" if self.guidance else "") + (f"+sgp ({self.z})" if self.sgp else "")
        name += ", Heun" if self.sampler == "heun" else ""
        return f"{name}, {self.steps} step{'s' * (self.steps != 1)}" if self.steps else name

    @property
    def key(self) -> str:
        """The label as a file name."""
        return "".join(letter if letter.isalnum() else "-" for letter in self.label).strip("-")


def stage_seed(seed: int, stage: str) -> int:
    """A seed for the stage of that name. Plain and guided versions of a stage share it: they see the same images, noise and angles."""
    return int(np.random.SeedSequence([seed, zlib.crc32(stage.encode())]).generate_state(1)[0])


def provenance() -> dict[str, Any]:
    """What it takes to make a run again, beside its settings: versions, commit, whether the tree had changes, hardware.

    The same bytes come of the same versions, number of threads and kind of processor ("instructions", which torch's kernels depend on).
    """

    def git(*arguments: str) -> str | None:
        try:
            return subprocess.run(
                ["git", *arguments], cwd=project_folder(), capture_output=True, text=True, check=True, timeout=10
            ).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return None

    changes = git("status", "--porcelain")
    return {
        "sferd_lab": metadata.version("sferd-lab"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        **{name: metadata.version(name) for name in ("scipy", "scikit-learn", "accelerate")},
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": None if changes is None else bool(changes),
        "machine": platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


class Run:
    """An experiment in its folder. Raises SferdError, before anything is trained, for settings that do not fit the data or the folder.

    What has something to train or to write raises it, too, when another process is working in the folder, and when the folder was removed.
    """

    def __init__(self, settings: Settings, progress: bool = True) -> None:
        self.settings, self.progress = settings, progress
        default = Path(os.environ.get("SFERD_LAB_RUNS") or project_folder() / "runs") / f"{settings.preset}-seed{settings.seed}"
        self.folder = Path(settings.run_folder) if settings.run_folder else default
        self.data: ImageData = load_images(settings.data, settings.image_size, settings.data_folder)
        self.shape = self.data.shape
        processes.connect(processes.on_cpu(settings.device))
        set_precision(settings.precision)
        self.device = torch.device("cpu")
        if not processes.on_cpu(settings.device):
            self.device = torch.device(torch.accelerator.current_accelerator().type, torch.accelerator.current_device_index())
        classes = self.data.classes if settings.class_conditional else 0
        self.unet = UNetSettings(self.shape[0], settings.widths, settings.blocks, settings.attention, settings.heads, classes)
        split = self.data.train if settings.bootstrap is None else bootstrap(self.data.train, settings.bootstrap)
        self.train_split = Split(split.images, split.labels if classes else None)
        self._lock: FolderLock | None = None
        self._check_fit()
        self._claim_folder()

    def _check_fit(self) -> None:
        """What can only be checked with the data at hand."""
        settings, (channels, height, width) = self.settings, self.shape
        for name, value in (("retrain", settings.retrain), ("bootstrap", settings.bootstrap)):
            if settings.teacher_from and value is not None and value is not False:
                raise SferdError(f"{name} = {value} with teacher_from = '{settings.teacher_from}'; allowed: one of them")
        network = self.foreign_teacher().network if settings.teacher_from else UNet(self.unet)
        if settings.classifier_free != 1:
            ClassifierFree(NetworkDenoiser(network), settings.classifier_free)  # refuses a network that has no label for none
        with torch.inference_mode():
            network(torch.zeros(1, *self.shape), network.phi_hi, **self._some_label())  # refuses a size or channels that do not fit
        if any(settings.guided):
            check_layers([settings.guidance_layer or default_layer(network.attention_layers)], network.attention_layers)
            gaussian_blur(torch.zeros(1, *self.shape), settings.blur_kernel, settings.blur_sigma)
        limit = max(1, channels * height * width // 8)
        if settings.sgp and settings.z_dim > limit:
            raise SferdError(
                f"z_dim = {settings.z_dim}; allowed: at most {limit}, 1/8 of the {channels * height * width} pixels of an image"
            )
        if settings.class_conditional and not self.data.classes:
            raise SferdError(f"class_conditional = True; allowed: False, since {self.data.name} has no labels")
        if settings.class_conditional and settings.sgp and settings.teacher_from:
            raise SferdError(
                "class_conditional and sgp are True with teacher_from; allowed: one of them, since a code comes without a label"
            )
        if settings.class_conditional and settings.sgp and not settings.label_dropout:
            raise SferdError("label_dropout = 0 with class_conditional and sgp; allowed: above 0, since beside a code there is no label")
        if not self.data.classes:
            raise SferdError(f"{self.data.name} has no labels to train a feature network on; allowed: data sets with labels")
        if min(height, width) < 8:
            raise SferdError(f"image_size = {settings.image_size}; allowed: 8 or more, what the feature network behind the scores needs")
        largest = len(self.data.train.images)
        if not 64 < settings.n_samples <= largest:
            raise SferdError(f"n_samples = {settings.n_samples}; allowed: 65 to {largest}, so that real sets of that size give a floor")
        most = min(settings.n_samples, len(self.data.reference.images)) - 1
        if settings.neighbours > most:
            raise SferdError(
                f"neighbours = {settings.neighbours}; allowed: at most {most}, fewer than there are samples and reference images"
            )
        if settings.sgp and settings.prior == "mixture" and settings.prior_components > largest:
            raise SferdError(f"prior_components = {settings.prior_components}; allowed: at most {largest}, one a training image")

    def _some_label(self) -> dict[str, Tensor]:
        return {"labels": torch.zeros(1, dtype=torch.long)} if self.unet.classes else {}

    def _claim_folder(self) -> None:
        """Write ``config.json``, or refuse a folder that holds another run. How many processes share the work may change on the way."""
        path = self.folder / "config.json"
        if not self._is_there(path):
            processes.once(lambda: write_json(path, {"settings": self._kept_settings(), "made_with": provenance()}))
        self._compare_settings()

    def _kept_settings(self) -> dict[str, Any]:
        return json.loads(self.settings.model_copy(update={"run_folder": None, "processes": 1}).model_dump_json())

    def _compare_settings(self) -> None:
        path = self.folder / "config.json"
        mine = self._kept_settings()
        theirs = read_record(path, "settings")["settings"]
        if not isinstance(theirs, dict):
            raise SferdError(f"{path}: settings are a {type(theirs).__name__}; expected names with their values")
        for name in sorted(mine.keys() | theirs.keys()):
            if mine.get(name) != theirs.get(name):
                raise SferdError(
                    f"run folder {self.folder} was made with {name} = {theirs.get(name)}, these settings have {mine.get(name)}; "
                    "allowed: the same settings, or another run_folder"
                )

    def _work(self) -> None:
        """Have the folder to oneself from here on; called by all processes before anything there is made, and again before it is written.

        Raises SferdError when another process has it, and when it was removed meanwhile.
        """

        def take() -> None:
            if self._lock is None or not self._lock.held:
                self._lock = work_in(self.folder)
                self._compare_settings()  # of two that began at once in a new folder, one has overwritten the other's
                # What a killed process was writing: nobody else can be writing now.
                for pattern in ("weights/.*.tmp", "checkpoints/.*.tmp", "samples/.*.tmp", ".*.csv.*.tmp"):
                    for left in self.folder.glob(pattern):
                        left.unlink()
            self._lock.check()

        processes.once(take)

    # Stages -------------------------------------------------------------------------------------------------------------

    def train_stage(
        self, name: str, build: Callable[[], Denoiser], make_target: MakeTarget, data: Split, seed_of: str | None = None, **options: Any
    ) -> Denoiser:
        """Train the stage ``name`` unless its weights are there; its averaged weights, ready to use. ``options`` are TrainSettings'."""
        path = self.folder / "weights" / f"{name}.safetensors"
        if self._is_there(path):
            model = load_model(path)[0]
            if name != "teacher" or not self.settings.teacher_from:
                matching(build().state_dict(), model.state_dict(), "", path)
            return model.to(self.device)
        self._work()
        settings = self.settings
        options = {"ema_decay": settings.ema_decay} | options
        training = TrainSettings(
            batch_size=settings.batch_size,
            label_dropout=settings.label_dropout if self.unet.classes and not settings.teacher_from else 0.0,
            null_label=self.unet.classes,
            checkpoint_every=settings.checkpoint_every,
            seed=stage_seed(settings.seed, seed_of or name),
            precision=settings.precision,
            device=settings.device,
            accumulate=settings.accumulate,
            gradient_checkpointing=settings.gradient_checkpointing,
            compile=settings.compile,
            **options,
        )
        checkpoint = self.folder / "checkpoints" / f"{name}.safetensors"
        flops, started = training.steps * step_flops(build(), make_target, data, training), time.perf_counter()
        with tqdm(total=training.steps, desc=name, disable=not self.progress or processes.rank() > 0, leave=True) as bar:
            for state in train(build(), make_target, data, training, checkpoint):
                bar.update(state.step - bar.n)
                if state.step % 20 == 0:
                    bar.set_postfix(loss=f"{state.losses[-20:].mean():.4f}")
        cost = {"seconds": time.perf_counter() - started, "tflop": flops / 1e12}

        self._work()

        def keep() -> None:
            losses = pd.DataFrame({"stage": name, "step": range(1, training.steps + 1), "loss": state.losses.numpy()})
            self._append("training.csv", losses, {"stage": name})
            self._append("stages.csv", pd.DataFrame([{"stage": name, **cost}]), {"stage": name})
            # The weights are what marks a stage as finished: written last, then the checkpoint is no longer needed.
            self._save(path, state.ema, {"stage": name, "training": asdict(training)})
            checkpoint.unlink()

        processes.once(keep)
        return state.ema.requires_grad_(False).to(self.device)

    @staticmethod
    def _is_there(path: Path) -> bool:
        """Whether that file is there, the same for all processes: none goes on and makes it before all have looked."""
        there = path.exists()
        processes.wait()
        return there

    def _save(self, path: Path, model: Model, info: dict[str, Any]) -> None:
        save_model(path, model, {**info, "shape": list(self.shape), "data": self.data.name, "seed": self.settings.seed})

    def teacher(self) -> NetworkDenoiser:
        """The teacher that ``teacher_from`` names, else the shipped one of this data set, or one trained here: with ``retrain``, or where
        none is shipped.
        """
        settings, path = self.settings, self.folder / "weights" / "teacher.safetensors"
        shipped = shipped_folder() / self.data.name / "teacher.safetensors"
        if not self._is_there(path):
            self._work()
            if settings.teacher_from:
                found = self.foreign_teacher()
                processes.once(lambda: self._save(path, found, {"stage": "teacher", "teacher_from": settings.teacher_from}))
            elif shipped.exists() and not settings.retrain and settings.bootstrap is None:
                model, info = load_model(shipped)
                if model.network.shape != self.unet:
                    raise SferdError(
                        f"the shipped teacher has {model.network.shape}, these settings {self.unet}; set retrain = True to train one"
                    )
                about = {key: value for key, value in info.items() if key in ("stage", "training")}
                processes.once(lambda: self._save(path, model, about))
        return self.train_stage(
            "teacher",
            lambda: NetworkDenoiser(seeded(lambda: UNet(self.unet), stage_seed(settings.seed, "teacher"))),
            denoising_target(NetworkDenoiser.phi_lo, NetworkDenoiser.phi_hi),
            self.train_split,
            steps=settings.teacher_steps,
            lr=settings.teacher_lr,
            ema_decay=settings.teacher_ema_decay,
            anneal="cosine",
        )

    def foreign_teacher(self) -> NetworkDenoiser:
        """The teacher that ``teacher_from`` names: a saved one's file, or the folder of a diffusers pipeline; the run's own copy once there
        is one.
        """
        kept = self.folder / "weights" / "teacher.safetensors"
        source = str(kept if kept.exists() else self.settings.teacher_from)
        if not source.endswith(".safetensors"):
            from sferd_lab.foreign import load_diffusers  # diffusers takes seconds to import, and few need it

            return load_diffusers(source)
        model, info = load_model(source)
        if not isinstance(model, NetworkDenoiser):
            raise SferdError(f"teacher_from = '{source}' holds a {info['kind']}; allowed: a network")
        return model

    def guide(self, teacher: Denoiser, guided: bool) -> Denoiser:
        """``teacher`` with the settings' classifier-free guidance, which a student has learned, and attention guidance if ``guided``."""
        settings = self.settings
        if settings.classifier_free != 1 and isinstance(teacher, NetworkDenoiser) and teacher.role == "teacher":
            teacher = ClassifierFree(teacher, settings.classifier_free)
        if not guided:
            return teacher
        return GuidedDenoiser(
            teacher,
            settings.guidance_weight,
            form=settings.guidance_form,
            threshold=settings.guidance_threshold,
            blur_kernel=settings.blur_kernel,
            blur_sigma=settings.blur_sigma,
            layer=settings.guidance_layer,
            mask=settings.guidance_mask,
            seed=settings.seed,
        )

    def progressive(self, teacher: Denoiser, guided: bool, semantic: SemanticDenoiser | None = None) -> dict[int, Denoiser]:
        """Progressive distillation from ``pd_start_steps`` down to 1: the student of each step count.

        With ``semantic``, the z-conditional teacher, the chain distils that pair instead, from ``sgp_start_steps``; codes come from its
        frozen encoder.
        """
        settings = self.settings
        if semantic is None:
            source, told, plan = teacher, on_labels, zip(halving_schedule(settings.pd_start_steps), settings.pd_stage_steps, strict=True)
        else:
            plan = ((steps, settings.sgp_distil_steps) for steps in halving_schedule(settings.sgp_start_steps))
            source, told = semantic, on_codes(semantic)
        students: dict[int, Denoiser] = {}
        for steps, updates in plan:
            guide = guided and (not students or settings.guide_every_stage)
            students[steps] = self.train_stage(
                f"{stage_name('pd', guided, semantic)}-{steps}",
                lambda source=source: as_student(source),
                ProgressiveTarget(self.guide(source, guide), steps, told, told),
                self.train_split,
                seed_of=f"pd-{steps}",
                steps=updates,
                lr=settings.pd_lr,
                anneal="linear",
                loss=settings.pd_loss,
                **self._z_options(semantic),
            )
            source = students[steps]
        return students

    def consistency(self, teacher: Denoiser, guided: bool, semantic: SemanticDenoiser | None = None) -> Denoiser:
        """Consistency distillation: one student for every step count; of the z-conditional pair with ``semantic``."""
        settings = self.settings
        told = on_labels if semantic is None else on_codes(semantic)
        source = teacher if semantic is None else semantic
        return self.train_stage(
            stage_name("cd", guided, semantic),
            lambda: as_student(source),
            ConsistencyTarget(self.guide(source, guided), settings.cd_boundaries, settings.cd_solver, told, told),
            self.train_split,
            seed_of="cd",
            steps=settings.cd_steps if semantic is None else settings.sgp_distil_steps,
            lr=settings.cd_lr,
            anneal="linear",
            loss=settings.cd_loss,
            target_decay=settings.cd_target_decay,
            **self._z_options(semantic),
        )

    def semantic_teacher(self, teacher: NetworkDenoiser) -> SemanticDenoiser:
        """Encoder and gradient predictor trained on the frozen teacher by the denoising loss (PDAE): a z-conditional teacher."""
        return self._train_semantic("teacher-sgp", teacher, denoising_target(teacher.phi_lo, teacher.phi_hi, on_images))

    def semantic_student(self, method: str, teacher: Denoiser, students: dict[int, Denoiser], steps: int, guided: bool) -> SemanticDenoiser:
        """Encoder and gradient predictor on the student of ``steps`` steps, for the "walk" and "data" targets.

        "walk" is the target that the student itself was distilled with; "data" the guided teacher's prediction one sampling step on.
        """
        settings = self.settings
        if settings.sgp_target == "data":
            target: MakeTarget = DataTarget(self.guide(teacher, guided), steps, on_images)
        elif method == "pd":
            source = students.get(2 * steps, teacher)
            guide = guided and (source is teacher or settings.guide_every_stage)
            target = ProgressiveTarget(self.guide(source, guide), steps, on_images)
        else:
            # At every boundary, whatever the steps: only the last one, at 0, ties f(x, phi) = f(x', phi') to an image.
            target = ConsistencyTarget(self.guide(teacher, guided), settings.cd_boundaries, settings.cd_solver, on_images)
        return self._train_semantic(f"{stage_name(method, guided)}-{steps}-sgp", students[steps], target, joint=settings.sgp_joint)

    def _train_semantic(self, name: str, base: NetworkDenoiser, target: MakeTarget, joint: bool = False) -> SemanticDenoiser:
        settings = self.settings

        def build() -> SemanticDenoiser:
            frozen = copy.deepcopy(base).requires_grad_(joint)
            return seeded(lambda: SemanticDenoiser(frozen, settings.z_dim, blind=settings.sgp_blind), stage_seed(settings.seed, "sgp"))

        options = {
            "steps": settings.sgp_steps,
            "lr": settings.sgp_lr,
            "anneal": "linear",
            "z_dim": settings.z_dim,
            "z_noise": settings.z_noise,
        }
        return self.train_stage(name, build, target, self.train_split, seed_of="sgp", **options)

    def _z_options(self, semantic: SemanticDenoiser | None) -> dict[str, Any]:
        return {} if semantic is None else {"z_dim": self.settings.z_dim, "z_noise": self.settings.z_noise}

    def codes(self, model: SemanticDenoiser, images: Tensor | StoredImages) -> Tensor:
        """The encoder's codes (N, z_dim) of ``images``."""
        with torch.inference_mode():
            return torch.cat([model.encoder(part.to(self.device)) for part in images.split(1000)]).cpu()

    def prior(self, name: str, model: SemanticDenoiser) -> Prior:
        """The prior over ``model``'s codes of the training images, as the settings have it."""
        path = self.folder / "weights" / f"{name}-prior.safetensors"
        if self._is_there(path):
            return load_model(path)[0].to(self.device)
        self._work()
        settings, codes = self.settings, self.codes(model, self.train_split.images).clone()
        about = {"stage": f"{name}-prior"}
        if settings.prior == "diffusion":
            mean, std = codes.mean(0), codes.std(0)
            if not bool((std > 0).all()):
                raise SferdError(f"{int((std == 0).sum())} of a code's {len(std)} numbers are the same for all images; allowed: none")
            latent = self.train_latent(f"{name}-latent", (codes - mean) / std)
            prior = DiffusionPrior(latent, mean, std, settings.prior_sampling_steps)
            processes.once(lambda: self._save(path, prior, about))
            return prior.eval().to(self.device)
        if settings.prior == "mixture":
            processes.once(lambda: self._save(path, MixturePrior.fit(codes, settings.prior_components, settings.seed), about))
        else:
            processes.once(lambda: self._save(path, KernelPrior(codes, settings.z_noise), about))
        return load_model(path)[0].to(self.device)

    def train_latent(self, name: str, codes: Tensor) -> LatentDenoiser:
        """The latent prior's network, trained on standardised ``codes``."""
        settings = self.settings
        return self.train_stage(
            name,
            lambda: seeded(lambda: LatentDenoiser(codes.shape[1]), stage_seed(settings.seed, "prior")),
            denoising_target(LatentDenoiser.phi_lo, LatentDenoiser.phi_hi),
            Split(codes, None),
            seed_of="prior",
            steps=settings.prior_steps,
            lr=1e-3,
            anneal="linear",
        )

    # Scores -------------------------------------------------------------------------------------------------------------

    @cached_property
    def scorer(self) -> Scorer:
        """The metrics on the shipped feature network of this data set, or on one trained here where none is shipped."""
        path = shipped_folder() / self.data.name / "features.safetensors"
        if not path.exists():
            path, split = self.folder / "weights" / "features.safetensors", self.data.features
            if not self._is_there(path):
                self._work()
                about = {"data": self.data.name}
                processes.once(
                    lambda: save_feature_network(path, train_feature_network(split.images, split.labels, self.data.classes), about)
                )
        return self._scorer(path, f"{self.data.name}-net")

    @cached_property
    def second_scorer(self) -> Scorer | None:
        """FD and KID on a second feature network of this data set, where one is shipped: does another judge agree?"""
        path = shipped_folder() / self.data.name / "second-features.safetensors"
        return self._scorer(path, f"{self.data.name}-net-2", ("fd", "kid")) if path.exists() else None

    def _scorer(self, path: Path, name: str, metrics: tuple[str, ...] = METRICS) -> Scorer:
        """The judge in ``path``. Its training images are all of them, also for a model of a ``bootstrap`` sample, which has seen fewer."""
        network, digest = load_feature_network(path)
        images, k = (self.data.reference.images, self.data.train.images), self.settings.neighbours
        known = shipped_folder() / self.data.name / "floors.json"
        floors = read_floors(known, digest, k) if known.exists() else {}
        return Scorer(network, digest, name, *images, k=k, metrics=metrics, known_floors=floors)

    @cached_property
    def _sorted_labels(self) -> Tensor:
        return self.train_split.labels.sort().values

    @property
    def share(self) -> range:
        """Which of a row's samples are this process's: whole batches, so that no image depends on how many processes there are."""
        return processes.share(self.settings.n_samples, self.settings.sampling_batch)

    def draw(self, row: Row, denoiser: Denoiser, which: range | None = None, prior: Prior | None = None, **condition: Tensor) -> Samples:
        """The samples ``which`` of a row, by default this process's share: the same noise, image by image, for every row of this run.

        ``condition`` has all the row's samples.
        """
        which = self.share if which is None else which
        # A label beside a code would have to agree with it, and the prior draws codes alone: with a code there is none.
        if self.unet.classes and prior is None and "z" not in condition:
            # As often as in training: any first few, too, for steps of the golden ratio spread evenly over the sorted labels.
            place = torch.arange(which.stop, dtype=torch.float64) * 0.5 * (5**0.5 - 1) % 1
            condition["labels"] = self._sorted_labels[(place * len(self._sorted_labels)).long()]
        return sample(
            denoiser,
            len(which),
            self.shape,
            row.steps,
            method=row.sampler,
            seed=self.settings.seed,
            first=which.start,
            batch_size=self.settings.sampling_batch,
            condition={name: rows[which.start : which.stop] for name, rows in condition.items()},
            prior=prior,
            device=self.device,
            progress=row.label if self.progress and processes.rank() == 0 else None,
        )

    def evaluate(self, row: Row, denoiser: Denoiser, prior: Prior | None = None, **condition: Tensor) -> pd.DataFrame:
        """Sample and score a row, with what it cost; or read it, where it has been done."""
        known = self._known(row)
        if known is not None:
            return known
        self._work()
        started = time.perf_counter()
        samples = self.draw(row, denoiser, None, prior, **condition)
        processes.wait()
        seconds = time.perf_counter() - started
        if row == self.yardstick_row:
            self.yardstick = samples.images
        images = self._stretched(row, samples.images)
        flops = self._flops(row, denoiser, prior, condition)
        extra = {"sampling_ms_per_image": 1000 * seconds / self.settings.n_samples, "sampling_mflops_per_image": flops / 1e6}
        extra |= {f"nfe_{role}": float(count) for role, count in samples.nfe.items()}
        if row.sampler != "consistency" or row.steps == 1:  # with fresh noise on the way there is no common trajectory
            apart = (images - self.yardstick).square().flatten(1).mean(1)
            extra["teacher_mse"] = float(processes.gather(apart, self.device).mean())
        return self._record(row, images, extra)

    def _stretched(self, row: Row, images: Tensor) -> Tensor:
        """A student's images by ``contrast`` times as far from black: a control for a method that brightens what it draws."""
        factor = self.settings.contrast
        return images if row.method == "teacher" or factor == 1 else (images + 1) * factor - 1

    @property
    def yardstick_row(self) -> Row:
        """The plain teacher at its largest step count."""
        return Row("teacher", sampler="ddim", steps=max(self.settings.teacher_sampling_steps))

    @cached_property
    def yardstick(self) -> Tensor:
        """The samples of that row that are this process's share, on the noise that all rows have in common."""
        return self.draw(self.yardstick_row, self.guide(self.teacher(), False)).images

    def _flops(self, row: Row, denoiser: Denoiser, prior: Prior | None, condition: dict[str, Tensor]) -> float:
        """FLOPs an image. Every sampler costs a fixed amount for the first step and another for each further one."""

        def count(steps: int) -> float:
            with FlopCounterMode(display=False) as counter:
                self.draw(Row(row.method, sampler=row.sampler, steps=steps), denoiser, range(4), prior, **condition)
            return counter.get_total_flops() / 4

        first = count(1)
        return first if row.steps == 1 else first + (row.steps - 1) * (count(2) - first)

    def evaluate_known_bad(self) -> pd.DataFrame:
        """Scores of sets that are bad by construction: each has a metric that must see it, or the metrics are not to be trusted."""
        frames = []
        bad = known_bad(self.data.train.images, self.data.train.labels, self.settings.n_samples, self.settings.seed)
        for name, (images, _) in bad.items():
            row = Row(name)
            known, own = self._known(row), images[self.share.start : self.share.stop]
            if known is None:
                self._work()
                known = self._record(row, own, {})
            frames.append(known)
        return pd.concat(frames, ignore_index=True)

    def code_errors(self, row: Row, model: SemanticDenoiser, prior: Prior) -> pd.DataFrame:
        """How much the code tells: squared error of one step from phi_hi to held-out images, for codes of four origins.

        "encoder" is the image's own code, "shuffled" another image's, "mean" the average code, "prior" a draw. If z is used, the first
        is lowest.
        """
        known = self._known(row)
        if known is not None:
            return known
        self._work()
        images = self.data.reference.images
        own = self.codes(model, images)
        shuffled = own.roll(1, dims=0)
        drawn = prior.from_noise(SampleNoise(self.settings.seed, len(images), purpose=1).draw((prior.noise_dim,))).detach()
        codes = {"encoder": own, "shuffled": shuffled, "mean": own.mean(0, keepdim=True).expand_as(own), "prior": drawn}
        total, first = dict.fromkeys(codes, 0.0), 0
        for part in images.split(1000):
            noise = SampleNoise(self.settings.seed, len(part), first, purpose=2)
            x = add_noise(part, noise.draw(self.shape), model.phi_hi).to(self.device)
            for name, z in codes.items():
                with torch.inference_mode():
                    predicted = model(x, model.phi_hi, z=z[first : first + len(part)].to(self.device)).x0.cpu()
                total[name] += float((predicted - part).square().mean(dim=(1, 2, 3)).sum())
            first += len(part)
        scores = [{"metric": f"reconstruction_mse_{name}", "value": error / len(images), "n": len(images)} for name, error in total.items()]
        self._work()
        processes.once(lambda: self._append_rows(row, scores))
        return self._known(row)

    def _known(self, row: Row) -> pd.DataFrame | None:
        path = self.folder / "metrics.csv"
        table = read_table(path, tuple(asdict(row))) if path.exists() else None
        processes.wait()  # all have looked before one of them writes
        if table is None:
            return None
        same = table[(table[list(asdict(row))] == list(asdict(row).values())).all(axis=1)]
        return None if same.empty else same.reset_index(drop=True)

    def _record(self, row: Row, images: Tensor, extra: dict[str, float]) -> pd.DataFrame:
        """Keep the first samples, and score all, of which ``images`` are this process's share: features are gathered, not images."""
        kept = processes.gather(images[: max(0, KEPT - self.share.start)].contiguous(), self.device)
        judges = {"": self.scorer} | ({"_second": self.second_scorer} if self.second_scorer else {})
        features = {name: processes.gather(torch.from_numpy(judge.features(images)), self.device) for name, judge in judges.items()}

        def keep() -> None:
            save_tensors(self.folder / "samples" / f"{row.key}.safetensors", {"images": kept}, {"row": asdict(row)})
            scores = [
                asdict(score) | {"metric": f"{score.metric}{name}"}
                for name, judge in judges.items()
                for score in judge.scores_of(features[name].numpy())
            ]
            more = [{"metric": name, "value": value, "n": self.settings.n_samples} for name, value in extra.items()]
            self._append_rows(row, scores + more)

        self._work()
        processes.once(keep)
        return self._known(row)

    def _append_rows(self, row: Row, scores: list[dict[str, Any]]) -> None:
        frame = pd.DataFrame([{**asdict(row), "seed": self.settings.seed, **score} for score in scores])
        self._append("metrics.csv", frame, asdict(row))

    def _append(self, name: str, frame: pd.DataFrame, identity: dict[str, Any]) -> None:
        """Put the rows of ``frame`` into a table, in place of those that have the same ``identity``; whole or not at all."""
        path = self.folder / name
        if path.exists():
            old = read_table(path, tuple(identity))
            keep = ~(old[list(identity)] == list(identity.values())).all(axis=1)
            frame = pd.concat([old[keep], frame], ignore_index=True)
        with replacing(path) as temporary:
            frame.to_csv(temporary, index=False)

    def images(self, row: Row) -> Tensor:
        """The kept samples of an evaluated row."""
        path = self.folder / "samples" / f"{row.key}.safetensors"
        tensors, _ = load_tensors(path)
        if list(tensors) != ["images"] or tensors["images"].shape[1:] != self.shape:
            raise SferdError(f"{path} holds something else than images of {self.shape}; delete it, and its rows in metrics.csv")
        return tensors["images"]

    # The whole way ------------------------------------------------------------------------------------------------------

    def evaluate_teacher(self) -> Iterator[Row]:
        """Score the teacher at its step counts, and guided at the largest; yields each row when done."""
        teacher, counts = self.teacher(), self.settings.teacher_sampling_steps
        rows = [Row("teacher", sampler=sampler, steps=steps) for sampler in self.settings.teacher_samplers for steps in counts]
        rows += [Row("teacher", guided, sampler="ddim", steps=max(counts)) for guided in self.settings.guided if guided]
        # The yardstick first: the others are compared with its samples, which are then there.
        for row in sorted(rows, key=lambda row: row != self.yardstick_row):
            self.evaluate(row, self.guide(teacher, row.guidance))
            yield row

    def evaluate_students(self) -> Iterator[Row]:
        """Distil by every method, plain and guided as set, and score each student at its step counts; yields each row when done."""
        for method, guided in ((method, guided) for method in self.settings.methods for guided in self.settings.guided):
            students = self.students(method, guided)
            for steps in self.settings.sampling_steps:
                row = Row(method, guided, sampler="ddim" if method == "pd" else "consistency", steps=steps)
                self.evaluate(row, students[steps])
                yield row

    def students(self, method: str, guided: bool) -> dict[int, Denoiser]:
        """The distilled student for each step count."""
        teacher = self.teacher()
        if method == "pd":
            return self.progressive(teacher, guided)
        return dict.fromkeys({*self.settings.sampling_steps, *self.settings.sgp_sampling_steps}, self.consistency(teacher, guided))

    def semantic_students(self, method: str, guided: bool) -> dict[int, tuple[SemanticDenoiser, Prior]]:
        """For each step count in ``sgp_sampling_steps``: the student with its gradient predictor, and the prior over its codes."""
        settings, teacher = self.settings, self.teacher()
        if settings.sgp_target != "conditional":
            students = self.students(method, guided)
            models = {steps: self.semantic_student(method, teacher, students, steps, guided) for steps in settings.sgp_sampling_steps}
            return {steps: (model, self.prior(f"{stage_name(method, guided)}-{steps}-sgp", model)) for steps, model in models.items()}
        source = self.semantic_teacher(teacher)
        prior = self.prior("teacher-sgp", source)  # the pair's encoder is the teacher's
        if method == "pd":
            pairs = self.progressive(teacher, guided, source)
        else:
            pairs = dict.fromkeys(settings.sgp_sampling_steps, self.consistency(teacher, guided, source))
        return {steps: (pairs[steps], prior) for steps in settings.sgp_sampling_steps}

    def evaluate_semantic(self) -> Iterator[Row]:
        """Train and score the semantic gradient predictor on every student, with codes from the prior and from the true encoder."""
        settings = self.settings
        codes_of = self.data.train.images[: settings.n_samples]
        if settings.sgp_target == "conditional":
            # The z-conditional teacher in as few steps, not distilled: what the prior alone brings.
            source = self.semantic_teacher(self.teacher())
            for steps in settings.sgp_sampling_steps:
                yield from self._evaluate_codes(
                    Row("teacher", False, "conditional", "", "ddim", steps), source, self.prior("teacher-sgp", source), codes_of
                )
        for method, guided in ((method, guided) for method in settings.methods for guided in settings.guided):
            for steps, (model, prior) in self.semantic_students(method, guided).items():
                row = Row(method, guided, settings.sgp_target, "", "ddim" if method == "pd" else "consistency", steps)
                yield from self._evaluate_codes(row, model, prior, codes_of)

    def _evaluate_codes(self, row: Row, model: SemanticDenoiser, prior: Prior, codes_of: Tensor) -> Iterator[Row]:
        told = Row(row.method, row.guidance, row.sgp, "prior", row.sampler, row.steps)
        self.evaluate(told, model, prior=prior)
        yield told
        codes = self.codes(model, codes_of)
        for name, z in {"encoder": codes, "mean": codes.mean(0, keepdim=True).expand_as(codes)}.items():
            told = Row(row.method, row.guidance, row.sgp, name, row.sampler, row.steps)
            self.evaluate(told, model, z=z)
            yield told
        self.code_errors(row, model, prior)

    def rows(self) -> Iterator[Row]:
        """Train all stages and score all rows that the settings ask for, in order; yields each row when done."""
        yield from self.evaluate_teacher()
        yield from self.evaluate_students()
        if self.settings.sgp:
            yield from self.evaluate_semantic()

    def table(self) -> pd.DataFrame:
        """``metrics.csv`` as it stands."""
        return read_table(self.folder / "metrics.csv")

    def save_figure(self, name: str, figure: Figure) -> None:
        """Keep ``figure`` as ``figures/<name>.png``."""
        with replacing(self.folder / "figures" / f"{name}.png") as temporary:
            figure.savefig(temporary, format="png", dpi=150)


def launch(settings: Settings) -> None:
    """Do the whole experiment in ``processes`` new processes on this machine, if that is more than one: a notebook then finds it done."""
    if settings.processes > 1:
        run = Run(settings, progress=False)  # what does not fit is refused here, in words
        leave(run.folder)  # an earlier cell's run may have worked there
        processes.launch(_work, (settings,), settings.processes)


def _work(settings: Settings) -> None:
    run = Run(settings)
    run.evaluate_known_bad()
    for _ in run.rows():
        pass


@command
def main(arguments: Sequence[str]) -> None:
    """``python -m sferd_lab.experiment preset=digits seed=1 ...``: the notebook's run without the notebook, also under ``torchrun``."""
    settings = make_settings(**parse_literals(arguments))
    if settings.processes > 1 and processes.count() == 1:
        return launch(settings)
    return _work(settings)


def read_table(path: Path | str, columns: Sequence[str] = ()) -> pd.DataFrame:
    """A run's table with empty cells of text columns as empty strings.

    Raises SferdError for what is no table, and for one that lacks one of ``columns``.
    """
    text = ("sgp", "z", "sampler", "features", "features_sha256")
    if not is_file(path):
        raise SferdError(f"{path} is missing")
    try:
        table = pd.read_csv(path, dtype=dict.fromkeys(text, str))
    except (ValueError, OverflowError, OSError) as error:  # pandas' own are ValueErrors
        raise SferdError(f"{Path(path).name} is no table: {error} ({path})") from None
    if missing := [name for name in columns if name not in table]:
        raise SferdError(f"{path} has no column '{missing[0]}'; expected {', '.join(columns)}")
    return table.fillna({name: "" for name in text if name in table})


def stage_name(method: str, guided: bool, semantic: SemanticDenoiser | None = None) -> str:
    """The name under which a student's weights are kept."""
    return method + ("-guided" if guided else "") + ("-sgp" if semantic is not None else "")


def as_student(source: Denoiser) -> Denoiser:
    """A trainable copy of a teacher or an earlier student; a semantic pair's encoder stays frozen."""
    student = copy.deepcopy(source).requires_grad_(True)
    base = student.base if isinstance(student, SemanticDenoiser) else student
    base.role = "student"
    for denoiser in (student, base):
        denoiser.evaluations = 0
    if isinstance(student, SemanticDenoiser):
        student.encoder.requires_grad_(False)
    return student


def on_images(batch: Batch) -> dict[str, Tensor]:
    """Condition on the image itself, for a semantic denoiser to encode with the batch's noise on its code; on no label, as in sampling."""
    return {"image": batch.x0, "z_noise": batch.z_noise}


def on_codes(semantic: SemanticDenoiser) -> Callable[[Batch], dict[str, Tensor]]:
    """Condition on codes by the frozen encoder of ``semantic``, with the batch's noise, the same for teacher and student; on no label."""
    encoder = copy.deepcopy(semantic.encoder).eval().requires_grad_(False)

    def condition(batch: Batch) -> dict[str, Tensor]:
        with torch.no_grad():
            return {"z": encoder.to(batch.x0.device)(batch.x0) + batch.z_noise}

    return condition


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
