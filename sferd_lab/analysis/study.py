"""The instruments on trained models: tables under ``data/results/`` from run folders.

``python -m sferd_lab.analysis.study spatial RUN NAME [n=500] [seed=1]`` reads a run of the main job, ``... bias-variance ENSEMBLE NAME``
a folder of ``analysis.ensemble``, ``... mechanism RUNS NAME seeds=[1,2,3]`` the runs ``RUNS/NAME-seed1`` and so on. All write
``data/results/<kind>/<NAME>*.csv`` and, beside them, the settings they were made with.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from pydantic import ValidationError
from torch import Tensor

from sferd_lab.analysis.bias_variance import decompose, predict
from sferd_lab.analysis.ensemble import load_members
from sferd_lab.analysis.spatial import (
    attention_maps,
    attention_test,
    by_pixel,
    error_map,
    mean_interval,
    radial_power,
    share_inside,
    to_grid,
)
from sferd_lab.artifacts import load_model, shipped_folder
from sferd_lab.config import Settings, parse_literals
from sferd_lab.data import load_images
from sferd_lab.denoiser import Denoiser, FiniteSetDenoiser
from sferd_lab.diffusion import HALF_PI, add_noise
from sferd_lab.distill import halving_schedule
from sferd_lab.errors import SferdError, command
from sferd_lab.experiment import provenance
from sferd_lab.files import read_json, read_record, replacing, write_json
from sferd_lab.guidance import default_layer
from sferd_lab.metrics import extract, frechet_distance, load_feature_network
from sferd_lab.sample import SampleNoise

# Noise levels t = phi / (pi/2); all lie on the consistency grid of 16, and the last is pure noise.
LEVELS = (0.125, 0.25, 0.5, 0.75, 0.875, 1.0)
TEACHER_STEPS = 64


@dataclass(frozen=True)
class Case:
    """A model whose error is looked at: ``steps`` None is one evaluation, else a walk; ``source`` is the teacher it was distilled from."""

    name: str
    model: Denoiser
    source: Denoiser | None = None
    steps: int | None = None
    levels: tuple[float, ...] = LEVELS
    condition: dict[str, Tensor] = field(default_factory=dict)


def run_settings(run: Path) -> Settings:
    """The settings of a run folder. Raises SferdError for a ``config.json`` without any, or with impossible ones."""
    path = run / "config.json"
    try:
        return Settings.model_validate(read_record(path, "settings")["settings"])
    except ValidationError as error:
        raise SferdError(f"{path} holds no settings of this version: {error}") from None


def noised(images: Tensor, level: float, seed: int) -> Tensor:
    """``images`` at the angle ``level`` pi/2; the noise of image i is the same at every level."""
    return add_noise(images, SampleNoise(seed, len(images), purpose=3).draw(images.shape[1:]), level * HALF_PI)


def cases(run: Path, images: Tensor) -> Iterator[Case]:
    """Teacher, consistency student and progressive students of a run, and its pairs with a semantic gradient predictor, as far as trained.

    Progressive students only know their own grid, so they walk from pure noise. A pair is told its image's own code, and is compared with
    the z-conditional teacher told the same.
    """

    def weights(name: str) -> Denoiser | None:
        path = run / "weights" / f"{name}.safetensors"
        return load_model(path)[0] if path.exists() else None

    teacher = weights("teacher")
    yield Case("teacher", teacher)
    for name in ("cd", "cd-guided"):
        if student := weights(name):
            yield Case(name, student, teacher)
    for prefix in ("pd", "pd-guided"):
        for steps in (4, 2, 1):
            if student := weights(f"{prefix}-{steps}"):
                yield Case(f"{prefix}-{steps}", student, teacher, steps, (1.0,))
    if source := weights("teacher-sgp"):
        with torch.inference_mode():
            told = {"z": source.encoder(images)}
        for name in ("pd-sgp-1", "pd-guided-sgp-1", "cd-sgp", "cd-guided-sgp"):
            if student := weights(name):
                yield Case(name, student, source, 1, (1.0,), told)


def spatial_study(run: Path | str, name: str, n: int = 500, seed: int = 1) -> None:
    """Where the errors of a run's models sit, on ``n`` held-out images: four tables.

    ``<name>-attention.csv``: ``attention_test`` for each model, error, level and layer of the teacher. ``<name>-shares.csv``: share of
    error inside the mask of attention above 1, over the mask's area. ``<name>-spectrum.csv``: power of each error by frequency.
    ``<name>-maps.csv``: mean error and attention, pixel by pixel. Errors: "total" against the image x0; "fitting" against the ideal
    denoiser of the training set (teacher only); "distillation" against the teacher's endpoint after 64 DDIM steps from the same x_phi.
    """
    run, settings = Path(run), run_settings(Path(run))
    data = load_images(settings.data, settings.image_size, settings.data_folder)
    images = data.reference.images[:n]
    ideal = FiniteSetDenoiser(data.train.images)
    models = list(cases(run, images))
    teacher = models[0].model
    tables: dict[str, list[pd.DataFrame]] = {"attention": [], "shares": [], "spectrum": [], "maps": []}
    endpoints: dict[tuple[int, float], Tensor] = {}  # by teacher and level: the slow part, shared by all its students
    attention = {level: attention_maps(teacher, noised(images, level, seed), level * HALF_PI) for level in LEVELS}
    for level, maps in attention.items():
        tables["maps"].append(by_pixel(maps).assign(model="teacher", level=level))
    for case in models:
        for level in case.levels:
            x, phi = noised(images, level, seed), level * HALF_PI
            predicted = predict(case.model, x, phi, case.steps, **case.condition)
            references = {"total": images}
            if case.source is None:
                references["fitting"] = predict(ideal, x, phi)
            else:
                key = (id(case.source), level)
                if key not in endpoints:
                    endpoints[key] = predict(case.source, x, phi, TEACHER_STEPS, **case.condition)
                references["distillation"] = endpoints[key]
            for kind, reference in references.items():
                about = {"model": case.name, "error": kind, "level": level}
                error = error_map(predicted, reference)
                tables["maps"].append(by_pixel({f"{kind} error": error}).assign(model=case.name, level=level))
                tables["spectrum"].append(radial_power(reference - predicted).assign(**about))
                for layer, received in attention[level].items():
                    tables["attention"].append(attention_test(error, received, predicted).assign(layer=layer, **about))
                    mask = (to_grid(received, error.shape[1:]) > 1).astype(float)
                    line = [*mean_interval(share_inside(error, mask)), mask.mean()]
                    columns = ["ratio", "low", "high", "images", "area"]
                    tables["shares"].append(pd.DataFrame([line], columns=columns).assign(layer=layer, **about))
    for table, parts in tables.items():
        _write("spatial", f"{name}-{table}", pd.concat(parts, ignore_index=True))
    made = {"command": f"python -m sferd_lab.analysis.study spatial {run} {name} n={n} seed={seed}", "n": n, "seed": seed, "levels": LEVELS}
    write_json(shipped_folder() / "results" / "spatial" / f"{name}.json", {**made, "run": read_json(run / "config.json"), **provenance()})


def bias_variance_study(folder: Path | str, name: str, n: int = 200, seed: int = 1) -> None:
    """The decomposition for an ensemble of trainings, at each level, for each method: ``<name>.csv``.

    "held-out": x_phi from images no network saw, x0 as the reference, so irreducible error and the teacher's bias come together.
    "training": x_phi from training images, with the ideal denoiser of the training set as the exact reference: its posterior mean for a
    single evaluation, its ODE's endpoint for walks. T is the teacher's single evaluation (method "teacher", whose "student" is itself) or
    its walk of 64 steps; S a consistency student's single evaluation, or a progressive student's walk.
    """
    folder = Path(folder)
    settings = run_settings(folder / "teacher-1")
    data = load_images(settings.data, settings.image_size, settings.data_folder)
    ideal = FiniteSetDenoiser(data.train.images)
    methods: list[tuple[str, int | None, tuple[float, ...]]] = [("teacher", None, LEVELS)]
    methods += [("cd", None, LEVELS)] if "cd" in settings.methods else []
    few = [steps for steps in halving_schedule(settings.pd_start_steps) if steps <= 4]
    methods += [("pd", steps, (1.0,)) for steps in few] if "pd" in settings.methods else []
    parts, maps = [], []
    for images_of, split in (("held-out", data.reference), ("training", data.train)):
        images = split.images[:n]
        for method, steps, levels in methods:
            teachers, students = load_members(folder, settings.methods[0] if method == "teacher" else method, steps or 1)
            for level in levels:
                x, phi = noised(images, level, seed), level * HALF_PI
                walk = None if method == "teacher" else TEACHER_STEPS
                taught = predict(teachers, x, phi, walk)
                # A copy of the teacher is the perfect student: what remains is the teacher's own bias and variance.
                learnt = taught[:, None].expand(-1, 2, *taught.shape[1:]) if method == "teacher" else predict(students, x, phi, steps)
                m = predict(ideal, x, phi, walk, "heun") if images_of == "training" else None
                found = decompose(learnt, taught, m, images if walk is None or m is None else None)
                about = {"images": images_of, "method": method, "steps": steps or 1, "level": level}
                parts.append(found.table().assign(**about, teachers=len(taught), students=learnt.shape[1], points=n))
                pixels = {term: found.map(term)[None].mean(1).numpy() for term in found.maps}
                maps.append(by_pixel(pixels).assign(**about))
    _write("bias-variance", name, pd.concat(parts, ignore_index=True))
    _write("bias-variance", f"{name}-maps", pd.concat(maps, ignore_index=True))
    made = {
        "command": f"python -m sferd_lab.analysis.study bias-variance {folder} {name} n={n} seed={seed}",
        "n": n,
        "seed": seed,
        "levels": LEVELS,
    }
    runs = {run.name: read_json(run / "config.json") for run in sorted(folder.iterdir())}
    about = {**made, "first_run": runs["teacher-1"], "runs": sorted(runs), **provenance()}
    write_json(shipped_folder() / "results" / "bias-variance" / f"{name}.json", about)


def mechanism_study(runs: Path | str, name: str, seeds: Sequence[int], n: int = 500, seed: int = 1) -> None:
    """What separates one-step students from their teacher, for the trainings of all ``seeds``: ``<name>.csv``, a number a line.

    From ``n`` pure noises (more than the feature network has features), the same for all, each student takes one step and its teacher 64
    by DDIM: d is the difference of the two images, and its teacher is the plain one, or the z-conditional one told the same code of a
    held-out image. Terms:

    - "error": the mean of d^2, for each seed;
    - "bias" and "variance", which add up to the mean error of K seeds: (mean d)^2 - s^2 / K, what all trainings have in common, and s^2,
      what each has of its own, s^2 being d's variance over seeds;
    - "detail": power of the student's images above half the highest frequency, over that of the teacher's, for each seed;
    - "fd": the Frechet distance between the two sets of images on the data set's feature network, for each seed.

    The first three are given over the "image" and over its pixels "inside" and "outside" of the guidance's mask: where the teacher, shown
    its own endpoint with noise at t = 1/2, attends to more than the threshold. ``se`` is the jackknife's over seeds, of bias and variance.
    """
    if not isinstance(seeds, (list, tuple)):
        raise SferdError(f"seeds = {seeds}; allowed: a list, such as [1,2,3]")
    if len(set(seeds)) < 2 or len(set(seeds)) < len(seeds):
        raise SferdError(f"seeds = {list(seeds)}; allowed: two or more, each once, since a variance needs two")
    folders = [Path(runs) / f"{name}-seed{number}" for number in seeds]
    differences: dict[str, list[Tensor]] = {}
    masks: dict[str, list[np.ndarray]] = {}
    lines: list[tuple[str, str, str, int | None, float, float]] = []
    for number, folder in zip(seeds, folders, strict=True):
        settings = run_settings(folder)
        data = load_images(settings.data, settings.image_size, settings.data_folder)
        images, own = data.reference.images[:n], folder / "weights" / "features.safetensors"
        network, _ = load_feature_network(own if own.exists() else shipped_folder() / data.name / "features.safetensors")
        x = noised(images, 1.0, seed)
        found = list(cases(folder, images))
        teacher = found[0].model
        layer = settings.guidance_layer or default_layer(teacher.attention_layers)
        endpoints: dict[int, tuple[Tensor, np.ndarray]] = {}  # by teacher
        for case in found:
            if case.source is None or case.steps not in (None, 1):
                continue
            if id(case.source) not in endpoints:
                goal = predict(case.source, x, HALF_PI, TEACHER_STEPS, **case.condition)
                attended = attention_maps(teacher, add_noise(goal, x, HALF_PI / 2), HALF_PI / 2, [layer])[layer]
                endpoints[id(case.source)] = goal, to_grid(attended, goal.shape[2:]) > settings.guidance_threshold
            goal, mask = endpoints[id(case.source)]
            made = predict(case.model, x, HALF_PI, 1, **case.condition)
            differences.setdefault(case.name, []).append((goal - made).double())
            masks.setdefault(case.name, []).append(mask)
            lines += [(case.name, "error", *line, np.nan) for line in _by_region(error_map(made, goal), mask, number)]
            fine = [radial_power(values).query("frequency > frequency.max() / 2")["power"].sum() for values in (made, goal)]
            lines.append((case.name, "detail", "image", number, fine[0] / fine[1], np.nan))
            apart = frechet_distance(extract(network, made), extract(network, goal))
            lines.append((case.name, "fd", "image", number, apart, np.nan))
    for model, parts in differences.items():
        if len(parts) != len(seeds):
            raise SferdError(f"{len(parts)} of {len(seeds)} runs under {runs} have weights of '{model}'; allowed: all or none")
        lines += _bias_and_variance(model, torch.stack(parts), np.mean(masks[model], axis=0))
    columns = ["model", "term", "where", "seed", "value", "se"]
    _write("mechanism", name, pd.DataFrame(lines, columns=columns).astype({"seed": "Int64"}))
    command = f"python -m sferd_lab.analysis.study mechanism {runs} {name} seeds={list(seeds)} n={n} seed={seed}".replace(", ", ",")
    about = {"command": command, "runs": {folder.name: read_json(folder / "config.json") for folder in folders}, **provenance()}
    write_json(shipped_folder() / "results" / "mechanism" / f"{name}.json", about)


def _by_region(error: np.ndarray, weight: np.ndarray, number: int | None) -> list[tuple[str, int | None, float]]:
    """Means of ``error`` over all pixels, those with ``weight`` and those without."""
    regions = {"image": np.ones_like(error), "inside": weight, "outside": 1 - weight}
    return [(where, number, float((error * part).sum() / part.sum())) for where, part in regions.items()]


def _bias_and_variance(model: str, differences: Tensor, weight: np.ndarray) -> list[tuple[str, str, str, None, float, float]]:
    """Lines of "bias" and "variance" of ``differences`` (K, N, C, H, W), with the jackknife's standard errors where K is above 2."""

    def split(chosen: Tensor) -> np.ndarray:
        variance = chosen.var(0)
        maps = chosen.mean(0).square() - variance / len(chosen), variance
        return np.array([[value for *_, value in _by_region(part.mean(1).numpy(), weight, None)] for part in maps])

    count, whole = len(differences), split(differences)
    se = np.full_like(whole, np.nan)
    if count > 2:
        without = np.stack([split(differences[[other for other in range(count) if other != left]]) for left in range(count)])
        se = np.sqrt((count - 1) / count * ((without - without.mean(0)) ** 2).sum(0))
    return [
        (model, term, where, None, float(whole[i, j]), float(se[i, j]))
        for i, term in enumerate(("bias", "variance"))
        for j, where in enumerate(("image", "inside", "outside"))
    ]


def _write(kind: str, name: str, table: pd.DataFrame) -> None:
    """A table of results, numbers to five digits: more would be noise, and no smaller file."""
    numbers = table.select_dtypes(np.floating).columns
    table[numbers] = table[numbers].map(lambda value: float(f"{value:.5g}"))
    with replacing(shipped_folder() / "results" / kind / f"{name}.csv") as temporary:
        table.to_csv(temporary, index=False)


@command
def main(arguments: Sequence[str]) -> None:
    """The command of this module."""
    studies = {"spatial": spatial_study, "bias-variance": bias_variance_study, "mechanism": mechanism_study}
    if len(arguments) < 3 or arguments[0] not in studies:
        raise SferdError(f"'{' '.join(arguments)}'; allowed: one of {', '.join(studies)}, a folder, a name, then name=value ...")
    study, (folder, name), options = studies[arguments[0]], arguments[1:3], parse_literals(arguments[3:])
    try:
        inspect.signature(study).bind(folder, name, **options)
    except TypeError as error:
        raise SferdError(f"{arguments[0]}: {error}; allowed: {inspect.signature(study)}") from None
    study(folder, name, **options)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
