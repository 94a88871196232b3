"""The licences of what this package needs, as the installed packages state them.

.venv/bin/python tests/licences.py writes data/results/licences.csv: package, extra ("" for what is always needed) and licence.
"""

from __future__ import annotations

import tomllib
from importlib import metadata
from pathlib import Path

import pandas as pd
from packaging.requirements import Requirement

from sferd_lab.files import replacing

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "data" / "results" / "licences.csv"
NOT_HERE = "not installed here"


def licence(package: str) -> str:
    """The licence expression of an installed package, else its classifiers, else the first line of its licence field."""
    try:
        about = metadata.metadata(package)
    except metadata.PackageNotFoundError:
        return NOT_HERE
    classifiers = [line.rsplit(" :: ", 1)[1] for line in about.get_all("Classifier") or [] if line.startswith("License ::")]
    return about.get("License-Expression") or "; ".join(classifiers) or (about.get("License") or "not stated").splitlines()[0]


def direct() -> dict[str, str]:
    """Every direct dependency of ``pyproject.toml`` with the extra that asks for it first."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    parts = {"": project["dependencies"], **project["optional-dependencies"]}
    found: dict[str, str] = {}
    for extra, texts in parts.items():
        for text in texts:
            found.setdefault(Requirement(text).name, extra)
    return found


def table() -> pd.DataFrame:
    """A line a direct dependency."""
    lines = [(package, extra, licence(package)) for package, extra in sorted(direct().items())]
    return pd.DataFrame(lines, columns=["package", "extra", "licence"])


if __name__ == "__main__":
    with replacing(TABLE) as temporary:
        table().to_csv(temporary, index=False)
