"""Make the files under ``data/``: ``python -m sferd_lab.ship PRESET [name=value ...]``, ``... ship results NAME RUN ...``,
``... ship students RUN STAGE ...``, ``... ship checkpoints RUN STAGE ...``.

For the preset's data set it trains the feature network, writes the statistics of the reference images on it, trains the teacher and
scores it. Everything follows from the settings and their seed, so the command makes the same files again on the same machine.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from sferd_lab.artifacts import load_model, save_model, shipped_folder
from sferd_lab.config import make_settings, parse_literals
from sferd_lab.data import ImageData
from sferd_lab.errors import SferdError, command
from sferd_lab.experiment import Run, provenance, read_table
from sferd_lab.files import load_tensors, read_json, replacing, save_tensors, sha256, write_json
from sferd_lab.metrics import accuracy, extract, load_feature_network, save_feature_network, train_feature_network

# The feature network behind all scores, and another one to ask whether a verdict is the first one's own.
FEATURES: dict[str, dict[str, int]] = {"features": {}, "second-features": {"dim": 32, "seed": 1}}


def ship_features(data: ImageData) -> None:
    """Train the data set's feature networks on its feature split; write those that are missing, and the reference images' statistics."""
    if not data.classes:
        raise SferdError(f"{data.name} has no labels to train a feature network on; allowed: data sets with labels")
    folder = shipped_folder() / data.name
    # About 50 passes over the digits' few images, 25 over Fashion-MNIST's.
    steps = 400 if len(data.features.images) < 1000 else 4000
    for name, options in FEATURES.items():
        if not (path := folder / f"{name}.safetensors").exists():
            network = train_feature_network(data.features.images, data.features.labels, data.classes, steps=steps, **options)
            right = accuracy(network, data.reference.images, data.reference.labels)
            save_feature_network(path, network, {"data": data.name, "reference_accuracy": right})
    if not (folder / "reference.safetensors").exists():
        network, digest = load_feature_network(folder / "features.safetensors")
        features = torch.from_numpy(extract(network, data.reference.images))
        statistics = {"mean": features.mean(0), "covariance": features.T.cov()}
        save_tensors(folder / "reference.safetensors", statistics, {"data": data.name, "n": len(features), "features_sha256": digest})


def ship_floors(run: Run) -> None:
    """Add the floors at the run's number of samples to those that later runs take as known: half a minute or more each at 10,000."""
    path, k, n = shipped_folder() / run.data.name / "floors.json", run.settings.neighbours, run.settings.n_samples
    floors = read_json(path) if path.exists() else {}
    for scorer in filter(None, (run.scorer, run.second_scorer)):
        others = [entry for entry in floors.get(scorer.sha256, []) if (entry["n"], entry["k"]) != (n, k)]
        floors[scorer.sha256] = [*others, {"n": n, "k": k, "floors": scorer.floors(n)}]
    write_json(path, floors)


def ship(preset: str, **parameters: object) -> None:
    """Train, score and write everything that is shipped for ``preset``; what an interrupted call finished is not repeated."""
    settings = make_settings(preset, **{"retrain": True, "run_folder": f"runs/ship-{preset}", **parameters})
    run = Run(settings)
    folder = shipped_folder() / run.data.name
    ship_features(run.data)
    teacher = run.teacher()
    for _ in run.evaluate_teacher():
        pass
    run.evaluate_known_bad()
    ship_floors(run)
    with replacing(folder / "scores.csv") as temporary:
        run.table().to_csv(temporary, index=False)
    seconds = pd.read_csv(run.folder / "stages.csv").set_index("stage")["seconds"]
    made = {"shape": list(run.shape), "data": run.data.name, "seed": settings.seed, "stage": "teacher"}
    save_model(folder / "teacher.safetensors", teacher, made)
    hashes = {path.stem: sha256(path) for path in sorted(folder.glob("*.safetensors"))}
    command = " ".join(["python -m sferd_lab.ship", preset, *(f"{name}={value}" for name, value in parameters.items())])
    about = {"command": command, "teacher_seconds": round(float(seconds["teacher"])), "sha256": hashes, "made_with": provenance()}
    write_json(folder / "made.json", {**about, "settings": settings.model_dump(mode="json")})


