"""Make the files under ``data/``: ``python -m sferd_lab.ship PRESET [name=value ...]``, ``python -m sferd_lab.ship results NAME RUN ...``.

For the preset's data set it trains the feature network, writes the statistics of the reference images on it, trains the teacher and
scores it. Everything follows from the settings and their seed, so the command makes the same files again on the same machine.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd
import torch

from sferd_lab.artifacts import save_model, shipped_folder
from sferd_lab.config import make_settings, parse_literals
from sferd_lab.data import ImageData
from sferd_lab.errors import SferdError
from sferd_lab.experiment import Run, provenance, read_table
from sferd_lab.files import read_json, replacing, save_tensors, sha256, write_json
from sferd_lab.metrics import Scorer, accuracy, load_feature_network, save_feature_network, train_feature_network


def ship_features(data: ImageData) -> None:
    """Train the data set's feature network on its feature split; write it and the reference images' statistics on it."""
    if not data.classes:
        raise SferdError(f"{data.name} has no labels to train a feature network on; allowed: data sets with labels")
    folder = shipped_folder() / data.name
    network = train_feature_network(data.features.images, data.features.labels, data.classes)
    right = accuracy(network, data.reference.images, data.reference.labels)
    save_feature_network(folder / "features.safetensors", network, {"data": data.name, "reference_accuracy": right})
    network, digest = load_feature_network(folder / "features.safetensors")
    features = torch.from_numpy(Scorer(network, digest, "", data.reference.images, data.train.images[:100]).reference)
    statistics = {"mean": features.mean(0), "covariance": features.T.cov()}
    save_tensors(folder / "reference.safetensors", statistics, {"data": data.name, "n": len(features), "features_sha256": digest})


def ship(preset: str, **parameters: object) -> None:
    """Train, score and write everything that is shipped for ``preset``; what an interrupted call finished is not repeated."""
    settings = make_settings(preset, **{"retrain": True, "run_folder": f"runs/ship-{preset}", **parameters})
    run = Run(settings)
    folder = shipped_folder() / run.data.name
    if not (folder / "features.safetensors").exists():
        ship_features(run.data)
    teacher = run.teacher()
    for _ in run.evaluate_teacher():
        pass
    run.evaluate_known_bad()
    with replacing(folder / "scores.csv") as temporary:
        run.table().to_csv(temporary, index=False)
    seconds = pd.read_csv(run.folder / "stages.csv").set_index("stage")["seconds"]
    made = {"shape": list(run.shape), "data": run.data.name, "seed": settings.seed, "stage": "teacher"}
    save_model(folder / "teacher.safetensors", teacher, made)
    hashes = {name: sha256(folder / f"{name}.safetensors") for name in ("teacher", "features", "reference")}
    command = " ".join(["python -m sferd_lab.ship", preset, *(f"{name}={value}" for name, value in parameters.items())])
    about = {"command": command, "teacher_seconds": round(float(seconds["teacher"])), "sha256": hashes, "made_with": provenance()}
    write_json(folder / "made.json", {**about, "settings": settings.model_dump(mode="json")})


def collect(name: str, folders: list[str]) -> None:
    """Put the finished runs in ``folders`` together under ``data/results/<name>``: tables, settings, the first's figures."""
    target = shipped_folder() / "results" / name
    for table in ("metrics.csv", "stages.csv"):
        parts = [read_table(Path(folder) / table).assign(run=Path(folder).name) for folder in folders]
        with replacing(target / table) as temporary:
            pd.concat(parts, ignore_index=True).to_csv(temporary, index=False)
    write_json(target / "runs.json", {Path(folder).name: read_json(Path(folder) / "config.json") for folder in folders})
    for figure in ("samples", "steps", "fd"):
        with replacing(target / f"{figure}.png") as temporary:
            temporary.write_bytes((Path(folders[0]) / "figures" / f"{figure}.png").read_bytes())


if __name__ == "__main__":
    if sys.argv[1] == "results":
        collect(sys.argv[2], sys.argv[3:])
    else:
        ship(sys.argv[1], **parse_literals(sys.argv[2:]))
