"""The tables of results in README.md and data/results/README.md, written from the committed rows.

.venv/bin/python tests/tables.py writes both files; with --check it writes nothing and fails when they are out of date.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import pandas as pd

from sferd_lab import report
from sferd_lab.experiment import Row, read_table
from sferd_lab.files import replacing

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "data" / "results"
FILES = ROOT / "README.md", RESULTS / "README.md"
PLAIN = {method: Row(method, sampler="ddim" if method == "pd" else "consistency") for method in ("pd", "cd")}
TEACHER = Row("teacher", sampler="ddim")
FORM = {"pd": "x0", "cd": "x0-cd"}  # how the digits' studies of both parts with guidance in the paper's form end
MASKS = "random", "inverse", "full"  # of the controls with guidance in the paper's form
TUNED = {  # the digits' trials of plain PD with the pair's training, each with one setting changed: how its runs are called
    **{f"learning rate {rate}": f"pd_lr-{rate}" for rate in (0.0005, 0.002, 0.004)},
    **{f"average's decay {decay}": f"ema_decay-{decay}" for decay in (0.95, 0.998)},
    "loss on x0": "pd_loss-x0_snr",
    "a longer last stage": "pd_stage_steps-200x400x1400",
    "from 4 steps": "pd_start_steps-4-pd_stage_steps-800x1200",
    "from 16 steps": "pd_start_steps-16-pd_stage_steps-400x400x400x800",
    "twice the batch, half the steps": "batch_size-128-pd_stage_steps-200x400x400",
}
FACTORS = "1.05", "1.1", "1.15", "1.2"  # of the control of contrast


@dataclass(frozen=True)
class Line:
    """One line of a table: a name, the samples, and the folder of results (for the digits' controls also the study) that they are in."""

    name: str
    row: Row
    folder: str
    study: str = ""

    def scores(self, steps: int, metric: str = "fd") -> pd.Series:
        """One number a seed, none where there is no such row. Raises SferdError for two numbers of one seed."""
        told = rows_of(self.folder, self.study), replace(self.row, steps=steps), metric
        return pd.Series(dtype=float) if report.of_row(*told).empty else report.by_seed(*told)

    def over(self, plain: Line, steps: int, metric: str = "fd", theirs: int | None = None) -> str:
        """The ratio to ``plain`` (in ``theirs`` steps, if other) with its interval; of one seed the ratio alone. Bold: it lies below 1."""
        mine, theirs = self.scores(steps, metric), theirs or steps
        if mine.empty or (self.row, self.folder, self.study, steps) == (plain.row, plain.folder, plain.study, theirs):
            return "" if mine.empty else "1"
        middle, low, high, seeds = report.ratio(mine, plain.scores(theirs, metric))
        if seeds == 1:
            return f"{middle:.2f}"
        text = f"{middle:.2f} [{low:.2f}, {high:.2f}]"
        return f"**{text}**" if high < 1 else text

    def closed(self, plain: Line, teacher: Line) -> str:
        """The share of the way from the plain student's one step to the teacher's 64 that this one goes, with its interval."""
        table = pd.DataFrame({"mine": self.scores(1), "plain": plain.scores(1), "teacher": teacher.scores(64)}).dropna()
        if table.empty:
            return ""
        middle, low, high = report.over_seeds((table["plain"] - table["mine"]) / (table["plain"] - table["teacher"]))
        return f"{middle:.2f}" + (f" [{low:.2f}, {high:.2f}]" if len(table) > 1 else "")


@cache
def rows_of(folder: str, study: str = "") -> pd.DataFrame:
    table = read_table(RESULTS / folder / "metrics.csv")
    return table[table["run"].str.fullmatch(rf"{re.escape(study)}-seed\d+")] if study else table


def spread(values: pd.Series) -> str:
    """Mean and standard deviation over seeds; the mean alone of one."""
    if values.empty:
        return ""
    return digits_of(values.mean(), 3) + (f" ± {digits_of(values.std(ddof=1), 2)}" if len(values) > 1 else "")


def digits_of(value: float, significant: int) -> str:
    return f"{value:#.{significant}g}".rstrip(".")


def span(seeds: list[int]) -> str:
    consecutive = len(seeds) > 2 and seeds == list(range(seeds[0], seeds[-1] + 1))
    return f"{seeds[0]} to {seeds[-1]}" if consecutive else ", ".join(map(str, seeds))


def with_sgp(method: str, guidance: bool = False, z: str = "prior", target: str = "conditional") -> Row:
    return replace(PLAIN[method], guidance=guidance, sgp=target, z=z)


def digits(method: str) -> list[Line]:
    """Every line of the digits for one method of distillation."""
    own, upper, guided = "digits-controls", method.upper(), replace(PLAIN[method], guidance=True)
    lines = [
        Line(upper, PLAIN[method], "digits"),
        Line(f"{upper}, trained longer", PLAIN[method], own, "long"),
        *(Line(f"the same, {name}", PLAIN[method], "digits-tuning", f"tuning-{run}") for name, run in TUNED.items()),
        *(Line(f"{upper}, images {factor} times as far from black", PLAIN[method], own, f"contrast-{factor}") for factor in FACTORS),
        Line(f"{upper} + guidance, the paper's form (x0)", guided, own, "guidance-x0"),
        *(Line(f"the same, mask: {name}", guided, own, f"mask-x0-{name}") for name in MASKS),
        Line(f"{upper} + guidance, the code's form (eps)", guided, "digits"),
        *(Line(f"the same, mask: {name}", guided, own, f"mask-{name}") for name in ("random", "inverse", "edge", "full")),
        Line("the same, guided in every stage", guided, own, "guidance-every"),
        Line(f"{upper} + SGP, the paper's order (walk target, latent diffusion)", with_sgp(method, target="walk"), own, "paper"),
        Line(
            f"SFERD-{upper}: both, the paper's order and guidance (x0)", with_sgp(method, True, target="walk"), own, f"paper-{FORM[method]}"
        ),
        Line(f"{upper} + both, the paper's order, guidance eps", with_sgp(method, True, target="walk"), own, "paper"),
        Line(f"{upper} + SGP, the release's target (data)", with_sgp(method, target="data"), own, "data"),
        Line(f"{upper} + SGP, preset (mixture prior)", with_sgp(method), "digits"),
        Line("the same, codes of real images", with_sgp(method, z="encoder"), "digits"),
        Line(f"{upper} + both, preset, guidance eps", with_sgp(method, True), "digits"),
        Line(f"{upper} + SGP, preset, kernel prior", with_sgp(method), own, "kernel"),
        Line(f"{upper} + SGP, preset, latent diffusion", with_sgp(method), own, "diffusion"),
        Line(f"{upper} + SGP, whole chain, mixture prior", with_sgp(method), own, "chain"),
        Line("the same, codes of real images", with_sgp(method, z="encoder"), own, "chain"),
        Line("the same, told no code", with_sgp(method), own, "blind"),
        Line(f"{upper} + SGP, improved (whole chain, kernel prior)", with_sgp(method), own, "improved"),
        Line("the same, from 16 steps", with_sgp(method), "digits-tuning", "improved-x0-16"),
        Line(f"SFERD-{upper}: both, improved, guidance x0", with_sgp(method, True), own, f"improved-{FORM[method]}"),
        Line("the same, from 16 steps", with_sgp(method, True), "digits-tuning", "improved-x0-16"),
        Line(f"{upper} + both, improved, guidance eps", with_sgp(method, True), own, "improved"),
    ]
    return [line for line in lines if len(line.scores(1))]


def fashion(method: str) -> list[Line]:
    """Every line of Fashion-MNIST for one method of distillation."""
    upper, name, guided = method.upper(), "fashion16", replace(PLAIN[method], guidance=True)
    lines = [
        Line(upper, PLAIN[method], name),
        Line(f"{upper}, trained as long as the preset's pair", PLAIN[method], f"{name}-long"),
        Line(f"{upper}, trained as long as SFERD-{upper}, improved", PLAIN[method], f"{name}-longest"),
        *(
            Line(f"{upper}, images {factor} times as far from black", PLAIN[method], f"{name}-contrast", f"contrast-{factor}")
            for factor in FACTORS
        ),
        Line(f"{upper} + guidance, the paper's form (x0)", guided, f"{name}-guidance-x0"),
        *(Line(f"the same, mask: {mask}", guided, f"{name}-mask-x0", f"{name}-mask-x0-{mask}") for mask in MASKS),
        Line(f"{upper} + guidance, the code's form (eps)", guided, name),
        Line(f"{upper} + SGP, the paper's order (walk target, latent diffusion)", with_sgp(method, target="walk"), f"{name}-paper"),
        Line(f"SFERD-{upper}: both, the paper's order and guidance (x0)", with_sgp(method, True, target="walk"), f"{name}-paper"),
        Line(f"{upper} + SGP, preset (mixture prior)", with_sgp(method), name),
        Line("the same, codes of real images", with_sgp(method, z="encoder"), name),
        Line("the same, kernel prior", with_sgp(method), f"{name}-kernel"),
        Line("the same, latent diffusion", with_sgp(method), f"{name}-diffusion"),
        Line(f"{upper} + SGP, improved (12,000 steps of encoder and predictor, kernel prior)", with_sgp(method), f"{name}-improved"),
        Line("the same, codes of real images", with_sgp(method, z="encoder"), f"{name}-improved"),
        *(
            Line(f"the same, images {factor} times as far from black", with_sgp(method), f"{name}-contrast", f"improved-contrast-{factor}")
            for factor in FACTORS
        ),
        Line("the same, mixture prior", with_sgp(method), f"{name}-improved-mixture"),
        Line("the same, told no code", with_sgp(method), f"{name}-blind"),
        Line(f"SFERD-{upper}: both, improved, guidance x0", with_sgp(method, True), f"{name}-improved-x0"),
    ]
    return [line for line in lines if len(line.scores(1))]


def one_study(name: str, method: str) -> list[Line]:
    """Every line of a data set whose students are all of one study, for one method of distillation."""
    upper, guided = method.upper(), replace(PLAIN[method], guidance=True)
    lines = [
        Line(upper, PLAIN[method], name),
        Line(f"{upper} + guidance, the paper's form (x0)", guided, name),
        Line(f"{upper} + SGP, improved (kernel prior)", with_sgp(method), name),
        Line("the same, codes of real images", with_sgp(method, z="encoder"), name),
        Line(f"SFERD-{upper}: both, improved, guidance x0", with_sgp(method, True), name),
        Line("the same, codes of real images", with_sgp(method, True, z="encoder"), name),
    ]
    return [line for line in lines if len(line.scores(1))]


TOLD = Row("teacher", sgp="conditional", z="prior", sampler="ddim")


def undistilled() -> list[Line]:
    return [
        Line("z-conditional teacher, preset, mixture prior", TOLD, "fashion16"),
        Line("z-conditional teacher, improved, kernel prior", TOLD, "fashion16-improved"),
        Line("the same with guidance x0", replace(TOLD, guidance=True), "fashion16-improved-x0"),
    ]


def markdown(columns: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [columns, ["---"] * len(columns), *lines])


def floor(folder: str, metric: str = "fd") -> str:
    row = rows_of(folder).query("metric == @metric and floor.notna()").iloc[0]
    return f"{digits_of(row['floor'], 3)} ± {digits_of(row['floor_sd'], 2)}"


def every_line(folder: str, of_method: Callable[[str], list[Line]], more: list[Line]) -> str:
    """The whole table of a data set."""
    columns = ["samples", "seeds", "1 step", "2 steps", "4 steps", "16 steps", "64 steps", "1 step over plain", "2 steps", "4 steps"]
    columns += ["1 step, second network", "gap closed, 1 step", "1000 KID", "recall", "neighbour ratio", "MFLOP an image"]
    own = ("digits-controls", "teacher") if folder == "digits" else (folder,)  # which has a study of its own, with more step counts
    samplers = {"DDIM": TEACHER, "Heun": replace(TEACHER, sampler="heun")}
    teachers = [line for name, row in samplers.items() if len((line := Line(f"teacher, {name}", row, *own)).scores(1))]
    lines = [["real images", "", f"floor: {floor(folder)}", *[""] * 13]]
    for line in [*teachers, *of_method("pd"), *of_method("cd"), *more]:
        scores = [line.scores(steps) for steps in (1, 2, 4, 16, 64)]
        cells = [line.name, span(next(filter(len, scores)).index.tolist()), *map(spread, scores)]
        if line.row.method in PLAIN:
            plain = Line("", PLAIN[line.row.method], folder)
            cells += [line.over(plain, 1), line.over(plain, 2), line.over(plain, 4), line.over(plain, 1, "fd_second")]
            cells.append("0" if line.over(plain, 1) == "1" else line.closed(plain, teachers[0]))
            cells.append(digits_of(1000 * line.scores(1, "kid").mean(), 3))
            cells += [f"{line.scores(1, metric).mean():.2f}" for metric in ("recall", "memorisation_ratio")]
        else:
            cells += [""] * 8
        price = line.scores(1, "sampling_mflops_per_image")  # not every line has a first step
        cells.append("" if price.empty else f"{price.iloc[0]:.1f}")
        lines.append(cells)
    return markdown(columns, lines)


def headline() -> str:
    """What a reader wants first: both data sets, the paper's recipe and the improved one beside plain students, teacher and floor."""
    own, far = "digits-controls", "fashion16-improved"
    far_both, far_guided, far_in_order = f"{far}-x0", "fashion16-guidance-x0", "fashion16-paper"
    told: list[tuple[str, Line, Line]] = []
    for method in PLAIN:
        upper, plain, both = method.upper(), PLAIN[method], with_sgp(method, True)
        told += [
            (upper, Line("", plain, "digits"), Line("", plain, "fashion16")),
            (
                f"{upper} + guidance, the paper's form",
                Line("", replace(plain, guidance=True), own, "guidance-x0"),
                Line("", replace(plain, guidance=True), far_guided),
            ),
            (
                f"{upper} + SGP, the paper's order",
                Line("", with_sgp(method, target="walk"), own, "paper"),
                Line("", with_sgp(method, target="walk"), far_in_order),
            ),
            (
                f"SFERD-{upper}: both, the paper's order",
                Line("", replace(both, sgp="walk"), own, f"paper-{FORM[method]}"),
                Line("", replace(both, sgp="walk"), far_in_order),
            ),
            (f"{upper} + SGP, improved", Line("", with_sgp(method), own, "improved"), Line("", with_sgp(method), far)),
            (f"SFERD-{upper}: both, improved", Line("", both, own, f"improved-{FORM[method]}"), Line("", both, far_both)),
        ]
    sets = {"digits": "digits", "fashion16": "Fashion"}
    columns = ["FD", *(text for name in sets.values() for text in (f"{name}: seeds", "1 step", "2 steps", "4 steps", "1 step over plain"))]
    lines = [["real images (floor)", *(cell for name in sets for cell in ("", floor(name), "", "", ""))]]
    teachers = [Line("", TEACHER, name) for name in sets]
    many = [(span(line.scores(64).index.tolist()), spread(line.scores(64)), "", "", "") for line in teachers]
    lines.append(["teacher, 64 steps", *(cell for cells in many for cell in cells)])
    for name, *pair in [("teacher, as few steps", *teachers), *told]:
        cells = [name]
        for folder, line in zip(sets, pair, strict=True):
            if line.scores(1).empty:
                cells += [""] * 5
                continue
            plain = PLAIN.get(line.row.method)
            cells += [span(line.scores(1).index.tolist()), *(spread(line.scores(steps)) for steps in (1, 2, 4))]
            cells.append(line.over(Line("", plain, folder), 1) if plain else "")
        lines.append(cells)
    return markdown(columns, lines)


def best(plain: Row, folder: str, studies: Iterable[str]) -> Line:
    """The line of whichever study is best in one step, on the seeds that all of them have."""
    lines = {study: Line("", plain, folder, study) for study in studies}
    return lines[pd.DataFrame({study: line.scores(1) for study, line in lines.items()}).dropna().mean().idxmin()]


def brightened(plain: Row, folder: str) -> Line:
    """A student's images stretched away from black by whichever factor is best for them."""
    return best(plain, folder, (f"contrast-{factor}" for factor in FACTORS))


COMPARED = (  # a name for readers, what is asked about in one step, what it is held against, in how many steps
    ("SFERD-PD over PD", "both", "plain", 1),
    ("SFERD-PD over PD + SGP: what guidance adds", "both", "pair", 1),
    ("SFERD-PD over the teacher's 64 steps", "both", "teacher", 64),
    ("PD + SGP over PD", "pair", "plain", 1),
    ("the same, mixture prior", "mixture", "plain", 1),
    ("the same, told no code", "blind", "plain", 1),
    ("PD + SGP over two steps of PD", "pair", "plain", 2),
    ("PD + SGP over brightened PD", "pair", "bright", 1),
    ("PD trained longer over PD", "long", "plain", 1),
    ("the same, the best of ten settings", "tuned", "plain", 1),
    ("SFERD-PD over PD trained longer", "both", "long", 1),
    ("SFERD-PD over the best of ten settings", "both", "tuned", 1),
    ("the same, both from 16 steps", "both from 16", "tuned", 1),
    ("PD + guidance over PD", "guided", "plain", 1),
    ("PD + guidance over brightened PD", "guided", "bright", 1),
    ("guidance at random places over guidance", "random", "guided", 1),
    ("guidance where attention is least over guidance", "inverse", "guided", 1),
    ("guidance everywhere over guidance", "full", "guided", 1),
    ("PD + SGP over PD, the paper's order", "in order", "plain", 1),
    ("SFERD-PD over PD, the paper's order", "both in order", "plain", 1),
    ("CD over PD", "CD", "plain", 1),
    ("CD + guidance over CD", "guided, CD", "CD", 1),
    ("CD + SGP over CD", "pair, CD", "CD", 1),
    ("SFERD-CD over CD", "both, CD", "CD", 1),
    ("SFERD-CD over CD trained longer", "both, CD", "long, CD", 1),
    ("SFERD-CD over CD + SGP: what guidance adds", "both, CD", "pair, CD", 1),
)


def compared_lines() -> dict[str, tuple[Line, Line | None]]:
    """What ``COMPARED`` names, on the digits and on Fashion-MNIST, where it was run."""
    own, far = "digits-controls", "fashion16"
    plain, sgp, both = PLAIN["pd"], with_sgp("pd"), with_sgp("pd", True)
    guided, guided_cd = (replace(row, guidance=True) for row in PLAIN.values())

    def line(row: Row, study: str, garments: str = "") -> tuple[Line, Line | None]:
        return Line("", row, own, study), Line("", row, f"{far}-{garments}") if garments else None

    return {
        **{
            name: (Line("", row, "digits"), Line("", row, far))
            for name, row in (("plain", plain), ("teacher", TEACHER), ("CD", PLAIN["cd"]))
        },
        "bright": (brightened(plain, own), brightened(plain, f"{far}-contrast")),
        "long": line(plain, "long", "longest"),
        "tuned": (best(plain, "digits-tuning", (f"tuning-{run}" for run in TUNED.values())), None),
        "both from 16": (Line("", both, "digits-tuning", "improved-x0-16"), None),
        "long, CD": line(PLAIN["cd"], "long", "longest"),
        "guided": line(guided, "guidance-x0", "guidance-x0"),
        **{name: (Line("", guided, own, f"mask-x0-{name}"), Line("", guided, f"{far}-mask-x0", f"{far}-mask-x0-{name}")) for name in MASKS},
        "pair": line(sgp, "improved", "improved"),
        "mixture": line(sgp, "chain", "improved-mixture"),
        "blind": line(sgp, "blind", "blind"),
        "both": line(both, "improved-x0", "improved-x0"),
        "in order": line(replace(sgp, sgp="walk"), "paper", "paper"),
        "both in order": line(replace(both, sgp="walk"), "paper-x0", "paper"),
        "guided, CD": line(guided_cd, "guidance-x0", "guidance-x0"),
        "pair, CD": line(with_sgp("cd"), "improved", "improved"),
        "both, CD": line(with_sgp("cd", True), "improved-x0-cd", "improved-x0"),
    }


def comparisons() -> str:
    """What one step is held against: ratios on both data sets, by both feature networks."""
    named, lines = compared_lines(), []
    for text, mine, other, steps in COMPARED:
        cells = [text]
        for line, against in zip(named[mine], named[other], strict=True):
            if line is None or against is None:
                cells += [""] * 3
                continue
            cells.append(span(line.scores(1).index.intersection(against.scores(steps).index).tolist()))
            cells += [line.over(against, 1, metric, steps) for metric in ("fd", "fd_second")]
        lines.append(cells)
    columns = [f"{name}{cell}" for name in ("digits", "Fashion") for cell in (": seeds", "", ", second network")]
    return markdown(["one step, FD over FD", *columns], lines)


TABLES: dict[str, Callable[[], str]] = {
    "headline": headline,
    "comparisons": comparisons,
    "digits": lambda: every_line("digits", digits, []),
    "fashion16": lambda: every_line("fashion16", fashion, undistilled()),
    "fashion28": lambda: every_line("fashion28", partial(one_study, "fashion28"), []),
    "patches": lambda: every_line("patches", partial(one_study, "patches"), [Line("z-conditional teacher, kernel prior", TOLD, "patches")]),
}


def written(text: str) -> str:
    """``text`` with what is between ``<!-- table: NAME -->`` and ``<!-- end -->`` made anew."""
    return re.sub(
        r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)",
        lambda match: f"{match[1]}\n{TABLES[match[2]]()}\n\n{match[3]}",
        text,
        flags=re.DOTALL,
    )


def main(check: bool = False) -> int:
    """Write the tables, or say which file has old ones; the exit status."""
    old = {path: text for path in FILES if (text := written(path.read_text())) != path.read_text()}
    for path, text in old.items():
        if check:
            sys.stderr.write(f"{path.relative_to(ROOT)}: its tables are not those of data/results/; run python tests/tables.py\n")
        else:
            with replacing(path) as temporary:
                temporary.write_text(text)
    return int(check and bool(old))


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