def ship_students(folder: str, *stages: str, beside: str = "") -> None:
    """Ship the students ``stages`` of a finished run beside their data set's teacher, in half precision, which keeps the wheel small.

    With ``beside`` they go into that folder of ``data/`` instead, which is in a clone only. A conditional pair brings its prior: a kernel's
    codes, one a training image, in half precision too, since its noise is far wider than their rounding.
    """
    weights = Path(folder) / "weights"
    data = load_model(weights / f"{stages[0]}.safetensors")[1].get("data")
    if not isinstance(data, str) or data in ("", ".", "..") or Path(data).name != data:
        raise SferdError(f"{folder}: its weights were made on {data!r}; allowed: a data set's name, which becomes a folder's")
    target = shipped_folder() / beside / data
    for stage in stages:
        info = _halve(weights / f"{stage}.safetensors", target / f"{stage}.safetensors")
        if info["kind"] == "semantic":
            prior, kept = weights / "teacher-sgp-prior.safetensors", target / f"{stage}-prior.safetensors"
            if load_tensors(prior)[1]["kind"] == "kernel prior":
                _halve(prior, kept)
            else:  # a mixture's covariances might no longer be positive definite
                with replacing(kept) as temporary:
                    temporary.write_bytes(prior.read_bytes())
    shipped = sorted(target.glob("*.safetensors"))
    students = {file.stem: sha256(file) for file in shipped if beside or file.stem.startswith(("pd", "cd"))}
    write_json(target / "students.json", {"sha256": students, **read_json(Path(folder) / "config.json")})


def _halve(source: Path, target: Path) -> dict[str, Any]:
    """Write the model of ``source`` in half precision; what the file says of it."""
    tensors, info = load_tensors(source)
    halves = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    save_tensors(target, halves, {**info, "stored": "float16"})
    return info


def collect(name: str, folders: list[str]) -> None:
    """Put the finished runs in ``folders`` into ``data/results/<name>``: tables, settings, the first's figures.

    A run of the same name is replaced, other runs there stay: the machine that made them may be gone.
    """
    target, names = shipped_folder() / "results" / name, [Path(folder).name for folder in folders]
    for table in ("metrics.csv", "stages.csv"):
        # A run that trained nothing has no stages.
        parts = [read_table(Path(folder) / table).assign(run=Path(folder).name) for folder in folders if (Path(folder) / table).exists()]
        if (target / table).exists():
            there = read_table(target / table, ("run",))
            parts.insert(0, there[~there["run"].isin(names)])
        if not parts:
            continue
        with replacing(target / table) as temporary:
            pd.concat(parts, ignore_index=True).to_csv(temporary, index=False)
    runs = read_json(target / "runs.json") if (target / "runs.json").exists() else {}
    runs = {run: about for run, about in runs.items() if run not in names}
    write_json(target / "runs.json", runs | {Path(folder).name: read_json(Path(folder) / "config.json") for folder in folders})
    for figure in ("samples", "steps", "fd"):
        # A run that is still going has not drawn all of them.
        if (drawn := Path(folders[0]) / "figures" / f"{figure}.png").exists():
            with replacing(target / f"{figure}.png") as temporary:
                temporary.write_bytes(drawn.read_bytes())


@command
def main(arguments: Sequence[str]) -> None:
    """The command of this module."""
    what, *words = arguments or [""]
    if not what or (what in ("results", "students", "checkpoints") and len(words) < 2):
        raise SferdError("too few words; --help says what is expected")
    if what == "results":
        collect(words[0], words[1:])
    elif what in ("students", "checkpoints"):
        ship_students(*words, beside="checkpoints" if what == "checkpoints" else "")
    else:
        ship(what, **parse_literals(words))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
