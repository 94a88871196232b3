"""The documentation builds without a warning, is complete, loads nothing from elsewhere, and its links lead somewhere."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "docs"))

from make_site import build, modules, notebooks  # noqa: E402
from rendering import as_rst, mathml  # noqa: E402

# What a browser loads by itself; the target of an <a> is only followed by a reader.
LOADED = {"script", "link", "img", "iframe", "source", "embed", "object", "audio", "video"}
CODE = {"pre", "code", "script", "style", "math"}


class Page(HTMLParser):
    """The links of a page with their tags, the ids they may lead to, its prose and how many formulas and pictures it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[tuple[str, str]] = []
        self.ids: set[str] = set()
        self.prose = ""
        self.formulas = self.pictures = self._in_code = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.ids |= {found[name] or "" for name in ("id", "name") if name in found}
        self.links += [(tag, found[name] or "") for name in ("href", "src", "data") if name in found]
        self.formulas += tag == "math"
        self.pictures += tag == "img" and "_images/" in (found.get("src") or "")
        self._in_code += tag in CODE

    def handle_endtag(self, tag: str) -> None:
        self._in_code -= tag in CODE

    def handle_data(self, data: str) -> None:
        self.prose += "" if self._in_code else data


def pages(site: Path) -> dict[Path, Page]:
    return {file.resolve(): Page(file.read_text(encoding="utf-8")) for file in sorted(site.rglob("*.html"))}


def faults(site: Path) -> list[str]:
    """Links within the site that lead to no file or no id, and whatever a browser would load from elsewhere."""
    known, found = pages(site), []
    for file, page in known.items():
        name = file.relative_to(site.resolve())
        for tag, link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                if tag in LOADED and parts.scheme != "data":
                    found.append(f"{name}: <{tag}> loads {link}")
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            if not target.is_file() or not target.is_relative_to(site.resolve()):
                found.append(f"{name}: {link} leads to no file")
            elif parts.fragment and target in known and unquote(parts.fragment) not in known[target].ids:
                found.append(f"{name}: {link} leads to no id")
    for file in sorted(site.rglob("*.css")):
        loads = re.findall(r"""(?:url\(|@import)\s*["']?((?:https?:)?//[^"')\s]+)""", file.read_text(encoding="utf-8"))
        found += [f"{file.relative_to(site)}: loads {link}" for link in loads]
    return found


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    site = tmp_path_factory.mktemp("docs") / "site"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "docs/make_site.py", str(site)],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return site, run


@pytest.fixture(scope="session")
def site(built: tuple[Path, subprocess.CompletedProcess[str]]) -> Path:
    return built[0]


