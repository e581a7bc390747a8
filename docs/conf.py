"""Settings of the manual."""

import re
from importlib import metadata
from typing import Any

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
napoleon_use_ivar = True
add_module_names = False

LITERAL = re.compile(r"(``.*?``)")


def keep_signs(_app: Any, _what: str, _name: str, _obj: Any, _options: Any, lines: list[str]) -> None:
    """Docstrings write |cos| and *kernel for readers of the source; reStructuredText would take them as markup."""
    for number, line in enumerate(lines):
        pieces = LITERAL.split(line)
        pieces[::2] = [re.sub(r"\||(?<![\w*])\*(?=\w)", r"\\\g<0>", piece) for piece in pieces[::2]]
        lines[number] = "".join(pieces)


def setup(app: Any) -> None:
    """Run before napoleon reads the docstrings."""
    app.connect("autodoc-process-docstring", keep_signs, priority=400)
