"""Build the site: ``python docs/make_site.py [folder]``, by default into build/docs. Nothing is fetched, and a warning is an error.

The pages are gathered in a temporary folder first: what is written in docs/, the notebooks as they are, the changelog, and a page for each
module of the library. So the lists of notebooks and modules are the folders themselves, and the working tree stays clean.
"""

from __future__ import annotations

import ast
import shutil
import sys
import tempfile
from pathlib import Path

from rendering import as_rst
from sphinx.cmd.build import main as sphinx

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"


def notebooks() -> list[Path]:
    """The course."""
    return sorted((ROOT / "notebooks").glob("*.ipynb"))


def modules() -> dict[str, Path]:
    """Every public module of the library, by name, the packages among them."""
    found = {}
    for file in sorted((ROOT / "sferd_lab").rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if not any(part.startswith("_") for part in parts):
            found[".".join(parts)] = file
    return found


def api_page(name: str, file: Path) -> str:
    """The page of one module. A package's own page shows its docstring: what it re-exports is described where it is written."""
    members = "" if file.name == "__init__.py" else "   :members:\n   :show-inheritance:\n"
    return f"{name}\n{'=' * len(name)}\n\n.. automodule:: {name}\n{members}"


def api_index() -> str:
    """The modules with the first sentence of each."""
    lines = ["The library", "===========", "", "One page a module, made from its docstrings."]
    lines += ["", ".. list-table::", "   :widths: 30 70", ""]
    for name, file in modules().items():
        first = (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").splitlines()[0]
        lines += [f"   * - :doc:`{name}`", f"     - {as_rst([first])[0]}"]
    lines += ["", ".. toctree::", "   :hidden:", "", *(f"   {name}" for name in modules())]
    return "\n".join(lines) + "\n"


def gather(folder: Path) -> None:
    """Put every page's source under ``folder``."""
    for page in DOCS.glob("*.md"):
        shutil.copy2(page, folder)
    shutil.copy2(ROOT / "CHANGELOG.md", folder / "changelog.md")
    shutil.copy2(ROOT / "README.md", folder / "readme.txt")  # the index quotes a section of it
    shutil.copy2(ROOT / "data" / "results" / "digits" / "samples.png", folder)
    (folder / "notebooks").mkdir()
    for notebook in notebooks():
        shutil.copy2(notebook, folder / "notebooks")
    (folder / "api").mkdir()
    (folder / "api" / "index.rst").write_text(api_index(), encoding="utf-8")
    for name, file in modules().items():
        (folder / "api" / f"{name}.rst").write_text(api_page(name, file), encoding="utf-8")


def build(site: Path) -> int:
    """Sphinx's exit status. An earlier site in the folder ``site`` is replaced; any other folder that is not empty is refused."""
    if site.exists() and any(site.iterdir()):
        # Sphinx leaves this file in what it builds.
        if not (site / ".buildinfo").exists():
            print(f"{site} holds something other than an earlier site; allowed: a new or empty folder", file=sys.stderr)
            return 2
        shutil.rmtree(site)
    with tempfile.TemporaryDirectory() as temporary:
        source, doctrees = Path(temporary) / "source", Path(temporary) / "doctrees"
        source.mkdir()
        gather(source)
        return sphinx(["--quiet", "-W", "--keep-going", "-c", str(DOCS), "-d", str(doctrees), str(source), str(site)])


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "docs"
    status = build(target)
    if status == 0:
        print(f"{target / 'index.html'}")
    sys.exit(status)
