"""Sphinx's configuration: ``make docs`` builds the pages with warnings as errors."""

import sys
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # for the extension beside this file

project = "foldpar"
author = "the foldpar developers"
version = release = metadata.version("foldpar")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "extension"]
exclude_patterns = []
root_doc = "index"

myst_heading_anchors = 3  # links to headings, as on the pages of a repository
myst_enable_extensions = ["colon_fence"]

autodoc_member_order = "bysource"
autodoc_default_options = {"exclude-members": "extra_repr"}  # what printing a module calls
autodoc_typehints = "none"  # the signatures have them
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Backward", "Source", "Drawn"]

html_theme = "furo"
html_title = f"foldpar {release}"
html_static_path = ["static"]
html_css_files = ["pages.css"]
html_show_copyright = False
pygments_style, pygments_dark_style = "friendly", "monokai"
