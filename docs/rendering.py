"""The site's own Sphinx extension: formulas as MathML, docstrings as they are written here, and links from names in code type.

MathML is drawn by the browser itself, so the pages need no script from elsewhere and can be read offline.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any, Literal, get_args, get_origin
from xml.etree import ElementTree

from docutils import nodes
from latex2mathml.converter import convert
from pydantic import BaseModel
from sphinx.addnodes import desc_signature, pending_xref
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util import logging
from sphinx.writers.html5 import HTML5Translator

logger = logging.getLogger(__name__)

MATHML = "http://www.w3.org/1998/Math/MathML"
# TeX puts a thin space on both sides of these; the converter does not.
FUNCTIONS = {"cos", "sin", "tan", "cot", "log", "exp", "max", "min"}
CLOSING = {")", "]", "|", "\N{DOUBLE VERTICAL LINE}"}
THIN_SPACE = {"width": "0.167em"}
PARTS = {"mfrac": 2, "msub": 2, "msup": 2, "mover": 2, "munder": 2, "msubsup": 3, "munderover": 3}


def mathml(latex: str, display: str) -> str:
    """``latex`` as a MathML element; ``display`` is "inline" or "block". Raises ValueError for a formula that is not fully understood."""
    try:
        root = ElementTree.fromstring(convert(latex, display=display).replace(f' xmlns="{MATHML}"', ""))
    except Exception as error:
        # The converter raises a class of its own for each kind of mistake, and hands out what is no XML for commands it half knows.
        raise ValueError(f"{type(error).__name__} in {latex!r}") from error
    # What the converter does not understand passes through, as text or as a part too few; it closes a brace that is open.
    braces = re.findall(r"\\.|[{}]", latex, flags=re.DOTALL)
    unknown = any(re.search(r"[\\&]", element.text or "") for element in root.iter())
    incomplete = any(len(element) != PARTS.get(element.tag, len(element)) for element in root.iter())
    if unknown or incomplete or braces.count("{") != braces.count("}"):
        raise ValueError(f"not understood: {latex!r}")
    for element in root.iter():
        if element.tag == "mo" and element.text in ("|", "\N{DOUBLE VERTICAL LINE}"):
            element.attrib.setdefault("stretchy", "false")  # as tall as a fraction elsewhere in the row, otherwise
        if element.tag not in PARTS:
            _space_as_tex_does(element)
    root.set("xmlns", MATHML)
    return ElementTree.tostring(root, encoding="unicode")


def _space_as_tex_does(row: ElementTree.Element) -> None:
    """Space the parts of a row in place: the converter leaves that to browsers, whose rules differ from TeX's."""
    children = list(row)
    for before, child in zip([None, *children], children, strict=False):
        if child.tag != "mo":
            continue
        if child.text in FUNCTIONS:
            child.tag = "mi"
        elif child.text == "/":
            child.attrib |= {"lspace": "0", "rspace": "0"}
        elif child.text == "\N{MINUS SIGN}" and before is not None and before.tag == "mo" and before.text not in CLOSING:
            child.set("form", "prefix")  # a sign, not a difference
    for index, child in reversed(list(enumerate(children))):
        name = child[0] if child.tag in ("msup", "msub") else child
        if name.tag != "mi" or name.text not in FUNCTIONS:
            continue
        before, after = children[index - 1] if index else None, children[index + 1] if index + 1 < len(children) else None
        if after is not None and after.get("width") == "negativethinmathspace":  # \!, which takes TeX's space away
            row.remove(after)
        elif after is not None and after.tag not in ("mo", "mspace"):
            row.insert(index + 1, ElementTree.Element("mspace", THIN_SPACE))
        if before is not None and (before.tag not in ("mo", "mspace") or before.text == "\N{NABLA}"):
            row.insert(index, ElementTree.Element("mspace", THIN_SPACE))


def _visit(self: HTML5Translator, node: nodes.Element, display: str) -> None:
    try:
        element = mathml(node.astext(), display)
    except ValueError as error:
        logger.warning("formula: %s", error, location=node)
        element = ""
    self.body.append(f'<div class="formula">{element}</div>' if display == "block" else element)
    raise nodes.SkipNode


def visit_inline(self: HTML5Translator, node: nodes.math) -> None:
    """A formula within a line."""
    _visit(self, node, "inline")


def visit_block(self: HTML5Translator, node: nodes.math_block) -> None:
    """A formula on a line of its own."""
    _visit(self, node, "block")


def as_rst(lines: list[str]) -> list[str]:
    """A docstring in this project's plain style as reStructuredText.

    Plain: paragraphs, lists with "- ", formulas on indented lines, and names between double backticks. Nothing else is markup, so
    what reStructuredText would take for it (x_phi, |x|, E[x | y]) is escaped, and indented lines are kept as they are.
    """
    result: list[str] = []
    inside = in_list = False
    for index, line in enumerate(lines):
        starts = index == 0 or not lines[index - 1].strip()
        if line.startswith("    ") and starts and not inside and not in_list:
            inside = True
            result += [".. code-block:: text", ""]
        elif line.strip() and not line.startswith(" "):
            inside, in_list = False, line.startswith("- ") or (in_list and not starts)
        if inside:
            result.append(line)
            continue
        parts = re.split(r"(``.+?``)", line)
        result.append("".join(part if part.startswith("``") else re.sub(r"([\\*|_`])", r"\\\1", part) for part in parts))
    return result


