"""The tables as one figure, ``data/results/speed.png``: ``python tests/benchmarks/figure.py``."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from common import RESULTS, ratios
from matplotlib.axes import Axes

from sferd_lab.files import replacing

COLOURS = plt.get_cmap("tab10").colors


def bars(axes: Axes, title: str, found: pd.DataFrame, targets: dict[float, str]) -> None:
    """A bar for each row's ``ratio`` from ``low`` to ``high``, with its ``name``, and the targets as lines."""
    found = found.iloc[::-1].reset_index(drop=True)
    axes.barh(
        found.index, found["ratio"], xerr=[found["ratio"] - found["low"], found["high"] - found["ratio"]], color=COLOURS[0], capsize=2
    )
    axes.set_yticks(found.index, found["name"], fontsize=8)
    for (value, label), colour in zip(targets.items(), COLOURS[1:], strict=False):
        axes.axvline(value, color=colour, linestyle="--", linewidth=1, label=label)
    axes.set_xlim(left=0)
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.07), ncols=2, frameon=False)


def network_ratios() -> pd.DataFrame:
    """Peers' training step and forward pass over ours."""
    table = pd.read_csv(RESULTS / "network_speed.csv")
    peer = table[table["network"] != "diffusers, stock"]
    long = [
        pd.DataFrame(
            {
                "comparison": name,
                "case": peer["size"],
                "what": peer["network"].replace({"diffusers, same arrangement": "a peer"}),
                "repetition": peer["repetition"],
                "seconds": peer[f"{name}_seconds"],
            }
        ).sort_values(["what", "case"])
        for name in ("step", "forward")
    ]
    found = ratios(pd.concat(long))
    return found.assign(name=found["comparison"] + ", " + found["case"].astype(str) + " px")


def growth(axes: Axes, table: pd.DataFrame, axis: str) -> None:
    """Time and memory of a training step against ``axis``, both logarithmic."""
    part = table[table["axis"] == axis].assign(memory=table["peak_mib"] - table["imported_mib"])
    median = part.groupby("value")[["seconds", "memory"]].median()
    axes.loglog(median.index, 1000 * median["seconds"], "o-", color=COLOURS[0], label="ms a training step")
    axes.loglog(median.index, median["memory"], "s--", color=COLOURS[1], label="MiB above imports")
    axes.set_xticks(median.index, [str(value) for value in median.index])
    axes.minorticks_off()
    axes.set_xlabel(axis)
    axes.set_title(f"a training step against {axis}", fontsize=9)
    axes.legend(fontsize=7)


def main() -> None:
    """Draw and write it."""
    figure, axes = plt.subplots(2, 4, figsize=(18, 8), layout="constrained")
    bars(axes[0, 0], "diffusers' blocks in our arrangement, over ours", network_ratios(), {1: "equal", 1.5: "aimed at"})
    loops = ratios(pd.read_csv(RESULTS / "loop_speed.csv"))
    kind, _, rest = (loops["comparison"].str.partition(", ")[column] for column in range(3))
    loops["name"] = rest.where(rest != "", loops["what"]) + ", " + loops["case"]
    bars(axes[0, 1], "diffusers' DDIM loop over ours", loops[kind == "sampler"], {1: "equal"})
    bars(axes[0, 2], "a distillation step over the passes in it", loops[kind == "distillation"], {1: "ideal", 1.1: "aimed at, at most"})
    one = loops[kind == "one step"].assign(name=loops["what"].str.removesuffix(", 1 step") + ", " + loops["case"])
    bars(axes[0, 3], "64-step teacher over one-step students", one, {30: "aimed at, with SGP and prior", 60: "aimed at, plain"})
    metrics = ratios(pd.read_csv(RESULTS / "metric_speed.csv"))
    metrics["name"] = metrics["comparison"].str.replace("precision, recall, density, coverage", "precision ... coverage")
    bars(axes[1, 0], "metrics' peers over ours, 10,000 images", metrics, {1: "equal"})
    grown = pd.read_csv(RESULTS / "growth.csv")
    for place, axis in zip(axes[1, 1:], ("batch", "image size", "ensemble size"), strict=True):
        growth(place, grown, axis)
    with replacing(RESULTS / "speed.png") as temporary:
        figure.savefig(temporary, dpi=90, format="png")


if __name__ == "__main__":
    main()
