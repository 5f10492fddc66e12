"""How the documentation is built: `make docs`, or python -m sphinx -W docs out/docs. Nothing is fetched."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE / "_extensions")]

from dagan_rt import __version__  # noqa: E402 (from this checkout)

project = "dagan-rt"
author = "the authors of dagan-rt"
copyright = "the authors of dagan-rt, Apache-2.0"
release = version = __version__

# plain_docstrings and command_pages are in docs/_extensions/.
extensions = ["myst_parser", "sphinx.ext.autodoc", "plain_docstrings", "command_pages"]
exclude_patterns = ["_extensions"]
root_doc = "index"
smartquotes = False  # they would turn the -- of options into dashes
nitpicky = False  # types of other libraries lead nowhere, since nothing is fetched

myst_enable_extensions = ["deflist"]
myst_heading_anchors = 4

autoclass_content = "both"  # what __init__ says of its arguments, too
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_class_signature = "mixed"
python_maximum_signature_line_length = 100
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = f"dagan-rt {release}"
html_static_path = ["_static"]
html_css_files = ["plain.css"]
html_copy_source = False
html_show_sphinx = False
# System fonts only, and no icons of anybody's site.
html_theme_options = {"footer_icons": []}
