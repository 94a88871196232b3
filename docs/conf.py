"""Sphinx's settings. ``make_site.py`` gathers the pages and runs Sphinx on them; ``rendering.py`` is the project's own extension."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import sferd_lab

project = "sferd_lab"
author = copyright = "The sferd_lab authors"
version = release = sferd_lab.__version__

extensions = ["sphinx.ext.autodoc", "myst_nb", "rendering"]
# Straight quotes: "v" is a value to type.
smartquotes = False

# Notebooks are shown with the outputs they were committed with.
nb_execution_mode = "off"
myst_enable_extensions = ["dollarmath"]
# The explorers are still pictures here. Their widget manager would come from elsewhere, as would MathJax.
nb_ipywidgets_js = {}
html_math_renderer = "mathml"

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 100
add_module_names = False
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = "sferd_lab"
html_static_path = ["_static"]
html_css_files = ["style.css"]
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
