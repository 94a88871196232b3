"""Tables read from a run folder: scores at a glance, what each part of the method does, and whether the scores can be trusted.

``python -m sferd_lab.report RUN_FOLDER ...`` prints the first and the names of the files; for several runs, ratios over their seeds.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd

from sferd_lab.errors import SferdError, command
from sferd_lab.experiment import Row, Run, read_table, stage_name
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

    One training seed: ratios within about the floor's own spread of 1 are noise. Codes come from the prior. Without a plain student there
    are no ratios. Raises SferdError for two numbers of one student, as tables of several runs have.
    """
    rows = table[(table["metric"] == metric) & table["method"].isin(("pd", "cd")) & table["z"].isin(("", "prior"))]
    name = rows["guidance"].map({False: "", True: "+guidance"}) + rows["sgp"].map(lambda sgp: "+sgp" if sgp else "")
    rows = rows.assign(variant=name.replace("", "plain"))
    if (twice := rows.duplicated(["method", "steps", "variant"])).any():
        told = rows[twice].iloc[0]
        raise SferdError(f"two numbers of '{told['method']} {told['variant']} {told['steps']}' ({metric}); allowed: one a seed")
    wide = rows.pivot_table(index=["method", "steps"], columns="variant", values="value", sort=False)
    for variant in [column for column in wide if "plain" in wide and column != "plain"]:
        wide[f"{variant} / plain"] = wide[variant] / wide["plain"]
    return wide


def known_bad_verdicts(run: Run) -> pd.DataFrame:
    """For each set that is bad by construction: the metric that must see it, its value, the best teacher's, and whether it ranks below."""
    table, counts = run.table(), run.settings.teacher_sampling_steps
    images, labels = run.data.train.images, run.data.train.labels
    watch = {Row(name): metric for name, (_, metric) in known_bad(images, labels, run.settings.n_samples, run.settings.seed).items()}
    if 4 in counts and max(counts) > 4:
        watch[Row("teacher", sampler="ddim", steps=4)] = "fd"

    def value(row: Row, metric: str) -> float:
        return float(by_seed(table, row, metric).iloc[0])

    best = run.yardstick_row
    lines = [(row.label, metric, value(row, metric), value(best, metric)) for row, metric in watch.items()]
    verdicts = pd.DataFrame(lines, columns=["samples", "metric", "value", "teacher"])
    higher_is_better = verdicts["metric"] != "fd"
    verdicts["ranks below the teacher"] = (verdicts["value"] < verdicts["teacher"]) == higher_is_better
    return verdicts


def of_row(table: pd.DataFrame, row: Row, metric: str = "fd") -> pd.DataFrame:
    """The lines of ``table`` (runs' ``metrics.csv``) that are ``metric`` of the samples that ``row`` names."""
    return table[(table[list(asdict(row))] == list(asdict(row).values())).all(axis=1) & (table["metric"] == metric)]


def by_seed(table: pd.DataFrame, row: Row, metric: str = "fd") -> pd.Series:
    """``metric`` of the samples that ``row`` names, in ``table`` (runs' ``metrics.csv``): one number a seed, in the order of seeds.

    Raises SferdError when the table has none, or two of one seed, as tables of several studies have.
    """
    found = of_row(table, row, metric).set_index("seed")["value"].sort_index()
    if found.empty or found.index.has_duplicates:
        raise SferdError(f"{len(found)} numbers of '{row.label}' ({metric}) for seeds {sorted(set(found.index))}; allowed: one a seed")
    return found


def ratio(mine: pd.Series, plain: pd.Series, level: float = 0.95) -> tuple[float, float, float, int]:
    """The geometric mean of ``mine`` over ``plain`` on the seeds that both have, the ends of its t interval, and how many these are.

    The first three are NaN where a score is not above 0, as an unbiased KID may be: no seed is left out for its value. Raises SferdError
    when they have no seed in common.
    """
    mine, plain = mine.align(plain, join="inner")
    if mine.empty:
        raise SferdError("the two have no seed in common; allowed: one or more")
    if not ((mine > 0) & (plain > 0)).all():
        return np.nan, np.nan, np.nan, len(mine)
    middle, low, high = np.exp(over_seeds(np.log(mine / plain), level))
    return float(middle), float(low), float(high), len(mine)