def choices(annotation: Any) -> list[str]:
    """The values of the ``Literal`` types in an annotation."""
    found = [repr(value) for value in get_args(annotation) if get_origin(annotation) is Literal]
    return found + [value for inner in get_args(annotation) if get_origin(annotation) is not Literal for value in choices(inner)]


def settings_table(model: type[BaseModel]) -> list[str]:
    """The fields of a pydantic model, whose descriptions are their documentation, as a table."""
    lines = ["", ".. list-table::", "   :class: settings", "   :header-rows: 1", "   :widths: 28 20 52", ""]
    lines += ["   * - name", "     - default, else the preset's", "     - meaning"]
    for name, field in model.model_fields.items():
        default = "" if field.is_required() else f"``{field.default!r}``"
        allowed = ", ".join(f"``{value}``" for value in choices(field.annotation))
        meaning = f"{field.description or ''}{f' ({allowed})' if allowed else ''}"
        lines += [f"   * - ``{name}``", f"     - {default}", f"     - {as_rst([meaning])[0]}"]
    return [*lines, ""]


def process_docstring(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Turn the docstring ``lines`` into reStructuredText, in place."""
    lines[:] = as_rst(lines)
    if isinstance(obj, type) and issubclass(obj, BaseModel):
        lines += settings_table(obj)


def process_signature(app: Sphinx, what: str, name: str, obj: Any, *rest: Any) -> tuple[str, str] | None:
    """A pydantic model's signature would be its table once more, less readable."""
    return ("(**settings)", "") if isinstance(obj, type) and issubclass(obj, BaseModel) else None


def drop_object_as_base(app: Sphinx, document: nodes.document) -> None:
    """Say what a class inherits from only where it is something."""
    for paragraph in list(document.findall(nodes.paragraph)):
        if paragraph.astext() == "Bases: object":
            paragraph.parent.remove(paragraph)


class LinkNames(SphinxPostTransform):
    """Links from code type: a public function, class or method, a module's file, a notebook. Where a name is not unique there is none."""

    default_priority = 5  # before Sphinx resolves references

    def targets(self) -> dict[str, tuple[str, str, str]]:
        """Text to a reference's domain, type and target."""
        found: dict[str, tuple[str, str, str]] = {}
        entries = self.env.get_domain("py").objects.items()
        short = {}
        for full, entry in entries:
            if entry.objtype == "module":
                path = full.replace(".", "/") + ".py"
                found |= dict.fromkeys((full, path, path.removeprefix("sferd_lab/")), ("py", "mod", full))
            else:
                parts = 2 if entry.objtype in ("method", "classmethod", "staticmethod", "property", "attribute") else 1
                short[full] = ".".join(full.split(".")[-parts:])
        counts = Counter(short.values())
        # A plain word such as bootstrap is the name of a setting or an argument at least as often.
        found |= {text: ("py", "obj", full) for full, text in short.items() if counts[text] == 1 and re.search("[A-Z_.]", text)}
        for page in self.env.found_docs:
            if page.startswith("notebooks/"):
                name = page.removeprefix("notebooks/")
                found |= dict.fromkeys((f"{page}.ipynb", f"{name}.ipynb"), ("std", "doc", f"/{page}"))
                # A bare name means a notebook in the course, and may mean a module elsewhere.
                if self.env.docname.startswith("notebooks/") or name[0].isdigit():
                    found[name] = ("std", "doc", f"/{page}")
        return found

    def run(self, **kwargs: Any) -> None:
        """Wrap each such literal in a reference."""
        targets = self.targets()
        taken = [node for kind in (nodes.reference, pending_xref, desc_signature) for node in self.document.findall(kind)]
        taken += [table for table in self.document.findall(nodes.table) if "settings" in table["classes"]]
        within = {literal for node in taken for literal in node.findall(nodes.literal)}
        for literal in list(self.document.findall(nodes.literal)):
            if literal in within or literal.astext() not in targets:
                continue
            domain, kind, target = targets[literal.astext()]
            reference = pending_xref("", refdomain=domain, reftype=kind, reftarget=target, refexplicit=True, refdoc=self.env.docname)
            literal.replace_self(reference)
            reference += literal


def setup(app: Sphinx) -> dict[str, bool]:
    """Register all of it."""
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    app.connect("autodoc-process-docstring", process_docstring)
    app.connect("autodoc-process-signature", process_signature)
    app.connect("doctree-read", drop_object_as_base)
    app.add_post_transform(LinkNames)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
