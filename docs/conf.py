"""Settings of the manual."""

from importlib import metadata

project = "orthofast"
author = "the orthofast authors"
version = release = metadata.version("orthofast")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"orthofast {version}"
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autodoc_typehints = "description"
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
add_module_names = False