def test_it_builds_without_a_warning(built: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    site, run = built
    assert run.returncode == 0, run.stderr
    assert not re.search("WARNING|ERROR", run.stderr), run.stderr
    assert (site / "index.html").is_file()


def test_every_link_within_leads_somewhere_and_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    assert faults(site) == []
    assert sum(len(page.links) for page in pages(site).values()) > 1000  # the parser did see them


def test_every_notebook_has_a_page_in_the_table_of_contents_with_its_pictures(site: Path) -> None:
    contents = {link for _, link in Page((site / "index.html").read_text(encoding="utf-8")).links}
    assert notebooks()
    for notebook in notebooks():
        link = f"notebooks/{notebook.stem}.html"
        assert link in contents
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        outputs = [output for cell in cells for output in cell.get("outputs", [])]
        page = Page((site / link).read_text(encoding="utf-8"))
        assert page.pictures == sum("image/png" in output.get("data", {}) for output in outputs)


def test_every_public_module_has_a_page_with_what_it_defines(site: Path) -> None:
    links = {link for _, link in Page((site / "api" / "index.html").read_text(encoding="utf-8")).links}
    assert {"sferd_lab", "sferd_lab.diffusion", "sferd_lab.analysis", "sferd_lab.analysis.spatial"} < set(modules())
    for name, file in modules().items():
        assert f"{name}.html" in links
        page = Page((site / "api" / f"{name}.html").read_text(encoding="utf-8"))
        assert f"module-{name}" in page.ids
        if file.name != "__init__.py":
            defined = re.findall(r"^(?:def|class) ([A-Za-z]\w*)", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert {f"{name}.{each}" for each in defined} <= page.ids


def test_formulas_are_drawn_and_no_markup_is_left_in_the_prose(site: Path) -> None:
    for file, page in pages(site).items():
        left = re.findall(r"\\[A-Za-z]+|\$\$|``", page.prose)
        assert not left, f"{file.name}: {left}"
    assert Page((site / "method.html").read_text(encoding="utf-8")).formulas > 100
    assert Page((site / "notebooks" / "01_the_angle.html").read_text(encoding="utf-8")).formulas > 30


def test_the_method_and_the_changelog_are_there(site: Path) -> None:
    contents = {link for _, link in Page((site / "index.html").read_text(encoding="utf-8")).links}
    assert {"method.html", "changelog.html", "api/index.html"} <= contents


SOUND = '<link href="style.css"><h2 id="here">x</h2><a href="#here">1</a><a href="b.html#there">2</a><a href="https://example.org/#x">3</a>'


@pytest.mark.parametrize(
    ("broken", "fault"),
    [
        ('<a href="missing.html">', "a.html: missing.html leads to no file"),
        ('<a href="../outside.html">', "a.html: ../outside.html leads to no file"),
        ('<a href="b.html#nowhere">', "a.html: b.html#nowhere leads to no id"),
        ('<a href="#nowhere">', "a.html: #nowhere leads to no id"),
        ('<img src="missing.png">', "a.html: missing.png leads to no file"),
        ('<script src="https://example.org/x.js"></script>', "a.html: <script> loads https://example.org/x.js"),
        ('<link rel="stylesheet" href="//example.org/x.css">', "a.html: <link> loads //example.org/x.css"),
        ("<style>", "style.css: loads https://example.org/font.woff"),
    ],
)
def test_the_check_finds_a_fault(broken: str, fault: str, tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    (tmp_path / "outside.html").write_text("")
    (site / "b.html").write_text('<p id="there"><a href="a.html">back</a>')
    (site / "a.html").write_text(SOUND)
    (site / "style.css").write_text("p { background: url(data:image/png;base64,AA) }")
    assert faults(site) == []
    if broken == "<style>":
        (site / "style.css").write_text("@font-face { src: url('https://example.org/font.woff') }")
    else:
        (site / "a.html").write_text(SOUND + broken)
    assert faults(site) == [fault]


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    assert build(tmp_path) == 2
    assert "allowed: a new or empty folder" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    "formula", [r"\nosuchcommand x", r"\frac{a}", r"\frac{a", r"a}", r"x_", r"\begin{aligned} a &= b \\ c &= d \end{aligned}"]
)
def test_a_formula_that_is_not_understood_is_an_error(formula: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(formula))):
        mathml(formula, "block")


def test_braces_and_matrices_are_understood() -> None:
    assert "<mo>{</mo>" in re.sub(r' \w+="[^"]*"', "", mathml(r"\{0, 1\}", "inline"))
    assert mathml(r"\begin{matrix} a & b \\ c & d \end{matrix}", "block").count("<mtd") == 4


def test_functions_stand_apart_from_their_arguments_as_in_tex() -> None:
    space = '<mspace width="0.167em" />'
    assert f"<mi>cos</mi>{space}<mi>φ</mi>{space}<mi>sin</mi>{space}<mi>φ</mi>" in mathml(r"\cos\varphi\sin\varphi", "inline")
    assert f"<msup><mi>sin</mi><mn>2</mn></msup>{space}<mi>φ</mi>" in mathml(r"\sin^2\varphi", "inline")
    assert "<msup><mi>sin</mi><mn>2</mn></msup><mi>φ</mi>" in mathml(r"\sin^2\!\varphi", "inline")
    assert "mspace" not in mathml(r"\cos(\varphi - \psi) + \max(a, b)", "inline")


def test_signs_slashes_and_norms_are_set_as_in_tex() -> None:
    assert mathml(r"a = -b - c", "inline").count('form="prefix"') == 1
    assert '<mo lspace="0" rspace="0">/</mo>' in mathml(r"\pi/2", "inline")
    assert mathml(r"\frac{1}{2} \lVert x \rVert^2", "inline").count('stretchy="false"') == 2


def test_plain_docstrings_keep_their_letters_formulas_and_lists() -> None:
    plain = ["|x_phi| and *this* of ``x_phi``, a_", "", "    v = a * b_", "", "- ``one``: |x|", "  goes on", "", "After it."]
    assert as_rst(plain) == [
        r"\|x\_phi\| and \*this\* of ``x_phi``, a\_", "", ".. code-block:: text", "", "    v = a * b_", "",
        r"- ``one``: \|x\|", "  goes on", "", "After it.",
    ]  # fmt: skip