def over_seeds(values: pd.Series, level: float = 0.95) -> tuple[float, float, float]:
    """The mean of one value a seed, and the ends of its t interval, which are undefined for one seed."""
    from scipy import stats

    half = stats.t.ppf(0.5 + level / 2, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.nan
    return values.mean(), values.mean() - half, values.mean() + half


def ratios(table: pd.DataFrame, metric: str = "fd", level: float = 0.95) -> pd.DataFrame:
    """What guidance and SGP change, over the seeds in ``table``, each with a t interval: paired, for a seed's rows share their noise.

    ``ratio``: the geometric mean of ``metric`` over the plain student's of the same method, step count and seed (``low``, ``high``).
    ``closed``: the share of the way from the plain student to the many-step teacher, (plain - variant) / (plain - teacher).
    """
    parts = []
    for seed, part in table.groupby("seed"):
        teacher = part[(part["method"] == "teacher") & (part["metric"] == metric) & (part["sampler"] == "ddim") & ~part["guidance"]]
        teacher = teacher[teacher["sgp"] == ""].sort_values("steps")["value"]
        best = teacher.iloc[-1] if len(teacher) else np.nan
        parts.append(effects(part, metric).assign(seed=seed, teacher=best).set_index("seed", append=True))
    lines = []
    for (method, steps), group in pd.concat(parts).groupby(level=["method", "steps"], sort=False):
        for variant in (column.removesuffix(" / plain") for column in group if column.endswith(" / plain")):
            both = group.dropna(subset=variant)
            if len(both):
                closed = (both["plain"] - both[variant]) / (both["plain"] - both["teacher"])
                values = [both["plain"].mean(), *ratio(both[variant], both["plain"], level)[:3], *over_seeds(closed, level), len(both)]
                lines.append([method, steps, variant, *values])
    columns = [f"plain {metric}", "ratio", "low", "high", "closed", "closed_low", "closed_high", "seeds"]
    return pd.DataFrame(lines, columns=["method", "steps", "variant", *columns])


def verdict(table: pd.DataFrame, method: str, variant: str, steps: int = 1, metric: str = "fd") -> str:
    """What the interval of ``ratios`` says of a variant against its plain student: "better", "worse" or "undecided"; lower is better.

    Raises SferdError for a variant that the table has no two seeds of.
    """
    found = ratios(table, metric)
    row = found[(found["method"] == method) & (found["variant"] == variant) & (found["steps"] == steps) & (found["seeds"] > 1)]
    if row.empty:
        has = sorted({f"{line.method} {line.variant} {line.steps}" for line in found[found["seeds"] > 1].itertuples()})
        raise SferdError(f"no two seeds of '{method} {variant} {steps}'; allowed: {', '.join(has) or 'none'}")
    return "better" if row["high"].iloc[0] < 1 else "worse" if row["low"].iloc[0] > 1 else "undecided"


def headline(table: pd.DataFrame, metric: str = "fd") -> pd.DataFrame:
    """``metric`` by kind of sample and step count: mean and standard deviation over the seeds in ``table``, as text."""
    rows = table[(table["metric"] == metric) & (table["steps"] > 0)]
    names = rows[list(Row.__dataclass_fields__)].apply(lambda row: Row(*row).label.rpartition(", ")[0], axis=1)
    grouped = rows.assign(samples=names).groupby(["samples", "steps"], sort=False)["value"]
    text = grouped.mean().map("{:.3g}".format) + grouped.std(ddof=1).map(lambda sd: "" if np.isnan(sd) else f" ± {sd:.2g}")
    wide = text.unstack("steps").fillna("")
    return wide.loc[list(dict.fromkeys(names)), sorted(wide.columns)]


def training_tflop(stages: pd.DataFrame, row: Row) -> float:
    """What training the student of ``row`` took beyond its teacher, every stage on its way counted, of one run's ``stages.csv``."""
    cost = stages.set_index("stage")["tflop"]
    plain, conditional = stage_name(row.method, row.guidance), row.sgp == "conditional"
    name = plain + "-sgp" * conditional
    wanted = []
    for stage in cost.index if row.method != "teacher" else []:
        halving = re.fullmatch(rf"{re.escape(name)}-(\d+)", stage)
        if stage == name or (halving and int(halving[1]) >= row.steps):
            wanted.append(stage)
    if row.sgp:
        wanted.append("teacher-sgp" if conditional else f"{plain}-{row.steps}-sgp")
        if row.z == "prior" and f"{wanted[-1]}-latent" in cost:  # what draws the codes, where that is trained, too
            wanted.append(f"{wanted[-1]}-latent")
    return float(cost[wanted].sum())


@command
def main(folders: Sequence[str]) -> None:
    """Print each run's table and where its files are; for several runs also the ratios over their seeds."""
    if not folders:
        raise SferdError("no run folder; allowed: one or more")
    columns = ["fd", "kid", "recall", "coverage", "memorisation_ratio", "teacher_mse", "sampling_mflops_per_image"]
    expected = (*Row.__dataclass_fields__, "seed", "metric", "value", "floor", "features")
    tables = [read_table(Path(folder) / "metrics.csv", expected) for folder in folders]
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
    sys.exit(main(sys.argv[1:]))
