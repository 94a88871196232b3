"""Tables read from a run folder: scores at a glance, what each part of the method does, and whether the scores can be trusted.

``python -m sferd_lab.report RUN_FOLDER ...`` prints the first and the names of the files; for several runs, ratios over their seeds.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd

from sferd_lab.experiment import Row, Run, read_table
from sferd_lab.metrics import known_bad

# The columns of ``summary``, where a run has them.
SUMMARY = [
    *("fd", "kid", "precision", "recall", "density", "coverage", "memorisation_ratio", "teacher_mse"),
    *("nfe_teacher", "nfe_student", "nfe_gradient", "nfe_prior", "sampling_mflops_per_image", "sampling_ms_per_image"),
]


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """One line a set of samples: its scores, evaluations and cost; the first line is the floor, real images against real images."""
    rows = table[table["metric"].isin(SUMMARY)]
    names = rows[list(Row.__dataclass_fields__)].apply(lambda row: Row(*row).label, axis=1)
    wide = rows.assign(samples=names).pivot_table(index="samples", columns="metric", values="value", sort=False)
    floor = rows.dropna(subset="floor").drop_duplicates("metric").set_index("metric")["floor"].rename("floor: real images")
    wide = pd.concat([floor.to_frame().T, wide])
    return wide[[column for column in SUMMARY if column in wide]]


def effects(table: pd.DataFrame, metric: str = "fd") -> pd.DataFrame:
    """What guidance and the semantic gradient predictor each do: ``metric`` of each method and step count, and ratios to the plain student.

    One training seed: ratios within about the floor's own spread of 1 are noise. Codes come from the prior.
    """
    rows = table[(table["metric"] == metric) & table["method"].isin(("pd", "cd")) & table["z"].isin(("", "prior"))]
    name = rows["guidance"].map({False: "", True: "+guidance"}) + rows["sgp"].map(lambda sgp: "+sgp" if sgp else "")
    wide = rows.assign(variant=name.replace("", "plain")).pivot_table(
        index=["method", "steps"], columns="variant", values="value", sort=False
    )
    for variant in [column for column in wide if column != "plain"]:
        wide[f"{variant} / plain"] = wide[variant] / wide["plain"]
    return wide


def known_bad_verdicts(run: Run) -> pd.DataFrame:
    """For each set that is bad by construction: the metric that must see it, its value, the best teacher's, and whether it ranks below."""
    table, counts = run.table(), run.settings.teacher_sampling_steps
    images, labels = run.data.train.images, run.data.train.labels
    watch = {Row(name): metric for name, (_, metric) in known_bad(images, labels, run.settings.n_samples, run.settings.seed).items()}
    if 4 in counts[:-1]:
        watch[Row("teacher", sampler="ddim", steps=4)] = "fd"

    def value(row: Row, metric: str) -> float:
        chosen = (table[list(asdict(row))] == list(asdict(row).values())).all(axis=1) & (table["metric"] == metric)
        return float(table.loc[chosen, "value"].iloc[0])

    best = run.yardstick_row
    lines = [(row.label, metric, value(row, metric), value(best, metric)) for row, metric in watch.items()]
    verdicts = pd.DataFrame(lines, columns=["samples", "metric", "value", "teacher"])
    higher_is_better = verdicts["metric"] != "fd"
    verdicts["ranks below the teacher"] = (verdicts["value"] < verdicts["teacher"]) == higher_is_better
    return verdicts


def ratios(table: pd.DataFrame, metric: str = "fd", level: float = 0.95) -> pd.DataFrame:
    """Ratios of ``metric`` to the plain student of the same method, step count and seed, over the seeds in ``table``.

    The geometric mean with a t interval on the log ratio (``low``, ``high``; undefined for one seed), and the plain student's own mean.
    Within a seed all rows share their sampling noise, so the ratio is paired.
    """
    from scipy import stats

    parts = [effects(part, metric).assign(seed=seed).set_index("seed", append=True) for seed, part in table.groupby("seed")]
    wide = pd.concat(parts)
    lines = []
    for (method, steps), group in wide.groupby(level=["method", "steps"], sort=False):
        for variant in (column for column in group if column.endswith(" / plain")):
            logs = np.log(group[variant].dropna())
            if len(logs):
                half = stats.t.ppf(0.5 + level / 2, len(logs) - 1) * logs.std(ddof=1) / len(logs) ** 0.5 if len(logs) > 1 else np.nan
                low, middle, high = np.exp([logs.mean() - half, logs.mean(), logs.mean() + half])
                lines.append((method, steps, variant.removesuffix(" / plain"), group["plain"].mean(), middle, low, high, len(logs)))
    return pd.DataFrame(lines, columns=["method", "steps", "variant", f"plain {metric}", "ratio", "low", "high", "seeds"])


def main(folders: list[str]) -> None:
    """Print each run's table and where its files are; for several runs also the ratios over their seeds."""
    columns = ["fd", "kid", "recall", "coverage", "memorisation_ratio", "teacher_mse", "sampling_mflops_per_image"]
    tables = [read_table(Path(folder) / "metrics.csv") for folder in folders]
    for folder, table in zip(map(Path, folders), tables, strict=True):
        wide = summary(table)
        text = wide[[column for column in columns if column in wide]].to_string(float_format=lambda value: f"{value:.4g}", na_rep="")
        files = "\n".join(f"  {file}" for file in sorted(folder.iterdir()) if not file.name.startswith("."))
        network = table["features"][table["features"] != ""].iloc[0]
        sys.stdout.write(f"\n{text}\n\nFD is on the features of {network}, not Inception's.\n{files}\n")
    if len(tables) > 1:
        text = ratios(pd.concat(tables)).to_string(index=False, float_format=lambda value: f"{value:.3g}")
        sys.stdout.write(f"\nFD as a ratio to the plain student, with a 95% interval over seeds\n{text}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
